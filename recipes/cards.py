"""The results of a recipe: what a run was made of, the results file, a summary and the model card."""

import json
import platform
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import (
    PreTrainedModel,
    TrainingArguments,
)

from samples import DATASETS, MODELS, PREFIX

Results = dict[str, Any]

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
