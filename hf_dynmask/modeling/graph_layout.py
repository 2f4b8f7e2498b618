"""The layout of a batch in a graph of `torch.compile` or `torch.export`: an operator makes it, as one tensor.

One size of a graph is a value of the batch: how many tokens are real.

Shape legend: B rows of width T, S sequences, N real tokens in M = B * T places.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .compile_ops import operator
from .layout import IGNORE_INDEX, SequenceLayout, begins


@dataclass
class Known:
    """What was made of a layout's tensor: found here by the other layers, and gone with it."""

    layout: SequenceLayout
    plans: dict[tuple[str, str], tuple[tuple[Tensor, ...], Any]] = field(default_factory=dict)  # each a `MaskPlan`


# By the tensor itself, which every forward pass makes anew. Another one of the same values is as good, but slower.
_known: Any = WeakTensorKeyDictionary()


def _describe(
    shape: list[int],
    lengths: Tensor | None,
    attention_mask: Tensor | None,
    missing: Tensor | None,
    position_ids: Tensor | None,
    is_stated: bool,
) -> Tensor:
    """A layout as one tensor `(2 * M + 2 * S + 3,)` int64: `indices` and `positions` of the tokens, each with zeros
    behind them; `rank` and `lengths` of the sequences; B, T and N."""
    device = _given(lengths, attention_mask).device
    rows, width = shape
    layout = SequenceLayout.of_batch((rows, width), device, lengths, attention_mask)
    if position_ids is not None and layout.divided_by_positions(position_ids, is_stated) is not layout:
        raise ValueError(
            "`position_ids` that restart must come with `lengths` or `cu_seq_lens_q` in a graph, whose number of "
            f"sequences has to be known; got {position_ids.tolist()} alone"
        )
    layout = (layout if missing is None else layout.without(missing)).by_length()
    absent = layout.positions.new_zeros(rows * width - layout.num_tokens)
    sizes = torch.tensor([rows, width, layout.num_tokens], device=device)
    of_tokens = [layout.indices, absent, layout.positions, absent]
    described = torch.cat([*of_tokens, layout.rank, layout.lengths, sizes])
    _known[described] = Known(layout)
    return described


def _description(
    shape: list[int], lengths: Tensor | None, attention_mask: Tensor | None, *_: Tensor | bool | None
) -> Tensor:
    sequences = shape[0] if lengths is None else lengths.shape[0]
    given = _given(lengths, attention_mask)
    return given.new_empty(2 * shape[0] * shape[1] + 2 * sequences + 3, dtype=torch.long)


def _given(lengths: Tensor | None, attention_mask: Tensor | None) -> Tensor:
    given = attention_mask if lengths is None else lengths
    assert given is not None
    return given


LAYOUT = operator(
    "layout(SymInt[] shape, Tensor? lengths, Tensor? attention_mask, Tensor? missing, Tensor? position_ids, "
    "bool is_stated) -> Tensor",
    _describe,
    _description,
)


def known(described: Tensor) -> Known:
    """What there is of a layout that [`_describe`] gave, read anew from its tensor where nothing is."""
    if described not in _known:
        rows, width, tokens = described[-3:].tolist()
        places, sequences = rows * width, (described.numel() - 3) // 2 - rows * width
        indices, positions, rank, lengths = described[:-3].clone().split([places, places, sequences, sequences])
        layout = SequenceLayout((rows, width), tuple(lengths.tolist()), rank, indices[:tokens], positions[:tokens])
        _known[described] = Known(layout)
    return _known[described]


class GraphLayout:
    """What a [`SequenceLayout`] is in a graph: the same attributes and methods, as far as a graph needs them.

    Attributes:
        described (`Tensor`): The layout, as operators take it.
        num_tokens (`int`): N; no graph knows its value, unless it follows from the shape.
    """

    def __init__(self, shape: tuple[int, int], described: Tensor, num_sequences: int, num_tokens: int | None = None):
        self.shape = shape
        self.described = described
        self.num_sequences = num_sequences
        places = shape[0] * shape[1]
        indices, positions, self.rank, self.lengths, sizes = described.split(
            [places, places, num_sequences, num_sequences, 3]
        )
        self.num_tokens = _size(sizes[2], places) if num_tokens is None else num_tokens
        self.indices, self.positions = (values.narrow(0, 0, self.num_tokens) for values in (indices, positions))

    @classmethod
    def of_batch(
        cls,
        shape: tuple[int, int],
        device: torch.device,
        lengths: Tensor | None = None,
        attention_mask: Tensor | None = None,
        missing: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> GraphLayout:
        """As [`SequenceLayout.of_batch`], which the operator calls; tokens that are `missing` are left out.

        Raises:
            ValueError: As there, when the graph runs; or `position_ids` contradict `lengths`, or restart without them.
        """
        is_stated = lengths is not None
        is_full = attention_mask is None and missing is None and (lengths is None or lengths.shape[0] != shape[0])
        if lengths is None and attention_mask is None:
            lengths = torch.full((shape[0],), shape[1], dtype=torch.long, device=device)
        described = LAYOUT(list(shape), lengths, attention_mask, missing, position_ids, is_stated)
        sequences = shape[0] if lengths is None else lengths.shape[0]
        return cls(shape, described, sequences, shape[0] * shape[1] if is_full else None)

    @property
    def sequence_ids(self) -> Tensor:
        """`(N,)` int64: place in the flat order of the sequence that each token belongs to."""
        places = torch.arange(self.num_tokens, device=self.rank.device)
        return torch.searchsorted(self.lengths.cumsum(0), places, right=True)

    @property
    def begins(self) -> Tensor:
        """Bool `(N,)`: which tokens are the first of their sequence."""
        return begins(self.sequence_ids)

    def flatten(self, padded: Tensor) -> Tensor:
        """`(B, T, ...)` as `(1, N, ...)`."""
        if tuple(padded.shape[:2]) != tuple(self.shape):
            raise ValueError(f"`padded` must have shape {(*self.shape, '...')}; got {tuple(padded.shape)}")
        return padded.flatten(0, 1).index_select(0, self.indices).unsqueeze(0)

    def unflatten(self, flat: Tensor, fill: float | int | bool = 0) -> Tensor:
        """`(1, N, ...)` as `(B, T, ...)`, `fill` where no token is."""
        rows, width = self.shape
        padded = flat.new_full((rows * width, *flat.shape[2:]), fill)
        return padded.index_copy(0, self.indices, flat[0]).unflatten(0, (rows, width))

    def first_tokens(self, flat: Tensor) -> Tensor:
        """`(S, ...)`: first token of each sequence, in the batch's order of sequences; 0 for an empty one."""
        return self._tokens_at(self.lengths.cumsum(0) - self.lengths, flat)

    def last_tokens(self, flat: Tensor) -> Tensor:
        """Last token of each sequence; see [`first_tokens`]."""
        return self._tokens_at(self.lengths.cumsum(0) - 1, flat)

    def _tokens_at(self, places: Tensor, flat: Tensor) -> Tensor:
        with_none = torch.cat([flat[0], flat.new_zeros(1, *flat.shape[2:])])
        tokens = with_none.index_select(0, places.where(self.lengths > 0, self.num_tokens))
        return torch.zeros_like(tokens).index_copy(0, self.rank, tokens)

    def by_position(self, flat: Tensor, fill: float | int | bool = 0) -> Tensor:
        """`(1, N, ...)` as `(S, T, ...)`: sequences in flat order, `fill` where they have no token."""
        width = self.shape[1]
        table = flat.new_full((self.num_sequences * width, *flat.shape[2:]), fill)
        table = table.index_copy(0, self.sequence_ids * width + self.positions, flat[0])
        return table.unflatten(0, (self.num_sequences, width))

    def select_targets(self, states: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """As [`SequenceLayout.select_targets`]."""
        real = labels.flatten() != IGNORE_INDEX
        places = (~real).to(torch.uint8).argsort(stable=True).narrow(0, 0, _size(real.sum(), real.shape[0]))
        return states.flatten(0, labels.dim() - 1).index_select(0, places), labels.flatten().index_select(0, places)

    def settled(self) -> SequenceLayout:
        """Outside a graph: the [`SequenceLayout`]."""
        return known(self.described).layout


def _size(value: Tensor, most: int) -> int:
    """A value as a size of the graph."""
    size = cast(int, value.item())  # a symbol: no `int(...)` of it
    torch._check(size >= 0)
    torch._check(size <= most)
    return size
