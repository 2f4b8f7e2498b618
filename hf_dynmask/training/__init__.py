"""What joins a Trainer: masks that change in the course of training."""

from .mask_schedule import MaskSchedule

__all__ = ["MaskSchedule"]
