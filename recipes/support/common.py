"""Arguments, data and models that the recipes share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, HfArgumentParser, PreTrainedTokenizerBase, TrainingArguments

from hf_dynmask import DynMaskConfig, from_transformers
from support.samples import resolve_dataset

if TYPE_CHECKING:
    from datasets import DatasetDict

IGNORED = -100  # the label of tokens that are not targets

TRAINING_DEFAULTS = {
    "warmup_steps": 0.1,
    "weight_decay": 0.01,
    "save_strategy": "no",
    "dataloader_pin_memory": torch.accelerator.is_available(),
    "use_cpu": not torch.accelerator.is_available(),  # Accelerate must know it before it connects processes
}


NOT_REPORTED = {"output_dir", "model_card_dir", "resume_from_checkpoint"}  # arguments that do not affect results


@dataclass(kw_only=True)
class ReportArguments:
    """
    Arguments of every recipe.

    Attributes:
        given (`dict[str, Any]`): Arguments of all dataclasses that differ from the defaults, except folders.
    """

    given: dict[str, Any] = field(init=False, default_factory=dict)
    model_card_dir: str | None = field(
        default=None, metadata={"help": "A folder for a second copy of results, figure and model card."}
    )


@dataclass(kw_only=True)
class CommonArguments(ReportArguments):
    """Arguments of every recipe that trains a model."""

    baseline: bool = field(
        default=False,
        metadata={
            "help": "Also train on padded batches, from the same weights: the stock model, or the same model if there "
            "is no stock one."
        },
    )


@dataclass(kw_only=True)
class DropoutArguments(CommonArguments):
    """Arguments of a recipe whose models have their own dropout."""

    dropout: float | None = field(
        default=None,
        metadata={
            "help": "Dropout of hidden states and attention weights. None: the model's own; with --baseline 0, so that "
            "both runs train in the same way."
        },
    )


def parse_arguments(
    classes: Sequence[type], arguments: Sequence[str] | None, defaults: Mapping[str, Any] | None = None
) -> tuple[Any, ...]:
    """
    Parses the command line into an instance of each dataclass.

    Args:
        classes (`list[type]`): The dataclasses; a [`ReportArguments`] comes first.
        arguments (`list[str]`, *optional*): Arguments to parse instead of the command line's.
        defaults (`dict[str, Any]`, *optional*): The recipe's defaults, in addition to `TRAINING_DEFAULTS`.
    """
    parser = HfArgumentParser(classes)  # pyright: ignore[reportArgumentType]: the annotation does not allow classes
    if any(issubclass(each, TrainingArguments) for each in classes):
        parser.set_defaults(**TRAINING_DEFAULTS)
    parser.set_defaults(**defaults or {})
    found = parser.parse_args_into_dataclasses(arguments)
    if isinstance(found[0], ReportArguments):
        parsed, usual = (vars(parser.parse_args(texts)) for texts in (arguments, []))
        given = {name: value for name, value in parsed.items() if name not in NOT_REPORTED and value != usual[name]}
        found[0].given.update(given)
    return found


# --- Data ------------------------------------------------------------------------------------------------------------


def load_columns(source: str, *columns: str) -> DatasetDict:
    """
    Loads columns of a data set.

    Args:
        source (`str`): As in [`resolve_dataset`].
        columns (`str`): Names of the columns.

    Returns:
        `DatasetDict`: The splits `train` and `test` with only these columns.

    Raises:
        ValueError: A column is missing.
    """
    data = resolve_dataset(source)
    found = data["train"].column_names
    if not set(columns) <= set(found):
        wanted = " and ".join(f"`{name}`" for name in columns)
        plural = "s" if len(columns) > 1 else ""
        raise ValueError(f"data set `{source}` must have the column{plural} {wanted}; got {', '.join(found)}")
    return data.select_columns(list(columns))


def load_texts(source: str, *columns: str) -> DatasetDict:
    """[`load_columns`] for columns of texts. Rows with an empty text are left out."""
    data = load_columns(source, *columns)
    check_texts(data, *columns)
    return data.filter(lambda row: all(text and text.strip() for text in row.values()))


def check_texts(data: DatasetDict, *columns: str) -> None:
    """Raises a `ValueError` if a column of `train` does not hold texts."""
    for name in columns:
        if data["train"].features[name].dtype not in ("string", "large_string"):
            raise ValueError(f"column `{name}` must hold texts; got {data['train'].features[name].dtype}")


# --- Models ----------------------------------------------------------------------------------------------------------


def load_model(checkpoint: str, task: str, auto_class: Any, **settings: Any) -> Any:
    """
    Loads a DynMask checkpoint, or converts a stock one.

    Args:
        checkpoint (`str`): A folder or a Hub id.
        task (`str`): As in [`from_transformers`].
        auto_class (`type`): The Auto class of the task, such as [`~transformers.AutoModelForTokenClassification`].
        settings (*optional*): Fields of the configuration.
    """
    if AutoConfig.from_pretrained(checkpoint).model_type == DynMaskConfig.model_type:
        return auto_class.from_pretrained(checkpoint, **settings)
    return from_transformers(checkpoint, task, **settings)


def dropout_of(probability: float) -> dict[str, float]:
    """Configuration fields for dropout of hidden states and attention weights."""
    return {"hidden_dropout_prob": probability, "attention_probs_dropout_prob": probability}


def dropout_settings(recipe: DropoutArguments) -> dict[str, float]:
    """Configuration fields for the dropout that the arguments ask for; empty if the model keeps its own."""
    if recipe.dropout is None and not recipe.baseline:
        return {}
    return dropout_of(recipe.dropout or 0.0)


def names_of(labels: Sequence[str]) -> dict[str, Any]:
    """Configuration fields for classes: `id2label` and `label2id`."""
    return {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}


def special_token_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Configuration fields of a tokenizer: `pad_token_id`, `bos_token_id` and `eos_token_id`."""
    return {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
