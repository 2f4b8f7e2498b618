"""Gives one of a Trainer's data loaders a collator of its own. By default, all of them share `data_collator`."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def collating_with(trainer: Any, collator: Any) -> Iterator[None]:
    """In this context, the [`~transformers.Trainer`] makes data loaders that collate with `collator`."""
    own = trainer.data_collator
    trainer.data_collator = collator
    try:
        yield
    finally:
        trainer.data_collator = own
