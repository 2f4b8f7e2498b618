"""Flat batches of one shape: what collators put behind the last token and the last sequence, and what does not fit."""

import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import BartConfig, BartForConditionalGeneration, PreTrainedTokenizerFast

from batches import assert_equal
from hf_dynmask import (
    DataCollatorForDynamicMasking,
    DataCollatorForFeatures,
    DataCollatorForSeq2SeqWithLengths,
    DataCollatorWithLengths,
    TokenBudgetBatchSampler,
)
from hf_dynmask.data.flat import in_rows, with_settings
from masked_lm_examples import CLS, SEP, make_tokenizer, texts
from strategies import examples

PAD = 3
TOKENIZER = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0, "[PAD]": PAD})), pad_token="[PAD]")
PLAIN = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0})))  # without a pad token


def collator(max_tokens=6, max_sequences=4, tokenizer=TOKENIZER, **settings):
    return DataCollatorWithLengths(tokenizer, flat=True, max_tokens=max_tokens, max_sequences=max_sequences, **settings)


def ids(*rows, **columns):
    columns = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return [{"input_ids": row, **column} for row, column in zip(rows, columns or [{}] * len(rows), strict=True)]


# --- What stands behind the last token and the last sequence ----------------------------------------------------------


def test_every_column_is_filled_up():
    features = ids(
        [5, 6, 7],
        [8],
        token_type_ids=[[0, 1, 1], [1]],
        segment_ids=[[1, 1, 2], [1]],
        global_tokens=[[True, False, False], [True]],
        missing=[[False, True, False], [True]],
        position_ids=[[0, 1, 2], [4]],
        weight=[[0.5, 1.0, 0.5], [2.0]],
        offset_mapping=[[(0, 1), (1, 2), (2, 3)], [(0, 4)]],
        prefix_lengths=[2, 1],
        mask_choice=[1, 1],
        hidden_spans=[[[0, 1]], []],
        start_positions=[1, 0],
        end_positions=[2, 0],
        idx=[7, 8],
    )
    none = -100
    assert_equal(
        collator(column_roles={"weight": "token"}, column_sizes={"hidden_spans": 2})(features),
        input_ids=[[5, 6, 7, 8, PAD, PAD]],
        lengths=[3, 1, 0, 0],
        token_type_ids=[[0, 1, 1, 1, 0, 0]],
        segment_ids=[[1, 1, 2, 1, 0, 0]],
        global_tokens=[[True, False, False, True, False, False]],
        missing=[[False, True, False, True, False, False]],
        position_ids=[[0, 1, 2, 4, 0, 0]],
        weight=[[0.5, 1.0, 0.5, 2.0, 0.0, 0.0]],
        offset_mapping=[[[0, 1], [1, 2], [2, 3], [0, 4], [0, 0], [0, 0]]],
        prefix_lengths=[2, 1, 0, 0],
        mask_choice=[1, 1, 0, 0],
        hidden_spans=[[[0, 1], [0, 0]], [[0, 0], [0, 0]], [[0, 0], [0, 0]], [[0, 0], [0, 0]]],
        start_positions=[1, 0, none, none],
        end_positions=[2, 0, none, none],
        idx=[7, 8, 0, 0],
    )


@pytest.mark.parametrize(
    "labels, expected",
    [
        ([1, 0], [1, 0, -100]),
        ([True, False], [1, 0, -100]),
        ([0.5, 2.0], [0.5, 2.0, -100.0]),
        ([[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 1.0], [-100.0, -100.0]]),
        ([[1, 2], [4]], [[1, 2, 4, -100]]),
        ([[5, 6], [7]], [[-100, 6, -100, -100]]),
    ],
    ids=["class", "bool", "regression", "several classes", "tokens", "next tokens"],
)
def test_labels(labels, expected):
    batch = collator(4, 3)(ids([5, 6], [7], labels=labels))
    torch.testing.assert_close(batch["labels"], torch.tensor(expected))
    batch = collator(4, 3, label_pad_token_id=-1)(ids([5, 6], [7], labels=labels))
    assert batch["labels"].flatten()[-1] == -1


@pytest.mark.parametrize("labels", [[1, 0, 1], [0.5, 1.5, 2.0], [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]])
def test_labels_that_are_none_do_not_count(labels):
    """The Trainer counts those that are not -100."""
    batch = collator(9, 8)(ids([5, 6], [7], [8], labels=labels))
    assert batch["labels"].ne(-100).sum() == torch.tensor(labels).numel()


def test_shift_labels():
    batch = collator(4, 2)(ids([5, 6], shift_labels=[[6, -100]]))
    assert batch["shift_labels"].tolist() == [[6, -100, -100, -100]]


def test_answers_are_counted():
    features = ids([5, 6], [7], start_positions=[1, 3], end_positions=[1, 3])
    batch = collator(count_answers=True)(features)
    assert batch["labels"].tolist() == [1, -100, -100, -100]


def test_position_ids():
    batch = collator(return_position_ids=True)(ids([5, 6, 7], [8]))
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 0, 0]]


@pytest.mark.parametrize("rows", [[[5, 6, 7], [8, 9, 4]], [[5], [6], [7], [8]], [[], [5], []], [[], [], [], []]])
def test_full_rows_and_empty_sequences(rows):
    batch = collator()(ids(*rows))
    tokens = sum(rows, [])
    assert batch["input_ids"].tolist() == [tokens + [PAD] * (6 - len(tokens))]
    assert batch["lengths"].tolist() == [*map(len, rows), *[0] * (4 - len(rows))]


def test_absent_tokens_take_no_room():
    features = ids([1, 5, 6, 1], [7, 1, 1, 1], attention_mask=[[0, 1, 1, 0], [1, 0, 0, 0]])
    assert_equal(collator(3, 2)(features), input_ids=[[5, 6, 7]], lengths=[2, 1])


def test_without_a_pad_token():
    assert_equal(collator(4, 2, PLAIN)(ids([5, 6])), input_ids=[[5, 6, 0, 0]], lengths=[2, 0])


def test_pickle():
    features = ids([5, 6], [7], labels=[1, 0])
    assert_equal(pickle.loads(pickle.dumps(collator()))(features), **collator()(features))


@given(st.lists(st.integers(0, 5), min_size=1, max_size=40), st.integers(5, 20), st.integers(0, 9))
@examples(100)
def test_all_batches_of_a_sampler_have_one_shape(lengths, max_tokens, seed):
    sampler = TokenBudgetBatchSampler(lengths, max_tokens, seed=seed)
    collate = collator(sampler.max_tokens, sampler.max_sequences, column_sizes={"hidden_spans": 2})
    flat = DataCollatorWithLengths(TOKENIZER, flat=True)
    data = [
        {
            "input_ids": [4 + k] * n,
            "token_type_ids": [1] * n,
            "hidden_spans": [[0, 1]] * (k % 3),
            "label": float(k),
        }
        for k, n in enumerate(lengths)
    ]
    for batch in sampler:
        found, expected = collate([data[k] for k in batch]), flat([data[k] for k in batch])
        assert {name: tuple(values.shape) for name, values in found.items()} == {
            "input_ids": (1, max_tokens),
            "token_type_ids": (1, max_tokens),
            "lengths": (sampler.max_sequences,),
            "hidden_spans": (sampler.max_sequences, 2, 2),
            "labels": (sampler.max_sequences,),
        }
        tokens = expected["input_ids"].shape[1]
        for name in ("input_ids", "token_type_ids"):
            assert torch.equal(found[name][:, :tokens], expected[name])
        assert not found["token_type_ids"][:, tokens:].any()
        assert torch.equal(found["lengths"][: len(batch)], expected["lengths"])
        assert not found["lengths"][len(batch) :].any()
        assert torch.equal(found["labels"][: len(batch)], expected["labels"])


# --- Frames ----------------------------------------------------------------------------------------------------------

FRAMES = [[[0.5, 1.0], [1.5, 2.0]], [[4.0, 5.0]]]
SIZES: dict[str, Any] = {"flat": True, "max_tokens": 4, "max_sequences": 3}


def frames(*labels):
    return [{"input_features": of_example, "labels": label} for of_example, label in zip(FRAMES, labels, strict=True)]


def test_frames_and_their_targets():
    assert_equal(
        DataCollatorForFeatures(**SIZES, column_sizes={"labels": 3})(frames([7, 8], [])),
        input_features=[[*FRAMES[0], *FRAMES[1], [0.0, 0.0]]],
        lengths=[2, 1, 0],
        labels=[[7, 8, -100], [-100] * 3, [-100] * 3],
    )


@pytest.mark.parametrize("name", ["label", "label_ids", "labels"])
def test_sizes_under_any_name_of_labels(name):
    features = [{"input_features": FRAMES[0], name: [7]}]
    batch = DataCollatorForFeatures(**SIZES, column_sizes={name: 2})(features)
    assert batch["labels"].tolist() == [[7, -100], [-100, -100], [-100, -100]]


def test_labels_of_frames():
    batch = DataCollatorForFeatures(**SIZES, column_roles={"labels": "token"})(frames([1, 2], [3]))
    assert batch["labels"].tolist() == [[1, 2, 3, -100]]


def test_classes_of_frames():
    assert DataCollatorForFeatures(**SIZES)(frames(1, 2))["labels"].tolist() == [1, 2, -100]


@pytest.mark.parametrize("flat", [False, True])
def test_column_sizes_hold_without_a_row_of_fixed_size(flat):
    batch = DataCollatorForFeatures(flat, column_sizes={"labels": 3})(frames([7, 8], []))
    assert batch["labels"].tolist() == [[7, 8, -100], [-100] * 3]


# --- Pairs -----------------------------------------------------------------------------------------------------------

PAIRS = [{"input_ids": [5, 6, 7], "labels": [8, 9]}, {"input_ids": [9], "labels": [4, 5, 6]}]
PAIR_SIZES: dict[str, Any] = {"flat": True, "max_tokens": 5, "max_target_tokens": 7, "max_sequences": 3}
EXPECTED = {
    "input_ids": [[5, 6, 7, 9, PAD]],
    "lengths": [3, 1, 0],
    "labels": [[8, 9, 4, 5, 6, -100, -100]],
    "decoder_lengths": [2, 3, 0],
}


def test_pairs():
    assert_equal(DataCollatorForSeq2SeqWithLengths(TOKENIZER, **PAIR_SIZES)(PAIRS), **EXPECTED)


def test_decoder_inputs():
    sizes: dict[str, Any] = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
    config = BartConfig(**sizes, decoder_attention_heads=2, vocab_size=12, pad_token_id=PAD, decoder_start_token_id=2)
    collate = DataCollatorForSeq2SeqWithLengths(TOKENIZER, BartForConditionalGeneration(config), **PAIR_SIZES)
    assert_equal(collate(PAIRS), **EXPECTED, decoder_input_ids=[[2, 8, 2, 4, 5, PAD, PAD]])


def test_columns_of_both_sides():
    columns = [
        {"hidden_spans": [[0, 1]], "decoder_hidden_spans": [], "decoder_prefix_lengths": 1},
        {"hidden_spans": [], "decoder_hidden_spans": [[1, 1]], "decoder_prefix_lengths": 2},
    ]
    features = [{**pair, **column} for pair, column in zip(PAIRS, columns, strict=True)]
    column_sizes = {"hidden_spans": 1, "decoder_hidden_spans": 2}
    none = [0, 0]
    assert_equal(
        DataCollatorForSeq2SeqWithLengths(TOKENIZER, **PAIR_SIZES, column_sizes=column_sizes)(features),
        **EXPECTED,
        hidden_spans=[[[0, 1]], [none], [none]],
        decoder_hidden_spans=[[none, none], [[1, 1], none], [none, none]],
        decoder_prefix_lengths=[1, 2, 0],
    )


def test_a_source_of_frames():
    features = [{"input_features": of_example, "labels": [k]} for k, of_example in enumerate(FRAMES)]
    batch = DataCollatorForSeq2SeqWithLengths(TOKENIZER, **PAIR_SIZES)(features)
    assert batch["input_features"].shape == (1, 5, 2)
    assert batch["lengths"].tolist() == [2, 1, 0]
    assert batch["labels"].tolist() == [[0, 1, *[-100] * 5]]


def test_a_source_alone():
    sources = [{"input_ids": pair["input_ids"]} for pair in PAIRS]
    batch = DataCollatorForSeq2SeqWithLengths(TOKENIZER, **PAIR_SIZES)(sources)
    assert_equal(batch, input_ids=EXPECTED["input_ids"], lengths=EXPECTED["lengths"])


# --- Masked language modeling ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"dynamic": False}, {"dynamic": False, "copies": 3}])
@pytest.mark.parametrize("strategy", ["token", "whole_word", "span"])
def test_targets_are_those_of_rows(strategy, settings):
    features = [{**text, "idx": k} for k, text in enumerate(texts(5, 4, 12))]
    tokens = sum(len(text["input_ids"]) for text in features)
    settings = {**settings, "strategy": strategy, "at_least_one": True}
    sizes: dict[str, Any] = {"max_tokens": tokens + 9, "max_sequences": 8}
    tokenizer = make_tokenizer()
    rows = DataCollatorForDynamicMasking(tokenizer, **settings)
    flat = DataCollatorForDynamicMasking(tokenizer, **settings, flat=True, **sizes)
    for collate in (rows, flat):
        collate.set_epoch(4)
    expected, found = rows(features), flat(features)
    assert found["lengths"].tolist() == [*expected["lengths"].tolist(), 0, 0, 0]
    real = expected["attention_mask"].bool()
    for name, filler in ("input_ids", tokenizer.pad_token_id), ("labels", -100):
        assert found[name].shape == (1, tokens + 9)
        assert torch.equal(found[name][0, :tokens], expected[name][real])
        assert found[name][0, tokens:].tolist() == [filler] * 9
    assert (found["labels"] != -100).sum() >= 5


def test_columns_of_the_collator_itself():
    features = [{"input_ids": [CLS, 10, 11, SEP], "word_ids": [None, 0, 0, None], "special_tokens_mask": [1, 0, 0, 1]}]
    sizes: dict[str, Any] = {"max_tokens": 9, "max_sequences": 2}
    collate = DataCollatorForDynamicMasking(
        make_tokenizer(), 0.999, strategy="whole_word", dynamic=False, flat=True, **sizes
    )
    batch = collate(features)
    assert set(batch) == {"input_ids", "labels", "lengths"}
    assert batch["labels"].tolist() == [[-100, 10, 11, *[-100] * 6]]


# --- Copies ----------------------------------------------------------------------------------------------------------


def test_in_rows():
    for fixed, rows in [
        (collator(), DataCollatorWithLengths(TOKENIZER)),
        (DataCollatorForFeatures(**SIZES), DataCollatorForFeatures()),
        (
            DataCollatorForSeq2SeqWithLengths(TOKENIZER, **PAIR_SIZES),
            DataCollatorForSeq2SeqWithLengths(TOKENIZER),
        ),
    ]:
        assert in_rows(fixed) == rows
        assert in_rows(rows) is rows
    assert in_rows(dict) is dict


def test_a_copy_hears_of_epochs():
    collate = DataCollatorForDynamicMasking(make_tokenizer(), flat=True)
    copied = with_settings(collate, max_tokens=20, max_sequences=2)
    collate.set_epoch(3)
    features = texts(1, 10, 15)
    tokens = len(features[0]["input_ids"])
    assert torch.equal(copied(features)["labels"][:, :tokens], collate(features)["labels"])
    assert collate.max_tokens is None


# --- What does not fit, or does not go together -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "features, message",
    [
        (
            ids([1], [1] * 7),
            "an example must have at most `max_tokens`=6 tokens; got 7 in example 1. Raise it, or truncate the example",
        ),
        (
            ids([1] * 4, [2] * 2, [], [3] * 3),
            "at most `max_tokens`=6 tokens; got 9 in 4 examples, the first 3 of which fit. Raise it, or make batches",
        ),
        (ids(*[[1]] * 5), "a batch must have at most `max_sequences`=4 examples; got 5. Raise it, or make batches"),
        (
            ids([1], [2], hidden_spans=[[[0, 1]], [[0, 1], [1, 1]]]),
            r"column `hidden_spans` must have one size .*`column_sizes=\{'hidden_spans': …\}`; got up to 2 in this",
        ),
    ],
)
def test_what_does_not_fit(features, message):
    with pytest.raises(ValueError, match=message):
        collator()(features)


def test_targets_that_do_not_fit():
    collate = DataCollatorForFeatures(**SIZES, column_sizes={"labels": 1})
    with pytest.raises(
        ValueError, match=r"`labels` .* at most `column_sizes\['labels'\]`=1 entries per example; got 2"
    ):
        collate(frames([7], [8, 9]))
    with pytest.raises(ValueError, match=r"column `labels` must have one size in all batches"):
        DataCollatorForFeatures(**SIZES)(frames([7], [8]))
    collate = DataCollatorForSeq2SeqWithLengths(TOKENIZER, **{**PAIR_SIZES, "max_target_tokens": 4})
    with pytest.raises(ValueError, match="of the target: .* at most `max_target_tokens`=4 tokens; got 5 in 2 examples"):
        collate(PAIRS)


def make_dynamic(tokenizer, **settings):
    return DataCollatorForDynamicMasking(make_tokenizer(), **settings)


def make_features(tokenizer, **settings):
    return DataCollatorForFeatures(**settings)


COLLATORS = [DataCollatorWithLengths, make_dynamic, make_features]
NAMES = "`max_tokens` and `max_sequences`"


@pytest.mark.parametrize("make", COLLATORS)
@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"max_tokens": 8, "max_sequences": 2},
            f"{NAMES} must come with `flat=True`, .*; got max_tokens=8, max_sequences=2",
        ),
        ({"max_tokens": 8}, f"{NAMES} must come with `flat=True`, .*; got max_tokens=8, max_sequences=None"),
        ({"flat": True, "max_tokens": 8}, f"{NAMES} must be given together; got max_tokens=8, max_sequences=None"),
        ({"flat": True, "max_sequences": 8}, f"{NAMES} must be given together; got max_tokens=None, max_sequences=8"),
        ({"flat": True, "max_tokens": 0, "max_sequences": 2}, "`max_tokens` must be an integer of at least 1; got 0"),
        ({"flat": True, "max_tokens": 8, "max_sequences": -1}, "`max_sequences` must be an integer .* 1; got -1"),
        ({"flat": True, "max_tokens": 8.0, "max_sequences": 2}, "`max_tokens` must be an integer .*; got 8.0"),
        ({"flat": True, "max_tokens": True, "max_sequences": 2}, "`max_tokens` must be an integer .*; got True"),
        ({"column_sizes": 2}, "`column_sizes` must be a mapping, such as a dict, .*; got 2"),
        ({"column_sizes": {"spans": 2}}, "`column_sizes` must have keys among `hidden_spans`.*; got 'spans'"),
        (
            {"column_sizes": {"hidden_spans": -1}},
            r"`column_sizes\['hidden_spans'\]` must be an integer of at least 0; got -1",
        ),
    ],
)
def test_settings_that_do_not_go_together(make, settings, message):
    with pytest.raises(ValueError, match=message):
        make(TOKENIZER, **settings)


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"max_tokens": 8, "max_sequences": 2, "flat": True},
            "`max_tokens`, `max_target_tokens` and `max_sequences` must be given together; got max_tokens=8, max_tar",
        ),
        ({"max_target_tokens": 8}, "must come with `flat=True`, .*; got max_tokens=None, max_target_tokens=8, max_seq"),
        ({**PAIR_SIZES, "max_target_tokens": 0}, "`max_target_tokens` must be an integer of at least 1; got 0"),
        (
            {**PAIR_SIZES, "column_sizes": {"labels": 3}},
            "`column_sizes` must have keys among `hidden_spans`; got 'labels'",
        ),
    ],
)
def test_settings_of_pairs(settings, message):
    with pytest.raises(ValueError, match=message):
        DataCollatorForSeq2SeqWithLengths(TOKENIZER, **settings)


# --- the longest example -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [{}, {"max_tokens": 6, "max_sequences": 4}], ids=["free", "fixed"])
@pytest.mark.parametrize("make", [DataCollatorWithLengths, DataCollatorForDynamicMasking])
def test_flat_batches_carry_the_bound_that_they_are_given(make, sizes):
    tokenizer = TOKENIZER if make is DataCollatorWithLengths else make_tokenizer()
    collate = make(tokenizer, flat=True, max_length=3, **sizes)
    collate = getattr(collate, "for_evaluation", lambda: collate)()
    assert collate(ids([5, 6], [7, 8, 9]))["max_length_q"] == 3
    with pytest.raises(ValueError, match=r"at most `max_length`=3 tokens; got 4 in example 1. Raise it, or truncate"):
        collate(ids([5, 6], [5, 6, 7, 8]))
    assert "max_length_q" not in in_rows(collate)(ids([5, 6, 7, 8]))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"max_length": 4}, "`max_length` must come with `flat=True`; got max_length=4"),
        ({"max_length": 0, "flat": True}, "`max_length` must be an integer of at least 1; got 0"),
        ({"max_length": 2.0, "flat": True}, "`max_length` must be an integer of at least 1; got 2.0"),
    ],
)
def test_wrong_bounds(settings, message):
    with pytest.raises(ValueError, match=message):
        DataCollatorWithLengths(TOKENIZER, **settings)
