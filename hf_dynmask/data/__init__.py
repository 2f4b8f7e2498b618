"""From examples to batches: collators, which make them carry lengths, and budgets of tokens, which fill them."""

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
