"""What joins a Trainer: changing masks, targets drawn anew in every epoch, batches of a budget of tokens."""

from .dynamic_masking import DynamicMaskingMixin
from .mask_schedule import MaskSchedule
from .token_budget import TokenBudgetMixin

__all__ = ["DynamicMaskingMixin", "MaskSchedule", "TokenBudgetMixin"]
