"""DynMask encoder and its heads.

A batch has rows `(B, T)` or is flat `(1, N)`. Every layer works on the N real tokens only. Outputs are returned in the
layout of the inputs, 0 at absent tokens.

Shape legend: B rows of width T, S sequences, N real tokens, C hidden size, V vocabulary, H heads.
"""
# transformers' own typing of `**kwargs` repeats named parameters, and its configurations' fields are optional.
# pyright: reportGeneralTypeIssues=false, reportPrivateImportUsage=false, reportArgumentType=false
# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportOptionalIterable=false

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import (
    BaseModelOutputWithPoolingAndCrossAttentions,
    CausalLMOutput,
    CausalLMOutputWithPast,
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple

from .batch import PACKING, frames_of_batch, given, given_input, is_explicit, layout_of_batch, per_token
from .configuration_dynmask import DynMaskConfig, mask_texts, masks_of
from .embedding import embed_tokens
from .field_shapes import BATCH_FIELDS, TOKEN_FIELDS, takes_fields
from .fields import key_name
from .generation import DynMaskGenerationMixin
from .graph_attention import GraphPlan, fields_of
from .heads import SequenceClassification, TaskModel, TokenClassification, in_columns
from .kv_cache import CACHE_NAME, cached_plans, given_cache, last_columns, num_cached_tokens, output_with_cache
from .layout import SequenceLayout, eager_only, integers, select_targets
from .losses import aligned_targets, ctc_loss, flat_labels, position_loss, token_loss
from .masks import Dense, TopK, parse
from .modeling_base import DynMaskBaseModel, known_keywords, warn_of_adapters_alone, warn_of_unread_fields
from .modules import (
    ATTENTION_IMPLEMENTATIONS,
    POOLERS,
    AttentionSettings,
    DynMaskEmbeddings,
    DynMaskKeyScores,
    DynMaskLayer,
    DynMaskLMHead,
    DynMaskRotaryEmbedding,
    DynMaskSinusoidalEmbedding,
    DynMaskTransform,
    DynMaskZeroCenteredRMSNorm,
    make_norm,
    pooled,
)
from .plan import MaskPlan


class DynMaskPreTrainedModel(DynMaskBaseModel):
    """Base class of the DynMask models: configuration, weight initialisation, masks and the `dynmask` attention."""

    config: DynMaskConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["DynMaskLayer"]  # Accelerate's FSDP2 shards the embeddings separately
    _input_embed_layer = "word_embeddings"
    own_mask = "full"

    def __init__(self, config: DynMaskConfig):
        super().__init__(config)
        num_features = getattr(config, "num_features", None)  # an encoder-decoder has none of its own
        if num_features is not None:
            if self._tied_weights_keys:
                raise ValueError(
                    f"`num_features` must be None in a {type(self).__name__}, which predicts the tokens that it reads; "
                    f"got {num_features}"
                )
            self.main_input_name = "input_features"

    def output_lengths(self, lengths: Tensor) -> Tensor:
        """Output lengths for inputs of `lengths` frames, which are smaller if convolutions subsample.

        Args:
            lengths (integer `Tensor`): Input lengths, of any shape.

        Returns:
            `Tensor` of the same shape: `ceil(lengths / config.inputs_to_logits_ratio)`.
        """
        return -(-lengths // self.config.inputs_to_logits_ratio)

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        if requested_attention in (None, "dynmask"):
            return "dynmask"
        known = ", ".join(map(repr, ATTENTION_IMPLEMENTATIONS))
        try:
            chosen = super().get_correct_attn_implementation(requested_attention, is_init_check)
        except ValueError as error:
            raise ValueError(f"{error} DynMask models run with {known}.") from error
        if chosen not in ATTENTION_IMPLEMENTATIONS:
            raise ValueError(f"`attn_implementation` of a DynMask model must be one of {known}; got {chosen!r}")
        return chosen

    def set_mask(self, mask: str | list[str] | None) -> None:
        """Sets the mask of the model from the next forward pass on. It is saved with the configuration.

        Args:
            mask (`str` or `list[str]`, *optional*): One expression for all layers, or one per layer. `None`: the
                default of the model's class.

        Raises:
            ValueError: An expression does not parse, or their number is not that of the layers.
        """
        changed = self.checked_masks(self.own_mask if mask is None else mask)
        for name, value in changed.items():
            setattr(self.config, name, value)
        warn_of_adapters_alone(self, mask)

    def checked_masks(self, mask: str | list[str] | None = None, cross_mask: str | None = None) -> dict[str, Any]:
        """The fields of the configuration that hold these masks; raises a `ValueError` if the model cannot use them."""
        changed = {"cross_mask": self.config.cross_mask if cross_mask is None else cross_mask}
        if mask is not None:
            by_layer = not isinstance(mask, str)
            changed |= {"layer_masks": list(mask)} if by_layer else {"layer_masks": None, "mask": mask}
        config = copy.copy(self.config)
        vars(config).update(changed)
        config.validate_masks()
        cross = parse(config.cross_mask)
        layers = [module for module in self.modules() if isinstance(module, DynMaskLayer)]
        for layer, own in zip(layers, masks_of(config), strict=False):
            for attention, expression in ((layer.attention, own), (layer.cross_attention, cross)):
                if attention is not None and expression.holds(TopK) and attention.key_scores is None:
                    raise ValueError(
                        f"the mask '{expression}' needs weights that score keys; make the model with a mask that has "
                        "`topk`"
                    )
        return changed

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, DynMaskKeyScores):
            init.zeros_(module.scale)
        if isinstance(module, DynMaskZeroCenteredRMSNorm):
            init.zeros_(module.weight)
        if isinstance(module, DynMaskSinusoidalEmbedding):
            init.copy_(module.weight, module.table(*module.weight.shape, device=module.weight.device))


class DynMaskModel(DynMaskPreTrainedModel):
    """The bare encoder.

    Args:
        config ([`DynMaskConfig`]): Sizes and masks.
        add_pooling_layer (`bool`, *optional*): Whether to add a pooler. `None`: `config.use_pooler`.
    """

    def __init__(self, config: DynMaskConfig, add_pooling_layer: bool | None = None):
        super().__init__(config)
        self.embeddings = DynMaskEmbeddings(config)
        by_type = config.rope_by_type()
        rotary = config.position_type == "rotary"
        self.rotary_emb = DynMaskRotaryEmbedding(config) if rotary and not by_type else None
        self.rotary_by_type = nn.ModuleDict({kind: DynMaskRotaryEmbedding(config, kind) for kind in by_type})
        self.layers = nn.ModuleList([DynMaskLayer(config, layer) for layer in range(config.num_hidden_layers)])
        norm_before = config.norm_placement != "post"
        self.final_norm = make_norm(config, config.hidden_size) if norm_before else nn.Identity()
        with_pooler = config.use_pooler if add_pooling_layer is None else add_pooling_layer
        self.pooler = POOLERS[config.classifier_transform](config) if with_pooler else None
        self.gradient_checkpointing = False
        self.post_init()

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
        layout: SequenceLayout | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_layout: SequenceLayout | None = None,
        encoder_fields: dict[str, Tensor] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPoolingAndCrossAttentions:
        r"""
        Args:
            input_ids (`Tensor` of shape `(B, T)`, or flat `(1, N)`): Token ids.
            lengths (`Tensor` of shape `(B,)`, or `(S,)` for a flat batch): Row b holds `lengths[b]` tokens from its
                left edge; a flat batch holds S sequences end to end.
            attention_mask (`Tensor` of shape `(B, T)`): 0 at absent tokens, anywhere in a row; an alternative to
                `lengths`. Without both, all tokens are real. Or bool of shape `(B, T, T)` or `(B, H, T, T)`: an
                explicit mask of which query may see which key, combined with the configuration's mask by `&`.
            position_ids (`Tensor` of shape `(B, T)` or `(1, T)`): Positions for the embeddings, in place of each
                token's index in its sequence. Masks always use the index. If no other argument tells the sequences of a
                row apart, a sequence begins wherever positions return to the first position of the row.
            cu_seq_lens_q, cu_seq_lens_k (integer `Tensor` of shape `(S + 1,)`): 0, then the end of each sequence of a
                flat batch; an alternative to `lengths`. `max_length_q` and `max_length_k` are bounds of the sequence
                lengths. `seq_idx (1, N)` numbers the sequences. All are as in transformers' padding-free collators.
            token_type_ids (`Tensor` of shape `(B, T)`): Token types; ignored by a model without types.
            inputs_embeds (`Tensor` of shape `(B, T, embedding_size)`): Token embeddings in place of `input_ids`.
            segment_ids (`Tensor` of shape `(B, T)`): Field of the mask `segments`.
            prefix_lengths (`Tensor` of shape `(B,)` or `(S,)`): Field of the mask `prefix`.
            hidden_spans (`Tensor` of shape `(B, K, 2)` or `(S, K, 2)`): Field of the mask `visible`: (start, length).
            global_tokens (bool `Tensor` of shape `(B, T)`): Field of the mask `global_tokens`.
            mask_choice (`Tensor` of shape `(B,)` or `(S,)`): Field of the mask `select`.
            missing (bool `Tensor` of shape `(B, T)`): True where a value inside a sequence is missing. Such a token is
                never a key and its output is 0, but its position still counts. Its input, NaN included, has no effect.
            input_features (`Tensor` of shape `(B, T, num_features)`, or flat `(1, N, num_features)`): Frames in place
                of `input_ids`, if the configuration has `num_features`. `lengths`, `attention_mask` and `missing` refer
                to these frames. If convolutions subsample them, all other inputs and the outputs refer to the
                subsampled frames: row b has `output_lengths(lengths)[b]` of them, from its left edge.
            layout ([`SequenceLayout`]): The batch's layout, if a head has already made it. `last_hidden_state` then
                stays flat, `(1, N, C)`. A head embeds frames before: see [`embed_features`].
            past_key_values, cache ([`~transformers.Cache`]): Two names for the keys and values of earlier columns, to
                which the current ones are added. The inputs are then the current columns only; `attention_mask`,
                `layout` and fields cover all columns.
            encoder_hidden_states (`Tensor` of shape `(1, Nk, C)`): Flat states of an encoder for cross-attention, in
                the order of `encoder_layout`, a [`SequenceLayout`] with as many sequences as this batch.
            encoder_fields (`dict[str, Tensor]`): Fields of the encoder's batch, which the cross mask reads.

        Returns:
            [`~transformers.modeling_outputs.BaseModelOutputWithPoolingAndCrossAttentions`]:
            `last_hidden_state (B, T, C)`, 0 at absent tokens; `pooler_output (B, C)` or `(S, C)`; the given cache, as
            `cache` and as `past_key_values`; on request `hidden_states` and, with `attn_implementation="eager"`,
            `attentions (B, H, T, T)`.

        Raises:
            ValueError: The inputs contradict each other or the configuration.
            TypeError: A keyword is unknown.
        """
        cache = given_cache(cache, past_key_values)
        inputs = given_input(self.main_input_name, input_ids, input_features, inputs_embeds)
        output_hidden_states = kwargs.get("output_hidden_states", self.config.output_hidden_states)
        output_attentions = kwargs.get("output_attentions", self.config.output_attentions)
        if output_attentions and self.config._attn_implementation != "eager":
            raise ValueError(
                "`output_attentions` needs attn_implementation='eager', the only one that computes weights; "
                f"got {self.config._attn_implementation!r}"
            )
        flat_output = layout is not None
        packing = {name: kwargs.get(name) for name in PACKING}
        if input_features is not None:
            inputs_embeds, layout = self.embed_features(
                input_features, lengths, attention_mask, missing, position_ids, packing
            )
            inputs = inputs_embeds
        rows, width = inputs.shape[:2]
        if layout is None:
            seen = num_cached_tokens(cache)
            layout = layout_of_batch(
                (rows, seen + width),
                inputs.device,
                lengths,
                attention_mask,
                missing,
                position_ids=position_ids if seen == 0 else None,
                packing=packing,
            )
        room = self.embeddings.room
        if room is not None and position_ids is None:
            layout = layout.bounded(room)
        whole = layout
        if cache is not None:
            layout = last_columns(whole, width)
        states, position_ids = self._embed(layout, input_ids, position_ids, token_type_ids, inputs_embeds)
        rotary = self._rotary(states, position_ids)
        fields = given({name: kwargs.get(name) for name in BATCH_FIELDS})
        if is_explicit(attention_mask):
            fields["attention_mask"] = attention_mask
        if fields:
            warn_of_unread_fields(self, fields, self.fields_read())
        in_graph = torch.compiler.is_compiling() and layout.described is not None and not output_attentions
        plans = self._plans(layout, whole, cache, fields, in_graph)
        cross_plan = None
        if encoder_hidden_states is not None:
            cross_plan = self._cross_plan(layout, encoder_layout, fields, encoder_fields or {}, in_graph)

        settings = AttentionSettings.of(self.config)
        states = states.squeeze(0)
        if encoder_hidden_states is not None:
            encoder_hidden_states = encoder_hidden_states.squeeze(0)
        all_states, all_weights, all_cross_weights = [], [], []
        for layer, plan, cos_sin in zip(self.layers, plans, rotary, strict=True):
            if output_hidden_states:
                # The returned states are on the path to the output, so that they receive gradients.
                all_states.append(layout.unflatten(states.unsqueeze(0)))
                states = layout.flatten(all_states[-1]).squeeze(0)
            states, weights, cross_weights = layer(
                states,
                encoder_hidden_states,  # positional, since gradient checkpointing gives keywords no gradient
                plan=plan,
                settings=settings,
                cross_plan=cross_plan,
                rotary=cos_sin,
                **{CACHE_NAME: cache},
            )
            all_weights.append(weights)
            all_cross_weights.append(cross_weights)
        states = self.final_norm(states).unsqueeze(0)
        padded = states if flat_output else layout.unflatten(states)
        if output_hidden_states:
            all_states.append(layout.unflatten(states) if flat_output else padded)
        return output_with_cache(
            BaseModelOutputWithPoolingAndCrossAttentions,
            cache,
            last_hidden_state=padded,
            pooler_output=None if self.pooler is None else pooled(self.config, self.pooler, states, layout, input_ids),
            hidden_states=tuple(all_states) if output_hidden_states else None,
            attentions=tuple(all_weights) if output_attentions else None,
            cross_attentions=tuple(all_cross_weights) if output_attentions and cross_plan is not None else None,
        )

    def fields_read(self) -> set[str]:
        """Names of the fields that the model's masks read."""
        texts = [*mask_texts(self.config), *([self.config.cross_mask] if self.config.add_cross_attention else [])]
        return {name for text in dict.fromkeys(texts) for name in fields_of(text)}

    def embed_features(
        self,
        input_features: Tensor,
        lengths: Tensor | None = None,
        attention_mask: Tensor | None = None,
        missing: Tensor | None = None,
        position_ids: Tensor | None = None,
        packing: dict[str, Any] | None = None,
    ) -> tuple[Tensor, SequenceLayout]:
        """Embeds frames as `inputs_embeds`, by a projection or by convolutions that may subsample them.

        Args:
            input_features, lengths, attention_mask, missing: As in [`forward`].
            position_ids (`Tensor` of shape `(B, output_lengths(T))`, *optional*): Positions of the subsampled frames.
                In a single row they are checked against its sequences.
            packing (`dict[str, Any]`, *optional*): `cu_seq_lens_q` and the like of [`forward`].

        Returns:
            `Tensor` of shape `(B, output_lengths(T), embedding_size)` and the [`SequenceLayout`] of the frames in it.

        Raises:
            ValueError: `input_features` has another shape, or the inputs contradict each other.
        """
        if input_features.dim() != 3 or input_features.shape[2] != self.config.num_features:
            raise ValueError(
                f"`input_features` must have shape (B, T, num_features={self.config.num_features}); "
                f"got {tuple(input_features.shape)}"
            )
        shape = tuple(input_features.shape[:2])
        frames = frames_of_batch(shape, input_features.device, lengths, attention_mask, missing, packing=packing)
        embeds, layout = self.embeddings.feature_embeddings(input_features.to(self.dtype), frames)
        may_be_flat = layout.shape[0] == 1 and not is_explicit(attention_mask)
        if position_ids is not None and may_be_flat:
            layout.divided_by_positions(per_token(position_ids, layout.shape), is_stated=True)
        return layout.unflatten(embeds), layout

    @eager_only
    def output_layout(
        self,
        shape: tuple[int, int],
        device: torch.device,
        lengths: Tensor | None = None,
        attention_mask: Tensor | None = None,
        missing: Tensor | None = None,
    ) -> SequenceLayout:
        """The layout of the outputs for inputs of `shape` `(B, T)`: that of the tokens or of the subsampled frames.

        Args:
            lengths, attention_mask, missing: As in [`forward`].

        Raises:
            ValueError: The inputs contradict each other.
        """
        frames = frames_of_batch(shape, device, lengths, attention_mask, missing)
        for stride in self.config.conv_stride:
            frames = frames.subsampled(stride)
        return frames.present

    def _rotary(self, states: Tensor, position_ids: Tensor) -> list[tuple[Tensor, Tensor] | None]:
        """The (cos, sin) of each layer, `(1, N, D)` each; `None` without rotary positions."""
        if not self.rotary_by_type:
            shared = self.rotary_emb(states, position_ids) if self.rotary_emb is not None else None
            return [shared] * len(self.layers)
        by_type = {kind: rotary(states, position_ids) for kind, rotary in self.rotary_by_type.items()}
        return [by_type[kind] for kind in self.config.layer_types]

    def _cross_plan(
        self,
        layout: SequenceLayout,
        encoder_layout: SequenceLayout,
        fields: dict[str, Tensor],
        encoder_fields: dict[str, Tensor],
        in_graph: bool,
    ) -> MaskPlan | GraphPlan:
        """The plan of cross-attention, with per-token fields of both sides and all other fields of the encoder."""
        cross_fields = dict(encoder_fields)
        for name in TOKEN_FIELDS:
            if name in encoder_fields:
                cross_fields[key_name(name)] = cross_fields.pop(name)
            if name in fields:
                cross_fields[name] = fields[name][:, -layout.shape[1] :]
        if in_graph and encoder_layout.described is not None:
            return GraphPlan(self.config.cross_mask, layout, encoder_layout, cross_fields)
        return self._cross_plan_outside(layout, encoder_layout, cross_fields)

    @eager_only
    def _cross_plan_outside(
        self, layout: SequenceLayout, encoder_layout: SequenceLayout, fields: dict[str, Tensor]
    ) -> MaskPlan:
        return MaskPlan(self.config.cross_mask, layout, encoder_layout, fields=fields)

    def _plans(
        self,
        layout: SequenceLayout,
        whole: SequenceLayout,
        cache: Cache | None,
        fields: dict[str, Tensor],
        in_graph: bool,
    ) -> list[MaskPlan] | list[GraphPlan]:
        """Each layer's plan; layers with the same mask share one."""
        if in_graph and cache is None:
            suffix = " & dense" if "attention_mask" in fields else ""
            return [GraphPlan(f"({text}){suffix}", layout, layout, fields) for text in mask_texts(self.config)]
        return self._plans_outside(layout, whole, cache, fields)

    @eager_only
    def _plans_outside(
        self, layout: SequenceLayout, whole: SequenceLayout, cache: Cache | None, fields: dict[str, Tensor]
    ) -> list[MaskPlan]:
        masks = masks_of(self.config)
        if "attention_mask" in fields:
            masks = [mask & Dense() for mask in masks]
        if cache is not None:
            own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
            return cached_plans(masks, layout, whole, own, fields)
        plans = {mask: MaskPlan(mask, layout, fields=fields) for mask in dict.fromkeys(masks)}
        return [plans[mask] for mask in masks]

    def _embed(
        self,
        layout: SequenceLayout,
        input_ids: Tensor | None,
        position_ids: Tensor | None,
        token_type_ids: Tensor | None,
        inputs_embeds: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Flat states `(1, N, C)` and positions `(1, N)` from inputs in the batch's layout."""
        position_ids = self.embeddings.positions(layout, position_ids)
        if inputs_embeds is None:
            ids = layout.flatten(integers("input_ids", input_ids))
            words = embed_tokens(self.embeddings.word_embeddings, ids, layout)
        else:
            words = layout.flatten_values(inputs_embeds)
        types = None
        if token_type_ids is not None:
            types = layout.flatten(integers("token_type_ids", token_type_ids).expand(layout.shape))
        return self.embeddings(words, position_ids, types), position_ids


class DynMaskTaskModel(TaskModel, DynMaskPreTrainedModel):
    """A head on [`DynMaskModel`]."""

    def _new_encoder(self, config):
        return DynMaskModel(config, add_pooling_layer=self.pooling)

    def _new_transform(self, config):
        return DynMaskTransform(config) if config.classifier_transform == "lm_head" else nn.Identity()


class DynMaskForMaskedLM(DynMaskTaskModel):
    """Masked language modelling; `labels (B, T)`. In training, logits are only computed for the targets and are not
    returned (`logits` is `None`)."""

    output_class = MaskedLMOutput
    _tied_weights_keys = {"lm_head.decoder.weight": "model.embeddings.word_embeddings.weight"}

    def _add_head(self, config):
        self.lm_head = DynMaskLMHead(config)

    def get_output_embeddings(self):
        return self.lm_head.decoder

    def set_output_embeddings(self, new_embeddings):
        self.lm_head.decoder = new_embeddings

    def _predict(self, outputs, layout, labels, num_items_in_batch):
        states = outputs.last_hidden_state
        if labels is None:
            return None, layout.unflatten(self.lm_head(states))
        labels = flat_labels("labels", labels, layout)
        if self.training:
            states, labels = select_targets(states, labels)
            return token_loss(self.lm_head(states), labels, num_items_in_batch), None
        logits = self.lm_head(states)
        return token_loss(logits, labels, num_items_in_batch), layout.unflatten(logits)


class DynMaskForCausalLM(DynMaskPreTrainedModel, DynMaskGenerationMixin):
    """Causal language modelling and generation; `labels (B, T)` are the inputs, which are shifted here.

    Without a mask in its configuration, the model has the mask `causal`. In training with labels, logits are only
    computed for the targets and are not returned (`logits` is `None`). No token is predicted from another sequence.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embeddings.word_embeddings.weight"}
    own_mask = "causal"

    def __init__(self, config: DynMaskConfig):
        if config.mask is None and config.layer_masks is None:
            config.mask = self.own_mask
        super().__init__(config)
        if config.tie_word_embeddings and config.embedding_size != config.hidden_size:
            raise ValueError(
                f"`embedding_size` must be hidden_size={config.hidden_size} with tie_word_embeddings=True; "
                f"got {config.embedding_size}"
            )
        self.model = DynMaskModel(config, add_pooling_layer=False)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        _shift_labels_in_label_smoothing(cls)

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, new_embeddings):
        self.lm_head = new_embeddings

    @known_keywords("shift_labels")
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
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        r"""
        Inputs as in [`DynMaskModel.forward`], and:

        Args:
            past_key_values, cache ([`~transformers.Cache`]): Two names for the keys and values of earlier columns. The
                inputs are then the current columns only; `attention_mask`, `missing` and fields cover all columns.
                `lengths` can only be given with the first columns.
            use_cache (`bool`): Whether to return a cache; a flat batch never returns one. `None`: `config.use_cache`,
                but `False` in training.
            labels (`Tensor` of shape `(B, T)`): Token ids, -100 for none; each is predicted from the token before it.
            shift_labels (`Tensor` of shape `(B, T)`): Labels that are already shifted to the token before; they take
                precedence over `labels`. Context-parallel training passes them. They are not in the signature, because
                the `Trainer` would then expect them in every batch.
            num_items_in_batch (`int` or `Tensor`): Number of targets to average the loss over. `None`: those of this
                batch.
            logits_to_keep (`int` or `Tensor` of columns): The number of last columns, or the columns, of which logits
                are computed; 0: all.

        Raises:
            ValueError: The inputs contradict each other; the mask allows keys that a cache does not have.
        """
        shift_labels = kwargs.pop("shift_labels", None)
        tokens = input_ids if input_ids is not None else inputs_embeds
        if tokens is None:
            raise ValueError("exactly one of `input_ids` and `inputs_embeds` must be given")
        rows, width = tokens.shape[:2]
        cache = given_cache(cache, past_key_values)
        seen = num_cached_tokens(cache)
        if seen and lengths is not None:
            raise ValueError("`lengths` must come with the first columns; later ones take an `attention_mask` of all")
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        whole = layout_of_batch(
            (rows, seen + width),
            tokens.device,
            lengths,
            attention_mask,
            missing,
            position_ids=position_ids if seen == 0 else None,
            packing={name: kwargs.pop(name, None) for name in PACKING},
        )
        in_rows = whole.num_sequences == rows
        if cache is not None and not in_rows:
            raise ValueError(f"a cache needs a batch of one sequence a row; got {whole.num_sequences} in {rows} rows")
        if use_cache and cache is None and in_rows:
            cache = DynamicCache(config=self.config)
        outputs = self.model(
            input_ids=input_ids,
            position_ids=position_ids,
            token_type_ids=token_type_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask if is_explicit(attention_mask) else None,
            layout=whole,
            cache=cache,
            **kwargs | {"return_dict": True},
        )
        layout = whole if cache is None else last_columns(whole, width)
        states = outputs.last_hidden_state
        loss = logits = None
        targets = aligned_targets(labels, shift_labels, layout)
        if targets is None:
            logits = in_columns(states, layout, logits_to_keep, self.lm_head)
        elif self.training:
            states, targets = select_targets(states, targets)
            loss = token_loss(self.lm_head(states), targets, num_items_in_batch)
        else:
            flat_logits = self.lm_head(states)
            loss = token_loss(flat_logits, targets, num_items_in_batch)
            logits = in_columns(flat_logits, layout, logits_to_keep)
        return output_with_cache(
            CausalLMOutputWithPast,
            cache,
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def _shift_labels_in_label_smoothing(model_class: type) -> None:
    """Makes the Trainer's label smoothing shift labels, which it does for the causal models in this table."""
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_class.__name__] = model_class.__name__


_shift_labels_in_label_smoothing(DynMaskForCausalLM)


class DynMaskForTokenClassification(TokenClassification, DynMaskTaskModel):
    """A class per token; `labels (B, T)`, logits `(B, T, num_labels)`."""


class DynMaskForSequenceClassification(SequenceClassification, DynMaskTaskModel):
    """One class, several classes or a number per sequence; `labels (B,)`, or floats `(B, num_labels)` for several
    classes; logits `(B, num_labels)`. A flat batch has S in place of B."""


class DynMaskForCTC(DynMaskTaskModel):
    """Connectionist temporal classification (Graves et al., 2006): text without alignment, shorter than its frames.

    `labels (B, L)` are token ids, followed by -100 (or the blank); logits `(B, output_lengths(T), vocab_size)`, 0 at
    absent frames. The blank is `config.pad_token_id`, as in [`~transformers.Wav2Vec2ForCTC`]. A flat batch has labels
    `(S, L)`.

    If `num_items_in_batch` is given and `config.ctc_loss_reduction` is `"mean"`, the summed loss is divided by it: the
    average is over the labels of all batches of a step, not over sequences.

    Raises:
        ValueError: A target needs more frames than its sequence has: one per label, and one for the blank between
            repeated labels. With `config.ctc_zero_infinity` its loss is 0 instead.
    """

    output_class = CausalLMOutput

    def _add_head(self, config):
        if config.pad_token_id is None or not 0 <= config.pad_token_id < config.vocab_size:
            raise ValueError(
                f"`pad_token_id`, the blank, must be from 0 to vocab_size - 1 = {config.vocab_size - 1}; "
                f"got {config.pad_token_id}"
            )
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)

    def _predict(self, outputs, layout, labels, num_items_in_batch):
        logits = self.lm_head(self.dropout(outputs.last_hidden_state))
        loss = ctc_loss(logits, labels, layout, self.config, num_items_in_batch) if labels is not None else None
        return loss, layout.unflatten(logits)


class DynMaskForMultipleChoice(DynMaskTaskModel):
    """A choice of texts; inputs `(B, choices, T)`, `lengths (B, choices)`, `labels (B,)`, logits `(B, choices)`."""

    output_class = MultipleChoiceModelOutput
    pooling = True

    def _add_head(self, config):
        self.classifier = nn.Linear(config.hidden_size, 1, bias=config.classifier_bias)

    def _encode(self, **inputs):
        choices = given_input(self.main_input_name, **inputs).shape[1]
        rows = {
            name: value.flatten(0, 1) if isinstance(value, Tensor) and value.dim() > 1 else value
            for name, value in inputs.items()
        }
        outputs, layout = super()._encode(**rows)
        outputs.pooler_output = outputs.pooler_output.unflatten(0, (-1, choices))
        return outputs, layout

    def _predict(self, outputs, layout, labels, num_items_in_batch):
        logits = self.classifier(self.dropout(outputs.pooler_output)).squeeze(-1)
        return None if labels is None else token_loss(logits, labels, num_items_in_batch), logits


class DynMaskForQuestionAnswering(DynMaskTaskModel):
    """Start and end of an answer; `start_positions`, `end_positions (B,)` index the sequence, logits `(B, T)`.

    The loss is over real tokens only; in stock models it includes padding. A position beyond the sequence is ignored.
    """

    output_class = QuestionAnsweringModelOutput

    def _add_head(self, config):
        self.transform = self._new_transform(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)

    @known_keywords("labels")  # the Trainer counts them; the targets are the positions
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
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ):
        r"""
        Inputs as in [`DynMaskModel.forward`], and:

        Args:
            start_positions, end_positions (`Tensor` of shape `(B,)` or `(S,)`): First and last token of the answer.
            num_items_in_batch (`int` or `Tensor`): Number of answers to average the loss over. `None`: those of this
                batch.
        """
        kwargs.pop("labels", None)
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
        logits = self.qa_outputs(self.dropout(self.transform(outputs.last_hidden_state)))
        loss = None
        if start_positions is not None and end_positions is not None:
            ends = zip(logits.unbind(-1), (start_positions, end_positions), strict=True)
            loss = sum(position_loss(scores, place, layout, num_items_in_batch) for scores, place in ends) / 2
        start_logits, end_logits = layout.unflatten(logits).unbind(-1)
        return self.output_class(
            loss=loss,
            start_logits=start_logits.contiguous(),
            end_logits=end_logits.contiguous(),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


__all__ = [
    "DynMaskForCTC",
    "DynMaskForCausalLM",
    "DynMaskForMaskedLM",
    "DynMaskForMultipleChoice",
    "DynMaskForQuestionAnswering",
    "DynMaskForSequenceClassification",
    "DynMaskForTokenClassification",
    "DynMaskModel",
    "DynMaskPreTrainedModel",
]
