"""Gathers weights that DeepSpeed's ZeRO-3 has partitioned among processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers.integrations import deepspeed as integration


@contextmanager
def whole_weights(*models: nn.Module) -> Iterator[None]:
    """
    Without ZeRO-3, does nothing. With it, the weights of `models` are whole on every process inside the block, and so
    are those of models loaded there, which the Trainer partitions when it begins to train. All processes must enter
    the block together.
    """
    if not integration.is_deepspeed_zero3_enabled():
        yield
        return
    import deepspeed

    reference: Any = integration._hf_deepspeed_config_weak_ref
    config = reference()
    integration.unset_hf_deepspeed_config()  # tells `from_pretrained` to partition weights
    try:
        with deepspeed.zero.GatheredParameters([weight for model in models for weight in model.parameters()]):
            yield
    finally:
        integration.set_hf_deepspeed_config(config)
