"""Fields: tensors of a batch that mask expressions look up by sequence and position.

Shape legend: B sequences, T positions (Tq of queries, Tk of keys), H heads, K spans, `i` query and `j` key positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from .field_shapes import BOOL_FIELDS, FIELD_SHAPES, TOKEN_FIELDS
from .layout import integers, reads_are_free


def key_name(name: str) -> str:
    """The name of a per-token field's values for the keys, if the keys have a layout of their own."""
    return f"key_{name}"


class Fields:
    """The fields of a batch, with the look-ups that mask expressions need.

    Args:
        tables (`dict[str, Tensor]`): Values by sequence and position, of the shapes in `FIELD_SHAPES`.

    Positions have shape `(B | 1, ...)`. `of_pairs` and `of_key_heads` take query positions `(B | 1, 1, Tq, 1)` and key
    positions `(B | 1, 1, 1, Tk)`.
    """

    def __init__(self, tables: Mapping[str, Tensor] | None = None):
        self.tables = dict(tables or {})
        self._extremes: dict[str, _RangeExtremes] = {}
        self._sums: dict[str, tuple[Tensor, Tensor]] = {}

    def __bool__(self) -> bool:
        return bool(self.tables)

    def of_sequence(self, name: str, like: Tensor, *place: int) -> Tensor:
        """A field `(B, ...)` at index `place` of its other dimensions, shaped to broadcast with `like (B | 1, ...)`."""
        table = self.tables[name][(slice(None), *place)]
        return table[0] if table.shape[0] == 1 else table.reshape(table.shape[0], *(1,) * (like.dim() - 1))

    def of_query(self, name: str, i: Tensor) -> Tensor:
        """A field `(B, T)` at query positions: `(B, ...)`."""
        return self._at(self.tables[name], i)

    def of_key(self, name: str, j: Tensor) -> Tensor:
        """A field `(B, T)` at key positions: `(B, ...)`."""
        return self._at(self.tables[self._of_keys(name)], j)

    def of_key_heads(self, name: str, j: Tensor) -> Tensor:
        """A field `(B, 1 | H, Tk)` at key positions: `(B, 1 | H, 1, Tk)`."""
        table = self.tables[name]
        j = j[:, 0].expand(table.shape[0], table.shape[1], j.shape[-1])
        return table.gather(2, j)[:, :, None]

    def of_pairs(self, name: str, i: Tensor, j: Tensor) -> Tensor:
        """A field `(B, 1 | H, Tq, Tk)` at pairs of positions: `(B, 1 | H, Tq, Tk)`."""
        table = self.tables[name].movedim(1, -1)
        return table[self._rows(table)[:, None, None], i[:, 0], j[:, 0]].movedim(-1, 1)

    def query_extremes(self, name: str, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        """Smallest and largest value of a field `(B, T)` over ranges of query positions, ends included."""
        return self._range_extremes(name)(lo, hi, self._at)

    def key_extremes(self, name: str, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        """Smallest and largest value of a field `(B, T)` over ranges of key positions, ends included."""
        return self._range_extremes(self._of_keys(name))(lo, hi, self._at)

    def pair_ranges(self, name: str, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> tuple[Tensor, Tensor]:
        """(always, never): whether a bool field `(B, 1 | H, Tq, Tk)` holds for all pairs of two ranges, or for none."""
        table = self.tables[name]
        if name not in self._sums:
            self._sums[name] = _sums_from_corner(table.all(1)), _sums_from_corner(table.any(1))
        every, some = self._sums[name]
        rows = self._rows(table).view(-1, *(1,) * (q_lo.dim() - 1))

        def count(sums: Tensor) -> Tensor:
            ends, starts = (q_hi + 1, q_lo), (k_hi + 1, k_lo)
            inside = [[sums[rows, q, k] for k in starts] for q in ends]
            return inside[0][0] - inside[0][1] - inside[1][0] + inside[1][1]

        return count(every) == (q_hi - q_lo + 1) * (k_hi - k_lo + 1), count(some) == 0

    def having(self, name: str, table: Tensor) -> Fields:
        """The same fields and one more."""
        return Fields(self.tables | {name: table})

    def of_blocks(self, row: Tensor) -> Fields:
        """The fields for n blocks: entry b of the first dimension of indices belongs to sequence `row[b]`."""
        return _FieldsOfBlocks(self, row)

    def rows(self, rows: Tensor) -> Fields:
        """The fields of some sequences."""
        return Fields({name: table[rows] for name, table in self.tables.items()})

    def heads(self, heads: slice) -> Fields:
        """The fields of some heads."""
        return Fields(
            {
                name: table[:, heads] if FIELD_SHAPES.get(name, ())[1:2] == ("1 | H",) and table.shape[1] > 1 else table
                for name, table in self.tables.items()
            }
        )

    def _at(self, table: Tensor, index: Tensor) -> Tensor:
        """Values of a table `(B, T)` at positions `index (B | 1, ...)`."""
        return _gathered(table, index)

    def _rows(self, table: Tensor) -> Tensor:
        """The row of a table for each entry of the first dimension of indices."""
        return torch.arange(table.shape[0], device=table.device)

    def _of_keys(self, name: str) -> str:
        return key_name(name) if key_name(name) in self.tables else name

    def _range_extremes(self, name: str) -> _RangeExtremes:
        if name not in self._extremes:
            self._extremes[name] = _RangeExtremes(self.tables[name])
        return self._extremes[name]


class _FieldsOfBlocks(Fields):
    """See [`Fields.of_blocks`]."""

    def __init__(self, fields: Fields, row: Tensor):
        self.tables, self._extremes, self._sums, self._row = fields.tables, fields._extremes, fields._sums, row

    def of_sequence(self, name: str, like: Tensor, *place: int) -> Tensor:
        return self.tables[name][(self._row, *place)].view(-1, *(1,) * (like.dim() - 1))

    def _at(self, table: Tensor, index: Tensor) -> Tensor:
        return table[self._row.view(-1, *(1,) * (index.dim() - 1)), index]

    def _rows(self, table: Tensor) -> Tensor:
        return self._row


def check_fields(
    names: frozenset[str], fields: Mapping[str, Tensor] | None, reader: object, rows: int | None = None
) -> Fields:
    """Checks the fields of these names and returns them, integers as int64.

    Args:
        names (`frozenset[str]`): The fields that `reader` reads.
        fields (`dict[str, Tensor]`, *optional*): The available fields, by sequence and position.
        reader: The mask, for error messages.
        rows (`int`, *optional*): B, if it is known.

    Raises:
        ValueError: A field is missing or has the wrong shape or dtype.
    """
    fields = fields or {}
    found = {}
    for name in sorted(names):
        if name not in fields:
            have = ", ".join(f"`{key}`" for key in fields) or "none"
            raise ValueError(f"the mask '{reader}' reads the field `{name}`, which the batch lacks; it has {have}")
        found[name] = _checked(name, name, fields[name], rows)
        if name in TOKEN_FIELDS and key_name(name) in fields:
            found[key_name(name)] = _checked(key_name(name), name, fields[key_name(name)], rows)
    return Fields(found)


def check_extent(fields: Fields, queries: int, keys: int, heads: int) -> None:
    """Raises a `ValueError` if a field has too few query or key positions, or another number of heads."""
    for name, table in fields.tables.items():
        kind = _without_key(name)
        if kind in TOKEN_FIELDS:
            has_queries = name == kind
            has_keys = name != kind or key_name(name) not in fields.tables
            needed = (max(queries * has_queries, keys * has_keys),)
            sizes, by_head = table.shape[1:], False
        elif kind == "attention_mask":
            needed, sizes, by_head = (queries, keys), table.shape[2:], True
        elif kind == "key_scores":
            needed, sizes, by_head = (keys,), table.shape[2:], True
        else:
            continue
        fits = all(size >= wanted for size, wanted in zip(sizes, needed, strict=True))
        if not fits or (by_head and table.shape[1] not in (1, heads)):
            wanted = ", ".join(map(str, [len(table), *([f"1 | {heads}"] if by_head else []), *needed]))
            raise ValueError(f"the field `{name}` must have shape ({wanted}) at least; got {tuple(table.shape)}")


def _checked(name: str, kind: str, field: Tensor, rows: int | None) -> Tensor:
    if kind == "attention_mask" and field.dim() == 3:
        field = field[:, None]
    expected, shape = FIELD_SHAPES[kind], tuple(field.shape)
    fits = len(shape) == len(expected) and all(
        not isinstance(want, int) or want == got for want, got in zip(expected, shape, strict=True)
    )
    if not fits or (rows is not None and shape[0] != rows):
        wanted = ", ".join(str(rows) if size == "B" and rows is not None else str(size) for size in expected)
        raise ValueError(f"the field `{name}` must have shape ({wanted}); got {shape}")
    field = typed(name, field)
    return _from_zero(field) if kind == "hidden_spans" else field


def typed(name: str, field: Tensor) -> Tensor:
    """A field in the dtype that masks compute with; all integers become int64.

    Raises:
        ValueError: The field has the wrong kind of dtype.
    """
    kind = _without_key(name)
    if kind in BOOL_FIELDS:
        if field.dtype != torch.bool:
            raise ValueError(f"the field `{name}` must be bool; got {field.dtype}")
        return field
    if kind == "key_scores":
        if not field.is_floating_point():
            raise ValueError(f"the field `{name}` must be floating point; got {field.dtype}")
        return field
    return integers(name, field)


def _without_key(name: str) -> str:
    """The name of a field, of which `name` may be the [`key_name`]."""
    return name if name in FIELD_SHAPES else name.removeprefix(key_name(""))


def _from_zero(spans: Tensor) -> Tensor:
    """Equivalent spans `(B, K, 2)` without negative starts: such a span is shortened to start at 0."""
    start, length = spans.unbind(-1)
    return torch.stack([start.clamp(min=0), length.clamp(min=0) + start.clamp(max=0)], dim=-1)


def _gathered(field: Tensor, index: Tensor) -> Tensor:
    """Values of a field `(B, T)` at positions `index (B | 1, ...)`."""
    rows = field.shape[0]
    if rows == 1:
        return field[0][index]
    if index.dim() == 0 or index.shape[0] not in (1, rows):
        raise ValueError(f"ranges over fields of {rows} sequences must have first dimension {rows}; got {index.shape}")
    index = index.expand(rows, *index.shape[1:])
    return field.gather(1, index.flatten(1)).view(index.shape)


def _sums_from_corner(cells: Tensor) -> Tensor:
    """A summed-area table `(B, Tq + 1, Tk + 1)`: how many cells of `(B, Tq, Tk)` above and left of a corner are set."""
    return torch.nn.functional.pad(cells.long().cumsum(1).cumsum(2), (1, 0, 1, 0))


class _RangeExtremes:
    """Smallest and largest value of `field (B, T)` over any range of positions, from a sparse table."""

    def __init__(self, field: Tensor):
        field = field.to(torch.uint8) if field.dtype == torch.bool else field
        self.levels = [(field, field)]
        width = 1
        while 2 * width <= field.shape[1]:
            low, high = self.levels[-1]
            self.levels.append(
                (torch.minimum(low[:, :-width], low[:, width:]), torch.maximum(high[:, :-width], high[:, width:]))
            )
            width *= 2

    def __call__(self, lo: Tensor, hi: Tensor, at: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        lo, hi = torch.broadcast_tensors(lo, hi)
        width = self.levels[0][0].shape[1]
        if lo.numel() == 0 or self.levels[0][0].numel() == 0:
            return lo, hi  # there is no range
        lo, hi = lo.clamp(max=width - 1), hi.clamp(max=width - 1)
        size = (hi - lo + 1).clamp(min=1)
        level_of = size.to(torch.float64).log2().floor().long()
        smallest = largest = None
        for level, (low, high) in enumerate(self.levels):
            here = level_of == level
            if reads_are_free(lo.device) and not here.any():
                continue
            last = low.shape[1] - 1
            first, second = lo.clamp(0, last), (hi - 2**level + 1).clamp(0, last)
            low_here = torch.minimum(at(low, first), at(low, second))
            high_here = torch.maximum(at(high, first), at(high, second))
            smallest = low_here if smallest is None else torch.where(here, low_here, smallest)
            largest = high_here if largest is None else torch.where(here, high_here, largest)
        assert smallest is not None and largest is not None
        return smallest, largest
