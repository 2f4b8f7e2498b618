"""Gathers weights that DeepSpeed's ZeRO-3 has partitioned over processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers.integrations import deepspeed as integration


@contextmanager
def whole_weights(*models: nn.Module) -> Iterator[None]:
    """
    Inside this context, every process holds all weights of `models`, and models are loaded without being partitioned;
    the Trainer partitions them when training begins. All processes must enter the context together. Does nothing
    without ZeRO-3.
    """
    if not integration.is_deepspeed_zero3_enabled():
        yield
        return
    import deepspeed

    reference: Any = integration._hf_deepspeed_config_weak_ref
    config = reference()
    integration.unset_hf_deepspeed_config()  # while it is set, `from_pretrained` partitions weights
    try:
        with deepspeed.zero.GatheredParameters([weight for model in models for weight in model.parameters()]):
            yield
    finally:
        integration.set_hf_deepspeed_config(config)
