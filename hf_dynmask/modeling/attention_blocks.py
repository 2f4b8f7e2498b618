"""Block-sparse `scaled_dot_product_attention` on any device, which computes only the tiles of a [`MaskPlan`].

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

# Sequences of up to LONGEST_FILLED tokens are filled up, so that sequences of nearly equal length share a call. Keys
# are filled up to a multiple of VECTOR, so that the fused CPU kernel does not fall back to slow scalar code at a ragged
# end; with up to half a vector of keys, scalar code is faster. For longer sequences the copying costs as much as it
# saves, except in half precision, where a ragged end is slowest.
VECTOR, QUARTER = 16, 4
LONGEST_FILLED = 64
LONGEST_FILLED_HALF = 512
SMALL = 2**14  # elements up to which PyTorch's own gradient of a gather is faster than an autograd function in Python
HALF = (torch.bfloat16, torch.float16)


class Bucket(NamedTuple):
    """Neighbouring groups that are computed in one call.

    Attributes:
        group (`GroupPlan`): The joined groups, with sizes filled up.
        mask_of (`Callable`):
            Returns the mask of a tile, boolean or added to the scores; `None` if all its pairs are allowed, or if it is
            causal.
        sizes (`list[tuple[int, int]]`): Numbers of queries and keys of each sequence before it is filled up.
    """

    group: GroupPlan
    mask_of: Callable[[Tile], Tensor | None]
    sizes: list[tuple[int, int]]


class Places(NamedTuple):
    """Assignment of the n tokens of a bucket to its P places.

    Attributes:
        token_at (`Tensor` of shape `(P,)`): The token at each place. Sequences are filled up with copies of their last
            token, which no query sees.
        tokens (`Tensor` of shape `(n,)`): The bucket's tokens, ascending.
        place_of (`Tensor` of shape `(n,)`): The place of each token in `tokens`.
    """

    token_at: Tensor
    tokens: Tensor
    place_of: Tensor

    @classmethod
    def of(cls, tokens: np.ndarray, sizes: list[int], filled: int, device: torch.device) -> Places:
        """The places for `tokens`, which hold sequences of `sizes` end to end; each is filled up to `filled` tokens."""
        lengths = np.array(sizes)[:, None]
        starts = lengths.cumsum()[:, None] - lengths
        inside = np.arange(filled)
        token_at = tokens[(starts + np.minimum(inside, lengths - 1))].ravel()
        (place_of,) = (inside < lengths).ravel().nonzero()
        ascending = tokens.argsort()
        places = token_at, tokens[ascending], place_of[ascending]
        return cls(*(torch.from_numpy(each).to(device) for each in places))


class Side(NamedTuple):
    """The buckets of one side, queries or keys: moves its tokens there and back.

    Attributes:
        num_tokens (`int`): N.
        pieces (`list[slice | Places]`): The tokens of each bucket: a slice if they need no reordering and no filling.
    """

    num_tokens: int
    pieces: list[slice | Places]

    def take(self, states: Tensor) -> tuple[Tensor, ...]:
        """Splits `(N, H, D)` into the tensors of the buckets, `(places, H, D)` each."""
        return _Take.apply(states, self) if self._needs_own_gradient(states) else self.split(states)

    def put_back(self, states: list[Tensor]) -> Tensor:
        """The inverse of [`take`]."""
        return _PutBack.apply(self, *states) if self._needs_own_gradient(*states) else self.join(states)

    def _needs_own_gradient(self, *states: Tensor) -> bool:
        """Whether an autograd function is faster than PyTorch's gradients, which add up a full tensor per bucket."""
        is_small = len(self.pieces) == 1 and states[0].numel() <= SMALL
        return not is_small and any(each.requires_grad for each in states)

    def split(self, states: Tensor) -> tuple[Tensor, ...]:
        """[`take`] with PyTorch's gradients."""
        return tuple(
            states[piece] if isinstance(piece, slice) else states.index_select(0, piece.token_at)
            for piece in self.pieces
        )

    def join(self, states: Sequence[Tensor]) -> Tensor:
        """[`put_back`] with PyTorch's gradients."""
        buckets = [
            bucket if isinstance(piece, slice) else bucket.index_select(0, piece.place_of)
            for bucket, piece in zip(states, self.pieces, strict=True)
        ]
        if len(buckets) == 1:
            return buckets[0]
        joined = buckets[0].new_empty(self.num_tokens, *buckets[0].shape[1:])
        for bucket, piece in zip(buckets, self.pieces, strict=True):
            if isinstance(piece, slice):
                joined[piece] = bucket
            else:
                joined.index_copy_(0, piece.tokens, bucket)
        return joined


class _Take(torch.autograd.Function):
    """[`Side.split`] with a gradient for only one copy of each token: no query sees the other copies."""

    @staticmethod
    def forward(ctx, states: Tensor, side: Side) -> tuple[Tensor, ...]:
        ctx.side = side
        return side.split(states)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        return ctx.side.join(grads), None


class _PutBack(torch.autograd.Function):
    """[`Side.join`] without gradients for the copies of tokens."""

    @staticmethod
    def forward(ctx, side: Side, *states: Tensor) -> Tensor:
        ctx.side, ctx.places = side, [len(each) for each in states]
        return side.join(states)

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
    plan, in_kernel = runs[0][1], not _is_slow_in_kernel(query, dropout)
    in_half_kernel = query.device.type == "cpu" and query.dtype in HALF and in_kernel
    longest = LONGEST_FILLED_HALF if in_half_kernel else LONGEST_FILLED
    buckets, queries, keys = plan.derived(_buckets, longest, query.dtype if in_kernel else None)
    pieces = zip(buckets, queries.take(query), keys.take(key), keys.take(value), strict=True)
    return queries.put_back([_attend_bucket(*piece, scaling, dropout) for piece in pieces]), None


def _buckets(plan: MaskPlan, longest: int, dtype: torch.dtype | None) -> tuple[list[Bucket], Side, Side]:
    """The buckets of a plan, and their queries and keys.

    A group of at most `longest` tokens that one tile covers is joined with neighbours that fill up to the same size.
    `dtype` is that in which masks of joined groups are added to the scores; `None`: masks are boolean.
    """

    def filled_sizes(numbered: tuple[int, GroupPlan]) -> tuple[int, int]:
        number, group = numbered
        joins = group.is_whole and max(group.queries, group.keys) <= longest
        return (_filled(group.queries, VECTOR), _filled(group.keys, VECTOR)) if joins else (-1, number)  # -1: alone

    runs = ((sizes, [group for _, group in run]) for sizes, run in groupby(enumerate(plan.groups), key=filled_sizes))
    buckets = [_alone(plan, run[0]) if sizes[0] < 0 else _joined(plan, run, dtype) for sizes, run in runs]
    buckets = buckets or [_alone(plan, GroupPlan(0, 0, 0))]
    return buckets, _side(plan, buckets, 0), _side(plan, buckets, 1)


def _side(plan: MaskPlan, buckets: list[Bucket], side: int) -> Side:
    """The buckets of the queries (`side` 0) or of the keys (1)."""
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
        contiguous = slice(start, start + len(own))
        pieces.append(contiguous if in_place else Places.of(own, sizes, filled, plan.layout.device))
    return Side(tokens, pieces)


def _filled(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _alone(plan: MaskPlan, group: GroupPlan) -> Bucket:
    return Bucket(group, partial(plan.tile_mask, group), [(group.queries, group.keys)] * group.count)


def _joined(plan: MaskPlan, groups: list[GroupPlan], dtype: torch.dtype | None) -> Bucket:
    queries, keys = max(group.queries for group in groups), max(group.keys for group in groups)
    keys = _filled(keys, VECTOR if keys > VECTOR // 2 else QUARTER)
    causal = groups[0].tiles[0].causal
    # With a causal mask no token sees the copies, which come after all tokens.
    mask = None if causal else _joined_mask(plan, groups, queries, keys)
    if mask is not None and dtype is not None:  # else the kernel would convert it in every layer
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -torch.inf)
    tile = Tile(slice(0, queries), (slice(0, keys),), mask is not None, causal)
    sizes = [(group.queries, group.keys) for group in groups for _ in range(group.count)]
    return Bucket(GroupPlan(len(sizes), queries, keys, tiles=(tile,)), lambda _: mask, sizes)


def _joined_mask(plan: MaskPlan, groups: list[GroupPlan], queries: int, keys: int) -> Tensor | None:
    """Bool `(n, 1 | H, 1 | queries, keys)` over the sequences of several whole groups; `None` if all are allowed."""
    device = plan.layout.device
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
    """Attention `(queries, H, Dv)` within a bucket, whose states are `(queries, H, D)` and `(keys, H, D)`."""
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
    """Whether plain matrix products are faster than the fused CPU kernel.

    That kernel has no dropout, and its half-precision backward pass is several times slower.
    """
    return query.device.type == "cpu" and (dropout > 0 or (query.dtype in HALF and query.requires_grad))


class _Tiles(torch.autograd.Function):
    """Several tiles of one group. Each tile is a small graph of its own, whose gradients are added in place.

    If the outer graph sliced the keys, every tile would have a gradient of full length. Here memory and time are
    proportional to the sizes of the tiles.
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
    """The slices of `(n, H, L, D)` along L, joined; a view if there is only one slice."""
    if len(slices) == 1:
        return states[:, :, slices[0]]
    return torch.cat([states[:, :, places] for places in slices], dim=2)
