"""The mask language: which query may see which key, as a small expression.

`parse("causal & window(255, 0)")` and `causal() & window(255, 0)` make the same mask. Each leaf states its rule twice,
side by side: on indices (`allowed`) and on ranges of indices (`classify`), where the answer is *always*, *never* or
*depends*. Operators combine the three values (Kleene), so the blocks of any expression are known without looking at
single cells.

Shape legend: B sequences, `i` query position, `j` key position. Index tensors have the sequence (or 1) as their first
dimension wherever a field is read.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from dataclasses import fields as dataclass_fields
from difflib import get_close_matches
from functools import lru_cache, reduce
from inspect import signature
from itertools import chain, groupby
from typing import ClassVar, NoReturn

import torch
from torch import Tensor

from .fields import Fields, check_extent, check_fields
from .layout import checked_lengths, integers
from .messages import shown

Band = tuple[int | None, int | None]
NO_FIELDS: frozenset[str] = frozenset()
MAX_DEPTH = 16  # of masks in one another: to trace them for a kernel takes dozens of Python's 1000 frames for each
MAX_LEAVES = 2**13
MAX_CHARACTERS = 2**14  # of a text, which a stranger may have written


class Mask:
    """An immutable mask expression. Combine masks with `&`, `|` and `~`; compare them with `==`."""

    depth: int = 1  # a leaf's; of other masks one more than that of the deepest part
    leaves: int = 1

    @property
    def parts(self) -> tuple[Mask, ...]:
        """The expressions that this one is made of; none for most leaves."""
        return ()

    def with_parts(self, parts: tuple[Mask, ...]) -> Mask:
        """The same expression made of other parts."""
        return self

    @property
    def fields(self) -> frozenset[str]:
        """Names of the batch's fields that the expression reads."""
        return self._own_fields().union(*(part.fields for part in self.parts))

    def _own_fields(self) -> frozenset[str]:
        return NO_FIELDS

    def holds(self, leaf: type[Mask]) -> bool:
        """Whether a leaf of this type is part of the expression."""
        return isinstance(self, leaf) or any(part.holds(leaf) for part in self.parts)

    @property
    def is_relative(self) -> bool:
        """Whether the rule depends on `i - j` alone."""
        return bool(self.parts) and all(part.is_relative for part in self.parts)

    def allowed(self, i: Tensor, j: Tensor, fields: Fields) -> Tensor:
        """Whether query position `i (B | 1, 1, Tq, 1)` may see key position `j (B | 1, 1, 1, Tk)`; they broadcast.

        The expression must be a [`resolved`] one.
        """
        raise NotImplementedError

    def _classify(
        self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor, fields: Fields
    ) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def band(self) -> Band | None:
        """`(left, right)` where the mask is exactly `i - left <= j <= i + right` (`None`: unbounded); else `None`."""
        return None

    def resolved(self, head: int = 0, heads: int = 1) -> Mask:
        """The expression that one of `heads` heads follows: free of `heads(...)`, and `topk` knows its candidates.

        Raises:
            ValueError: The number of masks in `heads(...)` does not divide `heads`.
        """
        return self._of_head(head, heads)._within(None)

    def head_borders(self, heads: int) -> frozenset[int]:
        """The heads, of `heads`, at which another expression may begin; made without looking at each head.

        Raises:
            ValueError: The number of masks in `heads(...)` does not divide `heads`.
        """
        return frozenset({0}).union(*(part.head_borders(heads) for part in self.parts))

    def _of_head(self, head: int, heads: int) -> Mask:
        return self.with_parts(tuple(part._of_head(head, heads) for part in self.parts))

    def _within(self, candidates: Mask | None) -> Mask:
        """The expression with its `topk` leaves told which keys there are to choose from."""
        return self.with_parts(tuple(part._within(candidates) for part in self.parts))

    def without_choice(self) -> Mask:
        """The expression with `full` in place of `topk`: what it allows at most."""
        return self.with_parts(tuple(part.without_choice() for part in self.parts))

    def classify(
        self,
        q_lo: Tensor,
        q_hi: Tensor,
        k_lo: Tensor,
        k_hi: Tensor,
        fields: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """What the mask says of whole blocks.

        Args:
            q_lo, q_hi, k_lo, k_hi (`Tensor`, integer):
                First and last position of each range of queries and keys, both included; they broadcast. With fields of
                B > 1 sequences their first dimension is B or 1.
            fields (`dict[str, Tensor]`, *optional*): The fields that the mask reads, by sequence and position.

        Returns:
            `(always, never)`, bool tensors of the broadcast shape: every pair, or none, of the two ranges is allowed,
            for every head. Where both are `False` it depends. `always` and `never` are never wrong; *depends* may be
            too cautious.

        Raises:
            ValueError: A field that the mask reads is missing or has the wrong shape or dtype; positions are no
                integers.
        """
        q_lo, q_hi = integers("q_lo", q_lo), integers("q_hi", q_hi)
        k_lo, k_hi = integers("k_lo", k_lo), integers("k_hi", k_hi)
        return self.classify_checked(q_lo, q_hi, k_lo, k_hi, self.checked(fields))

    def classify_checked(
        self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor, fields: Fields
    ) -> tuple[Tensor, Tensor]:
        """[`classify`] with int64 positions and fields that were checked before."""
        always, never = self._classify(q_lo, q_hi, k_lo, k_hi, fields)
        shape = torch.broadcast_shapes(q_lo.shape, q_hi.shape, k_lo.shape, k_hi.shape, always.shape, never.shape)
        return always.expand(shape), never.expand(shape)

    def checked(self, fields: Mapping[str, Tensor] | None, rows: int | None = None) -> Fields:
        """The fields that the mask reads, by sequence and position, for `rows` sequences.

        Raises:
            ValueError: A field is missing, has the wrong shape or dtype, or a value that the mask has no use for.
        """
        found = check_fields(self.fields, fields, reader=self, rows=rows)
        self._check_values(found)
        return found

    def _check_values(self, fields: Fields) -> None:
        for part in self.parts:
            part._check_values(fields)

    def dense(
        self,
        lengths: Tensor,
        *,
        key_lengths: Tensor | None = None,
        fields: Mapping[str, Tensor] | None = None,
        heads: int = 1,
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
            ValueError: Lengths are no integers, or negative; a field that the mask reads is missing or has the wrong
                shape or dtype; the number of masks in `heads(...)` does not divide `heads`.
        """
        i = _positions_up_to("lengths", lengths).view(1, 1, -1, 1)
        j = i.mT
        if key_lengths is not None:
            j = _positions_up_to("key_lengths", key_lengths).view(1, 1, 1, -1)
        key_lengths = lengths if key_lengths is None else key_lengths
        checked = self.checked(fields, rows=lengths.numel())
        check_extent(checked, i.numel(), j.numel(), heads)
        real = j < key_lengths.long().view(-1, 1, 1, 1)
        if "key_scores" in checked.tables:
            scores = checked.tables["key_scores"][..., : j.numel()]
            checked = checked.having("key_scores", scores.masked_fill(~real[:, 0], -torch.inf))
        return allowed_by_head(self, heads, i, j, checked) & real & (i < lengths.long().view(-1, 1, 1, 1))

    def __and__(self, other: Mask) -> Mask:
        return And(self, other) if isinstance(other, Mask) else NotImplemented

    def __or__(self, other: Mask) -> Mask:
        return Or(self, other) if isinstance(other, Mask) else NotImplemented

    def __invert__(self) -> Mask:
        return Not(self)


def head_runs(mask: Mask, heads: int) -> list[tuple[slice, Mask]]:
    """Runs of neighbouring heads that follow the same expression, each [`Mask.resolved`]."""
    borders = sorted(mask.head_borders(heads))
    runs = groupby(borders, key=lambda head: mask.resolved(head, heads))
    starts = [(next(run), found) for found, run in runs]
    ends = [start for start, _ in starts[1:]] + [heads]
    return [(slice(start, end), found) for (start, found), end in zip(starts, ends, strict=True)]


def allowed_by_head(mask: Mask, heads: int, i: Tensor, j: Tensor, fields: Fields) -> Tensor:
    """[`Mask.allowed`] of all heads: bool `(B, 1 | heads, Tq, Tk)`."""
    runs = head_runs(mask, heads)
    if len(runs) == 1:
        return runs[0][1].allowed(i, j, fields)
    cells = [found.allowed(i, j, fields.heads(run)).expand(-1, run.stop - run.start, -1, -1) for run, found in runs]
    rows = max(part.shape[0] for part in cells)
    return torch.cat([part.expand(rows, -1, -1, -1) for part in cells], dim=1)


def _positions_up_to(name: str, lengths: Tensor) -> Tensor:
    return torch.arange(max(checked_lengths(name, lengths), default=0), device=lengths.device)


# --- Expressions of expressions --------------------------------------------------------------------------------------


@dataclass(frozen=True, init=False)
class _Compound(Mask):
    """A mask that is made of masks."""

    masks: tuple[Mask, ...]

    def __init__(self, *masks: Mask):
        depth = 1 + max(mask.depth - self._merges(mask) for mask in masks)
        leaves = sum(mask.leaves for mask in masks)
        if depth > MAX_DEPTH:
            raise ValueError(
                f"masks must be at most {MAX_DEPTH} deep in one another (chains count as one); got {depth}"
            )
        if leaves > MAX_LEAVES:
            raise ValueError(f"a mask must be made of at most {MAX_LEAVES} leaves; got {leaves}")
        parts = chain.from_iterable(mask.parts if self._merges(mask) else (mask,) for mask in masks)
        for name, value in (("masks", tuple(parts)), ("depth", depth), ("leaves", leaves)):
            object.__setattr__(self, name, value)  # it is frozen

    def _merges(self, mask: Mask) -> bool:
        """Whether the parts of a mask become parts of this one."""
        return False

    @property
    def parts(self):
        return self.masks

    def with_parts(self, parts):
        return type(self)(*parts)


class _Chain(_Compound):
    """Masks joined by an operator that may group them in any way."""

    sign: ClassVar[str]
    level: ClassVar[int]  # how tightly it binds
    join: ClassVar[Callable]
    join_complements: ClassVar[Callable]

    def _merges(self, mask):
        return type(mask) is type(self)

    def allowed(self, i, j, fields):
        seen = self.masks[0].allowed(i, j, fields)
        for mask in self.masks[1:]:  # one frame a level: kernels have this traced, with a dozen of Python's for each
            seen = self.join(seen, mask.allowed(i, j, fields))
        return seen

    def _classify(self, q_lo, q_hi, k_lo, k_hi, fields):
        answers = [mask._classify(q_lo, q_hi, k_lo, k_hi, fields) for mask in self.masks]
        always, never = zip(*answers, strict=True)
        return reduce(self.join, always), reduce(self.join_complements, never)

    def __str__(self):
        return f" {self.sign} ".join(_operand(mask, self.level + 1) for mask in self.masks)


class And(_Chain):
    """Every mask allows the pair."""

    sign, level, join, join_complements = "&", 2, operator.and_, operator.or_

    def band(self):
        bands = [mask.band() for mask in self.masks]
        if None in bands:
            return None
        return tuple(min((b for b in side if b is not None), default=None) for side in zip(*bands, strict=True))

    def _within(self, candidates):
        before = [] if candidates is None else [candidates]
        found = [mask.without_choice() for mask in self.masks]

        def beside(place: int) -> Mask:
            return reduce(operator.and_, dict.fromkeys([*before, *found[:place], *found[place + 1 :]]))

        parts = enumerate(self.masks)
        return And(*(mask._within(beside(place)) if mask.holds(TopK) else mask for place, mask in parts))


class Or(_Chain):
    """Some mask allows the pair."""

    sign, level, join, join_complements = "|", 1, operator.or_, operator.and_


class Not(_Compound):
    """The mask does not allow the pair."""

    def __init__(self, mask: Mask):
        super().__init__(mask)
        if mask.holds(TopK):
            raise ValueError(f"`~` cannot be applied to `topk`, which chooses among what is allowed; got '{self}'")

    @property
    def mask(self) -> Mask:
        """What is turned around."""
        return self.masks[0]

    def allowed(self, i, j, fields):
        return ~self.mask.allowed(i, j, fields)

    def _classify(self, q_lo, q_hi, k_lo, k_hi, fields):
        always, never = self.mask._classify(q_lo, q_hi, k_lo, k_hi, fields)
        return never, always

    def __str__(self):
        return f"~{_operand(self.mask, 3)}"


def _operand(mask: Mask, level: int) -> str:
    """Text of an operand, in parentheses where it binds less tightly than `level` (1: `|`, 2: `&`, 3: `~`)."""
    binds = mask.level if isinstance(mask, _Chain) else 3
    return str(mask) if binds >= level else f"({mask})"


# --- Leaves ----------------------------------------------------------------------------------------------------------

_LEAVES: dict[str, type[Leaf]] = {}
_LARGEST = 2**62  # differences of positions and of these still fit in 64 bits


class Leaf(Mask):
    """A mask with a name and arguments, in text numbers; subclasses enter the language under their `name`."""

    name: ClassVar[str]

    def __init_subclass__(cls):
        super().__init_subclass__()
        if "name" in vars(cls):
            _LEAVES[cls.name] = cls

    def __str__(self):
        values = [getattr(self, entry.name) for entry in dataclass_fields(self)]  # type: ignore[arg-type]
        arguments = ", ".join(str(value) for value in values if value is not None)
        return f"{self.name}({arguments})" if arguments else self.name


def _check_int(leaf: Leaf, argument: str, minimum: int, maximum: int = _LARGEST) -> None:
    value = getattr(leaf, argument)
    got = shown(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"`{argument}` of `{leaf.name}` must be an integer of at least {minimum}; got {got}")
    if value > maximum:
        raise ValueError(f"`{argument}` of `{leaf.name}` must be at most {maximum}; got {got}")


class _BandLeaf(Leaf):
    """A leaf that is nothing but its band, `i - left <= j <= i + right` (`None`: unbounded)."""

    def band(self) -> Band:
        raise NotImplementedError

    @property
    def is_relative(self):
        return True

    def allowed(self, i, j, fields):
        left, right = self.band()
        seen = _everywhere(i, j)
        if left is not None:
            seen = seen & (j >= i - left)
        if right is not None:
            seen = seen & (j - right <= i)  # no sum of the two, which might not fit in 64 bits
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

    @property
    def is_relative(self):
        return True

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

    def _own_fields(self):
        return NO_FIELDS if self.n is not None else frozenset({"prefix_lengths"})

    def _end(self, like: Tensor, fields: Fields) -> int | Tensor:
        return self.n if self.n is not None else fields.of_sequence("prefix_lengths", like)

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
        return _in_span(j, j, self.start, self.length) & _everywhere(i, j)

    def _classify(self, q_lo, q_hi, k_lo, k_hi, fields):
        everywhere = _everywhere(q_lo, k_lo)
        outside = _outside_span(k_lo, k_hi, self.start, self.length) | (self.length == 0)
        return _in_span(k_lo, k_hi, self.start, self.length) & everywhere, outside & everywhere


@dataclass(frozen=True)
class Visible(Leaf):
    """`visible`: `j` lies in none of `hidden_spans[b]`, pairs (start, length) as in `span`. A length of 0 or less hides
    nothing."""

    name = "visible"

    def _own_fields(self):
        return frozenset({"hidden_spans"})

    def _spans(self, like: Tensor, fields: Fields) -> list[tuple[Tensor, Tensor]]:
        # Number by number: FlexAttention's kernels go wrong with a table of spans as a value.
        spans = range(fields.tables["hidden_spans"].shape[1])
        start, length = ([fields.of_sequence("hidden_spans", like, k, end) for k in spans] for end in (0, 1))
        return list(zip(start, length, strict=True))

    def allowed(self, i, j, fields):
        seen = _everywhere(i, j)
        for start, length in self._spans(seen, fields):
            seen = seen & _outside_span(j, j, start, length)
        return seen

    def _classify(self, q_lo, q_hi, k_lo, k_hi, fields):
        always = _everywhere(q_lo, k_lo)
        never = ~always
        for start, length in self._spans(always, fields):
            always = always & ((length <= 0) | _outside_span(k_lo, k_hi, start, length))
            never = never | _in_span(k_lo, k_hi, start, length)
        return always, never


@dataclass(frozen=True)
class Segments(Leaf):
    """`segments`: `segment_ids[i] == segment_ids[j]` (documents inside a row)."""

    name = "segments"

    def _own_fields(self):
        return frozenset({"segment_ids"})

    def allowed(self, i, j, fields):
        return fields.of_query("segment_ids", i) == fields.of_key("segment_ids", j)

    def _classify(self, q_lo, q_hi, k_lo, k_hi, fields):
        queries = fields.query_extremes("segment_ids", q_lo, q_hi)
        return _equal_ranges(*queries, *fields.key_extremes("segment_ids", k_lo, k_hi))


@dataclass(frozen=True)
class SharedQuestion(Leaf):
    """`shared_question`: `segment_ids[j] == 0 or segment_ids[i] == segment_ids[j]` (one question, several answers)."""

    name = "shared_question"

    def _own_fields(self):
        return frozenset({"segment_ids"})

    def allowed(self, i, j, fields):
        of_key = fields.of_key("segment_ids", j)
        return (of_key == 0) | (fields.of_query("segment_ids", i) == of_key)

    def _classify(self, q_lo, q_hi, k_lo, k_hi, fields):
        q_least, q_most = fields.query_extremes("segment_ids", q_lo, q_hi)
        k_least, k_most = fields.key_extremes("segment_ids", k_lo, k_hi)
        always, never = _equal_ranges(q_least, q_most, k_least, k_most)
        return always | ((k_least == 0) & (k_most == 0)), never & ((k_least > 0) | (k_most < 0))


@dataclass(frozen=True)
class GlobalTokens(Leaf):
    """`global_tokens(n)`: `i < n or j < n`; `global_tokens`: `global_tokens[b, i] or global_tokens[b, j]`."""

    name = "global_tokens"
    n: int | None = None

    def __post_init__(self):
        if self.n is not None:
            _check_int(self, "n", 0)

    def _own_fields(self):
        return NO_FIELDS if self.n is not None else frozenset({"global_tokens"})

    def allowed(self, i, j, fields):
        if self.n is not None:
            return (i < self.n) | (j < self.n)
        return fields.of_query("global_tokens", i) | fields.of_key("global_tokens", j)

    def _classify(self, q_lo, q_hi, k_lo, k_hi, fields):
        if self.n is not None:
            return (q_hi < self.n) | (k_hi < self.n), (q_lo >= self.n) & (k_lo >= self.n)
        q_least, q_most = fields.query_extremes("global_tokens", q_lo, q_hi)
        k_least, k_most = fields.key_extremes("global_tokens", k_lo, k_hi)
        return (q_least > 0) | (k_least > 0), (q_most == 0) & (k_most == 0)


@dataclass(frozen=True)
class Random(Leaf):
    """`random(keep, seed)`: `hash(seed, i, j) < keep`, by counters: the same on every device and in every layout."""

    name = "random"
    keep: float
    seed: int

    def __post_init__(self):
        if isinstance(self.keep, bool) or not isinstance(self.keep, int | float) or not 0 <= self.keep <= 1:
            raise ValueError(f"`keep` of `random` must be a number from 0 to 1; got {self.keep!r}")
        _check_int(self, "seed", 0, maximum=2**32 - 1)

    def allowed(self, i, j, fields):
        return _mixed(_mixed(_mixed(self.seed) ^ i) ^ j) < int(self.keep * 2**32)

    def _classify(self, q_lo, q_hi, k_lo, k_hi, fields):
        everywhere = _everywhere(q_lo, k_lo)
        return everywhere & (self.keep == 1), everywhere & (self.keep == 0)


@dataclass(frozen=True)
class Dense(Leaf):
    """`dense`: the explicit `attention_mask`, cell by cell."""

    name = "dense"

    def _own_fields(self):
        return frozenset({"attention_mask"})

    def allowed(self, i, j, fields):
        return fields.of_pairs("attention_mask", i, j)

    def _classify(self, q_lo, q_hi, k_lo, k_hi, fields):
        return fields.pair_ranges("attention_mask", q_lo, q_hi, k_lo, k_hi)


@dataclass(frozen=True)
class TopK(Leaf):
    """`topk(n)`: the n keys with the highest score of those that the expressions joined to it by `&` allow.

    The scores, `key_scores`, are learned, per head ("Trainable Dynamic Mask Sparse Attention", arXiv:2508.02124). Ties
    go to the lowest position; a score of -inf is never chosen.

    Attributes:
        candidates (`Mask`, *optional*): What there is to choose from; set by [`Mask.resolved`]. `None`: all keys.
    """

    name = "topk"
    n: int
    candidates: Mask | None = field(default=None, kw_only=True)

    def __post_init__(self):
        _check_int(self, "n", 1)

    def _own_fields(self):
        return frozenset({"key_scores"}) | (self.candidates.fields if self.candidates is not None else NO_FIELDS)

    def _within(self, candidates):
        return replace(self, candidates=candidates)

    def without_choice(self):
        return Full()

    def allowed(self, i, j, fields):
        scores = fields.of_key_heads("key_scores", j)
        found = _everywhere(i, j) if self.candidates is None else self.candidates.allowed(i, j, fields)
        scores = torch.where(found, scores, -torch.inf)
        seen = scores > -torch.inf
        if scores.shape[-1] <= self.n:
            return seen
        least = scores.topk(self.n, dim=-1).values[..., -1:]
        above, equal = scores > least, (scores == least) & seen
        return above | (equal & (equal.cumsum(-1) <= self.n - above.sum(-1, keepdim=True)))

    def _classify(self, q_lo, q_hi, k_lo, k_hi, fields):
        depends = ~_everywhere(q_lo, k_lo)
        return depends, depends

    def __str__(self):
        return f"topk({self.n})"


_PREDICATES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {}


def register(name: str, predicate: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Enter a Python predicate into the language, as `custom(name)`.

    Args:
        name (`str`): An identifier of ASCII characters. Registering it again replaces the predicate.
        predicate (`Callable`): `predicate(i, j)`, of two integer tensors of positions that broadcast, gives the bool
            tensor of the pairs that are allowed. It is evaluated cell by cell.

    Raises:
        ValueError: `name` is no identifier.
    """
    if not (name.isidentifier() and name.isascii()):
        raise ValueError(f"`name` of a custom mask must be an identifier of ASCII characters; got {name!r}")
    _PREDICATES[name] = predicate


@dataclass(frozen=True)
class Custom(Leaf):
    """`custom(name)`: the predicate that [`register`] entered under the name."""

    name = "custom"
    predicate: str

    def __post_init__(self):
        if self.predicate not in _PREDICATES:
            known = ", ".join(sorted(_PREDICATES)) or "none"
            raise ValueError(f"no custom mask `{self.predicate}` is registered (`masks.register`); known are {known}")

    def allowed(self, i, j, fields):
        return _everywhere(i, j) & _PREDICATES[self.predicate](i, j)

    def _classify(self, q_lo, q_hi, k_lo, k_hi, fields):
        depends = ~_everywhere(q_lo, k_lo)
        return depends, depends


class _Choice(_Compound, Leaf):
    """A leaf that holds masks, one of which is followed."""

    def __init__(self, *masks: Mask):
        if not masks or not all(isinstance(mask, Mask) for mask in masks):
            raise ValueError(f"`{self.name}` must be given masks; got {', '.join(map(repr, masks)) or 'none'}")
        super().__init__(*masks)

    @property
    def is_relative(self):
        return False

    def __str__(self):
        return f"{self.name}({', '.join(map(str, self.masks))})"


class Heads(_Choice):
    """`heads(m0, m1, …)`: as many masks as heads, or a divisor, then each serves a run of heads."""

    name = "heads"

    def head_borders(self, heads):
        run = self._run(heads)
        return super().head_borders(heads).union(run * mask for mask in range(len(self.masks)))

    def _run(self, heads: int) -> int:
        """How many heads follow each mask."""
        run, left = divmod(heads, len(self.masks))
        if left:
            raise ValueError(
                f"`heads` must be given a number of masks that divides the {heads} heads; got {len(self.masks)}"
            )
        return run

    def _of_head(self, head, heads):
        return self.masks[head // self._run(heads)]._of_head(head, heads)

    def allowed(self, i, j, fields):
        raise ValueError(f"'{self}' differs by head; resolve it for one head first")

    def _classify(self, q_lo, q_hi, k_lo, k_hi, fields):
        answers = [mask._classify(q_lo, q_hi, k_lo, k_hi, fields) for mask in self.masks]
        always, never = zip(*answers, strict=True)
        return reduce(operator.and_, always), reduce(operator.and_, never)


class Select(_Choice):
    """`select(m0, m1, …)`: row b follows mask `mask_choice[b]`, by task or language, say."""

    name = "select"

    def _own_fields(self):
        return frozenset({"mask_choice"})

    def _check_values(self, fields):
        super()._check_values(fields)
        choice = fields.tables["mask_choice"]
        wrong = choice[(choice < 0) | (choice >= len(self.masks))]
        if wrong.numel():
            raise ValueError(
                f"the field `mask_choice` must hold 0 to {len(self.masks) - 1} for '{self}'; got {wrong[0].item()}"
            )

    def _chosen(self, answers: list[Tensor], like: Tensor, fields: Fields) -> Tensor:
        choice = fields.of_sequence("mask_choice", like)
        return reduce(operator.or_, (answer & (choice == k) for k, answer in enumerate(answers)))

    def allowed(self, i, j, fields):
        cells = [mask.allowed(i, j, fields) for mask in self.masks]
        return self._chosen(cells, cells[0], fields)

    def _classify(self, q_lo, q_hi, k_lo, k_hi, fields):
        answers = [mask._classify(q_lo, q_hi, k_lo, k_hi, fields) for mask in self.masks]
        everywhere = _everywhere(q_lo, k_lo)
        return tuple(self._chosen(list(kind), everywhere, fields) for kind in zip(*answers, strict=True))


# --- Rules on ranges -------------------------------------------------------------------------------------------------


def _everywhere(i: Tensor, j: Tensor) -> Tensor:
    """True in the shape to which `i` and `j` broadcast, made pair by pair, as kernels need it."""
    return (i == i) & (j == j)


def _band_ranges(
    left: int | None, right: int | None, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor
) -> tuple[Tensor, Tensor]:
    """(always, never) of `i - left <= j <= i + right`; `None` is unbounded."""
    always = _everywhere(q_lo, k_lo)
    never = ~always
    if left is not None:
        always, never = always & (k_lo >= q_hi - left), never | (k_hi < q_lo - left)
    if right is not None:
        always, never = always & (k_hi - right <= q_lo), never | (k_lo - right > q_hi)
    return always, never


def _in_span(lo: Tensor, hi: Tensor, start: int | Tensor, length: int | Tensor) -> Tensor:
    """Whether all of a range lies in `start <= j < start + length`, a sum that might not fit in 64 bits."""
    return (lo >= start) & (hi - start < length)


def _outside_span(lo: Tensor, hi: Tensor, start: int | Tensor, length: int | Tensor) -> Tensor:
    """Whether none of it does."""
    return (hi < start) | (lo - start >= length)


def _mixed(x):
    """A one-to-one scramble of integers below 2**32: the finaliser of MurmurHash3 (Austin Appleby, public domain)."""
    x = x ^ (x >> 16)
    x = (x * 0x85EBCA6B) & 0xFFFFFFFF
    x = x ^ (x >> 13)
    x = (x * 0xC2B2AE35) & 0xFFFFFFFF
    return x ^ (x >> 16)


def _equal_ranges(q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> tuple[Tensor, Tensor]:
    """(always, never) of equality between values that lie in the two ranges."""
    always = (q_lo == q_hi) & (k_lo == k_hi) & (q_lo == k_lo)
    return always, (q_hi < k_lo) | (k_hi < q_lo)


# --- Text ------------------------------------------------------------------------------------------------------------

_INTEGER = r"(?:0|[1-9](?:_?[0-9])*)"
_NUMBER = rf"(?:{_INTEGER}(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
_KINDS = {"name": "[A-Za-z_][A-Za-z0-9_]*", "number": _NUMBER, "sign": "[-&|~(),]", "end": r"\Z", "other": "."}
_TOKEN = re.compile(rf"[ \t\r\n]*(?:{'|'.join(f'(?P<{k}>{v})' for k, v in _KINDS.items())})", re.DOTALL)
_LONGEST_NUMBER = 100  # characters


def parse(text: str) -> Mask:
    """Read a mask expression.

    Args:
        text (`str`): Leaves of the language joined by `&`, `|`, `~` and parentheses, with Python's precedence. Spaces,
            tabs and line breaks may stand between them. There are no comments.

    Returns:
        [`Mask`], with `parse(str(mask)) == mask`.

    Raises:
        ValueError: The text is no expression of the language, has more than 16,384 characters or is more than 16 masks
            deep; the message names the column (from 1).
    """
    if not isinstance(text, str):
        raise ValueError(f"a mask must be text such as 'causal & window(255, 0)'; got {shown(text)}")
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"the text of a mask must have at most {MAX_CHARACTERS} characters; got {len(text)}")
    return _parse(text)


@lru_cache(maxsize=1024)
def _parse(text: str) -> Mask:
    return _Reader(text).whole()


class _Reader:
    """Reads a text from left to right, one token ahead.

    Python's own grammar would drop comments, read look-alikes of letters as letters and, in some of its releases, crash
    on deep texts.
    """

    def __init__(self, text: str):
        self.text = text
        self.kind: str | None = None
        self.token, self.start, self.end = "", 0, 0
        self.depth = 1
        self._next()

    def whole(self) -> Mask:
        mask = self._any()
        if self.kind != "end":
            self._fail("expected `&`, `|` or the end")
        return mask

    def _any(self) -> Mask:
        return self._chain("|", Or, self._every)

    def _every(self) -> Mask:
        return self._chain("&", And, self._operand)

    def _chain(self, sign: str, make: Callable[..., Mask], read: Callable[[], Mask]) -> Mask:
        start, masks = self.start, [read()]
        while self._skipped(sign):
            masks.append(read())
        return self._made(start, make, *masks) if len(masks) > 1 else masks[0]

    def _operand(self) -> Mask:
        start = self.start
        if self._skipped("~"):
            return self._made(start, Not, self._inside(self._operand))
        if self._skipped("("):
            mask = self._inside(self._any)
            if not self._skipped(")"):
                self._fail("expected `&`, `|` or `)`")
            return mask
        return self._leaf()

    def _leaf(self) -> Mask:
        if self.kind != "name":
            self._fail("expected a mask")
        start, name = self.start, self._next()
        if name not in _LEAVES:
            near = get_close_matches(name, _LEAVES, n=1)
            hint = f"did you mean `{near[0]}`? " if near else ""
            self._fail(f"unknown mask `{name[:100]}`; {hint}known are {', '.join(sorted(_LEAVES))}", start)
        leaf = _LEAVES[name]
        values = self._arguments(
            self._any if issubclass(leaf, _Choice) else self._custom if leaf is Custom else self._number
        )
        try:
            signature(leaf).bind(*values)
        except TypeError:
            wanted = ", ".join(p.name for p in signature(leaf).parameters.values() if p.kind is not p.KEYWORD_ONLY)
            self._fail(f"`{name}` takes ({wanted}); got {len(values)} arguments", start)
        return self._made(start, leaf, *values)

    def _arguments(self, read: Callable[[], object]) -> list:
        values = []
        if self._skipped("("):
            while not self._skipped(")"):
                values.append(self._inside(read))
                if not self._skipped(",") and self.token != ")":
                    self._fail("expected `,` or `)`")
        return values

    def _custom(self) -> str:
        if self.kind != "name":
            self._fail("expected the name of a registered mask")
        return self._next()

    def _number(self) -> int | float:
        start, is_negative = self.start, self._skipped("-")
        if self.kind != "number":
            self._fail("expected a number")
        token = self._next()
        if len(token) > _LONGEST_NUMBER:
            self._fail(f"a number must have at most {_LONGEST_NUMBER} characters; got {len(token)}", start)
        value = float(token) if re.search("[.eE]", token) else int(token)
        return -value if is_negative else value

    def _inside(self, read: Callable):
        """What stands inside parentheses or behind `~`, to a bounded depth."""
        if self.depth == MAX_DEPTH:
            self._fail(f"parentheses and `~` must be less than {MAX_DEPTH} deep in one another; got more", self.start)
        self.depth += 1
        found = read()
        self.depth -= 1
        return found

    def _made(self, start: int, make: Callable[..., Mask], *values) -> Mask:
        try:
            return make(*values)
        except ValueError as error:
            self._fail(str(error), start)

    def _skipped(self, sign: str) -> bool:
        """Whether the token is this sign, which is then read."""
        if self.token != sign:
            return False
        self._next()
        return True

    def _next(self) -> str:
        """The token, and on to the next."""
        read = self.token
        found = _TOKEN.match(self.text, self.end)
        assert found is not None and found.lastgroup is not None  # something matches any text
        self.kind, self.token = found.lastgroup, found[found.lastgroup]
        self.start, self.end = found.span(found.lastgroup)
        return read

    def _fail(self, reason: str, start: int | None = None) -> NoReturn:
        """Raises an error about what begins at `start`, or about the token, which is not what was expected."""
        if start is None:
            start = self.start
            reason += f", not {shown(self.token)}" if self.token else ", not the end"
        line, column = self.text.count("\n", 0, start) + 1, start - self.text.rfind("\n", 0, start)
        place = f"line {line}, column {column}" if "\n" in self.text.strip() else f"column {column}"
        raise ValueError(f"mask does not parse at {place}: {reason}; got {shown(self.text)}") from None


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
shared_question = SharedQuestion
global_tokens = GlobalTokens
random = Random
dense = Dense
heads = Heads
select = Select
topk = TopK
custom = Custom
