"""DataCollatorWithLengths: rows and flat batches, the columns that come along, and bad examples."""

import pickle

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import BatchEncoding, PreTrainedTokenizerFast, Trainer, TrainingArguments

from batches import assert_equal, assert_rows
from hf_dynmask.data import DataCollatorWithLengths
from strategies import examples

PAD = 3


def make_tokenizer(**kwargs):
    backend = Tokenizer(WordLevel({"[UNK]": 0, "a": 1, "b": 2, "[PAD]": PAD}, unk_token="[UNK]"))
    backend.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", **kwargs)


@pytest.fixture
def rows():
    return DataCollatorWithLengths(make_tokenizer(pad_token="[PAD]"))


@pytest.fixture
def flat():
    return DataCollatorWithLengths(make_tokenizer(pad_token="[PAD]"), flat=True)


def ids(*rows):
    return [{"input_ids": list(row)} for row in rows]


# --- input_ids and lengths -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_rows_start_at_the_left_edge_whatever_the_padding_side(padding_side):
    collator = DataCollatorWithLengths(make_tokenizer(pad_token="[PAD]", padding_side=padding_side))
    batch = collator(ids([5], [6, 7, 8], [9, 9]))
    assert_rows(batch, input_ids=[[5, PAD, PAD], [6, 7, 8], [9, 9, PAD]], lengths=[1, 3, 2])


def test_flat(flat):
    assert_equal(flat(ids([5], [6, 7, 8])), input_ids=[[5, 6, 7, 8]], lengths=[1, 3])


def test_empty_sequences(rows, flat):
    features = [
        {"input_ids": [], "token_type_ids": [], "offset_mapping": [], "label": 1},
        {"input_ids": [4, 5], "token_type_ids": [0, 1], "offset_mapping": [(0, 1), (2, 4)], "label": 0},
    ]
    assert_rows(
        rows(features),
        input_ids=[[PAD, PAD], [4, 5]],
        lengths=[0, 2],
        token_type_ids=[[0, 0], [0, 1]],
        offset_mapping=[[[0, 0], [0, 0]], [[0, 1], [2, 4]]],
        labels=[1, 0],
    )
    assert_equal(
        flat(features),
        input_ids=[[4, 5]],
        lengths=[0, 2],
        token_type_ids=[[0, 1]],
        offset_mapping=[[[0, 1], [2, 4]]],
        labels=[1, 0],
    )


def test_a_batch_of_nothing_but_empty_sequences(rows, flat):
    nothing = torch.zeros(2, 0, dtype=torch.long)
    assert_rows(rows(ids([], [])), input_ids=nothing, lengths=[0, 0])
    assert_equal(flat(ids([], [])), input_ids=nothing[:1], lengths=[0, 0])


@given(st.lists(st.lists(st.integers(4, 99), max_size=6), min_size=1, max_size=5), st.data())
@examples(100)
def test_padding_in_the_examples_changes_nothing(sequences, data):
    """Absent tokens anywhere, with any id: the batch is that of the examples without them."""
    plain, padded = [], []
    for sequence in sequences:
        present = data.draw(st.permutations([1] * len(sequence) + [0] * data.draw(st.integers(0, 3))))
        tokens = iter(sequence)
        padded_ids = [next(tokens) if here else 7 for here in present]
        marks = [10 + place if here else -100 for place, here in enumerate(present)]
        plain.append({"input_ids": sequence, "labels": [mark for mark in marks if mark != -100]})
        padded.append({"input_ids": padded_ids, "labels": marks, "attention_mask": present})
    for flat in (False, True):
        collator = DataCollatorWithLengths(make_tokenizer(pad_token="[PAD]"), flat=flat)
        assert_equal(collator(padded), **collator(plain))


@given(st.lists(st.lists(st.integers(4, 99), max_size=6), min_size=1, max_size=5))
@examples(100)
def test_rows_and_flat_hold_every_token_once(sequences):
    tokenizer = make_tokenizer(pad_token="[PAD]")
    batch = DataCollatorWithLengths(tokenizer)(ids(*sequences))
    widest = max(map(len, sequences))
    assert batch["input_ids"].tolist() == [row + [PAD] * (widest - len(row)) for row in sequences]
    batch = DataCollatorWithLengths(tokenizer, flat=True)(ids(*sequences))
    assert batch["input_ids"].tolist() == [sum(sequences, [])]
    assert batch["lengths"].tolist() == [len(row) for row in sequences]


# --- the other columns -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["label", "label_ids", "labels"])
@pytest.mark.parametrize(
    "first, second, expected",
    [
        (1, 0, [1, 0]),
        (True, False, [1, 0]),
        (0.5, 2, [0.5, 2.0]),
        ([1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]),
        ([7, 8], [9], [[7, 8], [9, -100]]),
        (np.array([7, 8], dtype=np.int32), torch.tensor([9], dtype=torch.int16), [[7, 8], [9, -100]]),
    ],
    ids=["class", "bool", "regression", "several classes", "tokens", "tokens as arrays"],
)
def test_labels(rows, name, first, second, expected):
    batch = rows([{"input_ids": [1, 2], name: first}, {"input_ids": [1], name: second}])
    assert_rows(batch, input_ids=[[1, 2], [1, PAD]], lengths=[2, 1], labels=expected)


@pytest.mark.parametrize("form", ["rows", "flat"])
def test_float_labels_are_never_per_token(form, request):
    """As many targets as tokens, by chance."""
    collator = request.getfixturevalue(form)
    batch = collator([{"input_ids": [1, 2], "labels": [1.0, 0.0]}, {"input_ids": [5, 5], "labels": [0.0, 1.0]}])
    assert batch["labels"].tolist() == [[1.0, 0.0], [0.0, 1.0]]


def test_label_pad_token_id():
    collator = DataCollatorWithLengths(make_tokenizer(pad_token="[PAD]"), label_pad_token_id=-1)
    batch = collator([{"input_ids": [1, 2], "labels": [7, 8]}, {"input_ids": [1], "labels": [9]}])
    assert batch["labels"].tolist() == [[7, 8], [9, -1]]


def test_columns_of_every_kind():
    tokenizer, roles = make_tokenizer(pad_token="[PAD]"), {"weight": "token"}
    rows, flat = (DataCollatorWithLengths(tokenizer, flat=flat, column_roles=roles) for flat in (False, True))
    features = [
        {
            "input_ids": [1, 2, 4],
            "token_type_ids": [0, 1, 1],
            "special_tokens_mask": [1, 0, 1],
            "segment_ids": [0, 0, 1],
            "position_ids": [0, 1, 2],
            "missing": [False, True, False],
            "weight": [0.5, 1.0, 0.5],
            "start_positions": 1,
            "end_positions": 2,
            "prefix_lengths": 2,
            "hidden_spans": [[0, 1], [2, 1]],
            "text": "a b c",
            "words": ["a", "b", "c"],
            "nothing": None,
        },
        {
            "input_ids": [5],
            "token_type_ids": [0],
            "special_tokens_mask": [1],
            "segment_ids": [0],
            "position_ids": [9],
            "missing": [True],
            "weight": [2.0],
            "start_positions": 0,
            "end_positions": 0,
            "prefix_lengths": 1,
            "hidden_spans": [],
            "text": "d",
            "words": ["d"],
            "nothing": None,
        },
    ]
    stacked = {
        "lengths": [3, 1],
        "start_positions": [1, 0],
        "end_positions": [2, 0],
        "prefix_lengths": [2, 1],
        "hidden_spans": [[[0, 1], [2, 1]], [[0, 0], [0, 0]]],
    }
    assert_rows(
        rows(features),
        input_ids=[[1, 2, 4], [5, PAD, PAD]],
        token_type_ids=[[0, 1, 1], [0, 0, 0]],
        special_tokens_mask=[[1, 0, 1], [1, 0, 0]],
        segment_ids=[[0, 0, 1], [0, 0, 0]],
        position_ids=[[0, 1, 2], [9, 0, 0]],
        missing=[[False, True, False], [True, False, False]],
        weight=[[0.5, 1.0, 0.5], [2.0, 0.0, 0.0]],
        **stacked,
    )
    assert_equal(
        flat(features),
        input_ids=[[1, 2, 4, 5]],
        token_type_ids=[[0, 1, 1, 0]],
        special_tokens_mask=[[1, 0, 1, 1]],
        segment_ids=[[0, 0, 1, 0]],
        position_ids=[[0, 1, 2, 9]],
        missing=[[False, True, False, True]],
        weight=[[0.5, 1.0, 0.5, 2.0]],
        **stacked,
    )


def test_hidden_spans_are_per_example_even_with_as_many_spans_as_tokens(flat):
    batch = flat([{"input_ids": [1, 2], "hidden_spans": [[0, 1], [1, 1]]}])
    assert batch["hidden_spans"].tolist() == [[[0, 1], [1, 1]]]


def test_no_hidden_spans_at_all(rows):
    batch = rows([{"input_ids": [1, 2], "hidden_spans": []}, {"input_ids": [1], "hidden_spans": []}])
    assert batch["hidden_spans"].shape == (2, 0, 2)


def test_answers_move_with_their_tokens(rows):
    """Positions outside the example, which say that there is no answer, stay."""
    sequences = [[PAD, 11, PAD, 12], [14, 15, PAD], []]
    masks = [[0, 1, 0, 1], [1, 1, 0], []]
    starts, ends = [1, 3, 0], [3, -1, 0]
    names = ("input_ids", "attention_mask", "start_positions", "end_positions")
    assert_rows(
        rows([dict(zip(names, values, strict=True)) for values in zip(sequences, masks, starts, ends, strict=True)]),
        input_ids=[[11, 12], [14, 15], [PAD, PAD]],
        lengths=[2, 2, 0],
        start_positions=[0, 3, 0],
        end_positions=[1, -1, 0],
    )


@pytest.mark.parametrize("flat", [False, True])
def test_answers_are_counted_where_that_is_wanted(flat):
    """Those inside their sequence."""
    examples = [
        {"input_ids": [4] * 3, "start_positions": start, "end_positions": end}
        for start, end in [(0, 2), (1, 1), (0, 3), (3, 2), (-1, -1)]
    ]
    tokenizer = make_tokenizer(pad_token="[PAD]")
    plain = DataCollatorWithLengths(tokenizer, flat=flat)(examples)
    counted = DataCollatorWithLengths(tokenizer, flat=flat, count_answers=True)(examples)
    assert_equal(counted, **plain, labels=[0, 1, -100, -100, -100])


def test_labels_of_their_own_stay_beside_answers():
    collator = DataCollatorWithLengths(make_tokenizer(), count_answers=True)
    batch = collator([{"input_ids": [1, 2], "start_positions": 0, "end_positions": 1, "labels": 7}])
    assert batch["labels"].tolist() == [7]


# --- what examples come as -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("container", [list, tuple, np.array, torch.tensor, lambda row: np.array(row, dtype=np.int32)])
def test_containers(rows, container):
    features = [
        {"input_ids": container(row), "attention_mask": container(mask), "hidden_spans": [container([0, 1])]}
        for row, mask in [([4, 5], [1, 1]), ([PAD, 6], [0, 1])]
    ]
    assert_rows(rows(features), input_ids=[[4, 5], [6, PAD]], lengths=[2, 1], hidden_spans=[[[0, 1]], [[0, 1]]])


@pytest.mark.parametrize("format", [None, "numpy", "torch"])
def test_data_sets(rows, format):
    columns = {"input_ids": [[4, 5], [6]], "words": [["a", "b"], ["c"]], "label": [1, 0]}
    dataset = Dataset.from_dict(columns).with_format(format)
    assert_rows(rows([dataset[0], dataset[1]]), input_ids=[[4, 5], [6, PAD]], lengths=[2, 1], labels=[1, 0])


def test_tokenizer_output(rows):
    features = [rows.tokenizer(text) for text in ("a b a", "b")]
    assert isinstance(features[0], BatchEncoding)
    batch = rows(features)
    assert batch["input_ids"].tolist() == [[1, 2, 1], [2, PAD, PAD]]


def test_pickle(rows):
    features = ids([4], [5, 6])
    assert_equal(pickle.loads(pickle.dumps(rows))(features), **rows(features))


@pytest.mark.parametrize(
    "flat, expected", [(False, [[0, 1, 2], [0, 0, 0]]), (True, [[0, 1, 2, 0]])], ids=["rows", "flat"]
)
def test_position_ids(flat, expected):
    collate = DataCollatorWithLengths(make_tokenizer(pad_token="[PAD]"), flat=flat, return_position_ids=True)
    assert collate(ids([5, 6, 7], [8]))["position_ids"].tolist() == expected
    own = [{"input_ids": [5, 6], "position_ids": [3, 4]}]
    assert collate(own)["position_ids"].tolist() == [[3, 4]]


class MeanOfEmbeddings(torch.nn.Module):
    """A classifier that reads `lengths`, in rows and flat."""

    def __init__(self):
        super().__init__()
        self.embeddings = torch.nn.Embedding(10, 2)

    def forward(self, input_ids, lengths, labels, attention_mask=None):
        flat = input_ids[torch.arange(input_ids.shape[1]) < lengths[:, None]] if len(input_ids) > 1 else input_ids[0]
        logits = torch.segment_reduce(self.embeddings(flat), "mean", lengths=lengths, axis=0)
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize("form", ["rows", "flat"])
def test_trainer(form, request, tmp_path):
    rows = [{"input_ids": [1], "text": "a", "label": 0}, {"input_ids": [2, 4, 5], "text": "b", "label": 1}] * 4
    dataset = Dataset.from_list(rows)
    trainer = Trainer(
        MeanOfEmbeddings(),
        TrainingArguments(str(tmp_path), max_steps=2, per_device_train_batch_size=4, use_cpu=True, report_to="none"),
        data_collator=request.getfixturevalue(form),
        train_dataset=dataset,
        eval_dataset=dataset,
        compute_metrics=lambda seen: {"labels": list(seen.label_ids), "rows": len(seen.predictions)},
    )
    assert trainer.train().global_step == 2
    metrics = trainer.evaluate()
    assert metrics["eval_labels"] == list(dataset["label"])
    assert metrics["eval_rows"] == 8


# --- bad examples ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "features, message",
    [
        ([], "`features` must hold at least one example; got none"),
        ([{"labels": 1}], "must have a column `input_ids`; got labels"),
        ([{"input_ids": "a b"}], "must have a column `input_ids`; got no numbers"),
        (ids([0.5, 1.0]), r"`input_ids` of an example must be a list of integers, .* shape \(2,\) of torch.float32"),
        (ids([[1], [2]]), r"`input_ids` of an example must be a list of integers, shape \(T,\); got shape \(2, 1\)"),
        ([{"input_ids": 5}], r"`input_ids` of an example must be a list of integers, shape \(T,\); got shape \(\)"),
        (
            [{"input_ids": [1], "label": 1}, {"input_ids": [2]}],
            "`label` must be in every .*; got none in example 1",
        ),
        (
            [{"input_ids": [1]}, {"input_ids": [2], "label": 1}],
            "`label` must be in every .*; got none in example 0",
        ),
        (
            [{"input_ids": [1], "x": [[1], [2, 3]]}],
            r"`x` must hold numbers, lists of them of equal length, or text; got \[\[1\], \[2, 3\]\]",
        ),
        ([{"input_ids": [1], "answers": {"text": "a"}}], r"`answers` must hold numbers, .*; got \{'text': 'a'\}"),
        ([{"input_ids": [1], "x": [None]}], r"`x` must hold numbers, .*; got \[None\]"),
        (
            [{"input_ids": [1, 2], "labels": [1, 2]}, {"input_ids": [1, 2], "labels": [1, 2, 3]}],
            r"`labels` must have one entry for each of the 2 tokens of example 1; got shape \(3,\)",
        ),
        (
            [{"input_ids": [1], "label": 0, "labels": [1]}],
            "must have one column of labels; got `labels` next to",
        ),
        (
            [{"input_ids": [1], "inputs_embeds": [[1.0, 2.0]]}, {"input_ids": [1], "inputs_embeds": [[1.0]]}],
            r"`inputs_embeds` must have entries of one shape; got shapes \[\(1, 2\), \(1, 1\)\]",
        ),
        (
            [{"input_ids": [1], "prefix_lengths": 1}, {"input_ids": [1], "prefix_lengths": [1]}],
            r"`prefix_lengths` must have the same shape in every example; got shapes \[\(\), \(1,\)\]",
        ),
        (
            [{"input_ids": [1, 2], "attention_mask": [1]}],
            r"`attention_mask` of an example must hold 0 or 1 per token, shape \(2,\); got shape \(1,\)",
        ),
        (
            [{"input_ids": [1, 2], "attention_mask": [[1, 0], [1, 1]]}],
            r"`attention_mask` of an example must hold 0 or 1 per token, shape \(2,\); got shape \(2, 2\)",
        ),
        (
            [{"input_ids": [1, 2], "attention_mask": [1, 2]}],
            r"`attention_mask` of an example must hold 0 or 1; got \[1, 2\] in example 0",
        ),
        (
            [{"input_ids": [1], "hidden_spans": [[0, 1, 2]]}],
            r"`hidden_spans` of an example must have shape \(K, 2\); got \(1, 3\)",
        ),
        ([{"input_ids": [1], "hidden_spans": [0, 1]}], r"`hidden_spans` .* must have shape \(K, 2\); got \(2,\)"),
    ],
)
def test_bad_examples(rows, features, message):
    with pytest.raises(ValueError, match=message):
        rows(features)


def test_no_pad_token():
    """It is needed for rows of different lengths, and only there."""
    tokenizer = make_tokenizer()
    assert DataCollatorWithLengths(tokenizer)(ids([1, 2], [4, 5]))["input_ids"].tolist() == [[1, 2], [4, 5]]
    assert DataCollatorWithLengths(tokenizer, flat=True)(ids([1, 2], [4]))["input_ids"].tolist() == [[1, 2, 4]]
    message = "`tokenizer.pad_token` must be set to pad rows of different lengths; got pad_token_id=None"
    with pytest.raises(ValueError, match=message):
        DataCollatorWithLengths(tokenizer)(ids([1, 2], [4]))
