"""EuroBERT (arXiv:2503.05500), after `transformers.models.eurobert.modeling_eurobert`: a bidirectional Llama."""

from __future__ import annotations

from transformers import PreTrainedConfig

from ..modeling.configuration_dynmask import DynMaskConfig
from .family import Family, Settings
from .llama import DECODER, RENAMED, decoder

_POOLINGS = {"bos": "first", "mean": "mean", "late": "late"}


def _implied(config: PreTrainedConfig, task: str) -> Settings:
    return decoder(config, task) | {
        "mask": "full",
        "classifier_dropout": 0.0,
        "classifier_pooling": _POOLINGS[config.classifier_pooling],
        "classifier_transform": "pooler",
        "classifier_bias": True,
        "pooler_act": "gelu",
        "lm_head_transform": False,
        "decoder_bias": config.mlp_bias,
    }


def _restored(config: DynMaskConfig, task: str) -> Settings:
    poolings = {ours: theirs for theirs, ours in _POOLINGS.items()}
    return {"classifier_pooling": poolings.get(config.classifier_pooling, "late")}


EUROBERT = Family(
    model_types=("eurobert",),
    modules=DECODER,
    heads={
        "base": {},
        "masked-lm": {"lm_head.decoder": "lm_head"},
        "sequence-classification": {"model.pooler.dense": "dense", "classifier": "classifier"},
        "token-classification": {"classifier": "classifier"},
    },
    renamed=RENAMED,
    implied=_implied,
    restored=_restored,
)
