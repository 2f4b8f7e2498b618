"""Counts the (query, key) pairs that a mask allows, in a time that does not grow with the number of pairs.

The attention matrix of a sequence starts as one block. A block for which the mask answers *always* or *never* is
counted at once, and so is a block in which the mask depends only on `i - j`. All other blocks are split into four, down
to small blocks, whose pairs are checked one by one. If too many blocks are left, as with `random`, a sample represents
them all.

Shape legend: S sequences, n blocks, P positions of the longest sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..modeling.fields import Fields
from ..modeling.masks import Full, Mask, Select

SMALLEST = 8  # queries and keys of the smallest blocks, which are not split
FEW_CELLS = 2**17  # if all blocks together have fewer cells, splitting them is not worth it
MOST_BLOCKS = 2**15  # the maximum number of blocks of one size that are examined
MOST_RULES = 16  # the maximum number of different rules of `i - j` among the blocks of one size
AT_ONCE = 2**18  # cells that are checked in one operation


def count_pairs(
    mask: Mask,
    sizes: Tensor,
    fields: Mapping[str, Tensor] | None = None,
    positions: Sequence[Tensor] | None = None,
    counts: Tensor | None = None,
) -> int:
    """
    The total number of pairs that a mask allows in some sequences, in one head. If an explicit mask differs by head,
    the mean over heads.

    The number is exact unless more than 32,768 blocks of one size have to be examined. A sequence of 1,448 tokens has
    that many blocks of 8 queries and 8 keys. In longer sequences, masks such as `chunk`, `prefix` and `segments` need
    blocks only along the borders of their areas, and none along borders parallel to the diagonal. If there are more
    blocks, the number is an estimate from a fixed sample of 32,768 of them. It is usually off by less than one percent
    of the pairs in these blocks.

    Args:
        mask (`Mask`): The mask, the same for all heads. For `topk`, all candidate keys count.
        sizes (`Tensor` of shape `(S, 2)`, int64): The number of queries and of keys of each sequence.
        fields (`dict[str, Tensor]`, *optional*): The fields that the mask reads, by sequence and position; not checked.
        positions (`Sequence[Tensor]` of shapes `(S, P)`, int64, *optional*):
            Positions of the queries and of the keys of each sequence, if tokens are missing. `None`: 0, 1, 2, …
        counts (`Tensor` of shape `(S,)`, *optional*): How many times each sequence counts. `None`: once.

    Raises:
        ValueError: The mask differs by head.
    """
    sequences = _Sequences(sizes, positions, Fields(fields))
    with torch.device("cpu"):  # whatever the default device is
        return round(sum(_counted(mask.without_choice(), sequences, counts)))


class _Blocks(NamedTuple):
    """Blocks of one size.

    Attributes:
        row (`Tensor` of shape `(n,)`): The sequence.
        first, stop (`Tensor` of shape `(n, 2)`): The first query and key of each block, and those after the last.
        weight (`Tensor` of shape `(n,)`, float64): How many blocks each block represents.
    """

    row: Tensor
    first: Tensor
    stop: Tensor
    weight: Tensor

    def where(self, chosen: Tensor) -> _Blocks:
        """The blocks where `chosen (n,)` is true."""
        return self.at(chosen.nonzero().squeeze(1))

    def at(self, places: Tensor) -> _Blocks:
        """The blocks with these indices."""
        return _Blocks._make(values.index_select(0, places) for values in self)

    def chunks(self, number: int) -> Iterator[_Blocks]:
        """The blocks in groups of `number`."""
        return map(_Blocks._make, zip(*(values.split(number) for values in self), strict=True))


class _Sequences(NamedTuple):
    """The sequences that the blocks belong to, as passed to [`count_pairs`]."""

    sizes: Tensor
    positions: Sequence[Tensor] | None
    fields: Fields

    @property
    def longest(self) -> int:
        return int(self.sizes.max()) if self.sizes.numel() else 0

    def positions_at(self, row: Tensor, places: Tensor, side: int) -> Tensor:
        return places if self.positions is None else self.positions[side][row, places]

    def blocks(self, row: Tensor, first: Tensor, weight: Tensor, size: int) -> _Blocks:
        """Blocks of one size, cut off at the ends of their sequences. Blocks beyond the end are left out."""
        ends = self.sizes[row]
        return _Blocks(row, first, ends.minimum(first + size), weight).where((first < ends).all(1))

    def quarters(self, blocks: _Blocks, size: int) -> _Blocks:
        """The quarters of the blocks. `size` is the size of a quarter."""
        offsets = torch.tensor([(0, 0), (0, 1), (1, 0), (1, 1)])
        first = (blocks.first + size * offsets[:, None]).flatten(0, 1)
        return self.blocks(blocks.row.repeat(4), first, blocks.weight.repeat(4), size)

    def classify(self, mask: Mask, blocks: _Blocks) -> tuple[Tensor, Tensor]:
        """[`Mask.classify`] for each block, `(n,)`."""
        q_lo, q_hi, k_lo, k_hi = (
            self.positions_at(blocks.row, places[:, side], side).view(-1, 1, 1, 1)
            for side in (0, 1)
            for places in (blocks.first, blocks.stop - 1)
        )
        always, never = mask.classify_checked(q_lo, q_hi, k_lo, k_hi, self.fields.of_blocks(blocks.row))
        return always.flatten(), never.flatten()

    def allowed(self, mask: Mask, blocks: _Blocks, size: int) -> Tensor:
        """The number of allowed pairs `(n,)` in each block of one size, checked one by one."""
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
        blocks = _sample(blocks.where(~is_counted), generator)
        if size == SMALLEST or len(blocks.row) * size**2 <= FEW_CELLS:
            for some in blocks.chunks(max(1, AT_ONCE // size**2)):
                yield _sum(some, sequences.allowed(mask, some, size))
            return
        size //= 2
        blocks = sequences.quarters(blocks, size)


def _sum(blocks: _Blocks, pairs: Tensor) -> float:
    return float((blocks.weight * pairs).sum())


def _sample(blocks: _Blocks, generator: torch.Generator) -> _Blocks:
    """All blocks, or if there are too many, a sample that represents them."""
    number = len(blocks.row)
    if number <= MOST_BLOCKS:
        return blocks
    sample = blocks.at(torch.randperm(number, generator=generator)[:MOST_BLOCKS])
    return sample._replace(weight=sample.weight * (number / MOST_BLOCKS))


# --- Rules of i - j alone --------------------------------------------------------------------------------------------


class _Rules:
    """Counts pairs in blocks where only `i - j` matters: all other leaves of the mask answer *always* or *never*."""

    def __init__(self, mask: Mask, sequences: _Sequences):
        self.mask = mask
        self.sequences = sequences
        self.others = list(dict.fromkeys(_not_relative(mask)))
        self.longest = sequences.longest
        self.sums: dict[tuple[bool, ...], Tensor] = {}

    def pairs(self, blocks: _Blocks) -> tuple[Tensor, Tensor]:
        """Whether each block has such a rule `(n,)`, and how many pairs the rule allows in it `(n,)`; 0 without a
        rule."""
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
        for number, (_, *answers_of_others) in enumerate(rules.tolist()):
            chosen = places[rule_of == number]
            pairs[chosen] = self._pairs(blocks.at(chosen), tuple(answers_of_others))
        return has_rule, pairs

    def _pairs(self, blocks: _Blocks, answers: tuple[bool, ...]) -> Tensor:
        """The number of allowed pairs in each block, given the answers of the other leaves."""
        sums = self._sums(answers)
        corners = [[q[:, 0] - k[:, 1] for k in (blocks.first, blocks.stop)] for q in (blocks.first, blocks.stop)]
        above, below = ([sums[corner + self.longest] for corner in row] for row in corners)
        return (below[0] - above[0]) - (below[1] - above[1])

    def _sums(self, answers: tuple[bool, ...]) -> Tensor:
        """Double prefix sums over distances `d = i - j`: entry `x + longest` is the sum of `x - d` over all allowed
        `d < x`."""
        if answers not in self.sums:
            rule = _substituted(self.mask, dict(zip(self.others, answers, strict=True)))
            distances = torch.arange(-self.longest, self.longest).view(1, 1, -1, 1)
            allowed = rule.allowed(distances, torch.zeros(1, 1, 1, 1, dtype=torch.int64), Fields())
            self.sums[answers] = torch.nn.functional.pad(allowed.flatten().cumsum(0), (1, 0)).cumsum(0)
        return self.sums[answers]


def _not_relative(mask: Mask) -> Iterator[Mask]:
    """The parts of a mask that depend on more than `i - j`: leaves, and choices by sequence."""
    if mask.is_relative:
        return
    parts: Sequence[Mask] = () if isinstance(mask, Select) else mask.parts
    if not parts:
        yield mask
    for part in parts:
        yield from _not_relative(part)


def _substituted(mask: Mask, answers: Mapping[Mask, bool]) -> Mask:
    """The mask, with some of its parts replaced by one answer for all pairs."""
    if mask in answers:
        return Full() if answers[mask] else ~Full()
    return mask.with_parts(tuple(_substituted(part, answers) for part in mask.parts))
