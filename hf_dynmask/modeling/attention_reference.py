"""Masked attention as the textbook writes it: dense, padded, readable. Every other implementation is tested against it.

Shape legend: B rows, H heads, Hk key/value heads, Tq queries, Tk keys, D and Dv head sizes, N real tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .layout import eager_only
from .plan import MaskPlan


def reference_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    allowed: Tensor,
    scaling: float,
    dropout: float = 0.0,
    softmax_over: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(Q K^T * scaling) V over the allowed pairs ("Attention Is All You Need", arXiv:1706.03762, eq. 1).

    Args:
        query (`Tensor` of shape `(B, H, Tq, D)`): Queries.
        key (`Tensor` of shape `(B, Hk, Tk, D)`): Keys; Hk divides H.
        value (`Tensor` of shape `(B, Hk, Tk, Dv)`): Values.
        allowed (bool `Tensor` of shape `(B, 1 | H, Tq, Tk)`): Which query may see which key.
        scaling (`float`): Factor of the scores.
        dropout (`float`, *optional*, defaults to 0.0): Probability with which a weight is dropped.
        softmax_over (bool `Tensor` of shape `(B, 1 | H, Tq, Tk)`, *optional*):
            Pairs that the softmax runs over, whose weights `allowed` then masks. `None`: those that are allowed.

    Returns:
        `(output (B, H, Tq, Dv), weights (B, H, Tq, Tk))`; exactly 0 for a query with no key to see.
    """
    repeats = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(repeats, dim=1) for states in (key, value))
    scores = torch.matmul(query, key.transpose(-1, -2)) * scaling
    weights = masked_softmax(scores, allowed if softmax_over is None else softmax_over)
    if softmax_over is not None:
        weights = masked_weights(weights, allowed)
    weights = nn.functional.dropout(weights, p=dropout, training=dropout > 0)
    return torch.matmul(weights, value), weights


def masked_softmax(scores: Tensor, allowed: Tensor) -> Tensor:
    """Softmax of `scores (..., Tq, Tk)` over the allowed keys of each query; 0 for a query without any."""
    scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(scores.dtype)
    return weights * allowed.any(-1, keepdim=True)


def masked_weights(weights: Tensor, allowed: Tensor) -> Tensor:
    """Attention weights `(..., Tq, Tk)` with those of hidden keys at 0; the others keep their values."""
    return weights * allowed


@eager_only
def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: MaskPlan,
    *,
    scaling: float,
    dropout: float = 0.0,
    apply_mask_to: str = "scores",
) -> tuple[Tensor, Tensor]:
    """[`reference_attention`] on flat `(1, H, N, D)` tensors; weights `(B, H, T, T)` in the batch's layout.

    With `apply_mask_to="weights"` the softmax runs over a sequence's tokens, and the mask multiplies its weights.
    """
    rows = plan.in_rows
    output, weights = reference_attention(
        rows.layout.unflatten_heads(query),
        rows.key_layout.unflatten_heads(key),
        rows.key_layout.unflatten_heads(value),
        rows.dense(query.shape[1]),
        scaling,
        dropout,
        rows.same_sequence if apply_mask_to == "weights" else None,
    )
    return rows.layout.flatten_heads(output), weights if rows is plan else plan.in_batch(weights)
