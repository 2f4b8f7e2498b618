"""Token budgets: every example once, no batch above the budget, equal steps and work on all processes, streams."""

import logging
import pickle
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
from accelerate import skip_first_batches
from accelerate.data_loader import BatchSamplerShard, IterableDatasetShard, prepare_data_loader
from datasets import Dataset
from datasets import IterableDataset as StreamOfDatasets
from hypothesis import given
from hypothesis import strategies as st
from packaging.version import Version
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerFast

from hf_dynmask import (
    DataCollatorForFeatures,
    DataCollatorForSeq2SeqWithLengths,
    DataCollatorWithLengths,
    TokenBudgetBatchSampler,
    TokenBudgetIterableDataset,
)
from hf_dynmask.data.token_budget import CollatorWithinBudget, example_lengths, list_sizes, pair_lengths
from strategies import examples


def reviews(number=4000):
    """Lengths like those of film reviews."""
    return np.random.default_rng(0).gamma(5, 5.3, number).astype(int).clip(3, 70)


def heavy_tailed(number=2000):
    return np.random.default_rng(0).lognormal(4.5, 1, number).astype(int).clip(3, 512)


# Accelerate's default is to even out batches, which before 1.14 is an error for batches of no one size.
EVEN_BATCHES = Version(accelerate.__version__) >= Version("1.14")


def of_ranks(sampler, even_batches=EVEN_BATCHES) -> list[list[list[int]]]:
    """The batches of each process, as Accelerate deals them out."""
    number = sampler.num_replicas
    shards: list[Any] = [BatchSamplerShard(sampler, number, rank, even_batches=even_batches) for rank in range(number)]
    return [list(shard) for shard in shards]


def indices(batches):
    return sorted(index for batch in batches for index in batch)


def groups(batches):
    return {frozenset(batch) for batch in batches}


# --- What a batch and an epoch hold ----------------------------------------------------------------------------------


@st.composite
def samplers(draw):
    lengths = draw(st.lists(st.integers(0, 30) | st.integers(0, 3), min_size=1, max_size=60))
    max_tokens = draw(st.integers(max(1, *lengths), 100))
    settings = {
        "num_replicas": draw(st.integers(1, 4)),
        "shuffle": draw(st.booleans()),
        "seed": draw(st.integers(0, 9)),
    }
    try:
        return TokenBudgetBatchSampler(lengths, max_tokens, **settings)
    except ValueError as error:
        # Nothing else is refused: with room for two examples in every batch, all find a place.
        assert "equally many batches" in str(error)
        assert len(lengths) < settings["num_replicas"] or max_tokens < 2 * max(lengths)
        return None


@given(samplers(), st.integers(0, 1000))
@examples(300)
def test_an_epoch_has_every_example_once_within_the_budget_and_as_many_steps_on_each_process(sampler, epoch):
    if sampler is None:
        return
    sampler.set_epoch(epoch)
    ranks = of_ranks(sampler)
    assert indices(batch for batches in ranks for batch in batches) == list(range(len(sampler.lengths)))
    assert {len(batches) for batches in ranks} == {sampler.num_steps}
    assert len(sampler) == sampler.num_steps * sampler.num_replicas
    for batches in ranks:
        assert all(len(batch) > 0 and sum(sampler.lengths[batch]) <= sampler.max_tokens for batch in batches)
    assert of_ranks(sampler, even_batches=False) == ranks
    lengths = torch.as_tensor(sampler.lengths)
    for rank, batches in enumerate(ranks):
        settings = {"num_replicas": sampler.num_replicas, "shuffle": sampler.shuffle, "seed": sampler.seed}
        alone = TokenBudgetBatchSampler(lengths, sampler.max_tokens, rank=rank, **settings)
        alone.set_epoch(epoch)
        assert list(alone) == batches
        assert len(alone) == len(batches)


@pytest.mark.parametrize(
    "lengths, max_tokens, num_replicas, steps",
    [
        ([128] * 80, 1024, 2, 5),  # eight in each batch, no space left
        ([600] * 10, 1024, 2, 5),  # no two fit together
        ([5, 3, 4, 2, 2], 8, 1, 2),  # balanced batches would be three
        ([5, 3, 4, 2, 2] * 2, 8, 2, 2),
        ([4, 4, 3, 3, 2, 0], 8, 1, 2),
        ([6, 5, 5, 4, 4, 4], 14, 2, 1),
        ([10, 1, 1, 1], 10, 1, 2),
        ([0, 0, 0], 5, 1, 1),
        ([0, 0, 0], 5, 3, 1),
        ([7], 7, 1, 1),
        (reviews(), 1024, 2, 52),  # the fewest: 51.4 by tokens
        (heavy_tailed(), 512, 4, 131),  # 126.8 by tokens
    ],
)
def test_few_steps(lengths, max_tokens, num_replicas, steps):
    sampler = TokenBudgetBatchSampler(lengths, max_tokens, num_replicas=num_replicas)
    assert sampler.num_steps == steps


@pytest.mark.parametrize("max_tokens", [512, 1024, 2048, 4096])
def test_batches_are_full(max_tokens):
    """As full as whole batches can be, but for half a percent."""
    lengths = reviews()
    whole = -(-lengths.sum() // max_tokens)
    assert len(TokenBudgetBatchSampler(lengths, max_tokens)) <= whole + 1 + whole // 200
    batches = list(TokenBudgetIterableDataset(stream_of(lengths), max_tokens))
    assert len(batches) <= whole + 1 + whole // 200


@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=60),
    st.integers(12, 60),
    st.integers(1, 6),
    st.integers(1, 3),
    st.booleans(),
)
@examples(200)
def test_no_batch_has_more_examples_than_are_asked_for(lengths, max_tokens, max_sequences, num_replicas, shuffle):
    settings: dict[str, Any] = {"max_sequences": max_sequences, "num_replicas": num_replicas}
    try:
        sampler = TokenBudgetBatchSampler(lengths, max_tokens, shuffle=shuffle, **settings)
    except ValueError as error:
        # With room for two examples in every batch, all find a place.
        assert f"of max_tokens={max_tokens}, max_sequences={max_sequences} on" in str(error)
        assert len(lengths) < num_replicas or max_sequences == 1 or max_tokens < 2 * max(lengths)
        return
    assert sampler.max_sequences == max_sequences
    for epoch in range(3):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert indices(batches) == list(range(len(lengths)))
        assert all(0 < len(batch) <= max_sequences for batch in batches)
        assert all(sampler.lengths[batch].sum() <= max_tokens for batch in batches)


@pytest.mark.parametrize("lengths", [reviews(), heavy_tailed(), [0] * 50 + [1] * 50, [600] * 10, [7]])
@pytest.mark.parametrize("shuffle", [False, True])
def test_the_most_examples_of_a_batch_are_known(lengths, shuffle):
    """Closely, and for all epochs."""
    sampler = TokenBudgetBatchSampler(lengths, 1024, shuffle=shuffle)
    most = 0
    for epoch in range(8):
        sampler.set_epoch(epoch)
        most = max(most, *map(len, sampler))
    assert most <= sampler.max_sequences <= min(len(lengths), 1 + 1.2 * most)


@pytest.mark.parametrize("max_sequences, most", [(None, 8), (3, 3), (20, 20)])
def test_most_examples_of_a_batch_of_a_stream(max_sequences, most):
    """Without a number of its own, no more than tokens, nor than wait: examples may be empty."""
    lengths = [0] * 30 + [1] * 30
    stream = TokenBudgetIterableDataset(stream_of(lengths), 8, max_sequences=max_sequences, buffer_size=20)
    batches = list(stream)
    assert sum(map(len, batches)) == len(lengths)
    assert max(map(len, batches)) <= most
    assert stream.max_sequences == (max_sequences or 8)
    assert TokenBudgetIterableDataset([], 100, buffer_size=20).max_sequences == 20


def test_a_stream_of_examples_as_long_as_the_budget():
    assert [len(batch) for batch in TokenBudgetIterableDataset(stream_of([8] * 30), 8, buffer_size=10)] == [1] * 30


def stream_of(lengths):
    return [{"length": int(length)} for length in lengths]


def imbalance(work, ranks):
    """How far the process with the most work is above the mean, in each step."""
    sums = np.array([[work[batch].sum() for batch in batches] for batches in ranks])
    return sums.max(0) / sums.mean(0) - 1


@pytest.mark.parametrize("num_replicas", [2, 8])
@pytest.mark.parametrize("lengths, max_tokens", [(reviews(), 1024), (heavy_tailed(), 2048)])
def test_work_is_balanced_over_processes(lengths, max_tokens, num_replicas):
    sampler = TokenBudgetBatchSampler(lengths, max_tokens, num_replicas=num_replicas)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        ranks = of_ranks(sampler)
        assert imbalance(lengths, ranks).max() < 0.05
        assert imbalance(lengths**2, ranks).mean() < 0.01
        assert imbalance(lengths**2, ranks).max() < 0.05

    size = len(lengths) // len(sampler)  # of batches of equally many examples at random, for as many steps
    order = np.random.default_rng(0).permutation(len(lengths))[: size * len(sampler)]
    random = order.reshape(num_replicas, sampler.num_steps, size)
    assert imbalance(lengths**2, list(random)).mean() > 0.09


# --- Shuffling -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [reviews(1000), heavy_tailed(1000), np.arange(10, 510), np.full(500, 9)])
def test_epochs_have_other_batches(lengths):
    sampler = TokenBudgetBatchSampler(lengths, 2048, seed=3)
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert len(first) == len(second)
    assert len(groups(first) & groups(second)) <= 0.1 * len(first)
    work = [(lengths[batch] ** 2).sum() for batch in first]
    assert work != sorted(work, reverse=True)  # as unshuffled

    assert list(sampler) == second
    sampler.set_epoch(0)
    assert list(sampler) == first
    assert list(TokenBudgetBatchSampler(lengths, 2048, seed=3)) == first
    assert list(TokenBudgetBatchSampler(lengths, 2048, seed=4)) != first


def test_unshuffled():
    lengths = heavy_tailed()
    sampler = TokenBudgetBatchSampler(lengths, 2048, num_replicas=2, shuffle=False)
    batches = list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) == batches
    assert lengths.max() in lengths[batches[0]]
    squares = [(lengths[batch] ** 2).sum() for batch in batches]
    assert squares == sorted(squares, reverse=True)


# --- Accelerate ------------------------------------------------------------------------------------------------------


def prepared(sampler, rank) -> Any:
    numbers: Any = range(len(sampler.lengths))
    loader = DataLoader(numbers, batch_sampler=sampler, collate_fn=list)
    return prepare_data_loader(
        loader,
        num_processes=sampler.num_replicas,
        process_index=rank,
        put_on_device=False,
        even_batches=EVEN_BATCHES,
    )


def test_accelerate_sets_the_epoch_and_skips_batches():
    lengths = reviews(300)
    loaders = [prepared(TokenBudgetBatchSampler(lengths, 512, num_replicas=2), rank) for rank in range(2)]
    epochs = [[list(loader) for loader in loaders] for _ in range(2)]
    for ranks in epochs:
        assert indices(batch for batches in ranks for batch in batches) == list(range(300))
        assert len(ranks[0]) == len(ranks[1]) == len(loaders[0])
    assert epochs[0] != epochs[1]
    for rank, batches in enumerate(epochs[1]):
        again = prepared(TokenBudgetBatchSampler(lengths, 512, num_replicas=2), rank)
        again.set_sampler(again.batch_sampler.batch_sampler)  # then Accelerate reaches it, however deep it is wrapped
        skipped: Any = skip_first_batches(again, 3)
        skipped.set_epoch(1)
        assert list(skipped) == batches[3:]


def test_pickle():
    sampler = TokenBudgetBatchSampler(reviews(100), 512)
    assert list(pickle.loads(pickle.dumps(sampler))) == list(sampler)


# --- Bad arguments ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"lengths": []}, r"`lengths` must be integers of at least 0, .*; got float64 of shape \(0,\)"),
        ({"lengths": [1.5, 2]}, r"`lengths` must be integers of at least 0, .*; got float64 of shape \(2,\) from 1.5"),
        ({"lengths": [3, -1]}, r"`lengths` must be integers of at least 0, .*; got int64 of shape \(2,\) from -1"),
        ({"lengths": [[1], [2]]}, r"one for each of at least one example; got int64 of shape \(2, 1\)"),
        ({"lengths": ["5"]}, r"`lengths` must be integers of at least 0, .*; got <U1 of shape \(1,\)$"),
        ({"lengths": [[1, 2], [3]]}, r"`lengths` must be integers of at least 0, .*; got object of shape \(\)$"),
        ({"max_tokens": 0}, "`max_tokens` must be at least 1; got 0"),
        ({"max_tokens": "10"}, "`max_tokens` must be an integer; got '10'"),
        ({"max_tokens": 10.5}, "`max_tokens` must be an integer; got 10.5"),
        ({"max_sequences": 0}, "`max_sequences` must be at least 1; got 0"),
        ({"max_sequences": True}, "`max_sequences` must be an integer; got True"),
        ({"seed": 0.5}, "`seed` must be an integer; got 0.5"),
        (
            {"max_tokens": 4},
            r"longest example's length; got max_tokens=4, and example 1 has 5 tokens. .*`truncate=True`",
        ),
        ({"num_replicas": 0}, "`num_replicas` must be at least 1; got 0"),
        ({"num_replicas": 2, "rank": 2}, "`rank` must be from 0 to num_replicas - 1 = 1, or None; got 2"),
        ({"seed": -1}, "`seed` must be at least 0; got -1"),
        ({"num_replicas": 4}, "3 examples cannot make equally many batches of max_tokens=10 on each of num_replicas=4"),
        (
            {"lengths": [6, 6, 6], "num_replicas": 2},
            "3 examples cannot make equally many batches .* Raise `max_tokens`",
        ),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        TokenBudgetBatchSampler(**{"lengths": [3, 5, 2], "max_tokens": 10, **arguments})


def test_an_example_beyond_the_budget_may_be_counted_as_cut():
    sampler = TokenBudgetBatchSampler([3, 50, 2, 7], 10, truncate=True)
    assert groups(sampler) == {frozenset({1}), frozenset({3}), frozenset({0, 2})}
    assert sampler.lengths.tolist() == [3, 10, 2, 7]


# --- Streams ---------------------------------------------------------------------------------------------------------


class Stream(torch.utils.data.IterableDataset):
    """Examples of given lengths. Counts how many it has handed out."""

    def __init__(self, lengths):
        self.lengths, self.read, self.epoch = lengths, 0, None

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        self.read = 0
        for number, length in enumerate(self.lengths):
            self.read += 1
            yield {"input_ids": [number] * length, "id": number}


def ids(batches):
    return [[example["id"] for example in batch] for batch in batches]


def dealt_out(stream):
    number = stream.num_replicas
    return [ids(IterableDatasetShard(stream, 1, num_processes=number, process_index=rank)) for rank in range(number)]


@given(
    st.lists(st.integers(0, 20), max_size=80),
    st.integers(20, 60),
    st.integers(1, 3),
    st.integers(3, 30),
    st.integers(0, 9),
)
@examples(150)
def test_a_stream_has_every_example_once_within_the_budget(lengths, max_tokens, num_replicas, buffer_size, seed):
    source = Stream(lengths)
    stream = TokenBudgetIterableDataset(
        source, max_tokens, num_replicas=num_replicas, buffer_size=buffer_size, seed=seed
    )
    seen, waiting = [], []
    for batch in stream:
        assert len(batch) > 0 and sum(len(example["input_ids"]) for example in batch) <= max_tokens
        waiting.append(source.read - len(seen))
        seen += ids([batch])[0]
    left_out = len(lengths) - len(seen)
    assert len(set(seen)) == len(seen)
    assert 0 <= left_out < num_replicas
    assert left_out == 0 or num_replicas > 1
    assert max(waiting, default=0) <= buffer_size
    ranks = dealt_out(stream)
    assert len({len(batches) for batches in ranks}) == 1
    assert indices(batch for batches in ranks for batch in batches) == sorted(seen)


def test_batches_of_a_stream_are_full_balanced_and_other_ones_each_epoch():
    lengths = reviews(6000)
    source = Stream(lengths)
    stream = TokenBudgetIterableDataset(source, 1024, num_replicas=2, seed=1)
    ranks = dealt_out(stream)
    assert len(ranks[0]) < 1.08 * lengths.sum() / (2 * 1024)
    assert imbalance(lengths, ranks).max() < 0.05
    assert imbalance(lengths**2, ranks).mean() < 0.02
    assert dealt_out(stream) == ranks
    stream.set_epoch(1)
    assert source.epoch == 1
    assert not groups(ranks[0]) & groups(dealt_out(stream)[0])


def test_persistent_workers_see_the_epoch():
    stream = TokenBudgetIterableDataset(Stream([3] * 40), 12)
    loader = DataLoader(stream, batch_size=None, collate_fn=list, num_workers=1, persistent_workers=True)
    epochs = []
    for epoch in (0, 1):
        stream.set_epoch(epoch)
        epochs.append(ids(loader))
    stream.set_epoch(0)
    assert epochs[0] == ids(stream)
    assert epochs[0] != epochs[1]


def test_what_is_left_out_is_said(caplog):
    stream = TokenBudgetIterableDataset(Stream([8, 8, 8, 8, 8]), 10, num_replicas=3)
    with caplog.at_level(logging.WARNING):
        assert indices(ids(stream)) == [0, 1, 2]
    assert "the last 2 examples of the stream are left out: they are too few for a batch on each of 3" in caplog.text


def test_streams_of_datasets_by_columns():
    rows = Dataset.from_list([{"text": "a" * n, "tokens": n} for n in (3, 4, 3)]).to_iterable_dataset()
    stream = TokenBudgetIterableDataset(rows, 6, length_column="tokens")
    assert isinstance(rows, StreamOfDatasets)
    assert sorted(sorted(len(example["text"]) for example in batch) for batch in stream) == [[3, 3], [4]]


def first_batch(rows, **settings):
    return next(iter(TokenBudgetIterableDataset(rows, **{"max_tokens": 10, **settings})))


@pytest.mark.parametrize(
    "rows, settings, message",
    [
        ([], {"max_tokens": 0}, "`max_tokens` must be at least 1; got 0"),
        ([], {"max_sequences": -1}, "`max_sequences` must be at least 1; got -1"),
        ([], {"buffer_size": 1.5}, "`buffer_size` must be an integer; got 1.5"),
        ([], {"num_replicas": 3, "buffer_size": 2}, "`buffer_size` must be at least num_replicas=3.*; got 2"),
        ([], {"seed": -1}, "`seed` must be at least 0; got -1"),
        ([{"length": 1}, {"text": "a"}], {}, "must have a column `length` or `lengths` .*; got text in example 1"),
        ([[5, 6]], {}, "an example must be a mapping, .*; got a list in example 0"),
        ([{}], {"length_column": "n"}, "must have a column `n` or `lengths` .*; got no columns in example 0"),
        ([{"length": "5"}], {}, "column `length` must hold .* an integer of at least 0; got '5' in example 0"),
        ([{"lengths": -5}], {}, "column `lengths` must hold .* an integer of at least 0; got -5 in example 0"),
        ([{"length": 1}, {"length": 11}], {}, "got max_tokens=10, and example 1 has 11 tokens"),
    ],
)
def test_bad_streams(rows, settings, message):
    with pytest.raises(ValueError, match=message):
        first_batch(rows, **settings)


def test_an_example_of_a_stream_beyond_the_budget_may_be_counted_as_cut():
    assert first_batch([{"length": 11}], truncate=True) == [{"length": 11}]


# --- Lengths of examples ---------------------------------------------------------------------------------------------


class Rows(TorchDataset):
    """A dataset that has neither columns nor an iterator."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index] if index < len(self) else None


ROWS = [{"input_ids": [5, 6, 0], "attention_mask": [1, 1, 0], "text": "one"}, {"input_ids": [7], "attention_mask": [1]}]


@pytest.mark.parametrize(
    "make", [list, Rows, Dataset.from_list, lambda rows: Dataset.from_list(rows).with_format("torch")]
)
def test_lengths_of_examples(make):
    assert example_lengths(make(ROWS)) == [2, 1]
    assert example_lengths(make([{"input_ids": row["input_ids"]} for row in ROWS])) == [3, 1]
    assert example_lengths(make([{"input_features": [[0.5], [1.0]], "labels": [4]}])) == [2]
    assert example_lengths(make([{**row, "lengths": 9} for row in ROWS])) == [9, 9]
    assert example_lengths(make([{**row, "lengths": 9, "length": 8} for row in ROWS])) == [8, 8]
    assert example_lengths(make([{**row, "lengths": 9, "words": 7} for row in ROWS]), "words") == [7, 7]


def test_lengths_of_examples_tokenized_when_read():
    dataset = Dataset.from_dict({"text": ["a b c", "d"]})
    dataset.set_transform(lambda rows: {"input_ids": [text.split() for text in rows["text"]]})
    assert example_lengths(dataset) == [3, 1]


def test_lengths_beside_a_transform():
    """The column is read as it is stored; a transform that needs other columns is not called for it."""
    dataset = Dataset.from_dict({"text": ["a b c", "d"], "length": [7, 8]})
    dataset.set_transform(lambda rows: {"input_ids": [text.split() for text in rows["text"]]})
    assert example_lengths(dataset) == [7, 8]


PAIRS = [
    {"input_ids": [5, 6, 0], "attention_mask": [1, 1, 0], "labels": [7], "lengths": 3, "decoder_attention_mask": [1]},
    {"input_ids": [], "attention_mask": [], "labels": [4, 5, 0], "lengths": 2, "decoder_attention_mask": [1, 1, 0]},
]


@pytest.mark.parametrize("make", [list, Rows, Dataset.from_list])
def test_lengths_of_pairs(make):
    assert pair_lengths(make(PAIRS)).tolist() == [[2, 1], [0, 2]]
    frames = [{"input_features": [[0.5], [1.0]], "label_ids": [4, 5, 6]}]
    assert pair_lengths(make(frames)).tolist() == [[2, 3]]
    assert pair_lengths(make([{"input_ids": [4]}])).tolist() == [[1, 0]]
    assert pair_lengths([]).shape == (0, 2)


@pytest.mark.parametrize("make", [list, Rows, Dataset.from_list])
def test_sizes_of_lists(make):
    rows = [
        {"label_ids": [1], "hidden_spans": [[0, 1], [2, 1]], "idx": 4},
        {"label_ids": [1, 2, 3], "hidden_spans": []},
    ]
    rows = [{"idx": 5, **row} for row in rows]
    names = ("hidden_spans", "labels", "decoder_hidden_spans")
    assert list_sizes(make(rows), names) == {"hidden_spans": 2, "labels": 3}
    assert list_sizes(make(rows), ("labels",)) == {"labels": 3}
    assert list_sizes(make([{"label": 5}]), names) == list_sizes([], names) == {}


def test_sizes_of_lists_that_a_transform_makes():
    dataset = Dataset.from_dict({"text": ["a b c", "d"], "labels": [0, 1]})
    dataset.set_transform(lambda rows: {"labels": [text.split() for text in rows["text"]]})
    assert list_sizes(dataset, ("labels",)) == {"labels": 3}


# --- The collator ----------------------------------------------------------------------------------------------------


def test_truncation_cuts_all_columns_with_an_entry_a_token():
    features = [
        {"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4], "starts": 3, "text": "four"},
        {"input_ids": [5, 6], "labels": [5, 6], "starts": 1, "text": "a"},
    ]
    cut = [
        {"input_ids": [1, 2, 3], "labels": [1, 2, 3], "starts": 3, "text": "four"},
        {"input_ids": [5, 6], "labels": [5, 6], "starts": 1, "text": "a"},
    ]
    assert CollatorWithinBudget(list, 3, truncate=True)(features) == cut
    assert CollatorWithinBudget(list, 4, truncate=True)(features) == features
    of_frames = [{"input_features": [[1.0], [2.0]], "label": [1, 0]}]
    assert CollatorWithinBudget(list, 1, truncate=True)(of_frames) == [{"input_features": [[1.0]], "label": [1]}]
    assert CollatorWithinBudget(list, 1, truncate=True)([{"number": 3}]) == [{"number": 3}]


TOKENIZER = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"[PAD]": 0})), pad_token="[PAD]")


@pytest.mark.parametrize("stock", [False, True])
def test_truncation_leaves_targets_whole(stock):
    """Those of pairs, and of speech, even where they are as many as the tokens or frames."""
    pair = {"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4], "decoder_input_ids": [0, 1, 2, 3]}
    collator: Any = (DataCollatorForSeq2Seq if stock else DataCollatorForSeq2SeqWithLengths)(TOKENIZER)
    batch = CollatorWithinBudget(collator, 3, truncate=True)([{**pair, "attention_mask": [1] * 4} if stock else pair])
    assert batch["input_ids"].tolist() == [[1, 2, 3]] and batch["labels"].tolist() == [[1, 2, 3, 4]]
    assert batch["decoder_input_ids"].tolist() == [[0, 1, 2, 3]]
    speech = {"input_features": [[0.5], [1.0], [1.5]], "labels": [1, 2, 3]}
    batch = CollatorWithinBudget(DataCollatorForFeatures(), 2, truncate=True)([speech])
    assert batch["input_features"].shape == (1, 2, 1) and batch["labels"].tolist() == [[1, 2, 3]]


def test_truncation_knows_the_roles_of_the_collator():
    features = [{"input_ids": [1, 2, 3], "x": [7, 8, 9], "label_ids": [0.5, 1.0, 0.5]}]
    cut = {"token": [[7, 8]], "example": [[7, 8, 9]]}
    for role, expected in cut.items():
        collator = DataCollatorWithLengths(TOKENIZER, column_roles={"x": role})
        batch = CollatorWithinBudget(collator, 2, truncate=True)(features)
        assert batch["x"].tolist() == expected and batch["labels"].tolist() == [[0.5, 1.0, 0.5]]
    with pytest.raises(ValueError, match=r"column `x` .* set `column_roles=\{'x': 'token'\}`"):
        CollatorWithinBudget(DataCollatorWithLengths(TOKENIZER), 2, truncate=True)(features)


def test_the_column_of_lengths():
    """Whatever its name, it is for the budget alone; a collator checks `lengths`."""
    features = [{"input_ids": [1, 2, 3], "size": 3}, {"input_ids": [4], "size": 1}]
    collator = CollatorWithinBudget(DataCollatorWithLengths(TOKENIZER), 4, False, length_column="size")
    assert set(collator(features)) == {"input_ids", "lengths", "attention_mask"}
    features = [{"input_ids": [1, 2, 3], "lengths": 3}, {"input_ids": [4], "lengths": 1}]
    for column in ("length", "lengths"):
        collator = CollatorWithinBudget(DataCollatorWithLengths(TOKENIZER), 4, False, length_column=column)
        assert collator(features)["lengths"].tolist() == [3, 1]
    collator = CollatorWithinBudget(DataCollatorWithLengths(TOKENIZER), 2, truncate=True)
    assert collator(features[:1])["lengths"].tolist() == [2]
    with pytest.raises(ValueError, match="`lengths` must hold what the collator counts, .*: 3 in example 0; got 2"):
        CollatorWithinBudget(DataCollatorWithLengths(TOKENIZER), 4, False)([{"input_ids": [1, 2, 3], "lengths": 2}])


def test_truncation_does_not_count_absent_tokens():
    features = [{"input_ids": [0, 0, 1, 2, 0, 3, 4], "attention_mask": [0, 0, 1, 1, 0, 1, 1]}]
    (cut,) = CollatorWithinBudget(list, 3, truncate=True)(features)
    assert cut == {"input_ids": [0, 0, 1, 2, 0, 3], "attention_mask": [0, 0, 1, 1, 0, 1]}


def test_lengths_that_do_not_fit_the_dataset():
    def collate(features):
        return {"lengths": torch.tensor([len(feature["input_ids"]) for feature in features])}

    collator = CollatorWithinBudget(collate, 5, truncate=False)
    assert collator([{"input_ids": [1, 2, 3]}, {"input_ids": [1, 2]}])["lengths"].tolist() == [3, 2]
    with pytest.raises(ValueError, match="a batch has 6 tokens, more than the budget `max_tokens`=5: the lengths"):
        collator([{"input_ids": [1, 2, 3]}, {"input_ids": [1, 2, 3]}])


@pytest.mark.parametrize("mask", [[1, 1, 2, 2], [2, 0, 0, 0], [1, 1, 1, -1], [1.0, 0.5, 0.0, 0.0]])
def test_masks_that_number_documents(mask):
    example = {"input_ids": [5, 6, 7, 8], "attention_mask": mask}
    with pytest.raises(ValueError, match="`attention_mask` of an example must hold 0 or 1; got .* in example 1"):
        example_lengths([{"input_ids": [5]}, example])
    with pytest.raises(ValueError, match="`attention_mask` of an example must hold 0 or 1; got .* in example 0"):
        CollatorWithinBudget(DataCollatorWithLengths(TOKENIZER), 3, truncate=True)([example])
