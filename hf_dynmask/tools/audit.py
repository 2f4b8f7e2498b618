"""How much of the computation on a data set is padding, and how much faster training is with lengths."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModel
from transformers.trainer_pt_utils import get_length_grouped_indices

from ..conversion import from_transformers
from ..data import TokenBudgetBatchSampler
from ..data.token_budget import example_lengths
from ..stock.batches import NAME
from ..training.flops import ModelFlops, Sizes, config_work
from ..training.throughput import seconds_of
from .dataset_files import text_column
from .reading import read_config, read_tokenizer

IDS, MASK = "input_ids", "attention_mask"
UNLIMITED = 10**9
BINS = 20
TIMED_BATCHES = 8
REPEATS = 3
WARM_UP = 3
NAMES = [
    ("input_ids", "attention_mask", "lengths"),
    ("decoder_input_ids", "decoder_attention_mask", "decoder_lengths"),
]

Inputs = dict[str, Tensor]


class Batching(NamedTuple):
    """Statistics of the batches of an epoch.

    Attributes:
        name (`str`): How examples were batched.
        steps (`int`): Number of batches.
        mean_tokens, most_tokens (`float`): Real tokens of a batch.
        padding (`float`): Share of padding if rows are padded to the longest row of their batch.
        speedup (`float`): Operations on padded rows, divided by those on real tokens: an upper bound of the speed-up.
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
        sizes (`list[tuple[int, ...]]`): Tokens of each example and, if there are targets, of its target.
        truncated (`int`): Number of truncated examples.
        batchings (`list[Batching]`): Plain, length-grouped and token-budget batches.
        timed (`list[float]`): Measured speed-up of training with lengths for each of the batchings; empty if it was not
            measured.
    """

    sizes: list[Sizes]
    truncated: int
    batchings: list[Batching]
    timed: list[float]


def audit_dataset(
    dataset: Any,
    model: str,
    batch_size: int,
    columns: Sequence[str] = (),
    target: str | None = None,
    max_length: int | None = None,
    with_times: bool = False,
) -> Audit:
    """
    Counts the tokens of a data set and the operations that a model needs for them.

    Args:
        dataset (`datasets.Dataset`): Texts, or tokens if there is a column `input_ids`.
        model (`str`): A folder or Hub id. Only its configuration and tokenizer are read.
        batch_size (`int`): Examples per batch. The token budget is this number times the mean length.
        columns (`Sequence[str]`, *optional*): The column of texts, or two columns for pairs of texts. `None`: `text`,
            or the first column that holds text.
        target (`str`, *optional*): The column of targets, for an encoder-decoder.
        max_length (`int`, *optional*): Texts are truncated to this many tokens. `None`: the maximum of the model.
        with_times (`bool`, *optional*, defaults to `False`): Also time training steps; see [`time_speedups`].

    Raises:
        ValueError: A column is missing or holds no text; targets are given for a model that is not an encoder-decoder,
            or are missing for one that is; there are no examples; `batch_size` is not positive; `with_times` is set for
            a model that cannot be converted and does not use transformers' attention interface.
        OSError: There is no such model.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1; got {batch_size}")
    config = read_config(model)
    if config.is_encoder_decoder != (target is not None):
        needs, got = ("", "none") if config.is_encoder_decoder else ("no ", repr(target))
        raise ValueError(f"{type(config).__name__} needs {needs}column of targets (`target`); got {got}")
    tokenizer = None
    if columns or target or IDS not in dataset.column_names:
        tokenizer = read_tokenizer(model)
    sides = [_tokens(dataset, tokenizer, columns)]
    if target is not None:
        sides.append(_tokens(dataset, tokenizer, [target], as_target=True))
    if not sides[0]:
        raise ValueError("the data must hold at least one example; got none")
    untruncated = list(zip(*sides, strict=True))
    limit = _max_tokens(config, tokenizer) if max_length is None else max_length
    sizes = [tuple(min(size, limit) for size in example) for example in untruncated]
    truncated = sum(cut != full for cut, full in zip(sizes, untruncated, strict=True))
    timed = time_speedups(config, sizes, batch_size) if with_times else []
    return Audit(sizes, truncated, audit_sizes(sizes, config_work(config), batch_size), timed)


def audit_sizes(sizes: Sequence[Sizes], work: ModelFlops, batch_size: int) -> list[Batching]:
    """
    Compares the ways to divide an epoch into batches.

    Args:
        sizes (`Sequence[tuple[int, ...]]`): Tokens of each example and, for an encoder-decoder, of its target.
        work ([`ModelFlops`]): The cost of the model.
        batch_size (`int`): Examples per batch.

    Returns:
        `list[Batching]`: Three batchings. Examples in random order; grouped by length, as with
        `train_sampling_strategy="group_by_length"` in the [`~transformers.TrainingArguments`]; with a token budget, as
        with [`TokenBudgetMixin`].
    """
    return [_batching(name, batches, work) for name, batches in _epochs(sizes, batch_size).items()]


def _epochs(sizes: Sequence[Sizes], batch_size: int) -> dict[str, list[list[Sizes]]]:
    """The batches of an epoch for each way of batching, by name."""
    generator = torch.Generator().manual_seed(0)
    lengths = [sum(example) for example in sizes]
    budget = max(math.ceil(sum(lengths) * batch_size / len(lengths)), max(lengths), 1)
    source_lengths = [example[0] for example in sizes]
    orders = {
        "plain": torch.randperm(len(sizes), generator=generator).tolist(),
        "grouped by length": get_length_grouped_indices(source_lengths, batch_size, generator=generator),
    }
    epochs = {name: list(_in_batches(order, batch_size)) for name, order in orders.items()}
    epochs[f"budget of {budget:,} tokens"] = list(TokenBudgetBatchSampler(lengths, budget))
    return {name: [[sizes[k] for k in batch] for batch in batches] for name, batches in epochs.items()}


def _batching(name: str, batches: list[list[Sizes]], work: ModelFlops) -> Batching:
    real = [example for batch in batches for example in batch]
    padded = [_widths(batch) for batch in batches for _ in batch]
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


def _widths(batch: list[Sizes]) -> Sizes:
    """The row width on each side of a batch."""
    return tuple(map(max, zip(*batch, strict=True)))


def _in_batches(order: list[int], batch_size: int) -> Iterator[list[int]]:
    places = iter(order)
    while batch := list(islice(places, batch_size)):
        yield batch


# --- Times -----------------------------------------------------------------------------------------------------------


def time_speedups(config: Any, sizes: Sequence[Sizes], batch_size: int) -> list[float]:
    """
    Times training steps on this machine, with lengths and on padded rows, and returns the speed-ups.

    Padded rows run through the stock model. Lengths run through the converted model or, if its family cannot be
    converted, through the stock model with `attn_implementation="dynmask"`. A step is forward, backward, gradient
    clipping and AdamW, the defaults of the [`~transformers.Trainer`]. The models have random weights and no head. Both
    models alternate on 8 batches of each batching, and the shortest of 3 times counts.

    Args:
        config ([`~transformers.PreTrainedConfig`]): Configuration of the stock model.
        sizes (`list[tuple[int, ...]]`): Tokens of each example and, for an encoder-decoder, of its target.
        batch_size (`int`): Examples per batch.

    Returns:
        `list[float]`: One speed-up for each of the batchings of [`audit_sizes`].

    Raises:
        ValueError: The model can neither be converted nor run with `attn_implementation="dynmask"`.
    """
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    stock = AutoModel.from_config(config)
    models: list[nn.Module] = [stock, _without_padding(stock)]
    for model in models:
        model.to(device).train()
    steps = [partial(_seconds_of_step, model, _optimizer(model)) for model in models]
    epochs = {
        name: [_inputs(batch, config.vocab_size, device) for batch in _spread(batches)]
        for name, batches in _epochs(sizes, batch_size).items()
    }
    _seconds(steps, epochs["plain"][0], WARM_UP)
    return [_speedup(steps, batches) for batches in epochs.values()]


def _without_padding(stock: Any) -> nn.Module:
    try:
        return from_transformers(stock)
    except ValueError:
        model = AutoModel.from_config(stock.config, attn_implementation=NAME)
        model.load_state_dict(stock.state_dict())
        return model


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)


def _speedup(steps: list[Callable[[Inputs], float]], batches: list[tuple[Inputs, Inputs]]) -> float:
    times = (_seconds(steps, batch) for batch in batches)
    with_padding, with_lengths = (sum(seconds) for seconds in zip(*times, strict=True))
    return with_padding / with_lengths


def _seconds(
    steps: list[Callable[[Inputs], float]], batch: tuple[Inputs, Inputs], repeats: int = REPEATS
) -> list[float]:
    """The shortest time of a step of each model."""
    rounds = [[step(inputs) for step, inputs in zip(steps, batch, strict=True)] for _ in range(repeats)]
    return [min(times) for times in zip(*rounds, strict=True)]


def _seconds_of_step(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Inputs) -> float:
    return seconds_of(partial(_step, model, optimizer, inputs), inputs["input_ids"].device)


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Inputs) -> None:
    model(**inputs).last_hidden_state.float().square().mean().backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def _inputs(batch: list[Sizes], vocab_size: int, device: torch.device) -> tuple[Inputs, Inputs]:
    """Random tokens of these sizes: rows with an attention mask, and the same rows with lengths."""
    generator = torch.Generator().manual_seed(0)
    padded, with_lengths = {}, {}
    for names, sizes in zip(NAMES, zip(*batch, strict=True), strict=False):
        ids, attention_mask, lengths = names
        rows = torch.randint(vocab_size, (len(batch), max(sizes)), generator=generator)
        counts = torch.tensor(sizes)
        padded |= {ids: rows, attention_mask: (torch.arange(max(sizes)) < counts[:, None]).long()}
        with_lengths |= {ids: rows, lengths: counts}
    return _on(padded, device), _on(with_lengths, device)


def _on(inputs: Inputs, device: torch.device) -> Inputs:
    return {name: values.to(device) for name, values in inputs.items()}


def _spread(batches: list[Any]) -> list[Any]:
    """A sample of the batches, spread evenly over the epoch."""
    number = min(TIMED_BATCHES, len(batches))
    return [batches[(2 * k + 1) * len(batches) // (2 * number)] for k in range(number)]


# --- Tokens ----------------------------------------------------------------------------------------------------------


def _tokens(dataset: Any, tokenizer: Any, columns: Sequence[str], as_target: bool = False) -> list[int]:
    """The number of tokens of each example, including special tokens but not padding."""
    if not columns and IDS in dataset.column_names:
        return example_lengths(dataset.select_columns([name for name in (IDS, MASK) if name in dataset.column_names]))
    texts = [text_column(dataset, column) for column in columns or [None]]
    if not texts[0]:
        return []
    given = {"text_target": texts[0]} if as_target else dict(zip(("text", "text_pair"), texts, strict=False))
    return list(map(len, tokenizer(**given, verbose=False)["input_ids"]))


def _max_tokens(config: Any, tokenizer: Any) -> int:
    """The maximum number of tokens that a model and its tokenizer take."""
    positions = getattr(config, "max_position_embeddings", None) or UNLIMITED
    return min(positions - getattr(config, "position_offset", 0), getattr(tokenizer, "model_max_length", UNLIMITED))


# --- A histogram -----------------------------------------------------------------------------------------------------


class Bin(NamedTuple):
    """Number of examples with `first` to `last` tokens."""

    first: int
    last: int
    count: int


def histogram(lengths: Sequence[int]) -> list[Bin]:
    """At most 20 bins of equal width, from the shortest to the longest."""
    least, most = min(lengths), max(lengths)
    width = -(-(most - least + 1) // BINS)
    counts = torch.bincount((torch.tensor(lengths) - least) // width).tolist()
    return [Bin(least + k * width, min(least + (k + 1) * width - 1, most), count) for k, count in enumerate(counts)]
