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
from dataclasses import dataclass, field, replace
from dataclasses import fields as dataclass_fields
from difflib import get_close_matches
from functools import lru_cache, reduce
from inspect import signature
from itertools import groupby
from typing import ClassVar

import torch
from torch import Tensor

from .fields import Fields, check_extent, check_fields
from .layout import checked_lengths, integers

Band = tuple[int | None, int | None]
NO_FIELDS: frozenset[str] = frozenset()


class Mask:
    """An immutable mask expression. Combine masks with `&`, `|` and `~`; compare them with `==`."""

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
    if not mask.holds(Heads):
        return [(slice(0, heads), mask.resolved(0, heads))]
    of_heads = groupby(range(heads), key=lambda head: mask.resolved(head, heads))
    runs = [(found, list(run)) for found, run in of_heads]
    return [(slice(run[0], run[-1] + 1), found) for found, run in runs]


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


# --- Operators -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Operation(Mask):
    """Two masks joined by an operator."""

    left: Mask
    right: Mask

    @property
    def parts(self):
        return self.left, self.right

    def with_parts(self, parts):
        return type(self)(*parts)


@dataclass(frozen=True)
class And(_Operation):
    """Both masks allow the pair."""

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

    def _within(self, candidates):
        def beside(other: Mask) -> Mask:
            return other.without_choice() if candidates is None else candidates & other.without_choice()

        return And(self.left._within(beside(self.right)), self.right._within(beside(self.left)))

    def __str__(self):
        return f"{_operand(self.left, 2)} & {_operand(self.right, 3)}"


@dataclass(frozen=True)
class Or(_Operation):
    """Either mask allows the pair."""

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

    def __post_init__(self):
        if self.mask.holds(TopK):
            raise ValueError(f"`~` cannot be applied to `topk`, which chooses among what is allowed; got '{self}'")

    @property
    def parts(self):
        return (self.mask,)

    def with_parts(self, parts):
        return Not(*parts)

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
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"`{argument}` of `{leaf.name}` must be an integer of at least {minimum}; got {value!r}")
    if value > maximum:
        raise ValueError(f"`{argument}` of `{leaf.name}` must be at most {maximum}; got {value}")


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
        name (`str`): An identifier. Registering it anew replaces the predicate.
        predicate (`Callable`): `predicate(i, j)`, of two integer tensors of positions that broadcast, gives the bool
            tensor of the pairs that are allowed. It is evaluated cell by cell.

    Raises:
        ValueError: `name` is no identifier.
    """
    if not name.isidentifier():
        raise ValueError(f"`name` of a custom mask must be an identifier; got {name!r}")
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


class _Choice(Leaf):
    """A leaf that holds masks, one of which is followed."""

    masks: tuple[Mask, ...]

    def __init__(self, *masks: Mask):
        if not masks or not all(isinstance(mask, Mask) for mask in masks):
            raise ValueError(f"`{self.name}` must be given masks; got {', '.join(map(repr, masks)) or 'none'}")
        object.__setattr__(self, "masks", masks)

    @property
    def parts(self):
        return self.masks

    def with_parts(self, parts):
        return type(self)(*parts)

    def __str__(self):
        return f"{self.name}({', '.join(map(str, self.masks))})"


@dataclass(frozen=True, init=False)
class Heads(_Choice):
    """`heads(m0, m1, …)`: as many masks as heads, or a divisor, then each serves a run of heads."""

    name = "heads"
    masks: tuple[Mask, ...]

    @property
    def is_relative(self):
        return False

    def _of_head(self, head, heads):
        if heads % len(self.masks):
            raise ValueError(
                f"`heads` must be given a number of masks that divides the {heads} heads; got {len(self.masks)}"
            )
        return self.masks[head * len(self.masks) // heads]._of_head(head, heads)

    def allowed(self, i, j, fields):
        raise ValueError(f"'{self}' differs by head; resolve it for one head first")

    def _classify(self, q_lo, q_hi, k_lo, k_hi, fields):
        answers = [mask._classify(q_lo, q_hi, k_lo, k_hi, fields) for mask in self.masks]
        always, never = zip(*answers, strict=True)
        return reduce(operator.and_, always), reduce(operator.and_, never)


@dataclass(frozen=True, init=False)
class Select(_Choice):
    """`select(m0, m1, …)`: row b follows mask `mask_choice[b]`, by task or language, say."""

    name = "select"
    masks: tuple[Mask, ...]

    @property
    def is_relative(self):
        return False

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
            return _made(node, Not, _read(operand))
        case ast.Name(id=name):
            return _leaf(node, name, [])
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]):
            return _leaf(node, name, arguments)
    raise _Unreadable(node, "expected a mask, `&`, `|`, `~` or parentheses")


def _leaf(node: ast.expr, name: str, arguments: list[ast.expr]) -> Mask:
    if name not in _LEAVES:
        near = get_close_matches(name, _LEAVES, n=1)
        hint = f"did you mean `{near[0]}`? " if near else ""
        raise _Unreadable(node, f"unknown mask `{name}`; {hint}known are {', '.join(sorted(_LEAVES))}")
    leaf = _LEAVES[name]
    read = _read if issubclass(leaf, _Choice) else _read_name if leaf is Custom else _read_number
    values = [read(argument) for argument in arguments]
    try:
        signature(leaf).bind(*values)
    except TypeError:
        wanted = ", ".join(p.name for p in signature(leaf).parameters.values() if p.kind is not p.KEYWORD_ONLY)
        raise _Unreadable(node, f"`{name}` takes ({wanted}); got {len(values)} arguments") from None
    return _made(node, leaf, *values)


def _made(node: ast.expr, make: Callable[..., Mask], *values) -> Mask:
    try:
        return make(*values)
    except ValueError as error:
        raise _Unreadable(node, str(error)) from None


def _read_name(node: ast.expr) -> str:
    match node:
        case ast.Name(id=name):
            return name
    raise _Unreadable(node, "expected the name of a registered mask")


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
shared_question = SharedQuestion
global_tokens = GlobalTokens
random = Random
dense = Dense
heads = Heads
select = Select
topk = TopK
custom = Custom
