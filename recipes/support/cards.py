"""The results of a recipe: the description of a run, the results file, the summary, the figure and the model card."""

import hashlib
import json
import platform
import shlex
from collections.abc import Iterable, Mapping
from importlib import import_module
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from matplotlib.figure import Figure
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from transformers import PreTrainedModel, TrainingArguments

from support.masks_and_lengths import draw, lengths_in_words, masks_in_words
from support.samples import DATASETS, MODELS, PREFIX

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
    "padded": "the same model, padded batches",  # if there is no equivalent stock model
}
RUNS_OF_STOCK_MODELS = {"dynmask": "stock model, dynmask", "stock": "stock model, sdpa"}  # by `attn_implementation`
OF_THE_HUB = ("licence_id", "languages", "hub_id", "hub_config", "hub_split")  # attributes of a sample for metadata
HUB_METRICS = {"rouge1": "rouge", "rouge2": "rouge", "rougeL": "rouge"}  # metrics whose names differ on the Hub
LIMITS = (
    "With the recipe's default settings, the model is small and trains for minutes: it shows that the recipe works, "
    "but is not meant for use. Quality and speed were measured in a single training run, and vary with seeds and "
    "machines. The model reproduces its training data, which have not been checked for errors, bias or private "
    "information."
)


# --- The description of a run ----------------------------------------------------------------------------------------


def describe_source(source: str) -> Results:
    """Describes a model or data set: its name, its Hub id if it has one, and for a sample its origin and licence."""
    samples = {f"{PREFIX}{name}": sample for name, sample in (MODELS | DATASETS).items()}
    if source in samples:
        sample = samples[source]
        known = {name: value for name in OF_THE_HUB if (value := getattr(sample, name, None))}
        return {"name": source, "origin": sample.source, "licence": sample.licence, **known}
    return {"name": source} if Path(source).exists() else {"name": source, "hub_id": source}


def describe_new_model(model: PreTrainedModel) -> Results:
    """Describes a model that is trained from random weights."""
    return {"name": f"{type(model).__name__}, {model.num_parameters() / 1e6:.1f} million weights, random at first"}


def describe_training(arguments: TrainingArguments) -> Results:
    """The hyperparameters of a run as plain values."""
    values = arguments.to_sanitized_dict()
    return {name: values[name] for name in HYPER_PARAMETERS}


def describe_environment(device: torch.device) -> Results:
    """What speed depends on: versions, device and threads."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    packages = {package: version(package) for package in ("torch", "transformers", "accelerate")}
    return {"device": name, "threads": torch.get_num_threads(), "python": platform.python_version(), **packages}


def _cpu_name() -> str:
    information = Path("/proc/cpuinfo")  # only on Linux; elsewhere `platform` knows the name
    lines = information.read_text().splitlines() if information.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


# --- The report ------------------------------------------------------------------------------------------------------


def write_json(path: Path, results: Results) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(as_json(results))


def as_json(results: Results) -> bytes:
    """The contents of a results file."""
    return (json.dumps(results, indent=2) + "\n").encode()


def report(results: Results, card: ModelCard, training: TrainingArguments, model_card_dir: str | None) -> None:
    """Writes results, card and figure, and prints a summary, on the main process."""
    if training.process_index > 0:
        return
    save_report(results, card, draw(results), str(training.output_dir), model_card_dir)
    print(summary(results))


def save_report(results: Results, card: ModelCard, figure: Figure, output_dir: str, model_card_dir: str | None) -> None:
    """Saves results, card and figure next to the model and, under the recipe's name, in the folder of model cards."""
    picture = as_png(figure, results)
    write_json(Path(output_dir, "results.json"), results)
    save_card(results, card, picture, Path(output_dir, "README.md"))
    if model_card_dir is not None:
        write_json(Path(model_card_dir, f"{results['recipe']}.json"), results)
        save_card(results, card, picture, Path(model_card_dir, f"{results['recipe']}.md"))


def save_card(results: Results, card: ModelCard, picture: bytes, path: Path) -> None:
    """Saves a card and its figure."""
    card.save(path)
    path.with_name(figure_name(results)).write_bytes(picture)


def figure_name(results: Results) -> str:
    return f"{results['recipe']}.png"


def as_png(figure: Figure, results: Results) -> bytes:
    """A small picture with 64 colours, whose metadata identify the results it was drawn from."""
    drawn, file, remark = BytesIO(), BytesIO(), PngInfo()
    figure.savefig(drawn, format="png", dpi=100)
    remark.add_text("Source", source_of_figure(results))
    Image.open(drawn).convert("RGB").quantize(64).save(file, "png", pnginfo=remark, optimize=True)
    return file.getvalue()


def source_of_figure(results: Results) -> str:
    return f"results with the SHA-256 {hashlib.sha256(as_json(results)).hexdigest()}"


def rebuild(path: Path) -> None:
    """Rebuilds the card and the figure from a results file, which is named after its recipe."""
    results = json.loads(path.read_text(encoding="utf-8"))
    recipe = import_module(results["recipe"])
    figure = getattr(recipe, "make_figure", draw)(results)
    save_card(results, recipe.make_card(results), as_png(figure, results), path.with_suffix(".md"))


def summary(results: Results) -> str:
    """A summary of the results in Markdown."""
    runs, metric = results["runs"], results["metric"]
    metrics = [metric, *results.get("others", [])]
    unit = results.get("unit", "tokens")
    names = RUNS_OF_STOCK_MODELS if "library" in results else RUNS
    rows = [
        [
            names[name],
            *_measured(run, metrics),
            f"{run['tokens_per_second']:,.0f}",
            f"{run['train_seconds']:,.0f}",
        ]
        for name, run in runs.items()
    ]
    if "untrained" in results:
        rows.append(["none", *_measured(results["untrained"], metrics), "", ""])
    parts = [
        table(["training", *metrics, f"real {unit} per second", "seconds"], rows),
        f"Padding avoided: {results['padding_share']:.1%} of the places in padded batches.",
    ]
    for name, words in {"trivial": "Without a model", "untrained": "Without this training"}.items():
        if name in results:
            reference, found = results[name], runs["dynmask"][metric]
            parts.append(
                f"{words} ({reference['what']}): {metric} {reference[metric]:.3f}. "
                f"The trained model differs by {found - reference[metric]:+.3f}."
            )
    for padded in runs.keys() - {"dynmask"}:
        ratio = runs["dynmask"]["tokens_per_second"] / runs[padded]["tokens_per_second"]
        parts.append(f"Speed-up over padded batches: {ratio:.2f}.")
    return "\n\n".join(parts)


def _measured(run: Results, metrics: list[str]) -> list[str]:
    return [f"{run[measure]:.3f}" for measure in metrics]


def model_card(results: Results, title: str, usage: str, limits: str) -> ModelCard:
    """
    Makes a model card from results alone.

    Args:
        results (`dict`):
            `recipe`, `task` (its name on the Hub), `metric`, `model` and `dataset` (from [`describe_source`], with the
            number of `rows` of each split), `runs` (from [`train_and_evaluate`]), `padding_share`, `training`, `masks`
            and `lengths` (from [`describe_masks`] and [`describe_lengths`]), `environment`, `arguments` (those that
            differ from the defaults). Optional: `others` (further metrics), `trivial` (from [`best_constant`]),
            `untrained` (the same for the model before training), `unit` (what the model reads, if not tokens),
            `library` (the Hub's name of the library, if the model is a stock one with
            `attn_implementation="dynmask"`).
        title (`str`): The heading.
        usage (`str`): Python code that uses the model.
        limits (`str`): Limits that are due to the task.
    """
    model, dataset = results["model"], results["dataset"]
    metadata = ModelCardData(
        **common_metadata(model, [dataset], results.get("library", "transformers")),
        pipeline_tag=results["task"],
        metrics=list(dict.fromkeys(measured.metric_type for measured in evaluations(results))),
        model_name=results["recipe"],
        eval_results=evaluations(results),
    )
    batches = 'padded batches with `attn_implementation="dynmask"`' if "library" in results else "batches with lengths"
    text = f"""
# {title}

`{model["name"]}`, trained by `recipes/{results["recipe"]}.py` on `{dataset["name"]}`, on {batches}.
No padding was computed.

## Results

After training on {dataset["rows"]["train"]:,} rows, evaluated on {dataset["rows"]["test"]:,} held-out rows:

{summary(results)}

## Masks and lengths

{masks_in_words(results["masks"])}

Lengths of the training rows:

{lengths_in_words(results["lengths"])}

![The masks, over sequences whose lengths are the quartiles of the training rows, and a histogram of \
the lengths]({figure_name(results)})

## Use

```python
{usage.strip()}
```
"""
    return assemble_card(metadata, text, f"{limits} {LIMITS}", [model, dataset], results)


def common_metadata(model: Results, datasets: list[Results], library: str = "transformers") -> Results:
    """Metadata of every card. `model` and `datasets` are from [`describe_source`]."""

    def known(name: str, sources: list[Results]) -> list[str] | None:
        """The values of all sources, each once."""
        return list(dict.fromkeys(source[name] for source in sources if name in source)) or None

    languages = (language for dataset in datasets for language in dataset.get("languages", []))
    return {
        "library_name": library,
        "tags": ["hf_dynmask"],
        "license": known("licence_id", [model, *datasets]),
        "language": list(dict.fromkeys(languages)) or None,
        "base_model": model.get("hub_id"),
        "datasets": known("hub_id", datasets),
    }


def evaluations(results: Results) -> list[EvalResult]:
    """The entries of the metrics in the model index of the card."""
    dataset = results["dataset"]
    metrics: list[str] = [results["metric"], *results.get("others", [])]
    return [
        EvalResult(
            task_type=results["task"],
            dataset_type=dataset.get("hub_id", dataset["name"]),
            dataset_name=dataset["name"],
            dataset_config=dataset.get("hub_config"),
            dataset_split=dataset.get("hub_split") if "hub_id" in dataset else "test",
            dataset_args={"rows": dataset["rows"]["test"]},
            metric_type=HUB_METRICS.get(metric, metric),
            metric_name=metric,
            metric_value=results["runs"]["dynmask"][metric],
        )
        for metric in metrics
    ]


def assemble_card(
    metadata: ModelCardData, text: str, limits: str, sources: Iterable[Results], results: Results
) -> ModelCard:
    """
    Makes a card that ends with limits, sources, command, hyperparameters and environment.

    Args:
        metadata ([`~huggingface_hub.ModelCardData`]): Metadata at the top.
        text (`str`): The text in Markdown.
        limits (`str`): Limits of the model.
        sources (`list[dict]`): Models and data sets, from [`describe_source`].
        results (`dict`): Has `recipe`, `arguments`, `training` and `environment`.
    """
    in_words = "\n".join(map(_in_words, sources))
    return ModelCard(f"""---
{metadata.to_yaml()}
---

{text.strip()}

## Limits and risks

{limits}

## Model and data

{in_words}

## How to reproduce

```bash
{command(results)}
```

## Training

{_pairs(results["training"])}

## Environment

{_pairs(results["environment"])}
""")


def command(results: Results) -> str:
    """The command that repeats the training, run from the root of the repository."""
    processes = results["environment"].get("processes", 1)
    launcher = ["python"] if processes == 1 else ["accelerate", "launch", "--num_processes", str(processes)]
    return shlex.join([*launcher, f"recipes/{results['recipe']}.py", *options(results["arguments"])])


def options(arguments: Mapping[str, Any]) -> list[str]:
    """Arguments as words of a command line."""
    words = []
    for name, value in arguments.items():
        values = [] if value is True else value if isinstance(value, list) else [value]
        words += [f"--{name}", *map(str, values)]
    return words


def _in_words(source: Results) -> str:
    known = f": {source['origin']}. Licence: {source['licence']}." if "origin" in source else ""
    return f"- `{source['name']}`{known}"


def _pairs(values: Mapping[str, Any]) -> str:
    return table(["name", "value"], ([name, str(value)] for name, value in values.items()), names=2)


def table(header: list[str], rows: Iterable[list[str]], names: int = 1) -> str:
    """A Markdown table that is also legible in a terminal. The first `names` columns are left-aligned."""
    cells = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rule = ["-" * width if i < names else "-" * (width - 1) + ":" for i, width in enumerate(widths)]

    def line(row: list[str]) -> str:
        padded = [f"{cell:<{width}}" for cell, width in zip(row[:names], widths, strict=False)]
        padded += [f"{cell:>{width}}" for cell, width in zip(row[names:], widths[names:], strict=True)]
        return f"| {' | '.join(padded)} |"

    return "\n".join(map(line, [header, rule, *cells[1:]]))
