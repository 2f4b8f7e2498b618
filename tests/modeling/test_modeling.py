"""The batch contract of the models: layouts in and out, losses, errors. (Against stock models: tests/conversion.)"""

# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false

from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError

from hf_dynmask import (
    DynMaskConfig,
    DynMaskForMaskedLM,
    DynMaskForMultipleChoice,
    DynMaskForQuestionAnswering,
    DynMaskForSequenceClassification,
    DynMaskForTokenClassification,
    DynMaskModel,
)

LENGTHS = torch.tensor([7, 3, 0, 1, 7, 5])
MASKS = ["full", "causal & window(2, 0)", "segments", "visible | diagonal", "~full"]


def config(**settings):
    defaults: dict[str, Any] = {
        "vocab_size": 99,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 37,
        "max_position_embeddings": 20,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    return DynMaskConfig(**defaults | settings)


def batch(width=9):
    """Rows with `LENGTHS` tokens from the left edge, and fields for every mask."""
    return {
        "input_ids": torch.randint(5, 99, (len(LENGTHS), width)),
        "lengths": LENGTHS,
        "segment_ids": torch.randint(0, 2, (len(LENGTHS), width)),
        "hidden_spans": torch.tensor([[[1, 2]]]).expand(len(LENGTHS), -1, -1),
    }


def present(width=9):
    return torch.arange(width) < LENGTHS[:, None]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_every_attention_implementation_gives_the_same(mask, implementation):
    model = DynMaskModel(config(layer_masks=[mask, "window(1)"])).eval()
    inputs = batch()
    expected = model(**inputs).last_hidden_state
    model.set_attn_implementation(implementation)
    torch.testing.assert_close(model(**inputs).last_hidden_state, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mask", MASKS)
def test_rows_and_flat_and_attention_mask_agree(mask):
    model = DynMaskModel(config(mask=mask)).eval()
    inputs = batch()
    rows = model(**inputs)
    assert (rows.last_hidden_state[~present()] == 0).all()

    flat = {name: inputs[name][present()][None] for name in ("input_ids", "segment_ids")}
    flat = model(**flat, lengths=LENGTHS, hidden_spans=inputs["hidden_spans"])
    torch.testing.assert_close(flat.last_hidden_state[0], rows.last_hidden_state[present()], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(flat.pooler_output, rows.pooler_output, atol=1e-5, rtol=1e-5)

    shift = 9 - LENGTHS  # the same tokens at the right edge
    places = (torch.arange(9) - shift[:, None]) % 9
    moved = {name: inputs[name].gather(1, places) for name in ("input_ids", "segment_ids")}
    mask_of_left_padding = (torch.arange(9) >= shift[:, None]).long()
    left = model(**moved, attention_mask=mask_of_left_padding, hidden_spans=inputs["hidden_spans"])
    expected = rows.last_hidden_state.gather(1, places[:, :, None].expand(-1, -1, 32))
    torch.testing.assert_close(left.last_hidden_state, expected, atol=1e-5, rtol=1e-5)


def test_what_stands_at_absent_places_is_never_read():
    model = DynMaskModel(config()).eval()
    inputs = batch()
    expected = model(**inputs).last_hidden_state
    embeds = model.embeddings.word_embeddings(inputs["input_ids"]).detach()
    embeds[~present()] = torch.nan
    embeds.requires_grad_()
    output = model(inputs_embeds=embeds, lengths=LENGTHS).last_hidden_state
    assert torch.equal(output, expected)
    output.sum().backward()
    assert embeds.grad[present()].isfinite().all()
    assert (embeds.grad[~present()] == 0).all()


def test_hidden_tokens_change_no_bit():
    model = DynMaskModel(config(mask="causal & window(3, 0)")).eval()
    inputs = batch()
    expected = model(**inputs).last_hidden_state
    inputs["input_ids"][0, 6] = (inputs["input_ids"][0, 6] + 1) % 99
    changed = model(**inputs).last_hidden_state
    assert torch.equal(changed[0, :6], expected[0, :6])
    assert torch.equal(changed[1:], expected[1:])
    assert not torch.equal(changed[0, 6], expected[0, 6])


def test_empty_batch():
    output = DynMaskModel(config())(torch.empty(0, 4, dtype=torch.long), lengths=torch.empty(0, dtype=torch.long))
    assert output.last_hidden_state.shape == (0, 4, 32)
    assert output.pooler_output.shape == (0, 32)


def test_hidden_states_and_attentions_come_in_the_layout_of_the_batch():
    model = DynMaskModel(config(mask="causal"), add_pooling_layer=False).eval()
    model.set_attn_implementation("eager")
    output = model(**batch(), output_hidden_states=True, output_attentions=True)
    assert [state.shape for state in output.hidden_states] == [(6, 9, 32)] * 3
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)
    weights = output.attentions[0]
    assert weights.shape == (6, 4, 9, 9)
    assert (weights.triu(1) == 0).all()
    torch.testing.assert_close(weights.sum(-1), present()[:, None].expand(-1, 4, -1).float())


TOKEN_LABELS = torch.where(present(), torch.randint(0, 2, (6, 9)), -100)
HEADS = {
    DynMaskForMaskedLM: {"labels": TOKEN_LABELS},
    DynMaskForTokenClassification: {"labels": TOKEN_LABELS},
    DynMaskForSequenceClassification: {"labels": torch.tensor([0, 1, 1, 0, 1, 0])},
    DynMaskForQuestionAnswering: {"start_positions": LENGTHS // 2, "end_positions": LENGTHS // 2},
}


@pytest.mark.parametrize("head", HEADS)
def test_loss_over_several_batches_is_the_loss_over_all(head):
    model = head(config()).train()
    inputs, targets = batch() | HEADS[head], HEADS[head]
    answers = LENGTHS > 0  # an empty sequence holds none
    items = int((targets["labels"] != -100 if "labels" in targets else answers).sum())
    whole = model(**inputs).loss
    halves = [{name: value[rows] for name, value in inputs.items()} for rows in (slice(0, 2), slice(2, 6))]
    parts = sum(model(**half, num_items_in_batch=torch.tensor(items)).loss for half in halves)
    torch.testing.assert_close(parts, whole)


@pytest.mark.parametrize(
    "problem, labels",
    [
        ("regression", torch.randn(6, 2)),
        ("multi_label_classification", torch.randint(0, 2, (6, 2)).float()),
        ("single_label_classification", torch.randint(0, 2, (6,))),
    ],
)
def test_sequence_losses_take_the_number_of_items(problem, labels):
    model = DynMaskForSequenceClassification(config(problem_type=problem)).eval()
    inputs = batch()
    expected = {
        "regression": torch.nn.functional.mse_loss,
        "multi_label_classification": torch.nn.functional.binary_cross_entropy_with_logits,
        "single_label_classification": torch.nn.functional.cross_entropy,
    }[problem]
    output = model(**inputs, labels=labels)
    torch.testing.assert_close(output.loss, expected(output.logits, labels))
    torch.testing.assert_close(
        model(**inputs, labels=labels, num_items_in_batch=10 * labels.numel()).loss, output.loss / 10
    )


def test_multiple_choice_takes_lengths_a_choice():
    model = DynMaskForMultipleChoice(config()).eval()
    ids = torch.randint(5, 99, (3, 2, 9))
    lengths = torch.tensor([[9, 4], [1, 3], [7, 7]])
    output = model(ids, lengths=lengths, labels=torch.tensor([0, 1, 0]))
    assert output.logits.shape == (3, 2)
    alone = model(ids[:1, 1:, :4], lengths=torch.tensor([[4]])).logits
    torch.testing.assert_close(alone[0, 0], output.logits[0, 1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pooling", ["first", "last", "mean", "late"])
@pytest.mark.parametrize("transform", ["pooler", "lm_head", "none"])
def test_what_is_pooled_does_not_depend_on_the_rest_of_a_batch(pooling, transform):
    settings = {"classifier_pooling": pooling, "classifier_transform": transform, "classifier_bias": False}
    model = DynMaskForSequenceClassification(config(**settings)).eval()
    ids, labels = batch()["input_ids"], torch.tensor([1, 0, 1, 1, 0, 0])
    rows = model(ids, lengths=LENGTHS, labels=labels)
    assert rows.logits.isfinite().all()  # of an empty sequence, too
    poisoned = model(ids.where(present(), 98), lengths=LENGTHS, labels=labels)
    assert torch.equal(poisoned.logits, rows.logits)
    flat = model(ids[present()][None], lengths=LENGTHS, labels=labels)
    torch.testing.assert_close(flat.logits, rows.logits, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(flat.loss, rows.loss, atol=1e-6, rtol=1e-5)


def test_zero_centered_norms_begin_as_norms_whose_weight_is_1():
    settings = {"norm_placement": "both", "use_qk_norm": True, "query_pre_attn_scalar": 9.0}
    centered = DynMaskModel(config(norm_type="zero_centered_rms_norm", **settings)).eval()
    plain = DynMaskModel(config(norm_type="rms_norm", **settings)).eval()
    plain.load_state_dict(
        {name: weight + 1 if "norm" in name else weight for name, weight in centered.state_dict().items()}
    )
    assert all((weight == 1).all() for name, weight in plain.state_dict().items() if "norm" in name)
    inputs = batch()
    expected, found = plain(**inputs).last_hidden_state, centered(**inputs).last_hidden_state
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    found = centered.bfloat16()(**inputs).last_hidden_state
    torch.testing.assert_close(found.float(), expected, atol=0.1, rtol=0.1)


def test_training_on_no_target_gives_a_finite_loss():
    model = DynMaskForMaskedLM(config()).train()
    loss = model(**batch(), labels=torch.full((6, 9), -100)).loss
    loss.backward()
    assert loss == 0
    assert all(weight.grad is None or weight.grad.isfinite().all() for weight in model.parameters())


def test_masked_language_model_computes_logits_for_its_targets_alone():
    model = DynMaskForMaskedLM(config()).train()
    labels = torch.full((6, 9), -100)
    labels[0, 2] = labels[4, 6] = 7
    seen = []
    model.lm_head.decoder.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    trained = model(**batch(), labels=labels)
    assert trained.logits is None
    assert seen == [(2, 99)]
    assert model.eval()(**batch(), labels=labels).logits.shape == (6, 9, 99)


def test_output_embeddings_are_the_input_embeddings():
    model = DynMaskForMaskedLM(config())
    assert model.lm_head.decoder.weight is model.model.embeddings.word_embeddings.weight
    assert DynMaskForMaskedLM(config(tie_word_embeddings=False)).lm_head.decoder.weight is not (
        model.model.embeddings.word_embeddings.weight
    )


# torch.compile looks at every tensor's `.grad` where a graph ends.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_model_gives_the_same():
    model = DynMaskForSequenceClassification(config(mask="causal & window(2, 0)"))
    inputs = batch() | {"labels": torch.tensor([0, 1, 1, 0, 1, 0])}
    expected = model(**inputs)
    expected.loss.backward()
    grads = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    output = torch.compile(model, backend="aot_eager")(**inputs)
    output.loss.backward()
    torch.testing.assert_close(output.logits, expected.logits)
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.grad, grads[name])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"lengths": torch.tensor([7, 3])}, r"`lengths` must have one entry a row, shape \(6,\).*got shape \(2,\)"),
        ({"lengths": LENGTHS + 3}, r"`lengths` must not be beyond the row width 9; got 10"),
        ({"lengths": LENGTHS - 1}, r"`lengths` must not be negative; got -1"),
        ({"lengths": LENGTHS.float()}, r"`lengths` must be integers; got dtype torch.float32"),
        ({"attention_mask": torch.ones(6, 9)}, r"`lengths` and `attention_mask` must name the same tokens"),
        ({"attention_mask": torch.ones(6, 8)}, r"`attention_mask` must have the input's shape \(6, 9\); got \(6, 8\)"),
        ({"segment_ids": None}, r"the mask 'segments' reads the field `segment_ids`, which the batch lacks"),
        ({"segment_ids": torch.ones(6, 8)}, r"the field `segment_ids` must have shape \(6, 9\); got \(6, 8\)"),
        ({"input_ids": None}, r"exactly one of `input_ids` and `inputs_embeds` must be given"),
        ({"input_ids": torch.ones(9).long()}, r"`input_ids` must have shape \(B, T\); got \(9,\)"),
        ({"input_ids": torch.full((6, 9), 99)}, r"`input_ids` must be from 0 to 98; got 99"),
        ({"input_ids": torch.full((6, 9), -100)}, r"`input_ids` must be from 0 to 98; got -100"),
        ({"position_ids": torch.full((6, 9), 20)}, r"`position_ids` must be from 0 to 19; got 20"),
        ({"token_type_ids": torch.full((6, 9), 2)}, r"`token_type_ids` must be from 0 to 1; got 2"),
        ({"token_type_ids": torch.ones(6, 8)}, r"`token_type_ids` must have the input's shape \(6, 9\).*got \(6, 8\)"),
        (
            {"input_ids": None, "inputs_embeds": torch.ones(6, 32)},
            r"`inputs_embeds` must have shape \(B, T, embedding_size\); got \(6, 32\)",
        ),
        (
            {"input_ids": None, "inputs_embeds": torch.ones(6, 9, 31)},
            r"`inputs_embeds` must have shape \(B, T, embedding_size=32\); got \(6, 9, 31\)",
        ),
        ({"output_attentions": True}, r"`output_attentions` needs attn_implementation='eager'.*got 'dynmask'"),
    ],
)
@pytest.mark.parametrize("head", [DynMaskModel, DynMaskForTokenClassification])
def test_bad_batches(head, change, message):
    with pytest.raises(ValueError, match=message):
        head(config(mask="segments", type_vocab_size=2))(**batch() | change)


def test_choices_that_are_none():
    with pytest.raises(ValueError, match=r"`input_ids` must have shape \(B, choices, T\); got \(6, 9\)"):
        DynMaskForMultipleChoice(config())(batch()["input_ids"], lengths=LENGTHS)


def test_flat_batch_that_was_split():
    with pytest.raises(
        ValueError, match=r"must add up to at most its width 9; got a sum of 16.*cannot be split over devices"
    ):
        DynMaskModel(config())(torch.ones(1, 9, dtype=torch.long), lengths=LENGTHS[3:] + 1)


def test_sequence_beyond_the_position_table():
    with pytest.raises(ValueError, match=r"at most 18 tokens \(`max_position_embeddings`\); got 19"):
        DynMaskModel(config(position_offset=2))(torch.ones(1, 19, dtype=torch.long))


@pytest.mark.parametrize("name", ["nonsense", "flex_attention"])
def test_unknown_attention_implementation_lists_the_known(name):
    with pytest.raises(ValueError, match="'dynmask', 'eager', 'sdpa'"):
        DynMaskModel(config()).get_correct_attn_implementation(name)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"num_key_value_heads": 3}, r"`num_key_value_heads` must divide num_attention_heads=4; got 3"),
        ({"layer_masks": ["full"]}, r"`layer_masks` must have one entry a layer, num_hidden_layers=2; got 1"),
        ({"mask": "causal & wndow(3)"}, r"column 10: unknown mask `wndow`"),
        ({"norm_type": "batch_norm"}, r"`norm_type` must be one of 'layer_norm', 'rms_norm', .*; got 'batch_norm'"),
        ({"position_type": "rotary", "head_dim": 7}, r"`head_dim` must be even .* got 7|even rotary .* `head_dim`=7"),
        (
            {"position_type": "rotary", "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            r"`partial_rotary_factor` must be 1.0: heads are rotated whole; got 0.5",
        ),
        (
            {"first_attention_norm": False},
            r"`first_attention_norm` must be True with norm_placement='post'; got False",
        ),
        ({"head_dim": 0}, r"`head_dim` must be at least 1; got 0"),
    ],
)
def test_bad_configurations(settings, message):
    with pytest.raises(StrictDataclassError, match=message):
        config(**settings)


# --- NaN -------------------------------------------------------------------------------------------------------------

FORMS = {
    "flat": {"lengths": torch.tensor([4, 5, 3])},
    "positions that restart": {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 1, 2]])},
    "flat, one of no tokens": {"lengths": torch.tensor([4, 0, 5, 3])},
    "flat, some missing": {"lengths": torch.tensor([4, 5, 3]), "missing": torch.arange(12)[None] % 6 == 5},
}
OTHERS = torch.tensor([True] * 4 + [False] * 5 + [True] * 3)


def check_nan_stays_in_its_sequence(run, form, value):
    embeds = torch.randn(1, 12, 32, requires_grad=True)
    poisoned = embeds.detach().clone()
    poisoned[0, 6, 7] = value
    results = []
    for inputs in (embeds, poisoned.requires_grad_()):
        output = run(inputs_embeds=inputs, **FORMS[form]).last_hidden_state[0]
        (grad,) = torch.autograd.grad(output[OTHERS].square().sum(), inputs)
        results.append((output[OTHERS], grad[0, OTHERS]))
    assert output[~OTHERS].isnan().any()
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("mask", ["full", "causal & window(1, 0)", "heads(full, random(0.5, 1))"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("implementation", ["dynmask", "sdpa", "eager"])
def test_nan_stays_in_its_sequence(implementation, form, mask, value):
    model = DynMaskModel(config(mask=mask, attn_implementation=implementation)).eval()
    check_nan_stays_in_its_sequence(model, form, value)


@pytest.mark.parametrize("implementation", ["dynmask", "sdpa", "eager"])
def test_nan_stays_in_its_sequence_in_a_graph(implementation):
    torch.compiler.reset()
    model = DynMaskModel(config(mask="causal", attn_implementation=implementation)).eval()
    check_nan_stays_in_its_sequence(torch.compile(model, backend="aot_eager", fullgraph=True), "flat", torch.nan)


@pytest.mark.parametrize("implementation", ["dynmask", "sdpa", "eager"])
def test_nan_stays_in_its_row(implementation):
    model = DynMaskModel(config(mask="window(2)", attn_implementation=implementation)).eval()
    embeds, others = torch.randn(len(LENGTHS), 9, 32), torch.tensor([0, 1, 2, 3, 5])
    expected = model(inputs_embeds=embeds, lengths=LENGTHS).last_hidden_state
    poisoned = embeds.masked_fill(~present()[..., None], torch.nan)
    torch.testing.assert_close(model(inputs_embeds=poisoned, lengths=LENGTHS).last_hidden_state, expected)
    poisoned[4, 3] = torch.nan
    found = model(inputs_embeds=poisoned, lengths=LENGTHS).last_hidden_state
    torch.testing.assert_close(found[others], expected[others])


@pytest.mark.parametrize("mask", ["full", "causal & window(1, 0)"])
def test_weights_of_a_flat_batch(mask):
    model = DynMaskModel(config(mask=mask, attn_implementation="eager")).eval()
    ids, lengths = torch.arange(5, 17)[None], [4, 5, 3]
    flat = model(ids, lengths=torch.tensor(lengths), output_attentions=True).attentions
    for layer, weights in enumerate(flat):
        of_each = (model(part, output_attentions=True).attentions[layer][0] for part in ids.split(lengths, dim=1))
        expected = torch.stack([torch.block_diag(*of_head) for of_head in zip(*of_each, strict=True)])
        torch.testing.assert_close(weights[0], expected)
