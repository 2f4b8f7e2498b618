"""Runs stock models on the real tokens of ordinary padded rows.

Before the forward pass of a base model (a model without a head), its rows become one flat row. Its outputs become rows
again, so that heads, losses and other code do not notice. If that would not give the stock outputs, the model runs on
the rows as they are.

Shape legend: B rows, T columns, N real tokens.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from inspect import getsource, signature, unwrap
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from ..modeling.field_shapes import FIELD_SHAPES, TOKEN_FIELDS
from ..modeling.layout import SequenceLayout, eager_only, ids_and_positions, not_binary
from .batches import (
    CACHES,
    INPUTS,
    Batch,
    first_position,
    has_cross_attention,
    has_neftune,
    kept,
    places_of,
    token_mixing_outside_attention,
)
from .positions import install_position_hooks, takes_positions

SWITCH = "dynmask_unpad"  # configuration entry; `False`: padded rows are computed as they are
OF_TOKENS = (*INPUTS, "token_type_ids", "position_ids", *TOKEN_FIELDS)
OF_ROWS = tuple(name for name, shape in FIELD_SHAPES.items() if len(shape) < 4 and name not in TOKEN_FIELDS)
COUNT_TOKENS = {"opt": True, "biogpt": False}  # model types whose code has a `cumsum`: whether positions count tokens
HEADS = re.compile("For[A-Z]|HeadModel|HeadsModel")  # in class names; not all heads have a `base_model` beside them
OUTPUTS_OF_ROWS = ("output_attentions", "output_router_logits")  # a flat row cannot return these


def why_rows(model: PreTrainedModel) -> str | None:
    """The reason why a base model computes the padding of rows; `None` if it computes real tokens only."""
    is_off = getattr(model.config, SWITCH, True) is False
    return f"its configuration has `{SWITCH}=False`" if is_off else _why_rows(model)


@kept
def _why_rows(model: PreTrainedModel) -> str | None:
    config, parameters = model.config, signature(type(model).forward).parameters
    if model.base_model is not model or HEADS.search(type(model).__name__):
        return "it has a head"
    parts = sorted(name for name in config.sub_configs if getattr(config, name, None) is not None)
    if parts:
        return f"it has parts with configurations of their own: {', '.join(parts)}"
    if "decoder_input_ids" in parameters:
        return "it has a decoder"
    if "masking_utils" not in _source(model):
        return "its masks are its own"
    if not takes_positions(model):
        return "it takes no `position_ids`"
    mixing = token_mixing_outside_attention(model)
    if mixing is not None:
        return f"its tokens meet outside attention: {mixing}"
    pools_inside = not hasattr(model, "pooler") and "pooler_output" in _text(_forward(model))
    return _why_not_pooled(model) if pools_inside or getattr(model, "pooler", None) is not None else None


def _why_not_pooled(model: PreTrainedModel) -> str | None:
    """Why what a model pools is not known from its states."""
    pooler = getattr(model, "pooler", None)
    if pooler is None:
        return "it pools by itself"
    is_part = isinstance(pooler, nn.Linear) and not hasattr(model, "pooler_activation")
    if is_part or len(signature(pooler.forward).parameters) > 1:
        return f"its pooler needs more than the states: {type(pooler).__name__}"
    return None


def _forward(model: PreTrainedModel) -> Callable:
    """The `forward` of a model's class, without decorators."""
    own: Any = type(model).forward
    return unwrap(getattr(own, "announces", own))


def _source(model: PreTrainedModel) -> str:
    """The source code of the module that defines a model's `forward`."""
    return _text(sys.modules[_forward(model).__module__])


def _text(code: Any) -> str:
    """The source code of an object; empty if there is none."""
    try:
        return getsource(code)
    except (OSError, TypeError):  # made at run time
        return ""


@kept
def _counts_tokens(model: PreTrainedModel) -> bool | None:
    """Whether the model's own positions count real tokens (otherwise columns); `None` if that is not known."""
    if not _forward(model).__module__.startswith("transformers.models."):
        return None
    return COUNT_TOKENS.get(model.config.model_type, None if "cumsum" in _source(model) else False)


@dataclass
class Unpadded:
    """The forward pass of a base model on the real tokens of padded rows.

    Attributes:
        rows ([`SequenceLayout`]): The layout of these tokens in the padded rows.
        batch ([`Batch`]): The flat batch of these tokens.
        returns_tuple (`bool`): Whether the caller wants a tuple.
    """

    rows: SequenceLayout
    batch: Batch
    returns_tuple: bool

    @classmethod
    @eager_only
    def of(cls, batch: Batch, outer: Sequence[Batch]) -> Unpadded | None:
        """The batch of a base model without its padding; `None` if it has to be computed as it is."""
        model, given = batch.model, batch.given
        if why_rows(model) is not None or not _can_be_flat(batch, outer):
            return None
        mask = given["attention_mask"]
        tokens, is_binary, has_holes, starts_late = _read(mask)
        if not is_binary:
            raise not_binary("attention_mask", mask)
        for each in (batch, *outer):
            if each.given.get("attention_mask") is mask:
                each.unchecked.pop("attention_mask", None)
        if tokens == mask.numel():
            given["attention_mask"] = None  # without padding, nobody has to read it again
            return None
        if tokens == 0 or has_holes or starts_late and not _can_start_late(batch, outer):
            return None
        rows = _layout(mask, tokens)
        flat, positions = replace(rows, shape=(1, tokens), indices=None), _positions(batch, rows)
        given = _flat(batch, rows, positions)
        returns_tuple = given.get("return_dict", getattr(model.config, "return_dict", True)) is False
        if returns_tuple:
            given["return_dict"] = True
        install_position_hooks(model)
        batch = replace(batch, given=given, layout=flat, stated_by="lengths", positions=positions[0])
        return cls(rows, batch, returns_tuple)

    @eager_only
    def in_rows(self, output: Any) -> Any:
        """The model's output in the padded rows, 0 at absent tokens.

        Raises:
            TypeError: The output is not a [`~transformers.utils.ModelOutput`].
        """
        if not isinstance(output, ModelOutput):
            raise TypeError(
                f"{type(self.batch.model).__name__} must return a ModelOutput to be computed without padding; got "
                f"{type(output).__name__} (`model.config.{SWITCH} = False` lets it compute padding)"
            )
        for name, value in output.items():
            if name == "pooler_output":
                continue
            output[name] = tuple(map(self._rows, value)) if isinstance(value, tuple) else self._rows(value)
        if output.get("pooler_output") is not None:
            output["pooler_output"] = _pooled(self.batch.model, output["last_hidden_state"])
        return output.to_tuple() if self.returns_tuple else output

    def _rows(self, value: Any) -> Any:
        is_of_tokens = isinstance(value, Tensor) and tuple(value.shape[:2]) == (1, self.rows.num_tokens)
        return self.rows.unflatten(value) if is_of_tokens else value


def _pooled(model: Any, states: Tensor) -> Tensor:
    """What a pooler makes of rows `(B, T, C)`. ALBERT's own code is around it."""
    if hasattr(model, "pooler_activation"):
        return model.pooler_activation(model.pooler(states[:, 0]))
    return model.pooler(states)


def pool_by_sequence(model: PreTrainedModel, output: Any, layout: SequenceLayout) -> None:
    """Pools each sequence of a flat batch, `(S, C)`, where a stock model pools each row.

    Raises:
        ValueError: The model pools by code that is not known, or returns a tuple.
    """
    if not isinstance(output, ModelOutput):
        if getattr(model, "pooler", None) is None:
            return
        raise ValueError(
            f"`return_dict` must be True for a flat batch of {type(model).__name__}, which pools; got False"
        )
    if output.get("pooler_output") is None:
        return
    why = _why_not_pooled(model)
    if why is not None:
        raise ValueError(f"a flat batch needs a model that pools states by a known part; {type(model).__name__}: {why}")
    first = layout.first_tokens(layout.flatten(output["last_hidden_state"]))
    output["pooler_output"] = _pooled(model, first[:, None])


def _can_be_flat(batch: Batch, outer: Sequence[Batch]) -> bool:
    """Whether the arguments of a forward pass are those of plain padded rows, each a sequence."""
    given = {name: value for name, value in batch.given.items() if value is not None}
    mask, tokens = given.pop("attention_mask", None), next((given[name] for name in INPUTS if name in given), None)
    if not isinstance(mask, Tensor) or tokens is None or mask.dim() != 2 or mask.shape != tokens.shape[:2]:
        return False
    if any(each.layout is not None for each in (batch, *outer)) or batch.absent_see or has_neftune(batch.model):
        return False
    if "start_positions" in (*outer, batch)[0].names:  # the loss of question answering runs over padding, too
        return False
    caller = type((*outer, batch)[0].model).__name__
    if caller.endswith("ForSequenceClassification") and "input_ids" not in given:  # it may read off the last column
        return False
    if _has_hooks_of_rows(batch, outer):
        return False
    if any(given.get(name, getattr(batch.model.config, name, False)) for name in OUTPUTS_OF_ROWS):
        return False
    if any(name in given for name in CACHES) or given.get("use_cache") or _may_go_on(batch, outer):
        return False
    for name, value in given.items():
        if name in OF_TOKENS:
            if places_of(value) != mask.shape and (name != "position_ids" or value.shape != (1, mask.shape[1])):
                return False
        elif name not in OF_ROWS and not _is_number(value):
            return False
    return not ("position_ids" in given and batch.is_flat)


def _has_hooks_of_rows(batch: Batch, outer: Sequence[Batch]) -> bool:
    """Whether hooks of PEFT pass to layers what was given for each row, such as the name of its adapter."""
    if not any(hasattr(each.model, "peft_config") for each in (*outer, batch)):
        return False
    hooks = (hook for part in batch.model.modules() for hook in part._forward_pre_hooks.values())
    return any(getattr(hook, "func", hook).__module__.startswith("peft.") for hook in hooks)


def _is_number(value: Any) -> bool:
    return isinstance(value, bool | int | float | str) or isinstance(value, Tensor) and value.dim() == 0


def _may_go_on(batch: Batch, outer: Sequence[Batch]) -> bool:
    """Whether the caller may continue from the cache of this forward pass, as with a language model that neither trains
    nor computes a loss."""
    caller = (*outer, batch)[0]
    returns_cache = "use_cache" in batch.names and batch.given.get("use_cache") is None
    in_use = returns_cache and getattr(batch.model.config, "use_cache", False)
    has_labels = caller.given.get("labels") is not None
    return bool(in_use and caller.model.can_generate() and not batch.model.training and not has_labels)


def _read(mask: Tensor) -> tuple[int, bool, bool, bool]:
    """Reads a mask `(B, T)`: the number of real tokens, whether it holds only 0 and 1, whether there is padding between
    tokens, and whether a row begins with padding."""
    present = mask.bool()
    counts, columns = present.sum(1), torch.arange(mask.shape[1], device=mask.device)
    first, last = columns.where(present, mask.shape[1]).amin(1), columns.where(present, -1).amax(1)
    is_there = counts > 0
    is_binary = (present.to(mask.dtype) == mask).all()
    has_holes, starts_late = (is_there & (last - first + 1 != counts)).any(), (is_there & (first > 0)).any()
    found = int(counts.sum() * 8 + is_binary + has_holes * 2 + starts_late * 4)  # the one host read
    return found // 8, bool(found & 1), bool(found & 2), bool(found & 4)


def _can_start_late(batch: Batch, outer: Sequence[Batch]) -> bool:
    """Whether rows that begin with padding can be flat: positions are known, and no head looks at the first column."""
    is_encoder = any(has_cross_attention(each.model.config) for each in outer)
    model, has_positions = batch.model, batch.given.get("position_ids") is not None
    has_positions |= first_position(model) > 0 or _counts_tokens(model) is not None
    return has_positions and (is_encoder or "create_bidirectional_mask" not in _source(model))


def _layout(mask: Tensor, tokens: int) -> SequenceLayout:
    """The layout of rows without padding between their tokens."""
    present = mask.bool()
    lengths, width = present.sum(1), mask.shape[1]
    sequence_ids, positions = ids_and_positions(lengths, tokens)
    indices = sequence_ids * width + present.long().argmax(1)[sequence_ids] + positions
    return SequenceLayout((mask.shape[0], width), tokens, lengths, sequence_ids, positions, indices, longest=width)


def _flat(batch: Batch, rows: SequenceLayout, positions: Tensor) -> dict[str, Any]:
    """The arguments of the flat batch."""
    model, given = batch.model, dict(batch.given)
    for name in OF_TOKENS:
        if given.get(name) is not None:
            given[name] = rows.flatten(given[name].expand(*rows.shape, *given[name].shape[2:]))
    if "position_ids" in batch.names:
        given["position_ids"] = positions
    if "token_type_ids" in batch.names and given.get("token_type_ids") is None and _has_types(model):
        given["token_type_ids"] = torch.zeros_like(rows.positions)[None]  # the model's buffer may be too short
    if "use_cache" in batch.names:
        given["use_cache"] = False
    return given | {"attention_mask": None}


@kept
def _has_types(model: PreTrainedModel) -> bool:
    return any(name.endswith("token_type_ids") for name, _ in model.named_buffers())


def _positions(batch: Batch, rows: SequenceLayout) -> Tensor:
    """Positions `(1, N)` of real tokens, as the model computes them in rows."""
    given = batch.given.get("position_ids")
    if given is not None:
        return rows.flatten(given.expand(rows.shape))
    first, ids = first_position(batch.model), batch.given.get("input_ids")
    if first and ids is not None:  # RoBERTa's family counts tokens other than the pad id
        is_counted = ids != first - 1
        return rows.flatten(is_counted.cumsum(1) * is_counted + first - 1)
    if not first and _counts_tokens(batch.model):
        return rows.positions[None]
    return rows.places[None] % rows.shape[1] + first
