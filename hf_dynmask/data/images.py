"""Images of any size as sequences of patches, without resizing."""

import torch
from torch import Tensor
from torch.nn.functional import pad


def patches(image: Tensor, size: int) -> Tensor:
    """
    Cuts an image into square patches: row by row from the top, left to right.

    Args:
        image (`Tensor` of shape `(channels, height, width)`):
            Pixels of any dtype. If a side is not a multiple of `size`, the image is padded with 0 at the end of it.
        size (`int`): Side length of a patch in pixels.

    Returns:
        `Tensor` of shape `(patches, channels * size * size)`: the `input_features` of one example for
        [`DataCollatorForFeatures`]. Pixels of a patch are ordered by channel, row and column, like a weight of
        `nn.Conv2d`.

    Raises:
        ValueError: `image` does not have three dimensions, or `size` is below 1.

    Example:

    ```python
    >>> patches(torch.zeros(3, 40, 64), size=16).shape
    torch.Size([12, 768])
    ```
    """
    rows, columns = _grid(image, size)
    channels, height, width = image.shape
    image = pad(image, (0, columns * size - width, 0, rows * size - height))
    cut = image.reshape(channels, rows, size, columns, size).permute(1, 3, 0, 2, 4)
    return cut.reshape(rows * columns, channels * size * size)


def patch_positions(image: Tensor, size: int, columns: int) -> Tensor:
    """
    Positions of an image's patches on a grid that all images share, so that equal positions mean the same place.

    Args:
        image (`Tensor` of shape `(channels, height, width)`): As in [`patches`].
        size (`int`): Side length of a patch in pixels.
        columns (`int`): Columns of the grid: the width in patches of the widest image.

    Returns:
        int64 `Tensor` of shape `(patches,)`: `row * columns + column`, the `position_ids` of one example. A model
        without subsampling, whose `max_position_embeddings` is the number of cells of the grid, learns one position
        embedding per cell.

    Raises:
        ValueError: The image is wider than the grid; `image` or `size` is wrong as in [`patches`].
    """
    rows, own_columns = _grid(image, size)
    if own_columns > columns:
        raise ValueError(f"an image must be at most {columns} patches of {size} pixels wide; got {own_columns} patches")
    return (torch.arange(rows)[:, None] * columns + torch.arange(own_columns)).flatten()


def _grid(image: Tensor, size: int) -> tuple[int, int]:
    """The numbers of rows and columns of patches."""
    if image.dim() != 3:
        raise ValueError(f"`image` must have shape (channels, height, width); got {tuple(image.shape)}")
    if size < 1:
        raise ValueError(f"`size` must be at least 1; got {size}")
    return -(-image.shape[1] // size), -(-image.shape[2] // size)
