"""A Trainer whose batches have a token budget."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from accelerate import Accelerator
from torch.utils.data import DataLoader, IterableDataset

from ..data.collators import counted_answers
from ..data.flat import in_rows, is_flat, with_settings
from ..data.token_budget import (
    CollatorWithinBudget,
    TokenBudgetBatchSampler,
    TokenBudgetIterableDataset,
    example_lengths,
    list_sizes,
    pair_lengths,
)
from ..modeling.modeling_dynmask import DynMaskForQuestionAnswering
from .collating import collating_with
from .resuming import DATA, ResumingMixin

if TYPE_CHECKING:
    from transformers import TrainingArguments

Batches = TokenBudgetBatchSampler | TokenBudgetIterableDataset

# Settings that our data loader copies from the Trainer's.
SETTINGS = ["num_workers", "pin_memory", "worker_init_fn", "multiprocessing_context", "prefetch_factor"]
SETTINGS += ["persistent_workers", "in_order"]


class TokenBudgetMixin(ResumingMixin):
    """
    Makes any [`~transformers.Trainer`] class train on batches with a token budget; see [`TokenBudgetBatchSampler`].

    The training loop, the loss, checkpoints and resuming are the Trainer's own. With `ignore_data_skip=False`, it also
    resumes in mid-epoch. Batches are shuffled with `data_seed`, or else `seed`. Evaluation and prediction are the
    Trainer's own too, always with one row per example: if the collator is flat, they use it with `flat=False`.

    If a run resumes with another budget, seed, number of processes, gradient accumulation or dataset, it would not skip
    the examples that it was trained on. In mid-epoch this raises an error, unless `ignore_data_skip=True` restarts the
    epoch. At the end of an epoch it is a warning.

    Lengths are read from the column `length_column_name` of the training arguments (`"length"`) or else from `lengths`.
    Without these columns, they are counted in `input_ids` or `input_features` when training begins. For an
    encoder-decoder, provide a column that counts source and target together. The column is removed before the collator,
    except a column `lengths`, which the collator checks.

    **Flat batches have one shape.** If the collator is one of ours with `flat=True`, this mixin sets its `max_tokens`
    to the budget and its `max_sequences` to the maximum number of examples in a batch, so that all training batches
    have the same shape. For pairs, `max_tokens` and `max_target_tokens` are the maximum number of tokens on each side
    in any batch of this training (for a stream: the budget). `column_sizes` are taken from the dataset; for a stream,
    set them on the collator. Sizes that the collator already has are kept.

    Batches with answers (`start_positions`, `end_positions`) are weighted by their number of answers, as batches with
    `labels` are weighted by their number of labels.

    - **`max_tokens`** is the budget of a batch: of one forward pass on one process.
    - **`per_device_train_batch_size`** is the average number of examples in a batch if `max_tokens=None`. The budget is
      then this number times the mean length, or the longest example if that is more, so that an epoch has as many steps
      as with the Trainer's own batches. With `max_tokens` it is not used, and neither is `auto_find_batch_size`.
    - **`gradient_accumulation_steps`** is the number of such batches per optimizer step, as usual. With G of them on P
      processes, an optimizer step sees up to G * P * `max_tokens` tokens.
    - `dataloader_drop_last` has no effect, since there are no incomplete batches.

    A stream (a [`~torch.utils.data.IterableDataset`]) needs `max_tokens` and, as usual, `max_steps`. Every process
    reads the whole stream. See [`TokenBudgetIterableDataset`].

    Args:
        max_tokens (`int`, *optional*): The budget.
        truncate (`bool`, *optional*, defaults to `False`):
            Truncate examples longer than the budget to their first `max_tokens` tokens, in all columns per token. This
            also cuts off an end-of-sequence token. `False`: raise an error.
        buffer_size (`int`, *optional*, defaults to 1000): Size of the buffer of a stream, in examples.
        args, kwargs: The other arguments of the Trainer.

    Raises:
        ValueError: When training begins: `max_tokens` is smaller than the longest example, or missing for a stream; an
            example has no length; the examples cannot be divided into the same number of batches on each process; there
            are several devices in this process; `train_sampling_strategy` is not `"random"`; `split_batches` or
            `dispatch_batches` is set; the collator's own `max_tokens` is smaller than the budget; the run resumes in
            mid-epoch but its batches would differ from those of the checkpoint. During training: a batch has more
            tokens than the budget, since its column of lengths is wrong.

    Example:

    ```python
    >>> class TokenBudgetTrainer(TokenBudgetMixin, Trainer):
    ...     pass
    >>> trainer = TokenBudgetTrainer(model, args, train_dataset=dataset, data_collator=collator, max_tokens=4096)
    ```
    """

    def __init__(
        self, *args: Any, max_tokens: int | None = None, truncate: bool = False, buffer_size: int = 1000, **kwargs: Any
    ):
        self.max_tokens = max_tokens
        self.truncate = truncate
        self.buffer_size = buffer_size
        self._batch_sampler: TokenBudgetBatchSampler | None = None
        self._lengths_hash = ""
        super().__init__(*args, **kwargs)

    def get_train_dataloader(self) -> DataLoader:
        """The Trainer's own data loader, with batches within the token budget."""
        _check(self.args)
        if isinstance(self.train_dataset, IterableDataset):
            self._batch_sampler = None
            stream = self._make_stream(self.train_dataset)
            stock = self._stock_loader(stream)
            # Accelerate deals out items of a stream by `batch_size`. An item is one of our batches: one per process.
            return self._prepare(stock, stream, collate_fn=partial(_collate_only, stock.collate_fn), batch_size=1)
        self._batch_sampler = self._make_batch_sampler(self.train_dataset)
        stock = self._stock_loader(self._batch_sampler)
        loader = self._prepare(stock, stock.dataset, collate_fn=stock.collate_fn, batch_sampler=self._batch_sampler)
        loader.set_sampler(self._batch_sampler)  # so that `set_epoch` reaches the sampler even if batches are skipped
        return loader

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        """The Trainer's own data loader, with one row per example."""
        with collating_with(self, in_rows(self.data_collator)):
            return super().get_eval_dataloader(*args, **kwargs)

    def get_test_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        """The Trainer's own data loader, with one row per example."""
        with collating_with(self, in_rows(self.data_collator)):
            return super().get_test_dataloader(*args, **kwargs)

    def _stock_loader(self, batches: Batches) -> DataLoader:
        """The Trainer's own data loader. It removes columns that the model does not read before the collator."""
        collator = self._collator_of_one_shape(batches)
        collator = CollatorWithinBudget(collator, batches.max_tokens, self.truncate, self.args.length_column_name)
        with collating_with(self, collator):
            return super().get_train_dataloader()

    def _collator_of_one_shape(self, batches: Batches) -> Any:
        """The Trainer's collator. If it is flat, with fixed sizes that all batches fit into."""
        collator: Any = self.data_collator
        if not is_flat(collator):
            return collator
        has_pairs = hasattr(collator, "max_target_tokens")
        if collator.max_sequences is not None:
            if not has_pairs and collator.max_tokens < batches.max_tokens:
                raise ValueError(
                    f"`max_tokens` of the collator must be at least the budget of a batch, {batches.max_tokens}; got "
                    f"{collator.max_tokens}. Remove the collator's sizes, or change `max_tokens` of the Trainer"
                )
            return collator
        sizes: dict[str, Any] = {"max_tokens": batches.max_tokens, "max_sequences": batches.max_sequences}
        if has_pairs:
            sizes |= self._side_sizes(batches)
        if isinstance(batches, TokenBudgetBatchSampler):
            found = list_sizes(self.train_dataset, collator.uneven)
            sizes["column_sizes"] = found | dict(collator.column_sizes or {})
            if hasattr(collator, "max_length"):
                sizes["max_length"] = collator.max_length or int(max(1, *batches.lengths))
        return with_settings(collator, **sizes)

    def _side_sizes(self, batches: Batches) -> dict[str, int]:
        """The maximum number of tokens on each side of a batch of pairs in this training; for a stream, the budget."""
        if not isinstance(batches, TokenBudgetBatchSampler):
            return {"max_target_tokens": batches.max_tokens}
        pairs = pair_lengths(self.train_dataset)
        if self.truncate:
            pairs[:, 0] = pairs[:, 0].clip(max=batches.max_tokens)
        most = np.ones(2, dtype=np.int64)
        for epoch in range(self._num_epochs(batches)):
            batches.set_epoch(epoch)
            for batch in batches:
                most = np.maximum(most, pairs[batch].sum(0))
        batches.set_epoch(0)
        return dict(zip(("max_tokens", "max_target_tokens"), most.tolist(), strict=True))

    def _num_epochs(self, batches: TokenBudgetBatchSampler) -> int:
        if self.args.max_steps > 0:
            return math.ceil(self.args.max_steps / math.ceil(batches.num_steps / self.args.gradient_accumulation_steps))
        return math.ceil(self.args.num_train_epochs)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: Any) -> Any:
        """Counts answers too, since batches with a token budget differ in their number of answers."""
        assert self.model is not None  # its annotation is optional
        if any(isinstance(module, DynMaskForQuestionAnswering) for module in self.model.modules()):
            batch_samples = [{**batch, **counted_answers(batch)} for batch in batch_samples]
        return super()._get_num_items_in_batch(batch_samples, device)

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        """The average number of examples in an optimizer step, over all processes."""
        sampler = self._batch_sampler
        if sampler is None:
            return super().get_total_train_batch_size(args)
        return max(1, round(len(sampler.lengths) / sampler.num_steps * args.gradient_accumulation_steps))

    def _batch_settings(self) -> dict[str, Any]:
        settings = super()._batch_settings() | {"max_tokens": self.max_tokens, "truncate": self.truncate}
        del settings["batch size"]  # the budget replaces it
        if self._batch_sampler is None:
            return settings | {"buffer_size": self.buffer_size}
        return settings | {"max_tokens": self._batch_sampler.max_tokens, DATA: [settings[DATA], self._lengths_hash]}

    def _make_batch_sampler(self, dataset: Any) -> TokenBudgetBatchSampler:
        lengths = example_lengths(dataset, self.args.length_column_name)
        self._lengths_hash = hashlib.blake2b(np.array(lengths).tobytes(), digest_size=8).hexdigest()
        max_tokens = self.max_tokens
        if max_tokens is None:
            mean = math.ceil(sum(lengths) * self._train_batch_size / max(1, len(lengths)))
            max_tokens = max(1, mean, max(lengths, default=0))
        return TokenBudgetBatchSampler(
            lengths,
            max_tokens,
            max_sequences=self._max_sequences,
            num_replicas=self._num_replicas,
            seed=self._data_seed,
            truncate=self.truncate,
        )

    def _make_stream(self, dataset: IterableDataset) -> TokenBudgetIterableDataset:
        if self.max_tokens is None:
            raise ValueError("`max_tokens` must be given for a stream, whose mean length is not known; got None")
        return TokenBudgetIterableDataset(
            dataset,
            self.max_tokens,
            max_sequences=self._max_sequences,
            num_replicas=self._num_replicas,
            buffer_size=self.buffer_size,
            length_column=self.args.length_column_name,
            seed=self._data_seed,
            truncate=self.truncate,
        )

    @property
    def _max_sequences(self) -> int | None:
        """The `max_sequences` of a flat collator, if it is set."""
        collator: Any = self.data_collator
        return collator.max_sequences if is_flat(collator) else None

    def _prepare(self, stock: DataLoader, dataset: Any, **arguments: Any) -> Any:
        settings = {name: getattr(stock, name) for name in SETTINGS}
        with _batches_as_they_are(self.accelerator):
            return self.accelerator.prepare(DataLoader(dataset, **arguments, **settings))


def _check(args: TrainingArguments) -> None:
    if args.n_gpu > 1:
        raise ValueError(
            f"a budget of tokens is for one device, but this process has {args.n_gpu}: start one process per device "
            "with `accelerate launch` or `torchrun`"
        )
    if args.train_sampling_strategy != "random":
        raise ValueError(
            "`train_sampling_strategy` must be 'random' with TokenBudgetMixin, which groups examples by length itself; "
            f"got {args.train_sampling_strategy!r}"
        )
    for name in ("split_batches", "dispatch_batches"):
        if getattr(args.accelerator_config, name):
            raise ValueError(
                f"`accelerator_config.{name}` must not be set with TokenBudgetMixin, whose batches are for one process "
                "each; got True"
            )


@contextmanager
def _batches_as_they_are(accelerator: Accelerator) -> Iterator[None]:
    """In this context, Accelerate gives each process whole batches in turn. It neither splits nor adds batches."""
    config = accelerator.dataloader_config
    given = config.even_batches, config.dispatch_batches
    config.even_batches = config.dispatch_batches = False
    try:
        yield
    finally:
        config.even_batches, config.dispatch_batches = given


def _collate_only(collate: Callable[[list[Any]], Any], batches: list) -> Any:
    (batch,) = batches
    return collate(batch)
