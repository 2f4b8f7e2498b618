"""The mask language: which query may see which key, as a small expression.

`parse("causal & window(255, 0)")` and `causal() & window(255, 0)` make the same mask. Each leaf states its rule twice,
side by side: on indices (`allowed`) and on ranges of indices (`classify`), where the answer is *always*, *never* or
*depends*. Operators combine the three values (Kleene), so the blocks of any expression are known without looking at
single cells.

Shape legend: B sequences, `i` query position, `j` key position. Index tensors have the sequence (or 1) as their first
dimension wherever a field is read.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from dataclasses import fields as dataclass_fields
from functools import lru_cache
from inspect import signature
from typing import ClassVar

import torch
from torch import Tensor

Fields = Mapping[str, Tensor]
Ranges = tuple[Tensor, Tensor, Tensor, Tensor]
Band = tuple[int | None, int | None]

# Shape of each field a mask can read: B sequences, T positions, K spans.
FIELD_SHAPES = {
    "segment_ids": ("B", "T"),
    "prefix_lengths": ("B",),
    "hidden_spans": ("B", "K", 2),
}


class Mask:
    """An immutable mask expression. Combine masks with `&`, `|` and `~`; compare them with `==`."""

    @property
    def fields(self) -> frozenset[str]:
        """Names of the batch's fields that the expression reads."""
        return frozenset()

    def allowed(self, i: Tensor, j: Tensor, fields: Fields) -> Tensor:
        """Whether query position `i` may see key position `j`; all three broadcast."""
        raise NotImplementedError

    def _classify(
        self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor, fields: Fields
    ) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def band(self) -> Band | None:
        """`(left, right)` where the mask is exactly `i - left <= j <= i + right` (`None`: unbounded); else `None`."""
        return None

    def classify(
        self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor, fields: Fields | None = None
    ) -> tuple[Tensor, Tensor]:
        """What the mask says of whole blocks.

        Args:
            q_lo, q_hi, k_lo, k_hi (`Tensor`, integer):
                First and last position of each range of queries and keys, both included; they broadcast. With fields of
                B > 1 sequences their first dimension is B or 1.
            fields (`dict[str, Tensor]`, *optional*): The fields that the mask reads, by sequence and position.

        Returns:
            `(always, never)`, bool tensors of the broadcast shape: every pair, or none, of the two ranges is allowed.
            Where both are `False` it depends. `always` and `never` are never wrong; *depends* may be too cautious.

        Raises:
            ValueError: A field that the mask reads is missing or has the wrong shape.
        """
        always, never = self._classify(q_lo, q_hi, k_lo, k_hi, check_fields(self, fields))
        shape = torch.broadcast_shapes(q_lo.shape, q_hi.shape, k_lo.shape, k_hi.shape, always.shape, never.shape)
        return always.expand(shape), never.expand(shape)

    def dense(
        self, lengths: Tensor, *, key_lengths: Tensor | None = None, fields: Fields | None = None, heads: int = 1
    ) -> Tensor:
        """The mask cell by cell.

        Args:
            lengths (`Tensor` of shape `(B,)`, integer): Queries of each sequence.
            key_lengths (`Tensor` of shape `(B,)`, integer, *optional*): Keys of each sequence. `None`: `lengths`.
            fields (`dict[str, Tensor]`, *optional*): The fields that the mask reads, by sequence and position.
            heads (`int`, *optional*, defaults to 1): Heads of the attention, for masks that differ by head.

        Returns:
            Bool `Tensor` of shape `(B, 1 | heads, max(lengths), max(key_lengths))`; `False` beyond a sequence's end.

        Raises:
            ValueError: A field that the mask reads is missing or has the wrong shape.
        """
        key_lengths = lengths if key_lengths is None else key_lengths
        fields = check_fields(self, fields, rows=lengths.numel())
        i = _positions_up_to(lengths).view(1, 1, -1, 1)
        j = _positions_up_to(key_lengths).view(1, 1, 1, -1)
        present = (i < lengths.view(-1, 1, 1, 1)) & (j < key_lengths.view(-1, 1, 1, 1))
        return self.allowed(i, j, fields) & present

    def __and__(self, other: Mask) -> Mask:
        return And(self, other) if isinstance(other, Mask) else NotImplemented

    def __or__(self, other: Mask) -> Mask:
        return Or(self, other) if isinstance(other, Mask) else NotImplemented

    def __invert__(self) -> Mask:
        return Not(self)


def _positions_up_to(lengths: Tensor) -> Tensor:
    longest = int(lengths.max()) if lengths.numel() else 0
    return torch.arange(longest, device=lengths.device)


def check_fields(mask: Mask, fields: Fields | None, rows: int | None = None) -> Fields:
    """The fields that `mask` reads, checked.

    Raises:
        ValueError: A field is missing or has the wrong shape.
    """
    fields = fields or {}
    for name in sorted(mask.fields):
        if name not in fields:
            have = ", ".join(f"`{key}`" for key in fields) or "none"
            raise ValueError(f"the mask '{mask}' reads the field `{name}`, which the batch lacks; it has {have}")
        expected, shape = FIELD_SHAPES[name], tuple(fields[name].shape)
        fits = len(shape) == len(expected) and all(
            not isinstance(want, int) or want == got for want, got in zip(expected, shape, strict=True)
        )
        if not fits or (rows is not None and shape[0] != rows):
            wanted = ", ".join(str(rows) if size == "B" and rows is not None else str(size) for size in expected)
            raise ValueError(f"the field `{name}` must have shape ({wanted}); got {shape}")
    return {name: fields[name] for name in mask.fields}


# --- Operators -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class And(Mask):
    """Both masks allow the pair."""

    left: Mask
    right: Mask

    @property
    def fields(self) -> frozenset[str]:
        return self.left.fields | self.right.fields

    def allowed(self, i, j, fields):
        return self.left.allowed(i, j, fields) & self.right.allowed(i, j, fields)

    def _classify(self, q_lo, q_hi, k_lo, k_hi, fields):
        always_l, never_l = self.left._classify(q_lo, q_hi, k_lo, k_hi, fields)
        always_r, never_r = self.right._classify(q_lo, q_hi, k_lo, k_hi, fields)
        return always_l & always_r, never_l | never_r

    def band(self):
        left, right = self.left.band(), self.right.band()
        if left is None or right is None:
            return None
        return tuple(min((b for b in pair if b is not None), default=None) for pair in zip(left, right, strict=True))

    def __str__(self):
        return f"{_operand(self.left, 2)} & {_operand(self.right, 3)}"


@dataclass(frozen=True)
class Or(Mask):
    """Either mask allows the pair."""

    left: Mask
    right: Mask

    @property
    def fields(self) -> frozenset[str]:
        return self.left.fields | self.right.fields

    def allowed(self, i, j, fields):
        return self.left.allowed(i, j, fields) | self.right.allowed(i, j, fields)

    def _classify(self, q_lo, q_hi, k_lo, k_hi, fields):
        always_l, never_l = self.left._classify(q_lo, q_hi, k_lo, k_hi, fields)
        always_r, never_r = self.right._classify(q_lo, q_hi, k_lo, k_hi, fields)
        return always_l | always_r, never_l & never_r

    def __str__(self):
        return f"{_operand(self.left, 1)} | {_operand(self.right, 2)}"


@dataclass(frozen=True)
class Not(Mask):
    """The mask does not allow the pair."""

    mask: Mask

    @property
    def fields(self) -> frozenset[str]:
        return self.mask.fields

    def allowed(self, i, j, fields):
        return ~self.mask.allowed(i, j, fields)

    def _classify(self, q_lo, q_hi, k_lo, k_hi, fields):
        always, never = self.mask._classify(q_lo, q_hi, k_lo, k_hi, fields)
        return never, always

    def __str__(self):
        return f"~{_operand(self.mask, 3)}"


def _operand(mask: Mask, level: int) -> str:
    """Text of an operand, in parentheses where it binds less tightly than `level` (1: `|`, 2: `&`, 3: `~`)."""
    binds = {Or: 1, And: 2}.get(type(mask), 3)
    return str(mask) if binds >= level else f"({mask})"


# --- Leaves ----------------------------------------------------------------------------------------------------------

_LEAVES: dict[str, type[Leaf]] = {}
_LARGEST = 2**62  # sums with positions still fit in 64 bits


class Leaf(Mask):
    """A mask with a name and integer arguments; subclasses enter the language under their `name`."""

    name: ClassVar[str]

    def __init_subclass__(cls):
        super().__init_subclass__()
        if "name" in vars(cls):
            _LEAVES[cls.name] = cls

    def __str__(self):
        values = [getattr(self, field.name) for field in dataclass_fields(self)]  # type: ignore[arg-type]
        arguments = ", ".join(str(value) for value in values if value is not None)
        return f"{self.name}({arguments})" if arguments else self.name


def _check_int(leaf: Leaf, argument: str, minimum: int) -> None:
    value = getattr(leaf, argument)
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"`{argument}` of `{leaf.name}` must be an integer of at least {minimum}; got {value!r}")
    if value > _LARGEST:
        raise ValueError(f"`{argument}` of `{leaf.name}` must be at most {_LARGEST}; got {value}")


class _BandLeaf(Leaf):
    """A leaf that is nothing but its band, `i - left <= j <= i + right` (`None`: unbounded)."""

    def band(self) -> Band:
        raise NotImplementedError

    def allowed(self, i, j, fields):
        left, right = self.band()
        seen = _everywhere(i, j)
        if left is not None:
            seen = seen & (j >= i - left)
        if right is not None:
            seen = seen & (j <= i + right)
        return seen

    def _classify(self, q_lo, q_hi, k_lo, k_hi, fields):
        return _band_ranges(*self.band(), q_lo, q_hi, k_lo, k_hi)


@dataclass(frozen=True)
class Full(_BandLeaf):
    """`full`: every pair (bidirectional)."""

    name = "full"

    def band(self):
        return None, None


@dataclass(frozen=True)
class Causal(_BandLeaf):
    """`causal`: `j <= i` (forward mask)."""

    name = "causal"

    def band(self):
        return None, 0


@dataclass(frozen=True)
class Backward(_BandLeaf):
    """`backward`: `j >= i` (backward mask)."""

    name = "backward"

    def band(self):
        return 0, None


@dataclass(frozen=True)
class Diagonal(_BandLeaf):
    """`diagonal`: `j == i`."""

    name = "diagonal"

    def band(self):
        return 0, 0


@dataclass(frozen=True)
class Window(_BandLeaf):
    """`window(left, right)`: `i - left <= j <= i + right`, both ends included; `window(w)` is `window(w, w)`."""

    name = "window"
    left: int
    right: int | None = None

    def __post_init__(self):
        if self.right is None:
            object.__setattr__(self, "right", self.left)
        _check_int(self, "left", 0)
        _check_int(self, "right", 0)

    def band(self):
        return self.left, self.right


@dataclass(frozen=True)
class Dilated(Leaf):
    """`dilated(width, step)`: `abs(i - j) <= width` and `(i - j) % step == 0`."""

    name = "dilated"
    width: int
    step: int

    def __post_init__(self):
        _check_int(self, "width", 0)
        _check_int(self, "step", 1)

    def allowed(self, i, j, fields):
        distance = i - j
        return (distance.abs() <= self.width) & (distance % self.step == 0)

    def _classify(self, q_lo, q_hi, k_lo, k_hi, fields):
        inside, _ = _band_ranges(self.width, self.width, q_lo, q_hi, k_lo, k_hi)
        lowest = (q_lo - k_hi).clamp(min=-self.width)
        highest = (q_hi - k_lo).clamp(max=self.width)
        multiples = highest.div(self.step, rounding_mode="floor") - (lowest - 1).div(self.step, rounding_mode="floor")
        every = (multiples == highest - lowest + 1) & inside
        return every, multiples <= 0


@dataclass(frozen=True)
class Chunk(Leaf):
    """`chunk(size)`: `i // size == j // size`."""

    name = "chunk"
    size: int

    def __post_init__(self):
        _check_int(self, "size", 1)

    def allowed(self, i, j, fields):
        return i // self.size == j // self.size

    def _classify(self, q_lo, q_hi, k_lo, k_hi, fields):
        return _equal_ranges(*(bound // self.size for bound in (q_lo, q_hi, k_lo, k_hi)))


@dataclass(frozen=True)
class ChunkCausal(Leaf):
    """`chunk_causal(size)`: `j // size <= i // size`."""

    name = "chunk_causal"
    size: int

    def __post_init__(self):
        _check_int(self, "size", 1)

    def allowed(self, i, j, fields):
        return j // self.size <= i // self.size

    def _classify(self, q_lo, q_hi, k_lo, k_hi, fields):
        return _band_ranges(None, 0, *(bound // self.size for bound in (q_lo, q_hi, k_lo, k_hi)))


@dataclass(frozen=True)
class Prefix(Leaf):
    """`prefix(n)`: `j < n`; `prefix`: `j < prefix_lengths[b]`. `causal | prefix` is a prefix LM."""

    name = "prefix"
    n: int | None = None

    def __post_init__(self):
        if self.n is not None:
            _check_int(self, "n", 0)

    @property
    def fields(self):
        return frozenset() if self.n is not None else frozenset({"prefix_lengths"})

    def _end(self, like: Tensor, fields: Fields) -> int | Tensor:
        return self.n if self.n is not None else _per_sequence(fields["prefix_lengths"], like)

    def allowed(self, i, j, fields):
        everywhere = _everywhere(i, j)
        return (j < self._end(everywhere, fields)) & everywhere

    def _classify(self, q_lo, q_hi, k_lo, k_hi, fields):
        everywhere = _everywhere(q_lo, k_lo)
        end = self._end(everywhere, fields)
        return (k_hi < end) & everywhere, (k_lo >= end) & everywhere


@dataclass(frozen=True)
class Span(Leaf):
    """`span(start, length)`: `start <= j < start + length`; `~span(3, 5)` hides the five keys from position 3."""

    name = "span"
    start: int
    length: int

    def __post_init__(self):
        _check_int(self, "start", 0)
        _check_int(self, "length", 0)

    def allowed(self, i, j, fields):
        return (j >= self.start) & (j < self.start + self.length) & _everywhere(i, j)

    def _classify(self, q_lo, q_hi, k_lo, k_hi, fields):
        stop = self.start + self.length
        everywhere = _everywhere(q_lo, k_lo)
        outside = (k_hi < self.start) | (k_lo >= stop)
        return (k_lo >= self.start) & (k_hi < stop) & everywhere, (outside | (self.length == 0)) & everywhere


@dataclass(frozen=True)
class Visible(Leaf):
    """`visible`: `j` lies in none of `hidden_spans[b]`, pairs (start, length) as in `span`; length 0 hides nothing."""

    name = "visible"

    @property
    def fields(self):
        return frozenset({"hidden_spans"})

    def _spans(self, like: Tensor, fields: Fields) -> list[tuple[Tensor, Tensor]]:
        spans = fields["hidden_spans"]
        starts, lengths = spans.unbind(-1)
        stops = starts + lengths
        return [(_per_sequence(starts[:, k], like), _per_sequence(stops[:, k], like)) for k in range(spans.shape[1])]

    def allowed(self, i, j, fields):
        seen = _everywhere(i, j)
        for start, stop in self._spans(seen, fields):
            seen = seen & ((j < start) | (j >= stop))
        return seen

    def _classify(self, q_lo, q_hi, k_lo, k_hi, fields):
        always = _everywhere(q_lo, k_lo)
        never = ~always
        for start, stop in self._spans(always, fields):
            empty = stop <= start
            always = always & (empty | (k_hi < start) | (k_lo >= stop))
            never = never | (~empty & (k_lo >= start) & (k_hi < stop))
        return always, never


@dataclass(frozen=True)
class Segments(Leaf):
    """`segments`: `segment_ids[i] == segment_ids[j]` (documents inside a row)."""

    name = "segments"

    @property
    def fields(self):
        return frozenset({"segment_ids"})

    def allowed(self, i, j, fields):
        segment_ids = fields["segment_ids"]
        return _per_token(segment_ids, i) == _per_token(segment_ids, j)

    def _classify(self, q_lo, q_hi, k_lo, k_hi, fields):
        extremes = _RangeExtremes(fields["segment_ids"])
        return _equal_ranges(*extremes(q_lo, q_hi), *extremes(k_lo, k_hi))


# --- Rules on ranges -------------------------------------------------------------------------------------------------


def _everywhere(i: Tensor, j: Tensor) -> Tensor:
    """True in the shape to which `i` and `j` broadcast."""
    shape = torch.broadcast_shapes(i.shape, j.shape)
    return torch.ones(shape, dtype=torch.bool, device=i.device)


def _band_ranges(
    left: int | None, right: int | None, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor
) -> tuple[Tensor, Tensor]:
    """(always, never) of `i - left <= j <= i + right`; `None` is unbounded."""
    always = _everywhere(q_lo, k_lo)
    never = ~always
    if left is not None:
        always, never = always & (k_lo >= q_hi - left), never | (k_hi < q_lo - left)
    if right is not None:
        always, never = always & (k_hi <= q_lo + right), never | (k_lo > q_hi + right)
    return always, never


def _equal_ranges(q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> tuple[Tensor, Tensor]:
    """(always, never) of equality between values that lie in the two ranges."""
    always = (q_lo == q_hi) & (k_lo == k_hi) & (q_lo == k_lo)
    return always, (q_hi < k_lo) | (k_hi < q_lo)


# --- Fields ----------------------------------------------------------------------------------------------------------


def _per_sequence(field: Tensor, like: Tensor) -> Tensor:
    """`field (B,)` shaped to broadcast against `like (B | 1, ...)`."""
    return field.view(-1, *(1,) * (like.dim() - 1)) if field.numel() != 1 else field.reshape(())


def _per_token(field: Tensor, index: Tensor) -> Tensor:
    """`field (B, T)` at positions `index (B | 1, ...)`; result `(B, ...)`."""
    rows = field.shape[0]
    if rows == 1:
        return field[0][index]
    if index.dim() == 0 or index.shape[0] not in (1, rows):
        raise ValueError(f"ranges over fields of {rows} sequences must have first dimension {rows}; got {index.shape}")
    index = index.expand(rows, *index.shape[1:])
    return field.gather(1, index.flatten(1)).view(index.shape)


class _RangeExtremes:
    """Smallest and largest value of `field (B, T)` over any range of positions, by a sparse table."""

    def __init__(self, field: Tensor):
        self.levels = [(field, field)]
        width = 1
        while 2 * width <= field.shape[1]:
            low, high = self.levels[-1]
            self.levels.append(
                (torch.minimum(low[:, :-width], low[:, width:]), torch.maximum(high[:, :-width], high[:, width:]))
            )
            width *= 2

    def __call__(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        lo, hi = torch.broadcast_tensors(lo, hi)
        if lo.numel() == 0 or self.levels[0][0].numel() == 0:
            return lo, hi  # no range to speak of
        size = (hi - lo + 1).clamp(min=1)
        level_of = size.to(torch.float64).log2().floor().long()
        smallest = largest = None
        for level, (low, high) in enumerate(self.levels):
            here = level_of == level
            if not here.any():
                continue
            last = low.shape[1] - 1
            first, second = lo.clamp(0, last), (hi - 2**level + 1).clamp(0, last)
            low_here = torch.minimum(_per_token(low, first), _per_token(low, second))
            high_here = torch.maximum(_per_token(high, first), _per_token(high, second))
            smallest = low_here if smallest is None else torch.where(here, low_here, smallest)
            largest = high_here if largest is None else torch.where(here, high_here, largest)
        assert smallest is not None and largest is not None
        return smallest, largest


# --- Text ------------------------------------------------------------------------------------------------------------

_OPERATORS: dict[type, Callable] = {ast.BitAnd: operator.and_, ast.BitOr: operator.or_}


def parse(text: str) -> Mask:
    """Read a mask expression.

    Args:
        text (`str`): Leaves of the language joined by `&`, `|`, `~` and parentheses, with Python's precedence.

    Returns:
        [`Mask`], with `parse(str(mask)) == mask`.

    Raises:
        ValueError: The text is no expression of the language; the message names the column (from 1).
    """
    if not isinstance(text, str):
        raise ValueError(f"a mask must be text such as 'causal & window(255, 0)'; got {text!r}")
    return _parse(text)


@lru_cache(maxsize=1024)
def _parse(text: str) -> Mask:
    line = " ".join(text.splitlines())
    try:
        return _read(ast.parse(line.strip(), mode="eval").body)
    except SyntaxError as error:
        # Python gives column 0 or the first one for a text that ends too early.
        offset = (error.offset or 0) - 1
        raise _parse_error(text, offset if offset > 0 else len(line.strip()), error.msg) from None
    except _Unreadable as error:
        raise _parse_error(text, error.node.col_offset, str(error)) from None
    except (RecursionError, MemoryError):
        raise ValueError(f"mask does not parse: nested too deeply ({len(text)} characters)") from None


class _Unreadable(Exception):
    def __init__(self, node: ast.expr, reason: str):
        super().__init__(reason)
        self.node = node


def _parse_error(text: str, offset: int, reason: str) -> ValueError:
    column = offset + 1 + len(text) - len(text.lstrip())
    return ValueError(f"mask does not parse at column {column}: {reason}; got {text!r}")


def _read(node: ast.expr) -> Mask:
    match node:
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_read(left), _read(right))
        case ast.UnaryOp(op=ast.Invert(), operand=operand):
            return ~_read(operand)
        case ast.Name(id=name):
            return _leaf(node, name, [])
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]):
            return _leaf(node, name, [_read_number(argument) for argument in arguments])
    raise _Unreadable(node, "expected a mask, `&`, `|`, `~` or parentheses")


def _leaf(node: ast.expr, name: str, arguments: list[int | float]) -> Mask:
    if name not in _LEAVES:
        raise _Unreadable(node, f"unknown mask `{name}`; known are {', '.join(sorted(_LEAVES))}")
    leaf = _LEAVES[name]
    try:
        signature(leaf).bind(*arguments)
    except TypeError:
        wanted = ", ".join(signature(leaf).parameters)
        raise _Unreadable(node, f"`{name}` takes ({wanted}); got {len(arguments)} arguments") from None
    try:
        return leaf(*arguments)
    except ValueError as error:
        raise _Unreadable(node, str(error)) from None


def _read_number(node: ast.expr) -> int | float:
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_read_number(operand)
    raise _Unreadable(node, "expected a number")


full = Full
causal = Causal
backward = Backward
diagonal = Diagonal
window = Window
dilated = Dilated
chunk = Chunk
chunk_causal = ChunkCausal
prefix = Prefix
span = Span
visible = Visible
segments = Segments
