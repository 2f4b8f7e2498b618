"""Collators: from features to batches that carry lengths."""

from .collators import DataCollatorWithLengths

__all__ = ["DataCollatorWithLengths"]
