"""Gemma 3 (arXiv:2503.19786), after `transformers.models.gemma3.modeling_gemma3`: its text model, causal or, as in
EmbeddingGemma (arXiv:2509.20354), bidirectional.

The stock model rounds the scale of its embeddings to the dtype of the weights; ours does not.
"""

from __future__ import annotations

from transformers import PreTrainedConfig

from ..modeling.configuration_dynmask import DynMaskConfig
from .family import Family, Settings
from .llama import DECODER, HEADS, RENAMED, decoder
from .mistral import causal_window
from .modernbert import KINDS, restored_layers


def _mask(width: int | None, is_causal: bool) -> str:
    """The mask of a layer whose window has `width` tokens, including the query's own position, on the left and, unless
    causal, on the right. `None` means no window."""
    if is_causal:
        return causal_window(width)
    return "full" if width is None else f"window({width - 1})"


def _implied(config: PreTrainedConfig, task: str) -> Settings:
    widths = dict(zip(KINDS, (None, config.sliding_window), strict=True))
    is_causal = not config.use_bidirectional_attention
    return decoder(config, task) | {
        "mask": None,
        "layer_masks": [_mask(widths[kind], is_causal) for kind in config.layer_types],
        "layer_types": list(config.layer_types),
        "norm_type": "zero_centered_rms_norm",
        "norm_placement": "both",
        "embedding_scale": config.hidden_size**0.5,
        "use_qk_norm": True,
        "mlp_bias": False,
    }


def _restored(config: DynMaskConfig, task: str) -> Settings:
    layers, widest = restored_layers(config)
    is_causal = any(right == 0 for _, right in (mask.band() or (None, None) for mask in config.masks()))
    if widest is not None:  # the constructor of the stock configuration halves the width of a bidirectional window
        layers["sliding_window"] = widest + 1 if is_causal else 2 * widest
    return layers | {"use_bidirectional_attention": not is_causal}


def _required(config: PreTrainedConfig, task: str) -> Settings:
    return {"attn_logit_softcapping": None, "final_logit_softcapping": None}


GEMMA3 = Family(
    model_types=("gemma3_text",),
    modules={
        **DECODER,
        "layers.{i}.attention.q_norm": "layers.{i}.self_attn.q_norm",
        "layers.{i}.attention.k_norm": "layers.{i}.self_attn.k_norm",
        "layers.{i}.attention_output_norm": "layers.{i}.post_attention_layernorm",
        "layers.{i}.feed_forward_norm": "layers.{i}.pre_feedforward_layernorm",
        "layers.{i}.feed_forward_output_norm": "layers.{i}.post_feedforward_layernorm",
    },
    heads={task: HEADS[task] for task in ("base", "causal-lm", "sequence-classification")},
    renamed={**RENAMED, "hidden_act": "hidden_activation"},
    implied=_implied,
    restored=_restored,
    required=_required,
)
