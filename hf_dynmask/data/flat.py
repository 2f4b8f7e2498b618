"""Flat batches: their class, and checks of their fixed sizes."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .columns import MAIN_COLUMNS


class FlatBatch(dict[str, Any]):
    """A batch whose sequences are end to end in one row. It cannot be split.

    If one process collates for all (`dispatch_batches`), Accelerate slices and concatenates batches and constructs the
    results with the same class. The checks in the constructor then raise an error.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        lengths = self.get("lengths")
        if isinstance(lengths, Tensor) and _is_cut(lengths):
            self._raise(f"`lengths` of a flat batch must be whole; got {lengths.numel()} of them")
        for name in MAIN_COLUMNS:
            rows = self[name].shape[0] if isinstance(self.get(name), Tensor) else 1
            if rows != 1:
                self._raise(f"`{name}` of a flat batch must have 1 row, which cannot be split or joined; got {rows}")

    @staticmethod
    def _raise(message: str) -> None:
        raise ValueError(
            f"{message}. Collate with `flat=False`, or let each process collate its own batches: "
            "`dispatch_batches=False` in `accelerator_config`"
        )


def _is_cut(lengths: Tensor) -> bool:
    """Whether these lengths are a slice of a batch's lengths, in a run with several processes."""
    is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    is_slice = lengths.untyped_storage().nbytes() > lengths.nbytes
    return is_slice and is_distributed and torch.distributed.get_world_size() > 1


def is_flat(collator: Any) -> bool:
    """Whether a collator is one of ours and makes flat batches, to which it can give a fixed size."""
    return hasattr(collator, "max_sequences") and collator.flat


def with_settings(collator: Any, **settings: Any) -> Any:
    """A copy of a collator with some settings changed. A copy of a masking collator shares its epoch."""
    collator = copy.copy(collator)
    for name, value in settings.items():
        setattr(collator, name, value)
    return collator


def in_rows(collator: Any) -> Any:
    """A flat collator's counterpart with one row per example; any other collator is returned as it is."""
    if not is_flat(collator):
        return collator
    names = ("max_tokens", "max_target_tokens", "max_sequences", "max_length")
    sizes = {name: None for name in names if hasattr(collator, name)}
    return with_settings(collator, flat=False, **sizes)


def check_fixed_sizes(flat: bool, sizes: Mapping[str, int | None]) -> None:
    """
    Check the sizes that give all flat batches one shape.

    Args:
        flat (`bool`): Whether the collator makes flat batches.
        sizes (`Mapping[str, int | None]`): The collator's sizes by name.

    Raises:
        ValueError: Sizes are given without `flat`, only some of them are given, or one is not an integer of at least 1.
    """
    given = {name: size for name, size in sizes.items() if size is not None}
    *first, last = (f"`{name}`" for name in sizes)
    names = f"{', '.join(first)} and {last}"
    values = ", ".join(f"{name}={size!r}" for name, size in sizes.items())
    if given and not flat:
        raise ValueError(f"{names} must come with `flat=True`, since they are the sizes of a flat row; got {values}")
    if given and len(given) < len(sizes):
        raise ValueError(f"{names} must be given together; got {values}")
    for name, size in given.items():
        check_count(name, size, least=1)


def check_count(name: str, count: Any, least: int) -> None:
    """Raise a `ValueError` if a setting is not an integer of at least `least`."""
    if not isinstance(count, int) or isinstance(count, bool) or count < least:
        raise ValueError(f"`{name}` must be an integer of at least {least}; got {count!r}")


def filled(values: Tensor, size: int | None, filler: int) -> Tensor:
    """Pads `values` along dimension 0 to `size` with `filler`, unless `size` is `None`."""
    if size is None or len(values) == size:
        return values
    return torch.cat([values, values.new_full((size - len(values), *values.shape[1:]), filler)])
