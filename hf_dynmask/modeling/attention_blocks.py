"""Block-sparse `scaled_dot_product_attention` on any device: computes the tiles of a [`MaskPlan`], nothing else.

Shape legend: n sequences of a group, L tokens each, H heads, N real tokens, D and Dv head sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .layout import eager_only
from .plan import GroupPlan, MaskPlan, Tile
from .softmax import softmax_attention

# Sequences up to LONGEST_FILLED tokens are filled up to whole vectors of VECTOR tokens: those of nearly equal lengths
# then share a call, and the fused CPU kernel, which handles a ragged end in slow scalar code, has none. For longer ones
# the copying would cost what it gains, except in half precision, where a ragged end costs most.
VECTOR = 16
LONGEST_FILLED = 64
LONGEST_FILLED_HALF = 512
SMALL = 2**14  # numbers; of fewer PyTorch's own gradient of a gather takes less time than a function in Python
HALF = (torch.bfloat16, torch.float16)


class Bucket(NamedTuple):
    """Neighbouring groups that are attended to as one.

    Attributes:
        group (`GroupPlan`): The groups joined, sizes filled up.
        mask_of (`Callable`): Mask of one of the group's tiles, `None` where all its pairs are allowed or it is causal.
        sizes (`list[tuple[int, int]]`): Queries and keys of each of its sequences, before they are filled up.
    """

    group: GroupPlan
    mask_of: Callable[[Tile], Tensor | None]
    sizes: list[tuple[int, int]]


class Side(NamedTuple):
    """How the tokens of a side, queries or keys, come to their buckets and back.

    Attributes:
        sizes (`list[int]`): Places of each bucket, P in all.
        taken (`Tensor` of shape `(P,)`, *optional*): The token at each place. Sequences are filled up with copies of
            their last token, which no query sees. `None`: tokens stand as they are to stand.
        place_of (`Tensor` of shape `(N,)`, *optional*): The place of each token.
    """

    sizes: list[int]
    taken: Tensor | None = None
    place_of: Tensor | None = None

    @classmethod
    def of(
        cls, sizes: list[int], real: list[int], filled: list[int], order: np.ndarray | None, device: torch.device
    ) -> Side:
        """Of buckets of so many places; `real` tokens of each sequence in turn are filled up. `order (N,)` is the token
        at each place before that."""
        if order is None and real == filled:
            return cls(sizes)
        own, to = np.array(real, dtype=np.int64), np.array(filled, dtype=np.int64)
        starts, starts_filled = own.cumsum() - own, to.cumsum() - to
        inside = np.arange(to.sum()) - np.repeat(starts_filled, to)
        taken = np.minimum(inside, np.repeat(own - 1, to)) + np.repeat(starts, to)
        place_of = np.repeat(starts_filled - starts, own) + np.arange(own.sum())
        if order is not None:
            taken, in_order = order[taken], place_of
            place_of = np.empty_like(in_order)
            place_of[order] = in_order
        return cls(sizes, *(torch.from_numpy(places).to(device) for places in (taken, place_of)))

    def take(self, states: Tensor) -> tuple[Tensor, ...]:
        """`(N, H, D)` as what stands at the places of each bucket, `(places, H, D)`."""
        if self.taken is not None:
            is_small = states.numel() <= SMALL or not states.requires_grad
            states = states.index_select(0, self.taken) if is_small else _Take.apply(states, self.taken, self.place_of)
        return states.split(self.sizes) if len(self.sizes) > 1 else (states,)

    def put_back(self, states: list[Tensor]) -> Tensor:
        """The inverse of [`take`]."""
        tokens = states[0] if len(states) == 1 else torch.cat(states)
        if self.place_of is not None:
            is_small = tokens.numel() <= SMALL or not tokens.requires_grad
            tokens = tokens.index_select(0, self.place_of) if is_small else _PutBack.apply(tokens, self.place_of)
        return tokens


class _Take(torch.autograd.Function):
    """`index_select` in which only the copy of a token at `place_of` has a gradient: no query sees the others."""

    @staticmethod
    def forward(ctx, states: Tensor, taken: Tensor, place_of: Tensor) -> Tensor:
        ctx.place_of = place_of
        return states.index_select(0, taken)

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        return grad_output.index_select(0, ctx.place_of), None, None


class _PutBack(torch.autograd.Function):
    """`index_select` of places that differ: its gradient is a copy, where that of `index_select` would add up."""

    @staticmethod
    def forward(ctx, states: Tensor, place_of: Tensor) -> Tensor:
        ctx.place_of, ctx.places = place_of, states.shape[0]
        return states.index_select(0, place_of)

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        places = grad_output.new_zeros(ctx.places, *grad_output.shape[1:])
        return places.index_copy_(0, ctx.place_of, grad_output), None


@eager_only
def attend(
    query: Tensor, key: Tensor, value: Tensor, plan: MaskPlan, *, scaling: float, dropout: float = 0.0
) -> tuple[Tensor, None]:
    """Attention on packed `(N, H, D)` tensors; weights are not computed."""
    runs = plan.by_heads(query.shape[1])
    if len(runs) > 1:
        repeats = query.shape[1] // key.shape[1]
        key, value = (states.repeat_interleave(repeats, dim=1) for states in (key, value))
        outputs = [
            attend(query[:, run], key[:, run], value[:, run], part, scaling=scaling, dropout=dropout)[0]
            for run, part in runs
        ]
        return torch.cat(outputs, dim=1), None
    plan = runs[0][1]
    in_half_kernel = query.device.type == "cpu" and query.dtype in HALF and not _is_slow_in_kernel(query, dropout)
    buckets, queries, keys = plan.derived(_buckets, LONGEST_FILLED_HALF if in_half_kernel else LONGEST_FILLED)
    pieces = zip(buckets, queries.take(query), keys.take(key), keys.take(value), strict=True)
    return queries.put_back([_attend_bucket(*piece, scaling, dropout) for piece in pieces]), None


def _buckets(plan: MaskPlan, longest: int) -> tuple[list[Bucket], Side, Side]:
    """The plan's groups, and where their queries and keys stand; groups of up to `longest` tokens that one tile covers
    are joined with neighbours that fill up to the same size."""

    def filled_sizes(numbered: tuple[int, GroupPlan]) -> tuple[int, int]:
        number, group = numbered
        joins = group.is_whole and max(group.queries, group.keys) <= longest
        return (_filled(group.queries), _filled(group.keys)) if joins else (-1, number)  # -1: stays alone

    runs = ((sizes, [group for _, group in run]) for sizes, run in groupby(enumerate(plan.groups), key=filled_sizes))
    device = plan.layout.device
    buckets = [_alone(plan, run[0]) if sizes[0] < 0 else _joined(plan, run, *sizes, device) for sizes, run in runs]
    buckets = buckets or [_alone(plan, GroupPlan(0, 0, 0))]
    return buckets, _side(plan, buckets, 0), _side(plan, buckets, 1)


def _side(plan: MaskPlan, buckets: list[Bucket], side: int) -> Side:
    """The queries (0) or the keys (1)."""
    of_group = [(bucket.group.queries, bucket.group.keys)[side] for bucket in buckets]
    counts = [bucket.group.count for bucket in buckets]
    real = [sizes[side] for bucket in buckets for sizes in bucket.sizes]
    filled = [size for size, count in zip(of_group, counts, strict=True) for _ in range(count)]
    places = [size * count for size, count in zip(of_group, counts, strict=True)]
    return Side.of(places, real, filled, plan.token_orders[side], plan.layout.device)


def _filled(size: int) -> int:
    return -(-size // VECTOR) * VECTOR


def _alone(plan: MaskPlan, group: GroupPlan) -> Bucket:
    return Bucket(group, partial(plan.tile_mask, group), [(group.queries, group.keys)] * group.count)


def _joined(plan: MaskPlan, groups: list[GroupPlan], queries: int, keys: int, device: torch.device) -> Bucket:
    causal = groups[0].tiles[0].causal
    # A lower triangle ends before the copies.
    mask = None if causal else _joined_mask(plan, groups, queries, keys, device)
    tile = Tile(slice(0, queries), (slice(0, keys),), mask is not None, causal)
    sizes = [(group.queries, group.keys) for group in groups for _ in range(group.count)]
    return Bucket(GroupPlan(len(sizes), queries, keys, tiles=(tile,)), lambda _: mask, sizes)


def _joined_mask(
    plan: MaskPlan, groups: list[GroupPlan], queries: int, keys: int, device: torch.device
) -> Tensor | None:
    """Bool `(n, 1 | H, 1 | queries, keys)` over the sequences of several whole groups; `None` where all is allowed."""
    masks = [plan.tile_mask(group, group.tiles[0]) for group in groups]
    if all(mask is None for mask in masks):
        if all(group.keys == keys for group in groups):
            return None
        ends = torch.tensor([group.keys for group in groups for _ in range(group.count)], device=device)
        return (torch.arange(keys, device=device) < ends[:, None])[:, None, None]
    filled = []
    for group, mask in zip(groups, masks, strict=True):
        if mask is None:
            mask = torch.ones(1, 1, group.queries, group.keys, dtype=torch.bool, device=device)
        extra = (0, keys - group.keys, 0, queries - group.queries)
        filled.append(nn.functional.pad(mask, extra, value=False).expand(group.count, -1, -1, -1))
    heads = max(mask.shape[1] for mask in filled)
    return torch.cat([mask.expand(-1, heads, -1, -1) for mask in filled])


def _attend_bucket(bucket: Bucket, q: Tensor, k: Tensor, v: Tensor, scaling: float, dropout: float) -> Tensor:
    """Attention `(queries, H, Dv)` of what stands in a bucket, `(queries | keys, H, D)`."""
    group = bucket.group
    query, key, value = (
        states.view(group.count, size, *states.shape[1:]).transpose(1, 2)
        for states, size in ((q, group.queries), (k, group.keys), (v, group.keys))
    )
    if group.is_whole:
        tile = group.tiles[0]
        output = attend_tile(query, key, value, bucket.mask_of(tile), tile.causal, scaling, dropout)
    else:
        output = _Tiles.apply(query, key, value, group.tiles, bucket.mask_of, scaling, dropout)
    return output.transpose(1, 2).flatten(0, 1)


def attend_tile(
    query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None, causal: bool, scaling: float, dropout: float
) -> Tensor:
    """Attention `(n, H, Lq, Dv)` of queries `(n, H, Lq, D)` over keys `(n, Hk, Lk, D)`."""
    if _is_slow_in_kernel(query, dropout):
        if causal:
            allowed = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
        return softmax_attention(query, key, value, allowed, scaling, dropout)[0]
    return nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=allowed,
        dropout_p=dropout,
        is_causal=causal,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _is_slow_in_kernel(query: Tensor, dropout: float) -> bool:
    """Whether matrix products beat the fused CPU kernel, whose half-precision backward pass is several times slower."""
    return query.device.type == "cpu" and (dropout > 0 or (query.dtype in HALF and query.requires_grad))


class _Tiles(torch.autograd.Function):
    """Several tiles of one group. Each tile is a small graph of its own, whose gradients are added in place.

    Slicing the keys in the outer graph would give every tile a gradient of full length; here memory and time grow with
    the tiles alone.
    """

    @staticmethod
    def forward(
        ctx,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        tiles: tuple[Tile, ...],
        mask_of: Callable[[Tile], Tensor | None],
        scaling: float,
        dropout: float,
    ):
        n, heads, length, _ = query.shape
        output = query.new_zeros(n, length, heads, value.shape[-1]).transpose(1, 2)
        ctx.graphs = []
        for tile in tiles:
            views = query[:, :, tile.queries], _parts(key, tile.keys), _parts(value, tile.keys)
            q, k, v = (x.detach().requires_grad_(need) for x, need in zip(views, ctx.needs_input_grad, strict=False))
            with torch.set_grad_enabled(any(ctx.needs_input_grad)):
                part = attend_tile(q, k, v, mask_of(tile), tile.causal, scaling, dropout)
            output[:, :, tile.queries] = part.detach()
            if any(ctx.needs_input_grad):
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
            for grad, slices in zip(grads, ((tile.queries,), tile.keys, tile.keys), strict=True):
                if grad is None:
                    continue
                pieces = next(parts).split([places.stop - places.start for places in slices], dim=2)
                for places, piece in zip(slices, pieces, strict=True):
                    grad[:, :, places] += piece
        return *grads, None, None, None, None


def _parts(states: Tensor, slices: tuple[slice, ...]) -> Tensor:
    """Places of `(n, H, L, D)` in some slices, as a view where it is one."""
    if len(slices) == 1:
        return states[:, :, slices[0]]
    return torch.cat([states[:, :, places] for places in slices], dim=2)
