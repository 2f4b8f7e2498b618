"""Extensions of a Trainer: masks that change during training, targets drawn again in every epoch, batches with a token
budget, training steps captured as a CUDA graph, and logging of the throughput."""

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
