"""Trains the model of a recipe and its baselines, and writes results and model card."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from huggingface_hub import ModelCard

from support.cards import Results, describe_new_model, describe_source, describe_training, model_card, report
from support.measuring import Baselines, Lengths, compare


@dataclass(frozen=True, kw_only=True)
class About:
    """
    The parts of results and model card that do not depend on a run.

    Args:
        recipe, task (`str`): Name of the recipe, and of the task on the Hub.
        metrics (`list[str]`): Metrics of quality, the main one first.
        title (`str`): Heading of the card. `{labels}` is replaced with the names of the classes.
        usage, limits (`str`): As in [`model_card`].
        unit (`str`, *optional*): What the model reads, if not tokens.
        library (`str`, *optional*): The Hub's name of the library, if the model is not one of transformers.
    """

    recipe: str
    task: str
    metrics: list[str]
    title: str
    usage: str
    limits: str
    unit: str | None = None
    library: str | None = None

    def make_card(self, results: Results) -> ModelCard:
        title = self.title.format(labels=", ".join(results.get("labels", [])))
        return model_card(results, title=title, usage=self.usage, limits=self.limits)


def train_and_report(
    about: About,
    recipe: Any,
    trainer: Any,
    load: Callable[[str], Any],
    baselines: Baselines,
    settings: dict[str, Any],
    rows: Mapping[Any, Any] | None = None,
    lengths: Lengths | None = None,
    **facts: Any,
) -> None:
    """
    Trains, saves and evaluates a model, then its baselines from the same weights. Writes and prints the results.

    Args:
        about ([`About`]): The recipe.
        recipe ([`CommonArguments`]): The arguments of the recipe.
        trainer ([`~transformers.Trainer`]): The trainer of the new model. Its `compute_metrics` returns the metrics.
        load (`Callable`): Loads the saved model from its folder.
        baselines (`dict[str, tuple[PreTrainedModel, Callable]]`): Models and their collators, by name in `cards.RUNS`.
        settings (`dict[str, Any]`): Hyperparameters to report in addition to those of the trainer.
        rows (`dict[str, Dataset]`, *optional*): The splits whose rows are counted. `None`: those of the trainer.
        lengths (`dict[str, list[int]]`, *optional*): As in [`compare`].
        facts (*optional*): Further entries of the results: `labels`, `trivial`, `untrained`.
    """
    compared = compare(trainer, baselines, load, about.metrics, lengths)
    metric, *others = about.metrics
    source = getattr(recipe, "model", None)
    rows = rows or {"train": trainer.train_dataset, "test": trainer.eval_dataset}
    results = {
        "recipe": about.recipe,
        "arguments": recipe.given,
        "task": about.task,
        "metric": metric,
        **({"others": others} if others else {}),
        **({"unit": about.unit} if about.unit else {}),
        **({"library": about.library} if about.library else {}),
        "model": describe_new_model(trainer.model) if source is None else describe_source(source),
        "dataset": describe_source(recipe.dataset) | {"rows": {name: len(split) for name, split in rows.items()}},
        **facts,
        "training": describe_training(trainer.args) | settings,
        **compared,
    }
    report(results, about.make_card(results), trainer.args, recipe.model_card_dir)
