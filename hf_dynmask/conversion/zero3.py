"""Whole weights where DeepSpeed's ZeRO-3 shares them out among processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers.integrations import deepspeed as integration


@contextmanager
def whole_weights(*models: nn.Module) -> Iterator[None]:
    """
    Without ZeRO-3, nothing. With it, inside the block the weights of `models` are whole on every process, and so are
    those of models that are loaded there: the Trainer shares these out when it begins to train. All processes must go
    through the block together.
    """
    if not integration.is_deepspeed_zero3_enabled():
        yield
        return
    import deepspeed

    reference: Any = integration._hf_deepspeed_config_weak_ref
    config = reference()
    integration.unset_hf_deepspeed_config()  # by which `from_pretrained` knows that it is to share weights out
    try:
        with deepspeed.zero.GatheredParameters([weight for model in models for weight in model.parameters()]):
            yield
    finally:
        integration.set_hf_deepspeed_config(config)
