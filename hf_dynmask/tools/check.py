"""Checks that a checkpoint gives the same outputs without padding as on padded rows, that no sequence affects another,
and how much faster it is."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedConfig, PreTrainedModel

from ..conversion import from_transformers, to_transformers
from ..conversion.engine import TASKS
from ..modeling.configuration_dynmask_recurrent import DynMaskRecurrentConfig
from ..registration import AUTO_CLASSES, model_class
from ..stock.batches import NAME, first_position
from ..training.throughput import seconds_of
from .reading import read_config, read_model, read_tokenizer, reading

SLACK = 4  # allowed error, in multiples of the padded run's rounding error, since sums are in another order
NUMBER = 8  # the number of examples
LONGEST = 512  # the maximum length of an example, if the model takes as many tokens
LENGTHS = (1, 24, 7, 63, 24, 130, 2, 40)  # of examples of random tokens
PREFIXES = ("", "decoder_")
REPEATS = 5
OUTPUTS = ("logits", "start_logits", "end_logits", "last_hidden_state")
Sequences = tuple[Tensor, ...]  # one example: its tokens, and for an encoder-decoder those of its target
Batch = dict[str, Tensor]


class Finding(NamedTuple):
    """One result of [`check_model`].

    Attributes:
        what (`str`): What was compared, and with what.
        dtype (`torch.dtype`): The dtype of weights and activations.
        found (`float`): The largest difference, or the number of sequences that changed.
        allowed (`float`): The largest value that passes.
        is_of_leaks (`bool`): Whether this is a test for leaks, where `found` is a number of sequences.
    """

    what: str
    dtype: torch.dtype
    found: float
    allowed: float
    is_of_leaks: bool = False

    @property
    def is_right(self) -> bool:
        return self.found <= self.allowed  # False for NaN


class Models(NamedTuple):
    """The model under test, and the model it is compared with.

    Attributes:
        ours (`PreTrainedModel`): The model under test.
        padded (`PreTrainedModel`): The other model, which runs on padded rows with an `attention_mask`.
        what_is_padded (`str`): What the other model is.
        is_stock (`bool`): Whether `ours` is a stock model too, with `attn_implementation="dynmask"`.
    """

    ours: Any
    padded: Any
    what_is_padded: str
    is_stock: bool = False

    def on(self, device: torch.device) -> Models:
        return self._replace(ours=self.ours.eval().to(device), padded=self.padded.eval().to(device))


def check_model(
    source: str, texts: list[str] | None = None, dtypes: Iterable[torch.dtype] = (torch.float32, torch.bfloat16)
) -> Iterator[Finding | Speed]:
    """
    Runs a checkpoint in several ways on the same examples.

    A stock checkpoint runs with `attn_implementation="dynmask"` and, if [`from_transformers`] takes it, also converted.
    Both are compared with the stock model on padded rows. A DynMask checkpoint is compared with its stock equivalent
    or, if there is none, with the dense reference (`attn_implementation="eager"`), on padded rows. All errors are
    measured against the padded run in float64, on the outputs for real tokens. The error may be at most four times that
    of the padded run plus one unit of rounding.

    Then the tokens of each sequence in turn, and the contents of the padding, are replaced. The outputs for the other
    sequences must not change by a single bit. In the first dtype, forward passes are also timed. They alternate with
    the padded run, and the median of 5 counts.

    Args:
        source (`str`): A folder or Hub id.
        texts (`list[str]`, *optional*): The first eight texts that are not empty are used, truncated to 512 tokens.
            `None`: random tokens, with lengths from 1 to 130.
        dtypes (`Iterable[torch.dtype]`, *optional*): Dtypes to run in; float32 and bfloat16 by default.

    Yields:
        Instances of [`Finding`], and one [`Speed`] for each model that is compared with the padded run.

    Raises:
        ValueError: The model does not read tokens; its masks read fields; there are no texts; it is a stock model that
            does not use transformers' attention interface.
        OSError: There is no such checkpoint.
    """
    config = read_config(source)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for number, dtype in enumerate(dtypes):
        for models in _models(source, config, dtype):
            examples = [tuple(ids.to(device) for ids in one) for one in _examples(source, models.ours, texts)]
            models = models.on(device)
            yield from _agreement(models, examples, dtype)
            yield from _leaks(models, examples, dtype)
            if number == 0:
                yield _speed(models, examples, dtype)


class Speed(NamedTuple):
    """How fast a model is.

    Attributes:
        what (`str`): The model.
        dtype (`torch.dtype`): The dtype of weights and activations.
        speedup (`float`): The time of the padded run, divided by the time of this model.
        padding (`float`): Share of padding in the padded rows.
        device (`torch.device`): Where both ran.
    """

    what: str
    dtype: torch.dtype
    speedup: float
    padding: float
    device: torch.device


@torch.no_grad()
def _speed(models: Models, examples: list[Sequences], dtype: torch.dtype) -> Speed:
    padded = _padded(models, examples)
    mask = padded["attention_mask"]
    runs = [partial(_run, models.ours, _forms(models)[0][1](examples)), partial(_run, models.padded, padded)]
    times = [[seconds_of(run, mask.device) for run in runs] for _ in range(REPEATS + 1)][1:]  # the first is a warm-up
    of_ours, of_padded = map(median, zip(*times, strict=True))
    name = f"attn_implementation='{NAME}'" if models.is_stock else type(models.ours).__name__
    return Speed(name, dtype, of_padded / of_ours, 1 - float(mask.sum()) / mask.numel(), mask.device)


def compare(ours: PreTrainedModel, stock: PreTrainedModel) -> Iterator[Finding]:
    """Compares a model of ours with a stock model on random tokens, in their dtype, as [`check_model`] does.

    Raises:
        ValueError: The model does not read tokens.
    """
    models = Models(_checked(ours).eval(), stock.eval(), f"a {type(stock).__name__}")
    yield from _agreement(models, _examples("", ours, None), ours.dtype)


# --- Models ----------------------------------------------------------------------------------------------------------


def _models(source: str, config: PreTrainedConfig, dtype: torch.dtype) -> Iterator[Models]:
    if type(config) in AUTO_CLASSES:
        ours = _checked(read_model(model_class(config), source, dtype=dtype))
        yield Models(ours, *_reference(ours))
        return
    converted = _converted(source, dtype)
    load = partial(load_stock, source, converted) if converted is not None else partial(_load_unconverted, source)
    stock = _checked(load(dtype=dtype))
    with reading(source):
        ours = load(dtype=dtype, attn_implementation=NAME)
    yield Models(ours, stock, "the stock model", is_stock=True)
    if converted is not None:
        yield Models(converted, stock, "the stock model")


def _reference(ours: Any) -> tuple[Any, str]:
    """The model that one of our models is compared with, and a description of it."""
    if isinstance(ours.config, DynMaskRecurrentConfig):
        return ours, "the model"
    try:
        return to_transformers(ours), "the stock model"
    except ValueError:
        dense = copy.deepcopy(ours)
        dense.set_attn_implementation("eager")
        return dense, "the dense reference"


def _converted(source: str, dtype: torch.dtype) -> Any:
    """A stock checkpoint, converted; `None` if it cannot be converted."""
    try:
        with reading(source):
            return _checked(from_transformers(source, dtype=dtype))
    except ValueError:  # if the checkpoint is broken, loading it as a stock model raises the error
        return None


def _load_unconverted(source: str, **options: Any) -> PreTrainedModel:
    """A stock checkpoint, loaded as the class that it was saved from."""
    names = read_config(source).architectures or ["AutoModel"]
    return read_model(getattr(transformers, names[0], transformers.AutoModel), source, **options)


def load_stock(source: str, ours: PreTrainedModel, **options: Any) -> PreTrainedModel:
    """The stock checkpoint that `ours` was converted from."""
    task = next(task for task in TASKS.values() if type(ours) in task.ours)
    return read_model(task.stock[type(read_config(source))], source, **options)


def _checked(model: Any) -> Any:
    if model.main_input_name != "input_ids":
        raise ValueError(f"a model to check must read tokens; {type(model).__name__} reads `{model.main_input_name}`")
    if any(not hasattr(side, "vocab_size") for side in _sides(model)):
        raise ValueError(f"a model to check must read tokens alone; {type(model).__name__} has other parts, too")
    return model


def _sides(model: Any) -> list[Any]:
    """Configurations of the sides that read tokens."""
    config = model.config
    if not config.is_encoder_decoder:
        return [config]
    sides = [getattr(config, side, config) for side in ("encoder", "decoder")]
    return sides[:1] if _scores_sequences(model) else sides


def _scores_sequences(model: PreTrainedModel) -> bool:
    """Whether a model has one output per sequence instead of one per token."""
    return "ForSequenceClassification" in type(model).__name__ or _scores_choices(model)


def _scores_choices(model: PreTrainedModel) -> bool:
    return "ForMultipleChoice" in type(model).__name__


# --- Examples --------------------------------------------------------------------------------------------------------


def _examples(source: str, model: PreTrainedModel, texts: list[str] | None) -> list[Sequences]:
    sides = _sides(model)
    limit = min(_max_tokens(side, model) for side in sides)
    if texts is None:
        return _random_examples(model, limit)
    tokenizer = read_tokenizer(source)
    texts = [text for text in texts if text.strip()][:NUMBER]
    if not texts:
        raise ValueError("the data must hold at least one non-empty text; got none")
    encoded = tokenizer(texts, truncation=True, max_length=limit)["input_ids"]
    rows = [torch.tensor(ids) for ids in encoded if ids]
    targets = rows[1:] + rows[:1]  # the target of a text is the next text
    return [(row, target)[: len(sides)] for row, target in zip(rows, targets, strict=True)]


def _max_tokens(side: Any, model: Any) -> int:
    """The number of tokens that a side can read, at most `LONGEST`."""
    offset = getattr(side, "position_offset", None)
    positions = getattr(side, "max_position_embeddings", LONGEST)
    return min(positions - (first_position(model) if offset is None else offset), LONGEST)


def _random_examples(model: PreTrainedModel, limit: int) -> list[Sequences]:
    """Examples of random ordinary tokens. An encoder-decoder gets an end-of-sequence token, for which it may look."""
    generator, ends = torch.Generator().manual_seed(0), _special(model, "eos_token_id")
    words = [_words(model, side) for side in _sides(model)]
    examples = []
    for lengths in zip(LENGTHS, LENGTHS[1:] + LENGTHS[:1], strict=True):
        example = []
        for ids, length in zip(words, lengths, strict=False):
            tokens = ids[torch.randint(len(ids), (min(length, limit),), generator=generator)]
            if model.config.is_encoder_decoder and ends:
                tokens[-1] = ends[0]
            example.append(tokens)
        examples.append(tuple(example))
    return examples


def _words(model: Any, side: Any) -> Tensor:
    """All ids except those of the pad and end-of-sequence tokens, for which heads may look."""
    special = {*_special(model, "eos_token_id"), *_special(model, "pad_token_id")}
    return torch.tensor([k for k in range(side.vocab_size) if k not in special])


def _special(model: Any, name: str) -> list[int]:
    """The ids of a special token: none, one or several."""
    given = getattr(model.config, name, None)
    return given if isinstance(given, list) else [] if given is None else [given]


# --- Batches ---------------------------------------------------------------------------------------------------------


def _rows(examples: list[Sequences], padding: int = 0) -> Batch:
    batch = {}
    for prefix, side in zip(PREFIXES, zip(*examples, strict=True), strict=False):
        batch[f"{prefix}input_ids"] = pad_sequence(list(side), batch_first=True, padding_value=padding)
        batch[f"{prefix}lengths"] = torch.tensor([len(tokens) for tokens in side], device=side[0].device)
    return batch


def _flat(examples: list[Sequences]) -> Batch:
    rows = _rows(examples)
    for prefix, side in zip(PREFIXES, zip(*examples, strict=True), strict=False):
        rows[f"{prefix}input_ids"] = torch.cat(side)[None]
    return rows


def _masked(examples: list[Sequences], padding_side: str = "right", padding: int = 0) -> Batch:
    batch = {}
    for prefix, side in zip(PREFIXES, zip(*examples, strict=True), strict=False):
        for name, rows, value in (("input_ids", side, padding), ("attention_mask", map(torch.ones_like, side), 0)):
            batch[f"{prefix}{name}"] = pad_sequence(
                list(rows), batch_first=True, padding_value=value, padding_side=padding_side
            )
    return batch


def _masked_on_the_left(examples: list[Sequences]) -> Batch:
    return _masked(examples, "left")


@torch.no_grad()
def _outputs(model: PreTrainedModel, batch: Batch, examples: list[Sequences]) -> list[Tensor]:
    """The outputs of a model for each example, without padding: `(tokens, ...)`, or `(...)` if they are per example."""
    outputs = _run(model, batch)
    found = [outputs[name] for name in OUTPUTS if outputs.get(name) is not None]
    if not found:
        raise ValueError(
            f"a model to check must return one of {', '.join(OUTPUTS)}; {type(model).__name__} returns "
            f"{', '.join(outputs.keys())}"
        )
    values = torch.stack(found, dim=-1)
    if _scores_sequences(model) or "logits" in outputs and outputs["logits"].dim() == 2:
        return list(values)
    sizes = [len(example[-1]) for example in examples]
    if len(values) != len(examples):
        return list(values[0].split(sizes))
    masks = batch.get("decoder_attention_mask" if len(examples[0]) > 1 else "attention_mask")
    if masks is not None:
        return [row[mask.bool()] for row, mask in zip(values, masks, strict=True)]
    return [row[:size] for row, size in zip(values, sizes, strict=True)]


def _run(model: PreTrainedModel, batch: Batch) -> Any:
    if _scores_choices(model):
        batch = {name: values.unsqueeze(1) for name, values in batch.items()}  # each example has one choice
    return model(**batch)


def _one_by_one(model: PreTrainedModel, examples: list[Sequences]) -> list[Tensor]:
    return [output for example in examples for output in _outputs(model, _rows([example]), [example])]


# --- What is compared ------------------------------------------------------------------------------------------------


def _agreement(models: Models, examples: list[Sequences], dtype: torch.dtype) -> Iterator[Finding]:
    batch = _padded(models, examples)
    exact = _outputs(_in_float64(models.padded), batch, examples)
    scale = max(float(output.abs().max()) for output in exact)
    rounding = _difference(_outputs(models.padded, batch, examples), exact)
    allowed = SLACK * rounding + torch.finfo(dtype).eps * scale
    forms = [*_forms(models), *_forms_on_the_left(models)]
    runs = [(name, partial(_outputs, models.ours, make(examples), examples)) for name, make in forms]
    runs.append((_run_name("one by one", models), partial(_one_by_one, models.ours, examples)))
    for name, run in runs:
        yield Finding(f"{name}: as {models.what_is_padded} on padded rows", dtype, _difference(run(), exact), allowed)


def _in_float64(model: PreTrainedModel) -> PreTrainedModel:
    exact = copy.deepcopy(model).double()
    if hasattr(exact, "set_experts_implementation"):  # grouped matrix products have no float64
        exact.set_experts_implementation("eager")
    return exact


def _forms(models: Models) -> list[tuple[str, Callable[[list[Sequences]], Batch]]]:
    """The forms of batches in which our attention keeps sequences apart, by name. The usual form is the first."""
    if models.is_stock:
        rows: list[Any] = [("attention_mask", partial(_padded, models)), ("lengths", _rows)]
        return [(_run_name(name, models), make) for name, make in rows]
    flat = [] if _scores_choices(models.ours) else [("lengths, end to end", _flat)]
    return [("lengths, in rows", _rows), *flat]


def _forms_on_the_left(models: Models) -> list[tuple[str, Callable[[list[Sequences]], Batch]]]:
    """Left padding, but not for stock models: their positions may count padding, which changes the outputs."""
    left = ("attention_mask, padding on the left", _masked_on_the_left)
    return [] if models.is_stock else [left]


def _run_name(name: str, models: Models) -> str:
    return f"stock model, {name}" if models.is_stock else name


def _padded(models: Models, examples: list[Sequences], padding: int | None = None) -> Batch:
    """Rows with an `attention_mask`, padded on the right with the given id or else the pad token."""
    pad_ids = _special(models.padded, "pad_token_id") or _special(models.ours, "pad_token_id") or [0]
    return _masked(examples, padding=pad_ids[0] if padding is None else padding)


def _difference(found: list[Tensor], exact: list[Tensor]) -> float:
    differences = (float((one - other).abs().max()) for one, other in zip(found, exact, strict=True))
    return float(torch.tensor(list(differences)).max())  # NaN propagates, unlike in Python's max


def _leaks(models: Models, examples: list[Sequences], dtype: torch.dtype) -> Iterator[Finding]:
    model, forms = models.ours, _forms(models)
    for name, make in forms:
        before, changed = _outputs(model, make(examples), examples), 0
        for k in range(len(examples)):
            others = [example if j != k else _replaced(model, example) for j, example in enumerate(examples)]
            after = _outputs(model, make(others), others)
            changed += sum(j != k and not torch.equal(*pair) for j, pair in enumerate(zip(before, after, strict=True)))
        yield Finding(f"{name}: sequences that change when another does", dtype, changed, 0, is_of_leaks=True)
    if models.is_stock and _scores_sequences(model):
        return  # the head of a stock model may look for the pad token
    make = partial(_padded, models) if models.is_stock else _rows
    before, after = (_outputs(model, make(examples, padding=padding), examples) for padding in (0, 1))
    changed = sum(not torch.equal(*pair) for pair in zip(before, after, strict=True))
    yield Finding(f"{forms[0][0]}: sequences that change when padding does", dtype, changed, 0, is_of_leaks=True)


def _replaced(model: PreTrainedModel, example: Sequences) -> Sequences:
    """The example with every ordinary token replaced by another."""
    return tuple(_substitutes(model, side)[tokens] for tokens, side in zip(example, _sides(model), strict=True))


def _substitutes(model: Any, side: Any) -> Tensor:
    """A table that maps each ordinary id to another ordinary id, and each special id to itself."""
    words, others = _words(model, side), torch.arange(side.vocab_size)
    return others.index_put((words,), words.roll(1 + len(words) // 3)).to(model.device)
