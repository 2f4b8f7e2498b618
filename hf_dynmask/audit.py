"""How much of its work a data set spends on padding, and how much faster lengths make it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoTokenizer
from transformers.trainer_pt_utils import get_length_grouped_indices

from .data import TokenBudgetBatchSampler
from .texts import text_column
from .work import ModelWork, Sizes, config_work

IDS = "input_ids"
UNLIMITED = 10**9
BINS = 20


class Batching(NamedTuple):
    """What the batches of an epoch are like.

    Attributes:
        name (`str`): How examples were put together.
        steps (`int`): Number of batches.
        mean_tokens, most_tokens (`float`): Real tokens of a batch.
        padding (`float`): Share of the places in rows as long as the longest of their batch that no token is in.
        speedup (`float`): Operations for all these places over those for real tokens: how much faster lengths are at
            best.
    """

    name: str
    steps: int
    mean_tokens: float
    most_tokens: int
    padding: float
    speedup: float


class Audit(NamedTuple):
    """What [`audit_dataset`] finds.

    Attributes:
        sizes (`list[tuple[int, ...]]`): Tokens of each example, and with targets those of its target.
        truncated (`int`): Examples that were cut off.
        batchings (`list[Batching]`): Plain, length-grouped and token-budget batches.
    """

    sizes: list[Sizes]
    truncated: int
    batchings: list[Batching]


def audit_dataset(
    dataset: Any,
    model: str,
    batch_size: int,
    columns: Sequence[str] = (),
    target: str | None = None,
    max_length: int | None = None,
) -> Audit:
    """
    Counts the tokens of a data set, and the operations that a model needs for them.

    Args:
        dataset (`datasets.Dataset`): Texts, or with a column `input_ids` tokens.
        model (`str`): A folder or Hub id, whose configuration and tokenizer are read. No weights are.
        batch_size (`int`): Examples of a batch; a budget of tokens is that of so many examples of mean length.
        columns (`Sequence[str]`, *optional*): The column of texts, or two whose texts go in together. None: `text`, or
            the first that holds text.
        target (`str`, *optional*): The column of targets, for an encoder-decoder.
        max_length (`int`, *optional*): Tokens at which texts are cut off. `None`: as many as the model takes.

    Raises:
        ValueError: A column is missing or holds no text; targets are given to a model without a decoder, or are not
            given to one with a decoder; there are no examples; `batch_size` is not positive.
        OSError: There is no such model.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1; got {batch_size}")
    config = AutoConfig.from_pretrained(model)
    if config.is_encoder_decoder != (target is not None):
        needs, got = ("", "none") if config.is_encoder_decoder else ("no ", repr(target))
        raise ValueError(f"{type(config).__name__} needs {needs}column of targets (`target`); got {got}")
    tokenizer = None
    if columns or target or IDS not in dataset.column_names:
        tokenizer = AutoTokenizer.from_pretrained(model)
    sides = [_tokens(dataset, tokenizer, columns)]
    if target is not None:
        sides.append(_tokens(dataset, tokenizer, [target], as_target=True))
    if not sides[0]:
        raise ValueError("the data must hold at least one example; got none")
    whole = list(zip(*sides, strict=True))
    longest = _room(config, tokenizer) if max_length is None else max_length
    sizes = [tuple(min(size, longest) for size in of_one) for of_one in whole]
    truncated = sum(cut != full for cut, full in zip(sizes, whole, strict=True))
    return Audit(sizes, truncated, audit_sizes(sizes, config_work(config), batch_size))


def audit_sizes(sizes: Sequence[Sizes], work: ModelWork, batch_size: int) -> list[Batching]:
    """
    The batches that an epoch may be made of.

    Args:
        sizes (`Sequence[tuple[int, ...]]`): Tokens of each example, and of an encoder-decoder those of its target.
        work ([`ModelWork`]): Of the model.
        batch_size (`int`): Examples of a batch.

    Returns:
        `list[Batching]`: In random order; grouped by length, as `train_sampling_strategy="group_by_length"` of the
        [`~transformers.TrainingArguments`] does; by a budget of as many tokens, as [`TokenBudgetMixin`] does.
    """
    generator = torch.Generator().manual_seed(0)
    lengths = [sum(of_one) for of_one in sizes]
    budget = max(math.ceil(sum(lengths) * batch_size / len(lengths)), max(lengths), 1)
    of_sources = [of_one[0] for of_one in sizes]
    orders = {
        "plain": torch.randperm(len(sizes), generator=generator).tolist(),
        "grouped by length": get_length_grouped_indices(of_sources, batch_size, generator=generator),
    }
    batchings = {name: list(_in_batches(order, batch_size)) for name, order in orders.items()}
    batchings[f"budget of {budget:,} tokens"] = list(TokenBudgetBatchSampler(lengths, budget))
    return [_batching(name, [[sizes[k] for k in batch] for batch in found], work) for name, found in batchings.items()]


def _batching(name: str, batches: list[list[Sizes]], work: ModelWork) -> Batching:
    real = [of_one for batch in batches for of_one in batch]
    padded = [_longest(batch) for batch in batches for _ in batch]
    tokens = [sum(map(sum, batch)) for batch in batches]
    places = sum(map(sum, padded))
    return Batching(
        name,
        steps=len(batches),
        mean_tokens=sum(tokens) / len(batches),
        most_tokens=max(tokens),
        padding=1 - sum(tokens) / places if places else 0.0,
        speedup=work.forward_flops(padded) / work.forward_flops(real) if places else 1.0,
    )


def _longest(batch: list[Sizes]) -> Sizes:
    """The widths of the rows of each side."""
    return tuple(map(max, zip(*batch, strict=True)))


def _in_batches(order: list[int], batch_size: int) -> Iterator[list[int]]:
    places = iter(order)
    while batch := list(islice(places, batch_size)):
        yield batch


# --- Tokens ----------------------------------------------------------------------------------------------------------


def _tokens(dataset: Any, tokenizer: Any, columns: Sequence[str], as_target: bool = False) -> list[int]:
    """Tokens of each example, special ones included."""
    if not columns and IDS in dataset.column_names:
        return list(map(len, dataset[IDS]))
    texts = [text_column(dataset, column) for column in columns or [None]]
    if not texts[0]:
        return []
    given = {"text_target": texts[0]} if as_target else dict(zip(("text", "text_pair"), texts, strict=False))
    return list(map(len, tokenizer(**given, verbose=False)["input_ids"]))


def _room(config: Any, tokenizer: Any) -> int:
    """Tokens that a model takes at most."""
    positions = getattr(config, "max_position_embeddings", None) or UNLIMITED
    return min(positions - getattr(config, "position_offset", 0), getattr(tokenizer, "model_max_length", UNLIMITED))


# --- A histogram -----------------------------------------------------------------------------------------------------


class Bin(NamedTuple):
    """Examples of `first` to `last` tokens."""

    first: int
    last: int
    count: int


def histogram(lengths: Sequence[int]) -> list[Bin]:
    """At most 20 bins of equal width, from the shortest to the longest."""
    least, most = min(lengths), max(lengths)
    width = -(-(most - least + 1) // BINS)
    counts = torch.bincount((torch.tensor(lengths) - least) // width).tolist()
    return [Bin(least + k * width, min(least + (k + 1) * width - 1, most), count) for k, count in enumerate(counts)]
