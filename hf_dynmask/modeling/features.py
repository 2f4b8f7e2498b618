"""Continuous inputs: frames of features instead of token ids, subsampled by convolutions within each sequence.

Shape legend: B rows of width T, S sequences, N real frames of F features, E embedding size; M real frames after a
convolution with a kernel of K frames; C and C' channels.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers.activations import ACT2FN

from .configuration_dynmask import DynMaskConfig
from .frames import Frames
from .layout import SequenceLayout


class DynMaskConvolution(nn.Conv1d):
    """A convolution over each sequence separately, which reads 0 beyond its ends and at missing frames.

    The weight is that of `nn.Conv1d(..., padding=kernel_size // 2)`.
    """

    def forward(self, states: Tensor, frames: Frames) -> tuple[Tensor, Frames]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """States `(1, N, C)` of the frames to states `(1, M, C')` and the layouts of the subsampled frames."""
        (kernel,), (stride,) = self.kernel_size, self.stride
        after = frames.subsampled(stride)
        windows = frames.windows(kernel, after, stride)
        padded = nn.functional.pad(states[0], (0, 0, 0, 1))  # frame N, which is read where there is no frame, is 0
        read = nn.functional.embedding(windows, padded).flatten(1)
        return nn.functional.linear(read, self.weight.transpose(1, 2).flatten(1), self.bias)[None], after


class DynMaskFeatureEmbeddings(nn.Module):
    """Frames `(B, T, F)` to embeddings: a linear projection, or convolutions with an activation after each."""

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
        """Features in the batch's layout to flat embeddings `(1, M, E)` and their layout."""
        states = frames.present.flatten(input_features)
        if self.projection is not None:
            return self.projection(states), frames.present
        for convolution in self.convolutions:
            states, frames = convolution(states, frames)
            states = self.act(states)
        return states, frames.present
