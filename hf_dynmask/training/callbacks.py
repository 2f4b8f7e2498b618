"""Helpers of the callbacks: unwrapping the model, and writing to the Trainer's log."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from accelerate.utils import extract_model_from_parallel
from torch import nn
from transformers.trainer_callback import TrainerControl, TrainerState

if TYPE_CHECKING:
    from transformers import Trainer


def unwrapped(model: nn.Module) -> Any:
    """The model inside wrappers of DataParallel, DistributedDataParallel, FSDP, DeepSpeed and torch.compile."""
    return extract_model_from_parallel(model, keep_torch_compile=False)


def log(state: TrainerState, control: TrainerControl, logs: dict[str, Any]) -> None:
    """Write to the Trainer's log: `state.log_history`, the progress bar and every tracker in `report_to`."""
    trainer = _calling_trainer()
    if trainer is None:
        state.log_history.append({**logs, "step": state.global_step})
        return
    should_log = control.should_log
    trainer.log(logs)
    control.should_log = should_log  # `trainer.log` clears it, but the loss of this step may still have to be logged


def _calling_trainer() -> Trainer | None:
    """The Trainer that calls the callback. It does not pass itself, but only its `log` reaches the trackers."""
    from transformers import Trainer  # slow to import, but already imported here

    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer):
            return caller
        frame = frame.f_back
    return None
