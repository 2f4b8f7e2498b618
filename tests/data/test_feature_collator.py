"""DataCollatorForFeatures: what it does with frames and their labels. (What it shares is in test_collators.)"""

import pickle

import numpy as np
import pytest
import torch

from hf_dynmask.data import DataCollatorForFeatures


def assert_equal(batch, **expected):
    """Same columns, numbers and dtypes."""
    assert set(batch) == set(expected)
    for name, values in expected.items():
        torch.testing.assert_close(batch[name], torch.as_tensor(values), rtol=0, atol=0)


FRAMES = [[[0.5, 1.0], [1.5, 2.0], [2.5, 3.0]], [[4.0, 5.0]]]


def examples(**columns):
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return [{"input_features": frames, **row} for frames, row in zip(FRAMES, rows or [{}, {}], strict=True)]


def test_rows_and_flat():
    rows = [FRAMES[0], [*FRAMES[1], [0.0, 0.0], [0.0, 0.0]]]
    assert_equal(DataCollatorForFeatures()(examples()), input_features=rows, lengths=[3, 1])
    flat = DataCollatorForFeatures(flat=True)(examples())
    assert_equal(flat, input_features=[FRAMES[0] + FRAMES[1]], lengths=[3, 1])


@pytest.mark.parametrize("container", [np.array, torch.tensor, lambda frames: np.array(frames, dtype=np.float64)])
def test_containers(container):
    features = [{"input_features": container(frames)} for frames in FRAMES]
    assert_equal(DataCollatorForFeatures()(features), **DataCollatorForFeatures()(examples()))


def test_integers_become_floats():
    batch = DataCollatorForFeatures()([{"input_features": np.array([[255, 0]], dtype=np.uint8)}])
    assert_equal(batch, input_features=[[[255.0, 0.0]]], lengths=[1])


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
    features = examples(labels=[[1, 2, 3], [4]])
    assert DataCollatorForFeatures()(features)["labels"].tolist() == [[1, 2, 3], [4, -100, -100]]
    assert DataCollatorForFeatures(flat=True)(features)["labels"].tolist() == [[1, 2, 3, 4]]
    assert DataCollatorForFeatures(label_pad_token_id=-1)(features)["labels"].tolist() == [[1, 2, 3], [4, -1, -1]]


def test_other_columns():
    features = examples(
        position_ids=[[0, 1, 4], [2]],
        missing=[[False, True, False], [True]],
        attention_mask=[[1, 0, 1], [1]],
        text=["a b", "c"],
        hidden_spans=[[[0, 1]], []],
    )
    assert_equal(
        DataCollatorForFeatures()(features),
        input_features=[[FRAMES[0][0], FRAMES[0][2]], [*FRAMES[1], [0.0, 0.0]]],
        lengths=[2, 1],
        position_ids=[[0, 4], [2, 0]],
        missing=[[False, False], [True, False]],
        hidden_spans=[[[0, 1]], [[0, 0]]],
    )


def test_an_example_without_frames():
    batch = DataCollatorForFeatures()([{"input_features": []}, {"input_features": [[1.0, 2.0]]}])
    assert_equal(batch, input_features=[[[0.0, 0.0]], [[1.0, 2.0]]], lengths=[0, 1])


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
            r"with as many features in all; got shapes \[\(1, 1\), \(1, 2\)\]",
        ),
        ([{"input_features": [[1.0], [2.0, 3.0]]}], r"`input_features` must hold numbers, even lists of numbers"),
        (
            [{"input_features": [[1.0]], "attention_mask": [1, 0]}],
            r"`attention_mask` of an example must hold 0 or 1 a token, shape \(1,\); got shape \(2,\)",
        ),
        (
            [{"input_features": [[1.0]], "lengths": 1}],
            "`lengths` must be left to the collator, which counts `input_features`; got a column of it",
        ),
        (
            examples(labels=[[0.5], [0.5, 1.0]]),
            r"`labels` must have one entry a token, or the same shape in every example; got shapes \[\(1,\), \(2,\)\]",
        ),
    ],
)
def test_bad_examples(features, message):
    with pytest.raises(ValueError, match=message):
        DataCollatorForFeatures()(features)
