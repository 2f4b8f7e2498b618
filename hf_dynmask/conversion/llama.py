"""Llama (arXiv:2302.13971), after `transformers.models.llama.modeling_llama`. Mistral and Qwen share its decoder."""

from __future__ import annotations

from transformers import PreTrainedConfig

from ..modeling.configuration_dynmask import DynMaskConfig
from .family import Family, Names, Settings, classifier_dropout

DECODER: Names = {
    "embeddings.word_embeddings": "embed_tokens",
    "layers.{i}.attention_norm": "layers.{i}.input_layernorm",
    "layers.{i}.attention.q_proj": "layers.{i}.self_attn.q_proj",
    "layers.{i}.attention.k_proj": "layers.{i}.self_attn.k_proj",
    "layers.{i}.attention.v_proj": "layers.{i}.self_attn.v_proj",
    "layers.{i}.attention.o_proj": "layers.{i}.self_attn.o_proj",
    "layers.{i}.feed_forward_norm": "layers.{i}.post_attention_layernorm",
    "layers.{i}.feed_forward.gate_proj": "layers.{i}.mlp.gate_proj",
    "layers.{i}.feed_forward.up_proj": "layers.{i}.mlp.up_proj",
    "layers.{i}.feed_forward.down_proj": "layers.{i}.mlp.down_proj",
    "final_norm": "norm",
}
HEADS: dict[str, Names] = {
    "base": {},
    "causal-lm": {"lm_head": "lm_head"},
    "sequence-classification": {"classifier": "score"},
    "token-classification": {"classifier": "score"},
    "question-answering": {"qa_outputs": "qa_outputs"},
}
RENAMED = {"norm_eps": "rms_norm_eps", "attention_probs_dropout_prob": "attention_dropout"}

# The default of `GenericForTokenClassification`; the configurations have no field for it.
_CLASSIFIER_DROPOUT = 0.1


def head_settings(config: PreTrainedConfig, task: str) -> Settings:
    """Settings of a decoder's heads. Only a token classifier has dropout. A sequence classifier is a matrix at the last
    token.

    As in the stock code, this is the last token whose id is not `pad_token_id`. Without a `pad_token_id`, and with
    `inputs_embeds` (where the stock code reads the last column), it is the last real token.
    """
    given = getattr(config, "classifier_dropout", None)
    token_dropout = _CLASSIFIER_DROPOUT if given is None else given
    no_dropout = dict.fromkeys(("question-answering", "sequence-classification"), 0.0)
    return {
        "classifier_dropout": {"token-classification": token_dropout, **no_dropout}.get(task),
        "classifier_pooling": "last",
        "classifier_transform": "none",
        "classifier_bias": False,
    }


def restored_head_dropout(config: DynMaskConfig, task: str) -> Settings:
    """The inverse of the dropout in [`head_settings`]."""
    dropout = classifier_dropout(config)
    return {"classifier_dropout": dropout} if task == "token-classification" and dropout != _CLASSIFIER_DROPOUT else {}


def decoder(config: PreTrainedConfig, task: str) -> Settings:
    """Settings that follow from the stock code of the decoder."""
    return {
        "gated_feed_forward": True,
        "norm_type": "rms_norm",
        "norm_placement": "pre",
        "embedding_norm": False,
        "position_type": "rotary",
        "hidden_dropout_prob": 0.0,
        "use_pooler": False,
        "mask": "causal",
        **head_settings(config, task),
    }


LLAMA = Family(
    model_types=("llama",),
    modules=DECODER,
    heads=HEADS,
    renamed=RENAMED,
    implied=decoder,
    restored=restored_head_dropout,
)
