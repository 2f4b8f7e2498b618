"""Masks that change during training."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from fractions import Fraction
from itertools import pairwise
from logging import getLogger
from typing import Any

from torch import nn
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState

from ..modeling.masks import parse
from ..stock.attention import set_mask
from .callbacks import log, unwrapped

logger = getLogger(__name__)


class MaskSchedule(TrainerCallback):
    """
    A [`~transformers.TrainerCallback`] that changes the model's mask during training.

    The mask depends only on the number of completed optimizer steps, `state.global_step`, so a run that resumes from a
    checkpoint has the same masks as an uninterrupted run. The mask changes right after the step in its key: the
    evaluation and the checkpoint of that step already have the new mask. Every change is logged, and so is the mask
    that a run starts or resumes with: `mask` (its text) and, for trackers that take only numbers, `mask_stage` (its
    index in the schedule). After training, the model keeps the last mask or, with `load_best_model_at_end`, the mask
    with which the best checkpoint was evaluated and saved. A run that resumes warns if the checkpoint was trained with
    a mask that differs from the schedule at that step.

    Args:
        masks (`dict[int | float, str]`):
            Mask expressions (see [`hf_dynmask.masks`]) by the point in training at which they begin, in increasing
            order:

            - an `int` counts optimizer steps: `1` is after the first step;
            - a `float` from 0 to 1 is a fraction of all steps, rounded up to a whole step: `1.0` is after the last
              step, for the final evaluation and the final model.

            The two kinds may be mixed. The first key must be 0. Keys beyond the end of training have no effect.

    Raises:
        ValueError: `masks` is empty or not a mapping; a key is neither a step nor a fraction; keys of one kind are not
            increasing; the first key is not 0; a mask does not parse. When training begins: steps and fractions
            together are not increasing; the model does not accept one of the masks.

    Example:

    ```python
    >>> schedule = MaskSchedule({0: "window(64)", 0.5: "window(256)", 0.9: "full"})
    >>> trainer = Trainer(model, args, train_dataset=dataset, callbacks=[schedule])
    ```
    """

    def __init__(self, masks: Mapping[int | float, str]):
        _check(masks)
        self.masks = dict(masks)
        self._starts: list[int] = []
        self._stage: int | None = None
        self._logged: int | None = None

    def on_train_begin(self, args, state: TrainerState, control, *, model: nn.Module, **kwargs):
        self._starts = _starts(self.masks, state.max_steps)
        self._stage = self._logged = None
        for mask in self.masks.values():  # raises now if the model does not accept one of them
            set_mask(unwrapped(model), mask)
        self._follow(state.global_step, model)
        before = next((entry["mask"] for entry in reversed(state.log_history) if "mask" in entry), None)
        if state.global_step and state.is_world_process_zero and not _is_same(before, self._mask):
            logger.warning(
                f"the checkpoint of step {state.global_step} was trained with the mask {before!r}; the run that "
                f"resumes from it has {self._mask!r} there and continues with its own schedule"
            )

    def on_step_begin(self, args, state: TrainerState, control: TrainerControl, *, model: nn.Module, **kwargs):
        self._follow(state.global_step, model)
        self._log_change(state, control)

    on_step_end = on_step_begin

    def on_train_end(self, args, state: TrainerState, control: TrainerControl, *, model: nn.Module, **kwargs):
        if args.load_best_model_at_end and state.best_global_step is not None:  # the Trainer has loaded its weights
            self._follow(state.best_global_step, model)
            self._log_change(state, control)

    def _log_change(self, state: TrainerState, control: TrainerControl) -> None:
        if self._stage != self._logged:
            self._logged = self._stage
            log(state, control, {"mask": self._mask, "mask_stage": self._stage})

    def _follow(self, step: int, model: nn.Module) -> None:
        stage = bisect_right(self._starts, step) - 1
        if stage != self._stage:
            self._stage = stage
            set_mask(unwrapped(model), self._mask)

    @property
    def _mask(self) -> str:
        return list(self.masks.values())[self._stage or 0]


def _check(masks: Mapping[int | float, str]) -> None:
    if not isinstance(masks, Mapping) or not masks:
        raise ValueError(f"`masks` must map steps or fractions of the training to masks; got {masks!r}")
    for key, text in masks.items():
        _check_key(key)
        try:
            parse(text)
        except ValueError as error:
            raise ValueError(f"`masks[{key!r}]`: {error}") from error
    first = next(iter(masks))
    if first != 0:
        raise ValueError(f"the first key of `masks` must be 0, the start of training; got {first!r}")
    for kind in (int, float):
        for before, after in pairwise(key for key in masks if isinstance(key, kind)):
            if after < before:
                raise ValueError(f"keys of `masks` must be increasing; got {after!r} after {before!r}")


def _check_key(key: object) -> None:
    is_step = isinstance(key, int) and not isinstance(key, bool) and key >= 0
    is_fraction = isinstance(key, float) and 0 <= key <= 1
    if not (is_step or is_fraction):
        raise ValueError(
            "a key of `masks` must be a number of steps (an int of at least 0) or a fraction of the training "
            f"(a float from 0 to 1); got {key!r}"
        )


def _is_same(before: Any, mask: str) -> bool:
    """Whether the mask that was logged, if any, equals this one."""
    try:
        return before is None or parse(before) == parse(mask)
    except ValueError:  # such as a custom mask that is not registered in this process
        return False


def _starts(masks: Mapping[int | float, str], max_steps: int) -> list[int]:
    """The step after which each mask begins, in a training of `max_steps`."""
    # Exact fractions: in floating point, 0.07 * 100 is a little more than 7, which would be rounded up to 8.
    starts = {key: key if isinstance(key, int) else math.ceil(Fraction(str(key)) * max_steps) for key in masks}
    for before, after in pairwise(starts):
        if starts[after] < starts[before]:
            raise ValueError(
                f"keys of `masks` must be increasing; got {after!r}, which is step {starts[after]} of {max_steps}, "
                f"after {before!r}, which is step {starts[before]}"
            )
    return list(starts.values())
