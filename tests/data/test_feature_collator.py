"""DataCollatorForFeatures: what it does with frames and their labels. (What it shares is in test_collators.)"""

import pickle

import numpy as np
import pytest
import torch

from batches import assert_equal, assert_rows
from hf_dynmask.data import DataCollatorForFeatures

FRAMES = [[[0.5, 1.0], [1.5, 2.0], [2.5, 3.0]], [[4.0, 5.0]]]


def examples(**columns):
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return [{"input_features": frames, **row} for frames, row in zip(FRAMES, rows or [{}, {}], strict=True)]


def test_rows_and_flat():
    rows = [FRAMES[0], [*FRAMES[1], [0.0, 0.0], [0.0, 0.0]]]
    assert_rows(DataCollatorForFeatures()(examples()), input_features=rows, lengths=[3, 1])
    flat = DataCollatorForFeatures(flat=True)(examples())
    assert_equal(flat, input_features=[FRAMES[0] + FRAMES[1]], lengths=[3, 1])


@pytest.mark.parametrize("container", [np.array, torch.tensor, lambda frames: np.array(frames, dtype=np.float64)])
def test_containers(container):
    features = [{"input_features": container(frames)} for frames in FRAMES]
    assert_equal(DataCollatorForFeatures()(features), **DataCollatorForFeatures()(examples()))


def test_integers_become_floats():
    batch = DataCollatorForFeatures()([{"input_features": np.array([[255, 0]], dtype=np.uint8)}])
    assert_rows(batch, input_features=[[[255.0, 0.0]]], lengths=[1])


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize(
    "labels, expected",
    [
        ([[7, 8], [9, 8, 7, 6]], [[7, 8, -100, -100], [9, 8, 7, 6]]),
        ([[], [9]], [[-100], [9]]),
        ([[5, 6], [7, 8]], [[5, 6], [7, 8]]),
        ([3, 4], [3, 4]),
        ([0.5, 2.0], [0.5, 2.0]),
        ([[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 1.0]]),
    ],
    ids=["targets", "an empty target", "targets of one length", "class", "number", "several classes"],
)
def test_labels_of_examples(flat, labels, expected):
    batch = DataCollatorForFeatures(flat=flat)(examples(labels=labels))
    torch.testing.assert_close(batch["labels"], torch.tensor(expected))


def test_labels_of_frames():
    """They are told by their role alone: in flat batches targets that are as many as frames are another thing."""
    features, roles = examples(labels=[[1, 2, 3], [4]]), {"labels": "token"}
    for flat, expected in (False, [[1, 2, 3], [4, -100, -100]]), (True, [[1, 2, 3, 4]]):
        assert DataCollatorForFeatures(flat, column_roles=roles)(features)["labels"].tolist() == expected
        assert DataCollatorForFeatures(flat)(features)["labels"].tolist() == [[1, 2, 3], [4, -100, -100]]
    padded = DataCollatorForFeatures(label_pad_token_id=-1, column_roles=roles)(features)["labels"]
    assert padded.tolist() == [[1, 2, 3], [4, -1, -1]]


@pytest.mark.parametrize("labels", [[5, 6, 7], [5, -100, 7]])
def test_labels_as_many_as_frames_some_of_which_are_absent(labels):
    """They may be of the frames, and lose one, or be a target."""
    features = [{"input_features": FRAMES[0], "attention_mask": [1, 0, 1], "labels": labels}]
    with pytest.raises(ValueError, match=r"`labels` must have a role: set `column_roles=\{'labels': 'token'\}`"):
        DataCollatorForFeatures()(features)
    for role, expected in ("token", [[5, 7]]), ("example", [labels]):
        assert DataCollatorForFeatures(column_roles={"labels": role})(features)["labels"].tolist() == expected
    assert DataCollatorForFeatures()([{**features[0], "labels": [5, 6]}])["labels"].tolist() == [[5, 6]]


def test_other_columns():
    features = examples(
        position_ids=[[0, 1, 4], [2]],
        missing=[[False, True, False], [True]],
        attention_mask=[[1, 0, 1], [1]],
        text=["a b", "c"],
        hidden_spans=[[[0, 1]], []],
    )
    assert_rows(
        DataCollatorForFeatures()(features),
        input_features=[[FRAMES[0][0], FRAMES[0][2]], [*FRAMES[1], [0.0, 0.0]]],
        lengths=[2, 1],
        position_ids=[[0, 4], [2, 0]],
        missing=[[False, False], [True, False]],
        hidden_spans=[[[0, 1]], [[0, 0]]],
    )


def test_an_example_without_frames():
    batch = DataCollatorForFeatures()([{"input_features": []}, {"input_features": [[1.0, 2.0]]}])
    assert_rows(batch, input_features=[[[0.0, 0.0]], [[1.0, 2.0]]], lengths=[0, 1])


def test_pickle():
    collator = pickle.loads(pickle.dumps(DataCollatorForFeatures(flat=True, label_pad_token_id=-1)))
    assert collator == DataCollatorForFeatures(flat=True, label_pad_token_id=-1)


@pytest.mark.parametrize(
    "features, message",
    [
        ([], "`features` must hold at least one example; got none"),
        ([{"labels": 1}], "must have a column `input_features`; got labels"),
        ([{"input_features": [1.0, 2.0]}], r"`input_features` .* shape \(frames, features\).*got shapes \[\(2,\)\]"),
        (
            [{"input_features": [[1.0]]}, {"input_features": [[1.0, 2.0]]}],
            r"with the same number of features; got shapes \[\(1, 1\), \(1, 2\)\]",
        ),
        (
            [{"input_features": [[1.0], [2.0, 3.0]]}],
            r"`input_features` must hold numbers, lists of them of equal length",
        ),
        (
            [{"input_features": [[1.0]], "attention_mask": [1, 0]}],
            r"`attention_mask` of an example must hold 0 or 1 per token, shape \(1,\); got shape \(2,\)",
        ),
        (
            [{"input_features": [[1.0]], "lengths": 2}],
            "`lengths` must hold what the collator counts, or be left out: 1 in example 0; got 2",
        ),
        (
            examples(labels=[[0.5], [0.5, 1.0]]),
            r"`labels` must have the same shape in every example; got shapes \[\(1,\), \(2,\)\]",
        ),
    ],
)
def test_bad_examples(features, message):
    with pytest.raises(ValueError, match=message):
        DataCollatorForFeatures()(features)
