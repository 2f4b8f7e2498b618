"""The softmax over allowed pairs, written out, for the implementations that hold all scores in memory.

Shape legend: B rows, H heads, Hk key/value heads, Tq queries, Tk keys, D and Dv head sizes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .layout import SequenceLayout


def softmax_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    allowed: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    softmax_over: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(Q K^T * scaling) V over the allowed pairs ("Attention Is All You Need", arXiv:1706.03762, eq. 1).

    Args:
        query (`Tensor` of shape `(B, H, Tq, D)`): Queries.
        key (`Tensor` of shape `(B, Hk, Tk, D)`): Keys; Hk divides H.
        value (`Tensor` of shape `(B, Hk, Tk, Dv)`): Values.
        allowed (bool `Tensor` of shape `(B, 1 | H, Tq, Tk)`, *optional*): Which query may see which key. `None`: all.
        scaling (`float`): Factor applied to the scores.
        dropout (`float`, *optional*, defaults to 0.0): Dropout probability of the weights.
        softmax_over (bool `Tensor` of shape `(B, 1 | H, Tq, Tk)`, *optional*):
            Pairs that the softmax runs over; `allowed` then masks its weights. `None`: the allowed pairs.

    Returns:
        `(output (B, H, Tq, Dv), weights (B, H, Tq, Tk))`; exactly 0 for a query without any allowed key.
    """
    key, value = (repeated(states, query.shape[1]) for states in (key, value))
    scores = torch.matmul(query * scaling, key.transpose(-1, -2))
    weights = masked_softmax(scores, allowed if softmax_over is None else softmax_over)
    if softmax_over is not None and allowed is not None:
        weights = masked_weights(weights, allowed)
    return torch.matmul(nn.functional.dropout(weights, p=dropout, training=dropout > 0), value), weights


def repeated(states: Tensor, heads: int) -> Tensor:
    """Keys or values `(B, Hk, Tk, D)` repeated for each of `heads` query heads."""
    return states if states.shape[1] == heads else states.repeat_interleave(heads // states.shape[1], dim=1)


def masked_softmax(scores: Tensor, allowed: Tensor | None, sinks: Tensor | None = None) -> Tensor:
    """Softmax of `scores (B, H, Tq, Tk)` over the allowed keys of each query; 0 for a query without any.

    `sinks (H,)` are the scores of an additional key (attention sink), whose weight is not returned.
    """
    if allowed is not None:
        scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(scores.dtype)
    if sinks is not None:
        weights = weights[..., :-1]
    return weights if allowed is None else weights * allowed.any(-1, keepdim=True)


def masked_weights(weights: Tensor, allowed: Tensor) -> Tensor:
    """Attention weights `(..., Tq, Tk)`, set to 0 for keys that are not allowed and unchanged for the others."""
    return weights * allowed


def without_keys(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention `(N, H, Dv)` of packed queries `(N, H, D)` without any query or without any key: 0, with gradients."""
    return query.new_zeros(*query.shape[:2], value.shape[2]) + 0 * (query.sum() + key.sum() + value.sum())


def without_poison(
    query: Tensor, key: Tensor, value: Tensor, layout: SequenceLayout, key_layout: SequenceLayout
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query, key and value `(N, H, D)`, set to 0 in sequences that hold NaN or infinity; and bool `(N, 1, 1)`: the
    query tokens of these sequences.

    If one matrix product covers several sequences, a NaN would spread to the others even with a weight of 0.
    """
    of_queries, of_keys = layout.sequence_ids, key_layout.sequence_ids
    sides = (query, of_queries), (key, of_keys), (value, of_keys)
    poisoned = torch.zeros(layout.num_sequences + 1, dtype=torch.long, device=query.device)
    for states, sequence in sides:
        poisoned = poisoned.index_add(0, sequence, (~states.isfinite()).flatten(1).any(1).long())
    poisoned = poisoned > 0
    clean = [states.masked_fill(poisoned[sequence][:, None, None], 0) for states, sequence in sides]
    return clean[0], clean[1], clean[2], poisoned[of_queries][:, None, None]
