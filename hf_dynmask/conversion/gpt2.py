"""GPT-2 ("Language Models are Unsupervised Multitask Learners"), after `transformers.models.gpt2.modeling_gpt2`.

If `token_type_ids` are given, the stock model adds their token embeddings; our model ignores them. As in all models of
this package, the embedding of `pad_token_id` gets no gradient from inputs, even if a real token has that id. The stock
model trains it.
"""

from __future__ import annotations

from transformers import PreTrainedConfig

from ..modeling.configuration_dynmask import DynMaskConfig
from .family import TOKEN_HEADS, Family, Settings
from .llama import HEADS, head_settings, restored_head_dropout


def _implied(config: PreTrainedConfig, task: str) -> Settings:
    return {
        "intermediate_size": 4 * config.n_embd if config.n_inner is None else config.n_inner,
        "norm_placement": "pre",
        "embedding_norm": False,
        "use_pooler": False,
        "mask": "causal",
        **head_settings(config, task),
    }


def _restored(config: DynMaskConfig, task: str) -> Settings:
    return {
        "n_inner": None if config.intermediate_size == 4 * config.hidden_size else config.intermediate_size,
        "embd_pdrop": config.hidden_dropout_prob,
        **restored_head_dropout(config, task),
    }


def _required(config: PreTrainedConfig, task: str) -> Settings:
    return {
        "embd_pdrop": config.resid_pdrop,  # our `hidden_dropout_prob` covers both
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
    }


GPT2 = Family(
    model_types=("gpt2",),
    modules={
        "embeddings.word_embeddings": "wte",
        "embeddings.position_embeddings": "wpe",
        "layers.{i}.attention_norm": "h.{i}.ln_1",
        (
            "layers.{i}.attention.q_proj",
            "layers.{i}.attention.k_proj",
            "layers.{i}.attention.v_proj",
        ): "h.{i}.attn.c_attn",
        "layers.{i}.attention.o_proj": "h.{i}.attn.c_proj",
        "layers.{i}.feed_forward_norm": "h.{i}.ln_2",
        "layers.{i}.feed_forward.up_proj": "h.{i}.mlp.c_fc",
        "layers.{i}.feed_forward.down_proj": "h.{i}.mlp.c_proj",
        "final_norm": "ln_f",
    },
    heads={**HEADS, **TOKEN_HEADS},
    renamed={
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
        "hidden_act": "activation_function",
        "norm_eps": "layer_norm_epsilon",
        "hidden_dropout_prob": "resid_pdrop",
        "attention_probs_dropout_prob": "attn_pdrop",
    },
    implied=_implied,
    restored=_restored,
    required=_required,
    transposed=("c_attn", "c_proj", "c_fc"),
)
