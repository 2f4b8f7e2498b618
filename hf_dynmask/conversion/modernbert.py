"""ModernBERT (arXiv:2412.13663), after `transformers.models.modernbert.modeling_modernbert`."""

from __future__ import annotations

from transformers import PreTrainedConfig

from ..modeling.configuration_dynmask import DynMaskConfig
from .family import Family, Names, Settings, classifier_dropout

KINDS = ("full_attention", "sliding_attention")
_POOLINGS = {"cls": "first", "mean": "mean"}


def _implied(config: PreTrainedConfig, task: str) -> Settings:
    masks = dict(zip(KINDS, ("full", f"window({config.local_attention // 2})"), strict=True))
    return {
        "layer_masks": [masks[kind] for kind in config.layer_types],
        "layer_types": list(config.layer_types),
        "position_type": "rotary",
        "norm_placement": "pre",
        "first_attention_norm": False,
        "gated_feed_forward": True,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "classifier_pooling": _POOLINGS[config.classifier_pooling],
        "classifier_transform": "lm_head",
        "classifier_bias": True,  # the stock setting with this name is for the dense layer before the classifier
        "use_pooler": False,
    }


def restored_layers(config: DynMaskConfig) -> tuple[Settings, int | None]:
    """The type and the rotary parameters of each layer, and how far to the left the widest window reaches."""
    widths = [left for left, _ in (mask.band() or (None, None) for mask in config.masks())]
    kinds = [KINDS[width is not None] for width in widths]
    rotary = dict(zip(kinds, config.rope_by_layer(), strict=True)) if config.rope_parameters else None
    widest = max((width for width in widths if width is not None), default=None)
    return {"layer_types": kinds, "rope_parameters": rotary}, widest


def _restored(config: DynMaskConfig, task: str) -> Settings:
    layers, widest = restored_layers(config)
    return {
        **layers,
        "classifier_dropout": classifier_dropout(config),
        "classifier_pooling": {ours: theirs for theirs, ours in _POOLINGS.items()}.get(
            config.classifier_pooling, "cls"
        ),
        **({} if widest is None else {"local_attention": 2 * widest}),
    }


def _required(config: PreTrainedConfig, task: str) -> Settings:
    return {
        # Our models have one dropout for embeddings and sublayers, and none inside the feed-forward layer.
        "embedding_dropout": 0.0,
        "attention_dropout": 0.0,
        "mlp_dropout": 0.0,
        **({"sparse_prediction": False} if task == "masked-lm" else {}),
    }


_TOKENS: Names = {"transform.dense": "head.dense", "transform.norm": "head.norm"}
_POOLED: Names = {
    "model.pooler.dense": "head.dense",
    "model.pooler.norm": "head.norm",
    "classifier": "classifier",
}

MODERNBERT = Family(
    model_types=("modernbert",),
    modules={
        "embeddings.word_embeddings": "embeddings.tok_embeddings",
        "embeddings.norm": "embeddings.norm",
        "layers.{i}.attention_norm": "layers.{i}.attn_norm",
        (
            "layers.{i}.attention.q_proj",
            "layers.{i}.attention.k_proj",
            "layers.{i}.attention.v_proj",
        ): "layers.{i}.attn.Wqkv",
        "layers.{i}.attention.o_proj": "layers.{i}.attn.Wo",
        "layers.{i}.feed_forward_norm": "layers.{i}.mlp_norm",
        ("layers.{i}.feed_forward.gate_proj", "layers.{i}.feed_forward.up_proj"): "layers.{i}.mlp.Wi",
        "layers.{i}.feed_forward.down_proj": "layers.{i}.mlp.Wo",
        "final_norm": "final_norm",
    },
    heads={
        "base": {},
        "masked-lm": {"lm_head.dense": "head.dense", "lm_head.norm": "head.norm", "lm_head.decoder": "decoder"},
        "sequence-classification": _POOLED,
        "token-classification": {**_TOKENS, "classifier": "classifier"},
        "question-answering": {**_TOKENS, "qa_outputs": "classifier"},
        "multiple-choice": _POOLED,
    },
    renamed={
        "hidden_act": "hidden_activation",
        "lm_head_act": "classifier_activation",
        "lm_head_bias": "classifier_bias",
    },
    implied=_implied,
    restored=_restored,
    required=_required,
)
