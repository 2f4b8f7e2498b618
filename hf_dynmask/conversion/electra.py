"""ELECTRA (arXiv:2003.10555), after `transformers.models.electra.modeling_electra`: discriminators and generators."""

from __future__ import annotations

from transformers import PreTrainedConfig

from ..modeling.configuration_dynmask import DynMaskConfig
from .bert import ENCODER, RENAMED, restored, token_types
from .family import TOKEN_HEADS, Family, Settings, classifier_dropout


def _implied(config: PreTrainedConfig, task: str) -> Settings:
    settings = {
        "type_vocab_size": token_types(config),
        "use_pooler": False,
        "pooler_act": "gelu",
        "lm_head_act": "gelu",
    }
    if task == "question-answering":
        settings["classifier_dropout"] = 0.0
    if task == "sequence-classification":  # `ElectraClassificationHead` has dropout before and after the dense layer
        settings["pooler_dropout"] = classifier_dropout(config)
    if task == "multiple-choice":  # `ElectraSequenceSummary`
        settings["pooler_act"] = config.summary_activation or "linear"
        settings["classifier_dropout"] = config.summary_last_dropout
    return settings


def _restored(config: DynMaskConfig, task: str) -> Settings:
    if task != "multiple-choice":
        return restored(config, task)
    return {
        "summary_activation": config.pooler_act,
        "summary_last_dropout": classifier_dropout(config),
        "classifier_dropout": None,
    }


def _required(config: PreTrainedConfig, task: str) -> Settings:
    if task != "multiple-choice":
        return {}
    return {"summary_type": "first", "summary_use_proj": True, "summary_first_dropout": 0.0}


ELECTRA = Family(
    model_types=("electra",),
    modules={**ENCODER, "embeddings.projection": "embeddings_project"},
    heads={
        "base": {},
        "masked-lm": {
            "lm_head.dense": "generator_predictions.dense",
            "lm_head.norm": "generator_predictions.LayerNorm",
            "lm_head.decoder": "generator_lm_head",
        },
        "sequence-classification": {"model.pooler.dense": "classifier.dense", "classifier": "classifier.out_proj"},
        "multiple-choice": {"model.pooler.dense": "sequence_summary.summary", "classifier": "classifier"},
        **TOKEN_HEADS,
    },
    renamed=RENAMED,
    implied=_implied,
    restored=_restored,
    required=_required,
)
