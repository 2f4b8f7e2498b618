"""Masked attention as the textbook writes it: dense, padded, readable. Every other implementation is tested against it.

Shape legend: B rows, H heads, Hk key/value heads, Tq queries, Tk keys, D and Dv head sizes, N real tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .layout import outside_graph
from .plan import MaskPlan


def reference_attention(
    query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, scaling: float, dropout: float = 0.0
) -> tuple[Tensor, Tensor]:
    """softmax(Q K^T * scaling) V over the allowed pairs ("Attention Is All You Need", arXiv:1706.03762, eq. 1).

    Args:
        query (`Tensor` of shape `(B, H, Tq, D)`): Queries.
        key (`Tensor` of shape `(B, Hk, Tk, D)`): Keys; Hk divides H.
        value (`Tensor` of shape `(B, Hk, Tk, Dv)`): Values.
        allowed (bool `Tensor` of shape `(B, 1 | H, Tq, Tk)`): Which query may see which key.
        scaling (`float`): Factor of the scores.
        dropout (`float`, *optional*, defaults to 0.0): Probability with which a weight is dropped.

    Returns:
        `(output (B, H, Tq, Dv), weights (B, H, Tq, Tk))`; exactly 0 for a query with no key to see.
    """
    repeats = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(repeats, dim=1) for states in (key, value))
    scores = torch.matmul(query, key.transpose(-1, -2)) * scaling
    scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    weights = weights * allowed.any(-1, keepdim=True)
    weights = nn.functional.dropout(weights, p=dropout, training=dropout > 0)
    return torch.matmul(weights, value), weights


@outside_graph
def attend(
    query: Tensor, key: Tensor, value: Tensor, plan: MaskPlan, *, scaling: float, dropout: float = 0.0
) -> tuple[Tensor, Tensor]:
    """[`reference_attention`] on flat `(1, H, N, D)` tensors; weights `(B, H, Tq, Tk)` in the batch's layout."""
    output, weights = reference_attention(
        plan.layout.unflatten_heads(query),
        plan.key_layout.unflatten_heads(key),
        plan.key_layout.unflatten_heads(value),
        plan.dense,
        scaling,
        dropout,
    )
    return plan.layout.flatten_heads(output), weights
