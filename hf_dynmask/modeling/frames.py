"""The layouts of a batch's tokens or frames, with and without those that are missing.

Shape legend: S sequences, N real frames; M real frames after a convolution with a kernel of K frames.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .layout import SequenceLayout, eager_only


class Frames(NamedTuple):
    """The layout of all frames of a batch, `whole`, and of those that are not missing, `present`."""

    whole: SequenceLayout
    present: SequenceLayout

    @eager_only
    def subsampled(self, stride: int) -> Frames:
        """The layouts after subsampling: each `stride` frames of a sequence, and the rest at its end, become one frame.

        Row b holds its `ceil(lengths[b] / stride)` frames from its left edge; a flat batch stays flat. A frame is
        missing if all the frames that it replaces are missing.
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
        # `None`: the sum of the lengths. With a tail the lengths are not read, and the width is an upper bound.
        return (1, -(-width // stride) + self.whole.num_sequences) if self.whole.has_tail else None

    @eager_only
    def windows(self, kernel: int, after: Frames, stride: int) -> Tensor:
        """`(M, K)` int64: the frames that each frame of `after` reads, as indices from 0 to N - 1; N for no frame."""
        present, outputs = self.present, after.present
        num_frames = present.num_tokens
        positions = outputs.positions[:, None] * stride + torch.arange(kernel, device=present.device) - kernel // 2
        sequences = outputs.sequence_ids[:, None]
        if present.has_gaps:
            places = present.by_position(torch.arange(num_frames, device=present.device)[None], fill=num_frames)
            places = nn.functional.pad(places, (kernel // 2, kernel // 2), value=num_frames)
            places = nn.functional.pad(places, (0, 0, 0, 1), value=num_frames)  # the tail reads nothing
            return places[sequences, positions + kernel // 2]
        starts, lengths = (nn.functional.pad(x, (0, 1))[sequences] for x in (present.starts, present.lengths))
        return (starts + positions).where((positions >= 0) & (positions < lengths), num_frames)
