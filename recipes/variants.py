"""Variants of a training on several seeds: what each measures, how sure a difference is, a table and a figure of it."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from math import sqrt
from statistics import mean, stdev
from typing import NamedTuple

from matplotlib.figure import Figure
from scipy.stats import t as student_t
from transformers import TrainingArguments, set_seed

from common import table

Measured = dict[str, float]  # by the names of `METRICS`
Variants = dict[str, Callable[[TrainingArguments], Measured]]  # by name
Runs = dict[str, dict[str, list[float]]]  # by variant and metric, a number for each seed

CONFIDENCE = 0.95


class Metric(NamedTuple):
    digits: int
    more_is_better: bool = False


METRICS = {"accuracy": Metric(3, True), "held-out loss": Metric(3), "perplexity": Metric(1), "seconds": Metric(1)}


def measure(variants: Variants, training: TrainingArguments, seeds: Iterable[int]) -> Runs:
    """Trains all variants on one seed, then on the next: what slows the machine down for a while hits them all."""
    runs: Runs = {name: {} for name in variants}
    for seed in seeds:
        for name, train in variants.items():
            set_seed(seed)
            for metric, value in train(replace(training, seed=seed)).items():
                runs[name].setdefault(metric, []).append(value)
    return runs


def difference(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    """
    The mean of the differences seed by seed, and half the width of its confidence interval (Student's t).

    Args:
        ours, theirs (`list[float]`): A number for each seed, at least two.
    """
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    quantile = float(student_t.ppf((1 + CONFIDENCE) / 2, len(differences) - 1))
    return mean(differences), quantile * stdev(differences) / sqrt(len(differences))


def finding(metric: str, ours: Sequence[float], theirs: Sequence[float]) -> str:
    """What `ours` changes, in words."""
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
    """Means and standard deviations in a table, and what the last variant makes of each other one."""
    *others, last = runs
    metrics = list(runs[last])
    rows = [[name, *(_spread(metric, run[metric]) for metric in metrics)] for name, run in runs.items()]
    findings = [
        f"- `{last}` against `{name}`: "
        + "; ".join(finding(metric, runs[last][metric], runs[name][metric]) for metric in metrics)
        + "."
        for name in others
    ]
    return "\n".join([table(["variant", *metrics], rows), "", *findings])


def _spread(metric: str, values: Sequence[float]) -> str:
    digits = METRICS[metric].digits
    return f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}"


def draw(parts: Sequence[Runs]) -> Figure:
    """A row of panels for each part, one a metric: the seeds, their mean and standard deviation."""
    columns = max(len(run) for runs in parts for run in runs.values())
    figure = Figure(figsize=(3.2 * columns, 1.8 * len(parts)), layout="constrained")
    for row, runs in enumerate(parts):
        metrics = list(next(iter(runs.values())))
        for column, metric in enumerate(metrics):
            axis = figure.add_subplot(len(parts), columns, row * columns + column + 1)
            for place, run in enumerate(runs.values()):
                axis.plot(run[metric], [place] * len(run[metric]), "o", color="tab:orange", markersize=4)
                axis.errorbar(mean(run[metric]), place, xerr=stdev(run[metric]), fmt="|", color="tab:blue", capsize=4)
            axis.set_xlabel(metric)
            axis.set_yticks(range(len(runs)), list(runs) if column == 0 else [""] * len(runs))
            axis.set_ylim(len(runs) - 0.5, -0.5)
    return figure
