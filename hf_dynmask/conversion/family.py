"""The description of a family of stock models that converts its checkpoints to DynMask and back."""

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

# Heads with the same names in several families.
TOKEN_HEADS: dict[str, Names] = {
    "token-classification": {"classifier": "classifier"},
    "question-answering": {"qa_outputs": "qa_outputs"},
}
# Tasks whose heads read what is pooled of a sequence.
POOLED = ("sequence-classification", "multiple-choice")


@dataclass(frozen=True)
class Family:
    """One stock architecture as data. Pairs are always ours -> theirs.

    Config fields with the same name on both sides carry over; a field of [`DynMaskConfig`] that the family does not
    mention has its default.

    Args:
        model_types (`tuple[str, ...]`): The stock configurations' `model_type`.
        modules (`dict[str | tuple[str, ...], str]`):
            Modules of the bare model that hold weights; `{i}` is the index of the layer. Several of ours may be equal
            parts of one of theirs.
        heads (`dict[str, dict[str, str]]`):
            For each task, further modules or single tensors, by their full names.
        renamed (`dict[str, str]`): Config fields whose names differ.
        implied (`Callable`):
            `(stock_config, task) -> dict`: fields of [`DynMaskConfig`] that follow from the stock code, or from
            settings that only this family or task has.
        restored (`Callable`, *optional*):
            `(dynmask_config, task) -> dict`: the inverse of `implied`.
        required (`Callable`, *optional*):
            `(stock_config, task) -> dict`: values that stock settings must have for the model to be convertible.
        transposed (`tuple[str, ...]`, *optional*):
            Last parts of the names of stock modules that store weights as `(inputs, outputs)`.
        tables (`tuple[str, ...]`, *optional*):
            Last parts of the names of stock modules whose weights are computed rather than learned.
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
        """Links each stock module's full name to ours. A prefix is the bare model's name in a model with a head."""
        ours, theirs = ("", "") if task == "base" else (f"{our_prefix}.", f"{their_prefix}.")
        pairs = [(ours, theirs, *pair) for pair in self.modules.items()]
        pairs += [("", "", *pair) for pair in self.heads[task].items()]
        links = {}
        for our_place, their_place, names, name in pairs:
            names = (names,) if isinstance(names, str) else names
            transposed = name.rpartition(".")[2] in self.transposed
            for i in range(max(num_layers, 1)):
                full = tuple(f"{our_place}{own}".format(i=i) for own in names)
                links[f"{their_place}{name}".format(i=i)] = Link(full, transposed)
        return links


def all_families() -> dict[str, Family]:
    """The families by model type: all that the files beside this one declare."""
    package = __name__.rpartition(".")[0]
    modules = [import_module(f"{package}.{found.name}") for found in iter_modules([str(Path(__file__).parent)])]
    families = [value for module in modules for value in vars(module).values() if isinstance(value, Family)]
    return {model_type: family for family in families for model_type in family.model_types}


def classifier_dropout(config: PreTrainedConfig) -> float:
    """The dropout before a classifier in either configuration; `None` means `hidden_dropout_prob`."""
    return config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
