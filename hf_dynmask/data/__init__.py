"""Collators: from features to batches that carry lengths."""

from .collators import DataCollatorForFeatures, DataCollatorWithLengths
from .images import patch_positions, patches

__all__ = ["DataCollatorForFeatures", "DataCollatorWithLengths", "patch_positions", "patches"]
