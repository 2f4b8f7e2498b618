"""Masks and their operators `&`, `|` and `~`, which combine the answers *always*, *never* and *depends* (Kleene).

Shape legend: B sequences, `i` query position, `j` key position. Index tensors have the sequence (or 1) as their first
dimension wherever a field is read.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import chain, groupby
from typing import ClassVar

import torch
from torch import Tensor

from .fields import Fields, check_extent, check_fields
from .layout import checked_lengths, integers, vector

Band = tuple[int | None, int | None]
NO_FIELDS: frozenset[str] = frozenset()
MAX_DEPTH = 16  # nested masks; tracing one for a kernel takes dozens of Python's 1000 stack frames
MAX_LEAVES = 2**13


class Mask:
    """An immutable mask expression. Combine masks with `&`, `|` and `~`; compare them with `==`."""

    chooses_keys: bool = False  # whether it contains `topk`
    depth: int = 1  # how deeply masks are nested; 1 for a leaf
    leaves: int = 1

    @property
    def parts(self) -> tuple[Mask, ...]:
        """The expressions that this one is made of; none for most leaves."""
        return ()

    def with_parts(self, parts: tuple[Mask, ...]) -> Mask:
        """The same expression with other parts."""
        return self

    @property
    def fields(self) -> frozenset[str]:
        """Names of the batch's fields that the expression reads."""
        return self._own_fields().union(*(part.fields for part in self.parts))

    def _own_fields(self) -> frozenset[str]:
        return NO_FIELDS

    def holds(self, leaf: type[Mask]) -> bool:
        """Whether the expression contains a leaf of this type."""
        return isinstance(self, leaf) or any(part.holds(leaf) for part in self.parts)

    @property
    def is_relative(self) -> bool:
        """Whether the rule depends on `i - j` alone."""
        return bool(self.parts) and all(part.is_relative for part in self.parts)

    def allowed(self, i: Tensor, j: Tensor, fields: Fields) -> Tensor:
        """Whether query position `i (B | 1, 1, Tq, 1)` may see key position `j (B | 1, 1, 1, Tk)`; they broadcast.

        The expression must be [`resolved`].
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
        """The expression for one of `heads` heads, without `heads(...)` and with the candidates of each `topk`.

        Raises:
            ValueError: The number of masks in `heads(...)` does not divide `heads`.
        """
        return self._of_head(head, heads)._within(None)

    def head_borders(self, heads: int) -> frozenset[int]:
        """The heads (of `heads` heads) at which the expression may change, found without going through all heads.

        Raises:
            ValueError: The number of masks in `heads(...)` does not divide `heads`.
        """
        return frozenset({0}).union(*(part.head_borders(heads) for part in self.parts))

    def _of_head(self, head: int, heads: int) -> Mask:
        return self.with_parts(tuple(part._of_head(head, heads) for part in self.parts))

    def _within(self, candidates: Mask | None) -> Mask:
        """The expression with `candidates` as the keys that its `topk` leaves choose from."""
        return self.with_parts(tuple(part._within(candidates) for part in self.parts))

    def without_choice(self) -> Mask:
        """The expression with `full` in place of `topk`, which allows at least as many pairs."""
        return self.with_parts(tuple(part.without_choice() for part in self.parts))

    def classify(
        self,
        q_lo: Tensor,
        q_hi: Tensor,
        k_lo: Tensor,
        k_hi: Tensor,
        fields: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Whether the mask allows all pairs, or no pair, of ranges of positions.

        Args:
            q_lo, q_hi, k_lo, k_hi (`Tensor`, integer):
                First and last position of each range of queries and keys, both included; they broadcast. With fields of
                B > 1 sequences, their first dimension is B or 1.
            fields (`dict[str, Tensor]`, *optional*): The fields that the mask reads, by sequence and position.

        Returns:
            `(always, never)`, bool tensors of the broadcast shape: whether every pair, or no pair, of the two ranges is
            allowed, for every head. `always` and `never` are never wrong. Both are `False` if it depends on the pair,
            or if that cannot be ruled out.

        Raises:
            ValueError: A field that the mask reads is missing or has the wrong shape or dtype; positions are not
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
            ValueError: A field is missing, or has the wrong shape or dtype or an invalid value.
        """
        found = check_fields(self.fields, fields, reader=self, rows=rows)
        self._check_values(found)
        return found

    def _check_values(self, fields: Fields) -> None:
        for part in self.parts:
            part._check_values(fields)

    def dense(
        self,
        lengths: Tensor | Sequence[int],
        *,
        key_lengths: Tensor | Sequence[int] | None = None,
        fields: Mapping[str, Tensor] | None = None,
        heads: int = 1,
    ) -> Tensor:
        """The mask cell by cell.

        Args:
            lengths (integer `Tensor` of shape `(B,)`, or a list): Queries of each sequence.
            key_lengths (integer `Tensor` of shape `(B,)`, or a list, *optional*):
                Keys of each sequence. `None`: `lengths`.
            fields (`dict[str, Tensor]`, *optional*): The fields that the mask reads, by sequence and position.
            heads (`int`, *optional*, defaults to 1): Heads of the attention, for masks that differ by head.

        Returns:
            Bool `Tensor` of shape `(B, 1 | heads, max(lengths), max(key_lengths))`; `False` beyond a sequence's end.

        Raises:
            ValueError: Lengths are not integers, or negative; a field that the mask reads is missing or has the wrong
                shape or dtype; the number of masks in `heads(...)` does not divide `heads`.
        """
        lengths = vector("lengths", lengths)
        key_lengths = lengths if key_lengths is None else vector("key_lengths", key_lengths)
        i = _positions_up_to("lengths", lengths).view(1, 1, -1, 1)
        j = _positions_up_to("key_lengths", key_lengths).view(1, 1, 1, -1)
        checked = self.checked(fields, rows=lengths.numel())
        check_extent(checked, i.numel(), j.numel(), heads)
        real = j < key_lengths.view(-1, 1, 1, 1)
        if "key_scores" in checked.tables:
            scores = checked.tables["key_scores"][..., : j.numel()]
            checked = checked.having("key_scores", scores.masked_fill(~real[:, 0], -torch.inf))
        return allowed_by_head(self, heads, i, j, checked) & real & (i < lengths.view(-1, 1, 1, 1))

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
    """[`Mask.allowed`] for all heads: bool `(B, 1 | heads, Tq, Tk)`."""
    runs = head_runs(mask, heads)
    if len(runs) == 1:
        return runs[0][1].allowed(i, j, fields)
    cells = [found.allowed(i, j, fields.heads(run)).expand(-1, run.stop - run.start, -1, -1) for run, found in runs]
    rows = max(part.shape[0] for part in cells)
    return torch.cat([part.expand(rows, -1, -1, -1) for part in cells], dim=1)


def _positions_up_to(name: str, lengths: Tensor) -> Tensor:
    return torch.arange(max(checked_lengths(name, lengths), default=0), device=lengths.device)


# --- Operators -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, init=False)
class Compound(Mask):
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
        for name, value in (
            ("masks", tuple(parts)),
            ("depth", depth),
            ("leaves", leaves),
            ("chooses_keys", any(mask.chooses_keys for mask in masks)),
        ):
            object.__setattr__(self, name, value)  # it is frozen

    def _merges(self, mask: Mask) -> bool:
        """Whether the parts of an operand become parts of this mask, in place of the operand."""
        return False

    @property
    def parts(self):
        return self.masks

    def with_parts(self, parts):
        return type(self)(*parts)


class _Chain(Compound):
    """Masks joined by an associative operator."""

    sign: ClassVar[str]
    level: ClassVar[int]  # precedence
    join: ClassVar[Callable]
    join_complements: ClassVar[Callable]

    def _merges(self, mask):
        return type(mask) is type(self)

    def allowed(self, i, j, fields):
        seen = self.masks[0].allowed(i, j, fields)
        for mask in self.masks[1:]:  # a loop, since kernels trace this and each call would take a dozen stack frames
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
        outer = [] if candidates is None else [candidates]
        bounds = [mask.without_choice() for mask in self.masks]

        def candidates_of(place: int) -> Mask:
            """What the other masks of the chain allow, within the candidates of the whole chain."""
            return reduce(operator.and_, dict.fromkeys([*outer, *bounds[:place], *bounds[place + 1 :]]))

        parts = enumerate(self.masks)
        return And(*(mask._within(candidates_of(place)) if mask.chooses_keys else mask for place, mask in parts))


class Or(_Chain):
    """Some mask allows the pair."""

    sign, level, join, join_complements = "|", 1, operator.or_, operator.and_


class Not(Compound):
    """The mask does not allow the pair."""

    def __init__(self, mask: Mask):
        super().__init__(mask)
        if mask.chooses_keys:
            raise ValueError(f"`~` cannot be applied to `topk`, which chooses among what is allowed; got '{self}'")

    @property
    def mask(self) -> Mask:
        """The mask that is negated."""
        return self.masks[0]

    def allowed(self, i, j, fields):
        return ~self.mask.allowed(i, j, fields)

    def _classify(self, q_lo, q_hi, k_lo, k_hi, fields):
        always, never = self.mask._classify(q_lo, q_hi, k_lo, k_hi, fields)
        return never, always

    def __str__(self):
        return f"~{_operand(self.mask, 3)}"


def _operand(mask: Mask, level: int) -> str:
    """Text of an operand, in parentheses if its precedence is below `level` (1: `|`, 2: `&`, 3: `~`)."""
    binds = mask.level if isinstance(mask, _Chain) else 3
    return str(mask) if binds >= level else f"({mask})"
