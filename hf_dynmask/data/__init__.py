"""Collators: from features to batches that carry lengths."""

from .collators import DataCollatorForFeatures, DataCollatorForSeq2SeqWithLengths, DataCollatorWithLengths
from .dynamic_masking import DataCollatorForDynamicMasking
from .images import patch_positions, patches

__all__ = [
    "DataCollatorForDynamicMasking",
    "DataCollatorForFeatures",
    "DataCollatorForSeq2SeqWithLengths",
    "DataCollatorWithLengths",
    "patch_positions",
    "patches",
]
