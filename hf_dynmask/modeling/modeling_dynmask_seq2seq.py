"""DynMask encoder-decoder and its heads. Both sides work on real tokens only, and each has its own lengths.

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
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.generic import can_return_tuple

from .batch import PACKING, is_explicit, layout_of_batch
from .configuration_dynmask_seq2seq import DynMaskSeq2SeqConfig
from .field_shapes import BATCH_FIELDS, TOKEN_FIELDS, takes_fields
from .generation import fields_of_new_tokens
from .heads import classifier_dropout, run_encoder
from .kv_cache import given_cache, last_columns, num_cached_tokens, output_with_cache, renamed_cache
from .layout import IGNORE_INDEX, SequenceLayout, rolled, select_targets
from .losses import flat_labels, sequence_loss, token_loss
from .modeling_base import known_keywords, warn_of_adapters_alone, warn_of_unread_fields
from .modeling_dynmask import DynMaskModel, DynMaskPreTrainedModel
from .modules import POOLERS

ENCODER = "encoder.embeddings.word_embeddings.weight"
DECODER = "decoder.embeddings.word_embeddings.weight"
SOURCE_INPUTS = ("input_ids", "inputs_embeds", "input_features")
Inputs = dict[str, Any]


class BothSides(NamedTuple):
    """The outputs of encoder and decoder, whose `last_hidden_state` is flat, with their layouts and the cache."""

    encoder: BaseModelOutputWithPoolingAndCrossAttentions
    encoder_layout: SequenceLayout
    decoder: BaseModelOutputWithPoolingAndCrossAttentions
    decoder_layout: SequenceLayout
    cache: Cache | None

    def output(self, output_class: type, **fields) -> Any:
        """An output of this class, with `fields` and the fields that all output classes have."""
        return output_with_cache(output_class, self.cache, **fields, **self._common())

    def _common(self) -> dict[str, Any]:
        return {
            "decoder_hidden_states": self.decoder.hidden_states,
            "decoder_attentions": self.decoder.attentions,
            "cross_attentions": self.decoder.cross_attentions,
            "encoder_last_hidden_state": self.encoder_layout.unflatten(self.encoder.last_hidden_state),
            "encoder_hidden_states": self.encoder.hidden_states,
            "encoder_attentions": self.encoder.attentions,
        }


class DynMaskSeq2SeqPreTrainedModel(DynMaskPreTrainedModel):
    """Base class of the encoder-decoder and its heads."""

    config: DynMaskSeq2SeqConfig

    def __init__(self, config: DynMaskSeq2SeqConfig):
        super().__init__(config)
        if config.encoder.num_features is not None:
            self.main_input_name = "input_features"

    @known_keywords()
    @can_return_tuple
    @takes_fields("", "decoder_")
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
        missing: Tensor | None = None,
        encoder_outputs: BaseModelOutput | tuple[Tensor, ...] | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ):
        r"""
        Takes the inputs of [`DynMaskModel.forward`] for the encoder, `input_features` and fields included, and:

        Args:
            decoder_input_ids (`Tensor` of shape `(B, U)`, or flat `(1, N)`): Tokens of the targets. `None`: the class
                makes them from `labels` or from the source.
            decoder_lengths (`Tensor` of shape `(B,)`, or `(S,)` for a flat batch): Row b holds `decoder_lengths[b]`
                target tokens from its left edge.
            decoder_attention_mask (`Tensor` of shape `(B, U)`): 0 at absent tokens; an alternative to
                `decoder_lengths`. Without both, all tokens are real. Or an explicit mask, as for the encoder.
            decoder_position_ids (`Tensor` of shape `(B, U)`), decoder_inputs_embeds (`Tensor` of shape `(B, U, C)`):
                As for the encoder.
            decoder_segment_ids, decoder_prefix_lengths, decoder_hidden_spans, decoder_global_tokens,
                decoder_mask_choice (`Tensor`): Fields of the decoder's mask. The cross mask reads per-token fields of
                both sides, and all other fields from the encoder.
            encoder_outputs ([`~transformers.modeling_outputs.BaseModelOutput`]): States `(B, T, C)` from an earlier
                pass of the encoder, in place of its inputs. `lengths` or `attention_mask` give their layout.
            past_key_values, cache ([`~transformers.EncoderDecoderCache`]): Two names for the keys and values of the
                decoder's earlier columns and of the encoder. The decoder's inputs are then the current columns only;
                `decoder_attention_mask` and the decoder's fields cover all columns. `decoder_lengths` can only be given
                with the first columns.
            use_cache (`bool`): Whether to return keys and values; a flat batch never returns them. `None`: as in the
                decoder's configuration, but `False` in training and with labels.
            labels (`Tensor`): Targets, -100 for none. The class documents their shape.
            num_items_in_batch (`int` or `Tensor`): Number of targets to average the loss over. `None`: those of this
                batch.

        Returns:
            The output of the class. `encoder_last_hidden_state` is `(B, T, C)`, outputs of the decoder's tokens are
            `(B, U, ...)`. All are 0 at absent tokens.

        Raises:
            ValueError: The inputs of a side contradict each other; the sides differ in their number of sequences; the
                decoder's mask allows keys that a cache does not have; `cu_seq_lens_q` or the like is given, which does
                not tell the two sides apart.
            TypeError: A keyword is unknown.
        """
        source = {
            "input_ids": input_ids,
            "lengths": lengths,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "token_type_ids": token_type_ids,
            "inputs_embeds": inputs_embeds,
            "input_features": input_features,
            "missing": missing,
        } | {name: kwargs.pop(name, None) for name in BATCH_FIELDS}
        target = {
            "input_ids": decoder_input_ids,
            "lengths": decoder_lengths,
            "attention_mask": decoder_attention_mask,
            "position_ids": decoder_position_ids,
            "inputs_embeds": decoder_inputs_embeds,
        } | {name: kwargs.pop(f"decoder_{name}", None) for name in BATCH_FIELDS}
        if decoder_input_ids is None and decoder_inputs_embeds is None:
            target |= self._made_target(source, target, labels)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and labels is None
        cache = given_cache(cache, past_key_values)
        sides = self.base_model.run(source, target, encoder_outputs, cache, use_cache, **kwargs)
        return self._outputs(sides, labels, num_items_in_batch)

    def _made_target(self, source: Inputs, target: Inputs, labels: Tensor | None) -> Inputs:
        """Inputs that the decoder gets if the batch has none for it."""
        return {}

    def _outputs(self, sides: BothSides, labels: Tensor | None, num_items_in_batch: Tensor | int | None) -> ModelOutput:
        """The output of the class."""
        raise NotImplementedError

    def output_lengths(self, lengths: Tensor) -> Tensor:
        """[`DynMaskModel.output_lengths`] of the encoder."""
        return self.base_model.encoder.output_lengths(lengths)

    def set_mask(
        self,
        mask: str | list[str] | None = None,
        decoder_mask: str | list[str] | None = None,
        cross_mask: str | None = None,
    ) -> None:
        """Sets masks of the model from the next forward pass on. They are saved with the configuration.

        Args:
            mask, decoder_mask (`str` or `list[str]`, *optional*):
                One expression for all layers of the encoder, or of the decoder, or one per layer. `None`: unchanged.
            cross_mask (`str`, *optional*):
                The expression for which token of the source a token of the target may see. `None`: unchanged.

        Raises:
            ValueError: No mask is given; an expression does not parse; the number of expressions is not that of the
                layers. All masks are then unchanged.
        """
        if mask is None and decoder_mask is None and cross_mask is None:
            raise ValueError("one of `mask`, `decoder_mask` and `cross_mask` must be given; got none")
        encoder, decoder = self.base_model.encoder, self.base_model.decoder
        checked = encoder.checked_masks(mask), decoder.checked_masks(decoder_mask, cross_mask)
        for side, changed in zip((encoder, decoder), checked, strict=True):
            for name, value in changed.items():
                setattr(side.config, name, value)
        warn_of_adapters_alone(self, [mask, decoder_mask, cross_mask])

    def get_input_embeddings(self) -> nn.Module:
        """The encoder's embedding of tokens, or the decoder's if the encoder reads frames."""
        return self._readers()[0].get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        first, *others = self._readers()
        first.set_input_embeddings(value)
        for side in others:  # modules differ by side, since each has its own scale; the weight is shared
            side.get_input_embeddings().weight = value.weight

    def _readers(self) -> list[DynMaskModel]:
        """The sides whose embedding has the weight of [`get_input_embeddings`]."""
        encoder, decoder = self.base_model.encoder, self.base_model.decoder
        if self.config.share_embeddings:
            return [encoder, decoder]
        return [encoder if self.config.encoder.num_features is None else decoder]

    def resize_token_embeddings(self, new_num_tokens=None, pad_to_multiple_of=None, mean_resizing=True) -> nn.Module:
        if not (self.config.share_embeddings or self.config.encoder.num_features is not None):
            raise ValueError("`resize_token_embeddings` needs one vocabulary, share_embeddings=True; got one a side")
        embeddings = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        for side in (self.config.encoder, self.config.decoder):
            if side.num_features is None:
                side.vocab_size = embeddings.weight.shape[0]
        return embeddings

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor, decoder_lengths: Tensor | None = None) -> Tensor:
        """Decoder inputs for labels: the start token, then the labels of the sequence, shifted to the right by one.

        Args:
            labels (`Tensor` of shape `(B, U)`, or flat `(1, N)`): Targets; ignored ones, -100, become padding.
            decoder_lengths (`Tensor` of shape `(B,)` or `(S,)`, *optional*): Number of tokens of each target.

        Raises:
            ValueError: The configuration has no `decoder_start_token_id` or `pad_token_id`.
        """
        return self._shifted(labels, target_layout(labels, decoder_lengths, None))

    def _shifted(self, labels: Tensor, layout: SequenceLayout) -> Tensor:
        start, pad = self.config.decoder_start_token_id, self.config.pad_token_id
        if start is None or pad is None:
            raise ValueError(
                "`decoder_start_token_id` and `pad_token_id` must be in the configuration to make decoder inputs of "
                f"labels; got {start} and {pad}"
            )
        shifted = rolled(flat_labels("labels", labels, layout), 1)
        shifted = shifted.masked_fill(shifted == IGNORE_INDEX, pad).masked_fill(layout.begins, start)
        return layout.unflatten(shifted, fill=pad)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, DynMaskForConditionalGeneration):
            init.zeros_(module.final_logits_bias)


class DynMaskSeq2SeqModel(DynMaskSeq2SeqPreTrainedModel):
    """The bare encoder-decoder: two [`DynMaskModel`]s, of which the second attends to the states of the first."""

    def __init__(self, config: DynMaskSeq2SeqConfig):
        super().__init__(config)
        self.encoder = DynMaskModel(config.encoder, add_pooling_layer=False)
        self.decoder = DynMaskModel(config.decoder, add_pooling_layer=False)
        self._tied_weights_keys = {DECODER: ENCODER} if config.share_embeddings else {}
        self.post_init()

    def _outputs(self, sides, labels, num_items_in_batch):
        if labels is not None:
            raise ValueError("`labels` need a model with a head; got them for the bare model")
        states = sides.decoder_layout.unflatten(sides.decoder.last_hidden_state)
        return sides.output(Seq2SeqModelOutput, last_hidden_state=states)

    def run(
        self,
        source: Inputs,
        target: Inputs,
        encoder_outputs: BaseModelOutput | tuple[Tensor, ...] | None,
        cache: Cache | None,
        use_cache: bool,
        **kwargs,
    ) -> BothSides:
        """Runs both sides for [`forward`]; the results are flat.

        Args:
            source, target (`dict`): Inputs of the encoder and of the decoder by their names in [`DynMaskModel`].
            encoder_outputs, cache, use_cache: As in [`forward`].
            kwargs: `output_hidden_states` and `output_attentions` for both sides, `max_length_q` for the encoder.
        """
        bound = {"max_length_q": kwargs.pop("max_length_q", None)}
        for name in PACKING:
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"`{name}` must be None in an encoder-decoder, which has two sides: a flat batch comes with "
                    "`lengths` and `decoder_lengths`"
                )
        asked = {
            name: kwargs.get(name, getattr(self.config, name)) for name in ("output_hidden_states", "output_attentions")
        }
        encoder_fields = {name: source[name] for name in BATCH_FIELDS if source[name] is not None}
        read_by_encoder = self.encoder.fields_read()
        warn_of_unread_fields(self, encoder_fields, read_by_encoder | self.decoder.fields_read())
        if encoder_outputs is None:
            own = source | {name: None for name in BATCH_FIELDS if name not in read_by_encoder}
            encoder, encoder_layout = run_encoder(self.encoder, **own, **asked, **bound)
        else:
            encoder, encoder_layout = self._given(encoder_outputs, source)
        tokens, seen, mask = self._target_tokens(target), num_cached_tokens(cache), target["attention_mask"]
        if seen and target["lengths"] is not None:
            raise ValueError(
                "`decoder_lengths` must come with the first columns; later ones take a `decoder_attention_mask` of all"
            )
        positions = target["position_ids"] if seen == 0 else None
        layout = target_layout(tokens, target["lengths"], mask, positions, seen)
        cache = self._cache(cache, use_cache, encoder_layout, layout)
        decoder = self.decoder(
            **target | {"lengths": None, "attention_mask": mask if is_explicit(mask) else None},
            **asked,
            layout=layout,
            cache=cache,
            encoder_hidden_states=encoder.last_hidden_state,
            encoder_layout=encoder_layout,
            encoder_fields=encoder_fields,
            return_dict=True,
        )
        current = layout if cache is None else last_columns(layout, tokens.shape[1])
        return BothSides(encoder, encoder_layout, decoder, current, cache)

    @staticmethod
    def _target_tokens(target: Inputs) -> Tensor:
        given = [target[name] for name in ("input_ids", "inputs_embeds") if target[name] is not None]
        if len(given) != 1:
            raise ValueError(
                "exactly one of `decoder_input_ids` and `decoder_inputs_embeds` must be given, or `labels` to make "
                f"ids of; got {'both' if given else 'neither'}. Where the Trainer takes the labels away, to smooth "
                "them or for a loss function, give the collator the model: "
                "`DataCollatorForSeq2SeqWithLengths(…, model=model)`"
            )
        return given[0]

    def _cache(
        self, given: Cache | None, use_cache: bool, encoder_layout: SequenceLayout, layout: SequenceLayout
    ) -> Cache | None:
        """The cache to decode with, if any. Raises for a given one with a flat batch, or if the sides do not match."""
        sequences = encoder_layout.num_sequences, layout.num_sequences
        rows = encoder_layout.shape[0], layout.shape[0]
        if sequences[0] != sequences[1]:
            raise ValueError(
                f"`decoder_lengths` must be of as many sequences as the encoder's {sequences[0]}; got {sequences[1]}"
            )
        in_rows = sequences == rows
        if given is not None and not in_rows:
            raise ValueError(
                f"a cache needs a batch of one sequence a row; got {sequences[0]} in {rows[0]} rows of the "
                f"encoder and {rows[1]} of the decoder"
            )
        if given is None and use_cache and in_rows:
            return EncoderDecoderCache(*(DynamicCache(config=self.config.decoder) for _ in range(2)))
        return given

    def _given(
        self, encoder_outputs: BaseModelOutput | tuple[Tensor, ...], source: Inputs
    ) -> tuple[BaseModelOutputWithPoolingAndCrossAttentions, SequenceLayout]:
        """Given outputs of the encoder, made flat, and their layout."""
        states = encoder_outputs[0]
        inputs = (source[name] for name in (*SOURCE_INPUTS, "missing", "attention_mask"))
        width = next(
            (given.shape[1] for given in inputs if given is not None),
            states.shape[1] * self.config.encoder.inputs_to_logits_ratio,
        )
        layout = self.encoder.output_layout(
            (states.shape[0], width), states.device, source["lengths"], source["attention_mask"], source["missing"]
        )
        if layout.shape != tuple(states.shape[:2]):
            raise ValueError(
                f"`encoder_outputs` must have the shape {(*layout.shape, states.shape[2])} of the encoder's inputs; "
                f"got {tuple(states.shape)}"
            )
        further = {name: getattr(encoder_outputs, name, None) for name in ("hidden_states", "attentions")}
        return BaseModelOutputWithPoolingAndCrossAttentions(layout.flatten(states), **further), layout


class DynMaskForConditionalGeneration(DynMaskSeq2SeqPreTrainedModel, GenerationMixin):
    """Sequence to sequence: translation, summarisation, speech, captions.

    `labels (B, U)`, or flat `(1, N)`, logits `(B, U, V)`. Decoder inputs default to the labels, shifted to the right.
    In training with labels, logits are only computed for the targets and are not returned (`logits` is `None`).
    """

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

    def _made_target(self, source, target, labels):
        if labels is None:
            return {}
        layout = target_layout(labels, target["lengths"], target["attention_mask"], target["position_ids"])
        return {"input_ids": self._shifted(labels, layout)}

    def _outputs(self, sides, labels, num_items_in_batch):
        states, layout = sides.decoder.last_hidden_state, sides.decoder_layout
        if labels is None:
            return sides.output(Seq2SeqLMOutput, logits=layout.unflatten(self._logits(states)))
        labels = flat_labels("labels", labels, layout)
        if self.training:
            states, labels = select_targets(states, labels)
            loss = token_loss(self._logits(states), labels, num_items_in_batch)
            return sides.output(Seq2SeqLMOutput, loss=loss)
        logits = self._logits(states)
        loss = token_loss(logits, labels, num_items_in_batch)
        return sides.output(Seq2SeqLMOutput, loss=loss, logits=layout.unflatten(logits))

    def _logits(self, states: Tensor) -> Tensor:
        return self.lm_head(states) + self.final_logits_bias.view(-1)

    def create_masks_for_generate(self, attention_mask: Tensor | None = None, **kwargs) -> Tensor | None:
        return attention_mask  # which tokens are real; the plan decides which query may see which key

    def generate(self, *args, labels: Tensor | None = None, decoder_lengths: Tensor | None = None, **kwargs):
        r"""
        [`~transformers.GenerationMixin.generate`] from sources padded on any side, or given with `lengths`.

        Args:
            labels, decoder_lengths (`Tensor`, *optional*): Columns of training batches, which are not read.

        Raises:
            ValueError: The sources are not rows of one sequence each; `decoder_lengths` comes with `decoder_input_ids`,
                which are prompts; or prompts do not end in the last column.
        """
        sources = next(
            (kwargs[name] for name in SOURCE_INPUTS if kwargs.get(name) is not None), args[0] if args else None
        )
        lengths = kwargs.get("lengths")
        if sources is not None and lengths is not None and len(lengths) != len(sources):
            raise ValueError(f"sources must have a row each; got {len(lengths)} in {len(sources)} rows")
        if decoder_lengths is not None and kwargs.get("decoder_input_ids") is not None:
            raise ValueError(
                "`decoder_lengths` must be None with `decoder_input_ids`: pad prompts on the left and give their "
                f"`decoder_attention_mask`; got {decoder_lengths.tolist()}"
            )
        return super().generate(*args, **renamed_cache(kwargs))

    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        inputs.pop("decoder_position_ids", None)  # they follow from the layout
        mask = inputs.get("decoder_attention_mask")
        if mask is not None and not mask[:, -1].all():
            raise ValueError(
                "`decoder_attention_mask` must be 1 in the last column, after which tokens are generated: pad prompts "
                f"on the left; got {mask[:, -1].tolist()}"
            )
        return inputs

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, num_new_tokens: int = 1, **kwargs):
        model_kwargs = super()._update_model_kwargs_for_generation(
            outputs, model_kwargs, num_new_tokens=num_new_tokens, **kwargs
        )
        names = (f"decoder_{name}" for name in TOKEN_FIELDS)
        return model_kwargs | fields_of_new_tokens(model_kwargs, names, num_new_tokens)


class DynMaskSeq2SeqForSequenceClassification(DynMaskSeq2SeqPreTrainedModel):
    """A class per sequence, from the decoder's last token (BART, arXiv:1910.13461, section 3.1).

    Decoder inputs default to the source, shifted to the right. Labels and logits are those of
    [`DynMaskForSequenceClassification`].
    """

    def __init__(self, config: DynMaskSeq2SeqConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = DynMaskSeq2SeqModel(config)
        self.pooler = POOLERS[config.decoder.classifier_transform](config.decoder)
        self.dropout = classifier_dropout(config.decoder)
        self.classifier = nn.Linear(config.decoder.hidden_size, config.num_labels, bias=config.decoder.classifier_bias)
        self.post_init()

    def _made_target(self, source, target, labels):
        names = ("input_ids", "lengths", "attention_mask", "position_ids")
        ids, lengths, mask, positions = (source[name] for name in names)
        if ids is None:
            raise ValueError(
                "`decoder_input_ids` must be given where no `input_ids` are there to make them of; got none"
            )
        layout = layout_of_batch(tuple(ids.shape), ids.device, lengths, mask, position_ids=positions)
        return {
            "input_ids": self._shifted(ids, layout),
            "lengths": lengths,
            "position_ids": positions,
            "attention_mask": None if is_explicit(mask) else mask,
        }

    def _outputs(self, sides, labels, num_items_in_batch):
        last = sides.decoder_layout.last_tokens(sides.decoder.last_hidden_state)
        logits = self.classifier(self.dropout(self.pooler(last)))
        loss = None
        if labels is not None:
            loss = sequence_loss(logits, labels, sides.decoder_layout, self.config, num_items_in_batch)
        return sides.output(Seq2SeqSequenceClassifierOutput, loss=loss, logits=logits)


def target_layout(
    tokens: Tensor,
    lengths: Tensor | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None = None,
    columns_before: int = 0,
) -> SequenceLayout:
    """The layout of the decoder's tokens `(B, U, ...)`, with the columns before them."""
    rows, width = tokens.shape[:2]
    try:
        return layout_of_batch(
            (rows, columns_before + width),
            tokens.device,
            lengths,
            attention_mask,
            position_ids=position_ids,
        )
    except ValueError as error:
        raise ValueError(f"of the decoder's inputs: {error}") from error


__all__ = [
    "DynMaskForConditionalGeneration",
    "DynMaskSeq2SeqForSequenceClassification",
    "DynMaskSeq2SeqModel",
    "DynMaskSeq2SeqPreTrainedModel",
]
