"""Code that the heads of all encoders share: from a batch to flat states, and from flat states to a loss and logits.

Shape legend: B rows of width T, S sequences, N real tokens, C hidden size.
"""
# transformers' own typing of `**kwargs` repeats named parameters, and its configurations' fields are optional.
# pyright: reportGeneralTypeIssues=false, reportPrivateImportUsage=false, reportArgumentType=false
# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportOptionalIterable=false

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_outputs import (
    BaseModelOutputWithPoolingAndCrossAttentions,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple

from .batch import PACKING, given_input, is_explicit, layout_of_batch
from .field_shapes import takes_fields
from .layout import SequenceLayout
from .losses import flat_labels, sequence_loss, token_loss
from .modeling_base import DynMaskBaseModel, known_keywords


def classifier_dropout(config: PreTrainedConfig) -> nn.Dropout:
    """The dropout before a classifier: `classifier_dropout`, or `hidden_dropout_prob` if that is `None`."""
    return nn.Dropout(config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout)


def run_encoder(
    model: DynMaskBaseModel,
    lengths: Tensor | None = None,
    attention_mask: Tensor | None = None,
    missing: Tensor | None = None,
    input_features: Tensor | None = None,
    **inputs,
) -> tuple[BaseModelOutputWithPoolingAndCrossAttentions, SequenceLayout]:
    """Runs a bare model; returns its outputs, whose `last_hidden_state (1, N, C)` is flat, and the layout."""
    tokens = given_input(model.main_input_name, input_features=input_features, **inputs)
    packing = {name: inputs.pop(name, None) for name in PACKING}
    if input_features is None:
        layout = layout_of_batch(
            tuple(tokens.shape[:2]),
            tokens.device,
            lengths,
            attention_mask,
            missing,
            position_ids=inputs.get("position_ids"),
            packing=packing,
        )
    else:
        inputs["inputs_embeds"], layout = model.embed_features(
            tokens, lengths, attention_mask, missing, inputs.get("position_ids"), packing
        )
    inputs["return_dict"] = True
    explicit = attention_mask if is_explicit(attention_mask) else None
    return model(layout=layout, attention_mask=explicit, **inputs), layout


class TaskModel(PreTrainedModel):
    """A head on an encoder. Subclasses define the encoder, and how flat states become a loss and logits."""

    output_class: type
    model: Any
    pooling = False

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = self._new_encoder(config)
        self.dropout = classifier_dropout(config)
        self._add_head(config)
        self.post_init()

    def _new_encoder(self, config) -> PreTrainedModel:
        raise NotImplementedError

    def _add_head(self, config) -> None:
        raise NotImplementedError

    def _new_transform(self, config) -> nn.Module:
        """The module between the states of tokens and the classifier's dropout."""
        return nn.Identity()

    def _predict(
        self,
        outputs: BaseModelOutputWithPoolingAndCrossAttentions,
        layout: SequenceLayout,
        labels: Tensor | None,
        num_items_in_batch: Tensor | int | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """(loss, logits in the batch's layout) from `outputs`, whose `last_hidden_state` is flat."""
        raise NotImplementedError

    @known_keywords()
    @can_return_tuple
    @takes_fields("")
    def forward(
        self,
        input_ids: Tensor | None = None,
        lengths: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        missing: Tensor | None = None,
        input_features: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ):
        r"""
        Inputs as in [`DynMaskModel.forward`], and:

        Args:
            labels (`Tensor`): Targets, -100 for none. The class documents their shape.
            num_items_in_batch (`int` or `Tensor`): Number of targets in all batches of a step, by which the summed loss
                is divided. `None`: the number of targets in this batch.
        """
        outputs, layout = self._encode(
            input_ids=input_ids,
            lengths=lengths,
            attention_mask=attention_mask,
            position_ids=position_ids,
            token_type_ids=token_type_ids,
            inputs_embeds=inputs_embeds,
            missing=missing,
            input_features=input_features,
            **kwargs,
        )
        loss, logits = self._predict(outputs, layout, labels, num_items_in_batch)
        return self.output_class(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )

    def _encode(self, **inputs) -> tuple[BaseModelOutputWithPoolingAndCrossAttentions, SequenceLayout]:
        """The encoder's outputs, whose `last_hidden_state` is flat, and their layout."""
        return run_encoder(self.model, **inputs)


class TokenClassification(TaskModel):
    """The head of [`DynMaskForTokenClassification`], for any encoder."""

    output_class = TokenClassifierOutput

    def _add_head(self, config):
        self.transform = self._new_transform(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)

    def _predict(self, outputs, layout, labels, num_items_in_batch):
        logits = self.classifier(self.dropout(self.transform(outputs.last_hidden_state)))
        loss = None
        if labels is not None:
            loss = token_loss(logits, flat_labels("labels", labels, layout), num_items_in_batch)
        return loss, layout.unflatten(logits)


class SequenceClassification(TaskModel):
    """The head of [`DynMaskForSequenceClassification`], for any encoder."""

    output_class = SequenceClassifierOutput
    pooling = True

    def _add_head(self, config):
        self.classifier = nn.Linear(config.hidden_size, config.num_labels, bias=config.classifier_bias)

    def _predict(self, outputs, layout, labels, num_items_in_batch):
        logits = self.classifier(self.dropout(outputs.pooler_output))
        if labels is None:
            return None, logits
        return sequence_loss(logits, labels, layout, self.config, num_items_in_batch), logits


def in_columns(
    values: Tensor, layout: SequenceLayout, to_keep: int | Tensor, function: Callable[[Tensor], Tensor] = lambda x: x
) -> Tensor:
    """Applies a function to flat values `(1, N, …)`; returns columns of the result in the batch's layout.

    `to_keep` is the number of last columns, 0 for all columns, or a tensor of columns. The function is only computed
    for these columns. The result `(B, columns, …)` is 0 at absent tokens.
    """
    if isinstance(to_keep, int) and to_keep == 0:
        return layout.unflatten(function(values))
    columns = slice(-to_keep, None) if isinstance(to_keep, int) else to_keep.to(values.device)
    computed = function(layout.unflatten(values)[:, columns])
    is_real = layout.unflatten(values.new_ones(1, layout.num_tokens, dtype=torch.bool))[:, columns]
    return computed.where(is_real.view(*is_real.shape, *(1,) * (computed.dim() - 2)), 0)
