"""`attn_implementation="dynmask"` for stock models: attention, and `set_mask`.

[`install_hooks`] in `models.py` prepares a stock model to run with it. Transformers then calls two functions:
`dynmask_mask` in `masks.py`, and in every layer [`dynmask_attention_forward`] with the mask that it returned.

Shape legend: B rows, Tq and Tk columns of queries and keys, H heads, D and Dv head sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..modeling.graph_attention import GraphPlan
from ..modeling.graph_attention import attend as attend_by_plan
from ..modeling.layout import SequenceLayout, eager_only, packed
from ..modeling.modeling_base import warn_of_adapters_alone
from ..modeling.plan import MaskPlan
from ..modeling.softmax import masked_softmax, repeated
from .batches import CONFIG_ENTRY, NAME, current_batches
from .masks import DeferredMask
from .models import check_mask

# Arguments of some models' attention that change which keys are seen and that no expression can represent.
UNSUPPORTED_ARGUMENTS = ("block_indices", "cache", "indices", "sinks")

# --- Setting a mask --------------------------------------------------------------------------------------------------


def set_mask(model: PreTrainedModel, text: str | None) -> None:
    """Sets a mask expression on a model, in place of its own masks.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            A DynMask model, or a stock model that runs with `attn_implementation="dynmask"`. The text is stored in its
            configuration and saved with it.
        text (`str`, *optional*):
            The expression for all layers, such as `"causal & window(255, 0)"`. Fields that it reads are arguments of
            the model's forward pass. `None` restores the model's own masks. For a DynMask encoder-decoder it sets the
            encoder's mask; the model's own `set_mask` sets all three.

    Raises:
        ValueError: The text is not an expression, or contains what a stock model cannot follow (`topk`, `dense`,
            `custom`); the model does not run with `"dynmask"`, has cross-attention, or has parts with configurations of
            their own.
    """
    if hasattr(model, "set_mask"):
        model.set_mask(text)  # type: ignore[operator]
        return
    if text is not None:
        check_mask(model, text)
        if model.config._attn_implementation != NAME:
            raise ValueError(
                f"`model` must run with attn_implementation='{NAME}'; {type(model).__name__} runs with "
                f"'{model.config._attn_implementation}'"
            )
    setattr(model.config, CONFIG_ENTRY, text)
    warn_of_adapters_alone(model, text)


# --- Attention -------------------------------------------------------------------------------------------------------


def dynmask_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: DeferredMask | GraphPlan | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    output_attentions: bool | None = None,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """The attention function that transformers' `AttentionInterface` calls.

    Args:
        module (`nn.Module`): The attention layer.
        query (`Tensor` of shape `(B, H, Tq, D)`): Queries.
        key (`Tensor` of shape `(B, Hk, Tk, D)`): Keys; Hk divides H.
        value (`Tensor` of shape `(B, Hk, Tk, Dv)`): Values.
        attention_mask ([`DeferredMask`], [`GraphPlan`] or `Tensor` of shape `(B, 1 | H, Tq, Tk)`, *optional*):
            The result of [`dynmask_mask`]. A tensor is an explicit mask, boolean or added to the scores. `None`: causal
            or full, depending on `is_causal`.
        scaling (`float`, *optional*): Factor applied to the scores. `None`: `D ** -0.5`.
        dropout (`float`, *optional*, defaults to 0.0): Dropout probability of the attention weights.
        is_causal (`bool`, *optional*): Used if there is no mask. `None`: the layer's own setting.
        softcap (`float`, *optional*): Bound of the scores (Gemma 2, arXiv:2408.00118, section 2).
        s_aux (`Tensor` of shape `(H,)`, *optional*): Score of a key without value (attention sink, gpt-oss).
        position_bias (`Tensor` of shape `(B | 1, H, Tq, Tk)`, *optional*): Added to the scores (T5, arXiv:1910.10683).
        output_attentions (`bool`, *optional*): Whether to return the weights.

    Returns:
        `(output (B, Tq, H, Dv), weights (B, H, Tq, Tk) or None)`; exactly 0 for a query without any allowed key.

    Raises:
        ValueError: An argument is not supported, or the model cannot take the flat batch.
    """
    for name in UNSUPPORTED_ARGUMENTS:
        if kwargs.get(name) is not None:
            raise ValueError(f"attn_implementation='{NAME}' does not support the `{name}` of {type(module).__name__}")
    factor = query.shape[-1] ** -0.5 if scaling is None else scaling
    needs_scores = softcap is not None or s_aux is not None or bool(output_attentions)
    if isinstance(attention_mask, GraphPlan) and not needs_scores and position_bias is None:
        return _by_plan(query, key, value, attention_mask, factor, dropout), None
    attend = partial(_by_scores, softcap=softcap, sinks=s_aux) if needs_scores else _by_cells
    settings = factor, dropout, is_causal, position_bias
    return _outside(module, query, key, value, attention_mask, *settings, attend, kwargs)


@eager_only
def _outside(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: DeferredMask | GraphPlan | Tensor | None,
    scaling: float,
    dropout: float,
    is_causal: bool | None,
    bias: Tensor | None,
    attend: Callable[..., tuple[Tensor, Tensor | None]],
    passed: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """Attention outside of graphs: by the plan or, if there is none or it is not enough, by `attend`."""
    if isinstance(attention_mask, GraphPlan):
        answer = attention_mask.outside()
    elif attention_mask is None or isinstance(attention_mask, Tensor):
        _check_without_plan(module, query, attention_mask)
        answer, added = _allowed_and_bias(module, query, key, attention_mask, is_causal)
        bias = added if bias is None or added is None else bias + added
    else:
        if attention_mask.shape[2:] != (query.shape[2], key.shape[2]):
            raise ValueError(
                f"{type(module).__name__} must have as many queries and keys as its mask was made for, "
                f"{attention_mask.shape[2:]}; got {(query.shape[2], key.shape[2])}"
            )
        answer = attention_mask.answer(query, passed, has_bias=bias is not None)
    if isinstance(answer, MaskPlan):
        if bias is None and attend is _by_cells:
            return _by_plan(query, key, value, answer, scaling, dropout), None
        output, weights = _with_own_rows(attend, query, key, value, answer, bias, scaling, dropout)
    else:
        output, weights = attend(query, key, value, answer, bias, scaling, dropout)
    return output.transpose(1, 2).contiguous(), weights


def _check_without_plan(module: nn.Module, query: Tensor, mask: Tensor | None) -> None:
    """Raises if a layer got no mask, or a tensor, but the model or the batch needs the result of [`dynmask_mask`]."""
    given = "no mask" if mask is None else "an explicit `attention_mask`"
    if getattr(getattr(module, "config", None), CONFIG_ENTRY, None) is not None:
        raise ValueError(f"a mask by `set_mask` needs layers that are given the model's mask; got {given}")
    batches = current_batches()
    if not batches:
        return
    batch = batches[-1]
    is_flat = batch.has_flat_layout if batch.has_explicit_mask else batch.is_flat
    if is_flat:
        raise ValueError(
            f"a flat batch needs layers that are given the model's mask; {type(module).__name__} got {given}"
        )


def _allowed_and_bias(
    module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool | None
) -> tuple[Tensor, Tensor | None]:
    """The pairs that an explicit mask, or its absence, allows; and what the mask adds to the scores, if anything."""
    if mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        every = query.new_ones(query.shape[2], key.shape[2], dtype=torch.bool)
        return every.tril() if causal and query.shape[2] > 1 else every, None
    if mask.is_floating_point():
        return mask > torch.finfo(mask.dtype).min, mask
    if mask.dtype != torch.bool:
        raise ValueError(f"an explicit `attention_mask` must be bool or floating point; got {mask.dtype}")
    return mask, None


def _by_plan(
    query: Tensor, key: Tensor, value: Tensor, plan: MaskPlan | GraphPlan, scaling: float, dropout: float
) -> Tensor:
    """Attention `(B, T, H, Dv)` on real tokens only; 0 elsewhere."""
    queries, keys = plan.layout, plan.key_layout
    if _is_whole(queries) and _is_whole(keys):
        output, _ = attend_by_plan(packed(query), packed(key), packed(value), plan, scaling=scaling, dropout=dropout)
        return output.unsqueeze(0)
    query, key, value = (
        side.flatten(x.transpose(1, 2)).squeeze(0) for x, side in ((query, queries), (key, keys), (value, keys))
    )
    output, _ = attend_by_plan(query, key, value, plan, scaling=scaling, dropout=dropout)
    return queries.unflatten(output.unsqueeze(0))


def _is_whole(layout: SequenceLayout) -> bool:
    """Whether the batch is one row without absent places, except in a tail, so that its tensors are already flat."""
    return layout.indices is None and layout.shape == (1, layout.num_tokens)


def _with_own_rows(
    attend: Callable[..., tuple[Tensor, Tensor | None]],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: MaskPlan,
    bias: Tensor | None,
    *settings: float,
) -> tuple[Tensor, Tensor | None]:
    """[`_by_cells`] or [`_by_scores`] with one row per sequence (see [`MaskPlan.in_rows`]); 0 at absent tokens."""
    plan = plan.trimmed
    rows = plan.in_rows
    sides = (query, plan.layout, rows.layout), *((x, plan.key_layout, rows.key_layout) for x in (key, value))
    states = (after.unflatten_heads(before.flatten_heads(x)) for x, before, after in sides)
    if bias is not None and rows is not plan and bias.shape[2:] == (query.shape[2], key.shape[2]):
        bias = plan.pairs_by_sequence(bias.expand(plan.layout.shape[0], -1, -1, -1))
    output, weights = attend(*states, rows.dense(query.shape[1]), bias, *settings)
    output = plan.layout.unflatten_heads(rows.layout.flatten_heads(output))
    return output, weights if weights is None or rows is plan else plan.in_batch(weights)


def _by_cells(
    query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, bias: Tensor | None, scaling: float, dropout: float
) -> tuple[Tensor, None]:
    """Attention `(B, H, Tq, Dv)` with a dense mask, by PyTorch's `scaled_dot_product_attention`."""
    output = nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=allowed if bias is None else torch.where(allowed, bias, -torch.inf),
        dropout_p=dropout,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output, None


def _by_scores(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    allowed: Tensor,
    bias: Tensor | None,
    scaling: float,
    dropout: float,
    *,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Attention `(B, H, Tq, Dv)` and its weights, from written-out scores."""
    key, value = (repeated(states, query.shape[1]) for states in (key, value))
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if bias is not None:
        scores = scores + bias
    weights = masked_softmax(scores, allowed, sinks).to(query.dtype)
    return torch.matmul(nn.functional.dropout(weights, dropout), value), weights
