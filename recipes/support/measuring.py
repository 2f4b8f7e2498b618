"""Measured training runs of a model and its baselines, and what can be reached without a model."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import exp, log
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather
from datasets import DatasetDict
from torch import Tensor
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from hf_dynmask import DynMaskConfig, DynMaskSeq2SeqConfig, from_transformers
from support.cards import Results, describe_environment
from support.common import IGNORED
from support.masks_and_lengths import describe_lengths, describe_masks

Batch = dict[str, Tensor]
Collator = Callable[[list[Any]], Any]
Baselines = dict[str, tuple[Any, Collator | None]]  # names as in `cards.RUNS`, models and their collators
Lengths = dict[str, list[int]]  # real tokens or frames of each training row, by column


def compare(
    trainer: Trainer,
    baselines: Baselines,
    load: Callable[[str], Any],
    metrics: Sequence[str],
    lengths: Lengths | None = None,
) -> Results:
    """
    Trains a model, then its baselines, on however many processes there are. The model is saved, loaded again, and must
    have the quality that it had before.

    Args:
        trainer ([`~transformers.Trainer`]): Of the model.
        baselines (`dict[str, tuple[PreTrainedModel, Callable]]`):
            Models and their collators (`None`: the trainer's own), by name. Each is trained as the first model is, in a
            folder inside its own.
        load (`Callable`): Loads the saved model from its folder.
        metrics (`list[str]`): Names of the metrics, the main one first.
        lengths (`dict[str, list[int]]`, *optional*):
            Tokens of each training row by column, if the trainer tokenizes the rows. `None`: the rows are tokenized.

    Returns:
        `dict`: `masks` and `lengths` of the training rows, as [`describe_masks`] and [`describe_lengths`] give them,
        `runs` (for each name what [`train_and_evaluate`] gives), `padding_share` (of rows that are padded) and
        `environment`.
    """
    training = trainer.args
    runs = {"dynmask": train_and_evaluate(trainer, *metrics, lengths=lengths)}
    share = padding_share(trainer.get_train_dataloader() if lengths is None else batches_of(trainer, lengths))
    described = describe(trainer.model, lengths or row_lengths(trainer))
    trainer.save_model()
    trainer.accelerator.wait_for_everyone()
    reloaded = load(str(training.output_dir)).to(training.device)
    again = trainer_like(trainer, reloaded, trainer.data_collator, replace(training))
    check_reloaded(of_whole_model(again), metrics[0], runs["dynmask"][metrics[0]])
    for name, (model, collator) in baselines.items():
        other = trainer_like(trainer, for_fsdp2(model), collator, arguments_of(name, training))
        runs[name] = train_and_evaluate(other, *metrics, lengths=lengths)
    environment = describe_environment(training.device) | {"processes": training.world_size}
    return {**described, "runs": runs, "padding_share": share, "environment": environment}


def trainer_like(
    trainer: Any, model: PreTrainedModel, collator: Collator | None, training: TrainingArguments
) -> Trainer:
    """A trainer of another model with the same data and measures. DeepSpeed's arguments are for one trainer each."""
    if hasattr(trainer, "evaluator"):  # of sentence-transformers, whose losses hold the model
        measures = {"loss": type(trainer.loss), "evaluator": trainer.evaluator}
    else:
        names = ("compute_metrics", "preprocess_logits_for_metrics")
        measures = {name: getattr(trainer, name) for name in names}
    return type(trainer)(
        model,
        training,
        data_collator=collator,
        train_dataset=trainer.train_dataset,
        eval_dataset=trainer.eval_dataset,
        processing_class=trainer.processing_class,
        **measures,
    )


def describe(model: Any, lengths: Lengths) -> Results:
    """The masks of a model, of a stock one those of its converted twin, and the lengths of what it is trained on."""
    is_ours = isinstance(model.config, DynMaskConfig | DynMaskSeq2SeqConfig)
    config = model.config if is_ours else from_transformers(model.transformers_model.base_model).config
    return {
        "masks": describe_masks(config),
        "lengths": {column: describe_lengths(numbers) for column, numbers in lengths.items()},
    }


def row_lengths(trainer: Any) -> Lengths:
    """Real tokens or frames of each training row, by column."""
    rows = trainer.train_dataset
    columns = ("input_ids", "input_features", *["labels"] * trainer.model.config.is_encoder_decoder)
    return {name: [len(values) for values in rows[name]] for name in columns if name in rows.column_names}


def arguments_of(name: str, training: TrainingArguments) -> TrainingArguments:
    """New arguments for another model; with the same ones, FSDP would look for the first model's layers in it."""
    return replace(
        training,
        output_dir=str(Path(str(training.output_dir), name)),
        resume_from_checkpoint=None,
        # Most stock models average over their own targets, ignoring those of other processes.
        average_tokens_across_devices=training.average_tokens_across_devices and name != "stock",
    )


def for_fsdp2(model: Any) -> Any:
    """Accelerate shards a model's input embeddings separately, so a module that holds them cannot be sharded whole."""
    if isinstance(model, PreTrainedModel):  # one of sentence-transformers names no blocks
        blocks = model._no_split_modules or ()
        model._no_split_modules = [block for block in blocks if not block.endswith("Embeddings")]
    return model


def of_whole_model(trainer: Trainer) -> Trainer:
    """A trainer that only evaluates, with the whole model on each process, as FSDP2 and DeepSpeed cannot prepare one.

    ZeRO-3 is the exception: it partitions the model when it is loaded.
    """
    if not is_deepspeed_zero3_enabled():
        trainer.is_fsdp_enabled = trainer.is_deepspeed_enabled = False
    return trainer


def without_lengths(collator: Collator) -> Collator:
    """A collator without lengths and masks, so that a model computes on padding, too."""

    def collate(examples: list[Any]) -> Batch:
        told = ("lengths", "attention_mask")
        return {name: values for name, values in collator(examples).items() if not name.endswith(told)}

    return collate


def train_and_evaluate(trainer: Trainer, *metrics: str, lengths: Lengths | None = None) -> Results:
    """
    Trains and evaluates, and measures speed and quality.

    Args:
        trainer ([`~transformers.Trainer`]): Its `compute_metrics` gives the metrics.
        metrics (`str`): Names of the metrics.
        lengths (`dict[str, list[int]]`, *optional*): Of texts that the trainer tokenizes, as [`compare`] takes them.

    Returns:
        `dict`: The metrics under their names, `tokens_per_second` (real tokens or frames, while training),
        `train_tokens`, `train_seconds`; in a resumed training counted from the checkpoint on.
    """
    rows: Any = trainer.train_dataset
    if "input_ids" in rows.column_names:
        trainer.args.include_num_input_tokens_seen = "non_padding"  # a trainer counts ids alone
    beginning = Beginning()
    trainer.add_callback(beginning)
    seconds = trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint).metrics["train_runtime"]
    tokens = _tokens_seen(trainer, beginning, lengths)
    evaluated = trainer.evaluate()
    return {metric: evaluated[f"eval_{metric}"] for metric in metrics} | {
        "tokens_per_second": tokens / seconds,
        "train_tokens": tokens,
        "train_seconds": seconds,
    }


class Beginning(TrainerCallback):
    """Records where a training begins, which may be at a checkpoint."""

    tokens = 0
    epoch = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self.tokens, self.epoch = state.num_input_tokens_seen, state.epoch or 0.0


def _tokens_seen(trainer: Any, since: Beginning, lengths: Lengths | None) -> int:
    """Real tokens or frames of a training, on both sides of an encoder-decoder. The trainer itself counts only ids."""
    if trainer.state.num_input_tokens_seen and not trainer.model.config.is_encoder_decoder:
        return trainer.state.num_input_tokens_seen - since.tokens
    tokens = sum(map(sum, (lengths or row_lengths(trainer)).values()))
    return round(tokens * (trainer.state.epoch - since.epoch))


def check_reloaded(trainer: Trainer, metric: str, expected: float) -> None:
    """Raises if a saved and reloaded model has another quality than before."""
    found = trainer.evaluate()[f"eval_{metric}"]
    if found != expected:
        raise RuntimeError(f"the saved model must have the {metric} {expected}; got {found}")


def best_constant(
    data: DatasetDict,
    metric: str,
    score: Callable[[list[str], list[str]], Mapping[str, float]],
    lower_is_better: bool = False,
) -> Results:
    """
    What can be reached without looking at the inputs.

    Args:
        data (`DatasetDict`): The splits `train` and `test` with a column `text`.
        metric (`str`): Name of the metric.
        score (`Callable`): Takes texts and answers, and returns the metric under its name.
        lower_is_better (`bool`, *optional*, defaults to `False`): Whether the metric is an error rate.

    Returns:
        `dict`: `what` was done, and the metric of the best constant answer on `test` among the 100 most frequent texts
        of `train`.
    """
    texts = list(data["test"]["text"])
    candidates = [text for text, _ in Counter(data["train"]["text"]).most_common(100)]
    scores = {text: score(texts, [text] * len(texts))[metric] for text in candidates}
    best = (min if lower_is_better else max)(scores, key=lambda text: scores[text])
    return {"what": f"always {best!r}, the best of the {len(candidates)} most frequent texts", metric: scores[best]}


def perplexity_of(surprise: Any, labels: Any) -> float:
    """
    `exp` of the mean over all targets.

    Args:
        surprise (`np.ndarray` of shape `(B, T)`): Negative log-likelihood of each label.
        labels (`np.ndarray` of shape `(B, T)`): -100 for tokens that are no targets.
    """
    return exp(float(np.asarray(surprise)[np.asarray(labels) != IGNORED].mean(dtype=np.float64)))


def unigram_perplexity(seen: Iterable[int], targets: Sequence[int]) -> float:
    """Perplexity of `targets` under the frequencies of tokens `seen` in training, with add-one smoothing."""
    counts = Counter(seen)
    total = sum(counts.values()) + len(counts.keys() | set(targets))
    return exp(-sum(log((counts[target] + 1) / total) for target in targets) / len(targets))


def batches_of(trainer: Any, lengths: Lengths) -> Iterator[Batch]:
    """The `lengths` of each column of each batch, of rows that the trainer tokenizes."""
    for rows in trainer.get_train_dataloader().batch_sampler:
        for of_column in lengths.values():
            yield {"lengths": torch.tensor([of_column[row] for row in rows], device=trainer.args.device)}


def padding_share(batches: Iterable[Mapping[str, Tensor]]) -> float:
    """Share of padding, on all processes, in rows padded to the longest of their batch.

    Batches have `lengths` and, for an encoder-decoder, `decoder_lengths`.
    """
    sides = [batch[name] for batch in batches for name in ("lengths", "decoder_lengths") if name in batch]
    sums = torch.stack([torch.stack([side.sum(), len(side) * side.max()]) for side in sides]).sum(0, keepdim=True)
    real, places = gather(sums).sum(0).tolist()  # pyright: ignore[reportAttributeAccessIssue]: a tensor of one
    return 1 - real / places
