"""What the recipes share: arguments, a measured training run, and the results file and model card that come of it."""

import json
import platform
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from math import exp, log
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather
from datasets import DatasetDict
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from torch import Tensor
from transformers import (
    AutoConfig,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from hf_dynmask import DynMaskConfig, from_transformers
from samples import DATASETS, MODELS, PREFIX, resolve_dataset

Results = dict[str, Any]
Batch = dict[str, Tensor]
Collator = Callable[[list[Any]], Any]
Contenders = dict[str, tuple[Any, Collator]]  # names as in `RUNS`, models and what makes their batches

IGNORED = -100  # the label of what is no target

HYPER_PARAMETERS = (
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "optim",
    "bf16",
    "seed",
)
RUNS = {
    "dynmask": "hf_dynmask, lengths",
    "stock": "stock model, padded batches",
    "padded": "the same model, padded batches",  # where transformers has no twin of it
}


TRAINING_DEFAULTS = {
    "warmup_steps": 0.1,
    "weight_decay": 0.01,
    "save_strategy": "no",
    "dataloader_pin_memory": torch.accelerator.is_available(),
    "use_cpu": not torch.accelerator.is_available(),  # Accelerate has to be told before it joins several processes
}


@dataclass(kw_only=True)
class CommonArguments:
    """What a recipe that trains a model takes beside what is its own."""

    baseline: bool = field(
        default=False,
        metadata={
            "help": "Also train on padded batches, from the same weights: the stock model, or where there is none the "
            "same model."
        },
    )
    model_card_dir: str | None = field(
        default=None, metadata={"help": "A folder for a second copy of results and model card."}
    )


def parse_arguments(
    classes: Sequence[type], arguments: Sequence[str] | None, defaults: Mapping[str, Any] | None = None
) -> tuple[Any, ...]:
    """
    One instance of each dataclass from the command line.

    Args:
        classes (`list[type]`): The dataclasses, such as [`~transformers.TrainingArguments`].
        arguments (`list[str]`, *optional*): What to read in place of the command line.
        defaults (`dict[str, Any]`, *optional*): A recipe's own defaults of fields; those of a training begin as
            `TRAINING_DEFAULTS`.
    """
    parser = HfArgumentParser(classes)  # pyright: ignore[reportArgumentType]: its annotation admits no class
    if any(issubclass(each, TrainingArguments) for each in classes):
        parser.set_defaults(**TRAINING_DEFAULTS)
    parser.set_defaults(**defaults or {})
    return parser.parse_args_into_dataclasses(arguments)


# --- Data ------------------------------------------------------------------------------------------------------------


def load_columns(source: str, *columns: str) -> DatasetDict:
    """
    Columns of a data set.

    Args:
        source (`str`): As [`resolve_dataset`] takes it.
        columns (`str`): Their names.

    Returns:
        `DatasetDict`: The splits `train` and `test` with these columns alone.

    Raises:
        ValueError: The data set has not all of them.
    """
    data = resolve_dataset(source)
    found = data["train"].column_names
    if not set(columns) <= set(found):
        wanted = " and ".join(f"`{name}`" for name in columns)
        plural = "s" if len(columns) > 1 else ""
        raise ValueError(f"data set `{source}` must have the column{plural} {wanted}; got {', '.join(found)}")
    return data.select_columns(list(columns))


def load_texts(source: str, *columns: str) -> DatasetDict:
    """[`load_columns`], which all hold texts, without rows where one is empty; a `ValueError` for other types."""
    data = load_columns(source, *columns)
    check_texts(data, *columns)
    return data.filter(lambda row: all(text and text.strip() for text in row.values()))


def check_texts(data: DatasetDict, *columns: str) -> None:
    """A `ValueError` where a column of `train` does not hold texts."""
    for name in columns:
        if data["train"].features[name].dtype not in ("string", "large_string"):
            raise ValueError(f"column `{name}` must hold texts; got {data['train'].features[name].dtype}")


# --- Models ----------------------------------------------------------------------------------------------------------


def load_model(checkpoint: str, task: str, auto_class: Any, **settings: Any) -> Any:
    """
    A DynMask model: the checkpoint as it is, or converted from a stock one.

    Args:
        checkpoint (`str`): A folder or a Hub id.
        task (`str`): As [`from_transformers`] knows it.
        auto_class (`type`): Loads a model of the task, such as [`~transformers.AutoModelForTokenClassification`].
        settings (*optional*): Fields of the configuration.
    """
    if AutoConfig.from_pretrained(checkpoint).model_type == DynMaskConfig.model_type:
        return auto_class.from_pretrained(checkpoint, **settings)
    return from_transformers(checkpoint, task, **settings)


def dropout_of(probability: float) -> dict[str, float]:
    """What a configuration says of dropout, of hidden states and of attention weights."""
    return {"hidden_dropout_prob": probability, "attention_probs_dropout_prob": probability}


def names_of(labels: Sequence[str]) -> dict[str, Any]:
    """What a configuration says of classes: `id2label` and `label2id`."""
    return {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}


# --- Measuring -------------------------------------------------------------------------------------------------------


def compare(
    contenders: Contenders,
    make_trainer: Callable[[Any, Collator, Any], Trainer],
    training: TrainingArguments,
    auto_class: Any,
    metrics: Sequence[str],
) -> Results:
    """
    Trains one model after another, on however many processes there are. The first is saved, loaded again, and held to
    the quality that it had before.

    Args:
        contenders (`dict[str, tuple[PreTrainedModel, Callable]]`): Models and their collators, by name.
        make_trainer (`Callable`): Takes model, collator and arguments, and gives a [`~transformers.Trainer`].
        training ([`~transformers.TrainingArguments`]): Of the first; the others have a folder inside its own.
        auto_class (`type`): Loads the saved model.
        metrics (`list[str]`): Measures of quality, the main one first.

    Returns:
        `dict`: `runs` (of each name what [`train_and_evaluate`] gives), `padding_share` (of rows that are filled up)
        and `environment`.
    """
    (first, (model, collator)), *others = contenders.items()
    trainer = make_trainer(model, collator, training)
    runs = {first: train_and_evaluate(trainer, *metrics)}
    share = padding_share(trainer.get_train_dataloader())
    trainer.save_model()
    trainer.accelerator.wait_for_everyone()
    reloaded = auto_class.from_pretrained(training.output_dir).to(training.device)
    check_reloaded(of_whole_model(make_trainer(reloaded, collator, training)), metrics[0], runs[first][metrics[0]])
    for name, (model, collator) in others:
        trainer = make_trainer(for_fsdp2(model), collator, arguments_of(name, training))
        runs[name] = train_and_evaluate(trainer, *metrics)
    environment = describe_environment(training.device) | {"processes": training.world_size}
    return {"runs": runs, "padding_share": share, "environment": environment}


def arguments_of(name: str, training: TrainingArguments) -> TrainingArguments:
    """Those of a further model, made anew, since FSDP would look for the layers of the first one in it."""
    return replace(
        training,
        output_dir=str(Path(str(training.output_dir), name)),
        resume_from_checkpoint=None,
        # Most stock models take the mean over their own targets, however many other processes have.
        average_tokens_across_devices=training.average_tokens_across_devices and name != "stock",
    )


def for_fsdp2(model: PreTrainedModel) -> PreTrainedModel:
    """Accelerate shares out a model's input embeddings apart: what holds them cannot be shared out as one."""
    blocks = model._no_split_modules or ()
    model._no_split_modules = [block for block in blocks if not block.endswith("Embeddings")]
    return model


def of_whole_model(trainer: Trainer) -> Trainer:
    """A trainer to evaluate alone, on each process with all of the model: FSDP2 and DeepSpeed prepare none for that,
    but for ZeRO-3, which has it in parts when it is loaded."""
    if not is_deepspeed_zero3_enabled():
        trainer.is_fsdp_enabled = trainer.is_deepspeed_enabled = False
    return trainer


def special_token_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What a configuration says of a tokenizer: `pad_token_id`, `bos_token_id` and `eos_token_id`."""
    return {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}


def without_lengths(collator: Collator) -> Collator:
    """A collator whose batches do not tell padding from data, so that a model computes on all of it."""

    def collate(examples: list[Any]) -> Batch:
        return {name: values for name, values in collator(examples).items() if not name.endswith("lengths")}

    return collate


def train_and_evaluate(trainer: Trainer, *metrics: str) -> Results:
    """
    Runs a trainer and says how fast it was and how good its model became.

    Args:
        trainer ([`~transformers.Trainer`]):
            Its `compute_metrics` gives the metrics; its arguments have `include_num_input_tokens_seen="non_padding"`
            where its model reads ids.
        metrics (`str`): Names of the measures of quality.

    Returns:
        `dict`: The metrics under their names, `tokens_per_second` (real tokens or frames, while training),
        `train_tokens`, `train_seconds`; of a resumed training from the checkpoint on.
    """
    beginning = Beginning()
    trainer.add_callback(beginning)
    seconds = trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint).metrics["train_runtime"]
    tokens = _tokens_seen(trainer, beginning)
    evaluated = trainer.evaluate()
    return {metric: evaluated[f"eval_{metric}"] for metric in metrics} | {
        "tokens_per_second": tokens / seconds,
        "train_tokens": tokens,
        "train_seconds": seconds,
    }


class Beginning(TrainerCallback):
    """Where a training begins, which may be a checkpoint."""

    tokens = 0
    epoch = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self.tokens, self.epoch = state.num_input_tokens_seen, state.epoch or 0.0


def _tokens_seen(trainer: Any, since: Beginning) -> int:
    """Real tokens or frames of a training, of both sides where there are two. The trainer itself counts ids alone."""
    has_two_sides = trainer.model.config.is_encoder_decoder
    if trainer.state.num_input_tokens_seen and not has_two_sides:
        return trainer.state.num_input_tokens_seen - since.tokens
    columns = ("input_ids", "input_features", "labels") if has_two_sides else ("input_features",)
    tokens = sum(len(example[name]) for example in trainer.train_dataset for name in columns if name in example)
    return round(tokens * (trainer.state.epoch - since.epoch))


def check_reloaded(trainer: Trainer, metric: str, expected: float) -> None:
    """Holds a model that was saved and loaded again to the quality that it had before."""
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
    What can be reached without a look at the inputs.

    Args:
        data (`DatasetDict`): The splits `train` and `test` with a column `text`.
        metric (`str`): Name of the measure of quality.
        score (`Callable`): Takes the texts and the answers, and gives the metric under its name.
        lower_is_better (`bool`, *optional*, defaults to `False`): Whether the metric counts mistakes.

    Returns:
        `dict`: `what` was done, and the metric: of the 100 most frequent texts of `train` the one that is best on
        `test` when it answers everything.
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
        labels (`np.ndarray` of shape `(B, T)`): -100 where there is none.
    """
    return exp(float(np.asarray(surprise)[np.asarray(labels) != IGNORED].mean(dtype=np.float64)))


def unigram_perplexity(seen: Iterable[int], targets: Sequence[int]) -> float:
    """Perplexity of `targets` under the frequencies of tokens `seen` in training, each one more than counted."""
    counts = Counter(seen)
    total = sum(counts.values()) + len(counts.keys() | set(targets))
    return exp(-sum(log((counts[target] + 1) / total) for target in targets) / len(targets))


def padding_share(batches: Iterable[Mapping[str, Tensor]]) -> float:
    """Share of padding in rows that are filled up to the longest of their batch, which has `lengths`, and
    `decoder_lengths` where there are targets: what a padded model computes for nothing, on all processes."""
    sides = [batch[name] for batch in batches for name in ("lengths", "decoder_lengths") if name in batch]
    sums = torch.stack([torch.stack([side.sum(), len(side) * side.max()]) for side in sides]).sum(0, keepdim=True)
    real, places = gather(sums).sum(0).tolist()  # pyright: ignore[reportAttributeAccessIssue]: a tensor of one
    return 1 - real / places


# --- What a run was made of ------------------------------------------------------------------------------------------


def describe_source(source: str) -> Results:
    """The model or data set that was asked for: its Hub id, where it has one, and what is known of a sample."""
    samples = {f"{PREFIX}{name}": sample for name, sample in (MODELS | DATASETS).items()}
    if source in samples:
        return {"name": source, "origin": samples[source].source, "licence": samples[source].licence}
    return {"name": source} if Path(source).exists() else {"name": source, "hub_id": source}


def describe_new_model(model: PreTrainedModel) -> Results:
    """A model that began with random weights."""
    return {"name": f"{type(model).__name__}, {model.num_parameters() / 1e6:.1f} million weights, random at first"}


def describe_training(arguments: TrainingArguments) -> Results:
    """The hyper-parameters of a run, as plain values."""
    values = arguments.to_sanitized_dict()
    return {name: values[name] for name in HYPER_PARAMETERS}


def describe_environment(device: torch.device) -> Results:
    """What a speed depends on: versions, device, threads."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    packages = {package: version(package) for package in ("torch", "transformers", "accelerate")}
    return {"device": name, "threads": torch.get_num_threads(), "python": platform.python_version(), **packages}


def _cpu_name() -> str:
    information = Path("/proc/cpuinfo")  # Linux; elsewhere platform knows
    lines = information.read_text().splitlines() if information.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


# --- The report ------------------------------------------------------------------------------------------------------


def write_json(path: Path, results: Results) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def report(results: Results, card: ModelCard, training: TrainingArguments, model_card_dir: str | None) -> None:
    """What [`save_report`] writes; a summary on the screen."""
    if training.process_index > 0:
        return
    save_report(results, card, str(training.output_dir), model_card_dir)
    print(summary(results))


def save_report(results: Results, card: ModelCard, output_dir: str, model_card_dir: str | None) -> None:
    """Results and card beside the model, and under the recipe's name among the model cards."""
    write_json(Path(output_dir, "results.json"), results)
    card.save(Path(output_dir, "README.md"))
    if model_card_dir is not None:
        write_json(Path(model_card_dir, f"{results['recipe']}.json"), results)
        card.save(Path(model_card_dir, f"{results['recipe']}.md"))


def summary(results: Results) -> str:
    """The measured figures, in Markdown."""
    runs, metric = results["runs"], results["metric"]
    metrics = [metric, *results.get("others", [])]
    unit = results.get("unit", "tokens")
    rows = [
        [
            RUNS[name],
            *(f"{run[measure]:.3f}" for measure in metrics),
            f"{run['tokens_per_second']:,.0f}",
            f"{run['train_seconds']:,.0f}",
        ]
        for name, run in runs.items()
    ]
    parts = [
        table(["training", *metrics, f"real {unit} per second", "seconds"], rows),
        f"Padding avoided: {results['padding_share']:.1%} of the places in padded batches.",
    ]
    if "trivial" in results:
        trivial, found = results["trivial"], runs["dynmask"][metric]
        parts.append(
            f"Without a model, {trivial['what']}: {metric} {trivial[metric]:.3f}. "
            f"The model's is {found - trivial[metric]:+.3f} of that."
        )
    for padded in runs.keys() - {"dynmask"}:
        ratio = runs["dynmask"]["tokens_per_second"] / runs[padded]["tokens_per_second"]
        parts.append(f"Speed-up over padded batches: {ratio:.2f}.")
    return "\n\n".join(parts)


def model_card(results: Results, title: str, usage: str) -> ModelCard:
    """
    A model card from nothing but the results.

    Args:
        results (`dict`):
            `recipe`, `task` (as the Hub names it), `metric`, `model` and `dataset` (as [`describe_source`] gives them,
            with `rows` of each split), `runs` (as [`train_and_evaluate`] gives them), `padding_share`, `training`,
            `environment`. Not all have: `others` (further metrics), `trivial` (as [`best_constant`] gives it), `unit`
            (what a model reads in place of tokens).
        title (`str`): The heading.
        usage (`str`): Python code that uses the model.
    """
    model, dataset = results["model"], results["dataset"]
    measured = EvalResult(
        task_type=results["task"],
        dataset_type=dataset["name"],
        dataset_name=dataset["name"],
        metric_type=results["metric"],
        metric_value=results["runs"]["dynmask"][results["metric"]],
    )
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag=results["task"],
        tags=["hf_dynmask"],
        base_model=model.get("hub_id"),
        datasets=dataset.get("hub_id"),
        metrics=[results["metric"]],
        model_name=results["recipe"],
        eval_results=[measured],
    )
    text = f"""
# {title}

`{model["name"]}`, trained by `recipes/{results["recipe"]}.py` on `{dataset["name"]}`. Its batches carried lengths, and
nothing was computed on padding.

## Results

After {dataset["rows"]["train"]:,} rows of training data, on {dataset["rows"]["test"]:,} rows that were held out:

{summary(results)}

## Use

```python
{usage.strip()}
```
"""
    return assemble_card(metadata, text, [model, dataset], results)


def assemble_card(metadata: ModelCardData, text: str, sources: Iterable[Results], results: Results) -> ModelCard:
    """
    A card that ends with what a run was made of.

    Args:
        metadata ([`~huggingface_hub.ModelCardData`]): What stands on top of it.
        text (`str`): What it has to say, in Markdown.
        sources (`list[dict]`): Models and data sets, as [`describe_source`] gives them.
        results (`dict`): Has `training` and `environment`.
    """
    in_words = "\n".join(map(_in_words, sources))
    return ModelCard(f"""---
{metadata.to_yaml()}
---

{text.strip()}

## Model and data

{in_words}

## Training

{_pairs(results["training"])}

## Environment

{_pairs(results["environment"])}
""")


def _in_words(source: Results) -> str:
    known = f": {source['origin']}. Licence: {source['licence']}." if "origin" in source else ""
    return f"- `{source['name']}`{known}"


def _pairs(values: Mapping[str, Any]) -> str:
    return table(["name", "value"], ([name, str(value)] for name, value in values.items()), names=2)


def table(header: list[str], rows: Iterable[list[str]], names: int = 1) -> str:
    """A table in Markdown that reads well in a terminal too; its first `names` columns are aligned to the left."""
    cells = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rule = ["-" * width if i < names else "-" * (width - 1) + ":" for i, width in enumerate(widths)]

    def line(row: list[str]) -> str:
        padded = [f"{cell:<{width}}" for cell, width in zip(row[:names], widths, strict=False)]
        padded += [f"{cell:>{width}}" for cell, width in zip(row[names:], widths[names:], strict=True)]
        return f"| {' | '.join(padded)} |"

    return "\n".join(map(line, [header, rule, *cells[1:]]))
