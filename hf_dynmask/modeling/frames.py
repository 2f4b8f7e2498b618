"""Where the tokens or frames of a batch sit, those that are missing as well.

Shape legend: S sequences, N real frames; M real frames behind a convolution, whose windows hold K frames.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .layout import SequenceLayout, eager_only


class Frames(NamedTuple):
    """Where the frames of a batch sit: all that its sequences have, and of these the ones that are not missing."""

    whole: SequenceLayout
    present: SequenceLayout

    @eager_only
    def subsampled(self, stride: int) -> Frames:
        """One frame in place of each `stride` ones, and at the end of those that are left.

        Row b holds its `ceil(lengths[b] / stride)` frames from its left edge; a flat batch stays flat. A frame is
        missing where all those are missing that it takes the place of.
        """
        if stride == 1:
            return self
        whole, present = self
        lengths = -(-whole.lengths // stride)
        after = SequenceLayout.from_lengths(lengths, self._shape_after(stride))
        if present is whole:
            return Frames(after, after)
        starts = nn.functional.pad(after.starts, (0, 1))
        places = starts[present.sequence_ids] + present.positions // stride
        missing = torch.ones(after.num_tokens + 1, dtype=torch.bool, device=lengths.device)
        missing = missing.index_fill(0, places.where(present.is_real, after.num_tokens), False)[None, :-1]
        return Frames(after, after.without(after.unflatten(missing)))

    def _shape_after(self, stride: int) -> tuple[int, int] | None:
        rows, width = self.whole.shape
        if self.whole.num_sequences == rows:
            return rows, -(-width // stride)
        # As wide as the lengths say, or, where nobody reads them, as they may say at most.
        return (1, -(-width // stride) + self.whole.num_sequences) if self.whole.has_tail else None

    @eager_only
    def windows(self, kernel: int, after: Frames, stride: int) -> Tensor:
        """`(M, K)` int64: which of the N frames each of those of `after` reads, N where there is none."""
        present, read_by = self.present, after.present
        number = present.num_tokens
        positions = read_by.positions[:, None] * stride + torch.arange(kernel, device=present.device) - kernel // 2
        sequences = read_by.sequence_ids[:, None]
        if present.has_gaps:
            places = present.by_position(torch.arange(number, device=present.device)[None], fill=number)
            places = nn.functional.pad(places, (kernel // 2, kernel // 2), value=number)
            places = nn.functional.pad(places, (0, 0, 0, 1), value=number)  # the tail reads nothing
            return places[sequences, positions + kernel // 2]
        starts, lengths = (nn.functional.pad(x, (0, 1))[sequences] for x in (present.starts, present.lengths))
        return (starts + positions).where((positions >= 0) & (positions < lengths), number)
