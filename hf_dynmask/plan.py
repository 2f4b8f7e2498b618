"""From an expression and lengths to the work to do: which blocks of the attention matrix are empty, full or partial.

Shape legend: B rows of width T in the batch, S sequences, N real tokens; H heads; n sequences of one group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any, TypeVar

import torch
from torch import Tensor

from .layout import SequenceLayout
from .masks import FIELD_SHAPES, Fields, Mask, check_fields, parse

BLOCK_SIZE = 128
T = TypeVar("T")


@dataclass(frozen=True)
class Tile:
    """A rectangle of one group's attention matrix that is computed in one call.

    Attributes:
        queries (`slice`): Queries, as places in their sequence.
        keys (`slice` or `Tensor` of indices): Keys, as places in their sequence.
        allowed (bool `Tensor` of shape `(n | 1, 1 | H, queries, keys)`, *optional*): `None`: all are allowed.
        causal (`bool`): The tile is the lower triangle of equally many queries and keys; `allowed` is then `None`.
    """

    queries: slice
    keys: slice | Tensor
    allowed: Tensor | None = None
    causal: bool = False


@dataclass(frozen=True)
class GroupPlan:
    """Neighbouring sequences of equal size, and the tiles of their attention matrices.

    Attributes:
        count (`int`): n, the number of sequences.
        queries, keys (`int`): Tokens of each on the two sides.
        tiles (`tuple[Tile, ...]`): What is to be computed; queries in no tile have no key and give 0.
    """

    count: int
    queries: int
    keys: int
    tiles: tuple[Tile, ...]

    @property
    def is_whole(self) -> bool:
        """Whether one tile covers every pair."""
        whole = slice(0, self.queries), slice(0, self.keys)
        return len(self.tiles) == 1 and (self.tiles[0].queries, self.tiles[0].keys) == whole


class MaskPlan:
    """One mask over one batch: made once a forward pass and shared by all layers with that mask.

    Args:
        mask (`Mask` or `str`): The expression.
        layout (`SequenceLayout`): Where the queries sit.
        key_layout (`SequenceLayout`, *optional*): Where the keys sit, sequence for sequence. `None`: with the queries.
        fields (`dict[str, Tensor]`, *optional*):
            The fields that the mask reads, in the batch's layout: one value a token `(B, T)`, or one entry a sequence
            `(S, ...)`.
        block_size (`int`, *optional*, defaults to 128): Queries and keys of a block.

    Raises:
        ValueError: A field is missing or has the wrong shape; the two layouts differ in their number of sequences.
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
        self.mask = parse(mask) if isinstance(mask, str) else mask
        self.layout = layout
        self.key_layout = layout if key_layout is None else key_layout
        self.block_size = block_size
        if self.layout.num_sequences != self.key_layout.num_sequences:
            raise ValueError(
                f"`key_layout` must hold as many sequences as `layout`, {layout.num_sequences}; "
                f"got {self.key_layout.num_sequences}"
            )
        self._fields = self._by_sequence(fields)
        self._derived: dict[tuple[Callable, Any], Any] = {}

    def derived(self, make: Callable[..., T], *arguments: Any) -> T:
        """`make(plan, *arguments)`, made once: what an implementation works out from the plan for all layers."""
        key = (make, arguments)
        if key not in self._derived:
            self._derived[key] = make(self, *arguments)
        return self._derived[key]

    def _by_sequence(self, fields: Mapping[str, Tensor] | None) -> Fields:
        """The mask's fields with one row a sequence, in the order in which the batch names its sequences."""
        layout = self.layout
        found = {}
        for name in self.mask.fields & set(fields or {}):
            field = fields[name]  # type: ignore[index]
            if FIELD_SHAPES[name][:2] == ("B", "T"):
                if tuple(field.shape[:2]) != tuple(layout.shape):
                    raise ValueError(f"the field `{name}` must have shape {layout.shape}; got {tuple(field.shape)}")
                table = layout.by_position(layout.flatten(field))
                field = torch.empty_like(table).index_copy(0, layout.rank, table)
            found[name] = field
        return check_fields(self.mask, found, rows=layout.num_sequences)

    @cached_property
    def _order(self) -> tuple[list[int], list[int]]:
        """Places of the query and of the key sequences such that sequences of equal sizes become neighbours."""
        queries, keys = self.layout, self.key_layout
        sequences = list(range(queries.num_sequences))
        if queries is keys and queries.is_sorted:
            return sequences, sequences
        partner = keys.rank.argsort()[queries.rank].tolist()
        order = sorted(sequences, key=lambda s: (queries.sizes[s], keys.sizes[partner[s]]))
        return order, [partner[s] for s in order]

    @cached_property
    def arranged(self) -> tuple[SequenceLayout, SequenceLayout]:
        """Query and key layout with sequences of equal sizes as neighbours."""
        q_order, k_order = self._order
        return self.layout.reordered(q_order), self.key_layout.reordered(k_order)

    @cached_property
    def token_orders(self) -> tuple[Tensor | None, Tensor | None]:
        """Places `(N,)` that bring query and key tokens into the order of [`arranged`]; `None`: they stand that way."""
        sides = zip((self.layout, self.key_layout), self.arranged, self._order, strict=True)
        q_tokens, k_tokens = (None if new is old else old.token_order(order) for old, new, order in sides)
        return q_tokens, k_tokens

    @cached_property
    def groups(self) -> tuple[GroupPlan, ...]:
        """Tiles for every group of sequences of equal sizes, in the order of [`arranged`]; empty ones included."""
        queries, keys = self.arranged
        groups = []
        first = q_start = k_start = 0
        for (q_size, k_size), run in groupby(zip(queries.sizes, keys.sizes, strict=True)):
            count = sum(1 for _ in run)
            q_stop, k_stop = q_start + count * q_size, k_start + count * k_size
            tiles = ()
            if count * q_size * k_size:
                tiles = self._tiles(
                    queries.positions[q_start:q_stop].view(count, q_size),
                    keys.positions[k_start:k_stop].view(count, k_size),
                    queries.rank[first : first + count],
                )
            groups.append(GroupPlan(count, q_size, k_size, tiles))
            first, q_start, k_start = first + count, q_stop, k_stop
        return tuple(groups)

    def _tiles(self, q_positions: Tensor, k_positions: Tensor, rows: Tensor) -> tuple[Tile, ...]:
        """Tiles of a group from the positions `(n, L)` of its tokens."""
        whole = slice(0, q_positions.shape[1]), slice(0, k_positions.shape[1])
        band = self.mask.band()
        if band == (None, None):
            return (Tile(*whole),)
        if band == (None, 0) and self.layout is self.key_layout:
            return (Tile(*whole, causal=True),)
        fields = {name: field[rows] for name, field in self._fields.items()}
        q_positions, k_positions = _shared(q_positions), _shared(k_positions)
        always, never = self._classify(q_positions, k_positions, fields)
        tiles = []
        for q_first, q_last, kept, partial in _merged(always.tolist(), never.tolist()):
            block = self.block_size
            queries = slice(q_first * block, min(q_last * block, q_positions.shape[1]))
            keys = _key_places(kept, block, k_positions)
            allowed = None
            if partial:
                i, j = q_positions[:, queries], k_positions[:, keys]
                allowed = self.mask.allowed(i[:, None, :, None], j[:, None, None, :], fields)
            tiles.append(Tile(queries, keys, allowed))
        return tuple(tiles)

    def _classify(self, q_positions: Tensor, k_positions: Tensor, fields: Fields) -> tuple[Tensor, Tensor]:
        """(always, never), each `(query blocks, key blocks)`: what holds for the whole group."""
        q_lo, q_hi = _block_ends(q_positions, self.block_size)
        k_lo, k_hi = _block_ends(k_positions, self.block_size)
        always, never = self.mask.classify(
            q_lo[:, :, None], q_hi[:, :, None], k_lo[:, None, :], k_hi[:, None, :], fields
        )
        return always.all(0), never.all(0)

    @cached_property
    def dense(self) -> Tensor:
        """Bool `(B, 1 | H, Tq, Tk)` in the batch's own layout: which token may see which; `False` where none is."""
        layouts = self.layout, self.key_layout
        if layouts[0].shape[0] != layouts[1].shape[0]:
            raise ValueError(
                f"a dense mask needs keys in as many rows as queries, {layouts[0].shape[0]}; got {layouts[1].shape[0]}"
            )
        (q_sequence, q_position), (k_sequence, k_position) = (_places(layout) for layout in layouts)
        same = (q_sequence[:, :, None] == k_sequence[:, None, :]) & (q_sequence[:, :, None] >= 0)
        if not all(layout.num_tokens for layout in layouts):
            return same[:, None]
        i, j = (torch.arange(int(layout.positions.max()) + 1, device=same.device) for layout in layouts)
        table = self.mask.allowed(i[None, None, :, None], j[None, None, None, :], self._fields)
        sequence = q_sequence.clamp(min=0) if table.shape[0] > 1 else torch.zeros_like(q_sequence)
        cells = table.movedim(1, -1)[sequence[:, :, None], q_position[:, :, None], k_position[:, None, :]]
        return cells.movedim(-1, 1) & same[:, None]


def _places(layout: SequenceLayout) -> tuple[Tensor, Tensor]:
    """Sequence (-1: absent) and position of every place `(B, T)` of a batch."""
    sequence = layout.rank[layout.sequence_ids]
    return layout.unflatten(sequence[None], fill=-1), layout.unflatten(layout.positions[None])


def _shared(positions: Tensor) -> Tensor:
    """`(1, L)` where all sequences of a group have the same positions `(n, L)`."""
    return positions[:1] if bool((positions == positions[:1]).all()) else positions


def _block_ends(positions: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """First and last position `(n, blocks)` of each block; positions rise along a sequence."""
    last = torch.arange(block - 1, positions.shape[1] + block - 1, block, device=positions.device)
    return positions[:, ::block], positions[:, last.clamp(max=positions.shape[1] - 1)]


def _merged(always: list[list[bool]], never: list[list[bool]]):
    """Runs of query blocks that see the same key blocks: (first, stop, key blocks, whether any is partial)."""
    rows = []
    for always_row, never_row in zip(always, never, strict=True):
        kept = tuple(k for k, empty in enumerate(never_row) if not empty)
        rows.append((kept, any(not always_row[k] for k in kept)))
    start = 0
    for (kept, partial), run in groupby(rows):
        stop = start + sum(1 for _ in run)
        if kept:
            yield start, stop, kept, partial
        start = stop


def _key_places(kept: tuple[int, ...], block: int, k_positions: Tensor) -> slice | Tensor:
    """The keys of some blocks: a slice where the blocks are neighbours, else their indices."""
    size = k_positions.shape[1]
    if kept[-1] - kept[0] + 1 == len(kept):
        return slice(kept[0] * block, min((kept[-1] + 1) * block, size))
    places = torch.arange(size, device=k_positions.device)
    return torch.cat([places[k * block : (k + 1) * block] for k in kept])
