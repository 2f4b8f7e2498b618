"""BART (arXiv:1910.13461), after `transformers.models.bart.modeling_bart`. Marian shares its two sides.

`BartForSequenceClassification` reads the decoder at the position of the source's last `</s>`; our model reads it at the
last token. They agree if the source ends in `</s>`, as with BART's tokenizer, and the decoder inputs are made from it.
"""

# The sides are optional only until the configuration's constructor has run.
# pyright: reportOptionalMemberAccess=false, reportAttributeAccessIssue=false, reportArgumentType=false

from __future__ import annotations

from transformers import PreTrainedConfig

from ..modeling.configuration_dynmask_seq2seq import DynMaskSeq2SeqConfig
from .family import Family, Names, Settings, classifier_dropout

_OFFSET = 2  # in `BartLearnedPositionalEmbedding`, two rows come before the row of the first position
_SIZES = {"num_hidden_layers": "layers", "num_attention_heads": "attention_heads", "intermediate_size": "ffn_dim"}
_MODULES_OF_SIDE = {
    "embeddings.position_embeddings": "embed_positions",
    "embeddings.norm": "layernorm_embedding",
    "layers.{i}.attention.q_proj": "layers.{i}.self_attn.q_proj",
    "layers.{i}.attention.k_proj": "layers.{i}.self_attn.k_proj",
    "layers.{i}.attention.v_proj": "layers.{i}.self_attn.v_proj",
    "layers.{i}.attention.o_proj": "layers.{i}.self_attn.out_proj",
    "layers.{i}.attention_norm": "layers.{i}.self_attn_layer_norm",
    "layers.{i}.cross_attention.q_proj": "layers.{i}.encoder_attn.q_proj",
    "layers.{i}.cross_attention.k_proj": "layers.{i}.encoder_attn.k_proj",
    "layers.{i}.cross_attention.v_proj": "layers.{i}.encoder_attn.v_proj",
    "layers.{i}.cross_attention.o_proj": "layers.{i}.encoder_attn.out_proj",
    "layers.{i}.cross_attention_norm": "layers.{i}.encoder_attn_layer_norm",
    "layers.{i}.feed_forward.up_proj": "layers.{i}.fc1",
    "layers.{i}.feed_forward.down_proj": "layers.{i}.fc2",
    "layers.{i}.feed_forward_norm": "layers.{i}.final_layer_norm",
}
SIDES = ("encoder", "decoder")
MODULES: Names = {
    "encoder.embeddings.word_embeddings": "shared",
    **{f"{side}.{ours}": f"{side}.{theirs}" for side in SIDES for ours, theirs in _MODULES_OF_SIDE.items()},
}
HEADS: dict[str, Names] = {"base": {}, "seq2seq-lm": {"lm_head": "lm_head", "final_logits_bias": "final_logits_bias"}}
RENAMED = {
    "hidden_size": "d_model",
    "hidden_act": "activation_function",
    "hidden_dropout_prob": "dropout",
    "attention_probs_dropout_prob": "attention_dropout",
    "initializer_range": "init_std",
}
# Kinds of dropout that have no counterpart here.
NO_DROPOUT = {"activation_dropout": 0.0, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0}


def sides(config: PreTrainedConfig) -> Settings:
    """Settings that BART and Marian share: the sizes of both sides and the scale of the embeddings."""
    sizes = {side: {ours: getattr(config, f"{side}_{theirs}") for ours, theirs in _SIZES.items()} for side in SIDES}
    return sizes | {"embedding_scale": config.d_model**0.5 if config.scale_embedding else 1.0}


def restored_sides(config: DynMaskSeq2SeqConfig) -> Settings:
    """The inverse of [`sides`]."""
    sizes = {
        f"{side}_{theirs}": getattr(getattr(config, side), ours) for side in SIDES for ours, theirs in _SIZES.items()
    }
    return sizes | {"scale_embedding": config.decoder.embedding_scale != 1}


def _implied(config: PreTrainedConfig, task: str) -> Settings:
    return sides(config) | {
        "position_offset": _OFFSET,
        "max_position_embeddings": config.max_position_embeddings + _OFFSET,
        # `BartClassificationHead` has dropout before and after the dense layer, which is our pooler.
        "pooler_dropout": config.classifier_dropout if task == "sequence-classification" else 0.0,
    }


def _restored(config: DynMaskSeq2SeqConfig, task: str) -> Settings:
    return restored_sides(config) | {
        "max_position_embeddings": config.decoder.max_position_embeddings - _OFFSET,
        "classifier_dropout": classifier_dropout(config.decoder),
    }


def _required(config: PreTrainedConfig, task: str) -> Settings:
    return NO_DROPOUT | {"tie_word_embeddings": True}  # without it, the two sides do not share embeddings either


BART = Family(
    model_types=("bart",),
    modules=MODULES,
    heads={
        **HEADS,
        "sequence-classification": {
            "pooler.dense": "classification_head.dense",
            "classifier": "classification_head.out_proj",
        },
    },
    renamed=RENAMED,
    implied=_implied,
    restored=_restored,
    required=_required,
    config_class=DynMaskSeq2SeqConfig,
)
