"""Continuous inputs: frames in place of token ids, subsampling inside each sequence, CTC, images of several sizes."""

# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false

from typing import Any

import pytest
import torch
from datasets import Dataset
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import Trainer, TrainingArguments

from hf_dynmask import (
    DataCollatorForFeatures,
    DynMaskConfig,
    DynMaskForCausalLM,
    DynMaskForCTC,
    DynMaskForMaskedLM,
    DynMaskForMultipleChoice,
    DynMaskForQuestionAnswering,
    DynMaskForSequenceClassification,
    DynMaskForTokenClassification,
    DynMaskModel,
)
from hf_dynmask.data import patch_positions, patches

LENGTHS = torch.tensor([7, 3, 0, 1, 12, 7, 5])
FEATURES = 5
SUBSAMPLING = {
    "projected": {},
    "whisper": {"conv_kernel": [3, 3], "conv_stride": [1, 2]},
    "speech2text": {"conv_kernel": [5, 5], "conv_stride": [2, 2]},
    "threes": {"conv_kernel": [3], "conv_stride": [3]},
}
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def config(**settings):
    defaults: dict[str, Any] = {
        "num_features": FEATURES,
        "vocab_size": 11,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 37,
        "max_position_embeddings": 20,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.2,
    }
    return DynMaskConfig(**defaults | settings)


def present(lengths=LENGTHS, width=12):
    return torch.arange(width) < lengths[:, None]


def frames(width=12):
    return torch.randn(len(LENGTHS), width, FEATURES)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=SUBSAMPLING, name="subsampling")
def each_subsampling(request):
    return SUBSAMPLING[request.param]


# --- what comes out --------------------------------------------------------------------------------------------------


def test_embeddings_are_those_of_torch_on_each_sequence_alone(subsampling):
    model = DynMaskModel(config(embedding_size=24, hidden_act="relu", **subsampling))
    inputs = frames()
    embeds, layout = model.embed_features(inputs, LENGTHS)
    lengths = model.output_lengths(LENGTHS)
    assert layout.lengths.sort().values.tolist() == lengths.sort().values.tolist()
    embeddings = model.embeddings.feature_embeddings
    for row, (length, left) in enumerate(zip(LENGTHS.tolist(), lengths.tolist(), strict=True)):
        if length:
            alone = inputs[row : row + 1, :length]
            if embeddings.projection is not None:
                alone = embeddings.projection(alone)
            for convolution in embeddings.convolutions:
                (kernel,), (stride,) = convolution.kernel_size, convolution.stride
                alone = nn.functional.conv1d(
                    alone.transpose(1, 2), convolution.weight, convolution.bias, stride, padding=kernel // 2
                )
                alone = alone.relu().transpose(1, 2)
            torch.testing.assert_close(embeds[row : row + 1, :left], alone, **CLOSE)
        assert (embeds[row, left:] == 0).all()


@pytest.mark.parametrize("position_type", ["learned", "sinusoidal", "rotary"])
def test_each_sequence_comes_out_as_alone(subsampling, position_type):
    model = DynMaskModel(config(position_type=position_type, mask="window(2, 1)", **subsampling)).eval()
    inputs = frames()
    output = model(input_features=inputs, lengths=LENGTHS)
    lengths = model.output_lengths(LENGTHS)
    assert output.last_hidden_state.shape == (7, model.output_lengths(torch.tensor(12)), 32)
    for row, (length, left) in enumerate(zip(LENGTHS.tolist(), lengths.tolist(), strict=True)):
        alone = model(input_features=inputs[row : row + 1, :length])
        assert alone.last_hidden_state.shape == (1, left, 32)
        torch.testing.assert_close(output.last_hidden_state[row, :left], alone.last_hidden_state[0], **CLOSE)
        torch.testing.assert_close(output.pooler_output[row], alone.pooler_output[0], **CLOSE)
        assert (output.last_hidden_state[row, left:] == 0).all()


def test_rows_and_flat_and_attention_mask_agree(subsampling):
    model = DynMaskModel(config(**subsampling)).eval()
    inputs = frames()
    rows = model(input_features=inputs, lengths=LENGTHS)
    lengths = model.output_lengths(LENGTHS)
    left = present(lengths, rows.last_hidden_state.shape[1])

    flat = model(input_features=inputs[present()][None], lengths=LENGTHS)
    assert flat.last_hidden_state.shape == (1, lengths.sum(), 32)
    torch.testing.assert_close(flat.last_hidden_state[0], rows.last_hidden_state[left], **CLOSE)
    torch.testing.assert_close(flat.pooler_output, rows.pooler_output, **CLOSE)

    wider = torch.full((7, 15, FEATURES), torch.nan)
    mask = torch.zeros(7, 15)
    for row, length in enumerate(LENGTHS.tolist()):
        places = torch.randperm(15)[:length].sort().values
        wider[row, places], mask[row, places] = inputs[row, :length], 1
    output = model(input_features=wider, attention_mask=mask)
    torch.testing.assert_close(output.pooler_output, rows.pooler_output, **CLOSE)
    kept = output.last_hidden_state[:, : left.shape[1]] if subsampling else output.last_hidden_state[mask.bool()]
    expected = rows.last_hidden_state if subsampling else rows.last_hidden_state[left]
    torch.testing.assert_close(kept, expected, **CLOSE)


@pytest.mark.parametrize("lengths", [[0, 0], []])
def test_batches_without_frames(subsampling, lengths):
    model = DynMaskModel(config(**subsampling))
    inputs = torch.randn(len(lengths), 4, FEATURES)
    output = model(input_features=inputs, lengths=torch.tensor(lengths, dtype=torch.long))
    assert output.last_hidden_state.shape == (len(lengths), model.output_lengths(torch.tensor(4)), 32)
    assert (output.last_hidden_state == 0).all()


def test_embeddings_in_place_of_frames():
    model = DynMaskModel(config(**SUBSAMPLING["whisper"])).eval()
    inputs = frames()
    embeds, layout = model.embed_features(inputs, LENGTHS)
    output = model(inputs_embeds=embeds, lengths=model.output_lengths(LENGTHS))
    expected = model(input_features=inputs, lengths=LENGTHS)
    torch.testing.assert_close(output.last_hidden_state, expected.last_hidden_state)


def test_fields_and_hidden_states_are_of_the_frames_that_are_left():
    model = DynMaskModel(config(mask="segments", **SUBSAMPLING["speech2text"])).eval()
    segments = torch.tensor([0, 0, 1]).expand(7, -1)
    inputs = frames()
    output = model(input_features=inputs, lengths=LENGTHS, segment_ids=segments, output_hidden_states=True)
    assert [states.shape for states in output.hidden_states] == [(7, 3, 32)] * 3
    whole = model(input_features=inputs, lengths=LENGTHS, segment_ids=torch.zeros(7, 3, dtype=torch.long))
    seen_alike = (output.last_hidden_state == whole.last_hidden_state).all(dim=-1).all(dim=-1)
    assert seen_alike.tolist() == [length <= 8 for length in LENGTHS]


@pytest.mark.parametrize("flat", [False, True])
def test_the_layout_of_outputs_is_known_without_frames(subsampling, flat):
    model = DynMaskModel(config(**subsampling))
    inputs, missing = frames(), torch.rand(7, 12) < 0.4
    if flat:
        inputs, missing = inputs[present()][None], missing[present()][None]
    _, expected = model.embed_features(inputs, LENGTHS, missing=missing)
    layout = model.output_layout(tuple(inputs.shape[:2]), inputs.device, LENGTHS, missing=missing)
    assert (layout.shape, layout.sizes) == (expected.shape, expected.sizes)
    for name in ("lengths", "positions", "sequence_ids"):
        assert torch.equal(getattr(layout, name), getattr(expected, name))
    flat_states = model(inputs_embeds=model.embed_features(inputs, LENGTHS)[0], layout=expected).last_hidden_state
    assert flat_states.shape == (1, expected.num_tokens, 32)


def test_output_lengths():
    model = DynMaskModel(config(**SUBSAMPLING["speech2text"]))
    assert model.output_lengths(torch.tensor([[0, 1, 4], [5, 8, 9]])).tolist() == [[0, 1, 1], [2, 2, 3]]
    assert model.config.inputs_to_logits_ratio == 4
    assert DynMaskModel(config()).output_lengths(LENGTHS).equal(LENGTHS)


# --- what is never read ----------------------------------------------------------------------------------------------


def outputs_and_gradients(model, inputs, **kwargs):
    model.zero_grad()
    inputs = inputs.clone().requires_grad_()
    output = model(input_features=inputs, **kwargs).last_hidden_state
    (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    assert inputs.grad is not None
    return output.detach(), inputs.grad, {name: weight.grad for name, weight in model.named_parameters()}


def assert_bit_equal(first, second):
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    for name, grad in first[2].items():
        assert (grad is None) == (second[2][name] is None)
        assert grad is None or torch.equal(grad, second[2][name]), name


@pytest.mark.parametrize("flat", [False, True])
def test_poison_in_absent_and_missing_frames_changes_no_bit(subsampling, flat):
    model = DynMaskModel(config(**subsampling), add_pooling_layer=False).eval()
    inputs, missing = frames(), torch.rand(7, 12) < 0.4
    missing[0, 2:6] = missing[4, 8:] = missing[5] = True  # a run, the end and the whole of a sequence
    if flat:
        inputs, missing = inputs[present()][None], missing[present()][None]
    poisoned = inputs.clone()
    poisoned[missing] = torch.nan
    if not flat:
        poisoned[~present()] = torch.nan
    given = {"lengths": LENGTHS, "missing": missing}
    clean = outputs_and_gradients(model, inputs, **given)
    assert_bit_equal(clean, outputs_and_gradients(model, poisoned, **given))
    assert clean[0].isfinite().all()
    assert (clean[1][missing] == 0).all()


def test_a_subsampled_frame_is_missing_where_all_that_it_stands_for_is():
    model = DynMaskModel(config(**SUBSAMPLING["speech2text"])).eval()
    missing = torch.zeros(1, 12, dtype=torch.bool)
    missing[0, 4:8] = missing[0, 9:] = True
    output = model(input_features=torch.randn(1, 12, FEATURES), missing=missing).last_hidden_state
    assert (output[0] != 0).any(dim=-1).tolist() == [True, False, True]


def test_missing_frames_read_as_zero_and_keep_their_position():
    model = DynMaskModel(config(conv_kernel=[3], conv_stride=[2])).eval()
    inputs = torch.randn(1, 8, FEATURES)
    missing = torch.zeros(1, 8, dtype=torch.bool)
    missing[0, [0, 5]] = True
    zeros = inputs.masked_fill(missing[..., None], 0)
    expected = model(input_features=zeros).last_hidden_state
    torch.testing.assert_close(model(input_features=inputs, missing=missing).last_hidden_state, expected, **CLOSE)


# --- heads -----------------------------------------------------------------------------------------------------------


def token_labels(width):
    return torch.where(present(-(-LENGTHS // 2), width), torch.randint(0, 2, (7, width)), -100)


HEADS = {
    DynMaskForTokenClassification: {"labels": token_labels(6)},
    DynMaskForSequenceClassification: {"labels": torch.tensor([0, 1, 1, 0, 1, 0, 1])},
    DynMaskForQuestionAnswering: {"start_positions": LENGTHS // 4, "end_positions": LENGTHS // 2},
    DynMaskForCTC: {"labels": torch.tensor([[1, 1], [2, -100], [-100, -100], [3, -100], [4, 5], [1, 2], [2, 3]])},
}


@pytest.mark.parametrize("head", HEADS)
def test_heads_train_and_are_saved(head, tmp_path):
    model = head(config(**SUBSAMPLING["whisper"])).train()
    assert model.main_input_name == "input_features"
    inputs = {"input_features": frames(), "lengths": LENGTHS, **HEADS[head]}
    loss = model(**inputs).loss
    loss.backward()
    assert loss > 0
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in model.parameters())
    model.save_pretrained(tmp_path)
    loaded = head.from_pretrained(tmp_path)
    assert loaded.main_input_name == "input_features"
    torch.testing.assert_close(loaded(**inputs).loss, loss)


def test_multiple_choice():
    model = DynMaskForMultipleChoice(config(**SUBSAMPLING["whisper"])).eval()
    inputs, lengths = torch.randn(3, 2, 9, FEATURES), torch.tensor([[9, 4], [1, 3], [7, 7]])
    output = model(input_features=inputs, lengths=lengths, labels=torch.tensor([0, 1, 0]))
    alone = model(input_features=inputs[:1, 1:, :4]).logits
    torch.testing.assert_close(alone[0, 0], output.logits[0, 1], **CLOSE)


@pytest.mark.parametrize("head", [DynMaskForCausalLM, DynMaskForMaskedLM])
def test_models_that_predict_their_tokens_read_tokens(head):
    with pytest.raises(ValueError, match=rf"`num_features` must be None in a {head.__name__}, .*; got 5"):
        head(config())


# --- CTC -------------------------------------------------------------------------------------------------------------

TARGETS = [[1, 1, 2], [3], [], [], [4, 5, 4, 4], [10, 9], [7, 7]]


def ctc_labels(targets=None, pad=-100):
    targets = TARGETS if targets is None else targets
    return nn.utils.rnn.pad_sequence([torch.tensor(row, dtype=torch.long) for row in targets], True, pad)


def losses_alone(model, inputs, blank=0):
    """torch's loss of each sequence that has frames."""
    losses = []
    for features, length, target in zip(inputs, LENGTHS.tolist(), TARGETS, strict=True):
        if length:
            logits = model(input_features=features[None, :length]).logits[0]
            left = torch.tensor([logits.shape[0]])
            target = torch.tensor([target], dtype=torch.long)
            sizes = torch.tensor([target.shape[1]])
            losses.append(
                nn.functional.ctc_loss(logits.log_softmax(-1)[:, None], target, left, sizes, blank, reduction="sum")
            )
    return torch.stack(losses)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("blank", [0, 6])
def test_ctc_is_that_of_torch_on_each_sequence_alone(flat, blank):
    model = DynMaskForCTC(config(ctc_loss_reduction="sum", pad_token_id=blank, **SUBSAMPLING["whisper"])).double()
    inputs = frames().double()
    losses_alone(model, inputs, blank).sum().backward()
    expected = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    batch = {"input_features": inputs[present()][None] if flat else inputs, "lengths": LENGTHS}
    output = model(**batch, labels=ctc_labels())
    torch.testing.assert_close(output.loss, losses_alone(model, inputs, blank).sum().float())
    output.loss.backward()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.grad, expected[name], atol=1e-5, rtol=1e-5)


def test_ctc_reductions():
    model = DynMaskForCTC(config(**SUBSAMPLING["whisper"])).eval()
    inputs = frames()
    losses = losses_alone(model, inputs)
    sizes = torch.tensor([len(target) for target, length in zip(TARGETS, LENGTHS, strict=True) if length])
    batch = {"input_features": inputs, "lengths": LENGTHS, "labels": ctc_labels()}
    torch.testing.assert_close(model(**batch).loss, (losses / sizes.clamp(min=1)).sum() / len(TARGETS))
    torch.testing.assert_close(model(**batch, num_items_in_batch=torch.tensor(24)).loss, losses.sum() / 24)


def test_ctc_loss_over_several_batches_is_the_loss_over_all():
    model = DynMaskForCTC(config(**SUBSAMPLING["whisper"]))
    batch = {"input_features": frames(), "lengths": LENGTHS, "labels": ctc_labels()}
    items = int((batch["labels"] != -100).sum())
    halves = [{name: value[rows] for name, value in batch.items()} for rows in (slice(0, 2), slice(2, 7))]
    parts = sum(model(**half, num_items_in_batch=items).loss for half in halves)
    torch.testing.assert_close(parts, model(**batch, num_items_in_batch=items).loss)


def test_what_stands_around_a_ctc_target_changes_nothing():
    model = DynMaskForCTC(config())
    batch = {"input_features": frames(), "lengths": LENGTHS}
    expected = model(**batch, labels=ctc_labels()).loss
    assert torch.equal(model(**batch, labels=ctc_labels(pad=0)).loss, expected)
    inside = [[-100, *target, -100, 0] for target in TARGETS]
    assert torch.equal(model(**batch, labels=ctc_labels(inside)).loss, expected)


def test_ctc_logits_of_absent_frames_are_zero():
    model = DynMaskForCTC(config(**SUBSAMPLING["whisper"]))
    logits = model(input_features=frames(), lengths=LENGTHS).logits
    assert ((logits == 0).all(-1) == ~present(model.output_lengths(LENGTHS), 6)).all()


def test_ctc_of_a_batch_without_frames():
    loss = DynMaskForCTC(config())(
        input_features=torch.zeros(2, 3, FEATURES),
        lengths=torch.zeros(2, dtype=torch.long),
        labels=ctc_labels([[], []]),
    ).loss
    loss.backward()
    assert loss == 0


def test_ctc_counts_missing_frames_as_none():
    model = DynMaskForCTC(config()).eval()
    inputs, missing = torch.randn(1, 4, FEATURES), torch.tensor([[False, True, False, False]])
    labels = torch.tensor([[1, 2, 3]])
    model(input_features=inputs, missing=missing, labels=labels)
    with pytest.raises(ValueError, match=r"the 4 labels of sequence 0 need 4 frames .*; got 3"):
        model(input_features=inputs, missing=missing, labels=torch.tensor([[1, 2, 3, 4]]))


@pytest.mark.parametrize(
    "targets, message",
    [
        ([*TARGETS[:-1], [1, 2, 3, 4]], r"the 4 labels of sequence 6 need 4 frames .*; got 3\."),
        ([[5, 5, 5], *TARGETS[1:]], r"the 3 labels of sequence 0 need 5 frames \(with one for the blank .*; got 4\."),
        ([*TARGETS[:2], [1], *TARGETS[3:]], r"the 1 labels of sequence 2 need 1 frames .*; got 0\. Leave it out"),
    ],
    ids=["labels", "repeats", "no frames"],
)
def test_ctc_target_beyond_its_frames(targets, message):
    settings = SUBSAMPLING["whisper"]
    batch = {"input_features": frames(), "lengths": LENGTHS, "labels": ctc_labels(targets)}
    with pytest.raises(ValueError, match=message):
        DynMaskForCTC(config(**settings))(**batch)
    model = DynMaskForCTC(config(ctc_zero_infinity=True, ctc_loss_reduction="sum", **settings))
    model(**batch).loss.backward()
    assert all(weight.grad.isfinite().all() for weight in model.parameters())
    fitting = [target if target == before else [] for target, before in zip(targets, TARGETS, strict=True)]
    without = model(**batch | {"labels": ctc_labels(fitting)}).loss
    longest = [row for row, target in enumerate(targets) if target != TARGETS[row]]
    blank_alone = model(
        input_features=batch["input_features"][longest], lengths=LENGTHS[longest], labels=torch.full((1, 1), -100)
    ).loss
    torch.testing.assert_close(model(**batch).loss, without - blank_alone)


@pytest.mark.parametrize(
    "labels, message",
    [
        (torch.ones(6, 2, dtype=torch.long), r"`labels` must have shape \(sequences, L\), with 7 .*; got \(6, 2\)"),
        (torch.ones(7, dtype=torch.long), r"`labels` must have shape \(sequences, L\), with 7 .*; got \(7,\)"),
        (ctc_labels([*TARGETS[:-1], [11]]), r"`labels` must be from 0 to vocab_size - 1 = 10; got 11"),
        (ctc_labels([*TARGETS[:-1], [-1]]), r"`labels` must be from 0 to vocab_size - 1 = 10; got -1"),
    ],
)
def test_bad_ctc_labels(labels, message):
    with pytest.raises(ValueError, match=message):
        DynMaskForCTC(config())(input_features=frames(), lengths=LENGTHS, labels=labels)


@pytest.mark.parametrize("blank", [None, 11])
def test_ctc_without_a_blank(blank):
    with pytest.raises(ValueError, match=rf"`pad_token_id`, the blank, must be from 0 to .* = 10; got {blank}"):
        DynMaskForCTC(config(pad_token_id=blank))


@pytest.mark.parametrize("flat", [False, True])
def test_ctc_learns_under_the_trainer(flat, tmp_path):
    """A label is a direction of its frames: each is learnt from sequences of different lengths."""
    directions = torch.randn(4, FEATURES) * 3
    rows = []
    for _ in range(64):
        target = torch.randint(1, 4, (int(torch.randint(1, 5, ())),))
        spread = torch.stack([target, torch.zeros_like(target)], 1).flatten().repeat_interleave(4)
        rows.append({"input_features": directions[spread].tolist(), "labels": target.tolist(), "text": "a"})
    dataset = Dataset.from_list(rows)
    settings = {"vocab_size": 4, "num_hidden_layers": 1, "mask": "window(1)", "initializer_range": 0.1}
    model = DynMaskForCTC(config(**settings, **SUBSAMPLING["whisper"]))
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=60,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        gradient_accumulation_steps=2,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        include_num_input_tokens_seen=True,
    )
    trainer = Trainer(
        model, arguments, train_dataset=dataset, eval_dataset=dataset, data_collator=DataCollatorForFeatures(flat=flat)
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before / 10
    assert trainer.state.num_input_tokens_seen > 0
    logits = model.eval()(input_features=torch.tensor(rows[0]["input_features"])[None]).logits[0]
    assert [label for label in logits.argmax(-1).unique_consecutive().tolist() if label] == rows[0]["labels"]


# --- images ----------------------------------------------------------------------------------------------------------

IMAGES = [(8, 12), (12, 8), (4, 4), (9, 17)]


def test_patches_are_those_of_a_convolution():
    image = torch.randn(3, 8, 12)
    weight = torch.randn(6, 3, 4, 4)
    expected = nn.functional.conv2d(image[None], weight, stride=4).flatten(2)[0].T
    torch.testing.assert_close(patches(image, 4) @ weight.flatten(1).T, expected)


def test_patches_at_the_ends_are_filled_up():
    image = torch.arange(1, 16).view(1, 3, 5)
    assert patches(image, 2).tolist() == [
        [1, 2, 6, 7],
        [3, 4, 8, 9],
        [5, 0, 10, 0],
        [11, 12, 0, 0],
        [13, 14, 0, 0],
        [15, 0, 0, 0],
    ]


def test_patch_positions_are_places_on_a_common_grid():
    assert patch_positions(torch.zeros(3, 8, 9), 4, columns=5).tolist() == [0, 1, 2, 5, 6, 7]


@pytest.mark.parametrize("flat", [False, True])
def test_images_of_several_sizes_in_a_batch_equal_one_at_a_time(flat):
    model = DynMaskForSequenceClassification(config(num_features=48, max_position_embeddings=25)).eval()
    images = [torch.randn(3, *size) for size in IMAGES]
    examples = [
        {"input_features": patches(image, 4), "position_ids": patch_positions(image, 4, columns=5)} for image in images
    ]
    batch = DataCollatorForFeatures(flat=flat)(examples)
    assert batch["lengths"].tolist() == [6, 6, 1, 15]
    logits = model(**batch).logits
    for image, row in zip(images, logits, strict=True):
        positions = patch_positions(image, 4, columns=5)[None]
        alone = model(input_features=patches(image, 4)[None], position_ids=positions).logits[0]
        torch.testing.assert_close(row, alone, **CLOSE)


@pytest.mark.parametrize(
    "function, message",
    [
        (lambda: patches(torch.zeros(8, 8), 4), r"`image` must have shape \(channels, height, width\); got \(8, 8\)"),
        (lambda: patches(torch.zeros(3, 8, 8), 0), r"`size` must be at least 1; got 0"),
        (lambda: patch_positions(torch.zeros(3, 8, 9), 4, 2), r"at most 2 patches of 4 pixels wide; got 3 patches"),
    ],
)
def test_bad_images(function, message):
    with pytest.raises(ValueError, match=message):
        function()


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"input_features": torch.zeros(7, 12, 4)},
            r"`input_features` must have shape \(B, T, num_features=5\); got \(7, 12, 4\)",
        ),
        (
            {"input_features": torch.zeros(7, 12)},
            r"`input_features` must have shape \(B, T, num_features=5\); got \(7, 12\)",
        ),
        ({"lengths": LENGTHS + 1}, r"`lengths` must not be beyond the row width 12; got 13"),
        ({"attention_mask": torch.ones(7, 12)}, r"`lengths` and `attention_mask` must name the same tokens"),
        ({"missing": torch.ones(7, 6, dtype=torch.bool)}, r"`missing` must be bool of shape \(7, 12\); got .*\(7, 6\)"),
        (
            {"input_features": None},
            r"exactly one of `input_features` and `inputs_embeds` must be given; got neither",
        ),
        (
            {"input_features": None, "input_ids": torch.ones(7, 12, dtype=torch.long)},
            r"exactly one of `input_features` and `inputs_embeds` must be given; got input_ids",
        ),
        (
            {"input_ids": torch.ones(7, 12, dtype=torch.long)},
            r"exactly one of `input_features` and `inputs_embeds` must be given; got input_ids and input_features",
        ),
        (
            {"inputs_embeds": torch.zeros(7, 12, 32)},
            r"exactly one of .* must be given; got input_features and inputs_embeds",
        ),
        ({"segment_ids": torch.ones(7, 12)}, r"the field `segment_ids` must have shape \(7, 6\); got \(7, 12\)"),
    ],
)
@pytest.mark.parametrize("head", [DynMaskModel, DynMaskForCTC])
def test_bad_batches(head, change, message):
    model = head(config(mask="segments", **SUBSAMPLING["whisper"]))
    batch = {"input_features": frames(), "lengths": LENGTHS, "segment_ids": torch.zeros(7, 6, dtype=torch.long)}
    with pytest.raises(ValueError, match=message):
        model(**batch | change)


@pytest.mark.parametrize("head", [DynMaskModel, DynMaskForTokenClassification])
def test_frames_for_a_model_of_tokens(head):
    with pytest.raises(ValueError, match=r"exactly one of `input_ids` and `inputs_embeds` .*; got input_features"):
        head(config(num_features=None))(input_features=frames())


def test_frames_beyond_the_position_table_are_counted_behind_the_subsampling():
    model = DynMaskModel(config(max_position_embeddings=6, **SUBSAMPLING["whisper"]))
    model(input_features=torch.zeros(1, 12, FEATURES))
    with pytest.raises(ValueError, match=r"at most 6 tokens \(`max_position_embeddings`\); got 7"):
        model(input_features=torch.zeros(1, 13, FEATURES))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"num_features": 0}, r"`num_features` must be at least 1; got 0"),
        ({"num_features": None, "conv_kernel": [3], "conv_stride": [1]}, r"`num_features` must be given .*=\[3\]"),
        ({"conv_kernel": [3, 3], "conv_stride": [2]}, r"`conv_stride` must have one .* conv_kernel=\[3, 3\] .*\[2\]"),
        ({"conv_kernel": [4], "conv_stride": [2]}, r"`conv_kernel` must hold odd numbers; got 4"),
        ({"conv_kernel": [3], "conv_stride": [4]}, r"`conv_stride` must be from 1 to the window's 3 frames; got 4"),
        ({"conv_kernel": [3], "conv_stride": [0]}, r"`conv_stride\[0\]` must be at least 1; got 0"),
        ({"ctc_loss_reduction": "none"}, r"`ctc_loss_reduction` must be one of 'mean', 'sum'; got 'none'"),
    ],
)
def test_bad_configurations(settings, message):
    with pytest.raises(StrictDataclassError, match=message):
        config(**settings)
