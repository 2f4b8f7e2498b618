"""How many pairs a mask allows, worked out from blocks in a time that does not grow with the number of pairs.

The attention matrix of a sequence is one block at first. A block of which the mask says *always* or *never* is counted
at once; so is one in which the mask depends on `i - j` alone. Others are divided in four, down to small ones, whose
pairs are looked at one by one. Where too many are left, as with `random`, some are drawn to stand for all.

Shape legend: S sequences, n blocks, P positions of the longest sequence. Pairs are (query, key).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..modeling.fields import Fields
from ..modeling.masks import Full, Mask, Select

SMALLEST = 8  # queries and keys of a block that is not divided
FEW_CELLS = 2**17  # of blocks that are not worth dividing
MOST_BLOCKS = 2**15  # of one size that are looked into
MOST_RULES = 16  # of `i - j` alone that the blocks of one size are counted by
AT_ONCE = 2**18  # cells whose pairs are looked at in one go


def count_pairs(
    mask: Mask,
    sizes: Tensor,
    fields: Mapping[str, Tensor] | None = None,
    positions: Sequence[Tensor] | None = None,
    counts: Tensor | None = None,
) -> int:
    """
    Pairs that a mask allows in all of some sequences, in one head. Where an explicit mask differs by head, the mean.

    The number is exact unless more than 32,768 blocks of one size are left to look into. One sequence of 1,448 tokens
    has as many of 8 queries and 8 keys; in a longer one they follow the borders of areas, which those of `chunk`,
    `prefix`, `segments` and the like are, while borders that follow the diagonal need none. Of more blocks so many are
    drawn, the same ones each time, and the number is an estimate, mostly off by less than one percent of the pairs in
    the blocks.

    Args:
        mask (`Mask`): The mask, the same for all heads. A `topk` counts all the keys that it chooses from.
        sizes (`Tensor` of shape `(S, 2)`, int64): Queries and keys of each sequence.
        fields (`dict[str, Tensor]`, *optional*): What the mask reads, by sequence and position; checked before.
        positions (`Sequence[Tensor]` of shapes `(S, P)`, int64, *optional*):
            Positions of the queries and keys of each sequence, where some are missing. `None`: 0, 1, 2, …
        counts (`Tensor` of shape `(S,)`, *optional*): How many times each sequence counts. `None`: once.

    Raises:
        ValueError: The mask differs by head.
    """
    sequences = _Sequences(sizes, positions, Fields(fields))
    with torch.device("cpu"):  # whatever the default is
        return round(sum(_counted(mask.without_choice(), sequences, counts)))


class _Blocks(NamedTuple):
    """Blocks of one size.

    Attributes:
        row (`Tensor` of shape `(n,)`): The sequence.
        first, stop (`Tensor` of shape `(n, 2)`): The first query and key, and those behind the last.
        weight (`Tensor` of shape `(n,)`, float64): How many blocks each stands for.
    """

    row: Tensor
    first: Tensor
    stop: Tensor
    weight: Tensor

    def where(self, chosen: Tensor) -> _Blocks:
        """The blocks that are `chosen (n,)`."""
        return self.at(chosen.nonzero().squeeze(1))

    def at(self, places: Tensor) -> _Blocks:
        return _Blocks._make(of_blocks.index_select(0, places) for of_blocks in self)

    def split(self, number: int) -> Iterator[_Blocks]:
        return map(_Blocks._make, zip(*(of_blocks.split(number) for of_blocks in self), strict=True))


class _Sequences(NamedTuple):
    """What blocks are parts of, as [`count_pairs`] is given them."""

    sizes: Tensor
    positions: Sequence[Tensor] | None
    fields: Fields

    @property
    def longest(self) -> int:
        return int(self.sizes.max()) if self.sizes.numel() else 0

    def positions_at(self, row: Tensor, places: Tensor, side: int) -> Tensor:
        return places if self.positions is None else self.positions[side][row, places]

    def blocks(self, row: Tensor, first: Tensor, weight: Tensor, size: int) -> _Blocks:
        """Blocks of a size, cut off where their sequences end; those behind are left out."""
        ends = self.sizes[row]
        return _Blocks(row, first, ends.minimum(first + size), weight).where((first < ends).all(1))

    def divided(self, blocks: _Blocks, size: int) -> _Blocks:
        """The quarters of the blocks, of this size."""
        quarters = torch.tensor([(0, 0), (0, 1), (1, 0), (1, 1)])
        first = (blocks.first + size * quarters[:, None]).flatten(0, 1)
        return self.blocks(blocks.row.repeat(4), first, blocks.weight.repeat(4), size)

    def classify(self, mask: Mask, blocks: _Blocks) -> tuple[Tensor, Tensor]:
        """[`Mask.classify`] of each block: `(n,)`."""
        q_lo, q_hi, k_lo, k_hi = (
            self.positions_at(blocks.row, places[:, side], side).view(-1, 1, 1, 1)
            for side in (0, 1)
            for places in (blocks.first, blocks.stop - 1)
        )
        always, never = mask.classify_checked(q_lo, q_hi, k_lo, k_hi, self.fields.of_blocks(blocks.row))
        return always.flatten(), never.flatten()

    def allowed(self, mask: Mask, blocks: _Blocks, size: int) -> Tensor:
        """Pairs `(n,)` of each block of a size, looked at one by one."""
        sides = []
        for side in (0, 1):
            places, last = blocks.first[:, side, None] + torch.arange(size), blocks.stop[:, side, None] - 1
            positions = self.positions_at(blocks.row[:, None], places.minimum(last), side)
            sides.append((positions, places <= last))
        (i, is_query), (j, is_key) = sides
        cells = mask.allowed(i[:, None, :, None], j[:, None, None, :], self.fields.of_blocks(blocks.row))
        cells = cells & is_query[:, None, :, None] & is_key[:, None, None, :]
        return cells.sum((1, 2, 3)).double() / cells.shape[1]


def _counted(mask: Mask, sequences: _Sequences, counts: Tensor | None) -> Iterator[float]:
    generator, rules = torch.Generator().manual_seed(0), _Rules(mask, sequences)
    number, size = len(sequences.sizes), max(SMALLEST, 1 << max(sequences.longest - 1, 0).bit_length())
    weight = torch.ones(number) if counts is None else counts
    blocks = sequences.blocks(torch.arange(number), torch.zeros(number, 2, dtype=torch.int64), weight.double(), size)
    while len(blocks.row):
        always, never = sequences.classify(mask, blocks)
        yield _sum(blocks, always * (blocks.stop - blocks.first).prod(1))
        blocks = blocks.where(~(always | never))
        is_counted, pairs = rules.pairs(blocks)
        yield _sum(blocks, pairs)
        blocks = _drawn(blocks.where(~is_counted), generator)
        if size == SMALLEST or len(blocks.row) * size**2 <= FEW_CELLS:
            for some in blocks.split(max(1, AT_ONCE // size**2)):
                yield _sum(some, sequences.allowed(mask, some, size))
            return
        size //= 2
        blocks = sequences.divided(blocks, size)


def _sum(blocks: _Blocks, pairs: Tensor) -> float:
    return float((blocks.weight * pairs).sum())


def _drawn(blocks: _Blocks, generator: torch.Generator) -> _Blocks:
    """As many of the blocks as are looked into, in place of all."""
    number = len(blocks.row)
    if number <= MOST_BLOCKS:
        return blocks
    drawn = blocks.at(torch.randperm(number, generator=generator)[:MOST_BLOCKS])
    return drawn._replace(weight=drawn.weight * (number / MOST_BLOCKS))


# --- Rules of i - j alone --------------------------------------------------------------------------------------------


class _Rules:
    """What is left of a mask in blocks where all its leaves but those of `i - j` alone say *always* or *never*."""

    def __init__(self, mask: Mask, sequences: _Sequences):
        self.mask = mask
        self.sequences = sequences
        self.others = list(dict.fromkeys(_not_relative(mask)))
        self.longest = sequences.longest
        self.sums: dict[tuple[bool, ...], Tensor] = {}

    def pairs(self, blocks: _Blocks) -> tuple[Tensor, Tensor]:
        """Which blocks `(n,)` have such a rule, and how many pairs it allows in each of them; 0 in the others."""
        has_rule = torch.full_like(blocks.row, self.sequences.positions is None, dtype=torch.bool)
        answers, pairs = [has_rule], torch.zeros_like(blocks.row)
        for other in self.others:
            always, never = self.sequences.classify(other, blocks)
            has_rule = has_rule & (always | never)
            answers.append(always)
        places = has_rule.nonzero().squeeze(1)
        rules, rule_of = torch.stack(answers, 1)[places].unique(dim=0, return_inverse=True)
        if len(rules) > MOST_RULES:
            return torch.zeros_like(has_rule), pairs
        for number, (_, *of_others) in enumerate(rules.tolist()):
            pairs[places[rule_of == number]] = self._pairs(blocks.at(places[rule_of == number]), tuple(of_others))
        return has_rule, pairs

    def _pairs(self, blocks: _Blocks, of_others: tuple[bool, ...]) -> Tensor:
        sums = self._sums(of_others)
        corners = [[q[:, 0] - k[:, 1] for k in (blocks.first, blocks.stop)] for q in (blocks.first, blocks.stop)]
        above, below = ([sums[corner + self.longest] for corner in of_row] for of_row in corners)
        return (below[0] - above[0]) - (below[1] - above[1])

    def _sums(self, of_others: tuple[bool, ...]) -> Tensor:
        """The allowed distances `d = i - j`, summed up twice: at `x + longest` the sum of `x - d` over all below x."""
        if of_others not in self.sums:
            rule = _with(self.mask, dict(zip(self.others, of_others, strict=True)))
            distances = torch.arange(-self.longest, self.longest).view(1, 1, -1, 1)
            allowed = rule.allowed(distances, torch.zeros(1, 1, 1, 1, dtype=torch.int64), Fields())
            self.sums[of_others] = torch.nn.functional.pad(allowed.flatten().cumsum(0), (1, 0)).cumsum(0)
        return self.sums[of_others]


def _not_relative(mask: Mask) -> Iterator[Mask]:
    """Parts of a mask whose rules are not of `i - j` alone: leaves, and choices by sequence."""
    if mask.is_relative:
        return
    parts: Sequence[Mask] = () if isinstance(mask, Select) else mask.parts
    if not parts:
        yield mask
    for part in parts:
        yield from _not_relative(part)


def _with(mask: Mask, answers: Mapping[Mask, bool]) -> Mask:
    """The mask with one answer for all pairs in place of some of its parts."""
    if mask in answers:
        return Full() if answers[mask] else ~Full()
    return mask.with_parts(tuple(_with(part, answers) for part in mask.parts))
