"""Positions of unpadded batches in stock models that count columns by themselves.

The sides of encoder-decoders take no `position_ids`. Models of BART's family look up columns in a table. Models of T5's
family add a bias to the scores of all pairs of columns. A hook on the module that counts columns gives it the tokens'
positions in their original rows. For all other batches the hook does nothing.

Shape legend: N real tokens, H heads, P positions of the longest row.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..modeling.layout import eager_only
from .batches import current_batches, kept
from .masks import DeferredMask


def takes_positions(model: PreTrainedModel) -> bool:
    """Whether positions of tokens can be passed to a model, as an argument or by hooks."""
    return _takes_position_ids(model) or any(map(_hook_for, model.modules()))


def _takes_position_ids(model: PreTrainedModel) -> bool:
    return "position_ids" in signature(type(model).forward).parameters


@kept
def install_position_hooks(model: PreTrainedModel) -> None:
    """Installs the hooks on the parts of a model that count columns, once."""
    for part in () if _takes_position_ids(model) else model.modules():
        hook = _hook_for(part)
        if hook is not None and hook not in part._forward_pre_hooks.values():
            part.register_forward_pre_hook(hook, with_kwargs=True)


def _hook_for(part: nn.Module) -> Any:
    if isinstance(part, nn.Embedding) and "position_ids" in signature(part.forward).parameters:
        return _look_up_positions
    bias: Any = getattr(part, "compute_bias", None)
    is_of_columns = bias is not None and {"query_length", "key_length"} <= signature(bias).parameters.keys()
    if is_of_columns and {"mask", "position_bias"} <= signature(part.forward).parameters.keys():
        return _compute_bias_by_position
    return None


def _look_up_positions(part: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    positions = _positions()  # these replace the columns that a decoder passes
    return None if positions is None else (args, kwargs | {"position_ids": positions})


@eager_only
def _positions() -> Tensor | None:
    """Positions `(N,)` of the tokens of an unpadded batch; `None` in any other."""
    batches = current_batches()
    return batches[-1].positions if batches else None


def _compute_bias_by_position(part: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """The bias `(1, H, P, P)` of positions, in place of `(1, H, N, N)` of columns."""
    size = _longest(kwargs.get("mask")) if part.has_relative_attention_bias else None
    if size is None or kwargs.get("position_bias") is not None:
        return None
    return args, kwargs | {"position_bias": part.compute_bias(size, size)}


@eager_only
def _longest(mask: Any) -> int | None:
    """P of an unpadded batch, from its mask, which checkpointed layers still have when they are computed again."""
    return mask.unpadded.num_positions if isinstance(mask, DeferredMask) and mask.unpadded is not None else None
