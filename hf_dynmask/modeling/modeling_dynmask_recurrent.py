"""Recurrent baseline: LSTM or GRU layers on the batches of the DynMask models, through `PackedSequence`.

Shape legend: B rows of width T, S sequences, N real tokens, E embedding size, C hidden size.
"""
# transformers' own typing of `**kwargs` repeats named parameters, and its configurations' fields are optional.
# pyright: reportGeneralTypeIssues=false, reportPrivateImportUsage=false, reportArgumentType=false
# pyright: reportOperatorIssue=false

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple

from .batch import PACKING, given_input, layout_of_batch
from .configuration_dynmask_recurrent import DynMaskRecurrentConfig
from .embedding import embed_tokens
from .field_shapes import BATCH_FIELDS
from .heads import SequenceClassification, TaskModel, TokenClassification
from .layout import SequenceLayout, eager_only, integers
from .modeling_base import DynMaskBaseModel, known_keywords

# Arguments of [`DynMaskModel`] that are accepted without effect: cells read tokens in order, without types.
WITHOUT_EFFECT = ("position_ids", "token_type_ids")


class DynMaskRecurrentLayer(nn.Module):
    """One layer of cells over sequences of different lengths; no step is spent on padding."""

    def __init__(self, config: DynMaskRecurrentConfig, input_size: int):
        super().__init__()
        cells = {"lstm": nn.LSTM, "gru": nn.GRU}[config.cell]
        directions = 2 if config.bidirectional else 1
        self.cells = cells(input_size, config.hidden_size // directions, bidirectional=config.bidirectional)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, states: Tensor, layout: SequenceLayout) -> tuple[Tensor, Tensor]:
        """Flat states `(1, N, E)` to flat states `(1, N, C)` and the final states `(S, C)` of each sequence."""
        order, batch_sizes, longest_first = packing(layout)
        self.cells.flatten_parameters()
        packed, last = self.cells(PackedSequence(self.dropout(states)[0, order], batch_sizes))
        last = last[0] if isinstance(last, tuple) else last
        output = torch.empty_like(packed.data).index_copy(0, order, packed.data)
        width = output.shape[1]
        lasts = output.new_zeros(layout.num_sequences, width)  # 0 for an empty sequence
        lasts = lasts.index_copy(0, longest_first, last.transpose(0, 1).reshape(-1, width))
        return output[None], lasts


@eager_only
def packing(layout: SequenceLayout) -> tuple[Tensor, Tensor, Tensor]:
    """The order of a batch's tokens in a `PackedSequence`.

    Returns:
        The flat index of each of its tokens, `(N,)`; the number of sequences at each step, `(max_length,)`, on the CPU;
        the indices of the non-empty sequences, longest first.
    """
    lengths, descending = layout.lengths.sort(descending=True, stable=True)
    longest_first = descending[lengths > 0]
    steps = torch.arange(layout.max_length, device=lengths.device)[:, None]
    is_token = steps < layout.lengths[longest_first]
    tokens = layout.cu_seq_lens[longest_first].long() + steps
    return tokens[is_token], is_token.sum(1).cpu(), longest_first


class DynMaskRecurrentPreTrainedModel(DynMaskBaseModel):
    """Base class of the recurrent models: configuration and weight initialisation."""

    config: DynMaskRecurrentConfig
    base_model_prefix = "model"
    _no_split_modules = ["DynMaskRecurrentLayer"]
    _input_embed_layer = "word_embeddings"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if isinstance(module, nn.RNNBase):
            bound = module.hidden_size**-0.5
            for weight in module.parameters():
                init.uniform_(weight, -bound, bound)
        else:
            super()._init_weights(module)


class DynMaskRecurrentModel(DynMaskRecurrentPreTrainedModel):
    """The bare recurrent encoder.

    Args:
        config ([`DynMaskRecurrentConfig`]): Sizes and cell.
    """

    def __init__(self, config: DynMaskRecurrentConfig):
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.embedding_size, padding_idx=config.pad_token_id)
        sizes = [config.embedding_size, *[config.hidden_size] * (config.num_hidden_layers - 1)]
        self.layers = nn.ModuleList(DynMaskRecurrentLayer(config, size) for size in sizes)
        self.post_init()

    @known_keywords("input_features", *WITHOUT_EFFECT, *BATCH_FIELDS)
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        lengths: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        missing: Tensor | None = None,
        layout: SequenceLayout | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        r"""
        Takes the batches of [`DynMaskModel`]. Token types have no effect. Positions only have one if they restart.

        Args:
            input_ids (`Tensor` of shape `(B, T)`, or flat `(1, N)`): Token ids.
            lengths (`Tensor` of shape `(B,)`, or `(S,)` for a flat batch): Row b holds `lengths[b]` tokens from its
                left edge; a flat batch holds S sequences end to end.
            attention_mask (`Tensor` of shape `(B, T)`): 0 at absent tokens, anywhere in a row; an alternative to
                `lengths`. Without both, all tokens are real.
            inputs_embeds (`Tensor` of shape `(B, T, embedding_size)`): Token embeddings in place of `input_ids`.
            missing (bool `Tensor` of shape `(B, T)`): True where a value is missing: the cells skip it, and its output
                is 0.
            layout ([`SequenceLayout`]): The batch's layout, if a head has already made it. `last_hidden_state` then
                stays flat, `(1, N, C)`.

        Returns:
            [`~transformers.modeling_outputs.BaseModelOutputWithPooling`]: `last_hidden_state (B, T, C)`, 0 at absent
            tokens; `pooler_output (B, C)` or `(S, C)`, the final states of the last layer in each direction; on request
            `hidden_states`.

        Raises:
            ValueError: The inputs contradict each other, or there is a field for masks.
        """
        for name in BATCH_FIELDS:
            if kwargs.get(name) is not None:
                raise ValueError(f"`{name}` must be None in a {type(self).__name__}, which has no mask to read it")
        inputs = given_input(self.main_input_name, input_ids=input_ids, inputs_embeds=inputs_embeds, **kwargs)
        flat_output = layout is not None
        if layout is None:
            layout = layout_of_batch(
                tuple(inputs.shape[:2]),
                inputs.device,
                lengths,
                attention_mask,
                missing,
                position_ids=kwargs.get("position_ids"),
                packing={name: kwargs.get(name) for name in PACKING},
            )
        inputs = layout.flatten(inputs if input_ids is None else integers("input_ids", inputs))
        states = inputs if input_ids is None else embed_tokens(self.word_embeddings, inputs, layout)
        output_hidden_states = kwargs.get("output_hidden_states", self.config.output_hidden_states)
        all_states, lasts = [], states.new_zeros(layout.num_sequences, self.config.hidden_size)
        for layer in self.layers:
            if output_hidden_states:
                # The returned states are on the path to the output, so that they receive gradients.
                all_states.append(layout.unflatten(states))
                states = layout.flatten(all_states[-1])
            if layout.num_tokens:
                states, lasts = layer(states, layout)
            else:
                states = states.new_zeros(1, 0, self.config.hidden_size)
        padded = states if flat_output else layout.unflatten(states)
        if output_hidden_states:
            all_states.append(layout.unflatten(states) if flat_output else padded)
        return BaseModelOutputWithPooling(
            last_hidden_state=padded,
            pooler_output=lasts,
            hidden_states=tuple(all_states) if output_hidden_states else None,
        )


class DynMaskRecurrentTaskModel(TaskModel, DynMaskRecurrentPreTrainedModel):
    """A head on [`DynMaskRecurrentModel`]."""

    def _new_encoder(self, config):
        return DynMaskRecurrentModel(config)


class DynMaskRecurrentForTokenClassification(TokenClassification, DynMaskRecurrentTaskModel):
    """A class per token; `labels (B, T)`, logits `(B, T, num_labels)`."""


class DynMaskRecurrentForSequenceClassification(SequenceClassification, DynMaskRecurrentTaskModel):
    """One class, several classes or a number per sequence, as in [`DynMaskForSequenceClassification`]."""


__all__ = [
    "DynMaskRecurrentForSequenceClassification",
    "DynMaskRecurrentForTokenClassification",
    "DynMaskRecurrentModel",
    "DynMaskRecurrentPreTrainedModel",
]
