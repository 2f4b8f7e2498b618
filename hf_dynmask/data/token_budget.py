"""Batches with a token budget: as many examples as fit, instead of a fixed number."""

import heapq
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from logging import getLogger
from operator import index
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import IterableDataset, Sampler
from transformers import DataCollatorForSeq2Seq

from .collators import DataCollatorForSeq2SeqWithLengths, DataCollatorWithLengths
from .columns import EXAMPLE, LABELS, MAIN_COLUMNS, model_name, not_binary, read_columns

logger = getLogger(__name__)

Step = list[list[int]]  # indices of the examples in the batch of each process

# Before examples are sorted by length, each length is multiplied by a random number from 1 to the jitter. The first
# jitter with which the examples fit is used. With 1 they always fit: the number of steps is chosen for that order.
JITTERS = (1.25, 1.1, 1.0)
# Shares of the capacity of a stream's full batches to fill with the oldest examples. The first that fits is used.
FILLS = (0.998, 0.995, 0.99, 0.98, 0.97)


class _Room(NamedTuple):
    """The capacity of a batch. `sequences=None` means any number of sequences."""

    tokens: int
    sequences: int | None

    def __str__(self):
        return f"max_tokens={self.tokens}" + ("" if self.sequences is None else f", max_sequences={self.sequences}")


class TokenBudgetBatchSampler(Sampler[list[int]]):
    """
    Batches of examples with at most a given number of tokens in total.

    Models that take `lengths` do not compute padding, so the budget counts real tokens, not rows times their width.

    - An epoch contains every example exactly once. Each process has the same number of steps, `num_steps`, which does
      not change from epoch to epoch, as the [`~transformers.Trainer`] and learning rate schedules expect.
    - The work of linear layers, proportional to the sum of the lengths L, is balanced over all batches: examples are
      taken in order of decreasing length, and each goes into the batch with the fewest tokens so far (longest
      processing time first; Graham, 1969). The work of attention, proportional to the sum of L², is balanced over the
      processes of each step: the batches of a step have similar sums of L².
    - With `shuffle`, each epoch has different batches: lengths are multiplied by random numbers from 1 to 1.25 before
      they are sorted (or to a smaller number, if the examples would not fit the budget), ties are broken at random, and
      the steps are shuffled. The result is a pure function of (`seed`, epoch).

    With `rank=None` the sampler yields the batches of all processes in turn, step by step, which Accelerate then
    distributes: prepare the [`~torch.utils.data.DataLoader`], on older releases with
    `DataLoaderConfiguration(even_batches=False)`. Accelerate calls [`set_epoch`] itself, and
    [`~accelerate.skip_first_batches`] resumes in mid-epoch. [`TokenBudgetMixin`] does all of this for a Trainer.

    Args:
        lengths (`Sequence[int]`): The number of tokens of each example, in the order of the dataset.
        max_tokens (`int`): The budget: the maximum number of tokens in a batch of one process.
        max_sequences (`int`, *optional*):
            The maximum number of examples in a batch. `None`: as many as fit the budget; the attribute `max_sequences`
            is then an upper bound for all epochs. To give the flat batches of [`DataCollatorWithLengths`] one shape,
            pass it `max_tokens=sampler.max_tokens, max_sequences=sampler.max_sequences`.
        num_replicas (`int`, *optional*, defaults to 1): Number of processes that share each step.
        rank (`int`, *optional*): Yield only the batches of this process. `None`: those of all processes, in turn.
        shuffle (`bool`, *optional*, defaults to `True`):
            `False`: the same batches in every epoch, those with the most attention work first.
        seed (`int`, *optional*, defaults to 0): Seed of the shuffling; must be the same on all processes.
        truncate (`bool`, *optional*, defaults to `False`):
            Count an example longer than the budget as `max_tokens` tokens instead of raising an error. The collator
            must then truncate the example itself.

    Yields:
        `list[int]`: Indices of the examples of a batch; at least one.

    Raises:
        ValueError: `lengths` is empty or does not hold integers of at least 0; `max_tokens`, `max_sequences`,
            `num_replicas`, `rank` or `seed` is out of range; an example is longer than the budget; the examples cannot
            be divided into the same number of batches on each process, since there are fewer examples than processes,
            or too few fit into one batch.

    Example:

    ```python
    >>> sampler = TokenBudgetBatchSampler([5, 3, 4, 2, 2], max_tokens=8, shuffle=False)
    >>> list(sampler)
    [[0], [2, 4], [1, 3]]
    ```
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray | torch.Tensor,
        max_tokens: int,
        *,
        max_sequences: int | None = None,
        num_replicas: int = 1,
        rank: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        truncate: bool = False,
    ):
        _check_positive(max_tokens=max_tokens, max_sequences=max_sequences, num_replicas=num_replicas)
        if rank is not None and not 0 <= rank < num_replicas:
            raise ValueError(f"`rank` must be from 0 to num_replicas - 1 = {num_replicas - 1}, or None; got {rank}")
        self.lengths = _within(_checked(lengths), max_tokens, truncate)
        self.max_tokens = max_tokens
        self.num_replicas = num_replicas
        self.rank = rank
        self.shuffle = shuffle
        self.seed = _checked_seed(seed)
        self.epoch = 0
        self.sampler = self  # Accelerate looks for `set_epoch` here, however deeply it wraps a batch sampler
        room = _Room(max_tokens, max_sequences)
        self.num_steps = _num_steps(self.lengths, room, num_replicas)
        if not self.num_steps:
            raise ValueError(
                f"{len(self.lengths)} examples cannot make equally many batches of {room} on each of "
                f"num_replicas={num_replicas} processes, with every example once and at least one per batch. Raise "
                "`max_tokens`, so that more of them fit into one batch, or leave some out"
            )
        self.max_sequences = max_sequences or self._bound(room)

    def _bound(self, room: _Room) -> int:
        """A bound on the examples per batch: a few more than in one epoch, so that other epochs can be packed too."""
        number = self.num_steps * self.num_replicas
        batches = _batches(self.lengths, room, number, None)
        if self.shuffle:
            batches += _batches(self.lengths, room, number, np.random.default_rng(self.seed))
        most = max(map(len, batches))
        return min(len(self.lengths), most + 1 + most // 16)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration. Each epoch has different batches."""
        self.epoch = epoch

    def __len__(self):
        return self.num_steps * (self.num_replicas if self.rank is None else 1)

    def __iter__(self) -> Iterator[list[int]]:
        generator = np.random.default_rng([self.seed, self.epoch]) if self.shuffle else None
        room = _Room(self.max_tokens, self.max_sequences)
        for step in _steps(self.lengths, room, self.num_replicas, self.num_steps, generator):
            yield from step if self.rank is None else [step[self.rank]]


class TokenBudgetIterableDataset(IterableDataset):
    """
    Turns a stream of examples into a stream of batches with at most a given number of tokens.

    Examples are collected in a buffer. Whenever it is full, they are packed into batches as in
    [`TokenBudgetBatchSampler`]. Half of these batches are yielded; the examples of the others stay in the buffer. Every
    example is yielded exactly once, except at the end of the stream: up to `num_replicas - 1` examples that are too few
    for a batch on each process are left out, with a warning.

    Each process must read the same stream. The batches of all processes are yielded in turn, step by step, as
    [`~accelerate.data_loader.IterableDatasetShard`] with `batch_size=1` distributes them. If a data loader has several
    workers, the stream must divide itself among them, as the streams of `datasets` do.

    Args:
        dataset (`Iterable[Mapping]`): The examples. If it has a `set_epoch`, it is called with every new epoch.
        max_tokens (`int`): The budget: the maximum number of tokens in a batch of one process.
        max_sequences (`int`, *optional*):
            The maximum number of examples in a batch. `None`: `max_tokens`, or `buffer_size` if that is smaller.
        num_replicas (`int`, *optional*, defaults to 1): Number of processes that share each step.
        buffer_size (`int`, *optional*, defaults to 1000):
            Size of the buffer in examples. A larger buffer leaves fewer places unused and shuffles the stream more. It
            should hold several steps.
        length_column (`str`, *optional*, defaults to `"length"`): See [`example_length`].
        seed (`int`, *optional*, defaults to 0): Seed of the shuffling; must be the same on all processes.
        truncate (`bool`, *optional*, defaults to `False`):
            Count an example longer than the budget as `max_tokens` tokens instead of raising an error.

    Yields:
        `list[Mapping]`: The examples of a batch; at least one.

    Raises:
        ValueError: A number is out of range. While iterating: an example has no length or is longer than the budget.
    """

    def __init__(
        self,
        dataset: Iterable[Mapping[str, Any]],
        max_tokens: int,
        *,
        max_sequences: int | None = None,
        num_replicas: int = 1,
        buffer_size: int = 1000,
        length_column: str = "length",
        seed: int = 0,
        truncate: bool = False,
    ):
        _check_positive(max_tokens=max_tokens, max_sequences=max_sequences, num_replicas=num_replicas)
        if buffer_size < num_replicas:
            raise ValueError(
                f"`buffer_size` must be at least num_replicas={num_replicas}, an example per process; got {buffer_size}"
            )
        self.dataset = dataset
        self.max_tokens = max_tokens
        self.num_replicas = num_replicas
        self.buffer_size = buffer_size
        self.max_sequences = min(buffer_size, max_sequences or max_tokens)
        self.length_column = length_column
        self.seed = _checked_seed(seed)
        self.truncate = truncate
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # persistent workers see it change

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration. Each epoch has different batches."""
        self._epoch.fill_(epoch)
        set_epoch = getattr(self.dataset, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)

    def __iter__(self) -> Iterator[list[Mapping[str, Any]]]:
        generator = np.random.default_rng([self.seed, int(self._epoch)])
        lengths: list[int] = []
        examples: list[Mapping[str, Any]] = []
        for number, example in enumerate(self.dataset):
            length = example_length(example, self.length_column, number)
            lengths.append(_within(np.array([length]), self.max_tokens, self.truncate, number).item())
            examples.append(example)
            if len(examples) == self.buffer_size:
                steps = self._full_steps(lengths, generator)
                steps = steps[: math.ceil(len(steps) / 2)]
                yield from ([examples[k] for k in batch] for step in steps for batch in step)
                yielded = {k for step in steps for batch in step for k in batch}
                lengths = [length for k, length in enumerate(lengths) if k not in yielded]
                examples = [example for k, example in enumerate(examples) if k not in yielded]
        steps = self._all_steps(lengths, generator)
        yield from ([examples[k] for k in batch] for step in steps for batch in step)
        left_out = len(examples) - sum(len(batch) for step in steps for batch in step)
        if left_out:
            logger.warning(
                f"the last {left_out} examples of the stream are left out: they are too few for a batch on each of "
                f"{self.num_replicas} processes"
            )

    def _full_steps(self, lengths: list[int], generator: np.random.Generator) -> list[Step]:
        """Steps of the oldest examples, almost completely filled. If the examples do not fill a step, steps of all."""
        room, capacity = _Room(self.max_tokens, self.max_sequences), self.max_tokens * self.num_replicas
        full, taken = sum(lengths) // capacity, 0
        for fill in FILLS if full else ():
            taken = int(np.searchsorted(np.cumsum(lengths), fill * full * capacity, side="right"))
            some, number = np.array(lengths[:taken]), full * self.num_replicas
            if taken >= number and _pack(some, _order(some, 1.0, None), room, number) is not None:
                return _steps(some, room, self.num_replicas, full, generator)
        return self._all_steps(lengths[:taken], generator) or self._all_steps(lengths, generator)

    def _all_steps(self, lengths: list[int], generator: np.random.Generator) -> list[Step]:
        """Steps of all examples, or of all but the last few if all together cannot be divided among the processes.
        Returns no steps if that does not help."""
        room = _Room(self.max_tokens, self.max_sequences)
        for number in range(len(lengths), max(0, len(lengths) - self.num_replicas), -1):
            some = np.array(lengths[:number])
            num_steps = _num_steps(some, room, self.num_replicas)
            if num_steps:
                return _steps(some, room, self.num_replicas, num_steps, generator)
        return []


@dataclass
class CollatorWithinBudget:
    """Wraps a collator. Truncates examples to the token budget if `truncate` is set. Raises a `ValueError` if a batch
    exceeds the budget. Removes the column of lengths, except a column `lengths`, which the collator may check."""

    collator: Callable[[list[Any]], Any]
    max_tokens: int
    truncate: bool
    length_column: str = "length"

    def __call__(self, features: list[Any]) -> Any:
        if self.length_column != "lengths":
            features = [_without(feature, self.length_column) for feature in features]
        if self.truncate:
            features = _truncated(features, self.max_tokens, _role(self.collator))
        batch = self.collator(features)
        tokens = int(batch["lengths"].sum()) if "lengths" in batch else 0
        if tokens > self.max_tokens:
            raise ValueError(
                f"a batch has {tokens} tokens, more than the budget `max_tokens`={self.max_tokens}: the lengths "
                "that it was made from do not fit the dataset"
            )
        return batch


def _without(feature: Any, name: str) -> Any:
    return {key: feature[key] for key in feature if key != name} if name in feature else feature


def example_length(example: Mapping[str, Any], column: str = "length", number: int = 0) -> int:
    """
    The number of tokens of an example. It is read from the given column or else from `lengths`. Without these columns,
    it is the number of entries of `input_ids` or `input_features` whose `attention_mask` is not 0.

    Raises:
        ValueError: The example has none of these columns; the length is not an integer of at least 0; `input_ids` is
            not a list; the mask holds values other than 0 and 1. The message names the example by its `number`.
    """
    for name in (column, "lengths"):
        if name in example:
            return _whole(example[name], name, number)
    for name in MAIN_COLUMNS:
        if name in example:
            tokens, mask = example[name], example.get("attention_mask")
            if isinstance(tokens, str) or not hasattr(tokens, "__len__"):
                raise ValueError(f"column `{name}` must hold a list of tokens; got {tokens!r} in example {number}")
            return len(tokens) if mask is None else int(_present(mask, number).sum())
    raise ValueError(
        f"examples must have a column `{column}` or `lengths` that counts their tokens, or else `input_ids` or "
        f"`input_features`; got {', '.join(example) or 'no columns'} in example {number}"
    )


def _present(mask: Any, number: int) -> np.ndarray:
    """Which tokens of an example are real, according to its `attention_mask`."""
    mask = np.asarray(mask)
    if ((mask != 0) & (mask != 1)).any():
        raise not_binary(mask, number)
    return mask == 1


def example_lengths(dataset: Any, column: str = "length") -> list[int]:
    """The number of tokens of each example of a map-style dataset; see [`example_length`]."""
    names = [name for name in (column, "lengths") if name in getattr(dataset, "column_names", [])][:1]
    if names:
        examples = dataset.select_columns(names).with_format(None)  # as they are stored, without a transform
    else:
        examples = _examples(dataset, [*MAIN_COLUMNS, "attention_mask"])
    return [example_length(example, column, number) for number, example in enumerate(examples)]


def pair_lengths(dataset: Any) -> np.ndarray:
    """The numbers of source and target tokens of each example of a map-style dataset, `(examples, 2)`."""
    source = {name: name for name in (*MAIN_COLUMNS, "attention_mask")}
    target = {**dict.fromkeys(LABELS, "input_ids"), "decoder_attention_mask": "attention_mask"}
    pairs = []
    for number, example in enumerate(_examples(dataset, [*source, *target])):
        sides = ({names[name]: example[name] for name in names if name in example} for names in (source, target))
        pairs.append([example_length(side, "", number) if side else 0 for side in sides])
    return np.array(pairs).reshape(-1, 2)


def list_sizes(dataset: Any, names: Sequence[str]) -> dict[str, int]:
    """The size of the longest list in each of the given columns of a map-style dataset that hold lists."""
    first = dataset[0] if len(dataset) else {}
    wanted = [name for name in first if model_name(name) in names and hasattr(first[name], "__len__")]
    sizes = dict.fromkeys(map(model_name, wanted), 0)
    for example in _examples(dataset, wanted) if wanted else ():
        for name in wanted:
            sizes[model_name(name)] = max(sizes[model_name(name)], len(example[name]))
    return sizes


def _examples(dataset: Any, names: Sequence[str]) -> Iterable[Any]:
    """The examples of a map-style dataset. Of a `datasets.Dataset` without a transform, only the given columns."""
    names = [name for name in names if name in getattr(dataset, "column_names", [])]
    if names and dataset.format["type"] != "custom":
        dataset = dataset.select_columns(names)
    return dataset if hasattr(dataset, "__iter__") else (dataset[number] for number in range(len(dataset)))


# --- Packing examples into batches ------------------------------------------------------------------------------------


def _num_steps(lengths: np.ndarray, room: _Room, num_replicas: int) -> int:
    """The smallest number of steps, up to a quarter of a percent, into which the examples can be packed in order of
    decreasing length; 0 if there is none."""
    order = _order(lengths, 1.0, None)
    fewest = math.ceil(int(lengths.sum()) / (room.tokens * num_replicas))
    if room.sequences is not None:
        fewest = max(fewest, math.ceil(len(lengths) / (room.sequences * num_replicas)))
    most = len(lengths) // num_replicas  # a batch has at least one example

    def fit(steps: int) -> bool:
        return _pack(lengths, order, room, steps * num_replicas) is not None

    too_few, steps = 0, max(1, fewest)
    while steps > most or not fit(steps):
        if steps >= most:
            return 0
        too_few, steps = steps, min(most, steps + 1 + steps // 50)
    while too_few and steps - too_few > 1 + steps // 400:
        middle = (too_few + steps) // 2
        too_few, steps = (too_few, middle) if fit(middle) else (middle, steps)
    return steps


def _steps(
    lengths: np.ndarray, room: _Room, num_replicas: int, num_steps: int, generator: np.random.Generator | None
) -> list[Step]:
    """All examples in `num_steps` steps: shuffled by the generator, or without one, the most attention work first."""
    batches = _batches(lengths, room, num_steps * num_replicas, generator)
    batches.sort(key=lambda batch: int((lengths[batch] ** 2).sum()), reverse=True)
    steps = [batches[start : start + num_replicas] for start in range(0, len(batches), num_replicas)]
    if generator is not None:
        generator.shuffle(steps)
        for step in steps:
            generator.shuffle(step)  # so that it is not always the same process that has the most work
    return steps


def _batches(lengths: np.ndarray, room: _Room, number: int, generator: np.random.Generator | None) -> Step:
    """All examples in `number` batches. In order of decreasing length, the examples must fit this number."""
    for jitter in JITTERS if generator is not None else JITTERS[-1:]:
        batches = _pack(lengths, _order(lengths, jitter, generator), room, number)
        if batches is not None:
            return batches
    raise AssertionError(f"examples in order of decreasing length do not fit {number} batches")


def _order(lengths: np.ndarray, jitter: float, generator: np.random.Generator | None) -> list[int]:
    """Indices in order of decreasing length. With a generator, lengths are first multiplied by random numbers from 1 to
    `jitter`, and ties are in random order."""
    if generator is None:
        return np.argsort(-lengths, kind="stable").tolist()
    keys = lengths * generator.uniform(1, jitter, len(lengths))
    return np.lexsort((generator.random(len(lengths)), -keys)).tolist()


def _pack(lengths: np.ndarray, order: list[int], room: _Room, number: int) -> Step | None:
    """Packs the examples into `number` batches. Each example goes into the batch with the fewest tokens so far that has
    room for another sequence. Returns `None` if they do not fit."""
    tokens = lengths.tolist()
    batches: Step = [[] for _ in range(number)]
    loads = [(0, 0, k) for k in range(number)]  # a heap: tokens, examples, which batch
    for example in order:
        if not loads or loads[0][0] + tokens[example] > room.tokens:
            return None
        load, size, k = loads[0]
        batches[k].append(example)
        if size + 1 == room.sequences:
            heapq.heappop(loads)
        else:
            heapq.heapreplace(loads, (load + tokens[example], size + 1, k))
    return batches


# --- Checks -----------------------------------------------------------------------------------------------------------


def _check_positive(**numbers: int | None) -> None:
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise ValueError(f"`{name}` must be at least 1; got {number}")


def _checked_seed(seed: int) -> int:
    if seed < 0:
        raise ValueError(f"`seed` must be at least 0; got {seed}")
    return seed


def _checked(lengths: Sequence[int] | np.ndarray | torch.Tensor) -> np.ndarray:
    values = np.asarray(lengths)
    if values.ndim != 1 or not len(values) or values.dtype.kind not in "iu" or values.min() < 0:
        raise ValueError(
            "`lengths` must be integers of at least 0, one for each of at least one example; "
            f"got {values.dtype} of shape {values.shape}" + (f" from {values.min()}" if values.size else "")
        )
    return values.astype(np.int64)


def _within(lengths: np.ndarray, max_tokens: int, truncate: bool, first: int = 0) -> np.ndarray:
    """The lengths, with `truncate` limited to the budget. Raises a `ValueError` if one exceeds it without `truncate`.
    `first` is the number of the first example."""
    if not truncate and lengths.max() > max_tokens:
        raise ValueError(
            f"`max_tokens` must be at least the longest example's length; got max_tokens={max_tokens}, and example "
            f"{first + int(lengths.argmax())} has {lengths.max()} tokens. Raise it, or set `truncate=True`"
        )
    return lengths.clip(max=max_tokens)


def _whole(value: Any, column: str, number: int) -> int:
    try:
        length = index(value)
    except TypeError:
        length = -1
    if length < 0:
        raise ValueError(
            f"column `{column}` must hold the number of tokens of an example, an integer of at least 0; "
            f"got {value!r} in example {number}"
        )
    return length


# --- Truncation -------------------------------------------------------------------------------------------------------


def _role(collator: Any) -> Callable[[str, list[torch.Tensor]], str]:
    """The function that returns the role of a column. Stock collators use the one of ours: their names are the same."""
    if hasattr(collator, "role"):
        return collator.role
    like: Any = DataCollatorWithLengths
    if isinstance(collator, DataCollatorForSeq2Seq):
        like = DataCollatorForSeq2SeqWithLengths
    return like(tokenizer=None, column_roles=getattr(collator, "column_roles", None)).role


def _truncated(features: list[Any], max_tokens: int, role: Callable[[str, list[torch.Tensor]], str]) -> list[Any]:
    """The first `max_tokens` tokens of each example, in all columns per token."""
    main = next((name for name in MAIN_COLUMNS if features and name in features[0]), None)
    if main is None or all(len(feature[main]) <= max_tokens for feature in features):
        return features
    columns = read_columns(features)
    per_token = {name for name, values in columns.items() if role(name, values) != EXAMPLE}
    cut = []
    for number, feature in enumerate(features):
        mask = feature.get("attention_mask")
        present = np.ones(len(feature[main]), bool) if mask is None else _present(mask, number)
        end = int(np.searchsorted(np.cumsum(present), max_tokens, side="right"))  # absent tokens do not count
        shorter = {name: value[:end] if model_name(name) in per_token else value for name, value in feature.items()}
        if "lengths" in feature:
            shorter["lengths"] = min(int(feature["lengths"]), max_tokens)
        cut.append(shorter)
    return cut
