"""Reads from the arguments of a forward pass which tokens of a batch are real, and which of them form a sequence.

Shape legend: B rows of width T in the batch, S sequences, N real tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .frames import Frames
from .graph_layout import layout_in_graph
from .layout import SequenceLayout, eager_only, integers, reads_are_free

# Arguments by which padding-free collators of transformers and TRL describe a row of sequences, beside `position_ids`.
PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
Lengths = Tensor | Sequence[int]


def layout_of_batch(
    shape: tuple[int, int],
    device: torch.device,
    lengths: Lengths | None,
    attention_mask: Tensor | None,
    missing: Tensor | None = None,
    *,
    position_ids: Tensor | None = None,
    packing: Mapping[str, Any] | None = None,
) -> SequenceLayout:
    """The layout of a batch of `shape` `(B, T)`.

    It is given by `lengths`, `cu_seq_lens_q`, `seq_idx`, a 0/1 `attention_mask` or `position_ids` that restart. Without
    any of these all tokens are real and each row is one sequence. An explicit `attention_mask` of three or four
    dimensions does not affect the layout, nor do `position_ids` that come with one. Tokens that are `missing` are left
    out; the others keep their positions.

    Args:
        packing (`dict[str, Any]`): Those of the arguments in `PACKING` that are given.

    Raises:
        ValueError: The arguments contradict each other, or one does not fit the shape.
    """
    packing = given(packing or {})
    lengths = stated_lengths(lengths, packing, shape, device)
    if torch.compiler.is_compiling() and "seq_idx" not in packing:
        explicit = is_explicit(attention_mask)
        layout = layout_in_graph(
            shape,
            device,
            lengths,
            None if explicit else attention_mask,
            missing,
            None if explicit or position_ids is None else per_token(position_ids, shape),
        )
        return _bounded(layout, packing)
    return frames_of_batch(
        shape, device, lengths, attention_mask, missing, position_ids=position_ids, packing=packing
    ).present


@eager_only
def frames_of_batch(
    shape: tuple[int, int],
    device: torch.device,
    lengths: Lengths | None,
    attention_mask: Tensor | None,
    missing: Tensor | None,
    *,
    position_ids: Tensor | None = None,
    packing: Mapping[str, Any] | None = None,
) -> Frames:
    """Like [`layout_of_batch`], but the result also has the layout that includes the missing tokens."""
    packing = given(packing or {})
    lengths = stated_lengths(lengths, packing, shape, device)
    whole = SequenceLayout.of_batch(shape, device, lengths, None if is_explicit(attention_mask) else attention_mask)
    if "seq_idx" in packing:
        whole = _divided_by_index(whole, packing["seq_idx"], is_stated=lengths is not None)
    if position_ids is not None and not is_explicit(attention_mask):
        is_stated = lengths is not None or "seq_idx" in packing
        whole = whole.divided_by_positions(per_token(position_ids, shape), is_stated)
    whole = _bounded(whole, packing)
    return Frames(whole, whole if missing is None else whole.without(missing))


def is_explicit(attention_mask: Tensor | None) -> bool:
    """Whether a mask says which query may see which key, rather than which tokens are real."""
    return attention_mask is not None and attention_mask.dim() > 2


def per_token(position_ids: Tensor, shape: tuple[int, int]) -> Tensor:
    """Positions as int64 `(B, T)`; a single row `(1, T)` is expanded to all rows."""
    if position_ids.dim() != 2 or position_ids.shape[0] not in (1, shape[0]) or position_ids.shape[1] != shape[1]:
        raise ValueError(
            f"`position_ids` must have the input's shape {tuple(shape)}, or one row for all; "
            f"got {tuple(position_ids.shape)}"
        )
    return integers("position_ids", position_ids).expand(shape)


def given(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that are not `None`."""
    return {name: value for name, value in arguments.items() if value is not None}


def given_input(
    main: str,
    input_ids: Tensor | None = None,
    input_features: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    **_,
) -> Tensor:
    """The only input that is given: the one called `main`, which is the model's own, or `inputs_embeds`."""
    inputs = given({"input_ids": input_ids, "input_features": input_features, "inputs_embeds": inputs_embeds})
    if len(inputs) != 1 or not inputs.keys() & {main, "inputs_embeds"}:
        raise ValueError(
            f"exactly one of `{main}` and `inputs_embeds` must be given; got {' and '.join(inputs) or 'neither'}"
        )
    return next(iter(inputs.values()))


def stated_lengths(
    lengths: Lengths | None, packing: Mapping[str, Any], shape: tuple[int, int], device: torch.device
) -> Tensor | None:
    """`lengths`, or the lengths that follow from `cu_seq_lens_q`.

    Raises:
        ValueError: `cu_seq_lens_q` comes with several rows, does not rise from 0 to the width of the row, or
            contradicts `lengths` or `cu_seq_lens_k`.
    """
    if lengths is not None:
        lengths = torch.as_tensor(lengths, device=device)
    names = [name for name in ("cu_seq_lens_q", "cu_seq_lens_k") if packing.get(name) is not None]
    if not names:
        return lengths
    if not reads_are_free(device):  # checks would have to read the values
        name = names[0]
        return lengths if lengths is not None else integers(name, torch.as_tensor(packing[name], device=device)).diff()
    return _checked_ends({name: torch.as_tensor(packing[name], device=device) for name in names}, lengths, shape)


@eager_only
def _checked_ends(ends: dict[str, Tensor], lengths: Tensor | None, shape: tuple[int, int]) -> Tensor:
    rows, width = shape
    ends = {name: integers(name, values) for name, values in ends.items()}
    name, first = next(iter(ends.items()))
    if rows != 1:
        raise ValueError(f"`{name}` must come with one row that holds all sequences; got {rows} rows")
    values = first.tolist()
    if first.dim() != 1 or not values or (values[0], values[-1]) != (0, width) or values != sorted(values):
        raise ValueError(
            f"`{name}` must be a vector of non-decreasing integers from 0 to the width of the row, {width}; "
            f"got {values}"
        )
    for other, others in ends.items():
        if not torch.equal(others, first):
            raise ValueError(f"`{other}` must equal `{name}`, {values}; got {others.tolist()}")
    stated = first.diff()
    if lengths is not None and not torch.equal(integers("lengths", lengths), stated):
        raise ValueError(f"`{name}` must be the running sums of `lengths`, {lengths.tolist()}; got {values}")
    return stated


def _divided_by_index(whole: SequenceLayout, seq_idx: Tensor, is_stated: bool) -> SequenceLayout:
    """The layout in which each run of equal numbers in `seq_idx (B, T)` is a sequence."""
    if tuple(seq_idx.shape) != tuple(whole.shape):
        raise ValueError(f"`seq_idx` must have the input's shape {whole.shape}; got {tuple(seq_idx.shape)}")
    numbers = whole.flatten(integers("seq_idx", seq_idx))[0]
    begins = torch.nn.functional.pad(numbers.diff() != 0, (1, 0), value=True)[: len(numbers)]
    if is_stated and not torch.equal(begins | whole.begins, whole.begins):
        raise ValueError(
            f"`seq_idx` must change only where a sequence of `lengths` {list(whole.sizes)} ends; got {numbers.tolist()}"
        )
    return whole.divided(begins)


def _bounded(whole: SequenceLayout, packing: Mapping[str, Any]) -> SequenceLayout:
    """The layout with `max_length_q` and `max_length_k`, if given, as bounds of the longest sequence.

    On a CPU the bounds are checked here. Other devices check them without a host read and stop if a sequence is longer.
    Graphs do not check them.
    """
    for name in ("max_length_q", "max_length_k"):
        bound = packing.get(name)
        if reads_are_free(whole.device):
            if bound is not None and int(bound) < whole.max_length:
                raise ValueError(
                    f"`{name}` must be at least the longest sequence's length, {whole.max_length}; got {int(bound)}"
                )
        elif isinstance(bound, int) and (bounded := whole.bounded(bound)) is not whole:
            torch.ops.aten._assert_async((whole.lengths <= bound).all())
            whole = bounded
    return whole
