"""Block-sparse `scaled_dot_product_attention` on any device: computes the tiles of a [`MaskPlan`], nothing else.

Shape legend: n sequences of a group, L tokens each, H heads, N real tokens, D and Dv head sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby, islice
from operator import itemgetter
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .layout import eager_only
from .plan import GroupPlan, MaskPlan, Tile

# Sequences up to LONGEST_FILLED tokens are filled up to whole vectors of VECTOR tokens: those of nearly equal lengths
# then share a call, and the fused CPU kernel, which handles a ragged end in slow scalar code, has none. For longer ones
# the copying would cost what it gains, except in half precision, where a ragged end costs most.
VECTOR = 16
LONGEST_FILLED = 64
LONGEST_FILLED_HALF = 512
HALF = (torch.bfloat16, torch.float16)


class Places(NamedTuple):
    """Tokens of some sequences, filled up: `taken` is the token at each place, `place_of` the place of each token."""

    taken: Tensor
    place_of: Tensor


class Bucket(NamedTuple):
    """Neighbouring groups that are attended to as one.

    Attributes:
        group (`GroupPlan`): The groups joined, sizes filled up.
        mask_of (`Callable`): Mask of one of the group's tiles, `None` where all its pairs are allowed or it is causal.
        q_places, k_places (`Places`, *optional*): How each side is filled up; `None`: not at all.
    """

    group: GroupPlan
    mask_of: Callable[[Tile], Tensor | None]
    q_places: Places | None = None
    k_places: Places | None = None


class Stretches(NamedTuple):
    """Tokens in the order of the batch, cut where the sequences of one bucket end: no token is moved without need.

    Attributes:
        sizes (`list[int]`): Tokens of each stretch.
        of_buckets (`list[list[int]]`): The stretches that each bucket consists of.
    """

    sizes: list[int]
    of_buckets: list[list[int]]

    @classmethod
    def of(cls, sizes: Sequence[int], order: list[int], buckets: list[Bucket]) -> Stretches:
        """Of sequences of `sizes`, which the buckets take in `order`."""
        stretches = []  # (first sequence, bucket, tokens)
        waiting = iter(order)
        for number, bucket in enumerate(buckets):
            sequences = enumerate(islice(waiting, bucket.group.count))
            runs = [[s for _, s in run] for _, run in groupby(sequences, key=lambda placed: placed[1] - placed[0])]
            stretches += [(run[0], number, sum(sizes[s] for s in run)) for run in runs] or [(0, number, 0)]
        in_batch = sorted(stretches)
        place = {stretch: place for place, stretch in enumerate(in_batch)}
        of_buckets = [[place[stretch] for stretch in run] for _, run in groupby(stretches, key=itemgetter(1))]
        return cls([size for _, _, size in in_batch], of_buckets)

    def taken(self, states: Tensor) -> list[Tensor]:
        """`(1, H, N, D)` as the tokens of each bucket, `(tokens, H, D)`."""
        pieces = states[0].transpose(0, 1).split(self.sizes)
        return [_cat([pieces[stretch] for stretch in stretches]) for stretches in self.of_buckets]

    def put_back(self, states: list[Tensor]) -> Tensor:
        """The inverse of [`taken`]."""
        placed = {}
        for bucket, stretches in zip(states, self.of_buckets, strict=True):
            pieces = bucket.split([self.sizes[stretch] for stretch in stretches])
            placed.update(zip(stretches, pieces, strict=True))
        return _cat([placed[stretch] for stretch in range(len(self.sizes))]).transpose(0, 1).unsqueeze(0)


def _cat(pieces: list[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


@eager_only
def attend(
    query: Tensor, key: Tensor, value: Tensor, plan: MaskPlan, *, scaling: float, dropout: float = 0.0
) -> tuple[Tensor, None]:
    """Attention on flat `(1, H, N, D)` tensors; weights are not computed."""
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
    pieces = zip(buckets, queries.taken(query), keys.taken(key), keys.taken(value), strict=True)
    return queries.put_back([_attend_bucket(*piece, scaling, dropout) for piece in pieces]), None


def _buckets(plan: MaskPlan, longest: int) -> tuple[list[Bucket], Stretches, Stretches]:
    """The plan's groups, and where their queries and keys stand; groups of up to `longest` tokens that one tile covers
    are joined with neighbours that fill up to the same size."""

    def filled_sizes(numbered: tuple[int, GroupPlan]) -> tuple[int, int]:
        number, group = numbered
        joins = group.is_whole and max(group.queries, group.keys) <= longest
        return (_filled(group.queries), _filled(group.keys)) if joins else (-1, number)  # -1: stays alone

    runs = ((sizes, [group for _, group in run]) for sizes, run in groupby(enumerate(plan.groups), key=filled_sizes))
    device = plan.layout.rank.device
    buckets = [_alone(plan, run[0]) if sizes[0] < 0 else _joined(plan, run, *sizes, device) for sizes, run in runs]
    buckets = buckets or [_alone(plan, GroupPlan(0, 0, 0))]
    sides = zip((plan.layout, plan.key_layout), plan.orders, strict=True)
    queries, keys = (Stretches.of(layout.sizes, order, buckets) for layout, order in sides)
    return buckets, queries, keys


def _filled(size: int) -> int:
    return -(-size // VECTOR) * VECTOR


def _alone(plan: MaskPlan, group: GroupPlan) -> Bucket:
    return Bucket(group, partial(plan.tile_mask, group))


def _joined(plan: MaskPlan, groups: list[GroupPlan], queries: int, keys: int, device: torch.device) -> Bucket:
    q_sizes = [group.queries for group in groups for _ in range(group.count)]
    k_sizes = [group.keys for group in groups for _ in range(group.count)]
    causal = groups[0].tiles[0].causal
    # A lower triangle ends before the copies.
    mask = None if causal else _joined_mask(plan, groups, queries, keys, device)
    tile = Tile(slice(0, queries), (slice(0, keys),), mask is not None, causal)
    q_places = _places(q_sizes, queries, device)
    k_places = q_places if k_sizes == q_sizes else _places(k_sizes, keys, device)
    group = GroupPlan(len(q_sizes), queries, keys, tiles=(tile,))
    return Bucket(group, lambda _: mask, q_places, k_places)


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


def _places(sizes: list[int], filled: int, device: torch.device) -> Places | None:
    """Sequences of `sizes`, each filled up to `filled` with copies of its last token, which no query sees."""
    if all(size == filled for size in sizes):
        return None
    ends = torch.tensor(sizes).cumsum(0)[:, None]
    inside = torch.arange(filled)
    starts = ends - torch.tensor(sizes)[:, None]
    taken = torch.minimum(starts + inside, ends - 1).flatten()
    place_of = (starts + inside < ends).flatten().nonzero().squeeze(1)
    return Places(taken.to(device), place_of.to(device))


class _Take(torch.autograd.Function):
    """`index_select` in which only the copy of a token at `place_of` has a gradient: no query sees the others."""

    @staticmethod
    def forward(ctx, states: Tensor, places: Places) -> Tensor:
        ctx.place_of = places.place_of
        return states.index_select(0, places.taken)

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        return grad_output.index_select(0, ctx.place_of), None


def _attend_bucket(bucket: Bucket, q: Tensor, k: Tensor, v: Tensor, scaling: float, dropout: float) -> Tensor:
    """Attention `(queries, H, Dv)` of a bucket's tokens `(queries | keys, H, D)`."""
    group = bucket.group
    sides = (q, bucket.q_places, group.queries), (k, bucket.k_places, group.keys), (v, bucket.k_places, group.keys)
    query, key, value = (
        (states if places is None else _Take.apply(states, places))
        .view(group.count, size, *states.shape[1:])
        .transpose(1, 2)
        for states, places, size in sides
    )
    if group.is_whole:
        tile = group.tiles[0]
        output = attend_tile(query, key, value, bucket.mask_of(tile), tile.causal, scaling, dropout)
    else:
        output = _Tiles.apply(query, key, value, group.tiles, bucket.mask_of, scaling, dropout)
    output = output.transpose(1, 2).flatten(0, 1)
    return output if bucket.q_places is None else output.index_select(0, bucket.q_places.place_of)


def attend_tile(
    query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None, causal: bool, scaling: float, dropout: float
) -> Tensor:
    """Attention `(n, H, Lq, Dv)` of queries `(n, H, Lq, D)` over keys `(n, Hk, Lk, D)`."""
    if _is_slow_in_kernel(query, dropout):
        return _softmax_attention(query, key, value, allowed, causal, scaling, dropout)
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


def _softmax_attention(
    query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None, causal: bool, scaling: float, dropout: float
) -> Tensor:
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    scores = torch.matmul(query * scaling, key.transpose(-1, -2))
    if causal:
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
