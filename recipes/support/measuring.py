"""Trains and measures a model and its baselines, and computes scores that need no model."""

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
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from hf_dynmask import DynMaskConfig, DynMaskSeq2SeqConfig, from_transformers
from support.cards import Results, describe_environment
from support.common import IGNORED
from support.masks_and_lengths import describe_lengths, describe_masks

Batch = dict[str, Tensor]
Collator = Callable[[list[Any]], Any]
Baselines = dict[str, tuple[Any, Collator | None]]  # models and their collators, by name in `cards.RUNS`
Lengths = dict[str, list[int]]  # real tokens or frames of each training row, by column


def compare(
    trainer: Trainer,
    baselines: Baselines,
    load: Callable[[str], Any],
    metrics: Sequence[str],
    lengths: Lengths | None = None,
) -> Results:
    """
    Trains a model, then its baselines, on any number of processes. The model is saved and loaded again, and must then
    have the same score as before.

    Args:
        trainer ([`~transformers.Trainer`]): The trainer of the model.
        baselines (`dict[str, tuple[PreTrainedModel, Callable]]`):
            Models and their collators (`None`: the trainer's own), by name. Each is trained like the first model, in a
            subfolder of the model's folder.
        load (`Callable`): Loads the saved model from its folder.
        metrics (`list[str]`): Names of the metrics, the main one first.
        lengths (`dict[str, list[int]]`, *optional*):
            Tokens of each training row by column, if the trainer tokenizes the rows itself. `None`: the rows are
            already tokenized.

    Returns:
        `dict`: `masks` and `lengths` of the training rows (from [`describe_masks`] and [`describe_lengths`]), `runs`
        (from [`train_and_evaluate`], by name), `padding_share` (of padded batches) and `environment`.
    """
    training = trainer.args
    runs = {"dynmask": train_and_evaluate(trainer, *metrics, lengths=lengths)}
    share = padding_share(trainer.get_train_dataloader() if lengths is None else batches_of(trainer, lengths))
    described = describe(trainer.model, lengths or row_lengths(trainer))
    trainer.save_model()
    trainer.accelerator.wait_for_everyone()
    reloaded = load(str(training.output_dir)).to(training.device)
    again = trainer_like(trainer, reloaded, trainer.data_collator, replace(training))
    check_reloaded(without_sharding(again), metrics[0], runs["dynmask"][metrics[0]])
    for name, (model, collator) in baselines.items():
        other = trainer_like(trainer, for_fsdp2(model), collator, arguments_of(name, training))
        runs[name] = train_and_evaluate(other, *metrics, lengths=lengths)
    environment = describe_environment(training.device) | {"processes": training.world_size}
    return {**described, "runs": runs, "padding_share": share, "environment": environment}


def trainer_like(
    trainer: Any, model: PreTrainedModel, collator: Collator | None, training: TrainingArguments
) -> Trainer:
    """A trainer for another model with the same data and metrics. DeepSpeed needs new arguments for each trainer."""
    if hasattr(trainer, "evaluator"):  # a trainer of sentence-transformers, whose losses hold the model
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
    """The masks of a model (of a stock model, after conversion), and the lengths of its training rows."""
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
    """New arguments for another model. With the same ones, FSDP would look for the first model's layers in it."""
    return replace(
        training,
        output_dir=str(Path(str(training.output_dir), name)),
        resume_from_checkpoint=None,
        # Most stock models average over the targets of their own process only.
        average_tokens_across_devices=training.average_tokens_across_devices and name != "stock",
    )


def for_fsdp2(model: Any) -> Any:
    """Prepares a model for FSDP2. Accelerate shards the input embeddings separately, so the module that holds them must
    not be sharded as a whole."""
    if isinstance(model, PreTrainedModel):  # a model of sentence-transformers names no blocks
        blocks = model._no_split_modules or ()
        model._no_split_modules = [block for block in blocks if not block.endswith("Embeddings")]
    return model


def without_sharding(trainer: Trainer) -> Trainer:
    """Makes a trainer evaluate with the whole model on each process: FSDP2 and DeepSpeed can only prepare a model for
    training. ZeRO-3 is the exception, since it partitions the model while loading it.
    """
    if not is_deepspeed_zero3_enabled():
        trainer.is_fsdp_enabled = trainer.is_deepspeed_enabled = False
    return trainer


def without_lengths(collator: Collator) -> Collator:
    """A collator whose batches have neither lengths nor masks, so that the model computes padding."""

    def collate(examples: list[Any]) -> Batch:
        removed = ("lengths", "attention_mask")
        return {name: values for name, values in collator(examples).items() if not name.endswith(removed)}

    return collate


def train_and_evaluate(trainer: Trainer, *metrics: str, lengths: Lengths | None = None) -> Results:
    """
    Trains and evaluates, and measures speed and quality.

    Args:
        trainer ([`~transformers.Trainer`]): Its `compute_metrics` returns the metrics.
        metrics (`str`): Names of the metrics.
        lengths (`dict[str, list[int]]`, *optional*): As in [`compare`].

    Returns:
        `dict`: The metrics under their names, `tokens_per_second` (real tokens or frames, in training), `train_tokens`
        and `train_seconds`. In a run that resumes, all are counted from the checkpoint on.
    """
    rows: Any = trainer.train_dataset
    if "input_ids" in rows.column_names:
        trainer.args.include_num_input_tokens_seen = "non_padding"  # the trainer counts only `input_ids`
    start = Start()
    trainer.add_callback(start)
    seconds = trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint).metrics["train_runtime"]
    tokens = _tokens_seen(trainer, start, lengths)
    evaluated = trainer.evaluate()
    return {metric: evaluated[f"eval_{metric}"] for metric in metrics} | {
        "tokens_per_second": tokens / seconds,
        "train_tokens": tokens,
        "train_seconds": seconds,
    }


class Start(TrainerCallback):
    """Records where training starts, which may be at a checkpoint."""

    tokens = 0
    epoch = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self.tokens, self.epoch = state.num_input_tokens_seen, state.epoch or 0.0


def _tokens_seen(trainer: Any, start: Start, lengths: Lengths | None) -> int:
    """Real tokens or frames in training, on both sides of an encoder-decoder. The trainer counts only `input_ids`."""
    if trainer.state.num_input_tokens_seen and not trainer.model.config.is_encoder_decoder:
        return trainer.state.num_input_tokens_seen - start.tokens
    tokens = sum(map(sum, (lengths or row_lengths(trainer)).values()))
    return round(tokens * (trainer.state.epoch - start.epoch))


def check_reloaded(trainer: Trainer, metric: str, expected: float) -> None:
    """Raises if the score of a model has changed by saving and loading it."""
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
    The best score without looking at the inputs.

    Args:
        data (`DatasetDict`): The splits `train` and `test` with a column `text`.
        metric (`str`): Name of the metric.
        score (`Callable`): Takes texts and answers, and returns the metric under its name.
        lower_is_better (`bool`, *optional*, defaults to `False`): Whether the metric is an error rate.

    Returns:
        `dict`: `what`, a description, and the metric on `test` of the best constant answer among the 100 most frequent
        texts of `train`.
    """
    texts = list(data["test"]["text"])
    candidates = [text for text, _ in Counter(data["train"]["text"]).most_common(100)]
    scores = {text: score(texts, [text] * len(texts))[metric] for text in candidates}
    best = (min if lower_is_better else max)(scores, key=lambda text: scores[text])
    return {"what": f"always {best!r}, the best of the {len(candidates)} most frequent texts", metric: scores[best]}


def perplexity_of(surprise: Any, labels: Any) -> float:
    """
    Perplexity: `exp` of the mean of `surprise` over all targets.

    Args:
        surprise (`np.ndarray` of shape `(B, T)`): Negative log-likelihood of each label.
        labels (`np.ndarray` of shape `(B, T)`): -100 for tokens that are not targets.
    """
    return exp(float(np.asarray(surprise)[np.asarray(labels) != IGNORED].mean(dtype=np.float64)))


def unigram_perplexity(seen: Iterable[int], targets: Sequence[int]) -> float:
    """Perplexity of `targets` under the frequencies of the tokens `seen` in training, with add-one smoothing."""
    counts = Counter(seen)
    total = sum(counts.values()) + len(counts.keys() | set(targets))
    return exp(-sum(log((counts[target] + 1) / total) for target in targets) / len(targets))


def batches_of(trainer: Any, lengths: Lengths) -> Iterator[Batch]:
    """The `lengths` of each column in each batch, for a trainer that tokenizes its rows itself."""
    for rows in trainer.get_train_dataloader().batch_sampler:
        for column in lengths.values():
            yield {"lengths": torch.tensor([column[row] for row in rows], device=trainer.args.device)}


def padding_share(batches: Iterable[Mapping[str, Tensor]]) -> float:
    """Share of padding, over all processes, if rows are padded to the longest row of their batch.

    Batches have `lengths` and, for an encoder-decoder, `decoder_lengths`.
    """
    sides = [batch[name] for batch in batches for name in ("lengths", "decoder_lengths") if name in batch]
    sums = torch.stack([torch.stack([side.sum(), len(side) * side.max()]) for side in sides]).sum(0, keepdim=True)
    real, places = gather(sums).sum(0).tolist()  # pyright: ignore[reportAttributeAccessIssue]: a tensor
    return 1 - real / places
