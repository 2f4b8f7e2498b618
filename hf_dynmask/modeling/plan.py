"""Plans: which blocks of the attention matrix are empty, full or partial, from a mask expression and layouts.

Shape legend: B rows of width T in the batch, S sequences, N real tokens; H heads; n sequences of one group, L tokens
each; P positions of the longest sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from .field_shapes import TOKEN_FIELDS
from .fields import Fields, key_name, typed
from .layout import SequenceLayout
from .masks import Band, Mask, allowed_by_head, head_runs, parse

BLOCK_SIZE = 128
LARGEST_TILE = 2**22  # cells of a partial tile, whose mask is made cell by cell
KEPT_CELLS = 2**25  # cells of tile masks that are cached for other layers; the rest are made again
T = TypeVar("T")


@dataclass(frozen=True)
class Tile:
    """A rectangle of a group's attention matrices that is computed in one call.

    Attributes:
        queries (`slice`): Places of the queries in their sequence.
        keys (`tuple[slice, ...]`): Places of the keys in their sequence.
        is_partial (`bool`): Whether some pairs may not be allowed; see [`MaskPlan.tile_mask`].
        causal (`bool`):
            Whether exactly the lower triangle is allowed, of equally many queries and keys. Such a tile is not partial.
    """

    queries: slice
    keys: tuple[slice, ...]
    is_partial: bool = False
    causal: bool = False


@dataclass(frozen=True)
class GroupPlan:
    """Neighbouring sequences of equal size, and the tiles of their attention matrices.

    Attributes:
        count (`int`): n, the number of sequences.
        queries, keys (`int`): Number of queries and keys per sequence.
        first (`tuple[int, int, int]`): Index of the first sequence, query and key in the order of [`MaskPlan.order`].
        tiles (`tuple[Tile, ...]`): What is computed. Queries outside of all tiles have no key and give 0.
    """

    count: int
    queries: int
    keys: int
    first: tuple[int, int, int] = (0, 0, 0)
    tiles: tuple[Tile, ...] = ()

    @property
    def is_whole(self) -> bool:
        """Whether one tile covers every pair."""
        whole = slice(0, self.queries), (slice(0, self.keys),)
        return len(self.tiles) == 1 and (self.tiles[0].queries, self.tiles[0].keys) == whole


class MaskPlan:
    """A mask over a batch, made once per forward pass and shared by all layers with this mask.

    Args:
        mask (`Mask` or `str`): The expression.
        layout (`SequenceLayout`): Layout of the queries.
        key_layout (`SequenceLayout`, *optional*):
            Layout of the keys, with as many sequences as `layout`. `None`: the keys are the tokens of the queries.
        fields (`dict[str, Tensor]`, *optional*):
            The fields that the mask reads, in the batch's layout: one value per token `(B, T)`, one entry per sequence
            `(S, ...)`, an explicit mask `(B, Tq, Tk)` or `(B, H, Tq, Tk)`. If the keys have a layout of their own,
            their values are `key_<name>`; without it, keys have the values of the queries at the same positions.
        block_size (`int`, *optional*, defaults to 128): Number of queries, and of keys, per block.

    Raises:
        ValueError: A field is missing or has the wrong shape or dtype; the two layouts differ in their number of
            sequences.
    """

    def __init__(
        self,
        mask: Mask | str,
        layout: SequenceLayout,
        key_layout: SequenceLayout | None = None,
        *,
        fields: Mapping[str, Tensor] | None = None,
        block_size: int = BLOCK_SIZE,
    ):
        self.mask = mask if isinstance(mask, Mask) else parse(mask)
        self.layout = layout
        self.key_layout = layout if key_layout is None else key_layout
        self.block_size = block_size
        if self.layout.num_sequences != self.key_layout.num_sequences:
            raise ValueError(
                f"`key_layout` must hold as many sequences as `layout`, {layout.num_sequences}; "
                f"got {self.key_layout.num_sequences}"
            )
        self.fields = self._checked_fields(fields or {})
        self._derived: dict[tuple[Callable, Any], Any] = {}

    def derived(self, make: Callable[..., T], *arguments: Any) -> T:
        """`make(plan, *arguments)`, cached: what an implementation computes from the plan once for all layers."""
        key = (make, arguments)
        if key not in self._derived:
            self._derived[key] = make(self, *arguments)
        return self._derived[key]

    # --- Fields ------------------------------------------------------------------------------------------------------

    def _checked_fields(self, fields: Mapping[str, Tensor]) -> Fields:
        """The mask's fields by sequence and position."""
        tables = {}
        for name in self.mask.fields & set(fields):
            if name in TOKEN_FIELDS:
                tables[name] = _by_sequence(name, fields[name], self.layout)
                if key_name(name) in fields:
                    tables[key_name(name)] = _by_sequence(key_name(name), fields[key_name(name)], self.key_layout)
                elif self.key_layout.position_bound > tables[name].shape[1]:
                    raise ValueError(
                        f"the field `{key_name(name)}` must be given: keys have {self.key_layout.position_bound} "
                        f"positions, but `{name}` has values for {tables[name].shape[1]}"
                    )
            elif name == "attention_mask":
                tables[name] = self.pairs_by_sequence(fields[name])
            else:
                tables[name] = fields[name]
        if "key_scores" in self.mask.fields and "key_scores" not in tables:
            tables["key_scores"] = self._no_scores()
        return self.mask.checked(tables, rows=self.layout.num_sequences)

    def _no_scores(self) -> Tensor:
        """A placeholder for the scores that each layer computes; see [`with_key_scores`]."""
        return torch.zeros(self.layout.num_sequences, 1, self.key_layout.position_bound, device=self.layout.device)

    def pairs_by_sequence(self, mask: Tensor) -> Tensor:
        """A mask or a bias `(B, Tq, Tk)` or `(B, H, Tq, Tk)` in the batch's layout as `(S, 1 | H, P, P)`."""
        given = tuple(mask.shape)
        mask = mask[:, None] if mask.dim() == 3 else mask
        rows, width, key_width = self.layout.shape[0], self.layout.shape[1], self.key_layout.shape[1]
        if mask.dim() != 4 or (mask.shape[0], *mask.shape[2:]) != (rows, width, key_width):
            raise ValueError(
                f"an explicit `attention_mask` must have shape ({rows}, {width}, {key_width}) or ({rows}, heads, "
                f"{width}, {key_width}); got {given}"
            )
        sides = self.layout, self.key_layout
        i, j = (_by_sequence("indices", _columns(side), side)[:, : side.num_positions] for side in sides)
        row = _by_sequence("rows", _rows(self.layout), self.layout)  # 0 at positions without a token
        row = row.amax(1)[:, None, None] if row.shape[1] else row[:, :, None]
        return mask.movedim(1, -1)[row, i[:, :, None], j[:, None, :]].movedim(-1, 1)

    def with_key_scores(self, key_scores: Tensor) -> MaskPlan:
        """The plan with the scores by which `topk` chooses.

        Args:
            key_scores (`Tensor` of shape `(1, 1 | H, Nk)`): A score per key token, in the order of the key layout.
        """
        plan = copy(self)
        table = self.key_layout.by_position(key_scores.detach().transpose(1, 2), fill=-torch.inf)
        plan.fields = self.fields.having("key_scores", table.transpose(1, 2))
        plan._derived = {}
        plan.__dict__.pop("_masks", None)
        return plan

    @property
    def band(self) -> Band | None:
        """As [`Mask.band`]."""
        return self.mask.band()

    @cached_property
    def reads_scores(self) -> bool:
        """Whether the mask has `topk`, which chooses by scores that each layer computes."""
        return "key_scores" in self.mask.fields

    def by_heads(self, heads: int) -> list[tuple[slice, MaskPlan]]:
        """A plan for each run of heads with the same expression; its mask is resolved."""
        return [(run, part or self) for run, part in self.derived(_by_heads, heads)]

    # --- Tiles -------------------------------------------------------------------------------------------------------

    @cached_property
    def order(self) -> list[int]:
        """The indices of the sequences, sorted so that sequences of equal sizes are neighbours."""
        queries, keys = self.layout.sizes, self.key_layout.sizes
        return sorted(range(len(queries)), key=lambda sequence: (queries[sequence], keys[sequence]))

    @cached_property
    def token_orders(self) -> tuple[np.ndarray | None, np.ndarray | None]:
        """The order of query tokens and of key tokens, `(N,)`, when sequences are in [`order`]; `None`: unchanged."""
        queries, keys = self.layout, self.key_layout
        if self.order == list(range(queries.num_sequences)):
            return None, None
        of_queries = _token_order(queries, self.order)
        return of_queries, of_queries if keys is queries else _token_order(keys, self.order)

    @cached_property
    def _positions_in_order(self) -> tuple[Tensor, Tensor]:
        """Positions of queries and of keys when sequences are in [`order`]."""
        sides = zip((self.layout, self.key_layout), self.token_orders, strict=True)
        queries, keys = (
            side.positions if order is None else side.positions[torch.from_numpy(order).to(side.device)]
            for side, order in sides
        )
        return queries, keys

    def _fields_of(self, places: list[int] | slice) -> Fields:
        """The fields of the sequences at these places of [`order`]."""
        if not self.fields:
            return self.fields
        order = torch.tensor(self.order, device=self.layout.device)
        return self.fields.rows(order[places])

    @cached_property
    def groups(self) -> tuple[GroupPlan, ...]:
        """The groups of sequences of equal sizes with their tiles, in the order of [`order`], empty groups included."""
        groups = self._untiled()
        band = self.mask.band()
        if band == (None, None):
            return tuple(_tiled(group, (_whole(group),)) for group in groups)
        if band == (None, 0) and self.layout is self.key_layout:
            return tuple(_tiled(group, (_whole(group, causal=True),)) for group in groups)
        tiles = self._tiles([group for group in groups if group.queries and group.keys])
        return tuple(_tiled(group, tiles.get(group, ())) for group in groups)

    def _untiled(self) -> list[GroupPlan]:
        queries, keys = self.layout.sizes, self.key_layout.sizes
        groups = []
        first = q_first = k_first = 0
        for (q_size, k_size), run in groupby((queries[sequence], keys[sequence]) for sequence in self.order):
            count = sum(1 for _ in run)
            groups.append(GroupPlan(count, q_size, k_size, (first, q_first, k_first)))
            first, q_first, k_first = first + count, q_first + count * q_size, k_first + count * k_size
        return groups

    def _tiles(self, groups: list[GroupPlan]) -> dict[GroupPlan, tuple[Tile, ...]]:
        """The tiles of each group. Groups with equal numbers of blocks are classified in one call."""
        found = {}
        block = self.block_size
        for _, like in groupby(sorted(groups, key=lambda g: _blocks(g, block)), key=lambda g: _blocks(g, block)):
            alike = list(like)
            for group, (always, never) in zip(alike, self._classify(alike), strict=True):
                found[group] = tuple(_merged(group, always, never, block, group.count if self._differ else 1))
        return found

    @cached_property
    def _differ(self) -> bool:
        """Whether sequences of one group may have different masks."""
        return bool(self.fields) or self.layout.has_gaps or self.key_layout.has_gaps

    def _classify(self, groups: list[GroupPlan]) -> list[tuple[Tensor, Tensor]]:
        """(always, never) of each group, both `(query blocks, key blocks)`: what holds for all its sequences."""
        queries, keys = self._positions_in_order
        counts = [group.count if self._differ else 1 for group in groups]  # sequences that are classified per group
        places = [(g, s) for g, count in zip(groups, counts, strict=True) for s in range(count)]
        q_starts, q_sizes = [g.first[1] + s * g.queries for g, s in places], [g.queries for g, _ in places]
        k_starts, k_sizes = [g.first[2] + s * g.keys for g, s in places], [g.keys for g, _ in places]
        q_lo, q_hi = _block_ends(queries, q_starts, q_sizes, self.block_size)
        k_lo, k_hi = _block_ends(keys, k_starts, k_sizes, self.block_size)
        fields = self._fields_of([g.first[0] + s for g, s in places])
        always, never = self.mask.classify_checked(
            q_lo[:, :, None], q_hi[:, :, None], k_lo[:, None, :], k_hi[:, None, :], fields
        )
        return [(a.all(0), n.all(0)) for a, n in zip(always.split(counts), never.split(counts), strict=True)]

    @cached_property
    def _masks(self) -> dict[tuple, Tensor]:
        """A cache of tile masks, by [`_mask_key`]."""
        return {}

    def tile_mask(self, group: GroupPlan, tile: Tile) -> Tensor | None:
        """Bool `(n | 1, 1 | H, queries, keys)` of a partial tile; `None` for other tiles."""
        if not tile.is_partial:
            return None
        key = self._mask_key(group, tile)
        if key in self._masks:
            return self._masks[key]
        i, j = (positions[:, None] for positions in self._positions(group, tile))
        fields = self._fields_of(slice(group.first[0], group.first[0] + group.count))
        mask = self.mask.allowed(i[..., None], j[:, :, None], fields)
        if sum(map(Tensor.numel, self._masks.values())) + mask.numel() <= KEPT_CELLS:
            self._masks[key] = mask
        return mask

    def _mask_key(self, group: GroupPlan, tile: Tile) -> tuple:
        """A key for the cache: tiles with the same key have the same mask."""
        if not self.mask.is_relative or self._differ:
            return group.first, tile.queries.start, tile.keys[0].start
        start = tile.queries.start
        return tile.queries.stop - start, *((keys.start - start, keys.stop - start) for keys in tile.keys)

    def _positions(self, group: GroupPlan, tile: Tile) -> tuple[Tensor, Tensor]:
        """Positions `(n | 1, L)` of a tile's queries and keys; one row if they are the same in all sequences."""
        (queries, keys), (_, q_first, k_first), n = self._positions_in_order, group.first, group.count
        i = queries[q_first : q_first + n * group.queries].view(n, group.queries)
        j = keys[k_first : k_first + n * group.keys].view(n, group.keys)
        i, j = (side if layout.has_gaps else side[:1] for side, layout in ((i, self.layout), (j, self.key_layout)))
        return i[:, tile.queries], torch.cat([j[:, part] for part in tile.keys], dim=1)

    # --- Cell by cell ------------------------------------------------------------------------------------------------

    def dense(self, heads: int = 1) -> Tensor:
        """Bool `(B, 1 | heads, Tq, Tk)` in the batch's layout: which token may see which; `False` at absent tokens."""
        return self.derived(_dense, heads)

    @property
    def trimmed(self) -> MaskPlan:
        """The plan without the tails of its layouts (see [`SequenceLayout.trimmed`]); itself if they have none."""
        return self.derived(_trimmed) or self

    @property
    def in_rows(self) -> MaskPlan:
        """The plan for [`SequenceLayout.in_rows`] of both layouts; itself if rows already hold one sequence each.

        Otherwise a NaN in one sequence would reach the other sequences of its row, even with a weight of 0.
        """
        return self.derived(_in_rows) or self

    def in_batch(self, table: Tensor) -> Tensor:
        """Cells by sequence and position `(S | 1, 1 | H, P, P)`, in the batch's layout `(B, 1 | H, Tq, Tk)`.

        Cells of two tokens from different sequences are 0.
        """
        same = self.same_sequence
        if not table.numel():
            return same.to(table.dtype).expand(-1, table.shape[1], -1, -1)
        sequence = _sequence_of_places(self.layout).clamp(min=0)
        sequence = sequence if table.shape[0] > 1 else torch.zeros_like(sequence)
        i, j = map(_position_of_places, (self.layout, self.key_layout))
        cells = table.movedim(1, -1)[sequence[:, :, None], i[:, :, None], j[:, None, :]].movedim(-1, 1)
        return cells.masked_fill(~same, 0)

    @cached_property
    def same_sequence(self) -> Tensor:
        """Bool `(B, 1, Tq, Tk)` in the batch's layout: which tokens are in the same sequence."""
        layouts = self.layout, self.key_layout
        if layouts[0].shape[0] != layouts[1].shape[0]:
            raise ValueError(
                f"a dense mask needs keys in as many rows as queries, {layouts[0].shape[0]}; got {layouts[1].shape[0]}"
            )
        of_queries, of_keys = map(_sequence_of_places, layouts)
        return ((of_queries[:, :, None] == of_keys[:, None, :]) & (of_queries[:, :, None] >= 0))[:, None]


def _by_heads(plan: MaskPlan, heads: int) -> list[tuple[slice, MaskPlan | None]]:
    """See [`MaskPlan.by_heads`]. `None` means the plan itself: a plan that caches itself would keep itself alive."""
    runs = head_runs(plan.mask, heads)
    if len(runs) == 1 and runs[0][1] == plan.mask:
        return [(slice(0, heads), None)]
    plans: list[tuple[slice, MaskPlan | None]] = []
    for run, mask in runs:
        part = copy(plan)
        part.mask, part.fields, part._derived = mask, plan.fields.heads(run) if len(runs) > 1 else plan.fields, {}
        for name in ("groups", "_masks", "reads_scores"):
            part.__dict__.pop(name, None)
        plans.append((run, part))
    return plans


def _in_rows(plan: MaskPlan) -> MaskPlan | None:
    """See [`MaskPlan.in_rows`]. `None` means the plan itself."""
    return _with_layouts(plan, SequenceLayout.in_rows)


def _trimmed(plan: MaskPlan) -> MaskPlan | None:
    """See [`MaskPlan.trimmed`]. `None` means the plan itself."""
    return _with_layouts(plan, SequenceLayout.trimmed)


def _with_layouts(plan: MaskPlan, change: Callable[[SequenceLayout], SequenceLayout]) -> MaskPlan | None:
    """The plan with changed layouts; `None` if the change has no effect."""
    layout = change(plan.layout)
    key_layout = layout if plan.key_layout is plan.layout else change(plan.key_layout)
    if layout is plan.layout and key_layout is plan.key_layout:
        return None
    changed = MaskPlan.__new__(MaskPlan)
    changed.mask, changed.fields, changed.block_size, changed._derived = plan.mask, plan.fields, plan.block_size, {}
    changed.layout, changed.key_layout = layout, key_layout
    return changed


def _token_order(layout: SequenceLayout, order: list[int]) -> np.ndarray:
    """The token `(N,)` at each place when the sequences are in this order."""
    sizes = np.array(layout.sizes)
    starts = (sizes.cumsum() - sizes)[order]
    sizes = sizes[order]
    return np.repeat(starts - (sizes.cumsum() - sizes), sizes) + np.arange(layout.num_tokens)


def _dense(plan: MaskPlan, heads: int) -> Tensor:
    layouts, same = (plan.layout, plan.key_layout), plan.same_sequence
    if not all(layout.num_tokens for layout in layouts):
        return same
    by_column = plan.in_rows is plan and not plan.reads_scores  # `topk` must see each position once
    i, j = (_position_of_places(layout) if by_column else _all_positions(layout) for layout in layouts)
    cells = allowed_by_head(plan.mask, heads, i[:, None, :, None], j[:, None, None, :], plan.fields)
    return cells & same if by_column else plan.in_batch(cells)


def _position_of_places(layout: SequenceLayout) -> Tensor:
    """The position of every place of a batch `(B, T)`; 0 at absent places."""
    return layout.unflatten(layout.positions[None])


def _all_positions(layout: SequenceLayout) -> Tensor:
    """`(1, P)`: 0, 1, ..., P - 1."""
    return torch.arange(layout.num_positions, device=layout.device)[None]


def _by_sequence(name: str, field: Tensor, layout: SequenceLayout) -> Tensor:
    """A field `(B, T)` in the batch's layout as `(S, P)`, by sequence and position."""
    if tuple(field.shape[:2]) != tuple(layout.shape):
        raise ValueError(f"the field `{name}` must have shape {tuple(layout.shape)}; got {tuple(field.shape)}")
    return layout.by_position(layout.flatten(typed(name, field)))


def _sequence_of_places(layout: SequenceLayout) -> Tensor:
    """The sequence of every place of a batch `(B, T)`; -1 at absent places."""
    return layout.unflatten(layout.sequence_ids[None], fill=-1)


def _columns(layout: SequenceLayout) -> Tensor:
    """The column of every place of a batch `(B, T)`."""
    rows, width = layout.shape
    return torch.arange(width, device=layout.device).expand(rows, width)


def _rows(layout: SequenceLayout) -> Tensor:
    """The row of every place of a batch `(B, T)`."""
    rows, width = layout.shape
    return torch.arange(rows, device=layout.device)[:, None].expand(rows, width)


def _tiled(group: GroupPlan, tiles: tuple[Tile, ...]) -> GroupPlan:
    return GroupPlan(group.count, group.queries, group.keys, group.first, tiles if group.queries * group.keys else ())


def _whole(group: GroupPlan, causal: bool = False) -> Tile:
    return Tile(slice(0, group.queries), (slice(0, group.keys),), causal=causal)


def _blocks(group: GroupPlan, block: int) -> tuple[int, int]:
    """Number of blocks of queries and of keys."""
    return -(-group.queries // block), -(-group.keys // block)


def _block_ends(positions: Tensor, starts: list[int], sizes: list[int], block: int) -> tuple[Tensor, Tensor]:
    """First and last position `(sequences, blocks)` of each block; `positions (N,)` increase along a sequence."""
    start, size = (torch.tensor(values, device=positions.device)[:, None] for values in (starts, sizes))
    first = torch.arange(0, max(sizes), block, device=positions.device)
    return positions[start + first], positions[start + torch.minimum(first + block, size) - 1]


def _merged(group: GroupPlan, always: Tensor, never: Tensor, block: int, masks: int) -> Iterator[Tile]:
    """Tiles of a group: runs of query blocks that see the same key blocks.

    `always` and `never` are `(query blocks, key blocks)`. A partial tile is limited in size, by LARGEST_TILE cells for
    all its `masks` masks.
    """
    kept = ~never
    partial = (kept & ~always).any(1)
    steps = torch.nn.functional.pad(kept.to(torch.int8), (1, 1)).diff(dim=1)
    starts, stops = (steps > 0).nonzero().tolist(), (steps < 0).nonzero().tolist()
    changes = (kept[1:] != kept[:-1]).any(1) | (partial[1:] != partial[:-1])
    borders = [0, *(changes.nonzero().squeeze(1) + 1).tolist(), kept.shape[0]]
    is_partial = partial[borders[:-1]].tolist()
    runs: dict[int, list[slice]] = {}
    for (row, start), (_, stop) in zip(starts, stops, strict=True):
        runs.setdefault(row, []).append(slice(start * block, min(stop * block, group.keys)))
    for first, stop, some in zip(borders, borders[1:], is_partial, strict=False):
        keys = tuple(runs.get(first, ()))
        if not keys:
            continue
        rows = stop - first
        if some:
            cells = masks * block * sum(part.stop - part.start for part in keys)
            rows = max(1, min(rows, LARGEST_TILE // cells))
        for row in range(first, stop, rows):
            queries = slice(row * block, min(min(row + rows, stop) * block, group.queries))
            yield Tile(queries, keys, some)
