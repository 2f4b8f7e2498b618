"""What joins a Trainer: changing masks, targets drawn anew in every epoch, batches of a budget of tokens, a log of how
fast it is."""

from .dynamic_masking import DynamicMaskingMixin
from .mask_schedule import MaskSchedule
from .throughput import ThroughputCallback
from .token_budget import TokenBudgetMixin

__all__ = ["DynamicMaskingMixin", "MaskSchedule", "ThroughputCallback", "TokenBudgetMixin"]
