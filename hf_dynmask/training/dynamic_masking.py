"""A Trainer whose collator draws targets again in every epoch."""

from __future__ import annotations

from typing import Any

from transformers.trainer_callback import TrainerCallback, TrainerState

from ..data.dynamic_masking import COLUMNS, SETTINGS_OF_TARGETS, DataCollatorForDynamicMasking
from .collating import collating_with
from .resuming import ResumingMixin


class DynamicMaskingMixin(ResumingMixin):
    """
    Makes a [`~transformers.Trainer`] work with [`DataCollatorForDynamicMasking`]:

    - The collator, also in worker processes, gets each epoch before the first batch is drawn. A run that resumes
      continues with the epoch in which it was stopped.
    - Evaluation and prediction use targets that never change, also in the middle of an epoch.
    - The columns that only the collator reads, `special_tokens_mask`, `word_ids` and `idx`, are not removed.
    - A run that resumes with another batch size, seed, number of processes, gradient accumulation or dataset raises an
      error in mid-epoch, unless `ignore_data_skip=True` restarts the epoch. At the end of an epoch it warns. It also
      warns if the collator's settings for targets have changed.

    Everything else is unchanged.

    Args:
        data_collator ([`DataCollatorForDynamicMasking`]): The collator for training.
        args, kwargs: The other arguments of the Trainer.

    Raises:
        ValueError: `data_collator` is of another class. When training begins: the run resumes in mid-epoch but its
            batches would differ from those of the checkpoint.

    Example:

    ```python
    >>> class MaskedLMTrainer(DynamicMaskingMixin, Trainer):
    ...     pass

    >>> collator = DataCollatorForDynamicMasking(tokenizer)
    >>> trainer = MaskedLMTrainer(model, args, data_collator=collator, train_dataset=train, eval_dataset=held_out)
    ```
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if not isinstance(self.data_collator, DataCollatorForDynamicMasking):
            raise ValueError(
                "`data_collator` of a Trainer with `DynamicMaskingMixin` must be a `DataCollatorForDynamicMasking`; "
                f"got {type(self.data_collator).__name__}"
            )
        self.add_callback(_Epochs(self.data_collator))

    def get_eval_dataloader(self, *args, **kwargs):
        with collating_with(self, self._collator_for_evaluation()):
            return super().get_eval_dataloader(*args, **kwargs)

    def get_test_dataloader(self, *args, **kwargs):
        with collating_with(self, self._collator_for_evaluation()):
            return super().get_test_dataloader(*args, **kwargs)

    def _target_settings(self) -> dict[str, Any]:
        collator: Any = self.data_collator
        return super()._target_settings() | {name: getattr(collator, name) for name in SETTINGS_OF_TARGETS}

    def _collator_for_evaluation(self) -> DataCollatorForDynamicMasking:
        collator: Any = self.data_collator
        return collator.for_evaluation()

    def _set_signature_columns_if_needed(self):
        is_needed = self._signature_columns is None
        super()._set_signature_columns_if_needed()
        if is_needed:
            self._signature_columns = [*(self._signature_columns or ()), *COLUMNS]


class _Epochs(TrainerCallback):
    """Sets the collator's epoch when an epoch begins: then no worker is collating batches of another epoch."""

    def __init__(self, collator: DataCollatorForDynamicMasking):
        self.collator = collator
        self.next_epoch = 0

    def on_train_begin(self, args, state: TrainerState, control, **kwargs):
        self.next_epoch = int(state.epoch or 0)  # of a run that resumes, the number of completed epochs

    def on_epoch_begin(self, args, state, control, **kwargs):
        # Counted here, since `state.epoch` is only an estimate for a stream: its length is unknown.
        self.collator.set_epoch(self.next_epoch)
        self.next_epoch += 1
