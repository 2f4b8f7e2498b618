"""`dynmask_attention`: one operation on flat tensors, with several implementations that agree with the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .attention_banded import attend as attend_banded
from .attention_banded import unsupported as unsupported_by_banded
from .attention_blocks import attend as attend_blocks
from .attention_flex import attend as attend_flex
from .attention_flex import unsupported as unsupported_by_flex
from .attention_reference import attend as attend_reference
from .attention_sdpa import attend as attend_sdpa
from .attention_sdpa import attend_rows as attend_rows
from .attention_varlen import attend as attend_varlen
from .attention_varlen import unsupported as unsupported_by_varlen
from .layout import SequenceLayout, eager_only, in_heads, packed
from .masks import Mask
from .plan import MaskPlan


class Implementation(NamedTuple):
    """One way to compute attention.

    Attributes:
        attend (`Callable`):
            `(query, key, value, plan, *, scaling, dropout) -> (output, weights | None)`, on packed `(N, H, D)` tensors.
        unsupported (`Callable`):
            `(plan, query, key, value, dropout) -> str | None`: the reason why it cannot be used; `None` if it can.
        takes_tails (`bool`): Whether it accepts layouts with a tail, whose lengths the host does not know.
        is_traced (`bool`): Whether a graph may trace it. The others are called as an opaque operator.
    """

    attend: Callable[..., tuple[Tensor, Tensor | None]]
    unsupported: Callable[[MaskPlan, Tensor, Tensor, Tensor, float], str | None] = lambda *_: None
    takes_tails: bool = False
    is_traced: bool = False


IMPLEMENTATIONS = {
    "varlen": Implementation(attend_varlen, unsupported_by_varlen, takes_tails=True, is_traced=True),
    "banded": Implementation(attend_banded, unsupported_by_banded, takes_tails=True, is_traced=True),
    "flex": Implementation(attend_flex, unsupported_by_flex, takes_tails=True),
    "blocks": Implementation(attend_blocks),
    "reference": Implementation(attend_reference),
    "sdpa": Implementation(attend_sdpa),
}
CHOSEN_ON_CUDA = ("varlen", "banded", "flex")  # `"auto"` takes the first of these that can be used
FEW_QUERIES = 16  # columns of queries up to which keys and values stay in the rows of a cache
CUDA_LIKE = ("cuda", "meta")  # on `meta`, `"auto"` chooses as on CUDA


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
    apply_mask_to: str = "scores",
    key_scores: Tensor | None = None,
    implementation: str = "auto",
) -> Tensor:
    """Attention over the real tokens of a batch, restricted by a mask expression.

    Args:
        query (`Tensor` of shape `(1, H, N, D)`): Queries, flat, in the order of `layout.flatten`.
        key (`Tensor` of shape `(1, Hk, Nk, D)`): Keys; Hk divides H (grouped-query attention).
        value (`Tensor` of shape `(1, Hk, Nk, Dv)`): Values.
        mask (`Mask`, `str` or `MaskPlan`):
            The mask expression, its text, or a plan, which has fields of its own.
        layout (`SequenceLayout`): Layout of the queries.
        key_layout (`SequenceLayout`, *optional*):
            Layout of the keys, with as many sequences as `layout`. `None`: the keys are the tokens of the queries.
        fields (`dict[str, Tensor]`, *optional*): The fields that the mask reads, in the batch's layout.
        scaling (`float`, *optional*): Factor applied to the scores. `None`: `D ** -0.5`.
        dropout (`float`, *optional*, defaults to 0.0): Dropout probability of the attention weights.
        apply_mask_to (`str`, *optional*, defaults to `"scores"`):
            `"scores"` masks the scores before the softmax. `"weights"` masks the weights after a softmax over the whole
            sequence, without renormalising them (reference only).
        key_scores (`Tensor` of shape `(1, 1 | Hk, Nk)`, *optional*):
            Learned scores of the keys, for masks with `topk`, which chooses keys by them. They are also added to the
            attention scores, through which they receive a gradient.
        implementation (`str`, *optional*, defaults to `"auto"`):
            `"blocks"` (block-sparse, any device), `"varlen"` (fused kernels over packed sequences: CUDA, masks that are
            `full`, `causal` or, in half precision, windows), `"banded"` (windows by plain matrix products, any device),
            `"flex"` (FlexAttention: CUDA, no dropout, no `topk`), `"reference"` (dense, padded), `"sdpa"` (dense mask,
            padded), or `"auto"`: on CUDA the first of varlen, banded and flex that can be used, otherwise blocks.

    Returns:
        `Tensor` of shape `(1, H, N, Dv)`, flat. A query without any allowed key gives exactly 0.

    Raises:
        ValueError: The implementation is unknown, or does not support the mask, the device or the dtype; the shapes or
            dtypes of the tensors do not match each other or the layouts; `dropout` is not a probability; a field that
            the mask reads is missing or has the wrong shape.
    """
    for name, given in (("layout", layout), ("key_layout", layout if key_layout is None else key_layout)):
        if not isinstance(given, SequenceLayout):
            raise ValueError(f"`{name}` must be a SequenceLayout; got {type(given).__name__}")
    plan = mask if isinstance(mask, MaskPlan) else MaskPlan(mask, layout, key_layout, fields=fields)
    if plan.layout is not layout:
        raise ValueError("`layout` must be the one that the plan was made for; got another")
    _check_states(query, key, value, plan)
    if not 0 <= dropout <= 1:
        raise ValueError(f"`dropout` must be from 0 to 1; got {dropout}")
    factor = query.shape[-1] ** -0.5 if scaling is None else scaling
    output, _ = attend(
        packed(query),
        packed(key),
        packed(value),
        plan,
        scaling=factor,
        dropout=dropout,
        apply_mask_to=apply_mask_to,
        key_scores=key_scores,
        implementation=implementation,
    )
    return in_heads(output)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: MaskPlan,
    *,
    scaling: float,
    dropout: float = 0.0,
    apply_mask_to: str = "scores",
    key_scores: Tensor | None = None,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """[`dynmask_attention`] with a plan, on packed `(N, H, D)` tensors.

    Returns the output `(N, H, Dv)` and the weights `(B, H, T, T)`, which only the reference computes.
    """
    heads, explicit = query.shape[1], plan.fields.tables.get("attention_mask")
    if explicit is not None and explicit.shape[1] not in (1, heads):
        raise ValueError(f"`attention_mask` must have 1 or {heads} heads; got {explicit.shape[1]}")
    if query.device.type != "cpu":  # on a CPU, PyTorch's functions apply autocast themselves
        query, key, value = autocast(query, key, value)
    if key_scores is not None:
        query, key, plan = _with_key_scores(query, key, plan, key_scores, scaling)
    elif plan.reads_scores:
        raise ValueError(f"the mask '{plan.mask}' needs `key_scores`, which `topk` chooses by; got none")
    if apply_mask_to not in ("scores", "weights"):
        raise ValueError(f"`apply_mask_to` must be 'scores' or 'weights'; got {apply_mask_to!r}")
    if apply_mask_to == "weights":
        if implementation not in ("auto", "reference"):
            raise ValueError(f"`apply_mask_to='weights'` needs the implementation 'reference'; got {implementation!r}")
        attend_weights = partial(attend_reference, apply_mask_to="weights")
        return _without_tail(attend_weights, query, key, value, plan, scaling, dropout)
    return _attend(implementation, query, key, value, plan, scaling, dropout)


def autocast(*states: Tensor) -> tuple[Tensor, ...]:
    """Casts queries, keys and values to the autocast dtype, if autocast is on. The packed kernels do not do so."""
    device = states[0].device
    return tuple(x.to(torch.get_autocast_dtype(device.type)) for x in states) if _is_autocast(device) else states


def _is_autocast(device: torch.device) -> bool:
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


@eager_only
def _attend(
    implementation: str, query: Tensor, key: Tensor, value: Tensor, plan: MaskPlan, scaling: float, dropout: float
) -> tuple[Tensor, Tensor | None]:
    if implementation == "auto" and query.device.type not in CUDA_LIKE:
        implementation = "blocks"
    elif implementation == "auto":
        implementation, _ = auto_choice(plan, query, key, value, dropout)
    else:
        _check_supported(implementation, plan, query, key, value, dropout)
    chosen = IMPLEMENTATIONS[implementation]
    if chosen.takes_tails or not (plan.layout.has_tail or plan.key_layout.has_tail):
        return chosen.attend(query, key, value, plan, scaling=scaling, dropout=dropout)
    return _without_tail(chosen.attend, query, key, value, plan, scaling, dropout)


def _without_tail(
    function: Callable[..., tuple[Tensor, Tensor | None]],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: MaskPlan,
    scaling: float,
    dropout: float,
) -> tuple[Tensor, Tensor | None]:
    """Calls `function` without the tails of the layouts; its output is padded with 0 in the tail."""
    trimmed = plan.trimmed
    if trimmed is plan:
        return function(query, key, value, plan, scaling=scaling, dropout=dropout)
    tokens, keys = trimmed.layout.num_tokens, trimmed.key_layout.num_tokens
    output, weights = function(query[:tokens], key[:keys], value[:keys], trimmed, scaling=scaling, dropout=dropout)
    return nn.functional.pad(output, (0, 0, 0, 0, 0, query.shape[0] - tokens)), weights


def auto_choice(
    plan: MaskPlan, query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0
) -> tuple[str, dict[str, str]]:
    """The implementation that `"auto"` chooses, and for each one that it rejects before it the reason."""
    rejected = {}
    for name in CHOSEN_ON_CUDA:
        reason = None if query.device.type in CUDA_LIKE else f"chosen only on CUDA devices; got '{query.device.type}'"
        reason = reason or IMPLEMENTATIONS[name].unsupported(plan, query, key, value, dropout)
        if reason is None:
            return name, rejected
        rejected[name] = reason
    return "blocks", rejected


def stays_in_rows(plan: MaskPlan, implementation: str, apply_mask_to: str) -> bool:
    """Whether keys and values of a cache stay in rows for [`attend_rows`]. Otherwise they are packed for [`attend`]."""
    is_plain = (implementation, apply_mask_to) == ("auto", "scores") and not plan.reads_scores
    return is_plain and plan.layout.shape[1] <= FEW_QUERIES and plan.in_rows is plan


def _check_supported(name: str, plan: MaskPlan, query: Tensor, key: Tensor, value: Tensor, dropout: float) -> None:
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"`implementation` must be one of {_listed(['auto', *IMPLEMENTATIONS])}; got {name!r}")
    reason = IMPLEMENTATIONS[name].unsupported(plan, query, key, value, dropout)
    if reason is not None:
        usable = [
            other for other, it in IMPLEMENTATIONS.items() if not it.unsupported(plan, query, key, value, dropout)
        ]
        raise ValueError(f"`implementation` {name!r} cannot be used here: {reason}. Those that can: {_listed(usable)}")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))


def _with_key_scores(
    query: Tensor, key: Tensor, plan: MaskPlan, key_scores: Tensor, scaling: float
) -> tuple[Tensor, Tensor, MaskPlan]:
    """Appends the scores to query and key as one more channel, so that the attention scores include them.

    Returns the query, the key, and the plan with the scores by which `topk` chooses.
    """
    tokens, key_heads, _ = key.shape
    score_heads = key_scores.shape[1] if key_scores.dim() == 3 else 0
    if tuple(key_scores.shape) != (1, score_heads, tokens) or score_heads not in (1, key_heads):
        raise ValueError(f"`key_scores` must have shape (1, 1 | {key_heads}, {tokens}); got {tuple(key_scores.shape)}")
    if "key_scores" not in plan.mask.fields:
        raise ValueError(f"`key_scores` must come with a mask that has `topk`; got '{plan.mask}'")
    scores = key_scores.expand(1, key_heads, tokens)
    channels = query.shape[-1]
    extra = -(channels + 1) % 8 + 1  # kernels need head sizes that are multiples of 8
    ones = nn.functional.pad(query.new_full((*query.shape[:2], 1), 1 / scaling), (0, extra - 1))
    query = torch.cat([query, ones], dim=-1)
    channel = scores[0].T.unsqueeze(-1).to(key.dtype)
    key = torch.cat([key, nn.functional.pad(channel, (0, extra - 1))], dim=-1)
    return query, key, plan.with_key_scores(scores.repeat_interleave(query.shape[1] // key_heads, dim=1))


def _check_states(query: Tensor, key: Tensor, value: Tensor, plan: MaskPlan) -> None:
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
    dtypes = [states.dtype for states in (query, key, value)]
    is_one = len(set(dtypes)) == 1 or _is_autocast(query.device)
    if not (is_one and all(dtype.is_floating_point for dtype in dtypes)):
        raise ValueError(
            f"`query`, `key` and `value` must have one floating-point dtype; got {', '.join(map(str, dtypes))}"
        )
