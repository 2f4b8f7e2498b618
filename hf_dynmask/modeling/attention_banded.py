"""Sliding-window attention by plain matrix products: each block of queries against the keys within its reach.

All sizes follow from the mask and the number of tokens, so nothing is read from a device. Dropout and gradients are
PyTorch's own. It is used for windows in float32, which the packed kernels do not support.

Shape legend: N tokens in n blocks of L, H heads, D and Dv head sizes, K keys within reach of a block.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .plan import MaskPlan
from .softmax import softmax_attention, without_keys, without_poison

SMALLEST_BLOCK = 64
LARGEST = 2**28  # scores in memory at once


def attend(
    query: Tensor, key: Tensor, value: Tensor, plan: MaskPlan, *, scaling: float, dropout: float = 0.0
) -> tuple[Tensor, None]:
    """Attention on packed `(N, H, D)` tensors; weights are not computed. See [`unsupported`]."""
    tokens = plan.layout.num_tokens
    if isinstance(tokens, int) and not tokens:
        return without_keys(query, key, value), None
    blocks = Blocks.of(_window(plan), tokens)
    query, key, value, poisoned = without_poison(query, key, value, plan.layout, plan.key_layout)
    query, key, value = (states.transpose(0, 1) for states in (query, key, value))
    states = blocks.of_queries(query), blocks.of_keys(key), blocks.of_keys(value)
    output, _ = softmax_attention(*states, plan.derived(_allowed), scaling, dropout)
    output = output.transpose(1, 2).flatten(0, 1)[:tokens]
    return output.masked_fill(poisoned, torch.nan), None


def unsupported(plan: MaskPlan, query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0) -> str | None:
    """The reason why this implementation cannot be used; `None` if it can."""
    if None in (plan.band or (None,)) or plan.layout is not plan.key_layout:
        return f"it supports windows between the tokens of one layout; got '{plan.mask}'"
    blocks = Blocks.of(_window(plan), plan.layout.num_tokens)
    scores = query.shape[1] * blocks.number * blocks.size * (blocks.before + blocks.size + blocks.behind)
    if scores > LARGEST:
        return f"it holds at most {LARGEST} scores at once; got {scores} with '{plan.mask}'"
    return None


def _window(plan: MaskPlan) -> tuple[int, int]:
    """The plan's band, both bounds of which are finite."""
    left, right = plan.band or (None, None)
    assert left is not None and right is not None
    return left, right


class Blocks(NamedTuple):
    """Division of the tokens into `number` blocks of `size`.

    A block sees its own tokens, `before` tokens in front of it and `behind` tokens after it.
    """

    number: int
    size: int
    before: int
    behind: int
    unused: int  # places of the last block without a token

    @classmethod
    def of(cls, band: tuple[int, int], tokens: int) -> Blocks:
        """The blocks for a window over this number of tokens."""
        before, behind = (min(bound, tokens) for bound in band)
        size = max(SMALLEST_BLOCK, before, behind)
        number = -(-tokens // size)
        return cls(number, size, before, behind, number * size - tokens)

    def of_queries(self, states: Tensor, fill: float = 0) -> Tensor:
        """`(H, N, D)` as `(n, H, L, D)`."""
        padded = nn.functional.pad(states, (0, 0, 0, self.unused), value=fill)
        return padded.unflatten(1, (self.number, self.size)).transpose(0, 1)

    def of_keys(self, states: Tensor, fill: float = 0) -> Tensor:
        """`(H, N, D)` as `(n, H, K, D)`."""
        padded = nn.functional.pad(states, (0, 0, self.before, self.behind + self.unused), value=fill)
        return padded.unfold(1, self.before + self.size + self.behind, self.size).permute(1, 0, 3, 2)


def _allowed(plan: MaskPlan) -> Tensor:
    """Bool `(n, 1, L, K)`: which query of a block may see which of the keys within its reach."""
    layout, (left, right) = plan.layout, _window(plan)
    blocks = Blocks.of((left, right), layout.num_tokens)
    ids, positions = (values[None, :, None] for values in (layout.sequence_ids, layout.positions))
    distance = blocks.of_keys(positions, -1).mT - blocks.of_queries(positions, -1)
    is_same = blocks.of_keys(ids, -1).mT == blocks.of_queries(ids, -1)
    return is_same & (distance >= -left) & (distance <= right)
