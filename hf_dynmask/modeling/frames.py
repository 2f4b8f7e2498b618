"""Where the tokens or frames of a batch sit, those that are missing as well.

Shape legend: S sequences, N real frames; M real frames behind a convolution, whose windows hold K frames.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .layout import SequenceLayout, eager_only


class Frames(NamedTuple):
    """Where the frames of a batch sit: all that its sequences have, and of these the ones that are not missing.

    Both in the batch's own order of sequences.
    """

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
        rows, width = whole.shape
        lengths = -(-whole.lengths // stride)
        in_rows = whole.num_sequences == rows
        after = SequenceLayout.from_lengths(lengths, (rows, -(-width // stride)) if in_rows else None)
        if present is whole:
            return Frames(after, after)
        missing = torch.ones(1, after.num_tokens, dtype=torch.bool, device=lengths.device)
        missing[0, after.cu_seq_lens[present.sequence_ids] + present.positions // stride] = False
        return Frames(after, after.without(after.unflatten(missing)))

    @eager_only
    def windows(self, kernel: int, after: Frames, stride: int) -> Tensor:
        """`(M, K)` int64: which of the N frames each of those of `after` reads, N where there is none."""
        frames = torch.arange(self.present.num_tokens, device=self.present.positions.device)
        places = self.present.by_position(frames[None], fill=len(frames))
        places = nn.functional.pad(places, (kernel // 2, kernel // 2), value=len(frames))
        columns = after.present.positions[:, None] * stride + torch.arange(kernel, device=frames.device)
        return places[after.present.sequence_ids[:, None], columns]
