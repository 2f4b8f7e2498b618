"""Checks that a checkpoint computes the same with lengths as on padded rows, and that no sequence affects another."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedConfig, PreTrainedModel

from ..conversion import from_transformers, to_transformers
from ..conversion.engine import TASKS
from ..modeling.configuration_dynmask_recurrent import DynMaskRecurrentConfig
from ..registration import AUTO_CLASSES, model_class
from .reading import read_config, read_model, read_tokenizer, reading

SLACK = 4  # times the padded run's rounding error: how much summing in another order may differ
NUMBER = 8  # of examples
LONGEST = 512  # tokens of one, if the model takes as many
LENGTHS = (1, 24, 7, 63, 24, 130, 2, 40)  # of examples that are made up
PREFIXES = ("", "decoder_")
OUTPUTS = ("logits", "start_logits", "end_logits", "last_hidden_state")
Sequences = tuple[Tensor, ...]  # of one example: its tokens, and those of its target where there is a decoder
Batch = dict[str, Tensor]


class Finding(NamedTuple):
    """One result of [`check_model`].

    Attributes:
        what (`str`): What was compared, and with what.
        dtype (`torch.dtype`): Of weights and activations.
        found (`float`): The largest difference, or the number of sequences that changed.
        allowed (`float`): The largest value that passes.
    """

    what: str
    dtype: torch.dtype
    found: float
    allowed: float

    @property
    def is_right(self) -> bool:
        return self.found <= self.allowed  # NaN is not


class Models(NamedTuple):
    """Our model and the one it is compared with, which runs on padded rows with an `attention_mask`."""

    ours: Any
    padded: Any
    what_is_padded: str


def check_model(
    source: str, texts: list[str] | None = None, dtypes: Iterable[torch.dtype] = (torch.float32, torch.bfloat16)
) -> Iterator[Finding]:
    """
    Runs a checkpoint in several ways on the same examples.

    For a stock checkpoint that [`from_transformers`] takes, the converted model is compared with the stock model on
    padded rows. For a DynMask checkpoint, the model is compared with its stock equivalent or, if there is none, with
    the dense reference (`attn_implementation="eager"`) on padded rows. They agree if the error of the outputs for real
    tokens, measured against a run in float64, is at most four times that of the padded run plus one unit of rounding.

    Then the tokens of each sequence in turn, and the contents of the padding, are replaced: the outputs for the other
    sequences must not change by a single bit.

    Args:
        source (`str`): A folder or Hub id.
        texts (`list[str]`, *optional*): The first eight that have tokens are used, truncated to 512 tokens. `None`:
            random tokens, with lengths from 1 to 130.
        dtypes (`Iterable[torch.dtype]`, *optional*): Dtypes to run in; float32 and bfloat16 by default.

    Yields:
        [`Finding`]

    Raises:
        ValueError: The model reads no tokens; its masks read fields; there are no texts.
        OSError: There is no such checkpoint.
    """
    config = read_config(source)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    examples = None
    for dtype in dtypes:
        models = _models(source, config, dtype)
        examples = examples or _examples(source, models.ours, texts)
        on_device = [tuple(tokens.to(device) for tokens in example) for example in examples]
        models = models._replace(ours=models.ours.eval().to(device), padded=models.padded.eval().to(device))
        yield from _agreement(models, on_device, dtype)
        yield from _leaks(models.ours, on_device, dtype)


def compare(ours: PreTrainedModel, stock: PreTrainedModel) -> Iterator[Finding]:
    """Whether a model of ours and a stock model agree, as in [`check_model`], on random tokens and in their dtype.

    Raises:
        ValueError: The model reads no tokens.
    """
    models = Models(_checked(ours).eval(), stock.eval(), f"a {type(stock).__name__}")
    yield from _agreement(models, _examples("", ours, None), ours.dtype)


# --- Models ----------------------------------------------------------------------------------------------------------


def _models(source: str, config: PreTrainedConfig, dtype: torch.dtype) -> Models:
    if type(config) not in AUTO_CLASSES:
        with reading(source):
            ours = _checked(from_transformers(source, dtype=dtype))
        return Models(ours, load_stock(source, ours, dtype=dtype), "the stock model")
    ours = _checked(read_model(model_class(config), source, dtype=dtype))
    if isinstance(config, DynMaskRecurrentConfig):
        return Models(ours, ours, "the model")
    try:
        return Models(ours, to_transformers(ours), "the stock model")
    except ValueError:
        dense = copy.deepcopy(ours)
        dense.set_attn_implementation("eager")
        return Models(ours, dense, "the dense reference")


def load_stock(source: str, ours: PreTrainedModel, **options: Any) -> PreTrainedModel:
    """The stock checkpoint that `ours` was converted from."""
    task = next(task for task in TASKS.values() if type(ours) in task.ours)
    return read_model(task.stock[type(read_config(source))], source, **options)


def _checked(model: Any) -> Any:
    if model.main_input_name != "input_ids":
        raise ValueError(f"a model to check must read tokens; {type(model).__name__} reads `{model.main_input_name}`")
    return model


def _sides(model: Any) -> list[Any]:
    """Configurations of the sides that read tokens."""
    config = model.config
    if not config.is_encoder_decoder:
        return [config]
    return [config.encoder] if _is_of_sequences(model) else [config.encoder, config.decoder]


def _is_of_sequences(model: PreTrainedModel) -> bool:
    return "ForSequenceClassification" in type(model).__name__ or _is_of_choices(model)


def _is_of_choices(model: PreTrainedModel) -> bool:
    return "ForMultipleChoice" in type(model).__name__


# --- Examples --------------------------------------------------------------------------------------------------------


def _examples(source: str, model: PreTrainedModel, texts: list[str] | None) -> list[Sequences]:
    sides = _sides(model)
    room = min(_room(side) for side in sides)
    if texts is None:
        return _made_up(model, room)
    tokenizer = read_tokenizer(source)
    texts = [text for text in texts if text.strip()][:NUMBER]
    if not texts:
        raise ValueError("the data must hold at least one non-empty text; got none")
    encoded = tokenizer(texts, truncation=True, max_length=room)["input_ids"]
    rows = [torch.tensor(ids) for ids in encoded if ids]
    targets = rows[1:] + rows[:1]  # of other lengths
    return [(row, target)[: len(sides)] for row, target in zip(rows, targets, strict=True)]


def _room(side: Any) -> int:
    positions = getattr(side, "max_position_embeddings", LONGEST) - getattr(side, "position_offset", 0)
    return min(positions, LONGEST)


def _made_up(model: PreTrainedModel, room: int) -> list[Sequences]:
    """Random tokens without special ones, as an encoder-decoder may look for the end of a text."""
    generator, ends = torch.Generator().manual_seed(0), _special(model, "eos_token_id")
    special = {*ends, *_special(model, "pad_token_id")}
    words = [torch.tensor([k for k in range(side.vocab_size) if k not in special]) for side in _sides(model)]
    examples = []
    for lengths in zip(LENGTHS, LENGTHS[1:] + LENGTHS[:1], strict=True):
        example = []
        for of_side, length in zip(words, lengths, strict=False):
            tokens = of_side[torch.randint(len(of_side), (min(length, room),), generator=generator)]
            if model.config.is_encoder_decoder and ends:
                tokens[-1] = ends[0]
            example.append(tokens)
        examples.append(tuple(example))
    return examples


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
        for name, rows, value in (
            ("input_ids", side, padding),
            ("attention_mask", map(torch.ones_like, side), 0),
        ):
            batch[f"{prefix}{name}"] = pad_sequence(
                list(rows), batch_first=True, padding_value=value, padding_side=padding_side
            )
    return batch


def _masked_on_the_left(examples: list[Sequences]) -> Batch:
    return _masked(examples, "left")


@torch.no_grad()
def _outputs(model: PreTrainedModel, batch: Batch, examples: list[Sequences]) -> list[Tensor]:
    """A model's outputs for each example without padding: `(tokens, ...)`, or `(...)` for outputs of the whole."""
    if _is_of_choices(model):
        batch = {name: of_texts.unsqueeze(1) for name, of_texts in batch.items()}  # each example has one choice
    outputs = model(**batch)
    values = torch.stack([outputs[name] for name in OUTPUTS if outputs.get(name) is not None], dim=-1)
    if _is_of_sequences(model):
        return list(values)
    sizes = [len(example[-1]) for example in examples]
    if len(values) != len(examples):
        return list(values[0].split(sizes))
    masks = batch.get("decoder_attention_mask" if len(examples[0]) > 1 else "attention_mask")
    if masks is not None:
        return [row[mask.bool()] for row, mask in zip(values, masks, strict=True)]
    return [row[:size] for row, size in zip(values, sizes, strict=True)]


def _one_by_one(model: PreTrainedModel, examples: list[Sequences]) -> list[Tensor]:
    return [output for example in examples for output in _outputs(model, _rows([example]), [example])]


# --- What is compared ------------------------------------------------------------------------------------------------


def _agreement(models: Models, examples: list[Sequences], dtype: torch.dtype) -> Iterator[Finding]:
    batch = _masked(examples, padding=(_special(models.ours, "pad_token_id") or [0])[0])
    exact = _outputs(copy.deepcopy(models.padded).double(), batch, examples)
    scale = max(float(output.abs().max()) for output in exact)
    rounding = _difference(_outputs(models.padded, batch, examples), exact)
    allowed = SLACK * rounding + torch.finfo(dtype).eps * scale
    makers = {f"lengths, {name}": make for name, make in _makers(models.ours).items()}
    makers["attention_mask, padding on the left"] = _masked_on_the_left
    runs = {name: partial(_outputs, models.ours, make(examples), examples) for name, make in makers.items()}
    runs["one by one"] = partial(_one_by_one, models.ours, examples)
    for name, run in runs.items():
        yield Finding(f"{name}: as {models.what_is_padded} on padded rows", dtype, _difference(run(), exact), allowed)


def _makers(model: PreTrainedModel) -> dict[str, Callable[[list[Sequences]], Batch]]:
    """The batches with lengths that a model takes."""
    return {"in rows": _rows} | ({} if _is_of_choices(model) else {"end to end": _flat})


def _difference(found: list[Tensor], exact: list[Tensor]) -> float:
    differences = (float((one - other).abs().max()) for one, other in zip(found, exact, strict=True))
    return float(torch.tensor(list(differences)).max())  # NaN propagates, unlike in Python's max


def _leaks(model: PreTrainedModel, examples: list[Sequences], dtype: torch.dtype) -> Iterator[Finding]:
    for name, make in _makers(model).items():
        before, changed = _outputs(model, make(examples), examples), 0
        for k in range(len(examples)):
            others = [example if j != k else _replaced(model, example) for j, example in enumerate(examples)]
            after = _outputs(model, make(others), others)
            changed += sum(j != k and not torch.equal(*pair) for j, pair in enumerate(zip(before, after, strict=True)))
        yield Finding(f"lengths, {name}: sequences that change when another does", dtype, changed, 0)
    before, after = (_outputs(model, _rows(examples, padding), examples) for padding in (0, 1))
    changed = sum(not torch.equal(*pair) for pair in zip(before, after, strict=True))
    yield Finding("lengths, in rows: sequences that change when padding does", dtype, changed, 0)


def _replaced(model: PreTrainedModel, example: Sequences) -> Sequences:
    """Other tokens, as many."""
    sides = _sides(model)
    return tuple(
        (tokens + 1 + side.vocab_size // 3) % side.vocab_size for tokens, side in zip(example, sides, strict=True)
    )
