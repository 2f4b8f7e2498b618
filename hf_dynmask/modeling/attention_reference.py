"""Masked attention as the textbook writes it: dense, padded, readable. Every other implementation is tested against it.

Shape legend: B rows, H heads, Hk key/value heads, Tq queries, Tk keys, D and Dv head sizes, N real tokens.
"""

from __future__ import annotations

from torch import Tensor

from .layout import eager_only, in_heads, packed
from .plan import MaskPlan
from .softmax import softmax_attention


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
    """[`softmax_attention`] on packed `(N, H, D)` tensors; weights `(B, H, T, T)` in the batch's layout.

    With `apply_mask_to="weights"` the softmax runs over all tokens of a sequence, and the mask sets weights to 0.
    """
    rows = plan.in_rows
    output, weights = softmax_attention(
        rows.layout.unflatten_heads(in_heads(query)),
        rows.key_layout.unflatten_heads(in_heads(key)),
        rows.key_layout.unflatten_heads(in_heads(value)),
        rows.dense(query.shape[1]),
        scaling,
        dropout,
        rows.same_sequence if apply_mask_to == "weights" else None,
    )
    return packed(rows.layout.flatten_heads(output)), weights if rows is plan else plan.in_batch(weights)
