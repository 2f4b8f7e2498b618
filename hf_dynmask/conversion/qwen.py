"""Qwen2 (arXiv:2407.10671) and Qwen3 (arXiv:2505.09388), after `transformers.models.qwen2` and `qwen3`."""

from __future__ import annotations

from transformers import PreTrainedConfig

from ..modeling.configuration_dynmask import DynMaskConfig
from .family import Family, Settings
from .llama import DECODER, HEADS, RENAMED, decoder, restored_head_dropout
from .mistral import causal_window, window_width


def _implied(config: PreTrainedConfig, task: str) -> Settings:
    width = config.sliding_window
    masks = [causal_window(width if kind == "sliding_attention" else None) for kind in config.layer_types]
    return decoder(config, task) | {
        "layer_masks": masks if "sliding_attention" in config.layer_types else None,
        "mlp_bias": False,
    }


def _implied_qwen2(config: PreTrainedConfig, task: str) -> Settings:
    return _implied(config, task) | {"attention_bias": True, "attention_output_bias": False}


def _implied_qwen3(config: PreTrainedConfig, task: str) -> Settings:
    return _implied(config, task) | {"use_qk_norm": True}


def _restored(config: DynMaskConfig, task: str) -> Settings:
    widths = [window_width(mask) for mask in config.masks()]
    widest = max((width for width in widths if width is not None), default=None)
    return {
        "use_sliding_window": widest is not None,
        "sliding_window": widest,
        "layer_types": ["full_attention" if width is None else "sliding_attention" for width in widths],
        **restored_head_dropout(config, task),
    }


QWEN2 = Family(
    model_types=("qwen2",), modules=DECODER, heads=HEADS, renamed=RENAMED, implied=_implied_qwen2, restored=_restored
)
QWEN3 = Family(
    model_types=("qwen3",),
    modules={
        **DECODER,
        "layers.{i}.attention.q_norm": "layers.{i}.self_attn.q_norm",
        "layers.{i}.attention.k_norm": "layers.{i}.self_attn.k_norm",
    },
    heads=HEADS,
    renamed=RENAMED,
    implied=_implied_qwen3,
    restored=_restored,
)
