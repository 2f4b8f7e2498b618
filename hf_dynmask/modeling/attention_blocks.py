"""Block-sparse `scaled_dot_product_attention` on any device: computes the tiles of a [`MaskPlan`], nothing else.

Shape legend: n sequences of a group, L tokens each, H heads, N real tokens, D and Dv head sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


class Places(NamedTuple):
    """Where the tokens of a bucket stand: n tokens at P places.

    Attributes:
        taken (`Tensor` of shape `(P,)`): The token at each place. Sequences are filled up with copies of their last
            token, which no query sees.
        tokens (`Tensor` of shape `(n,)`): The bucket's tokens, ascending.
        place_of (`Tensor` of shape `(n,)`): The place of each of them.
    """

    taken: Tensor
    tokens: Tensor
    place_of: Tensor

    @classmethod
    def of(cls, tokens: np.ndarray, sizes: list[int], filled: int, device: torch.device) -> Places:
        """Of the tokens of sequences of `sizes` one after another, each filled up to `filled`."""
        own = np.array(sizes)[:, None]
        starts = own.cumsum()[:, None] - own
        inside = np.arange(filled)
        taken = tokens[(starts + np.minimum(inside, own - 1))].ravel()
        (place_of,) = (inside < own).ravel().nonzero()
        ascending = tokens.argsort()
        places = taken, tokens[ascending], place_of[ascending]
        return cls(*(torch.from_numpy(each).to(device) for each in places))


class Side(NamedTuple):
    """How the tokens of a side, queries or keys, come to their buckets and back.

    Attributes:
        num_tokens (`int`): N.
        pieces (`list[slice | Places]`): The tokens of each bucket; a slice where they stand as they are to stand.
    """

    num_tokens: int
    pieces: list[slice | Places]

    def take(self, states: Tensor) -> tuple[Tensor, ...]:
        """`(N, H, D)` as what stands at the places of each bucket, `(places, H, D)`."""
        return _Take.apply(states, self) if self._needs_own_gradient(states) else self.taken(states)

    def put_back(self, states: list[Tensor]) -> Tensor:
        """The inverse of [`take`]."""
        return _PutBack.apply(self, *states) if self._needs_own_gradient(*states) else self.placed(states)

    def _needs_own_gradient(self, *states: Tensor) -> bool:
        """Whether PyTorch's own gradients, which add up tensors of all tokens, would take longer."""
        is_small = len(self.pieces) == 1 and states[0].numel() <= SMALL
        return not is_small and any(each.requires_grad for each in states)

    def taken(self, states: Tensor) -> tuple[Tensor, ...]:
        """[`take`] without a gradient of its own."""
        return tuple(
            states[piece] if isinstance(piece, slice) else states.index_select(0, piece.taken) for piece in self.pieces
        )

    def placed(self, states: Sequence[Tensor]) -> Tensor:
        """Tokens of buckets, `(tokens, H, D)` or what stands at their places, as `(N, H, D)`."""
        found = [
            states if isinstance(piece, slice) else states.index_select(0, piece.place_of)
            for states, piece in zip(states, self.pieces, strict=True)
        ]
        if len(found) == 1:
            return found[0]
        whole = found[0].new_empty(self.num_tokens, *found[0].shape[1:])
        for values, piece in zip(found, self.pieces, strict=True):
            if isinstance(piece, slice):
                whole[piece] = values
            else:
                whole.index_copy_(0, piece.tokens, values)
        return whole


class _Take(torch.autograd.Function):
    """[`Side.taken`], in which only one copy of a token has a gradient: no query sees the others."""

    @staticmethod
    def forward(ctx, states: Tensor, side: Side) -> tuple[Tensor, ...]:
        ctx.side = side
        return side.taken(states)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        return ctx.side.placed(grads), None


class _PutBack(torch.autograd.Function):
    """[`Side.placed`]; copies of tokens have no gradient."""

    @staticmethod
    def forward(ctx, side: Side, *states: Tensor) -> Tensor:
        ctx.side, ctx.places = side, [len(each) for each in states]
        return side.placed(states)

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        grads = []
        for piece, places in zip(ctx.side.pieces, ctx.places, strict=True):
            if isinstance(piece, slice):
                grads.append(grad_output[piece])
            else:
                own = grad_output.new_zeros(places, *grad_output.shape[1:])
                grads.append(own.index_copy_(0, piece.place_of, grad_output.index_select(0, piece.tokens)))
        return None, *grads


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
    tokens = (plan.layout, plan.key_layout)[side].num_tokens
    order = plan.token_orders[side]
    order = np.arange(tokens) if order is None else order
    pieces, first = [], 0
    for bucket in buckets:
        sizes = [both[side] for both in bucket.sizes]
        filled = (bucket.group.queries, bucket.group.keys)[side]
        own = order[first : first + sum(sizes)]
        first += len(own)
        in_place = all(size == filled for size in sizes) and (np.diff(own) == 1).all()
        start = int(own[0]) if len(own) else 0
        stands = slice(start, start + len(own))
        pieces.append(stands if in_place else Places.of(own, sizes, filled, plan.layout.device))
    return Side(tokens, pieces)


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
