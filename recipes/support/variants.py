"""Compares variants of a training on several seeds: measurements, confidence intervals, table, figure and card."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from math import sqrt
from statistics import mean, stdev
from typing import NamedTuple

from huggingface_hub import ModelCard, ModelCardData
from matplotlib.figure import Figure
from scipy.stats import t as student_t
from transformers import TrainingArguments, set_seed

from support.cards import Results, assemble_card, common_metadata, figure_name, save_report, table

Measured = dict[str, float]  # by name in `METRICS`
Variants = dict[str, Callable[[TrainingArguments], Measured]]  # by name
Runs = dict[str, dict[str, list[float]]]  # by variant and metric, a number for each seed

CONFIDENCE = 0.95


class Metric(NamedTuple):
    digits: int
    more_is_better: bool = False


METRICS = {"accuracy": Metric(3, True), "held-out loss": Metric(3), "perplexity": Metric(1), "seconds": Metric(1)}


def measure(variants: Variants, training: TrainingArguments, seeds: Iterable[int]) -> Runs:
    """Trains all variants on one seed, then on the next, so that a temporary slowdown affects all variants."""
    runs: Runs = {name: {} for name in variants}
    for seed in seeds:
        for name, train in variants.items():
            set_seed(seed)
            for metric, value in train(replace(training, seed=seed)).items():
                runs[name].setdefault(metric, []).append(value)
    return runs


def difference(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    """
    The mean difference over the seeds, and half the width of its confidence interval (Student's t).

    Args:
        ours, theirs (`list[float]`): One number per seed, at least two.
    """
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    quantile = float(student_t.ppf((1 + CONFIDENCE) / 2, len(differences) - 1))
    return mean(differences), quantile * stdev(differences) / sqrt(len(differences))


def finding(metric: str, ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Describes in words how `ours` differs from `theirs`."""
    digits, more_is_better = METRICS[metric]
    change, margin = difference(ours, theirs)
    if round(change, digits) == round(margin, digits) == 0:
        verdict = "the same"
    elif abs(change) <= margin:
        verdict = "may be chance"
    else:
        verdict = "better" if (change > 0) == more_is_better else "worse"
    ratio = f", {mean(theirs) / mean(ours):.2f} times as fast" if metric == "seconds" else ""
    return f"{metric} {change:+.{digits}f} ± {margin:.{digits}f} ({verdict}{ratio})"


def summarize(runs: Runs) -> str:
    """
    A table of means and standard deviations, and a comparison of the last variant with each of the others. The others
    may lack some metrics.
    """
    *others, last = runs
    metrics = list(runs[last])
    rows = [[name, *(_spread(metric, run.get(metric, [])) for metric in metrics)] for name, run in runs.items()]
    findings = [
        f"- `{last}` against `{name}`: "
        + "; ".join(finding(metric, runs[last][metric], runs[name][metric]) for metric in runs[name])
        + "."
        for name in others
    ]
    return "\n".join([table(["variant", *metrics], rows), "", *findings])


def _spread(metric: str, values: Sequence[float]) -> str:
    digits = METRICS[metric].digits
    return f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}" if values else ""


def draw(parts: Sequence[Runs]) -> Figure:
    """A row of panels per part, one panel per metric: all seeds with their mean and standard deviation."""
    columns = max(len(run) for runs in parts for run in runs.values())
    figure = Figure(figsize=(3.2 * columns, 1.8 * len(parts)), layout="constrained")
    for row, runs in enumerate(parts):
        *_, last = runs.values()
        for column, metric in enumerate(last):
            axis = figure.add_subplot(len(parts), columns, row * columns + column + 1)
            for place, run in enumerate(runs.values()):
                if values := run.get(metric):
                    axis.plot(values, [place] * len(values), "o", color="tab:orange", markersize=4)
                    axis.errorbar(mean(values), place, xerr=stdev(values), fmt="|", color="tab:blue", capsize=4)
            axis.set_xlabel(metric)
            axis.set_yticks(range(len(runs)), list(runs) if column == 0 else [""] * len(runs))
            axis.set_ylim(len(runs) - 0.5, -0.5)
    return figure


# --- The report ------------------------------------------------------------------------------------------------------


def report(
    results: Results, card: ModelCard, figure: Figure, training: TrainingArguments, model_card_dir: str | None
) -> None:
    """Writes results, card and figure, and prints a summary, on the main process."""
    if training.process_index > 0:
        return
    save_report(results, card, figure, str(training.output_dir), model_card_dir)
    print(summary(results))


def make_figure(results: Results) -> Figure:
    """[`draw`] of all parts."""
    return draw([part["runs"] for part in results["parts"].values()])


def summary(results: Results) -> str:
    """The description and the results of each part."""
    parts = results["parts"].items()
    return "\n\n".join(
        f"### {name.capitalize()}\n\n{part['what']}\n\n{summarize(part['runs'])}" for name, part in parts
    )


def variants_card(results: Results, title: str, limits: str) -> ModelCard:
    """
    Makes a card from results alone.

    Args:
        results (`dict`):
            `recipe`, `model` and `datasets` (from [`describe_source`]), `seeds`, `parts` (by name: `what`, a
            description, and `runs`, from [`measure`]), `arguments`, `training`, `environment`.
        title (`str`): The heading.
        limits (`str`): Limits of the comparison.
    """
    model, datasets = results["model"], results["datasets"]
    metadata = ModelCardData(**common_metadata(model, datasets))
    text = f"""
# {title}

Measured by `recipes/{results["recipe"]}.py` on the seeds {", ".join(map(str, results["seeds"]))}.

## Results

In the tables, `a ± b` is the mean and the standard deviation over the seeds. Below the tables, it is the mean
difference and half the width of its {CONFIDENCE:.0%} confidence interval (Student's t). The intervals are not corrected
for multiple comparisons, so some differences are due to chance.

{summary(results)}

![Each seed, and the mean and standard deviation of all]({figure_name(results)})
"""
    return assemble_card(metadata, text, limits, [model, *datasets], results)
