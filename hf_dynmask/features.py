"""Continuous inputs: frames of numbers in place of token ids, subsampled by convolutions that stay in their sequence.

Shape legend: B rows of width T, S sequences, N real frames of F features, E embedding size; M real frames behind a
convolution, whose windows hold K frames.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from .configuration_dynmask import DynMaskConfig
from .layout import SequenceLayout, outside_graph


class Frames(NamedTuple):
    """Where the frames of a batch sit: all that its sequences have, and of these the ones that are not missing.

    Both in the batch's own order of sequences.
    """

    whole: SequenceLayout
    present: SequenceLayout

    @outside_graph
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

    @outside_graph
    def windows(self, kernel: int, after: Frames, stride: int) -> Tensor:
        """`(M, K)` int64: which of the N frames each of those of `after` reads, N where there is none."""
        frames = torch.arange(self.present.num_tokens, device=self.present.positions.device)
        places = self.present.by_position(frames[None], fill=len(frames))
        places = nn.functional.pad(places, (kernel // 2, kernel // 2), value=len(frames))
        columns = after.present.positions[:, None] * stride + torch.arange(kernel, device=frames.device)
        return places[after.present.sequence_ids[:, None], columns]


class DynMaskConvolution(nn.Conv1d):
    """A convolution along each sequence alone. Beyond its ends, and where a frame is missing, stands 0.

    The weight is that of `nn.Conv1d(..., padding=kernel_size // 2)`.
    """

    def forward(self, states: Tensor, frames: Frames) -> tuple[Tensor, Frames]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """States `(1, N, C)` of the frames to states `(1, M, C')` and the frames that are left."""
        (kernel,), (stride,) = self.kernel_size, self.stride
        after = frames.subsampled(stride)
        windows = frames.windows(kernel, after, stride)
        padded = nn.functional.pad(states[0], (0, 0, 0, 1))  # the frame that is read where there is none
        read = nn.functional.embedding(windows, padded).flatten(1)
        return nn.functional.linear(read, self.weight.transpose(1, 2).flatten(1), self.bias)[None], after


class DynMaskFeatureEmbeddings(nn.Module):
    """Frames `(B, T, F)` to embeddings: a projection of each, or convolutions, each with an activation behind it."""

    def __init__(self, config: DynMaskConfig):
        super().__init__()
        features, size = config.num_features or 0, config.embedding_size or 0
        sizes = zip(config.conv_kernel, config.conv_stride, strict=True)
        self.convolutions = nn.ModuleList(
            DynMaskConvolution(size if layer else features, size, kernel, stride)
            for layer, (kernel, stride) in enumerate(sizes)
        )
        self.projection = None if self.convolutions else nn.Linear(features, size)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, input_features: Tensor, frames: Frames) -> tuple[Tensor, SequenceLayout]:
        """Features in the batch's layout to flat embeddings `(1, M, E)` and the layout that they are in."""
        states = frames.present.flatten(input_features)
        if self.projection is not None:
            return self.projection(states), frames.present
        for convolution in self.convolutions:
            states, frames = convolution(states, frames)
            states = self.act(states)
        return states, frames.present
