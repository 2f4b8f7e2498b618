"""A Trainer that resumes compares its settings with those of the checkpoint before its first step."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from logging import getLogger
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import IterableDataset
from transformers.trainer_callback import TrainerCallback, TrainerState

from ..data.columns import MAIN_COLUMNS

if TYPE_CHECKING:
    from transformers import Trainer
else:
    Trainer = object  # slow to import; a class that uses the mixin has imported it already

logger = getLogger(__name__)

KEY = "hf_dynmask"  # the key of our record among the callbacks' states in `trainer_state.json`
SAMPLED = 64  # the number of examples in the fingerprint of a dataset
DATA = "data set"


class ResumingMixin(Trainer):
    """
    Makes a [`~transformers.Trainer`] compare its settings with those of the checkpoint when it resumes. The settings
    that determine batches and targets are saved with each checkpoint, in `trainer_state.json`.

    A run that resumes skips the batches that the epoch has already had. If its batches differ from those of the
    checkpoint, some examples would come twice and others never. This raises an error, unless `ignore_data_skip=True`
    restarts the epoch. At the end of an epoch it is only a warning, and so is a change of settings that determine
    targets. A checkpoint of an earlier release or of another Trainer has no record of its batches, which in mid-epoch
    is a warning too.

    Datasets are compared by their number of examples, by up to 64 of their examples (the `input_ids` or
    `input_features` of a list or `datasets.Dataset`), and, with a token budget, by all lengths. Streams are not
    compared.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.add_callback(_Record(self))

    def _batch_settings(self) -> dict[str, Any]:
        """The settings that determine the batches of an epoch."""
        dataset: Any = self.train_dataset
        settings = {
            "seed": self._data_seed,
            "batch size": self._train_batch_size,
            "number of processes": self._num_replicas,
            "gradient_accumulation_steps": self.args.gradient_accumulation_steps,
        }
        if not isinstance(dataset, IterableDataset):
            settings |= {"number of examples": len(dataset), DATA: _fingerprint(dataset)}
        return settings

    def _target_settings(self) -> dict[str, Any]:
        """The settings that determine the targets drawn for each example."""
        return {}

    @property
    def _num_replicas(self) -> int:
        """The number of processes with different batches. With model parallelism, several processes share a batch."""
        total = super().get_total_train_batch_size(self.args)
        return total // (self._train_batch_size * self.args.gradient_accumulation_steps)

    @property
    def _data_seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    def _load_callback_state(self) -> None:
        states: Any = self.state.stateful_callbacks
        record = states.pop(KEY, None)  # not the state of a callback
        super()._load_callback_state()
        if record is not None:
            states[KEY] = record


class _Record(TrainerCallback):
    """Compares the settings in the checkpoint with those of this run, and stores the latter for later checkpoints."""

    def __init__(self, trainer: ResumingMixin):
        self.trainer = trainer

    def on_train_begin(self, args, state: TrainerState, control, *, train_dataloader: Any = None, **kwargs):
        steps = _steps_per_epoch(train_dataloader, args.gradient_accumulation_steps)
        found = {"batches": self.trainer._batch_settings(), "targets": self.trainer._target_settings(), "steps": steps}
        found = json.loads(json.dumps(found))  # in the form in which a checkpoint returns it
        states: Any = state.stateful_callbacks
        if state.global_step:
            _compare(args, state, states.get(KEY, {}).get("attributes"), found)
        states[KEY] = {"args": {}, "attributes": found}


def _compare(args: Any, state: TrainerState, saved: Any, found: dict[str, Any]) -> None:
    step, steps = state.global_step, found["steps"]
    if saved is None:
        if steps is None or step % steps:
            _warn(
                state,
                f"the checkpoint of step {step} has no record of its batches. Unless they were made as in this run, "
                "some examples of the current epoch come twice and others never",
            )
        return
    if changed := _changes(saved["targets"], found["targets"]):
        _warn(
            state,
            f"the run that resumes from the checkpoint of step {step} draws other targets than before: {changed}",
        )
    if not (changed := _changes(saved["batches"], found["batches"])):
        return
    differs = f"the run that resumes from the checkpoint of step {step} makes other batches: {changed}. "
    if steps is not None and steps == saved["steps"] and step % steps == 0:
        _warn(state, f"{differs}The checkpoint ends an epoch, so no example comes twice in one; the next epochs differ")
    elif args.ignore_data_skip:
        _warn(state, f"{differs}The current epoch starts again, so examples that it has had come twice")
    else:
        raise ValueError(
            f"{differs}The batches to skip are not those that it was trained on: some examples of the epoch would come "
            "twice, others never. Resume with the settings of the checkpoint, or restart the epoch with "
            "`ignore_data_skip=True`"
        )


def _changes(saved: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """The settings that differ, with both values."""
    changes = []
    for name in dict.fromkeys([*found, *saved]):
        before, now = saved.get(name), found.get(name)
        if before != now and name == DATA:
            changes.append("another dataset, or another order")
        elif before != now:
            changes.append(f"{name} was {before!r} and is {now!r}")
    return ", ".join(changes)


def _warn(state: TrainerState, message: str) -> None:
    if state.is_world_process_zero:
        logger.warning(message)


def _steps_per_epoch(loader: Any, accumulation: int) -> int | None:
    """The number of optimizer steps in an epoch; `None` for a stream."""
    try:
        return math.ceil(len(loader) / accumulation)
    except TypeError:
        return None


def _fingerprint(dataset: Any) -> str:
    """A hash of a sample of the examples, in order. Only a list or a `datasets.Dataset` is read."""
    digest = hashlib.blake2b(digest_size=8)
    if hasattr(dataset, "with_format") and hasattr(dataset, "column_names"):
        names = [name for name in MAIN_COLUMNS if name in dataset.column_names]
        dataset = dataset.select_columns(names).with_format(None)  # without a transform, which may draw random numbers
    elif not isinstance(dataset, list | tuple):
        return digest.hexdigest()
    for place in dict.fromkeys(np.linspace(0, len(dataset) - 1, SAMPLED).astype(int).tolist() if len(dataset) else []):
        example = dataset[place]
        for name in MAIN_COLUMNS:
            if isinstance(example, Mapping) and name in example:
                digest.update(np.asarray(example[name], dtype=np.float64).tobytes() + b"\0")
    return digest.hexdigest()
