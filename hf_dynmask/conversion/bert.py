"""BERT (arXiv:1810.04805), after `transformers.models.bert.modeling_bert`. RoBERTa and ELECTRA share its encoder."""

from __future__ import annotations

from transformers import PreTrainedConfig

from ..modeling.configuration_dynmask import DynMaskConfig
from .family import TOKEN_HEADS, Family, Names, Settings

ENCODER: Names = {
    "embeddings.word_embeddings": "embeddings.word_embeddings",
    "embeddings.position_embeddings": "embeddings.position_embeddings",
    "embeddings.token_type_embeddings": "embeddings.token_type_embeddings",
    "embeddings.norm": "embeddings.LayerNorm",
    "layers.{i}.attention.q_proj": "encoder.layer.{i}.attention.self.query",
    "layers.{i}.attention.k_proj": "encoder.layer.{i}.attention.self.key",
    "layers.{i}.attention.v_proj": "encoder.layer.{i}.attention.self.value",
    "layers.{i}.attention.o_proj": "encoder.layer.{i}.attention.output.dense",
    "layers.{i}.attention_norm": "encoder.layer.{i}.attention.output.LayerNorm",
    "layers.{i}.feed_forward.up_proj": "encoder.layer.{i}.intermediate.dense",
    "layers.{i}.feed_forward.down_proj": "encoder.layer.{i}.output.dense",
    "layers.{i}.feed_forward_norm": "encoder.layer.{i}.output.LayerNorm",
}
RENAMED = {"norm_eps": "layer_norm_eps"}


def tied_bias(config: PreTrainedConfig, task: str) -> Settings:
    """Requires tied embeddings for masked LM: an untied head has a second, unused bias, which our models lack."""
    return {"tie_word_embeddings": True} if task == "masked-lm" else {}


def token_types(config: PreTrainedConfig) -> int:
    """Rows of the token type embedding. The stock code adds a token type even if none is configured."""
    return max(config.type_vocab_size, 1)


def _implied(config: PreTrainedConfig, task: str) -> Settings:
    return {
        "type_vocab_size": token_types(config),
        "lm_head_act": config.hidden_act,
        "classifier_dropout": 0.0 if task == "question-answering" else config.classifier_dropout,
    }


def restored(config: DynMaskConfig, task: str) -> Settings:
    """Leaves out the dropout of a question answering head, which has none whatever the setting."""
    return {"classifier_dropout": None} if task == "question-answering" else {}


BERT = Family(
    model_types=("bert",),
    modules=ENCODER,
    heads={
        "base": {"pooler.dense": "pooler.dense"},
        "masked-lm": {
            "lm_head.dense": "cls.predictions.transform.dense",
            "lm_head.norm": "cls.predictions.transform.LayerNorm",
            "lm_head.decoder.bias": "cls.predictions.bias",
        },
        "sequence-classification": {"model.pooler.dense": "bert.pooler.dense", "classifier": "classifier"},
        "multiple-choice": {"model.pooler.dense": "bert.pooler.dense", "classifier": "classifier"},
        **TOKEN_HEADS,
    },
    renamed=RENAMED,
    implied=_implied,
    restored=restored,
    required=tied_bias,
)
