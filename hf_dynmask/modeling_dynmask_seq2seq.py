"""DynMask encoder-decoder and its heads: both sides work on real tokens alone, each with lengths of its own.

Shape legend: B rows, T columns of the source, U of the target, S sequences, C hidden size, V vocabulary, H heads.
"""
# transformers' own typing of `**kwargs` repeats named parameters, and its configurations' fields are optional.
# pyright: reportGeneralTypeIssues=false, reportPrivateImportUsage=false, reportArgumentType=false
# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportReturnType=false, reportIndexIssue=false

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPoolingAndCrossAttentions,
    Seq2SeqLMOutput,
    Seq2SeqModelOutput,
    Seq2SeqSequenceClassifierOutput,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple

from .cached import columns_seen, last_columns
from .configuration_dynmask_seq2seq import DynMaskSeq2SeqConfig
from .layout import SequenceLayout, outside_graph
from .modeling_dynmask import (
    IGNORE_INDEX,
    DynMaskModel,
    DynMaskPreTrainedModel,
    encoded,
    is_explicit,
    layout_of_batch,
    sequence_loss,
    token_loss,
)
from .modules import DynMaskPooler, classifier_dropout

ENCODER = "encoder.embeddings.word_embeddings.weight"
DECODER = "decoder.embeddings.word_embeddings.weight"
SOURCE_INPUTS = ("input_ids", "inputs_embeds", "input_features")
FIELDS = ("segment_ids", "prefix_lengths", "hidden_spans", "global_tokens", "mask_choice")


class Sides(NamedTuple):
    """What both sides gave: outputs whose `last_hidden_state` is flat, and the layouts of these."""

    encoder: BaseModelOutputWithPoolingAndCrossAttentions
    encoder_layout: SequenceLayout
    decoder: BaseModelOutputWithPoolingAndCrossAttentions
    decoder_layout: SequenceLayout

    def common(self) -> dict:
        """What the outputs of all classes hold."""
        return {
            "past_key_values": self.decoder.past_key_values,
            "decoder_hidden_states": self.decoder.hidden_states,
            "decoder_attentions": self.decoder.attentions,
            "cross_attentions": self.decoder.cross_attentions,
            "encoder_last_hidden_state": self.encoder_layout.unflatten(self.encoder.last_hidden_state),
            "encoder_hidden_states": self.encoder.hidden_states,
            "encoder_attentions": self.encoder.attentions,
        }


class DynMaskSeq2SeqPreTrainedModel(DynMaskPreTrainedModel):
    """What the encoder-decoder and its heads share."""

    config: DynMaskSeq2SeqConfig

    def __init__(self, config: DynMaskSeq2SeqConfig):
        super().__init__(config)
        if config.encoder.num_features is not None:
            self.main_input_name = "input_features"

    @property
    def sides(self) -> "DynMaskSeq2SeqModel":
        """The encoder-decoder itself."""
        return self.base_model

    def output_lengths(self, lengths: Tensor) -> Tensor:
        """See [`DynMaskModel.output_lengths`]: of the encoder."""
        return self.sides.encoder.output_lengths(lengths)

    def set_mask(
        self,
        mask: str | list[str] | None = None,
        decoder_mask: str | list[str] | None = None,
        cross_mask: str | None = None,
    ) -> None:
        """Put other masks on the model, to be used from the next forward pass on and saved with its configuration.

        Args:
            mask, decoder_mask (`str` or `list[str]`, *optional*):
                An expression for every layer of the encoder, or of the decoder, or one each. `None`: as it is.
            cross_mask (`str`, *optional*): An expression of which token of the source a token of the target may see.

        Raises:
            ValueError: An expression does not parse, or there are not as many as layers.
        """
        decoder = self.sides.decoder.config
        before = {name: getattr(decoder, name) for name in ("mask", "layer_masks", "cross_mask")}
        try:
            if cross_mask is not None:
                decoder.cross_mask = cross_mask
                decoder.validate_masks()
            if decoder_mask is not None:
                self.sides.decoder.set_mask(decoder_mask)
            if mask is not None:
                self.sides.encoder.set_mask(mask)
        except Exception:
            for name, value in before.items():
                setattr(decoder, name, value)
            raise

    def get_input_embeddings(self) -> nn.Module:
        """The tokens' table: the encoder's, or the decoder's where the encoder reads frames."""
        reads_frames = self.config.encoder.num_features is not None
        return (self.sides.decoder if reads_frames else self.sides.encoder).get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        shared = self.config.share_embeddings
        for side in (self.sides.encoder, self.sides.decoder):
            if shared or side.get_input_embeddings() is self.get_input_embeddings():
                side.set_input_embeddings(value)

    def resize_token_embeddings(self, new_num_tokens=None, pad_to_multiple_of=None, mean_resizing=True) -> nn.Module:
        if not (self.config.share_embeddings or self.config.encoder.num_features is not None):
            raise ValueError("`resize_token_embeddings` needs one vocabulary, share_embeddings=True; got one a side")
        embeddings = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        for side in (self.config.encoder, self.config.decoder):
            if side.num_features is None:
                side.vocab_size = embeddings.weight.shape[0]
        return embeddings

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor, decoder_lengths: Tensor | None = None) -> Tensor:
        """Decoder inputs of labels: one step to the right in each sequence, behind the start token.

        Args:
            labels (`Tensor` of shape `(B, U)`, or flat `(1, N)`): Targets; an ignored one, -100, becomes padding.
            decoder_lengths (`Tensor` of shape `(B,)` or `(S,)`, *optional*): Tokens of each target.

        Raises:
            ValueError: The configuration has no `decoder_start_token_id` or `pad_token_id`.
        """
        layout = layout_of_batch(tuple(labels.shape), labels.device, decoder_lengths, None)
        return self._shifted(labels, layout)

    def _shifted(self, labels: Tensor, layout: SequenceLayout) -> Tensor:
        start, pad = self.config.decoder_start_token_id, self.config.pad_token_id
        if start is None or pad is None:
            raise ValueError(
                "`decoder_start_token_id` and `pad_token_id` must be in the configuration to make decoder inputs of "
                f"labels; got {start} and {pad}"
            )
        flat = layout.flatten(labels)
        shifted = nn.functional.pad(flat, (1, 0), value=start)[:, :-1]
        begins = torch.ones_like(layout.sequence_ids, dtype=torch.bool)
        begins[1:] = layout.sequence_ids[1:] != layout.sequence_ids[:-1]
        shifted = shifted.masked_fill(shifted == IGNORE_INDEX, pad).masked_fill(begins, start)
        return layout.unflatten(shifted, fill=pad)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, DynMaskForConditionalGeneration):
            init.zeros_(module.final_logits_bias)


class DynMaskSeq2SeqModel(DynMaskSeq2SeqPreTrainedModel):
    """The bare encoder-decoder: two [`DynMaskModel`]s, the second of which looks at the first's states."""

    def __init__(self, config: DynMaskSeq2SeqConfig):
        super().__init__(config)
        self.encoder = DynMaskModel(config.encoder, add_pooling_layer=False)
        self.decoder = DynMaskModel(config.decoder, add_pooling_layer=False)
        self._tied_weights_keys = {DECODER: ENCODER} if config.share_embeddings else {}
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        lengths: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_lengths: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        decoder_position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        input_features: Tensor | None = None,
        segment_ids: Tensor | None = None,
        prefix_lengths: Tensor | None = None,
        hidden_spans: Tensor | None = None,
        global_tokens: Tensor | None = None,
        mask_choice: Tensor | None = None,
        missing: Tensor | None = None,
        decoder_segment_ids: Tensor | None = None,
        decoder_prefix_lengths: Tensor | None = None,
        decoder_hidden_spans: Tensor | None = None,
        decoder_global_tokens: Tensor | None = None,
        decoder_mask_choice: Tensor | None = None,
        encoder_outputs: BaseModelOutput | tuple[Tensor, ...] | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Seq2SeqModelOutput:
        r"""
        The encoder's inputs are those of [`DynMaskModel.forward`], `input_features` and fields included. Beside them:

        Args:
            decoder_input_ids (`Tensor` of shape `(B, U)`, or flat `(1, N)`): Tokens of the targets.
            decoder_lengths (`Tensor` of shape `(B,)`, or `(S,)` for a flat batch): Row b holds `decoder_lengths[b]` of
                them from its left edge.
            decoder_attention_mask (`Tensor` of shape `(B, U)`): 0 where no token is; an alternative to
                `decoder_lengths`. Neither: all tokens are there. Or an explicit mask, as for the encoder.
            decoder_position_ids (`Tensor` of shape `(B, U)`), decoder_inputs_embeds (`Tensor` of shape `(B, U, C)`):
                As the encoder's.
            decoder_segment_ids, decoder_prefix_lengths, decoder_hidden_spans, decoder_global_tokens,
                decoder_mask_choice (`Tensor`): Fields of the decoder's mask. The cross mask reads fields of tokens from
                both sides, and others from the encoder's.
            encoder_outputs ([`~transformers.modeling_outputs.BaseModelOutput`]): States `(B, T, C)` that the encoder
                has given before, in place of its inputs; `lengths` or `attention_mask` say where its tokens are.
            past_key_values ([`~transformers.EncoderDecoderCache`]): Keys and values of earlier columns of the decoder,
                and those of the encoder.
            use_cache (`bool`): Whether to hand back keys and values. `None`: as the decoder's configuration says, and
                not in training.

        Returns:
            [`~transformers.modeling_outputs.Seq2SeqModelOutput`]: `last_hidden_state (B, U, C)` and
            `encoder_last_hidden_state (B, T, C)`, 0 where no token is; the rest as there.

        Raises:
            ValueError: The inputs of a side contradict each other; the sides have not as many sequences.
        """
        sides = self.run(**_arguments(locals()), **kwargs)
        states = sides.decoder_layout.unflatten(sides.decoder.last_hidden_state)
        return Seq2SeqModelOutput(last_hidden_state=states, **sides.common())

    def run(
        self,
        encoder_outputs: BaseModelOutput | tuple[Tensor, ...] | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        **inputs,
    ) -> Sides:
        """[`forward`] for a head, which goes on with real tokens alone."""
        inputs.pop("return_dict", None)
        of_decoder = [name for name in inputs if name.startswith("decoder_")]
        target = {name.removeprefix("decoder_"): inputs.pop(name) for name in of_decoder}
        common = {name: inputs[name] for name in ("output_hidden_states", "output_attentions") if name in inputs}
        if encoder_outputs is None:
            encoder, encoder_layout = encoded(self.encoder, **inputs)
        else:
            encoder, encoder_layout = self._given(encoder_outputs, **inputs)
        decoder, decoder_layout = self._decode(
            encoder.last_hidden_state,
            encoder_layout,
            {name: inputs[name] for name in FIELDS if inputs.get(name) is not None},
            past_key_values,
            use_cache,
            **target,
            **common,
        )
        return Sides(encoder, encoder_layout, decoder, decoder_layout)

    def _given(
        self, encoder_outputs: BaseModelOutput | tuple[Tensor, ...], **inputs
    ) -> tuple[BaseModelOutputWithPoolingAndCrossAttentions, SequenceLayout]:
        """Outputs of the encoder in rows as [`encoded`] gives them."""
        states = encoder_outputs[0]
        rows, width = states.shape[:2]
        ratio = self.config.encoder.inputs_to_logits_ratio
        of_inputs = (inputs.get(name) for name in (*SOURCE_INPUTS, "missing", "attention_mask"))
        width = next((given.shape[1] for given in of_inputs if given is not None), width * ratio)
        layout = self.encoder.output_layout(
            (rows, width), states.device, inputs.get("lengths"), inputs.get("attention_mask"), inputs.get("missing")
        )
        if layout.shape != (rows, states.shape[1]):
            raise ValueError(
                f"`encoder_outputs` must have the shape {(*layout.shape, states.shape[2])} of the encoder's inputs; "
                f"got {tuple(states.shape)}"
            )
        further = {name: getattr(encoder_outputs, name, None) for name in ("hidden_states", "attentions")}
        return BaseModelOutputWithPoolingAndCrossAttentions(layout.flatten(states), **further), layout

    def _decode(
        self,
        encoder_states: Tensor,
        encoder_layout: SequenceLayout,
        encoder_fields: dict[str, Tensor],
        past_key_values: Cache | None,
        use_cache: bool | None,
        lengths: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **inputs,
    ) -> tuple[BaseModelOutputWithPoolingAndCrossAttentions, SequenceLayout]:
        """The decoder's outputs, `last_hidden_state` flat, and the layout of the columns of now."""
        given = [inputs[name] for name in ("input_ids", "inputs_embeds") if inputs.get(name) is not None]
        if len(given) != 1:
            raise ValueError(
                "exactly one of `decoder_input_ids` and `decoder_inputs_embeds` must be given, or `labels` to make "
                f"ids of; got {len(given)}"
            )
        rows, width = given[0].shape[:2]
        seen = columns_seen(past_key_values)
        if seen and lengths is not None:
            raise ValueError(
                "`decoder_lengths` must come with the first columns; later ones take a `decoder_attention_mask` of all"
            )
        whole = self._target_layout((rows, seen + width), given[0].device, lengths, attention_mask)
        if whole.num_sequences != encoder_layout.num_sequences:
            raise ValueError(
                f"`decoder_lengths` must be of as many sequences as the encoder's {encoder_layout.num_sequences}; "
                f"got {whole.num_sequences}"
            )
        if use_cache is None:
            use_cache = self.config.decoder.use_cache and not self.training
        if use_cache and past_key_values is None and rows == whole.num_sequences == encoder_layout.shape[0]:
            caches = (DynamicCache(config=self.config.decoder) for _ in range(2))
            past_key_values = EncoderDecoderCache(*caches)
        outputs = self.decoder(
            layout=whole,
            attention_mask=attention_mask if is_explicit(attention_mask) else None,
            past_key_values=past_key_values,
            encoder_hidden_states=encoder_states,
            encoder_layout=encoder_layout,
            encoder_fields=encoder_fields,
            **inputs | {"return_dict": True},
        )
        return outputs, whole if past_key_values is None else last_columns(whole, width)

    @staticmethod
    @outside_graph
    def _target_layout(
        shape: tuple[int, int], device: torch.device, lengths: Tensor | None, attention_mask: Tensor | None
    ) -> SequenceLayout:
        try:
            return layout_of_batch(shape, device, lengths, attention_mask)
        except ValueError as error:
            raise ValueError(f"of the decoder's inputs: {error}") from error


class DynMaskSeq2SeqTaskModel(DynMaskSeq2SeqPreTrainedModel):
    """A head on the encoder-decoder. Subclasses say what the decoder reads, and how its states become a loss and
    logits."""

    output_class: type

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        lengths: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_lengths: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        decoder_position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        input_features: Tensor | None = None,
        segment_ids: Tensor | None = None,
        prefix_lengths: Tensor | None = None,
        hidden_spans: Tensor | None = None,
        global_tokens: Tensor | None = None,
        mask_choice: Tensor | None = None,
        missing: Tensor | None = None,
        decoder_segment_ids: Tensor | None = None,
        decoder_prefix_lengths: Tensor | None = None,
        decoder_hidden_spans: Tensor | None = None,
        decoder_global_tokens: Tensor | None = None,
        decoder_mask_choice: Tensor | None = None,
        encoder_outputs: BaseModelOutput | tuple[Tensor, ...] | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ):
        r"""
        Inputs as in [`DynMaskSeq2SeqModel.forward`], and:

        Args:
            labels (`Tensor`): Targets, -100 where there is none: see the class for their shape.
            num_items_in_batch (`int` or `Tensor`): Targets over which the loss is averaged. `None`: this batch's.
        """
        given = _arguments(locals(), "labels", "num_items_in_batch")
        if decoder_input_ids is None and decoder_inputs_embeds is None:
            given |= self._decoder_inputs(labels, given)
        sides = self.model.run(**given, **kwargs)
        loss, logits = self._predict(sides.decoder.last_hidden_state, sides.decoder_layout, labels, num_items_in_batch)
        return self.output_class(loss=loss, logits=logits, **sides.common())

    def _decoder_inputs(self, labels: Tensor | None, given: dict[str, Any]) -> dict[str, Any]:
        """Inputs of the decoder where the batch has none."""
        raise NotImplementedError

    def _predict(
        self, states: Tensor, layout: SequenceLayout, labels: Tensor | None, num_items_in_batch: Tensor | int | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """(loss, logits) from the decoder's flat states `(1, N, C)`."""
        raise NotImplementedError


class DynMaskForConditionalGeneration(DynMaskSeq2SeqTaskModel, GenerationMixin):
    """Sequence to sequence: translation, summarisation, speech, captions.

    `labels (B, U)`, or flat `(1, N)`, logits `(B, U, V)`. Decoder inputs are by default the labels, moved to the right.
    While training with labels, logits are computed for the targets alone and not handed back (`logits` is `None`).
    """

    output_class = Seq2SeqLMOutput

    def __init__(self, config: DynMaskSeq2SeqConfig):
        super().__init__(config)
        self.model = DynMaskSeq2SeqModel(config)
        decoder = config.decoder
        self.lm_head = nn.Linear(decoder.hidden_size, decoder.vocab_size, bias=False)
        self.register_buffer("final_logits_bias", torch.zeros(1, decoder.vocab_size))
        if config.tie_word_embeddings:
            source = ENCODER if config.share_embeddings else DECODER
            self._tied_weights_keys = {"lm_head.weight": f"model.{source}"}
        self.post_init()

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, new_embeddings):
        self.lm_head = new_embeddings

    def resize_token_embeddings(self, new_num_tokens=None, pad_to_multiple_of=None, mean_resizing=True) -> nn.Module:
        embeddings = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        added = embeddings.weight.shape[0] - self.final_logits_bias.shape[1]
        self.final_logits_bias = nn.functional.pad(self.final_logits_bias, (0, added))
        return embeddings

    def _decoder_inputs(self, labels, given):
        if labels is None:
            return {}
        mask = given["decoder_attention_mask"]
        layout = layout_of_batch(tuple(labels.shape), labels.device, given["decoder_lengths"], mask)
        return {"decoder_input_ids": self._shifted(labels, layout)}

    def _predict(self, states, layout, labels, num_items_in_batch):
        loss = logits = None
        if labels is not None:
            targets = layout.flatten(labels)
            real = targets != IGNORE_INDEX
            loss = token_loss(self._logits(states[real]), targets[real], num_items_in_batch)
        if labels is None or not self.training:
            logits = layout.unflatten(self._logits(states))
        return loss, logits

    def _logits(self, states: Tensor) -> Tensor:
        return self.lm_head(states) + self.final_logits_bias.view(-1)

    def generate(self, inputs: Tensor | None = None, *args, decoder_lengths: Tensor | None = None, **kwargs):
        r"""
        [`~transformers.GenerationMixin.generate`] for sources with `lengths` or an `attention_mask`.

        Args:
            inputs (`Tensor` of shape `(B, T)`): The sources.
            decoder_lengths (`Tensor` of shape `(B,)`):
                Those of `labels`, which come along when the [`~transformers.Seq2SeqTrainer`] evaluates; neither is
                looked at.

        Raises:
            ValueError: There are `decoder_lengths` without `labels`.
        """
        if decoder_lengths is not None and kwargs.get("labels") is None:
            raise ValueError(
                "`decoder_lengths` must come with `labels`: targets that have begun, `decoder_input_ids`, take a "
                f"`decoder_attention_mask`, with padding on the left; got {decoder_lengths.tolist()} alone"
            )
        return super().generate(inputs, *args, **kwargs)

    def create_masks_for_generate(self, attention_mask: Tensor | None = None, **kwargs) -> Tensor | None:
        return attention_mask  # which token is there; who sees whom is the plan's affair

    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        inputs.pop("decoder_position_ids", None)  # the layout knows them
        return inputs


class DynMaskSeq2SeqForSequenceClassification(DynMaskSeq2SeqTaskModel):
    """A class for every sequence, read off the decoder's last token (BART, arXiv:1910.13461, section 3.1).

    Decoder inputs are by default the source, moved to the right. Labels and logits are those of
    [`DynMaskForSequenceClassification`].
    """

    output_class = Seq2SeqSequenceClassifierOutput

    def __init__(self, config: DynMaskSeq2SeqConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = DynMaskSeq2SeqModel(config)
        self.pooler = DynMaskPooler(config.decoder)
        self.dropout = classifier_dropout(config.decoder)
        self.classifier = nn.Linear(config.decoder.hidden_size, config.num_labels)
        self.post_init()

    def _decoder_inputs(self, labels, given):
        ids, lengths, mask = (given[name] for name in ("input_ids", "lengths", "attention_mask"))
        if ids is None:
            raise ValueError(
                "`decoder_input_ids` must be given where no `input_ids` are there to make them of; got none"
            )
        layout = layout_of_batch(tuple(ids.shape), ids.device, lengths, mask)
        return {
            "decoder_input_ids": self._shifted(ids, layout),
            "decoder_lengths": lengths,
            "decoder_attention_mask": None if is_explicit(mask) else mask,
        }

    def _predict(self, states, layout, labels, num_items_in_batch):
        logits = self.classifier(self.dropout(self.pooler(layout.last_tokens(states))))
        loss = None if labels is None else sequence_loss(logits, labels, self.config, num_items_in_batch)
        return loss, logits


def _arguments(scope: dict[str, Any], *but: str) -> dict[str, Any]:
    """The named arguments of a method, from its `locals()`."""
    return {name: value for name, value in scope.items() if name not in ("self", "kwargs", *but)}


__all__ = [
    "DynMaskForConditionalGeneration",
    "DynMaskSeq2SeqForSequenceClassification",
    "DynMaskSeq2SeqModel",
    "DynMaskSeq2SeqPreTrainedModel",
]
