"""Extensions of a Trainer: masks that change during training, targets drawn again in every epoch, batches with a budget
of tokens, and a log of the throughput."""

from .dynamic_masking import DynamicMaskingMixin
from .mask_schedule import MaskSchedule
from .throughput import ThroughputCallback
from .token_budget import TokenBudgetMixin

__all__ = ["DynamicMaskingMixin", "MaskSchedule", "ThroughputCallback", "TokenBudgetMixin"]
