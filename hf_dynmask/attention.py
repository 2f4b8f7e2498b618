"""`dynmask_attention`: one operation over flat tensors, several implementations, all equal to the reference."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from .attention_blocks import attend as attend_blocks
from .attention_reference import attend as attend_reference
from .attention_sdpa import attend as attend_sdpa
from .layout import SequenceLayout
from .masks import Mask
from .plan import MaskPlan

IMPLEMENTATIONS = {"blocks": attend_blocks, "reference": attend_reference, "sdpa": attend_sdpa}


def dynmask_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask | str | MaskPlan,
    layout: SequenceLayout,
    key_layout: SequenceLayout | None = None,
    *,
    fields: Mapping[str, Tensor] | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    implementation: str = "auto",
) -> Tensor:
    """Attention over the real tokens of a batch, restricted by a mask expression.

    Args:
        query (`Tensor` of shape `(1, H, N, D)`): Queries, flat, in the order of `layout.flatten`.
        key (`Tensor` of shape `(1, Hk, Nk, D)`): Keys; Hk divides H (grouped-query attention).
        value (`Tensor` of shape `(1, Hk, Nk, Dv)`): Values.
        mask (`Mask`, `str` or `MaskPlan`):
            The expression, its text, or a plan made before (then `fields` are the plan's).
        layout (`SequenceLayout`): Where the queries sit.
        key_layout (`SequenceLayout`, *optional*): Where the keys sit, sequence for sequence. `None`: with the queries.
        fields (`dict[str, Tensor]`, *optional*): The fields that the mask reads, in the batch's layout.
        scaling (`float`, *optional*): Factor of the scores. `None`: `D ** -0.5`.
        dropout (`float`, *optional*, defaults to 0.0): Probability with which an attention weight is dropped.
        implementation (`str`, *optional*, defaults to `"auto"`):
            `"blocks"` (block-sparse, any device), `"reference"` (dense, padded), `"sdpa"` (dense mask, padded), or
            `"auto"`, which takes `"blocks"`.

    Returns:
        `Tensor` of shape `(1, H, N, Dv)`: flat; a query with no key to see gives exactly 0.

    Raises:
        ValueError: An unknown implementation; tensors whose shapes do not fit each other or the layouts; a field that
            the mask needs is missing or has the wrong shape.
    """
    attend = implementation_named(implementation)
    plan = mask if isinstance(mask, MaskPlan) else MaskPlan(mask, layout, key_layout, fields=fields)
    if plan.layout is not layout:
        raise ValueError("`layout` must be the one that the plan was made for; got another")
    _check_shapes(query, key, value, plan)
    factor = query.shape[-1] ** -0.5 if scaling is None else scaling
    output, _ = attend(query, key, value, plan, scaling=factor, dropout=dropout)
    return output


def implementation_named(name: str):
    """The `attend` function of an implementation.

    Raises:
        ValueError: The name is not known; the message lists the known ones.
    """
    if name == "auto":
        return attend_blocks
    if name not in IMPLEMENTATIONS:
        known = ", ".join(map(repr, ("auto", *IMPLEMENTATIONS)))
        raise ValueError(f"`implementation` must be one of {known}; got {name!r}")
    return IMPLEMENTATIONS[name]


def _check_shapes(query: Tensor, key: Tensor, value: Tensor, plan: MaskPlan) -> None:
    for name, states in (("query", query), ("key", key), ("value", value)):
        if states.dim() != 4:
            raise ValueError(f"`{name}` must have shape (1, heads, tokens, head size); got {tuple(states.shape)}")
    queries, keys = plan.layout.num_tokens, plan.key_layout.num_tokens
    heads, head_dim = query.shape[1], query.shape[-1]
    key_heads = key.shape[1]
    if key_heads == 0 or heads % key_heads:
        raise ValueError(f"`key` must have a number of heads that divides the query's {heads}; got {key_heads}")
    for name, states, expected in (
        ("query", query, (1, heads, queries, head_dim)),
        ("key", key, (1, key_heads, keys, head_dim)),
        ("value", value, (1, key_heads, keys, value.shape[-1])),
    ):
        if tuple(states.shape) != expected:
            raise ValueError(f"`{name}` must have shape {expected}; got {tuple(states.shape)}")
