"""Where the real tokens of a batch sit: lengths, 0/1 attention masks and `cu_seq_lens` in one immutable object.

Shape legend: B rows of width T in the batch, S sequences, N real tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby
from typing import NamedTuple, TypeVar, cast

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable)
IGNORE_INDEX = -100  # of a label that is none


def eager_only(function: F) -> F:
    """Keep `torch.compile` out of `function`: lengths are values of the host, and every batch has others."""
    return cast(F, torch.compiler.disable(function, reason="it reads lengths on the host"))


class Group(NamedTuple):
    """A run of neighbouring sequences of one length in the flat order: one attention call serves them all."""

    length: int
    count: int


@dataclass(frozen=True, eq=False)
class SequenceLayout:
    """Which tokens of a `(B, T)` batch exist, and the order in which they stand in flat `(1, N, ...)` tensors.

    Make one with [`from_lengths`], [`from_attention_mask`] or [`from_cu_seq_lens`].

    Attributes:
        shape (`tuple[int, int]`): `(B, T)` of the batch.
        sizes (`tuple[int, ...]`): Real tokens of each sequence in flat order, on the host.
        rank (`Tensor` of shape `(S,)`, int64): Which of the batch's sequences stands at each place of the flat order.
        indices (`Tensor` of shape `(N,)`, int64): Place of each flat token in the row-major `(B * T)` batch.
        positions (`Tensor` of shape `(N,)`, int64): Index of each flat token in its own sequence, from 0.
    """

    shape: tuple[int, int]
    sizes: tuple[int, ...]
    rank: Tensor
    indices: Tensor
    positions: Tensor

    @classmethod
    def from_lengths(cls, lengths: Tensor, shape: tuple[int, int] | None = None) -> SequenceLayout:
        """Layout of rows that hold their tokens from the left edge, or of one flat row.

        Args:
            lengths (`Tensor` of shape `(B,)` or `(S,)`, integer):
                Tokens of each row; or, for a batch of one row, of each of the S sequences that stand in it end to end.
            shape (`tuple[int, int]`, *optional*): `(B, T)` of the batch. `None`: one flat row, `(1, sum(lengths))`.

        Raises:
            ValueError: `lengths` is not a vector of integers, has the wrong size, is negative or beyond T; or the
                lengths of a flat row do not add up to T.
        """
        sizes = checked_lengths("lengths", lengths)
        if shape is None:
            shape = (1, sum(sizes))
        rows, width = shape
        if len(sizes) == rows:
            _check_within(sizes, width)
            starts = [row * width for row in range(rows)]
        elif rows == 1:
            _check_flat(sizes, width)
            starts = _cumulative(sizes)[:-1]
        else:
            raise ValueError(
                f"`lengths` must have one entry a row, shape ({rows},), or belong to a flat batch of one row; "
                f"got shape ({len(sizes)},) for input of shape {tuple(shape)}"
            )
        rank = torch.arange(len(sizes), device=lengths.device)
        return cls._from_starts(shape, sizes, rank, torch.tensor(starts, dtype=torch.long, device=lengths.device))

    @classmethod
    def from_attention_mask(cls, attention_mask: Tensor) -> SequenceLayout:
        """Layout of rows whose tokens may stand anywhere: padding right, left or inside.

        Args:
            attention_mask (`Tensor` of shape `(B, T)`): 1 where a token is, 0 where none is.

        Raises:
            ValueError: The mask is not two-dimensional or holds other values than 0 and 1.
        """
        if attention_mask.dim() != 2:
            raise ValueError(f"`attention_mask` must have shape (batch, width); got {tuple(attention_mask.shape)}")
        present = attention_mask.bool()
        if attention_mask.dtype != torch.bool and not torch.equal(present.to(attention_mask.dtype), attention_mask):
            raise not_binary("attention_mask", attention_mask)
        rows, width = attention_mask.shape
        positions = present.cumsum(1) - 1
        return cls(
            shape=(rows, width),
            sizes=tuple(present.sum(1).tolist()),
            rank=torch.arange(rows, device=attention_mask.device),
            indices=present.flatten().nonzero().squeeze(1),
            positions=positions[present],
        )

    @classmethod
    def from_cu_seq_lens(cls, cu_seq_lens: Tensor) -> SequenceLayout:
        """Layout of one flat row from cumulative lengths, as flash-attention kernels take them.

        Args:
            cu_seq_lens (`Tensor` of shape `(S + 1,)`, integer): 0, then the end of each sequence.

        Raises:
            ValueError: `cu_seq_lens` is not a vector of integers that starts at 0 and never falls.
        """
        cu_seq_lens = _vector("cu_seq_lens", cu_seq_lens)
        if cu_seq_lens.numel() == 0 or cu_seq_lens[0] != 0 or (cu_seq_lens.diff() < 0).any():
            raise ValueError(f"`cu_seq_lens` must start at 0 and never fall; got {cu_seq_lens.tolist()}")
        total = int(cu_seq_lens[-1])
        lengths = cu_seq_lens.diff()
        if lengths.numel() == 1:  # one sequence: the same as a row that is full
            return cls.from_lengths(lengths, (1, total))
        return cls.from_lengths(lengths)

    @classmethod
    def of_batch(
        cls,
        shape: tuple[int, int],
        device: torch.device,
        lengths: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> SequenceLayout:
        """Layout of a batch that comes with `lengths`, see [`from_lengths`], with a 0/1 mask, see
        [`from_attention_mask`], or with both; with neither all tokens are there.

        Raises:
            ValueError: `lengths` and `attention_mask` disagree, or an input does not fit the shape.
        """
        if attention_mask is not None and tuple(attention_mask.shape) != shape:
            raise ValueError(f"`attention_mask` must have the input's shape {shape}; got {tuple(attention_mask.shape)}")
        if lengths is None:
            if attention_mask is not None:
                return cls.from_attention_mask(attention_mask)
            lengths = torch.full((shape[0],), shape[1], dtype=torch.long, device=device)
        layout = cls.from_lengths(lengths, shape)
        if attention_mask is not None:
            masked = cls.from_attention_mask(attention_mask)
            if not torch.equal(masked.indices, layout.indices):
                raise ValueError(
                    f"`lengths` and `attention_mask` must name the same tokens; got lengths {lengths.tolist()} and a "
                    f"mask with {list(masked.sizes)} tokens a row (padding on the right is what lengths mean)"
                )
        return layout

    @classmethod
    def _from_starts(
        cls, shape: tuple[int, int], sizes: tuple[int, ...], rank: Tensor, starts: Tensor
    ) -> SequenceLayout:
        """`starts (S,)` is the place of each sequence's first token in the row-major batch."""
        lengths = torch.tensor(sizes, dtype=torch.long, device=rank.device)
        sequence = sequence_ids_from_lengths(lengths, sum(sizes))
        positions = torch.arange(sum(sizes), device=rank.device) - (lengths.cumsum(0) - lengths)[sequence]
        return cls(shape=shape, sizes=sizes, rank=rank, indices=positions + starts[sequence], positions=positions)

    def by_length(self) -> SequenceLayout:
        """The same batch with its flat order sorted by length, so that equal lengths are neighbours (stable)."""
        return self.reordered(sorted(range(self.num_sequences), key=self.sizes.__getitem__))

    def reordered(self, order: list[int]) -> SequenceLayout:
        """The same batch with another flat order.

        Args:
            order (`list[int]`, S entries): Place in today's flat order of the sequence that is to stand at each place.
        """
        if order == list(range(self.num_sequences)):
            return self
        tokens = self.token_order(order)
        return SequenceLayout(
            shape=self.shape,
            sizes=tuple(self.sizes[place] for place in order),
            rank=self.rank[torch.tensor(order, dtype=torch.long, device=self.rank.device)],
            indices=self.indices[tokens],
            positions=self.positions[tokens],
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
        kept = ~missing.flatten()[self.indices]
        sizes = torch.zeros_like(self.lengths).index_add_(0, self.sequence_ids, kept.long())
        return SequenceLayout(self.shape, tuple(sizes.tolist()), self.rank, self.indices[kept], self.positions[kept])

    def divided(self, begins: Tensor) -> SequenceLayout:
        """The same tokens as more sequences, whose positions count from 0 again.

        Args:
            begins (bool `Tensor` of shape `(N,)`): Tokens that begin a sequence, beside the first of each present one.
        """
        begins = begins | self.begins
        if torch.equal(begins, self.begins):
            return self
        firsts = begins.nonzero().squeeze(1)
        pieces = iter(torch.nn.functional.pad(firsts, (0, 1), value=self.num_tokens).diff().tolist())
        sizes = []
        for size in self.sizes:
            sizes.append(next(pieces) if size else 0)
            while (rest := size - sizes[-1]) > 0:
                size = rest
                sizes.append(next(pieces))
        return SequenceLayout(
            shape=self.shape,
            sizes=tuple(sizes),
            rank=torch.arange(len(sizes), device=self.rank.device),
            indices=self.indices,
            positions=self.positions - self.positions[firsts][begins.cumsum(0) - 1],
        )

    def divided_by_positions(self, position_ids: Tensor, is_stated: bool) -> SequenceLayout:
        """The layout with a sequence for each time that positions restart: go back to the first one of their sequence.

        Args:
            position_ids (`Tensor` of shape `(B, T)`): Positions; absent places may hold anything.
            is_stated (`bool`): Whether the batch has said otherwise where its sequences begin.

        Raises:
            ValueError: It has, and positions restart inside a sequence, or go on from one to the next in a row.
        """
        positions = self.flatten(position_ids)[0]
        step, begins = positions.diff(), self.begins[1:]
        firsts = positions[self.cu_seq_lens[:-1].long()[self.sequence_ids]]
        restarts = ~begins & (positions[1:] == firsts[1:]) & (step <= 0)
        if not is_stated:
            return self.divided(torch.nn.functional.pad(restarts, (1, 0))[: self.num_tokens])
        goes_on = begins & (step == 1) & (self.indices // max(self.shape[1], 1)).diff().eq(0)
        if (restarts & (step < 0)).any() or goes_on.any():
            raise ValueError(
                f"`position_ids` must restart where sequences begin and only there; got {positions.tolist()} for "
                f"sequences of {list(self.sizes)} tokens"
            )
        return self

    def in_rows(self) -> SequenceLayout:
        """The same tokens, in the same flat order, with a row for each sequence, in which they stand by position."""
        if self.num_sequences == self.shape[0]:
            return self
        indices = self.rank[self.sequence_ids] * self.num_positions + self.positions
        return SequenceLayout((self.num_sequences, self.num_positions), self.sizes, self.rank, indices, self.positions)

    def columns(self, start: int, stop: int) -> SequenceLayout:
        """Some columns of a batch of rows, `(B, stop - start)`; the tokens in them keep their positions.

        Raises:
            ValueError: The batch is flat: its columns are of different sequences.
        """
        rows, width = self.shape
        if (start, stop) == (0, width):
            return self
        if self.num_sequences != rows:
            raise ValueError(f"columns need a batch with one sequence a row; got {self.num_sequences} in {rows} rows")
        column = self.indices % width
        kept = (column >= start) & (column < stop)
        sizes = torch.zeros_like(self.lengths).index_add_(0, self.sequence_ids, kept.long())
        indices = (self.indices // width * (stop - start) + column - start)[kept]
        return SequenceLayout((rows, stop - start), tuple(sizes.tolist()), self.rank, indices, self.positions[kept])

    def token_order(self, order: list[int]) -> Tensor:
        """`(N,)` int64: place in today's flat order of each token after [`reordered`]."""
        starts = _cumulative(self.sizes)
        pieces = [torch.arange(starts[place], starts[place + 1]) for place in order]
        return torch.cat(pieces or [torch.empty(0, dtype=torch.long)]).to(self.rank.device)

    @property
    def num_tokens(self) -> int:
        """N, the real tokens of the batch."""
        return self.indices.numel()

    @property
    def num_sequences(self) -> int:
        """S, the sequences of the batch, empty ones included."""
        return len(self.sizes)

    @property
    def max_length(self) -> int:
        """Tokens of the longest sequence; 0 for an empty batch."""
        return max(self.sizes, default=0)

    @cached_property
    def lengths(self) -> Tensor:
        """`(S,)` int64: real tokens of each sequence in flat order."""
        return torch.tensor(self.sizes, dtype=torch.long, device=self.rank.device)

    @cached_property
    def cu_seq_lens(self) -> Tensor:
        """`(S + 1,)` int32: 0, then the end of each sequence in flat order."""
        return torch.tensor(_cumulative(self.sizes), dtype=torch.int32, device=self.rank.device)

    @cached_property
    def sequence_ids(self) -> Tensor:
        """`(N,)` int64: place in the flat order of the sequence that each token belongs to."""
        return sequence_ids_from_lengths(self.lengths, self.num_tokens)

    @cached_property
    def begins(self) -> Tensor:
        """Bool `(N,)`: which tokens are the first of their sequence."""
        return begins(self.sequence_ids)

    @cached_property
    def is_contiguous(self) -> bool:
        """Whether the flat order is the batch's own row-major order with nothing absent: flattening is a view."""
        rows, width = self.shape
        if self.num_tokens != rows * width:
            return False
        return bool((self.indices == torch.arange(rows * width, device=self.indices.device)).all())

    @cached_property
    def is_sorted(self) -> bool:
        """Whether equal lengths are neighbours in the flat order."""
        return len(self.groups) == len(set(self.sizes))

    @cached_property
    def has_gaps(self) -> bool:
        """Whether some sequence lacks tokens before its last one: see [`without`]."""
        places = torch.arange(self.num_tokens, device=self.rank.device)
        return not torch.equal(places - self.cu_seq_lens[:-1].long()[self.sequence_ids], self.positions)

    @cached_property
    def num_positions(self) -> int:
        """Positions of the batch's longest sequence, missing tokens included; 0 for an empty batch."""
        return int(self.positions.max()) + 1 if self.num_tokens else 0

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """Runs of neighbouring sequences of one length, in flat order."""
        return tuple(Group(length, sum(1 for _ in run)) for length, run in groupby(self.sizes))

    @eager_only
    def flatten(self, padded: Tensor) -> Tensor:
        """Keep the real tokens alone.

        Args:
            padded (`Tensor` of shape `(B, T, ...)`): Any tensor in the batch's layout.

        Returns:
            `Tensor` of shape `(1, N, ...)`: the real tokens in flat order; a view where nothing is absent.

        Raises:
            ValueError: The first two dimensions are not `(B, T)`.
        """
        if tuple(padded.shape[:2]) != tuple(self.shape):
            raise ValueError(f"`padded` must have shape {(*self.shape, '...')}; got {tuple(padded.shape)}")
        rows = padded.reshape(self.shape[0] * self.shape[1], *padded.shape[2:])
        return (rows if self.is_contiguous else rows.index_select(0, self.indices)).unsqueeze(0)

    @eager_only
    def unflatten(self, flat: Tensor, fill: float | int | bool = 0) -> Tensor:
        """Put the real tokens back where they came from; the inverse of [`flatten`].

        Args:
            flat (`Tensor` of shape `(1, N, ...)`): The real tokens in flat order.
            fill (*optional*, defaults to 0): Value of absent places.

        Returns:
            `Tensor` of shape `(B, T, ...)`.

        Raises:
            ValueError: The first two dimensions are not `(1, N)`.
        """
        if tuple(flat.shape[:2]) != (1, self.num_tokens):
            raise ValueError(f"`flat` must have shape {(1, self.num_tokens, '...')}; got {tuple(flat.shape)}")
        rows, width = self.shape
        if self.is_contiguous:
            return flat.reshape(rows, width, *flat.shape[2:])
        padded = flat.new_full((rows * width, *flat.shape[2:]), fill)
        return padded.index_copy_(0, self.indices, flat[0]).view(rows, width, *flat.shape[2:])

    def flatten_heads(self, padded: Tensor) -> Tensor:
        """`(B, H, T, D)` as flat `(1, H, N, D)`."""
        return self.flatten(padded.transpose(1, 2)).transpose(1, 2)

    def unflatten_heads(self, flat: Tensor) -> Tensor:
        """Flat `(1, H, N, D)` as `(B, H, T, D)`, 0 where no token is."""
        return self.unflatten(flat.transpose(1, 2)).transpose(1, 2)

    @eager_only
    def first_tokens(self, flat: Tensor) -> Tensor:
        """First token of each of the batch's sequences.

        Args:
            flat (`Tensor` of shape `(1, N, ...)`): The real tokens in flat order.

        Returns:
            `Tensor` of shape `(S, ...)`: in the order in which the batch names its sequences; 0 for an empty one.
        """
        return self._tokens_at(self.cu_seq_lens[:-1].long(), flat)

    @eager_only
    def last_tokens(self, flat: Tensor) -> Tensor:
        """Last token of each of the batch's sequences; see [`first_tokens`]."""
        return self._tokens_at(self.cu_seq_lens[1:].long() - 1, flat)

    def _tokens_at(self, places: Tensor, flat: Tensor) -> Tensor:
        """The token at one place in each sequence that has any, in the batch's order of sequences."""
        if 0 not in self.sizes:
            return flat[0].index_select(0, torch.empty_like(places).scatter_(0, self.rank, places))
        full = self.lengths > 0
        tokens = flat.new_zeros(self.num_sequences, *flat.shape[2:])
        return tokens.index_copy_(0, self.rank[full], flat[0].index_select(0, places[full]))

    @eager_only
    def by_position(self, flat: Tensor, fill: float | int | bool = 0) -> Tensor:
        """Values by sequence and position.

        Args:
            flat (`Tensor` of shape `(1, N, ...)`): Values of the real tokens in flat order.
            fill (*optional*, defaults to 0): Value where a sequence has no token.

        Returns:
            `Tensor` of shape `(S, max position + 1, ...)`: sequences in flat order.
        """
        table = flat.new_full((self.num_sequences, self.num_positions, *flat.shape[2:]), fill)
        return table.index_put_((self.sequence_ids, self.positions), flat[0])

    @eager_only
    def select_targets(self, states: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """`states (..., C)` and `labels (...)` where those are not -100: `(targets, C)` and `(targets,)`."""
        real = labels != IGNORE_INDEX
        return states[real], labels[real]

    def to(self, device: torch.device | str) -> SequenceLayout:
        """The same layout with its tensors on `device`."""
        if self.rank.device == torch.device(device):
            return self
        tensors = (tensor.to(device) for tensor in (self.rank, self.indices, self.positions))
        return SequenceLayout(self.shape, self.sizes, *tensors)


def sequence_ids_from_lengths(sizes: Tensor, total: int) -> Tensor:
    """Which run each of `total` things is in, when runs of `sizes (S,)` things stand end to end: `(total,)` int64.

    (`repeat_interleave` says the same, but wakes all threads for it.)
    """
    starts = sizes.cumsum(0)[:-1]
    steps = torch.zeros(total + 1, dtype=torch.long, device=sizes.device)
    return steps.index_add_(0, starts, torch.ones_like(starts)).cumsum(0)[:total]


def begins(sequence_ids: Tensor) -> Tensor:
    """Which of `(N,)` things are the first of their run, whose number they have."""
    is_first = torch.arange(sequence_ids.shape[0], device=sequence_ids.device) == 0
    return is_first | (sequence_ids != rolled(sequence_ids, 1))


def rolled(values: Tensor, steps: int) -> Tensor:
    """`values.roll(steps, dims=-1)`, for any size that a graph does not know."""
    size = values.shape[-1]
    return values.index_select(-1, (torch.arange(size, device=values.device) - steps) % size)


def _cumulative(sizes: tuple[int, ...]) -> list[int]:
    """0 and the running sums of `sizes`."""
    return [0, *accumulate(sizes)]


def integers(name: str, values: Tensor) -> Tensor:
    """The values as int64, in which sums of positions and lengths fit.

    Raises:
        ValueError: They are no integers, or of a dtype that holds some beyond int64.
    """
    if values.dtype == torch.int64:
        return values
    if values.is_floating_point() or values.is_complex() or values.dtype in (torch.bool, torch.uint64):
        raise ValueError(f"`{name}` must be integers; got dtype {values.dtype}")
    return values.long()


def _vector(name: str, values: Tensor) -> Tensor:
    if values.dim() != 1:
        raise ValueError(f"`{name}` must be a vector; got shape {tuple(values.shape)}")
    return integers(name, values)


def checked_lengths(name: str, lengths: Tensor) -> tuple[int, ...]:
    """Lengths `(S,)` on the host.

    Raises:
        ValueError: They are not a vector of integers, or negative.
    """
    sizes = tuple(_vector(name, lengths).tolist())
    if any(size < 0 for size in sizes):
        raise ValueError(f"`{name}` must not be negative; got {min(sizes)}")
    return sizes


def _check_within(sizes: tuple[int, ...], width: int) -> None:
    longest = max(sizes, default=0)
    if longest > width:
        raise ValueError(f"`lengths` must not be beyond the row width {width}; got {longest}")


def _check_flat(sizes: tuple[int, ...], width: int) -> None:
    if sum(sizes) != width:
        raise ValueError(
            f"`lengths` of a flat batch must add up to its width {width}; got a sum of {sum(sizes)} over "
            f"{len(sizes)} sequences (a flat batch cannot be split over devices: use rows for that)"
        )


NUMBERED = (
    "documents of one row are kept apart by `position_ids` that restart, or by `segment_ids` and a mask with `segments`"
)


def not_binary(name: str, mask: Tensor) -> ValueError:
    """An error for a mask `(B, T)` that does not say which tokens are there, but, it may be, of which document."""
    other = mask[(mask != 0) & (mask != 1)]
    return ValueError(f"`{name}` must hold only 0 and 1; got {other[0].item()} ({NUMBERED})")


def check_not_scattered(tokens: Tensor, lengths: Tensor | None, pad_token_id: int | None) -> None:
    """Refuse the first sequence of a flat batch that [`~torch.nn.DataParallel`] has taken apart.

    Its one row goes to one device as it is, and its lengths to several. What comes of it looks like a row with padding,
    but for the tokens that stand behind the first sequence.

    Args:
        tokens (`Tensor` of shape `(B, T)` or `(B, T, F)`): Ids or frames that a replica was given.
        lengths (`Tensor` of shape `(B,)`, *optional*): With them.
        pad_token_id (`int`, *optional*): What ids are padded with. `None`: any one id.

    Raises:
        ValueError: Behind the end of the only sequence stands something other than padding.
    """
    if lengths is None or lengths.numel() != 1 or tokens.shape[0] != 1:
        return
    behind = tokens[0, int(lengths) :]
    if behind.is_floating_point():
        pad_token_id = 0
    if (behind != (behind[-1:] if pad_token_id is None else pad_token_id)).any():
        raise ValueError(
            f"`lengths` of a row on a replica of DataParallel must leave padding alone behind them; got {int(lengths)} "
            f"tokens in a row of {tokens.shape[1]} with others behind (a flat batch cannot be split over devices: use "
            "rows for that, or start one process a device)"
        )
