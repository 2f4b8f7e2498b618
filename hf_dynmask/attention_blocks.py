"""Block-sparse `scaled_dot_product_attention` on any device: computes the tiles of a [`MaskPlan`], nothing else.

Shape legend: n sequences of a group, L tokens each, H heads, N real tokens, D and Dv head sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .layout import owners
from .plan import GroupPlan, MaskPlan, Tile

# Lengths are rounded up to whole vectors: the fused CPU kernel falls back to scalar code on a ragged end, and sequences
# of nearly equal lengths can share a call.
VECTOR = 16


class Places(NamedTuple):
    """A rearrangement of flat tokens: `taken` is the token at each place, `place_of` the place of each token."""

    taken: Tensor
    place_of: Tensor


class Work(NamedTuple):
    """Groups to attend to, and where each side's tokens stand for them (`None`: in flat order)."""

    groups: list[GroupPlan]
    queries: Places | None
    keys: Places | None


def attend(
    query: Tensor, key: Tensor, value: Tensor, plan: MaskPlan, *, scaling: float, dropout: float = 0.0
) -> tuple[Tensor, None]:
    """Attention on flat `(1, H, N, D)` tensors; weights are not computed."""
    groups, queries, keys = plan.derived(_work)
    q_NHD = _token_major(query, queries)
    k_NHD, v_NHD = _token_major(key, keys), _token_major(value, keys)
    q_sizes = [group.count * group.queries for group in groups]
    k_sizes = [group.count * group.keys for group in groups]
    pieces = zip(groups, _split(q_NHD, q_sizes), _split(k_NHD, k_sizes), _split(v_NHD, k_sizes), strict=True)
    outputs = [_attend_group(group, q, k, v, scaling, dropout) for group, q, k, v in pieces]
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    if queries is not None:
        output = output.index_select(0, queries.place_of)
    return output.transpose(0, 1).unsqueeze(0), None


def _work(plan: MaskPlan) -> Work:
    """The plan's groups, those that one tile covers joined with their neighbours of nearly the same size.

    A joined sequence is filled up with copies of its last token, which no query sees.
    """
    buckets = [[group for _, group in run] for _, run in groupby(enumerate(plan.groups), key=_bucket)]
    joined = [_joined(bucket) for bucket in buckets]
    pairs = [(group, whole) for bucket, whole in zip(buckets, joined, strict=True) for group in bucket]
    q_order, k_order = plan.token_orders
    queries = keys = _places(q_order, [(group.count, group.queries, whole.queries) for group, whole in pairs])
    if plan.key_layout is not plan.layout:
        keys = _places(k_order, [(group.count, group.keys, whole.keys) for group, whole in pairs])
    return Work(joined or [GroupPlan(0, 0, 0, ())], queries, keys)


def _bucket(numbered: tuple[int, GroupPlan]) -> tuple[int, ...]:
    """Neighbouring groups with equal buckets are joined."""
    number, group = numbered
    return (_filled(group.queries), _filled(group.keys)) if group.is_whole else (-1, number)


def _filled(size: int) -> int:
    return -(-size // VECTOR) * VECTOR


def _joined(groups: list[GroupPlan]) -> GroupPlan:
    first = groups[0]
    if not first.is_whole:
        return first
    queries, keys = _filled(first.queries), _filled(first.keys)
    causal = first.tiles[0].causal
    allowed = None if causal else _joined_mask(groups, queries, keys)  # a lower triangle ends before the copies
    tile = Tile(slice(0, queries), slice(0, keys), allowed, causal)
    return GroupPlan(sum(group.count for group in groups), queries, keys, (tile,))


def _joined_mask(groups: list[GroupPlan], queries: int, keys: int) -> Tensor | None:
    """Bool `(n, 1 | H, 1 | queries, keys)` over the sequences of several whole groups; `None` where all is allowed."""
    masks = [group.tiles[0].allowed for group in groups]
    if all(mask is None for mask in masks):
        if all(group.keys == keys for group in groups):
            return None
        ends = torch.tensor([group.keys for group in groups for _ in range(group.count)])
        return (torch.arange(keys) < ends[:, None])[:, None, None]
    filled = []
    for group, mask in zip(groups, masks, strict=True):
        if mask is None:
            mask = torch.ones(1, 1, group.queries, group.keys, dtype=torch.bool)
        extra = (0, keys - group.keys, 0, queries - group.queries)
        filled.append(nn.functional.pad(mask, extra, value=False).expand(group.count, -1, -1, -1))
    heads = max(mask.shape[1] for mask in filled)
    return torch.cat([mask.expand(-1, heads, -1, -1) for mask in filled])


def _places(order: Tensor | None, runs: list[tuple[int, int, int]]) -> Places | None:
    """Places of tokens in flat `order` when sequences, in runs of (count, size, filled size), are filled up."""
    if all(size == filled for _, size, filled in runs):
        return None if order is None else Places(order, order.argsort())
    sizes, filled = torch.tensor([run[1:] for run in runs for _ in range(run[0])]).unbind(1)
    tokens, room = int(sizes.sum()), int(filled.sum())
    shift = (filled - sizes).cumsum(0) - (filled - sizes)  # places gained before each sequence
    place_of = torch.arange(tokens) + shift[owners(sizes, tokens)]
    owner = owners(filled, room)
    taken = torch.minimum(torch.arange(room) - shift[owner], (sizes.cumsum(0) - 1)[owner])
    return Places(taken, place_of) if order is None else Places(order[taken], place_of[order.argsort()])


class _Take(torch.autograd.Function):
    """`index_select` in which only the copy of a token at `place_of` has a gradient: no query sees the others."""

    @staticmethod
    def forward(ctx, states: Tensor, places: Places) -> Tensor:
        ctx.place_of = places.place_of
        return states.index_select(0, places.taken)

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        return grad_output.index_select(0, ctx.place_of), None


def _token_major(states: Tensor, places: Places | None) -> Tensor:
    """`(1, H, N, D)` as `(N, H, D)`, rearranged."""
    states = states[0].transpose(0, 1)
    return states if places is None else _Take.apply(states, places)


def _split(states: Tensor, sizes: list[int]) -> Sequence[Tensor]:
    return (states,) if len(sizes) == 1 else states.split(sizes)


def _attend_group(group: GroupPlan, q: Tensor, k: Tensor, v: Tensor, scaling: float, dropout: float) -> Tensor:
    """Attention `(n * L, H, Dv)` of a group's sequences from its tokens `(n * L, H, D)`."""
    query, key, value = (
        states.view(group.count, length, *states.shape[1:]).transpose(1, 2)
        for states, length in ((q, group.queries), (k, group.keys), (v, group.keys))
    )
    if group.is_whole:
        output = attend_tile(query, key, value, group.tiles[0], scaling, dropout)
    else:
        output = _Tiles.apply(query, key, value, group.tiles, scaling, dropout)
    return output.transpose(1, 2).flatten(0, 1)


def attend_tile(query: Tensor, key: Tensor, value: Tensor, tile: Tile, scaling: float, dropout: float) -> Tensor:
    """Attention `(n, H, Lq, Dv)` of one tile's queries `(n, H, Lq, D)` over its keys `(n, Hk, Lk, D)`."""
    if _is_slow_in_kernel(query, dropout):
        return _softmax_attention(query, key, value, tile, scaling, dropout)
    return nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=tile.allowed,
        dropout_p=dropout,
        is_causal=tile.causal,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _is_slow_in_kernel(query: Tensor, dropout: float) -> bool:
    """Whether matrix products beat the fused CPU kernel, whose half-precision backward pass is several times slower."""
    half = query.dtype in (torch.bfloat16, torch.float16)
    return query.device.type == "cpu" and (dropout > 0 or (half and query.requires_grad))


def _softmax_attention(query: Tensor, key: Tensor, value: Tensor, tile: Tile, scaling: float, dropout: float) -> Tensor:
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    scores = torch.matmul(query * scaling, key.transpose(-1, -2))
    allowed = tile.allowed
    if tile.causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if allowed is not None:
        scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, dim=-1)
    if allowed is not None:
        weights = weights * allowed.any(-1, keepdim=True)
    return torch.matmul(nn.functional.dropout(weights, p=dropout, training=dropout > 0), value)


class _Tiles(torch.autograd.Function):
    """Several tiles of one group. Each tile is a small graph of its own, whose gradients are added in place.

    Slicing the keys in the outer graph would give every tile a gradient of full length; here memory and time grow with
    the tiles alone.
    """

    @staticmethod
    def forward(
        ctx, query: Tensor, key: Tensor, value: Tensor, tiles: tuple[Tile, ...], scaling: float, dropout: float
    ):
        n, heads, length, _ = query.shape
        output = query.new_zeros(n, length, heads, value.shape[-1]).transpose(1, 2)
        ctx.graphs = []
        for tile in tiles:
            views = query[:, :, tile.queries], key[:, :, tile.keys], value[:, :, tile.keys]
            q, k, v = (x.detach().requires_grad_(need) for x, need in zip(views, ctx.needs_input_grad, strict=False))
            with torch.set_grad_enabled(any(ctx.needs_input_grad)):
                part = attend_tile(q, k, v, tile, scaling, dropout)
            output[:, :, tile.queries] = part.detach()
            ctx.graphs.append((tile, (q, k, v), part))
        ctx.shapes = query.shape, key.shape, value.shape
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor):
        grads = [
            grad_output.new_zeros(shape) if needs else None
            for shape, needs in zip(ctx.shapes, ctx.needs_input_grad, strict=False)
        ]
        for tile, leaves, part in ctx.graphs:
            wanted = [leaf for leaf in leaves if leaf.requires_grad]
            parts = iter(torch.autograd.grad(part, wanted, grad_output[:, :, tile.queries], retain_graph=True))
            for grad, places in zip(grads, (tile.queries, tile.keys, tile.keys), strict=True):
                if grad is None:
                    continue
                if isinstance(places, slice):
                    grad[:, :, places] += next(parts)
                else:
                    grad.index_add_(2, places, next(parts))
        return *grads, None, None, None
