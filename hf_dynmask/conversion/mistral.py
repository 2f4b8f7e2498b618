"""Mistral (arXiv:2310.06825), after `transformers.models.mistral.modeling_mistral`."""

from __future__ import annotations

from transformers import PreTrainedConfig

from ..modeling.configuration_dynmask import DynMaskConfig
from ..modeling.masks import Mask
from .family import Family, Settings
from .llama import DECODER, HEADS, RENAMED, decoder, restored_head_dropout


def causal_window(width: int | None) -> str:
    """The mask of a stock sliding window over `width` keys, including the query's own. `None` means all keys."""
    return "causal" if width is None else f"causal & window({width - 1}, 0)"


def window_width(mask: Mask) -> int | None:
    """The inverse of [`causal_window`]; `None` for any other mask."""
    left, _ = mask.band() or (None, None)
    return None if left is None else left + 1


def _implied(config: PreTrainedConfig, task: str) -> Settings:
    return decoder(config, task) | {
        "mask": causal_window(config.sliding_window),
        "attention_bias": False,
        "mlp_bias": False,
    }


def _restored(config: DynMaskConfig, task: str) -> Settings:
    widths = {window_width(mask) for mask in config.masks()}
    return {"sliding_window": widths.pop() if len(widths) == 1 else None, **restored_head_dropout(config, task)}


MISTRAL = Family(
    model_types=("mistral",), modules=DECODER, heads=HEADS, renamed=RENAMED, implied=_implied, restored=_restored
)
