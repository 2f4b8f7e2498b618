"""Layouts: which tokens of a batch are real and where they are, from lengths, 0/1 attention masks or `cu_seq_lens`.

Shape legend: B rows of width T in the batch, S sequences, N tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, wraps
from itertools import groupby
from typing import NamedTuple, TypeVar, cast

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable)
IGNORE_INDEX = -100  # a label that is not a target


def eager_only(function: F, recursive: bool = True) -> F:
    """Keeps `torch.compile` out of `function`, which reads lengths on the host: every batch would be compiled again.

    With `recursive=False`, functions that it calls, such as the layers of a model, may be compiled.
    """
    outside = torch.compiler.disable(function, recursive, reason="it reads lengths on the host")

    @wraps(function)
    def called(*args, **kwargs):  # the compiler's own wrapper would also take time without a graph
        return outside(*args, **kwargs) if torch.compiler.is_compiling() else function(*args, **kwargs)

    return cast(F, called)


def reads_are_free(device: torch.device) -> bool:
    """Whether the host can read values without waiting for a device. In a graph there are no values to read."""
    return device.type == "cpu" and not torch.compiler.is_compiling()


class Group(NamedTuple):
    """A run of neighbouring sequences of one length, which are processed in one call."""

    length: int
    count: int


@dataclass(frozen=True, eq=False)
class SequenceLayout:
    """Which tokens of a `(B, T)` batch are real, and where they are in flat `(1, N, ...)` tensors.

    Flat tensors hold the sequences end to end, in the batch's order. [`from_lengths`], [`from_attention_mask`] and
    [`from_cu_seq_lens`] make a layout. It holds tensors on the batch's device, the same in eager mode and in graphs.
    Values on the host, such as `sizes`, are only read when they are accessed.

    Attributes:
        shape (`tuple[int, int]`): `(B, T)` of the batch.
        num_tokens (`int`): N. A flat batch keeps all T places if N would have to be read from a device.
        lengths (`Tensor` of shape `(S,)`, int64): Real tokens of each sequence.
        sequence_ids (`Tensor` of shape `(N,)`, int64): The sequence of each token; S in the tail.
        positions (`Tensor` of shape `(N,)`, int64): Index of each token in its own sequence, from 0; 0 in the tail.
        indices (`Tensor` of shape `(N,)`, int64, *optional*):
            Place of each token in the row-major `(B * T)` batch. `None`: the tokens are at its first N places, and
            flattening is a view.
        has_gaps (`bool`): Whether the positions of a sequence may skip numbers or begin above 0.
        has_tail (`bool`): Whether the N tokens may end in a tail: unused places of a flat batch, in no sequence.
        longest (`int`): An upper bound of the positions in a sequence, which kernels are launched with.
        described (`Tensor`, *optional*): In a graph, the encoded layout that its operators decode.
    """

    shape: tuple[int, int]
    num_tokens: int
    lengths: Tensor
    sequence_ids: Tensor
    positions: Tensor
    indices: Tensor | None = None
    has_gaps: bool = False
    has_tail: bool = False
    longest: int = 0
    described: Tensor | None = None

    @classmethod
    def from_lengths(cls, lengths: Tensor | Sequence[int], shape: tuple[int, int] | None = None) -> SequenceLayout:
        """Layout of rows that hold their tokens from the left edge, or of one flat row.

        Args:
            lengths (integer `Tensor` of shape `(B,)` or `(S,)`, or a list):
                Number of tokens in each row. In a batch of one row, number of tokens in each of its S sequences, which
                lie end to end; places after the last one are absent.
            shape (`tuple[int, int]`, *optional*): `(B, T)` of the batch. `None`: one flat row, `(1, sum(lengths))`.

        Raises:
            ValueError: `lengths` is not a vector of integers, has the wrong size, is negative or beyond T; or the
                lengths of a flat row add up to more than T. The lengths of a flat row are checked only on a CPU.
        """
        lengths = vector("lengths", lengths)
        if shape is None:
            shape = (1, sum(checked_lengths("lengths", lengths)))
        rows, width = shape
        if lengths.shape[0] != rows and rows != 1:
            raise ValueError(
                f"`lengths` must have one entry a row, shape ({rows},), or belong to a flat batch of one row; "
                f"got shape ({lengths.shape[0]},) for input of shape {tuple(shape)}"
            )
        if lengths.shape[0] == 1 or rows != 1:
            return cls._of_rows(shape, lengths)
        return cls._of_flat_row(shape, lengths)

    @classmethod
    def _of_rows(cls, shape: tuple[int, int], lengths: Tensor) -> SequenceLayout:
        rows, width = shape
        tokens = _read_total(lengths, width, in_rows=True)
        sequence_ids, positions = ids_and_positions(lengths, tokens)
        indices = None if tokens == rows * width else sequence_ids * width + positions
        return cls(shape, tokens, lengths, sequence_ids, positions, indices, longest=width)

    @classmethod
    def _of_flat_row(cls, shape: tuple[int, int], lengths: Tensor) -> SequenceLayout:
        width = shape[1]
        has_tail = not reads_are_free(lengths.device)
        tokens = width if has_tail else _read_total(lengths, width, in_rows=False)
        sequence_ids, positions = ids_and_positions(lengths, tokens, has_tail)
        return cls(shape, tokens, lengths, sequence_ids, positions, has_tail=has_tail, longest=width)

    @classmethod
    def full(cls, shape: tuple[int, int], device: torch.device) -> SequenceLayout:
        """Layout of rows without absent tokens."""
        rows, width = shape
        places = torch.arange(rows * width, device=device)
        lengths = torch.full((rows,), width, dtype=torch.long, device=device)
        if rows == 1:
            return cls(shape, width, lengths, torch.zeros_like(places), places, longest=width)
        row = places.div(max(width, 1), rounding_mode="floor")
        return cls(shape, rows * width, lengths, row, places - row * width, longest=width)

    @classmethod
    def from_attention_mask(cls, attention_mask: Tensor) -> SequenceLayout:
        """Layout of rows with padding anywhere: right, left or inside.

        Args:
            attention_mask (`Tensor` of shape `(B, T)`): 1 for real tokens, 0 for absent ones.

        Raises:
            ValueError: The mask is not two-dimensional or holds other values than 0 and 1.
        """
        if attention_mask.dim() != 2:
            raise ValueError(f"`attention_mask` must have shape (batch, width); got {tuple(attention_mask.shape)}")
        present = attention_mask.bool()
        lengths = present.sum(1)
        total = lengths.sum()
        if attention_mask.dtype != torch.bool:
            is_binary = (present.to(attention_mask.dtype) == attention_mask).all()
            total = total.where(is_binary, -1)
        tokens = int(total)  # the one host read
        if tokens < 0:
            raise not_binary("attention_mask", attention_mask)
        rows, width = attention_mask.shape
        places = _true_places(present.flatten(), tokens)
        row = places.div(max(width, 1), rounding_mode="floor")
        positions = (present.cumsum(1) - 1).flatten()[places]
        indices = None if tokens == rows * width else places
        return cls((rows, width), tokens, lengths, row, positions, indices, longest=width)

    @classmethod
    def from_cu_seq_lens(cls, cu_seq_lens: Tensor | Sequence[int]) -> SequenceLayout:
        """Layout of one flat row from cumulative lengths, as flash-attention kernels take them.

        Args:
            cu_seq_lens (integer `Tensor` of shape `(S + 1,)`, or a list): 0, then the end of each sequence.

        Raises:
            ValueError: `cu_seq_lens` is not a vector of integers that starts at 0 and is non-decreasing.
        """
        cu_seq_lens = vector("cu_seq_lens", cu_seq_lens)
        if cu_seq_lens.numel() == 0 or cu_seq_lens[0] != 0 or (cu_seq_lens.diff() < 0).any():
            raise ValueError(f"`cu_seq_lens` must start at 0 and be non-decreasing; got {cu_seq_lens.tolist()}")
        return cls.from_lengths(cu_seq_lens.diff(), (1, int(cu_seq_lens[-1])))

    @classmethod
    def of_batch(
        cls,
        shape: tuple[int, int],
        device: torch.device,
        lengths: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> SequenceLayout:
        """Layout of a batch with `lengths` (see [`from_lengths`]), a 0/1 mask (see [`from_attention_mask`]), or both.

        With neither of them, all tokens are real.

        Raises:
            ValueError: `lengths` and `attention_mask` disagree, or an input does not fit the shape.
        """
        if attention_mask is not None and tuple(attention_mask.shape) != shape:
            raise ValueError(f"`attention_mask` must have the input's shape {shape}; got {tuple(attention_mask.shape)}")
        if lengths is None:
            return cls.full(shape, device) if attention_mask is None else cls.from_attention_mask(attention_mask)
        layout = cls.from_lengths(lengths, shape)
        if attention_mask is not None:
            layout._check_same_tokens(lengths, attention_mask)
        return layout

    @eager_only
    def _check_same_tokens(self, lengths: Tensor, attention_mask: Tensor) -> None:
        layout = self.trimmed()
        masked = self.from_attention_mask(attention_mask)
        if layout.num_tokens != masked.num_tokens or not torch.equal(masked.places, layout.places):
            raise ValueError(
                f"`lengths` and `attention_mask` must name the same tokens; got lengths {lengths.tolist()} and a "
                f"mask with {list(masked.sizes)} tokens per row (`lengths` mean padding on the right)"
            )

    def without(self, missing: Tensor) -> SequenceLayout:
        """The same batch without some tokens; the others keep their positions.

        Args:
            missing (bool `Tensor` of shape `(B, T)`): Which tokens to leave out; absent places may hold anything.

        Raises:
            ValueError: `missing` is not bool or not of the batch's shape.
        """
        if missing.dtype != torch.bool or tuple(missing.shape) != tuple(self.shape):
            raise ValueError(
                f"`missing` must be bool of shape {tuple(self.shape)}; got {missing.dtype} {tuple(missing.shape)}"
            )
        kept = ~self.flatten(missing)[0] & self.is_real
        if self.has_tail:  # missing tokens become part of the tail
            order = (~kept).to(torch.uint8).argsort(stable=True)
            return self._chosen(order, self._count(kept), kept=kept)
        tokens = int(kept.sum())
        return self._chosen(_true_places(kept, tokens), self._count(kept))

    def _count(self, kept: Tensor) -> Tensor:
        """`(S,)` int64: how many tokens of each sequence are `kept (N,)`."""
        counts = self.lengths.new_zeros(self.num_sequences + self.has_tail)
        return counts.index_add(0, self.sequence_ids, kept.long())[: self.num_sequences]

    def _chosen(self, chosen: Tensor, lengths: Tensor, kept: Tensor | None = None) -> SequenceLayout:
        """The layout of the tokens with indices `chosen`. Tokens that are not `kept (N,)` become part of the tail."""
        sequence_ids, positions = self.sequence_ids, self.positions
        if kept is not None:
            sequence_ids = sequence_ids.where(kept, self.num_sequences)
            positions = positions.where(kept, 0)
        sequence_ids, positions = sequence_ids[chosen], positions[chosen]
        return replace(
            self,
            num_tokens=chosen.shape[0],
            lengths=lengths,
            sequence_ids=sequence_ids,
            positions=positions,
            indices=self.places[chosen],
            has_gaps=may_have_gaps(lengths, sequence_ids, positions),
        )

    @eager_only
    def trimmed(self) -> SequenceLayout:
        """The layout without its tail, which takes one host read."""
        if not self.has_tail:
            return self
        tokens = int(self.lengths.sum())
        return replace(
            self,
            num_tokens=tokens,
            sequence_ids=self.sequence_ids[:tokens],
            positions=self.positions[:tokens],
            indices=None if self.indices is None else self.indices[:tokens],
            has_tail=False,
        )

    def bounded(self, longest: int) -> SequenceLayout:
        """The layout with a bound of the positions in a sequence.

        Only flat batches on other devices than the CPU need it: rows are bounded by their width, and on a CPU the
        lengths are read.
        """
        is_tighter = self.has_tail and self.device.type != "cpu" and longest < self.longest
        return replace(self, longest=longest) if is_tighter else self

    def divided(self, begins: Tensor) -> SequenceLayout:
        """The same tokens divided into more sequences, whose positions count from 0 again.

        Args:
            begins (bool `Tensor` of shape `(N,)`): Tokens that begin a sequence, in addition to those that already do.
        """
        begins = begins | self.begins
        numbers = begins.cumsum(0)
        empty = (self.lengths == 0).sum()
        if (sequences := int(numbers[-1:].sum() + empty)) == self.num_sequences:
            return self
        # An empty sequence keeps its place among the others.
        empty_before = (self.lengths == 0).cumsum(0)[self.sequence_ids]
        sequence_ids = numbers - 1 + empty_before
        lengths = _counts(sequence_ids, sequences)
        firsts = (lengths.cumsum(0) - lengths)[sequence_ids]
        positions = self.positions - self.positions[firsts]
        return replace(self, lengths=lengths, sequence_ids=sequence_ids, positions=positions)

    def divided_by_positions(self, position_ids: Tensor, is_stated: bool) -> SequenceLayout:
        """The layout divided wherever positions restart, which means that they return to the first of their sequence.

        Args:
            position_ids (`Tensor` of shape `(B, T)`): Positions; absent places may hold anything.
            is_stated (`bool`):
                Whether other arguments state where sequences begin. Then positions are only checked against them.

        Raises:
            ValueError: Sequences are stated, but positions restart inside a sequence or continue across two sequences
                of a row.
        """
        if is_stated and not reads_are_free(position_ids.device):
            return self
        positions = self.flatten(position_ids)[0]
        if is_stated and torch.equal(positions, self.positions):  # the usual case
            return self
        step, begins = positions.diff(), self.begins[1:]
        firsts = positions[self.starts[self.sequence_ids]]
        restarts = ~begins & (positions[1:] == firsts[1:]) & (step <= 0)
        if not is_stated:
            return self.divided(torch.nn.functional.pad(restarts, (1, 0))[: self.num_tokens])
        goes_on = begins & (step == 1) & (self.places // max(self.shape[1], 1)).diff().eq(0)
        if (restarts & (step < 0)).any() or goes_on.any():
            raise ValueError(
                f"`position_ids` must restart where sequences begin and only there; got {positions.tolist()} for "
                f"sequences of {list(self.sizes)} tokens"
            )
        return self

    def in_rows(self) -> SequenceLayout:
        """The same tokens in the same flat order, in a batch with a row per sequence and a column per position."""
        if self.num_sequences == self.shape[0]:
            return self
        indices = self.sequence_ids * self.num_positions + self.positions
        return replace(self, shape=(self.num_sequences, self.num_positions), indices=indices)

    def columns(self, start: int, stop: int) -> SequenceLayout:
        """Some columns of a batch of rows, `(B, stop - start)`; the tokens in them keep their positions.

        Raises:
            ValueError: The batch is flat, so that columns belong to different sequences.
        """
        rows, width = self.shape
        if (start, stop) == (0, width):
            return self
        if self.num_sequences != rows:
            raise ValueError(f"columns need a batch with one sequence a row; got {self.num_sequences} in {rows} rows")
        column = self.places % width
        kept = (column >= start) & (column < stop)
        found = self._chosen(_true_places(kept, int(kept.sum())), self._count(kept))
        indices = found.places // width * (stop - start) + found.places % width - start
        return replace(found, shape=(rows, stop - start), indices=indices)

    @property
    def num_sequences(self) -> int:
        """S, the sequences of the batch, empty ones included."""
        return self.lengths.shape[0]

    @property
    def device(self) -> torch.device:
        """The device of all its tensors."""
        return self.lengths.device

    @property
    def starts(self) -> Tensor:
        """`(S,)` int64: the flat place at which each sequence starts."""
        return self.lengths.cumsum(0) - self.lengths

    @property
    def cu_seq_lens(self) -> Tensor:
        """`(S + 1,)` int32: 0, then the end of each sequence in flat order."""
        return torch.nn.functional.pad(self.lengths.cumsum(0, dtype=torch.int32), (1, 0))

    @property
    def places(self) -> Tensor:
        """`(N,)` int64: place of each token in the row-major `(B * T)` batch."""
        return torch.arange(self.num_tokens, device=self.device) if self.indices is None else self.indices

    @property
    def is_real(self) -> Tensor:
        """Bool `(N,)`: which tokens belong to a sequence rather than to the tail."""
        return self.sequence_ids < self.num_sequences

    @property
    def begins(self) -> Tensor:
        """Bool `(N,)`: which tokens are the first of their sequence."""
        is_first = torch.arange(self.num_tokens, device=self.device) == 0
        return is_first | (self.sequence_ids != rolled(self.sequence_ids, 1))

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Real tokens of each sequence, on the host."""
        return tuple(self.lengths.tolist())

    @property
    def max_length(self) -> int:
        """Tokens of the longest sequence; 0 for an empty batch."""
        return max(self.sizes, default=0)

    @cached_property
    def num_positions(self) -> int:
        """Positions of the batch's longest sequence, missing tokens included; 0 for an empty batch."""
        return int(self.positions.max()) + 1 if self.num_tokens else 0

    @property
    def position_bound(self) -> int:
        """`num_positions`, or an upper bound of it if that would have to be read from a device."""
        return self.num_positions if reads_are_free(self.device) else self.longest

    @property
    def groups(self) -> tuple[Group, ...]:
        """Runs of neighbouring sequences of one length."""
        return tuple(Group(length, sum(1 for _ in run)) for length, run in groupby(self.sizes))

    def flatten(self, padded: Tensor) -> Tensor:
        """Keeps only the real tokens.

        Args:
            padded (`Tensor` of shape `(B, T, ...)`): Any tensor in the batch's layout.

        Returns:
            `Tensor` of shape `(1, N, ...)`: the tokens in flat order; a view where `indices` are `None`.

        Raises:
            ValueError: The first two dimensions are not `(B, T)`.
        """
        if tuple(padded.shape[:2]) != tuple(self.shape):
            raise ValueError(f"`padded` must have shape {(*self.shape, '...')}; got {tuple(padded.shape)}")
        rows = padded.flatten(0, 1)
        if self.indices is not None:
            return rows.index_select(0, self.indices).unsqueeze(0)
        return (rows if rows.shape[0] == self.num_tokens else rows[: self.num_tokens]).unsqueeze(0)

    def flatten_values(self, padded: Tensor, fill: float | int | bool = 0) -> Tensor:
        """[`flatten`] with `fill` in the tail, whose places may hold any value, NaN included."""
        return self._with_tail(self.flatten(padded), fill)

    def _with_tail(self, flat: Tensor, fill: float | int | bool) -> Tensor:
        """`flat (1, N, ...)` with `fill` in the tail."""
        return flat.masked_fill(~self.is_real.view(1, -1, *(1,) * (flat.dim() - 2)), fill) if self.has_tail else flat

    def unflatten(self, flat: Tensor, fill: float | int | bool = 0) -> Tensor:
        """Puts the real tokens back to their places in the batch; the inverse of [`flatten`].

        Args:
            flat (`Tensor` of shape `(1, N, ...)`): The tokens in flat order.
            fill (*optional*, defaults to 0): Value of absent places.

        Returns:
            `Tensor` of shape `(B, T, ...)`.

        Raises:
            ValueError: The first two dimensions are not `(1, N)`.
        """
        if tuple(flat.shape[:2]) != (1, self.num_tokens):
            raise ValueError(f"`flat` must have shape {(1, self.num_tokens, '...')}; got {tuple(flat.shape)}")
        rows, width = self.shape
        flat = self._with_tail(flat, fill)
        if self.indices is None and self.num_tokens == rows * width:
            return flat[0].unflatten(0, (rows, width))
        padded = flat.new_full((rows * width, *flat.shape[2:]), fill)
        return padded.index_copy(0, self.places, flat[0]).unflatten(0, (rows, width))

    def flatten_heads(self, padded: Tensor) -> Tensor:
        """`(B, H, T, D)` as flat `(1, H, N, D)`."""
        return self.flatten(padded.transpose(1, 2)).transpose(1, 2)

    def unflatten_heads(self, flat: Tensor) -> Tensor:
        """Flat `(1, H, N, D)` as `(B, H, T, D)`, 0 at absent places."""
        return self.unflatten(flat.transpose(1, 2)).transpose(1, 2)

    def first_tokens(self, flat: Tensor) -> Tensor:
        """First token of each sequence.

        Args:
            flat (`Tensor` of shape `(1, N, ...)`): The tokens in flat order.

        Returns:
            `Tensor` of shape `(S, ...)`; 0 for an empty sequence.
        """
        return self._tokens_at(self.starts, flat)

    def last_tokens(self, flat: Tensor, counted: Tensor | None = None) -> Tensor:
        """Last token of each sequence; see [`first_tokens`].

        Args:
            counted (bool `Tensor` of shape `(N,)`, *optional*):
                The tokens to choose from. The first token is taken from a sequence that has none of them.
        """
        places = self.lengths.cumsum(0) - 1
        if counted is not None:
            own = torch.arange(self.num_tokens, device=self.device).where(counted, 0)
            places = own.new_zeros(self.num_sequences + self.has_tail).scatter_reduce(0, self.sequence_ids, own, "amax")
            places = torch.maximum(places[: self.num_sequences], self.starts)
        return self._tokens_at(places, flat)

    def mean_tokens(self, flat: Tensor) -> Tensor:
        """Mean of each sequence's tokens, summed in float32 or better; see [`first_tokens`]."""
        values = flat[0].to(torch.promote_types(flat.dtype, torch.float32))
        sums = values.new_zeros(self.num_sequences + self.has_tail, *values.shape[1:])
        sums = sums.index_add(0, self.sequence_ids, values)[: self.num_sequences]
        counts = self.lengths.clamp(min=1).view(-1, *(1,) * (values.dim() - 1))
        return (sums / counts).to(flat.dtype)

    def _tokens_at(self, places: Tensor, flat: Tensor) -> Tensor:
        """The token at one place per sequence, `places (S,)`; 0 for an empty sequence."""
        tokens = flat[0]
        if reads_are_free(self.device) and 0 not in self.sizes:
            return tokens.index_select(0, places)
        with_zero = torch.cat([tokens, tokens.new_zeros(1, *tokens.shape[1:])])
        return with_zero.index_select(0, places.where(self.lengths > 0, self.num_tokens))

    def by_position(self, flat: Tensor, fill: float | int | bool = 0) -> Tensor:
        """Arranges values by sequence and position.

        Args:
            flat (`Tensor` of shape `(1, N, ...)`): Values of the tokens in flat order.
            fill (*optional*, defaults to 0): Value of positions without a token.

        Returns:
            `Tensor` of shape `(S, P, ...)`: P is `position_bound`.
        """
        width = self.position_bound
        rows = self.num_sequences + self.has_tail
        table = flat.new_full((rows * width, *flat.shape[2:]), fill)
        table = table.index_copy(0, self.sequence_ids * width + self.positions, flat[0])
        return table.unflatten(0, (rows, width))[: self.num_sequences]

    def to(self, device: torch.device | str) -> SequenceLayout:
        """The same layout with its tensors on `device`."""
        if self.device == torch.device(device):
            return self
        return replace(
            self,
            lengths=self.lengths.to(device),
            sequence_ids=self.sequence_ids.to(device),
            positions=self.positions.to(device),
            indices=None if self.indices is None else self.indices.to(device),
        )


def packed(states: Tensor) -> Tensor:
    """Flat `(1, H, N, D)` as `(N, H, D)`, token after token."""
    return states.squeeze(0).transpose(0, 1)


def in_heads(states: Tensor) -> Tensor:
    """Packed `(N, H, D)` as flat `(1, H, N, D)`."""
    return states.transpose(0, 1).unsqueeze(0)


def select_targets(states: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """`states (..., C)` and `labels (...)` of the labels that are not -100: `(targets, C)` and `(targets,)`.

    Both are returned as they are if the number of targets would have to be read from a device.
    """
    if torch.compiler.is_compiling() and labels.device.type == "cpu":
        return _selected_in_graph(states, labels)
    if not reads_are_free(labels.device):
        return states, labels
    real = labels != IGNORE_INDEX
    return states[real], labels[real]


def _selected_in_graph(states: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    real = labels.flatten() != IGNORE_INDEX
    places = (~real).to(torch.uint8).argsort(stable=True).narrow(0, 0, size_of_graph(real.sum(), real.shape[0]))
    return states.flatten(0, labels.dim() - 1).index_select(0, places), labels.flatten().index_select(0, places)


def size_of_graph(value: Tensor, most: int) -> int:
    """A value as a data-dependent size of the graph, from 0 to `most`."""
    size = cast(int, value.item())  # a symbol, which `int(...)` would make a constant
    torch._check(size >= 0)
    torch._check(size <= most)
    return size


def ids_and_positions(lengths: Tensor, tokens: int, has_tail: bool = False) -> tuple[Tensor, Tensor]:
    """The sequence and the position of each token, both `(tokens,)`, for sequences of `lengths (S,)` end to end.

    In the tail, after the last sequence, they are S and 0.
    """
    ends = lengths.cumsum(0)
    places = torch.arange(tokens, device=lengths.device)
    sequence_ids = torch.searchsorted(ends, places, right=True)
    starts = ends - lengths
    if not has_tail:
        return sequence_ids, places - starts[sequence_ids]
    starts = torch.nn.functional.pad(starts, (0, 1))
    positions = places - starts[sequence_ids]
    return sequence_ids, positions.where(sequence_ids < lengths.shape[0], 0)


def may_have_gaps(lengths: Tensor, sequence_ids: Tensor, positions: Tensor) -> bool:
    """Whether `positions (N,)` differ from the tokens' places in their sequences; True if that cannot be read."""
    if not reads_are_free(positions.device):
        return True
    return not torch.equal(ids_and_positions(lengths, positions.shape[0])[1], positions)


def rolled(values: Tensor, steps: int) -> Tensor:
    """`values.roll(steps, dims=-1)`, which also works for a data-dependent size of a graph."""
    size = values.shape[-1]
    return values.index_select(-1, (torch.arange(size, device=values.device) - steps) % size)


def _counts(numbers: Tensor, most: int) -> Tensor:
    """How often each number from 0 to `most - 1` occurs: `(most,)` int64."""
    counts = torch.zeros(most, dtype=torch.long, device=numbers.device)
    return counts.index_add(0, numbers, torch.ones_like(numbers))


def _true_places(flags: Tensor, count: int) -> Tensor:
    """`(count,)` int64: the places at which `flags (n,)` are True; their number must be known."""
    if flags.shape[0] == count:
        return torch.arange(count, device=flags.device)
    if reads_are_free(flags.device):
        return flags.nonzero().squeeze(1)
    target = (flags.cumsum(0) - 1).where(flags, count)
    return target.new_empty(count + 1).index_copy(0, target, torch.arange(flags.shape[0], device=flags.device))[:count]


def integers(name: str, values: Tensor) -> Tensor:
    """The values as int64, which is large enough for sums of positions and lengths.

    Raises:
        ValueError: The values are not integers, or their dtype has integers beyond int64.
    """
    if values.dtype == torch.int64:
        return values
    if values.is_floating_point() or values.is_complex() or values.dtype in (torch.bool, torch.uint64):
        raise ValueError(f"`{name}` must be integers; got dtype {values.dtype}")
    return values.long()


def vector(name: str, values: Tensor | Sequence[int]) -> Tensor:
    """A list of numbers or a tensor `(n,)` as an int64 tensor.

    Raises:
        ValueError: The values have another shape or are not integers.
    """
    if not isinstance(values, Tensor):
        values = torch.tensor(values, dtype=None if values else torch.long)
    if values.dim() != 1:
        raise ValueError(f"`{name}` must be a vector; got shape {tuple(values.shape)}")
    return integers(name, values)


def checked_lengths(name: str, lengths: Tensor) -> tuple[int, ...]:
    """Lengths `(S,)` on the host.

    Raises:
        ValueError: The lengths are not a vector of integers, or negative.
    """
    sizes = tuple(vector(name, lengths).tolist())
    if any(size < 0 for size in sizes):
        raise ValueError(f"`{name}` must not be negative; got {min(sizes)}")
    return sizes


def _read_total(lengths: Tensor, width: int, in_rows: bool) -> int:
    """N, the sum of `lengths`, with one host read. Checks that each row, or else their sum, is at most `width`."""
    if lengths.device.type != "cpu":
        fits = lengths <= width if in_rows else lengths.sum() <= width
        total = int(lengths.sum().where(((lengths >= 0) & fits).all(), -1))
        if total >= 0:
            return total
    sizes = checked_lengths("lengths", lengths)
    total, longest = sum(sizes), max(sizes, default=0)
    if in_rows and longest > width:
        raise ValueError(f"`lengths` must not be beyond the row width {width}; got {longest}")
    if not in_rows and total > width:
        raise ValueError(
            f"`lengths` of a flat batch must add up to at most its width {width}; got a sum of {total} over "
            f"{len(sizes)} sequences (a flat batch cannot be split over devices: use rows for that)"
        )
    return total


NUMBERED = (  # a hint for users whose mask numbers the documents of a row
    "documents of one row are kept apart by `position_ids` that restart, or by `segment_ids` and a mask with `segments`"
)


def not_binary(name: str, mask: Tensor) -> ValueError:
    """The error for a mask `(B, T)` with other values than 0 and 1, which may be numbers of documents."""
    other = mask[(mask != 0) & (mask != 1)]
    return ValueError(f"`{name}` must hold only 0 and 1; got {other[0].item()} ({NUMBERED})")


def check_not_scattered(tokens: Tensor, lengths: Tensor | None, pad_token_id: int | None) -> None:
    """Raises if [`~torch.nn.DataParallel`] has split the lengths of a flat batch.

    It gives the only row to one device and divides the lengths among several. That device's batch looks like a row with
    padding, except that tokens follow its sequences.

    Args:
        tokens (`Tensor` of shape `(B, T)` or `(B, T, F)`): Ids or frames of a replica.
        lengths (`Tensor` of shape `(B,)` or `(S,)`, *optional*): Lengths of the replica.
        pad_token_id (`int`, *optional*): The id of padding. `None`: any single id.

    Raises:
        ValueError: The last sequence of a single row is followed by something other than padding.
    """
    if lengths is None or tokens.shape[0] != 1:
        return
    total = int(lengths.sum())
    rest = tokens[0, total:]
    if rest.is_floating_point():
        pad_token_id = 0
    if (rest != (rest[-1:] if pad_token_id is None else pad_token_id)).any():
        raise ValueError(
            f"`lengths` of a row on a replica of DataParallel must be followed by padding only; got {total} tokens in "
            f"a row of {tokens.shape[1]}, followed by others (a flat batch cannot be split over devices: use rows for "
            "that, or start one process per device)"
        )
