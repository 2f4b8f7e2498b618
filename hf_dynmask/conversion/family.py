"""Describes a family of stock models, so that its checkpoints can be converted to DynMask and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

from transformers import PreTrainedConfig

from ..modeling.configuration_dynmask import DynMaskConfig
from ..modeling.configuration_dynmask_seq2seq import DynMaskSeq2SeqConfig
from .weights import Link

Names = Mapping[str | tuple[str, ...], str]
Settings = dict[str, Any]
OurConfig = DynMaskConfig | DynMaskSeq2SeqConfig

# Heads whose names are the same in several families.
TOKEN_HEADS: dict[str, Names] = {
    "token-classification": {"classifier": "classifier"},
    "question-answering": {"qa_outputs": "qa_outputs"},
}
# Tasks whose heads read the pooled states of a sequence.
POOLED = ("sequence-classification", "multiple-choice")


@dataclass(frozen=True)
class Family:
    """One stock architecture as data. Mappings of names always go from ours to theirs.

    Config fields with the same name on both sides are copied. A field of [`DynMaskConfig`] that the family does not
    mention keeps its default.

    Args:
        model_types (`tuple[str, ...]`): The stock configurations' `model_type`.
        modules (`dict[str | tuple[str, ...], str]`):
            Modules of the base model that hold weights; `{i}` is the index of the layer. A tuple of our modules holds
            equal parts of one stock module.
        heads (`dict[str, dict[str, str]]`):
            For each task, the modules or single tensors of the head, by their full names.
        renamed (`dict[str, str]`): Config fields whose names differ.
        implied (`Callable`):
            `(stock_config, task) -> dict`: fields of [`DynMaskConfig`] that follow from the stock code, or from
            settings that only this family or task has.
        restored (`Callable`, *optional*):
            `(dynmask_config, task) -> dict`: the inverse of `implied`.
        required (`Callable`, *optional*):
            `(stock_config, task) -> dict`: values that stock settings must have for the model to be convertible.
        transposed (`tuple[str, ...]`, *optional*):
            Last part of the names of stock modules that store weights as `(inputs, outputs)`.
        tables (`tuple[str, ...]`, *optional*):
            Last part of the names of stock modules whose weights are computed rather than learned.
        config_class (`type`, *optional*, defaults to [`DynMaskConfig`]):
            The class of our configuration. `renamed` and `implied` may name any field that its constructor takes.
    """

    model_types: tuple[str, ...]
    modules: Names
    heads: Mapping[str, Names]
    renamed: Mapping[str, str]
    implied: Callable[[PreTrainedConfig, str], Settings]
    restored: Callable[[Any, str], Settings] = lambda config, task: {}
    required: Callable[[PreTrainedConfig, str], Settings] = lambda config, task: {}
    transposed: tuple[str, ...] = ()
    tables: tuple[str, ...] = ()
    config_class: type[OurConfig] = DynMaskConfig

    def links(self, task: str, our_prefix: str, their_prefix: str, num_layers: int) -> dict[str, Link]:
        """Links the full name of each stock module to ours. A prefix is the name of the base model in a model with a
        head."""
        ours, theirs = ("", "") if task == "base" else (f"{our_prefix}.", f"{their_prefix}.")
        entries = [(ours, theirs, *pair) for pair in self.modules.items()]
        entries += [("", "", *pair) for pair in self.heads[task].items()]
        links = {}
        for our_start, their_start, our_names, their_name in entries:
            our_names = (our_names,) if isinstance(our_names, str) else our_names
            transposed = their_name.rpartition(".")[2] in self.transposed
            for i in range(max(num_layers, 1)):
                full_names = tuple(f"{our_start}{name}".format(i=i) for name in our_names)
                links[f"{their_start}{their_name}".format(i=i)] = Link(full_names, transposed)
        return links


def all_families() -> dict[str, Family]:
    """All families that the modules of this package declare, by model type."""
    package = __name__.rpartition(".")[0]
    modules = [import_module(f"{package}.{found.name}") for found in iter_modules([str(Path(__file__).parent)])]
    families = [value for module in modules for value in vars(module).values() if isinstance(value, Family)]
    return {model_type: family for family in families for model_type in family.model_types}


def classifier_dropout(config: PreTrainedConfig) -> float:
    """The dropout before a classifier, in our configuration or a stock one. `None` means `hidden_dropout_prob`."""
    return config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
