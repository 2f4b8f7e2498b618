"""What a family of stock models has to say about itself so that its checkpoints convert to DynMask and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig

from ..configuration_dynmask import DynMaskConfig

Names = Mapping[str, str]
Settings = dict[str, Any]

# The heads that have the same names everywhere.
TOKEN_HEADS: Mapping[str, Names] = {
    "token-classification": {"classifier": "classifier"},
    "question-answering": {"qa_outputs": "qa_outputs"},
}


@dataclass(frozen=True)
class Family:
    """One stock architecture, written as data. A pair is always ours -> theirs.

    Config fields that have the same name on both sides carry over by themselves; a field of [`DynMaskConfig`] that the
    family does not mention has its default.

    Args:
        modules (`dict[str, str]`):
            Modules of the bare model that hold weights; `{i}` stands for the number of the layer.
        heads (`dict[str, dict[str, str]]`):
            For each task the modules, or single tensors, beyond `modules`, by their full names.
        renamed (`dict[str, str]`): Config fields with another name.
        implied (`Callable`):
            `(stock_config, task) -> dict`: fields of [`DynMaskConfig`] that follow from the stock code, or from a
            setting that only this family or only this task has.
        restored (`Callable`, *optional*):
            `(dynmask_config, task) -> dict`: the way back of those settings.
        required (`dict[str, dict]`, *optional*):
            For a task, stock settings that must have a value for the model to be convertible.
    """

    modules: Names
    heads: Mapping[str, Names]
    renamed: Names
    implied: Callable[[PreTrainedConfig, str], Settings]
    restored: Callable[[DynMaskConfig, str], Settings] = lambda config, task: {}
    required: Mapping[str, Settings] = field(default_factory=dict)

    def names(self, task: str, our_prefix: str, their_prefix: str, num_layers: int) -> dict[str, str]:
        """Full names, ours -> theirs. A prefix is the name of the bare model in a model with a head."""
        if task != "base":
            modules = {f"{our_prefix}.{ours}": f"{their_prefix}.{theirs}" for ours, theirs in self.modules.items()}
        else:
            modules = self.modules
        pairs = {**modules, **self.heads[task]}
        return {o.format(i=i): t.format(i=i) for i in range(max(num_layers, 1)) for o, t in pairs.items()}


def classifier_dropout(config: PreTrainedConfig) -> float:
    """The dropout before a classifier, on either side: `None` stands for `hidden_dropout_prob`."""
    return config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
