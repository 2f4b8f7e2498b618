"""PyTorch's `scaled_dot_product_attention` with a dense mask on padded tensors: what the stock models run."""

from __future__ import annotations

from torch import Tensor, nn

from .layout import eager_only, in_heads, packed
from .plan import MaskPlan


@eager_only
def attend(
    query: Tensor, key: Tensor, value: Tensor, plan: MaskPlan, *, scaling: float, dropout: float = 0.0
) -> tuple[Tensor, None]:
    """Attention on packed `(N, H, D)` tensors; weights are not computed."""
    plan = plan.in_rows
    key, value = (plan.key_layout.unflatten_heads(in_heads(states)) for states in (key, value))
    return attend_rows(query, key, value, plan, scaling=scaling, dropout=dropout), None


@eager_only
def attend_rows(
    query: Tensor, key: Tensor, value: Tensor, plan: MaskPlan, *, scaling: float, dropout: float = 0.0
) -> Tensor:
    """Attention `(N, H, Dv)` of packed queries `(N, H, D)` to keys and values `(B, Hk, T, D)`, one sequence a row."""
    output = nn.functional.scaled_dot_product_attention(
        plan.layout.unflatten_heads(in_heads(query)),
        key,
        value,
        attn_mask=plan.dense(query.shape[1]),
        dropout_p=dropout,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return packed(plan.layout.flatten_heads(output))
