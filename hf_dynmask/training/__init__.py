"""What joins a Trainer: changing masks, targets drawn anew in every epoch, batches of a budget of tokens, a log of how
fast it is, steps that run as one CUDA graph."""

from .captured_step import CapturedStep, CapturedStepMixin
from .dynamic_masking import DynamicMaskingMixin
from .mask_schedule import MaskSchedule
from .throughput import ThroughputCallback
from .token_budget import TokenBudgetMixin

__all__ = [
    "CapturedStep",
    "CapturedStepMixin",
    "DynamicMaskingMixin",
    "MaskSchedule",
    "ThroughputCallback",
    "TokenBudgetMixin",
]
