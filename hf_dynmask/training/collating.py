"""Another collator for one of a Trainer's data loaders: it has one for all of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def collating_with(trainer: Any, collator: Any) -> Iterator[None]:
    """Data loaders that the [`~transformers.Trainer`] makes meanwhile collate with `collator`."""
    own = trainer.data_collator
    trainer.data_collator = collator
    try:
        yield
    finally:
        trainer.data_collator = own
