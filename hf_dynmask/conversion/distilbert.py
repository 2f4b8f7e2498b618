"""DistilBERT (arXiv:1910.01108), after `transformers.models.distilbert.modeling_distilbert`.

With `sinusoidal_pos_embds`, positions are still weights in both models; they are only initialised with sines.
"""

from __future__ import annotations

from transformers import PreTrainedConfig

from ..modeling.configuration_dynmask import DynMaskConfig
from .family import TOKEN_HEADS, Family, Names, Settings, classifier_dropout

# Names of the dropout before a classifier. `DistilBertForTokenClassification` uses the dropout of the hidden layers.
_DROPOUT = {
    "sequence-classification": "seq_classif_dropout",
    "multiple-choice": "seq_classif_dropout",
    "question-answering": "qa_dropout",
}


def _implied(config: PreTrainedConfig, task: str) -> Settings:
    return {
        "type_vocab_size": 0,
        "norm_eps": 1e-12,
        "use_pooler": False,
        "pooler_act": "relu",
        "lm_head_act": config.activation,
        "classifier_dropout": getattr(config, _DROPOUT[task]) if task in _DROPOUT else None,
    }


def _restored(config: DynMaskConfig, task: str) -> Settings:
    return {_DROPOUT[task]: classifier_dropout(config)} if task in _DROPOUT else {}


_POOLED: Names = {"model.pooler.dense": "pre_classifier", "classifier": "classifier"}

DISTILBERT = Family(
    model_types=("distilbert",),
    modules={
        "embeddings.word_embeddings": "embeddings.word_embeddings",
        "embeddings.position_embeddings": "embeddings.position_embeddings",
        "embeddings.norm": "embeddings.LayerNorm",
        "layers.{i}.attention.q_proj": "transformer.layer.{i}.attention.q_lin",
        "layers.{i}.attention.k_proj": "transformer.layer.{i}.attention.k_lin",
        "layers.{i}.attention.v_proj": "transformer.layer.{i}.attention.v_lin",
        "layers.{i}.attention.o_proj": "transformer.layer.{i}.attention.out_lin",
        "layers.{i}.attention_norm": "transformer.layer.{i}.sa_layer_norm",
        "layers.{i}.feed_forward.up_proj": "transformer.layer.{i}.ffn.lin1",
        "layers.{i}.feed_forward.down_proj": "transformer.layer.{i}.ffn.lin2",
        "layers.{i}.feed_forward_norm": "transformer.layer.{i}.output_layer_norm",
    },
    heads={
        "base": {},
        "masked-lm": {
            "lm_head.dense": "vocab_transform",
            "lm_head.norm": "vocab_layer_norm",
            "lm_head.decoder": "vocab_projector",
        },
        "sequence-classification": _POOLED,
        "multiple-choice": _POOLED,
        **TOKEN_HEADS,
    },
    renamed={
        "hidden_size": "dim",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "intermediate_size": "hidden_dim",
        "hidden_act": "activation",
        "hidden_dropout_prob": "dropout",
        "attention_probs_dropout_prob": "attention_dropout",
    },
    implied=_implied,
    restored=_restored,
)
