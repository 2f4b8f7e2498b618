"""A Trainer whose collator draws targets anew in every epoch."""

from __future__ import annotations

from typing import Any

from transformers.trainer_callback import TrainerCallback, TrainerState

from ..data.dynamic_masking import COLUMNS, SETTINGS_OF_TARGETS, DataCollatorForDynamicMasking
from .collating import collating_with
from .resuming import ResumingMixin


class DynamicMaskingMixin(ResumingMixin):
    """
    Makes a [`~transformers.Trainer`] serve [`DataCollatorForDynamicMasking`]:

    - training hears of each epoch before its first batch is drawn, in worker processes too. A run that resumes goes on
      with the epoch that it was stopped in;
    - evaluation and prediction collate with targets that never change, also in the midst of an epoch;
    - the columns that the collator alone reads, `special_tokens_mask`, `word_ids` and `idx`, reach it;
    - a run that resumes with another batch size, seed, number of processes, gradient accumulation or data set says so
      before the first step: in mid-epoch with an error, unless `ignore_data_skip=True` has the epoch begin again; at
      the end of an epoch with a warning. Where settings of the collator draw other targets, it warns.

    Everything else stays as it is.

    Args:
        data_collator ([`DataCollatorForDynamicMasking`]): The collator of the training. Everything else as there.

    Raises:
        ValueError: `data_collator` is another one. When training begins: the run resumes in mid-epoch and
            makes other batches.

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
    """Tells the collator each epoch, at the one time when no worker has anything of the last or the next one to do."""

    def __init__(self, collator: DataCollatorForDynamicMasking):
        self.collator = collator
        self.next_epoch = 0

    def on_train_begin(self, args, state: TrainerState, control, **kwargs):
        self.next_epoch = int(state.epoch or 0)  # of a run that resumes, the passes that it has completed

    def on_epoch_begin(self, args, state, control, **kwargs):
        # Counted, since the fraction in `state.epoch` is no more than an estimate where a stream has no length.
        self.collator.set_epoch(self.next_epoch)
        self.next_epoch += 1
