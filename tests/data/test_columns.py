"""Roles of columns, by name or by argument and never by size; and what columns may hold."""

import re
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from batches import assert_equal, assert_rows
from hf_dynmask.data import (
    DataCollatorForDynamicMasking,
    DataCollatorForFeatures,
    DataCollatorForSeq2SeqWithLengths,
    DataCollatorWithLengths,
)

VOCABULARY = {"[PAD]": 0, "[MASK]": 1} | {f"w{i}": i for i in range(2, 30)}
TOKENIZER = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(WordLevel(VOCABULARY)), pad_token="[PAD]", mask_token="[MASK]"
)
ROWS, FLAT = DataCollatorWithLengths(TOKENIZER), DataCollatorWithLengths(TOKENIZER, flat=True)
IDS = [[5, 6, 7], [8]]


def examples(ids=None, **columns) -> list[dict[str, Any]]:
    """Examples, each column given as a list of values."""
    columns = {"input_ids": ids or IDS, **columns}
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def with_roles(flat=False, **roles):
    return DataCollatorWithLengths(TOKENIZER, flat=flat, column_roles=roles)


# --- Roles -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize(
    "values", [[[1, 2, 3], [4]], [[1, 2], [3, 4]], [[1, 2, 3], [1, 2, 3]], [[0.5], [1.5]], [[True] * 3, [False]]]
)
def test_a_list_of_an_unknown_name(flat, values):
    """Whatever its size, and whatever else is in the batch."""
    message = (
        r"column `x` must have a role: set `column_roles=\{'x': 'token'\}` on .* or `column_roles=\{'x': 'example'\}`"
    )
    for batch in (examples(x=values), examples(x=values)[:1], examples(x=values)[1:]):
        with pytest.raises(ValueError, match=message):
            DataCollatorWithLengths(TOKENIZER, flat=flat)(batch)


def test_roles_of_unknown_names():
    """The sizes are those of the other role, too."""
    batch = examples([[5, 6], [7, 8]], x=[[1, 2], [3, 4]])
    assert with_roles(True, x="token")(batch)["x"].tolist() == [[1, 2, 3, 4]]
    assert with_roles(True, x="example")(batch)["x"].tolist() == [[1, 2], [3, 4]]
    assert with_roles(x="token")(examples(x=[[1, 2, 3], [4]]))["x"].tolist() == [[1, 2, 3], [4, 0, 0]]
    assert with_roles(x="example")(examples(x=[[[1], [2]], [[3], [4]]]))["x"].shape == (2, 2, 1)


def test_roles_win_over_names():
    batch = examples([[5, 6], [7, 8]], segment_ids=[[0, 1], [0, 1]], prefix_lengths=[[1, 2], [3, 4]])
    found = with_roles(True, segment_ids="example", prefix_lengths="token")(batch)
    assert found["segment_ids"].tolist() == [[0, 1], [0, 1]]
    assert found["prefix_lengths"].tolist() == [[1, 2, 3, 4]]


@pytest.mark.parametrize("name", ["prefix_lengths", "mask_choice", "idx", "start_positions", "end_positions", "label"])
def test_columns_of_examples_by_name_and_scalars_by_any(name):
    """One token an example, so that each size is that of the tokens."""
    for values in ([1, 0], np.array([1, 0]), torch.tensor([1, 0])):
        for column in (name, "other"):
            found = FLAT(examples([[5], [6]], **{column: values}))
            assert found["labels" if column == "label" else column].tolist() == [1, 0]


@pytest.mark.parametrize(
    "name, of_token",
    [("token_type_ids", 1), ("position_ids", 4), ("special_tokens_mask", 1), ("word_ids", 2), ("segment_ids", 3)]
    + [("global_tokens", True), ("missing", False), ("offset_mapping", (0, 1)), ("inputs_embeds", [0.5, 1.0])],
)
def test_columns_of_tokens_by_name(name, of_token):
    """Even where they have one size in all examples."""
    found = FLAT(examples([[5, 6], [7, 8]], **{name: [[of_token] * 2] * 2}))[name]
    assert found.tolist() == [[list(of_token) if isinstance(of_token, tuple) else of_token] * 4]
    for wrong in ([of_token], [of_token] * 3):
        with pytest.raises(
            ValueError, match=f"`{name}` must have one entry for each of the 2 tokens of example 1; got"
        ):
            ROWS(examples([[5, 6], [7, 8]], **{name: [[of_token] * 2, wrong]}))


def test_what_is_empty_in_all_examples_is_left_out_under_an_unknown_name():
    assert set(ROWS(examples(words=[[], []]))) == {"input_ids", "lengths", "attention_mask"}
    assert ROWS(examples([[], []], labels=[[], []]))["labels"].shape == (2, 0)
    assert ROWS(examples(hidden_spans=[[], []]))["hidden_spans"].shape == (2, 0, 2)


# --- Labels ----------------------------------------------------------------------------------------------------------

MULTI_HOT = [[0, 1, 1], [0, 0, 1]]
PADDED = {"ids": [[5, 0, 0], [5, 6, 0]], "attention_mask": [[1, 0, 0], [1, 1, 0]]}
NEEDED = re.escape("column `labels` must have a role: set `column_roles={'labels': ")


@pytest.mark.parametrize("flat", [False, True])
def test_integers_at_absent_tokens_cannot_be_labels_of_tokens(flat):
    for labels in (MULTI_HOT, np.array(MULTI_HOT), torch.tensor(MULTI_HOT, dtype=torch.bool)):
        with pytest.raises(ValueError, match=NEEDED):
            DataCollatorWithLengths(TOKENIZER, flat=flat)(examples(**PADDED, labels=labels))
    of_examples = with_roles(flat, labels="example")(examples(**PADDED, labels=MULTI_HOT))
    assert of_examples["labels"].tolist() == MULTI_HOT
    of_tokens = with_roles(labels="token")(examples(**PADDED, labels=MULTI_HOT))
    assert of_tokens["labels"].tolist() == [[0, -100], [0, 0]]


def test_ignored_labels_at_absent_tokens_are_labels_of_tokens():
    batch = examples(**PADDED, labels=[[1, -100, -100], [0, 2, -100]])
    assert ROWS(batch)["labels"].tolist() == [[1, -100], [0, 2]]
    own_pad = examples(**PADDED, labels=[[1, -1, -1], [0, 2, -1]])
    assert DataCollatorWithLengths(TOKENIZER, label_pad_token_id=-1)(own_pad)["labels"].tolist() == [[1, -1], [0, 2]]


def test_copies_of_padded_ids_are_labels_of_tokens():
    """As by `labels = input_ids.copy()` after padding."""
    assert ROWS(examples(**PADDED, labels=PADDED["ids"]))["labels"].tolist() == [[5, -100], [5, 6]]


def test_floats_are_of_the_example_unless_told():
    batch = examples([[5, 6], [7, 8]], labels=[[0.0, 1.0], [1.0, 1.0]])
    assert FLAT(batch)["labels"].tolist() == [[0, 1], [1, 1]]
    assert with_roles(True, labels="token")(batch)["labels"].tolist() == [[0, 1, 1, 1]]
    assert with_roles(label="token")(examples(labels=[[0.5, 1.0, 0.5], [0.25]]))["labels"].tolist() == [
        [0.5, 1.0, 0.5],
        [0.25, -100, -100],
    ]


@pytest.mark.parametrize("labels", [[[1], [0]], [[1, 2], [3, 4]], [[1, 2, 3], [4, 5, 6]], [[1, 2, 3], 4]])
def test_integers_that_are_not_as_many_as_tokens(labels):
    message = r"`labels` must have one entry for each of the . tokens .* need `column_roles=\{'labels': 'example'\}`"
    with pytest.raises(ValueError, match=message):
        ROWS(examples(labels=labels))


@pytest.mark.parametrize(
    "text", ["positive", b"positive", np.str_("positive"), ["B-PER"], np.array(["O"], object), [["O"]]]
)
@pytest.mark.parametrize("name", ["label", "labels", "label_ids"])
def test_labels_of_text(name, text):
    with pytest.raises(
        ValueError, match=rf"`{name}` must hold numbers: .*class_encode_column\('{name}'\).* in example 1"
    ):
        ROWS(examples(**{name: [1, text]}))
    with pytest.raises(ValueError, match="of the target: .*texts with the tokenizer; got"):
        DataCollatorForSeq2SeqWithLengths(TOKENIZER)(examples(**{name: [text, text]}))


@pytest.mark.parametrize("form", ["numpy", "torch"])
@pytest.mark.parametrize("column", [{"label": [1, None]}, {"labels": [[1, 2, 3], [None]]}])
def test_labels_that_are_none_in_a_formatted_data_set(column, form):
    """There they are NaN, and make floats of integers."""
    dataset = Dataset.from_dict({"input_ids": IDS, **column}).with_format(form)
    with pytest.raises(ValueError, match="column `labels?` must hold a number in every example; got .* in example 1"):
        ROWS([dataset[0], dataset[1]])


# --- Labels that are the next tokens ---------------------------------------------------------------------------------


def test_nothing_predicts_the_first_token_of_a_flat_sequence():
    """Not even where there are labels of other tokens alone, or one is alone in its sequence."""
    batch = examples(labels=IDS)
    assert FLAT(batch)["labels"].tolist() == [[-100, 6, 7, -100]]
    assert ROWS(batch)["labels"].tolist() == [[5, 6, 7], [8, -100, -100]]
    assert FLAT(examples(labels=[[5, -100, 7], [-100]]))["labels"].tolist() == [[-100, -100, 7, -100]]
    assert FLAT(examples([[], [8]], labels=[[], [8]]))["labels"].tolist() == [[-100]]
    padded = examples([[0, 5, 6], [8, 0, 0]], attention_mask=[[0, 1, 1], [1, 0, 0]], labels=[[-100, 5, 6], [8, 0, 0]])
    assert FLAT(padded)["labels"].tolist() == [[-100, 6, -100]]


@pytest.mark.parametrize("labels", [[[5, 6, 0], [8]], [[-100] * 3, [-100]], [[1, 2, 0], [1]]])
def test_labels_of_the_tokens_themselves(labels):
    """Where one of them differs from its token, or all are ignored."""
    assert FLAT(examples(labels=labels))["labels"].tolist() == [labels[0] + labels[1]]


def test_the_role_of_labels_is_told():
    assert with_roles(True, labels="token")(examples(labels=IDS))["labels"].tolist() == [[5, 6, 7, 8]]
    others = examples(labels=[[1, 2, 3], [4]])
    assert with_roles(True, labels="next_token")(others)["labels"].tolist() == [[-100, 2, 3, -100]]
    assert with_roles(labels="next_token")(others)["labels"].tolist() == [[1, 2, 3], [4, -100, -100]]


def test_the_examples_stay_as_they_are():
    labels = torch.tensor([5, 6, 7])
    FLAT([{"input_ids": torch.tensor([5, 6, 7]), "labels": labels}])
    assert labels.tolist() == [5, 6, 7]


def test_targets_of_pairs_and_of_masking_are_of_no_such_role():
    pairs = examples(labels=IDS, decoder_input_ids=IDS)
    assert DataCollatorForSeq2SeqWithLengths(TOKENIZER, flat=True)(pairs)["labels"].tolist() == [[5, 6, 7, 8]]
    masking = DataCollatorForDynamicMasking(TOKENIZER, mlm_probability=1.0, mask_replace_prob=0, random_replace_prob=0)
    masking.set_epoch(0)
    masking.flat = True
    assert masking(examples(labels=IDS))["labels"].tolist() == [[5, 6, 7, 8]]


# --- Roles on the other collators ------------------------------------------------------------------------------------


def test_roles_of_pairs():
    roles = {"x": "token", "decoder_x": "token", "y": "example", "decoder_y": "example"}
    collator = DataCollatorForSeq2SeqWithLengths(TOKENIZER, flat=True, column_roles=roles)
    batch = examples([[5, 6], [7, 8]], labels=[[9], [8]], x=[[1, 2], [3, 4]], decoder_x=[[1], [2]])
    batch = [{**example, "y": [1, 2], "decoder_y": [3]} for example in batch]
    found = collator(batch)
    assert found["x"].tolist() == [[1, 2, 3, 4]] and found["decoder_x"].tolist() == [[1, 2]]
    assert found["y"].tolist() == [[1, 2], [1, 2]] and found["decoder_y"].tolist() == [[3], [3]]
    with pytest.raises(ValueError, match="of the target: column `x`"):
        DataCollatorForSeq2SeqWithLengths(TOKENIZER)(examples(labels=IDS, decoder_x=IDS))


def test_roles_of_frames_and_of_masking():
    frames = [{"input_features": [[0.5], [1.0]], "x": [1, 2]}] * 2
    assert DataCollatorForFeatures(True, column_roles={"x": "token"})(frames)["x"].tolist() == [[1, 2, 1, 2]]
    with pytest.raises(ValueError, match="column `x`"):
        DataCollatorForFeatures()(frames)
    masking = DataCollatorForDynamicMasking(TOKENIZER, dynamic=False, flat=True, column_roles={"x": "token"})
    assert masking(examples(x=IDS))["x"].tolist() == [[5, 6, 7, 8]]


@pytest.mark.parametrize(
    "make",
    [
        lambda roles: DataCollatorWithLengths(TOKENIZER, column_roles=roles),
        lambda roles: DataCollatorForSeq2SeqWithLengths(TOKENIZER, column_roles=roles),
        lambda roles: DataCollatorForDynamicMasking(TOKENIZER, column_roles=roles),
        lambda roles: DataCollatorForFeatures(column_roles=roles),
    ],
)
def test_bad_roles(make):
    for roles, message in [
        (["x"], r"`column_roles` must be a mapping, such as a dict, .*; got \['x'\]"),
        ({"x": "tokens"}, "`column_roles` must give column `x` the role 'token' or 'example'; got 'tokens'"),
        ({"x": "next_token"}, "`column_roles` must give column `x` the role 'token' or 'example'; got 'next_token'"),
        ({"attention_mask": "example"}, "`column_roles` must give column `attention_mask` the role 'token'; got"),
    ]:
        with pytest.raises(ValueError, match=message):
            make(roles)


def test_the_tokens_themselves_keep_their_role():
    for make in (DataCollatorWithLengths, DataCollatorForSeq2SeqWithLengths):
        with pytest.raises(ValueError, match="`column_roles` must give column `input_ids` the role 'token'; got 'exam"):
            make(TOKENIZER, column_roles={"input_ids": "example"})
    with pytest.raises(ValueError, match="`column_roles` must give column `labels` the role 'token'; got 'example'"):
        DataCollatorForSeq2SeqWithLengths(TOKENIZER, column_roles={"labels": "example"})


# --- `lengths` -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [None, "numpy", "torch"])
def test_a_column_of_lengths_that_is_right(form):
    dataset = Dataset.from_dict({"input_ids": IDS, "lengths": [3, 1]}).with_format(form)
    assert_equal(FLAT([dataset[0], dataset[1]]), input_ids=[[5, 6, 7, 8]], lengths=[3, 1])
    assert_rows(ROWS([dataset[0], dataset[1]]), input_ids=[[5, 6, 7], [8, 0, 0]], lengths=[3, 1])


def test_lengths_count_the_tokens_that_are_there():
    assert ROWS(examples(**PADDED, lengths=[1, 2]))["lengths"].tolist() == [1, 2]
    with pytest.raises(ValueError, match="`lengths` must hold what the collator counts, .*: 1 in example 0; got 3"):
        ROWS(examples(**PADDED, lengths=[3, 3]))


def test_lengths_of_pairs_are_of_the_source_or_of_both():
    for lengths in ([3, 1], [4, 3]):
        found = DataCollatorForSeq2SeqWithLengths(TOKENIZER)(examples(labels=[[9], [4, 5]], lengths=lengths))
        assert found["lengths"].tolist() == [3, 1]
    frames = [{"input_features": [[0.5]], "labels": [4, 5], "lengths": 3}]
    assert DataCollatorForSeq2SeqWithLengths(TOKENIZER)(frames)["lengths"].tolist() == [1]
    assert DataCollatorForSeq2SeqWithLengths(TOKENIZER)(examples(lengths=[3, 1]))["lengths"].tolist() == [3, 1]


@pytest.mark.parametrize("wrong", [4, 0, -3, 3.0, [3], [1, 1, 1]])
def test_wrong_lengths(wrong):
    with pytest.raises(
        ValueError, match="`lengths` must hold what the collator counts, or be left out: 3 in example 0"
    ):
        ROWS([{"input_ids": [5, 6, 7], "lengths": wrong}])


# --- Text and `None` -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [None, "numpy", "torch"])
@pytest.mark.parametrize(
    "text",
    [
        ["a b", "c"],
        ["a b", None],
        [None, "c"],
        [["a", "b"], ["c"]],
        [["a", "b"], []],
        [["a", None], ["c"]],
        [[["a"], ["b", "c"]], [["d"]]],
        [[[], ["b"]], [["c"]]],
    ],
)
def test_text_is_left_out(text, form):
    dataset = Dataset.from_dict({"input_ids": IDS, "text": text}).with_format(form)
    assert set(ROWS([dataset[0], dataset[1]])) == {"input_ids", "lengths", "attention_mask"}


@pytest.mark.parametrize("form", [None, "numpy", "torch"])
@pytest.mark.parametrize("words", [[[None, 0, 1], [None]], [[0, 1, None], [0]], [[None] * 3, [None]], [[0, 1, 1], [0]]])
def test_words_of_tokens_that_are_in_none(words, form):
    dataset = Dataset.from_dict({"input_ids": IDS, "word_ids": words}).with_format(form)
    found = FLAT([dataset[0], dataset[1]])["word_ids"]
    assert found.dtype == torch.int64
    assert found.tolist() == [[-1 if word is None else word for word in words[0] + words[1]]]


@pytest.mark.parametrize("words", [np.array([None, 0, 1], object), (None, 0, 1), torch.tensor([float("nan"), 0, 1])])
def test_words_in_other_containers(words):
    assert ROWS([{"input_ids": [5, 6, 7], "word_ids": words}])["word_ids"].tolist() == [[-1, 0, 1]]


# --- Masks that number documents, and integers of any size ------------------------------------------------------------

MASKED_LM = DataCollatorForDynamicMasking(TOKENIZER).for_evaluation()
NUMBERED = [
    [1, 1, 2, 2],
    [1, 1, 2, 0],
    [2, 2, 2, 2],
    [0, 0, 3, 3],
    [1, 0, -1, 1],
    [1.0, 0.5, 1.0, 1.0],
    [1.0, float("nan"), 0.0, 0.0],
]
NUMBERED += [np.array([1, 1, 2, 2], np.uint8), torch.tensor([1, 1, 2, 2]), torch.tensor([1.0, 1.0, 2.0, 2.0])]
COLLATORS = {
    "rows": ROWS,
    "flat": FLAT,
    "dynamic masking": MASKED_LM,
    "pairs": DataCollatorForSeq2SeqWithLengths(TOKENIZER),
    "flat pairs": DataCollatorForSeq2SeqWithLengths(TOKENIZER, flat=True),
}


@pytest.mark.parametrize("mask", NUMBERED, ids=str)
@pytest.mark.parametrize("name", COLLATORS)
def test_masks_that_number_documents(name, mask):
    batch = [{"input_ids": [5, 6, 7, 8], "attention_mask": mask}, {"input_ids": [9], "attention_mask": [1]}]
    if "pairs" in name:
        batch = [{**example, "labels": [5, 6]} for example in batch]
    for order in (batch, batch[::-1]):
        index = order.index(batch[0])
        match = (
            rf"`attention_mask` of an example must hold 0 or 1; got .* in example {index} \(documents of one row are"
        )
        with pytest.raises(ValueError, match=match):
            COLLATORS[name](order)


def test_masks_of_targets_and_of_frames_that_number_documents():
    pair = {"input_ids": [5], "labels": [5, 6, 7, 8], "decoder_attention_mask": [1, 1, 2, 2]}
    with pytest.raises(ValueError, match="of the target: `attention_mask` of an example must hold 0 or 1"):
        COLLATORS["pairs"]([pair])
    with pytest.raises(ValueError, match="`attention_mask` of an example must hold 0 or 1"):
        DataCollatorForFeatures()([{"input_features": [[1.0], [2.0]], "attention_mask": [1, 2]}])


def test_what_the_error_says_to_give():
    """Documents in a row: by positions, or by a field."""
    batch = ROWS([{"input_ids": [5, 6, 7, 8], "position_ids": [0, 1, 0, 1], "segment_ids": [1, 1, 2, 2]}])
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1]]
    assert batch["segment_ids"].tolist() == [[1, 1, 2, 2]]


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.uint64])
@pytest.mark.parametrize("collator", [ROWS, FLAT])
def test_integers_of_any_size(collator, dtype):
    columns = {
        "labels": [[100, 0, 127], [7]],
        "segment_ids": [[1, 1, 127], [3]],
        "position_ids": [[0, 1, 0], [0]],
        "hidden_spans": [[[100, 120]], [[3, 4]]],
        "prefix_lengths": [120, 0],
        "mask_choice": [1, 0],
        "attention_mask": [[1, 1, 1], [1]],
    }
    ids = [[100, 120, 127], [8]]
    small = {name: [np.array(value, dtype) for value in values] for name, values in columns.items()}
    expected = collator(examples(ids, **columns))
    assert_equal(collator(examples([np.array(row, dtype) for row in ids], **small)), **expected)
    as_tensors = {name: [torch.as_tensor(value) for value in values] for name, values in small.items()}
    assert_equal(collator(examples([torch.as_tensor(np.array(row, dtype)) for row in ids], **as_tensors)), **expected)


@pytest.mark.parametrize("value", [2**63, 2**64 - 1])
def test_integers_that_do_not_fit(value):
    for column in (np.array([value], np.uint64), torch.tensor([value], dtype=torch.uint64)):
        with pytest.raises(ValueError, match="column `segment_ids` must hold integers below 2"):
            ROWS([{"input_ids": [5], "segment_ids": column}])


def test_lengths_that_are_no_integers():
    for lengths in (True, 1.0, [1]):
        with pytest.raises(ValueError, match="column `lengths` must hold what the collator counts"):
            ROWS([{"input_ids": [5], "lengths": lengths}])


@pytest.mark.parametrize(
    "features, message",
    [
        ({"input_ids": [[5, 6], [7]]}, "`features` must be a list of examples; got a dict"),
        (iter(examples()), "`features` must be a list of examples; got a list_iterator"),
        ([[5, 6], [7]], r"an example must be a mapping, .*; got a list in example 0"),
        ([*examples(), "text"], r"an example must be a mapping, .*; got a str in example 2"),
    ],
)
@pytest.mark.parametrize(
    "collator",
    [ROWS, DataCollatorForSeq2SeqWithLengths(TOKENIZER), DataCollatorForFeatures(), DataCollatorForDynamicMasking],
)
def test_what_are_no_examples(collator, features, message):
    collate = collator(TOKENIZER) if isinstance(collator, type) else collator
    with pytest.raises(ValueError, match=message):
        collate(features)
