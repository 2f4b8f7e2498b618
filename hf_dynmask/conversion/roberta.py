"""RoBERTa (arXiv:1907.11692), after `transformers.models.roberta.modeling_roberta`; XLM-RoBERTa (arXiv:1911.02116) and
CamemBERT (arXiv:1911.03894)."""

from __future__ import annotations

from transformers import PreTrainedConfig

from .bert import ENCODER, RENAMED, restored, tied_bias, token_types
from .family import TOKEN_HEADS, Family, Settings, classifier_dropout


def _implied(config: PreTrainedConfig, task: str) -> Settings:
    return {
        "type_vocab_size": token_types(config),
        # `create_position_ids_from_input_ids`: positions start after `pad_token_id`, the position of padding.
        "position_offset": (config.pad_token_id or 0) + 1,
        "lm_head_act": "gelu",
        # `RobertaClassificationHead` has dropout before and after the dense layer, which is our pooler.
        "pooler_dropout": classifier_dropout(config) if task == "sequence-classification" else 0.0,
        # The heads of these two tasks do not read the setting.
        "classifier_dropout": {"multiple-choice": None, "question-answering": 0.0}.get(task, config.classifier_dropout),
    }


ROBERTA = Family(
    model_types=("roberta", "xlm-roberta", "camembert"),
    modules=ENCODER,
    heads={
        "base": {"pooler.dense": "pooler.dense"},
        "masked-lm": {
            "lm_head.dense": "lm_head.dense",
            "lm_head.norm": "lm_head.layer_norm",
            "lm_head.decoder.bias": "lm_head.bias",
        },
        "sequence-classification": {"model.pooler.dense": "classifier.dense", "classifier": "classifier.out_proj"},
        "multiple-choice": {"model.pooler.dense": "roberta.pooler.dense", "classifier": "classifier"},
        **TOKEN_HEADS,
    },
    renamed=RENAMED,
    implied=_implied,
    restored=restored,
    required=tied_bias,
)
