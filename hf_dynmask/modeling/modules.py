"""The parts of a DynMask model. All work on real tokens only: embeddings on flat `(1, N, ...)` tensors, layers on
states `(N, C)`.

Shape legend: N real tokens, C hidden size, H heads, Hk key/value heads, D and Dv head sizes.
"""
# A configuration's optional sizes are `None` only until `__post_init__` has run.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportOptionalOperand=false, reportCallIssue=false
# pyright: reportOptionalCall=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from .attention import attend_rows, stays_in_rows
from .batch import per_token
from .configuration_dynmask import DynMaskConfig, masks_of
from .embedding import looked_up
from .features import DynMaskFeatureEmbeddings
from .graph_attention import attend
from .kv_cache import given_cache
from .layout import SequenceLayout, in_heads, packed, reads_are_free
from .masks import TopK, parse
from .plan import MaskPlan

# transformers' `attn_implementation` -> the `implementation` of `dynmask_attention`.
ATTENTION_IMPLEMENTATIONS = {"dynmask": "auto", "eager": "reference", "sdpa": "sdpa"}


def make_norm(config: DynMaskConfig, size: int) -> nn.Module:
    """The norm of type `config.norm_type`, over a last dimension of `size`."""
    if config.norm_type == "layer_norm":
        return nn.LayerNorm(size, eps=config.norm_eps, bias=config.norm_bias)
    return make_rms_norm(config, size)


def make_rms_norm(config: DynMaskConfig, size: int) -> nn.RMSNorm:
    """An RMS norm, also for models whose other norms are of type `"layer_norm"`."""
    is_centered = config.norm_type == "zero_centered_rms_norm"
    return (DynMaskZeroCenteredRMSNorm if is_centered else nn.RMSNorm)(size, eps=config.norm_eps)


class DynMaskZeroCenteredRMSNorm(nn.RMSNorm):
    """An RMS norm that multiplies by 1 + weight, in float32 or better (Gemma)."""

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        weight = 1 + self.weight.to(dtype)
        return nn.functional.rms_norm(x.to(dtype), self.normalized_shape, weight, self.eps).to(x.dtype)


class DynMaskSinusoidalEmbedding(nn.Module):
    """Fixed sine and cosine positions ("Attention Is All You Need", arXiv:1706.03762, section 3.5)."""

    weight: Tensor

    def __init__(self, rows: int, size: int, in_halves: bool = False):
        super().__init__()
        self.in_halves = in_halves
        self.register_buffer("weight", self.table(rows, size), persistent=False)

    def table(self, rows: int, size: int, device: torch.device | None = None) -> Tensor:
        """`(rows, size)`: sines in even columns and cosines in odd ones, or sines in the first half and cosines in the
        second, with geometrically increasing periods."""
        position = torch.arange(rows, dtype=torch.float64, device=device)[:, None]
        column = torch.arange(size, device=device)
        angle = position * 10000.0 ** (-2 * (column // 2).double() / size)
        waves = torch.where(column % 2 == 0, angle.sin(), angle.cos()).to(torch.get_default_dtype())
        return torch.cat([waves[:, ::2], waves[:, 1::2]], dim=1) if self.in_halves else waves

    def forward(self, position_ids: Tensor) -> Tensor:
        return nn.functional.embedding(position_ids, self.weight)


class DynMaskRotaryEmbedding(LlamaRotaryEmbedding):
    """Rotary positions (arXiv:2104.09864) as transformers computes them for Llama, every `rope_type` included.

    Args:
        config ([`DynMaskConfig`]): With `rope_parameters`.
        layer_type (`str`, *optional*): The layer type whose parameters are used, if they are by layer type.
    """

    def __init__(self, config: DynMaskConfig, layer_type: str | None = None):
        if layer_type is not None:
            parameters = config.rope_by_type()[layer_type]
            config = copy.copy(config)
            config.rope_parameters = parameters
        super().__init__(config)


class DynMaskScaledEmbedding(nn.Embedding):
    """Embeddings times a scale, in the attribute `embed_scale`, where PEFT looks for it."""

    def __init__(self, rows: int, size: int, embed_scale: float, padding_idx: int | None = None):
        super().__init__(rows, size, padding_idx=padding_idx)
        self.embed_scale = embed_scale

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.embed_scale


class DynMaskEmbeddings(nn.Module):
    """Sum of token or frame, position and type embeddings, normalised: `(1, N, E)` to `(1, N, C)` states."""

    def __init__(self, config: DynMaskConfig):
        super().__init__()
        size = config.embedding_size
        self.config = config
        scale, pad_id = config.embedding_scale, config.pad_token_id
        if config.num_features is not None:
            self.feature_embeddings = DynMaskFeatureEmbeddings(config)
        elif scale == 1:
            self.word_embeddings = nn.Embedding(config.vocab_size, size, padding_idx=pad_id)
        else:
            self.word_embeddings = DynMaskScaledEmbedding(config.vocab_size, size, scale, padding_idx=pad_id)
        self.position_embeddings = None
        if config.position_type == "learned":
            self.position_embeddings = nn.Embedding(config.max_position_embeddings, size)
        elif config.position_type == "sinusoidal":
            self.position_embeddings = DynMaskSinusoidalEmbedding(
                config.max_position_embeddings, size, config.sinusoidal_in_halves
            )
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, size) if config.type_vocab_size else None
        self.norm = make_norm(config, size) if config.embedding_norm else nn.Identity()
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.projection = nn.Linear(size, config.hidden_size) if size != config.hidden_size else nn.Identity()

    def positions(self, layout: SequenceLayout, position_ids: Tensor | None) -> Tensor:
        """Positions `(1, N)`: of each token in its sequence, or those that are given in the batch's layout.

        `config.position_offset` is also added to given positions if they count every sequence from 0.

        Raises:
            ValueError: A sequence is longer than the table; given positions have another shape.
        """
        offset = self.config.position_offset
        if position_ids is None:
            self._check_room(layout)
            return layout.positions[None] + offset
        flat = layout.flatten(per_token("position_ids", position_ids, layout.shape))
        return flat + offset * (flat == layout.positions).all() if offset else flat

    @property
    def room(self) -> int | None:
        """Positions that a sequence may have; `None`: any number."""
        has_table = self.config.position_type in ("learned", "sinusoidal")
        return self.config.max_position_embeddings - self.config.position_offset if has_table else None

    def _check_room(self, layout: SequenceLayout) -> None:
        room = self.room
        if room is None or not reads_are_free(layout.device):  # on other devices the look-up itself fails
            return
        if layout.num_positions > room:
            raise ValueError(
                f"a sequence must have at most {room} tokens (`max_position_embeddings`); got {layout.num_positions}"
            )

    def forward(self, inputs_embeds: Tensor, position_ids: Tensor, token_type_ids: Tensor | None) -> Tensor:
        states = inputs_embeds
        if self.token_type_embeddings is not None:
            if token_type_ids is None:
                states = states + self.token_type_embeddings.weight[0]
            else:
                states = states + looked_up("token_type_ids", self.token_type_embeddings, token_type_ids)
        if self.position_embeddings is not None:
            positions = looked_up("position_ids", self.position_embeddings, position_ids)
            states = states + positions.to(states.dtype)
        return self.projection(self.dropout(self.norm(states)))


class DynMaskKeyScores(nn.Module):
    """Scores of the keys, per head, by which `topk` chooses: `exp(scale * softplus(projection(values)))`.

    "Trainable Dynamic Mask Sparse Attention", arXiv:2508.02124, section 3.1.
    """

    def __init__(self, config: DynMaskConfig):
        super().__init__()
        heads = config.num_key_value_heads
        self.projection = nn.Linear(heads * config.value_head_dim, heads, bias=config.attention_bias)
        self.scale = nn.Parameter(torch.zeros(heads))

    def forward(self, value: Tensor) -> Tensor:
        """Values `(N, Hk, Dv)` to scores `(1, Hk, N)`."""
        raw = self.projection(value.flatten(1))
        return torch.exp(self.scale * nn.functional.softplus(raw)).T.unsqueeze(0)


class AttentionSettings(NamedTuple):
    """The attention settings of a configuration, read once per forward pass: reading them in each layer is slow.

    Attributes:
        implementation (`str`): The `implementation` of `dynmask_attention`.
        apply_mask_to (`str`): `"scores"` or `"weights"`.
    """

    implementation: str
    apply_mask_to: str

    @classmethod
    def of(cls, config: DynMaskConfig) -> AttentionSettings:
        return cls(ATTENTION_IMPLEMENTATIONS[config._attn_implementation], config.apply_mask_to)


class DynMaskAttention(nn.Module):
    """Multi-head attention over the pairs that a [`MaskPlan`] allows."""

    def __init__(self, config: DynMaskConfig, layer_idx: int, chooses_keys: bool):
        super().__init__()
        self.layer_idx = layer_idx
        self.head_dim, self.value_head_dim = config.head_dim, config.value_head_dim
        self.dropout = config.attention_probs_dropout_prob
        heads, key_heads = config.num_attention_heads, config.num_key_value_heads
        bias = config.attention_bias
        self.q_proj = nn.Linear(config.hidden_size, heads * config.head_dim, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, key_heads * config.head_dim, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, key_heads * config.value_head_dim, bias=bias)
        self.o_proj = nn.Linear(heads * config.value_head_dim, config.hidden_size, bias=config.attention_output_bias)
        self.q_norm = make_rms_norm(config, config.head_dim) if config.use_qk_norm else nn.Identity()
        self.k_norm = make_rms_norm(config, config.head_dim) if config.use_qk_norm else nn.Identity()
        self.scaling = config.query_pre_attn_scalar**-0.5
        self.key_scores = DynMaskKeyScores(config) if chooses_keys else None

    def forward(
        self,
        hidden_states: Tensor,
        plan: MaskPlan,
        settings: AttentionSettings,
        rotary: tuple[Tensor, Tensor] | None = None,
        cache: Cache | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """States `(N, C)`, the plan and rotary (cos, sin) `(1, N, D)` to states `(N, C)` and weights, if any."""
        query = self._query(hidden_states)
        key, value = self._key_value(hidden_states)
        if rotary is not None:
            query, key = apply_rotary_pos_emb(query, key, *(values.squeeze(0) for values in rotary))
        if cache is not None:
            rows = self._update_cache(key, value, plan, cache)
            if plan.key_layout is not plan.layout:
                return self._attend_cached(query, *rows, plan, settings)
        return self._attend(query, key, value, plan, settings)

    def _query(self, hidden_states: Tensor) -> Tensor:
        return self.q_norm(self._heads(self.q_proj(hidden_states), self.head_dim))

    def _key_value(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        key = self.k_norm(self._heads(self.k_proj(hidden_states), self.head_dim))
        return key, self._heads(self.v_proj(hidden_states), self.value_head_dim)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, plan: MaskPlan, settings: AttentionSettings
    ) -> tuple[Tensor, Tensor | None]:
        output, weights = attend(
            query,
            key,
            value,
            plan,
            scaling=self.scaling,
            dropout=self.dropout if self.training else 0.0,
            apply_mask_to=settings.apply_mask_to,
            key_scores=self.key_scores(value) if plan.reads_scores else None,
            implementation=settings.implementation,
        )
        return self.o_proj(output.flatten(1)), weights

    def _attend_cached(
        self, query: Tensor, key: Tensor, value: Tensor, plan: MaskPlan, settings: AttentionSettings
    ) -> tuple[Tensor, Tensor | None]:
        """[`_attend`] to keys and values `(B, Hk, T, D)` of a cache, which stay where they are if queries are few."""
        if stays_in_rows(plan, *settings):
            dropout = self.dropout if self.training else 0.0
            output = attend_rows(query, key, value, plan, scaling=self.scaling, dropout=dropout)
            return self.o_proj(output.flatten(1)), None
        key, value = (packed(plan.key_layout.flatten_heads(states)) for states in (key, value))
        return self._attend(query, key, value, plan, settings)

    def _update_cache(self, key: Tensor, value: Tensor, plan: MaskPlan, cache: Cache) -> tuple[Tensor, Tensor]:
        """Adds keys and values `(N, Hk, D)` to the cache, and returns `(B, Hk, T, D)` of all columns in the key
        layout."""
        rows = (plan.layout.unflatten_heads(in_heads(states)) for states in (key, value))
        columns = plan.key_layout.shape[1]  # a static cache also returns its unused columns
        key, value = (states[:, :, :columns] for states in cache.update(*rows, self.layer_idx))
        return key, value

    @staticmethod
    def _heads(states: Tensor, head_dim: int) -> Tensor:
        """`(N, H * D)` as `(N, H, D)`."""
        return states.unflatten(1, (-1, head_dim))


class DynMaskCrossAttention(DynMaskAttention):
    """Attention of a decoder's queries to the states of an encoder."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]: other states, no positions
        self,
        hidden_states: Tensor,
        plan: MaskPlan,
        settings: AttentionSettings,
        encoder_states: Tensor,
        cache: EncoderDecoderCache | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """States `(N, C)` and encoder states `(Nk, C)` to states `(N, C)` and weights, if any."""
        query = self._query(hidden_states)
        if cache is None:
            return self._attend(query, *self._key_value(encoder_states), plan, settings)
        return self._attend_cached(query, *self._cached_cross_kv(encoder_states, plan, cache), plan, settings)

    def _cached_cross_kv(
        self, encoder_states: Tensor, plan: MaskPlan, cache: EncoderDecoderCache
    ) -> tuple[Tensor, Tensor]:
        """Keys and values `(B, Hk, Tk, D)` of the encoder's states, computed for the first queries only."""
        if cache.is_updated.get(self.layer_idx):
            layer = cache.cross_attention_cache.layers[self.layer_idx]
            return layer.keys, layer.values  # pyright: ignore[reportReturnType]
        rows = (plan.key_layout.unflatten_heads(in_heads(states)) for states in self._key_value(encoder_states))
        cache.is_updated[self.layer_idx] = True
        return cache.cross_attention_cache.update(*rows, self.layer_idx)


class DynMaskFeedForward(nn.Module):
    """`down(act(up(x)))`, or `down(act(gate(x)) * up(x))` where gated (arXiv:2002.05202)."""

    def __init__(self, config: DynMaskConfig):
        super().__init__()
        size, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.up_proj = nn.Linear(size, inner, bias=bias)
        self.gate_proj = nn.Linear(size, inner, bias=bias) if config.gated_feed_forward else None
        self.down_proj = nn.Linear(inner, size, bias=bias)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor) -> Tensor:
        if self.gate_proj is None:
            return self.down_proj(self.act(self.up_proj(hidden_states)))
        return self.down_proj(self.act(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class DynMaskLayer(GradientCheckpointingLayer):
    """Attention, cross-attention (in decoders) and feed-forward, each with a residual connection and norms."""

    def __init__(self, config: DynMaskConfig, layer_idx: int):
        super().__init__()
        chooses_keys = any(mask.holds(TopK) for mask in masks_of(config))
        self.attention = DynMaskAttention(config, layer_idx, chooses_keys)
        has_norm = layer_idx > 0 or config.first_attention_norm
        self.attention_norm = make_norm(config, config.hidden_size) if has_norm else nn.Identity()
        self.attention_output_norm = self._output_norm(config)
        self.cross_attention = None
        if config.add_cross_attention:
            chooses_keys = parse(config.cross_mask).holds(TopK)
            self.cross_attention = DynMaskCrossAttention(config, layer_idx, chooses_keys)
            self.cross_attention_norm = make_norm(config, config.hidden_size)
            self.cross_attention_output_norm = self._output_norm(config)
        self.feed_forward = DynMaskFeedForward(config)
        self.feed_forward_norm = make_norm(config, config.hidden_size)
        self.feed_forward_output_norm = self._output_norm(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.norm_before = config.norm_placement != "post"

    def forward(
        self,
        hidden_states: Tensor,
        encoder_states: Tensor | None = None,
        *,
        plan: MaskPlan,
        settings: AttentionSettings,
        cross_plan: MaskPlan | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """States `(N, C)` and encoder states `(Nk, C)` to states `(N, C)` and weights `(B, H, T, T)` and
        `(B, H, T, Tk)`, if computed. The cache has the name under which gradient checkpointing looks for it."""
        cache = given_cache(cache, past_key_values)
        self_cache = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
        states, weights = self._sublayer(
            hidden_states,
            self.attention_norm,
            self.attention_output_norm,
            self.attention,
            plan,
            settings,
            rotary,
            self_cache,
        )
        cross_weights = None
        if self.cross_attention is not None and encoder_states is not None:
            cross_cache = cache if isinstance(cache, EncoderDecoderCache) else None
            states, cross_weights = self._sublayer(
                states,
                self.cross_attention_norm,
                self.cross_attention_output_norm,
                self.cross_attention,
                cross_plan,
                settings,
                encoder_states,
                cross_cache,
            )
        states, _ = self._sublayer(states, self.feed_forward_norm, self.feed_forward_output_norm, self.feed_forward)
        return states, weights, cross_weights

    @staticmethod
    def _output_norm(config: DynMaskConfig) -> nn.Module | None:
        return make_norm(config, config.hidden_size) if config.norm_placement == "both" else None

    def _sublayer(
        self, states: Tensor, norm: nn.Module, output_norm: nn.Module | None, function: nn.Module, *arguments
    ) -> tuple[Tensor, Any]:
        """Applies `function` with its norms and a residual connection. Returns states and its second result, if any."""
        output = function(norm(states) if self.norm_before else states, *arguments)
        output, further = output if isinstance(output, tuple) else (output, None)
        output = output if output_norm is None else output_norm(output)
        states = states + self.dropout(output)
        return states if self.norm_before else norm(states), further


class DynMaskPooler(nn.Module):
    """`act(dense(dropout(x)))`: states `(..., C)` to states `(..., C)`."""

    def __init__(self, config: DynMaskConfig):
        super().__init__()
        self.dropout = nn.Dropout(config.pooler_dropout)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.act = ACT2FN[config.pooler_act]

    def forward(self, states: Tensor) -> Tensor:
        return self.act(self.dense(self.dropout(states)))


class DynMaskTransform(nn.Module):
    """`norm(act(dense(x)))`: states `(..., C)` to `(..., size)`, by default `(..., C)`."""

    def __init__(self, config: DynMaskConfig, size: int | None = None):
        super().__init__()
        size = size or config.hidden_size
        self.dense = nn.Linear(config.hidden_size, size, bias=config.lm_head_bias)
        self.act = ACT2FN[config.lm_head_act]
        self.norm = make_norm(config, size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.norm(self.act(self.dense(hidden_states)))


class DynMaskLMHead(DynMaskTransform):
    """A language modelling head, with or without a transform: states `(..., C)` to logits `(..., vocab_size)`."""

    def __init__(self, config: DynMaskConfig):
        super().__init__(config, config.embedding_size)
        if not config.lm_head_transform:
            self.dense = self.act = self.norm = nn.Identity()
        self.decoder = nn.Linear(config.embedding_size, config.vocab_size, bias=config.decoder_bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.decoder(super().forward(hidden_states))


# `classifier_transform` -> the module between the pooled states of sequences and their classifier.
POOLERS = {"pooler": DynMaskPooler, "lm_head": DynMaskTransform, "none": nn.Identity}


def pooled(
    config: DynMaskConfig, pooler: nn.Module, states: Tensor, layout: SequenceLayout, input_ids: Tensor | None
) -> Tensor:
    """States `(1, N, C)` pooled as `config.classifier_pooling` says and passed through a pooler: `(S, C)`."""
    pooling, pad_id = config.classifier_pooling, config.pad_token_id
    if pooling == "late":
        return layout.mean_tokens(pooler(states))
    if pooling == "mean":
        return pooler(layout.mean_tokens(states))
    if pooling == "first":
        return pooler(layout.first_tokens(states))
    has_ids = input_ids is not None and pad_id is not None
    return pooler(layout.last_tokens(states, layout.flatten(input_ids)[0] != pad_id if has_ids else None))
