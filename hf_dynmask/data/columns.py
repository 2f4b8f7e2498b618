"""Columns of examples: converts them to tensors, and finds out whether they are per token or per example."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from ..modeling.field_shapes import BATCH_FIELDS, TOKEN_FIELDS
from ..modeling.layout import IGNORE_INDEX, NUMBERED

Columns = dict[str, list[Tensor]]  # one tensor per example
LABELS = ("label", "label_ids", "labels")
ANSWER = ("start_positions", "end_positions")
MAIN_COLUMNS = ("input_ids", "input_features")

TOKEN, EXAMPLE, NEXT_TOKEN = "token", "example", "next_token"
PER_TOKEN = ("attention_mask", "token_type_ids", "position_ids", "special_tokens_mask", "offset_mapping", "word_ids")
PER_TOKEN += (*TOKEN_FIELDS, "missing", "inputs_embeds", "shift_labels")
PER_EXAMPLE = (*ANSWER, "lengths", *(name for name in BATCH_FIELDS if name not in TOKEN_FIELDS), "idx")
ROLES: Mapping[str, str] = {
    **dict.fromkeys((*MAIN_COLUMNS, *PER_TOKEN), TOKEN),
    **dict.fromkeys(PER_EXAMPLE, EXAMPLE),
}


# --- Numbers ---------------------------------------------------------------------------------------------------------


def read_columns(features: Sequence[Mapping[str, Any]]) -> Columns:
    """
    The numeric columns of the examples, under the names of the model's arguments. Left out are columns of text, columns
    that are `None` in all examples, and columns with an unknown name that are empty in all examples.

    Raises:
        ValueError: There are no examples; a column is missing in some examples, or holds neither numbers nor text;
            labels are not numbers.
    """
    if not features:
        raise ValueError("`features` must hold at least one example; got none")
    columns: Columns = {}
    for name in dict.fromkeys(name for feature in features for name in feature):
        values = [feature.get(name) for feature in features]
        if all(value is None for value in values):
            continue
        texts = [index for index, value in enumerate(values) if _is_text(value)]
        if texts and name not in LABELS:
            continue
        if texts:
            raise ValueError(
                f"column `{name}` must hold numbers: encode classes with `dataset.class_encode_column('{name}')`, and "
                f"texts with the tokenizer; got {values[texts[0]]!r} in example {texts[0]}"
            )
        target = model_name(name)
        if target in columns:
            raise ValueError(f"examples must have one column of labels; got `{name}` next to another")
        tensors = [_tensor(name, value, index) for index, value in enumerate(values)]
        if target not in (*ROLES, "labels") and not any(tensor.numel() for tensor in tensors):
            continue  # these may be lists of text
        columns[target] = _alike(tensors, is_label=target == "labels")
    return columns


def model_name(name: str) -> str:
    """The name of the model's argument for a column."""
    return "labels" if name in LABELS else name


def _is_text(value: Any) -> bool:
    """Whether a value is text or a list of texts, nested to any depth."""
    if isinstance(value, str | bytes):
        return True
    if isinstance(value, np.ndarray):
        return value.dtype.kind in "US" or (value.dtype.kind == "O" and any(map(_is_text, value.flat)))
    if not isinstance(value, list | tuple) or (value and isinstance(value[0], int | float | np.number | Tensor)):
        return False  # the first entry decides, since lists of tokens are long
    return any(map(_is_text, value))


def _tensor(name: str, value: Any, index: int) -> Tensor:
    if value is None:
        raise ValueError(f"column `{name}` must be in every example; got none in example {index}")
    array = value if isinstance(value, Tensor) else _array(name, value)
    if array.dtype == torch.uint64 and (array.long() < 0).any():
        raise ValueError(f"column `{name}` must hold integers below 2**63; got {value!r} in example {index}")
    if name == "word_ids":
        array = _whole(array)
    if name in LABELS and array.isnan().any():
        raise ValueError(f"column `{name}` must hold a number in every example; got {value!r} in example {index}")
    return array


def _array(name: str, value: Any) -> Tensor:
    try:
        array = np.array(value)
        if array.dtype == object:  # datasets in NumPy format give nested lists, or `None` among numbers
            array = np.array(array.tolist(), dtype=float if name == "word_ids" else None)
    except (ValueError, TypeError):  # NumPy raises these for ragged lists and for objects that are not numbers
        array = np.array(None)
    if array.dtype.kind not in "biuf":
        raise ValueError(f"column `{name}` must hold numbers, lists of them of equal length, or text; got {value!r}")
    return torch.as_tensor(array)


def _whole(words: Tensor) -> Tensor:
    """Word numbers as integers. `None` and NaN, for a token that is in no word, become -1."""
    if not words.is_floating_point():
        return words
    whole = words.nan_to_num(nan=-1).long()
    return whole if torch.equal(whole.to(words.dtype), words.nan_to_num(nan=-1)) else words


def _alike(tensors: list[Tensor], is_label: bool) -> list[Tensor]:
    """Converts the tensors of a column to one dtype. Empty tensors do not affect the dtype, and take the trailing shape
    of the others."""
    filled = [tensor for tensor in tensors if tensor.numel()]
    if any(tensor.is_floating_point() for tensor in filled):
        dtype = torch.float32
    elif filled and not is_label and all(tensor.dtype == torch.bool for tensor in filled):
        dtype = torch.bool
    else:
        dtype = torch.int64
    inner = filled[0].shape[1:] if filled else ()
    return [(tensor.reshape(0, *inner) if tensor.shape == (0,) else tensor).to(dtype) for tensor in tensors]


# --- Roles -----------------------------------------------------------------------------------------------------------


def check_roles(given: Mapping[str, str] | None, main: Sequence[str]) -> dict[str, str]:
    """
    Checks the `column_roles` of a collator, and returns them under the names of the model's arguments.

    Args:
        given (`Mapping[str, str]`, *optional*): The argument of the collator.
        main (`Sequence[str]`): Columns with one entry per token.

    Raises:
        ValueError: A role is unknown or does not fit the column.
    """
    for name, role in (given or {}).items():
        known = (TOKEN, EXAMPLE, NEXT_TOKEN) if name in LABELS else (TOKEN, EXAMPLE)
        known = (TOKEN,) if name in (*main, "attention_mask") else known
        if role not in known:
            wanted = " or ".join(map(repr, known))
            raise ValueError(f"`column_roles` must give column `{name}` the role {wanted}; got {role!r}")
    return {model_name(name): role for name, role in (given or {}).items()}


def unknown_role(name: str) -> ValueError:
    """An error for a column whose role follows neither from its name nor from its values."""
    return ValueError(
        f"column `{name}` must have a role: set `column_roles={{'{name}': 'token'}}` on the collator if it has one "
        f"entry per token, or `column_roles={{'{name}': 'example'}}` if it describes the example as a whole"
    )


def check_sizes(columns: Columns, roles: Mapping[str, str], main: str) -> None:
    """Raise a `ValueError` if a column per token does not have exactly one entry per token, or if its entries differ in
    shape."""
    for name, values in columns.items():
        if roles[name] == EXAMPLE:
            continue
        shapes = [tuple(value.shape) for value in values]
        for index, (shape, tokens) in enumerate(zip(shapes, columns[main], strict=True)):
            if shape[:1] != (len(tokens),):
                raise ValueError(
                    f"column `{name}` must have one entry for each of the {len(tokens)} tokens of example {index}; got "
                    f"shape {shape}{_LABELS_HINT.format(name) if name == 'labels' else ''}"
                )
        if len({shape[1:] for shape in shapes}) > 1:
            raise ValueError(f"column `{name}` must have entries of one shape; got shapes {shapes}")


_LABELS_HINT = ". Labels per example must be floats, or need `column_roles={{'{}': 'example'}}` on the collator"


def are_inputs(labels: list[Tensor], ids: list[Tensor]) -> bool:
    """Whether the labels, apart from ignored ones, equal the tokens, as in next-token prediction."""
    known = [label != IGNORE_INDEX for label in labels]
    pairs = list(zip(labels, ids, known, strict=True))
    same = all(label.shape == own.shape and torch.equal(label[kept], own[kept]) for label, own, kept in pairs)
    return same and any(kept.any() for kept in known)


# --- Absent tokens ---------------------------------------------------------------------------------------------------


def presence(columns: Columns, main: str) -> list[Tensor] | None:
    """Which tokens are real according to `attention_mask`; `None` if all are.

    Raises:
        ValueError: It does not hold 0 or 1 for each token.
    """
    for index, (mask, tokens) in enumerate(zip(columns.get("attention_mask", ()), columns[main], strict=False)):
        if mask.shape != tokens.shape[:1]:
            raise ValueError(
                f"`attention_mask` of an example must hold 0 or 1 per token, shape {tuple(tokens.shape[:1])}; "
                f"got shape {tuple(mask.shape)}"
            )
        if ((mask != 0) & (mask != 1)).any():
            raise not_binary(mask, index)
    keep = [mask.bool() for mask in columns.get("attention_mask", ())]
    return None if all(kept.all() for kept in keep) else keep


def not_binary(mask: Tensor | np.ndarray, index: int) -> ValueError:
    """An error for an example whose mask has numbers other than 0 and 1, such as document numbers."""
    return ValueError(
        f"`attention_mask` of an example must hold 0 or 1; got {mask.tolist()} in example {index} ({NUMBERED})"
    )


def without_absent(columns: Columns, roles: Mapping[str, str], keep: list[Tensor]) -> Columns:
    """The columns without absent tokens."""
    shortened = {}
    for name, column in columns.items():
        values = zip(column, keep, strict=True)
        if roles[name] != EXAMPLE:
            shortened[name] = [value[kept] for value, kept in values]
        elif name in ANSWER:
            shortened[name] = [_moved(position, kept) for position, kept in values]
        else:
            shortened[name] = column
    return shortened


def _moved(position: Tensor, kept: Tensor) -> Tensor:
    """A token's position after absent tokens are removed. Positions outside the example mean "no answer" and stay."""
    inside = (position >= 0) & (position < len(kept))
    before = pad(kept.cumsum(0), (1, 0))
    return torch.where(inside, before[position.clamp(0, len(kept))], position)
