"""What joins a Trainer: masks that change in the course of training, targets that change with every epoch."""

from .dynamic_masking import DynamicMaskingMixin
from .mask_schedule import MaskSchedule

__all__ = ["DynamicMaskingMixin", "MaskSchedule"]
