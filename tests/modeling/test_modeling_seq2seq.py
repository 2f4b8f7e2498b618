"""The encoder-decoder: two sides with lengths of their own, three masks, decoding with a cache, generation."""

# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false

from typing import Any

import pytest
import torch
from datasets import Dataset
from huggingface_hub.errors import StrictDataclassError
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    DataCollatorForSeq2Seq,
    DynamicCache,
    EncoderDecoderCache,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
)

from hf_dynmask import (
    DynMaskForConditionalGeneration,
    DynMaskSeq2SeqConfig,
    DynMaskSeq2SeqForSequenceClassification,
    DynMaskSeq2SeqModel,
    from_transformers,
    set_mask,
)
from hf_dynmask.modeling import attention
from oracle import sequence_attention, sequence_mask
from stock_models import random_stock

SOURCES, TARGETS = torch.tensor([7, 3, 9, 1, 4]), torch.tensor([2, 6, 1, 8, 5])
ROWS, WIDTH, OUT_WIDTH = 5, 9, 8
VOCABULARY, FEATURES, START, END = 37, 5, 2, 3
HEADS = 2
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
SPEECH: dict[str, Any] = {"num_features": FEATURES, "conv_kernel": [3, 3], "conv_stride": [1, 2]}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def config(**settings) -> DynMaskSeq2SeqConfig:
    defaults: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "num_attention_heads": HEADS,
        "num_hidden_layers": 2,
        "intermediate_size": 19,
        "max_position_embeddings": 30,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.3,
        "decoder_start_token_id": START,
        "eos_token_id": END,
    }
    return DynMaskSeq2SeqConfig(**defaults | settings)


def translator(**settings) -> DynMaskForConditionalGeneration:
    return DynMaskForConditionalGeneration(config(**settings)).eval()


def present(lengths: Tensor, width: int) -> Tensor:
    return torch.arange(width) < lengths[:, None]


def random_batch() -> dict[str, Tensor]:
    """Sources and targets from the left edge of their rows; what is behind them means nothing."""
    labels = torch.randint(4, VOCABULARY, (ROWS, OUT_WIDTH)).masked_fill(~present(TARGETS, OUT_WIDTH), -100)
    sources = torch.randint(4, VOCABULARY, (ROWS, WIDTH))
    return {"input_ids": sources, "lengths": SOURCES, "labels": labels, "decoder_lengths": TARGETS}


def padded(values: Tensor, lengths: Tensor, side: str, fill: int) -> tuple[Tensor, Tensor]:
    """Rows two columns wider with padding on a side, or spread within them, and where their tokens are."""
    width = values.shape[1] + 2
    moved, mask = values.new_full((len(values), width), fill), torch.zeros(len(values), width, dtype=torch.long)
    for row, length in enumerate(lengths.tolist()):
        columns = {"left": torch.arange(width - length, width), "right": torch.arange(length)}
        columns["inside"] = torch.randperm(width)[:length].sort().values
        moved[row, columns[side]], mask[row, columns[side]] = values[row, :length], 1
    return moved, mask


def by_masks(batch: dict[str, Tensor], side: str, target_side: str) -> dict[str, Tensor]:
    ids, mask = padded(batch["input_ids"], SOURCES, side, 9)
    labels, target_mask = padded(batch["labels"], TARGETS, target_side, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "decoder_attention_mask": target_mask}


def flat(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    sources, targets = present(SOURCES, WIDTH), present(TARGETS, OUT_WIDTH)
    return batch | {"input_ids": batch["input_ids"][sources][None], "labels": batch["labels"][targets][None]}


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], **CLOSE)


# --- the form of a batch ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", [False, True])
def test_the_form_of_a_batch_does_not_matter(train):
    model = translator().train(train)
    batch = random_batch()
    output = model(**batch)
    expected = gradients(model, output.loss)
    assert (output.logits is None) == train
    forms = {
        "flat": flat(batch),
        **{f"{side}, {to}": by_masks(batch, side, to) for side, to in [("right", "left"), ("left", "inside")]},
        "inside, flat targets": flat(batch) | {"input_ids": batch["input_ids"]},
        "shuffled": {name: value[[3, 0, 4, 2, 1]] for name, value in batch.items()},
    }
    for form in forms.values():
        other = model(**form)
        torch.testing.assert_close(other.loss, output.loss, **CLOSE)
        assert_same_gradients(gradients(model, other.loss), expected)


@pytest.mark.parametrize("side", ["left", "inside"])
@pytest.mark.parametrize("target_side", ["left", "right"])
def test_outputs_come_back_where_the_tokens_are(side, target_side):
    model = translator()
    batch = random_batch()
    output, moved = model(**batch), by_masks(batch, side, target_side)
    other = model(**moved)
    sources, targets = moved["attention_mask"].bool(), moved["decoder_attention_mask"].bool()
    torch.testing.assert_close(other.logits[targets], output.logits[present(TARGETS, OUT_WIDTH)], **CLOSE)
    states = output.encoder_last_hidden_state[present(SOURCES, WIDTH)]
    torch.testing.assert_close(other.encoder_last_hidden_state[sources], states, **CLOSE)
    assert (other.logits[~targets] == 0).all() and (other.encoder_last_hidden_state[~sources] == 0).all()


def test_each_pair_comes_out_as_alone():
    model = translator()
    batch = random_batch()
    logits = model(**batch).logits
    for row, (length, target) in enumerate(zip(SOURCES.tolist(), TARGETS.tolist(), strict=True)):
        alone = model(input_ids=batch["input_ids"][row : row + 1, :length], labels=batch["labels"][row, None, :target])
        torch.testing.assert_close(logits[row, :target], alone.logits[0], **CLOSE)


@pytest.mark.parametrize("lengths", [([0, 4], [3, 0]), ([0, 0], [0, 2]), ([0, 0], [0, 0]), ([], [])])
def test_sides_without_tokens(lengths):
    sources, targets = (torch.tensor(each, dtype=torch.long) for each in lengths)
    model = translator().train()
    inputs = torch.randint(4, VOCABULARY, (len(sources), 4))
    output = model(input_ids=inputs, lengths=sources, labels=inputs, decoder_lengths=targets)
    output.loss.backward()
    assert output.loss.isfinite()
    assert all(weight.grad.isfinite().all() for weight in model.parameters())
    logits = model.eval()(input_ids=inputs, lengths=sources, decoder_input_ids=inputs, decoder_lengths=targets).logits
    assert logits.shape == (len(sources), 4, VOCABULARY)
    assert (logits[~present(targets, 4)] == 0).all()


def test_nan_at_padded_positions_reaches_nothing():
    model = translator()
    sources, targets = present(SOURCES, WIDTH), present(TARGETS, OUT_WIDTH)
    embeds = torch.randn(ROWS, WIDTH, 16), torch.randn(ROWS, OUT_WIDTH, 16)
    found = []
    for poison in (0.0, torch.nan):
        source, target = (
            each.masked_fill(~real[..., None], poison).requires_grad_()
            for each, real in zip(embeds, (sources, targets), strict=True)
        )
        output = model(
            inputs_embeds=source,
            lengths=SOURCES,
            decoder_inputs_embeds=target,
            decoder_lengths=TARGETS,
            labels=torch.zeros(ROWS, OUT_WIDTH, dtype=torch.long).masked_fill(~targets, -100),
        )
        model.zero_grad()
        output.loss.backward()
        assert all(weight.grad.isfinite().all() for weight in model.parameters() if weight.grad is not None)
        assert (source.grad[~sources] == 0).all() and (target.grad[~targets] == 0).all()
        found.append((output.logits, source.grad, target.grad))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_labels_move_to_the_right_in_each_sequence():
    model = translator()
    labels = torch.tensor([[4, 5, -100, -100], [6, 7, 8, 9]])
    expected = torch.tensor([[START, 4, 5, 0], [START, 6, 7, 8]])
    assert torch.equal(model.prepare_decoder_input_ids_from_labels(labels=labels), expected)
    lengths = torch.tensor([2, 4])
    found = model.prepare_decoder_input_ids_from_labels(labels, lengths)
    assert torch.equal(found, expected.where(present(lengths, 4), 0))
    ended = model.prepare_decoder_input_ids_from_labels(torch.tensor([[4, 5, 6, 7, 8, 9]]), lengths)
    assert torch.equal(ended, torch.tensor([[START, 4, START, 6, 7, 8]]))


def test_loss_over_several_batches_is_the_loss_over_all():
    model, batch = translator(), random_batch()
    items = (batch["labels"] != -100).sum()
    halves = [{name: value[rows] for name, value in batch.items()} for rows in (slice(0, 2), slice(2, 5))]
    parts = sum(model(**half, num_items_in_batch=items).loss for half in halves)
    torch.testing.assert_close(parts, model(**batch).loss)


# --- three masks -----------------------------------------------------------------------------------------------------

MASKS: dict[str, tuple[str | list[str], str | list[str], str]] = {
    "windows": ("window(2)", "causal & window(3, 0)", "window(2, 1)"),
    "layers": (["window(1)", "backward"], ["causal", "causal & chunk(3)"], "chunk_causal(2)"),
    "prefixes": ("causal | prefix", "causal | prefix", "prefix"),
    "segments": ("segments", "causal & segments", "segments"),
    "questions": ("shared_question", "causal & shared_question", "shared_question"),
    "spans": ("visible", "causal & visible", "~visible"),
    "global": ("global_tokens | diagonal", "causal & (global_tokens | window(1))", "global_tokens | diagonal"),
    "by row": ("select(full, window(1))", "causal & select(window(1), full)", "select(causal, full)"),
    "by head": ("heads(full, causal)", "heads(causal, causal & window(1, 0))", "heads(full, window(2))"),
    "nothing": ("diagonal", "diagonal", "~full"),
}
FIRST = 3  # columns of the first call of a decoder with a cache: more than the longest prefix of a target
all_masks = pytest.mark.parametrize("masks", MASKS)


def masked(masks: tuple[str | list[str], str | list[str], str], **settings) -> DynMaskForConditionalGeneration:
    sides: list[dict[str, Any]] = [{"mask": m} if isinstance(m, str) else {"layer_masks": m} for m in masks[:2]]
    return translator(encoder=sides[0], decoder=sides[1] | {"cross_mask": masks[2]}, **settings)


def random_fields() -> dict[str, Tensor]:
    """Every field of both sides."""
    fields = {}
    for prefix, width, longest in (("", WIDTH, WIDTH), ("decoder_", OUT_WIDTH, FIRST - 1)):
        fields |= {
            f"{prefix}segment_ids": torch.randint(3, (ROWS, width)),
            f"{prefix}prefix_lengths": torch.randint(longest + 1, (ROWS,)),
            f"{prefix}hidden_spans": torch.randint(width, (ROWS, 2, 2)),
            f"{prefix}global_tokens": torch.rand(ROWS, width) < 0.3,
            f"{prefix}mask_choice": torch.randint(2, (ROWS,)),
        }
    return fields


def dense_states(side, states: Tensor, masks: list, encoder_states: Tensor | None = None, cross_mask=None) -> Tensor:
    """States `(tokens, C)` of one sequence, computed densely."""

    def attend(module, queries, others, allowed):
        heads = (
            each.unflatten(1, (HEADS, -1)).transpose(0, 1)
            for each in (module.q_proj(queries), module.k_proj(others), module.v_proj(others))
        )
        return module.o_proj(sequence_attention(*heads, allowed).transpose(0, 1).flatten(1))

    positions = side.embeddings.position_embeddings(torch.arange(len(states)))
    states = side.embeddings.norm(states + positions)
    for layer, allowed in zip(side.layers, masks, strict=True):
        states = layer.attention_norm(states + attend(layer.attention, states, states, allowed))
        if encoder_states is not None:
            crossed = attend(layer.cross_attention, states, encoder_states, cross_mask)
            states = layer.cross_attention_norm(states + crossed)
        states = layer.feed_forward_norm(states + layer.feed_forward(states))
    return states


def dense_logits(model, masks, row: int, ids: Tensor, targets: Tensor, fields: dict[str, Tensor]) -> Tensor:
    own = {name: field[row] for name, field in fields.items() if not name.startswith("decoder_")}
    theirs = {
        name.removeprefix("decoder_"): field[row] for name, field in fields.items() if name.startswith("decoder_")
    }
    cross = own | {f"key_{name}": own[name] for name in ("segment_ids", "global_tokens")}
    cross |= {name: theirs[name] for name in ("segment_ids", "global_tokens")}

    def of_layers(mask, tokens, fields):
        texts = [mask] * 2 if isinstance(mask, str) else mask
        return [sequence_mask(text, range(len(tokens)), fields=fields, heads=HEADS) for text in texts]

    encoder, decoder = model.model.encoder, model.model.decoder
    states = dense_states(encoder, encoder.embeddings.word_embeddings(ids), of_layers(masks[0], ids, own))
    of_cross = sequence_mask(masks[2], range(len(targets)), range(len(ids)), cross, HEADS)
    words = decoder.embeddings.word_embeddings(targets)
    return model.lm_head(dense_states(decoder, words, of_layers(masks[1], targets, theirs), states, of_cross))


@all_masks
def test_masks_of_both_sides_and_between_them_are_those_of_the_reference(masks):
    model = masked(MASKS[masks])
    batch, fields = random_batch(), random_fields()
    targets = torch.randint(4, VOCABULARY, (ROWS, OUT_WIDTH))
    batch = {"input_ids": batch["input_ids"], "lengths": SOURCES, "decoder_input_ids": targets}
    real = present(TARGETS, OUT_WIDTH)
    with torch.no_grad():
        logits = model(**batch, **fields, decoder_lengths=TARGETS, use_cache=False).logits
        for row, (length, target) in enumerate(zip(SOURCES.tolist(), TARGETS.tolist(), strict=True)):
            expected = dense_logits(
                model, MASKS[masks], row, batch["input_ids"][row, :length], targets[row, :target], fields
            )
            torch.testing.assert_close(logits[row, :target], expected, **CLOSE)
        in_one_row = {
            name: field[present(*((TARGETS, OUT_WIDTH) if name.startswith("decoder_") else (SOURCES, WIDTH)))][None]
            for name, field in fields.items()
            if field.shape[1:] in {(WIDTH,), (OUT_WIDTH,)}
        }
        batch |= {
            "input_ids": batch["input_ids"][present(SOURCES, WIDTH)][None],
            "decoder_input_ids": targets[real][None],
        }
        found = model(**batch, **fields | in_one_row, decoder_lengths=TARGETS).logits
        torch.testing.assert_close(found[0], logits[real], **CLOSE)


@all_masks
@pytest.mark.parametrize("cuts", [[FIRST], [FIRST, 4, 5, 7]])
@pytest.mark.parametrize("few_queries", [0, attention.FEW_QUERIES])
def test_decoding_with_a_cache_equals_one_forward_pass(masks, cuts, few_queries, monkeypatch):
    monkeypatch.setattr(attention, "FEW_QUERIES", few_queries)
    model = masked(MASKS[masks])
    fields = random_fields()
    inputs = {"input_ids": torch.randint(4, VOCABULARY, (ROWS, WIDTH)), "lengths": SOURCES}
    inputs |= {name: field for name, field in fields.items() if not name.startswith("decoder_")}
    ids, mask = torch.randint(4, VOCABULARY, (ROWS, OUT_WIDTH)), torch.ones(ROWS, OUT_WIDTH, dtype=torch.long)
    mask[[1, 3], 0] = 0
    of_decoder = {name: field for name, field in fields.items() if name.startswith("decoder_")}
    with torch.no_grad():
        expected = model(**inputs, **of_decoder, decoder_input_ids=ids, decoder_attention_mask=mask, use_cache=False)
        assert expected.past_key_values is None
        cache, logits, encoded = None, [], None
        for start, stop in zip([0, *cuts], [*cuts, OUT_WIDTH], strict=True):
            so_far = {
                name: field[:, :stop] if field.shape[1:] == (OUT_WIDTH,) else field
                for name, field in of_decoder.items()
            }
            output = model(
                **inputs,
                **so_far,
                decoder_input_ids=ids[:, start:stop],
                decoder_attention_mask=mask[:, :stop],
                past_key_values=cache,
                encoder_outputs=encoded,
            )
            cache, encoded = output.past_key_values, (output.encoder_last_hidden_state,)
            logits.append(output.logits)
    assert isinstance(cache, EncoderDecoderCache)
    torch.testing.assert_close(torch.cat(logits, dim=1), expected.logits, **CLOSE)


def test_explicit_masks_of_both_sides():
    model = translator()
    allowed = torch.rand(2, 6, 6) < 0.6, torch.rand(2, HEADS, 4, 4) < 0.6
    ids, targets = torch.randint(4, VOCABULARY, (2, 6)), torch.randint(4, VOCABULARY, (2, 4))
    output = model(ids, attention_mask=allowed[0], decoder_input_ids=targets, decoder_attention_mask=allowed[1])
    for row in range(2):
        causal = (allowed[1][row] & torch.ones(4, 4).tril().bool()).numpy()
        states = dense_states(
            model.model.encoder, model.get_input_embeddings()(ids[row]), [allowed[0][row, None].numpy()] * 2
        )
        everything = torch.ones(1, 4, 6, dtype=torch.bool).numpy()
        words = model.get_input_embeddings()(targets[row])
        expected = model.lm_head(dense_states(model.model.decoder, words, [causal] * 2, states, everything))
        torch.testing.assert_close(output.logits[row], expected, **CLOSE)


def test_set_mask_changes_three_masks():
    model, batch = translator(), random_batch()
    before = model(**batch).logits
    model.set_mask("window(2)", decoder_mask=["causal", "causal & window(1, 0)"], cross_mask="window(3)")
    expected = masked(("window(2)", ["causal", "causal & window(1, 0)"], "window(3)"))
    expected.load_state_dict(model.state_dict())
    assert torch.equal(model(**batch).logits, expected(**batch).logits)
    assert not torch.equal(model(**batch).logits, before)
    with pytest.raises(ValueError, match="one of `mask`, `decoder_mask` and `cross_mask` must be given; got none"):
        set_mask(model, None)
    model.set_mask("full", "causal", "full")
    assert torch.equal(model(**batch).logits, before)
    model.model.set_mask(cross_mask="window(3)")
    assert (model.config.encoder.mask, model.config.decoder.mask) == ("full", "causal")
    assert model.config.decoder.cross_mask == "window(3)"


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"mask": "windo(3)"}, "did you mean `window`"),
        ({"mask": "window(3)", "decoder_mask": ["causal"]}, "`layer_masks` must have one entry a layer, .*=2; got 1"),
        ({"mask": "window(3)", "decoder_mask": "causal & chunk(3)", "cross_mask": "chonk(3)"}, "chonk"),
        ({"decoder_mask": "chunk(2)", "mask": "topk(3)"}, r"the mask 'topk\(3\)' needs weights that score keys"),
        ({"decoder_mask": "causal & topk(2)"}, "needs weights that score keys"),
        ({"mask": "window(3)", "cross_mask": "topk(2)"}, r"the mask 'topk\(2\)' needs weights that score keys"),
        ({"cross_mask": "heads(full, full, full)"}, "heads"),
    ],
)
def test_a_mask_that_fails_leaves_all_as_they_were(masks, message):
    model = translator()
    before = model.config.to_dict()
    with pytest.raises(ValueError, match=message):
        model.set_mask(**masks)
    assert model.config.to_dict() == before


def test_a_cross_mask_chooses_keys():
    model = translator(decoder={"cross_mask": "topk(2)"})
    assert model.model.decoder.layers[0].attention.key_scores is None
    model.set_mask(cross_mask="topk(1)")
    assert torch.isfinite(model(**random_batch()).loss)


# --- frames ----------------------------------------------------------------------------------------------------------

FRAMES = torch.tensor([12, 5, 7, 1, 10])


def speech(**settings) -> DynMaskForConditionalGeneration:
    return translator(**SPEECH, **settings)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}, {"use_cache": False}])
def test_texts_of_frames_are_those_of_one_at_a_time(options):
    model = speech()
    frames = torch.randn(ROWS, 12, FEATURES)
    gone = ~present(FRAMES, 12)
    missing = (torch.rand(ROWS, 12) < 0.2) & ~gone
    frames[gone | missing] = torch.nan
    options = {"max_new_tokens": 6, "no_repeat_ngram_size": 1, "do_sample": False, **options}
    by_lengths = model.generate(frames, lengths=FRAMES, missing=missing, **options)
    by_mask = model.generate(frames, attention_mask=(~gone).long(), missing=missing, **options)
    assert torch.equal(by_mask, by_lengths)
    assert len(by_lengths.unique(dim=0)) > 1
    for row, length in enumerate(FRAMES.tolist()):
        of_row = missing[row : row + 1, :length]
        alone = model.generate(frames[row : row + 1, :length], missing=of_row, **options)[0]
        assert torch.equal(by_lengths[row, : len(alone)], alone)
        assert (by_lengths[row, len(alone) :] == 0).all()


def test_frames_train_in_any_form():
    model = speech().train()
    assert model.main_input_name == model.model.main_input_name == "input_features"
    frames, labels = torch.randn(ROWS, 12, FEATURES), random_batch()["labels"]
    loss = model(input_features=frames, lengths=FRAMES, labels=labels, decoder_lengths=TARGETS).loss
    expected = gradients(model, loss)
    other = model(
        input_features=frames[present(FRAMES, 12)][None],
        lengths=FRAMES,
        labels=labels[present(TARGETS, OUT_WIDTH)][None],
        decoder_lengths=TARGETS,
    ).loss
    torch.testing.assert_close(other, loss, **CLOSE)
    assert_same_gradients(gradients(model, other), expected)
    assert torch.equal(model.output_lengths(FRAMES), (FRAMES + 1) // 2)


# --- generation ------------------------------------------------------------------------------------------------------

HOW: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "static cache": {"cache_implementation": "static"},
    "beams, static cache": {"num_beams": 2, "cache_implementation": "static"},
    "without a cache": {"use_cache": False},
}


@pytest.mark.parametrize(
    ("masks", "how"), [*(("segments", how) for how in HOW), ("windows", "beams"), ("prefixes", "greedy")]
)
def test_generated_tokens_do_not_depend_on_the_form_of_the_batch(masks, how):
    model = masked(MASKS[masks])
    options: dict[str, Any] = {"max_new_tokens": 7, "no_repeat_ngram_size": 1, "do_sample": False, **HOW[how]}
    ids = random_batch()["input_ids"]
    segments, prefixes = torch.randint(2, (ROWS, WIDTH)), torch.tensor([1, 3, 2, 1, 0])
    decoder_fields = {
        "decoder_segment_ids": torch.zeros(ROWS, 1, dtype=torch.long),
        "decoder_prefix_lengths": torch.ones(ROWS, dtype=torch.long),
    }
    fields = {"prefix_lengths": prefixes, **decoder_fields}
    expected = model.generate(ids, lengths=SOURCES, segment_ids=segments, **fields, **options)
    moved, mask = padded(ids, SOURCES, "left", 0)
    segments_too, _ = padded(segments, SOURCES, "left", 0)
    found = model.generate(moved, attention_mask=mask, segment_ids=segments_too, **fields, **options)
    assert torch.equal(found, expected)
    copies = len(expected) // ROWS
    for row, length in enumerate(SOURCES.tolist()):
        of_row = {name: field[row : row + 1] for name, field in fields.items()}
        alone = model.generate(
            ids[row : row + 1, :length], segment_ids=segments[row : row + 1, :length], **of_row, **options
        )
        assert torch.equal(expected[row * copies : (row + 1) * copies, : alone.shape[1]], alone)


def test_prompts_of_the_decoder_are_padded_on_the_left():
    model = translator()
    ids, prompts = random_batch()["input_ids"], torch.tensor([[0, 0, 2], [2, 7, 8], [0, 2, 9], [2, 5, 5], [0, 0, 2]])
    options: dict[str, Any] = {"max_new_tokens": 5, "no_repeat_ngram_size": 1, "do_sample": False}
    mask = (prompts != 0).long()
    found = model.generate(ids, lengths=SOURCES, decoder_input_ids=prompts, decoder_attention_mask=mask, **options)
    for row, length in enumerate(SOURCES.tolist()):
        start = int(3 - mask[row].sum())
        prompt = prompts[row : row + 1, start:]
        alone = model.generate(ids[row : row + 1, :length], decoder_input_ids=prompt, **options)[0]
        assert torch.equal(found[row, start : start + len(alone)], alone)
    with pytest.raises(
        ValueError, match=r"`decoder_attention_mask` must be 1 in the last column, .*got \[0, 1, 0, 1, 0\]"
    ):
        model.generate(
            ids, lengths=SOURCES, decoder_input_ids=prompts.flip(1), decoder_attention_mask=mask.flip(1), **options
        )
    with pytest.raises(ValueError, match="`decoder_lengths` must be None with `decoder_input_ids`: pad prompts"):
        model.generate(ids, lengths=SOURCES, decoder_input_ids=prompts, decoder_lengths=TARGETS)


def test_a_cache_is_handed_back_where_it_is_of_use():
    model, batch = translator(), random_batch()
    ids = {"input_ids": batch["input_ids"], "decoder_input_ids": batch["input_ids"]}
    assert isinstance(model(**ids).past_key_values, EncoderDecoderCache)
    assert model(**ids, use_cache=False).past_key_values is None
    assert model(**batch).past_key_values is None  # labels
    assert model(**flat(batch), use_cache=True).past_key_values is None
    assert model.train()(**ids).past_key_values is None


# --- as a model of transformers --------------------------------------------------------------------------------------

CLASSES = {
    DynMaskSeq2SeqModel: AutoModel,
    DynMaskForConditionalGeneration: AutoModelForSeq2SeqLM,
    DynMaskSeq2SeqForSequenceClassification: AutoModelForSequenceClassification,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "shared": {},
    "untied": {"tie_word_embeddings": False},
    "two vocabularies": {"share_embeddings": False, "decoder": {"vocab_size": 40}},
    "sinusoidal": {"position_type": "sinusoidal", "sinusoidal_in_halves": True, "embedding_scale": 4.0},
    "rotary": {"position_type": "rotary", "norm_placement": "pre", "norm_type": "rms_norm"},
    "masks": {"mask": "window(3)", "decoder": {"mask": "causal & window(2, 0)", "cross_mask": "window(4)"}},
}


def decoder_batch() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(4, VOCABULARY, (ROWS, WIDTH)), "lengths": SOURCES} | {
        "decoder_input_ids": torch.randint(4, VOCABULARY, (ROWS, OUT_WIDTH)),
        "decoder_lengths": TARGETS,
    }


def sides_of(config: DynMaskSeq2SeqConfig) -> list[dict[str, Any]]:
    return [side.to_dict() for side in (config.encoder, config.decoder)]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("model_class", CLASSES)
def test_models_are_saved_and_loaded(model_class, settings, tmp_path):
    model, batch = model_class(config(**SETTINGS[settings])).eval(), decoder_batch()
    if model_class is DynMaskForConditionalGeneration:
        model.final_logits_bias.normal_()
    model.save_pretrained(tmp_path)
    loaded = CLASSES[model_class].from_pretrained(tmp_path)
    assert type(loaded) is model_class
    for found, expected in zip(sides_of(loaded.config), sides_of(model.config), strict=True):
        assert found == expected | {"dtype": "float32"}
    assert torch.equal(loaded(**batch)[0], model(**batch)[0])
    shared = settings not in ("untied", "two vocabularies")
    sides = loaded.base_model.encoder, loaded.base_model.decoder
    assert (sides[0].get_input_embeddings().weight is sides[1].get_input_embeddings().weight) == shared


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("model_class", CLASSES)
def test_every_weight_is_trained(model_class, settings):
    model = model_class(config(**SETTINGS[settings])).train()
    output = model(**decoder_batch())
    output[0].square().sum().backward()
    assert [name for name, weight in model.named_parameters() if weight.grad is None] == []


@pytest.mark.parametrize("model_class", CLASSES)
def test_models_are_made_on_the_meta_device(model_class):
    with torch.device("meta"):
        model = model_class(config(**SETTINGS["sinusoidal"]))
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"meta"}
    model.to_empty(device="cpu").init_weights()
    model.tie_weights()
    assert model(**decoder_batch())[0].isfinite().all()


@pytest.mark.parametrize("size", [50, 20])
@pytest.mark.parametrize("settings", [{}, SPEECH])
def test_the_vocabulary_is_resized(settings, size):
    model = translator(**settings)
    model.final_logits_bias.normal_()
    before = model.final_logits_bias.clone()
    model.resize_token_embeddings(size, mean_resizing=False)
    kept = min(size, VOCABULARY)
    assert torch.equal(model.final_logits_bias[:, :kept], before[:, :kept])
    assert (model.final_logits_bias[:, kept:] == 0).all()
    assert model.lm_head.weight is model.model.decoder.embeddings.word_embeddings.weight
    assert model.config.decoder.vocab_size == size
    source = {"input_features": torch.randn(2, 6, FEATURES)} if settings else {"input_ids": torch.tensor([[4, 19]] * 2)}
    assert model(**source, decoder_input_ids=torch.tensor([[2, 19]] * 2)).logits.shape == (2, 2, size)


def test_each_side_scales_the_table_that_both_share():
    sides: dict[str, Any] = {"encoder": {"embedding_scale": 3.0}, "decoder": {"embedding_scale": 0.5}}
    model = translator(share_embeddings=True, **sides)
    tables = model.model.encoder.get_input_embeddings(), model.model.decoder.get_input_embeddings()
    ids = torch.tensor([[4, 19]])
    expected = [table(ids) for table in tables]
    torch.testing.assert_close(expected[0], 6 * expected[1])
    model.resize_token_embeddings(VOCABULARY + 3)
    tables = model.model.encoder.get_input_embeddings(), model.model.decoder.get_input_embeddings()
    assert tables[0].weight is tables[1].weight and tables[0].weight.shape[0] == VOCABULARY + 3
    assert all(torch.equal(table(ids), before) for table, before in zip(tables, expected, strict=True))


def test_two_vocabularies_are_not_resized():
    model = translator(**SETTINGS["two vocabularies"])
    with pytest.raises(ValueError, match="`resize_token_embeddings` needs one vocabulary, share_embeddings=True"):
        model.resize_token_embeddings(50)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(reentrant):
    model, batch = translator().train(), random_batch()
    expected = gradients(model, model(**batch).loss)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same_gradients(gradients(model, model(**batch).loss), expected)


def test_hidden_states_and_weights_of_both_sides():
    model, batch = translator(attn_implementation="eager"), random_batch()
    output = model(**batch, output_hidden_states=True, output_attentions=True)
    assert [states.shape for states in output.encoder_hidden_states] == [(ROWS, WIDTH, 16)] * 3
    assert [states.shape for states in output.decoder_hidden_states] == [(ROWS, OUT_WIDTH, 16)] * 3
    assert [weights.shape for weights in output.encoder_attentions] == [(ROWS, HEADS, WIDTH, WIDTH)] * 2
    assert [weights.shape for weights in output.decoder_attentions] == [(ROWS, HEADS, OUT_WIDTH, OUT_WIDTH)] * 2
    assert [weights.shape for weights in output.cross_attentions] == [(ROWS, HEADS, OUT_WIDTH, WIDTH)] * 2
    seen = output.cross_attentions[0].sum(-1)
    torch.testing.assert_close(seen, present(TARGETS, OUT_WIDTH)[:, None].expand_as(seen).float())
    assert torch.equal(output.encoder_hidden_states[-1], output.encoder_last_hidden_state)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_implementations_agree(implementation):
    model, batch = masked(MASKS["windows"]), random_batch()
    expected = model(**batch)
    model.set_attn_implementation(implementation)
    assert model.model.decoder.config._attn_implementation == implementation
    torch.testing.assert_close(model(**batch).logits, expected.logits, **CLOSE)


# --- a class for every pair ------------------------------------------------------------------------------------------


def test_a_class_is_read_off_the_last_token():
    model = DynMaskSeq2SeqForSequenceClassification(config(num_labels=3)).eval()
    ids = random_batch()["input_ids"]
    output = model(ids, lengths=SOURCES, labels=torch.tensor([0, 2, 1, 1, 0]))
    assert output.logits.shape == (ROWS, 3)
    for row, length in enumerate(SOURCES.tolist()):
        torch.testing.assert_close(output.logits[row], model(ids[row : row + 1, :length]).logits[0], **CLOSE)
    expected = nn.functional.cross_entropy(output.logits, torch.tensor([0, 2, 1, 1, 0]))
    torch.testing.assert_close(output.loss, expected)
    moved, mask = padded(ids, SOURCES, "left", 9)
    torch.testing.assert_close(model(moved, attention_mask=mask).logits, output.logits, **CLOSE)
    in_one_row = model(ids[present(SOURCES, WIDTH)][None], lengths=SOURCES).logits
    torch.testing.assert_close(in_one_row, output.logits, **CLOSE)
    given = {"decoder_input_ids": torch.full((ROWS, 1), START)}
    assert not torch.allclose(model(ids, lengths=SOURCES, **given).logits, output.logits)


# --- training --------------------------------------------------------------------------------------------------------


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {name: place for place, name in enumerate(["<s>", "<pad>", "</s>", *map(str, range(3, 31))])}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(vocabulary)), pad_token="<pad>")


def pairs() -> Dataset:
    """Sources and, as targets, what they are backwards."""
    rows = []
    for _ in range(16):
        source = torch.randint(3, 31, (int(torch.randint(1, 9, ())),)).tolist()
        rows.append(
            {"input_ids": [*source, 2], "attention_mask": [1] * (len(source) + 1), "labels": [*source[::-1], 2]}
        )
    return Dataset.from_list(rows)


def arguments(folder, **settings) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 8,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        **settings,
    }


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_training_equals_that_of_the_padded_stock_model(smoothing, tokenizer, tmp_path):
    stock = random_stock("bart", "seq2seq-lm", dropout=0.0).train()
    model, data = from_transformers(stock), pairs()
    options = arguments(tmp_path, max_steps=5, logging_steps=1, label_smoothing_factor=smoothing, learning_rate=1e-3)
    losses = []
    for each in (stock, model):
        collator = DataCollatorForSeq2Seq(tokenizer, model=each)
        trainer = Trainer(each, TrainingArguments(**options), train_dataset=data, data_collator=collator)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses[0]) == 5
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_smoothed_losses_need_no_padding(tokenizer, tmp_path):
    stock = random_stock("bart", "seq2seq-lm", dropout=0.0)
    model = from_transformers(stock)
    batch = DataCollatorForSeq2Seq(tokenizer, model=stock)(list(pairs())[:5])
    sources, targets = batch["attention_mask"].sum(1), (batch["labels"] != -100).sum(1)
    expected = smoothed(stock, dict(batch), tmp_path)
    by_lengths = {"input_ids": batch["input_ids"], "lengths": sources, "decoder_lengths": targets}
    by_lengths |= {"labels": batch["labels"], "decoder_input_ids": batch["decoder_input_ids"]}
    torch.testing.assert_close(smoothed(model, dict(by_lengths), tmp_path), expected, **CLOSE)
    for name, lengths in {"input_ids": sources, "labels": targets, "decoder_input_ids": targets}.items():
        by_lengths[name] = by_lengths[name][present(lengths, by_lengths[name].shape[1])][None]
    torch.testing.assert_close(smoothed(model.train(), by_lengths, tmp_path), expected, **CLOSE)


def smoothed(model, batch, folder) -> Tensor:
    trainer = Trainer(model, TrainingArguments(**arguments(folder, label_smoothing_factor=0.1)))
    loss = trainer.compute_loss(model, batch)
    assert isinstance(loss, Tensor)
    return loss


def test_texts_are_generated_in_evaluation(tokenizer, tmp_path):
    model = from_transformers(random_stock("bart", "seq2seq-lm"))

    def collate(rows):
        batch = DataCollatorForSeq2Seq(tokenizer)(rows)
        lengths = {"lengths": batch.pop("attention_mask").sum(1), "decoder_lengths": (batch["labels"] != -100).sum(1)}
        return {**batch, **lengths}

    options = arguments(tmp_path, predict_with_generate=True, generation_max_length=6)
    trainer = Seq2SeqTrainer(model, Seq2SeqTrainingArguments(**options), data_collator=collate)
    data = pairs()
    found = trainer.predict(data).predictions
    for row, tokens in zip(data, found, strict=True):
        alone = model.generate(torch.tensor([row["input_ids"]]), max_length=6)[0].tolist()
        assert tokens.tolist()[: len(alone)] == alone


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decoder_lengths": None}, "`decoder_lengths` must be of as many sequences as the encoder's 5; got 1"),
        ({"decoder_lengths": TARGETS[:4]}, "`decoder_lengths` must be of as many sequences as the encoder's 5; got 4"),
        ({"decoder_lengths": torch.tensor([22])}, "`decoder_lengths` must be of as many sequences as .* 5; got 1"),
        ({"decoder_lengths": TARGETS + 1}, "of the decoder's inputs: `lengths` .* width 22; got a sum of 27 over 5"),
        ({"lengths": SOURCES + 1}, "^`lengths` of a flat batch .* width 24; got a sum of 29 over 5"),
        ({"labels": None}, "exactly one of `decoder_input_ids` and `decoder_inputs_embeds` .*; got neither"),
        (
            {"decoder_input_ids": torch.ones(1, 22).long(), "decoder_inputs_embeds": torch.ones(1, 22, 16)},
            "exactly one of `decoder_input_ids` and `decoder_inputs_embeds` .*; got both",
        ),
        ({"past_key_values": "cache"}, "a cache needs a batch of one sequence a row; got 5 in 1 rows of the"),
        ({"input_ids": None}, "exactly one of `input_ids` and `inputs_embeds` must be given; got neither"),
    ],
)
def test_bad_flat_batches(change, message):
    model = translator()
    if "past_key_values" in change:
        change = {"past_key_values": EncoderDecoderCache(DynamicCache(), DynamicCache())}
    with pytest.raises(ValueError, match=message):
        model(**flat(random_batch()) | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"decoder_lengths": TARGETS + 1},
            "of the decoder's inputs: `lengths` must not be beyond .* 8; got 9",
        ),
        ({"decoder_lengths": TARGETS[:4]}, "of the decoder's inputs: `lengths` must"),
        ({"decoder_attention_mask": torch.ones(5, 7)}, r"decoder's .* the input's shape \(5, 8\); got \(5, 7\)"),
        ({"decoder_attention_mask": torch.ones(5, 8)}, "of the decoder's inputs: `lengths` and `attention_mask` must"),
        ({"encoder_outputs": (torch.ones(5, 7, 16),)}, r"`encoder_outputs` .* shape \(5, 9, 16\) .*; got \(5, 7, 16\)"),
        ({"decoder_segment_ids": torch.ones(5, 7).long()}, "segment_ids"),
    ],
)
def test_bad_batches_in_rows(change, message):
    with pytest.raises(ValueError, match=message):
        translator(decoder={"mask": "causal & segments"})(**random_batch() | change)


def test_fields_that_the_masks_need_are_named():
    batch = random_batch()
    with pytest.raises(ValueError, match="segment_ids"):
        masked(("full", "causal & segments", "full"))(**batch)
    segments = torch.zeros(ROWS, OUT_WIDTH, dtype=torch.long)
    with pytest.raises(ValueError, match="segment_ids"):
        masked(("full", "causal", "segments"))(**batch, decoder_segment_ids=segments)


def test_bad_calls_with_a_cache():
    model = translator()
    ids = {"input_ids": torch.randint(4, VOCABULARY, (2, 5)), "decoder_input_ids": torch.randint(4, VOCABULARY, (2, 3))}
    cache = model(**ids).past_key_values
    with pytest.raises(
        ValueError, match="`decoder_lengths` must come with the first columns; later ones take a `decod"
    ):
        model(**ids, past_key_values=cache, decoder_lengths=torch.tensor([3, 2]))
    model.set_mask(decoder_mask="full")
    with pytest.raises(ValueError, match="the mask 'full' lets a token see later ones, which a cache does not"):
        model(**ids)
    assert model(**ids, use_cache=False).logits.isfinite().all()


def test_ids_that_are_needed_to_begin():
    batch = random_batch()
    with pytest.raises(
        ValueError, match="`decoder_start_token_id` and `pad_token_id` must be in the .*; got None and 0"
    ):
        translator(decoder_start_token_id=None)(**batch)
    with pytest.raises(
        ValueError, match="`decoder_start_token_id` and `pad_token_id` must be in the .*; got 2 and None"
    ):
        translator(pad_token_id=None).prepare_decoder_input_ids_from_labels(batch["labels"])
    with pytest.raises(ValueError, match="`decoder_start_token_id` or `bos_token_id` has to be defined"):
        translator(decoder_start_token_id=None).generate(batch["input_ids"], num_beams=2)
    classifier = DynMaskSeq2SeqForSequenceClassification(config())
    with pytest.raises(
        ValueError, match="`decoder_input_ids` must be given where no `input_ids` are there to make them"
    ):
        classifier(inputs_embeds=torch.ones(2, 3, 16))


def test_the_bare_model_takes_no_labels():
    with pytest.raises(ValueError, match="`labels` need a model with a head; got them for the bare model"):
        DynMaskSeq2SeqModel(config())(**decoder_batch(), labels=torch.zeros(1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decoder": {"add_cross_attention": False}}, "`add_cross_attention` of the decoder must be True; got False"),
        (
            {"decoder": {"classifier_pooling": "mean"}},
            "`classifier_pooling` of the decoder must be left out, .*; got 'mean'",
        ),
        (
            {"encoder": {"classifier_pooling": "last"}},
            "`classifier_pooling` of the encoder must be left out, .*; got 'last'",
        ),
        ({"decoder": {"num_features": 3}}, "`num_features` of the decoder must be None; got 3"),
        ({"decoder": {"hidden_size": 32}}, "`hidden_size` of the encoder must be the decoder's 32; got 16"),
        ({"decoder": {"vocab_size": 9}}, "`vocab_size` of the encoder must be the decoder's 9 where .*; got 37"),
        ({**SPEECH, "share_embeddings": True}, "`share_embeddings` must be False where the encoder reads frames"),
        (
            {"share_embeddings": True, "tie_word_embeddings": False},
            "`share_embeddings` must be False without `tie_word_embeddings`; got True",
        ),
    ],
)
def test_bad_configurations(settings, message):
    with pytest.raises(StrictDataclassError, match=message):
        config(**settings)
