"""The layout of a batch in a graph of `torch.compile` or `torch.export`, which an operator computes outside the graph.

The number of real tokens in rows is a data-dependent size of the graph.

Shape legend: B rows of width T, S sequences, N tokens in M = B * T places.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .compile_ops import operator
from .layout import SequenceLayout, size_of_graph


@dataclass
class Known:
    """What was computed from a layout's tensor, cached for the other layers for as long as the tensor lives."""

    layout: SequenceLayout
    plans: dict[tuple[str, str], tuple[tuple[Tensor, ...], Any]] = field(default_factory=dict)  # each a `MaskPlan`


# The key is the tensor object, which every forward pass makes again. A copy of the tensor works, too, but is decoded.
_known: Any = WeakTensorKeyDictionary()


def _describe(
    shape: list[int],
    lengths: Tensor | None,
    attention_mask: Tensor | None,
    missing: Tensor | None,
    position_ids: Tensor | None,
    is_stated: bool,
) -> Tensor:
    """A layout encoded as one int64 tensor `(3 * M + S + 4,)`.

    It holds `indices`, `positions` and `sequence_ids` of all M places, first of the tokens and then of the absent
    places, which form the tail; the `lengths` of the sequences; B, T, N and `has_gaps`.
    """
    device = _given(lengths, attention_mask).device
    rows, width = shape
    layout = SequenceLayout.of_batch((rows, width), device, lengths, attention_mask).trimmed()
    if position_ids is not None and layout.divided_by_positions(position_ids, is_stated) is not layout:
        raise ValueError(
            "`position_ids` that restart must come with `lengths` or `cu_seq_lens_q` in a graph, whose number of "
            f"sequences has to be known; got {position_ids.tolist()} alone"
        )
    layout = layout if missing is None else layout.without(missing)
    is_absent = torch.ones(rows * width, dtype=torch.bool, device=device).index_fill(0, layout.places, False)
    absent = is_absent.nonzero().squeeze(1)
    of_tokens = [layout.places, absent, layout.positions, torch.zeros_like(absent)]
    of_tokens += [layout.sequence_ids, torch.full_like(absent, layout.num_sequences)]
    sizes = torch.tensor([rows, width, layout.num_tokens, layout.has_gaps], device=device)
    described = torch.cat([*of_tokens, layout.lengths, sizes])
    _known[described] = Known(layout)
    return described


def _describe_shape(
    shape: list[int], lengths: Tensor | None, attention_mask: Tensor | None, *_: Tensor | bool | None
) -> Tensor:
    sequences = shape[0] if lengths is None else lengths.shape[0]
    given = _given(lengths, attention_mask)
    return given.new_empty(3 * shape[0] * shape[1] + sequences + 4, dtype=torch.long)


def _given(lengths: Tensor | None, attention_mask: Tensor | None) -> Tensor:
    given = attention_mask if lengths is None else lengths
    assert given is not None
    return given


LAYOUT = operator(
    "layout(SymInt[] shape, Tensor? lengths, Tensor? attention_mask, Tensor? missing, Tensor? position_ids, "
    "bool is_stated) -> Tensor",
    _describe,
    _describe_shape,
)


def known(described: Tensor) -> Known:
    """The cache entry of a tensor that [`_describe`] made. Without an entry the tensor is decoded."""
    if described not in _known:
        rows, width, tokens, has_gaps = described[-4:].tolist()
        places = rows * width
        sequences = described.numel() - 4 - 3 * places
        indices, positions, ids, lengths = described[:-4].clone().split([places, places, places, sequences])
        in_order = not has_gaps and bool((indices[:tokens] == torch.arange(tokens, device=indices.device)).all())
        layout = SequenceLayout(
            shape=(rows, width),
            num_tokens=tokens,
            lengths=lengths,
            sequence_ids=ids[:tokens],
            positions=positions[:tokens],
            indices=None if in_order else indices[:tokens],
            has_gaps=bool(has_gaps),
            longest=width,
        )
        _known[described] = Known(layout)
    return _known[described]


def layout_in_graph(
    shape: tuple[int, int],
    device: torch.device,
    lengths: Tensor | None = None,
    attention_mask: Tensor | None = None,
    missing: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> SequenceLayout:
    """As [`SequenceLayout.of_batch`], in a graph; tokens that are `missing` are left out.

    A flat batch keeps all its places, so that every size of the graph is known.

    Raises:
        ValueError: As in [`SequenceLayout.of_batch`], when the graph runs. Also, `position_ids` contradict `lengths`,
            or restart without `lengths`. The values of a flat batch are checked only on a CPU.
    """
    is_flat = lengths is not None and lengths.shape[0] != shape[0]
    is_full = lengths is None and attention_mask is None
    sequences = shape[0] if lengths is None else lengths.shape[0]
    given = torch.full((shape[0],), shape[1], dtype=torch.long, device=device) if is_full else lengths
    described = LAYOUT(list(shape), given, attention_mask, missing, position_ids, lengths is not None)
    if device.type != "cpu" and attention_mask is None and (is_flat or (is_full and missing is None)):
        # Nothing is read. Only attention outside the graph needs the operator, which is otherwise removed as unused.
        layout = SequenceLayout.of_batch(shape, device, lengths)
        layout = layout if missing is None else layout.without(missing)
        return replace(layout, described=described)
    places = shape[0] * shape[1]
    indices, positions, ids, sequence_lengths, sizes = described.split([places, places, places, sequences, 4])
    is_whole = is_flat or (is_full and missing is None)
    tokens = places if is_whole else size_of_graph(sizes[2], places)
    indices, positions, ids = (values.narrow(0, 0, tokens) for values in (indices, positions, ids))
    return SequenceLayout(
        shape=shape,
        num_tokens=tokens,
        lengths=sequence_lengths,
        sequence_ids=ids,
        positions=positions,
        indices=None if is_whole and missing is None else indices,
        has_gaps=missing is not None,
        has_tail=is_flat,
        longest=shape[1],
        described=described,
    )
