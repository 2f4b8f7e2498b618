"""From examples to batches: collators that add lengths, and samplers that fill batches up to a token budget."""

from .collators import DataCollatorForFeatures, DataCollatorForSeq2SeqWithLengths, DataCollatorWithLengths
from .dynamic_masking import DataCollatorForDynamicMasking
from .images import patch_positions, patches
from .token_budget import TokenBudgetBatchSampler, TokenBudgetIterableDataset

__all__ = [
    "DataCollatorForDynamicMasking",
    "DataCollatorForFeatures",
    "DataCollatorForSeq2SeqWithLengths",
    "DataCollatorWithLengths",
    "TokenBudgetBatchSampler",
    "TokenBudgetIterableDataset",
    "patch_positions",
    "patches",
]
