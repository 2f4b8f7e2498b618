"""Images as sequences of patches: of their own size each, without resizing."""

import torch
from torch import Tensor
from torch.nn.functional import pad


def patches(image: Tensor, size: int) -> Tensor:
    """
    Cuts an image into square patches, from the top left in reading order.

    Args:
        image (`Tensor` of shape `(channels, height, width)`): Pixels, of any dtype. Where a side is no multiple of
            `size`, the patches at its end are filled up with 0.
        size (`int`): Pixels of a patch's side.

    Returns:
        `Tensor` of shape `(patches, channels * size * size)`: the `input_features` of one example for
        [`DataCollatorForFeatures`]. A patch holds its pixels channel by channel, as a weight of `nn.Conv2d` does.

    Raises:
        ValueError: `image` has another number of dimensions, or `size` is below 1.

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
    Places of an image's patches on a grid that all images share, so that equal positions are equal places.

    Args:
        image (`Tensor` of shape `(channels, height, width)`): As in [`patches`].
        size (`int`): As there.
        columns (`int`): Columns of the grid: the most patches that a row of any image has.

    Returns:
        int64 `Tensor` of shape `(patches,)`: `row * columns + column`, the `position_ids` of one example. A model with
        `max_position_embeddings` of the grid's cells, and no subsampling, then learns a position for each cell.

    Raises:
        ValueError: The image is wider than the grid.
    """
    rows, own_columns = _grid(image, size)
    if own_columns > columns:
        raise ValueError(f"an image must be at most {columns} patches of {size} pixels wide; got {own_columns} patches")
    return (torch.arange(rows)[:, None] * columns + torch.arange(own_columns)).flatten()


def _grid(image: Tensor, size: int) -> tuple[int, int]:
    """Rows and columns of patches."""
    if image.dim() != 3:
        raise ValueError(f"`image` must have shape (channels, height, width); got {tuple(image.shape)}")
    if size < 1:
        raise ValueError(f"`size` must be at least 1; got {size}")
    return -(-image.shape[1] // size), -(-image.shape[2] // size)
