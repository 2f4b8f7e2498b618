"""What a recipe does with its trainer: trains it, compares it with a baseline, writes results and model card."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from huggingface_hub import ModelCard

from support.cards import Results, describe_new_model, describe_source, describe_training, model_card, report
from support.measuring import Baselines, Lengths, compare


@dataclass(frozen=True, kw_only=True)
class About:
    """
    What the results and the model card of a recipe say that does not come from a run.

    Args:
        recipe, task (`str`): Name of the recipe, and of the task as the Hub has it.
        metrics (`list[str]`): Measures of quality, the main one first.
        title (`str`): Heading of the card; `{labels}` stands for the names of the classes.
        usage, limits (`str`): Of the card, as [`model_card`] takes them.
        unit (`str`, *optional*): What the model reads, if not tokens.
        library (`str`, *optional*): Which one the model is of, if not transformers; the Hub's name.
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
    Trains, saves and evaluates a model, then its baselines from the same weights; writes and prints what came out.

    Args:
        about ([`About`]): The recipe.
        recipe ([`CommonArguments`]): Its arguments.
        trainer ([`~transformers.Trainer`]): Of the model, not trained yet; its `compute_metrics` gives the metrics.
        load (`Callable`): Loads the saved model from its folder.
        baselines (`dict[str, tuple[PreTrainedModel, Callable]]`): Models and their collators, by name in `cards.RUNS`.
        settings (`dict[str, Any]`): What the table of hyper-parameters says beside those of the trainer.
        rows (`dict[str, Dataset]`, *optional*): The splits to count, if not those of the trainer.
        lengths (`dict[str, list[int]]`, *optional*): Of texts that the trainer tokenizes, as [`compare`] takes them.
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
