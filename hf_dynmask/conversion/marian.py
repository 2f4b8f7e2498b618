"""Marian (arXiv:1804.00344), after `transformers.models.marian.modeling_marian`: BART with sinusoidal positions.

The stock decoder also scales `decoder_inputs_embeds`; ours does not.
"""

# The sides are optional only until the configuration's constructor has run.
# pyright: reportOptionalMemberAccess=false, reportAttributeAccessIssue=false

from __future__ import annotations

from transformers import PreTrainedConfig

from ..modeling.configuration_dynmask_seq2seq import DynMaskSeq2SeqConfig
from .bart import HEADS, MODULES, NO_DROPOUT, RENAMED, restored_sides, sides
from .family import Family, Settings


def _implied(config: PreTrainedConfig, task: str) -> Settings:
    settings = sides(config) | {
        "embedding_norm": False,
        "position_type": "sinusoidal",
        "sinusoidal_in_halves": True,
        "share_embeddings": config.share_encoder_decoder_embeddings,
    }
    if not config.share_encoder_decoder_embeddings:
        settings["decoder"] |= {"vocab_size": config.decoder_vocab_size}
    return settings


def _restored(config: DynMaskSeq2SeqConfig, task: str) -> Settings:
    return restored_sides(config) | {
        "vocab_size": config.encoder.vocab_size,
        "decoder_vocab_size": config.decoder.vocab_size,
        "share_encoder_decoder_embeddings": config.share_embeddings,
    }


def _required(config: PreTrainedConfig, task: str) -> Settings:
    ties = {"tie_word_embeddings": True} if config.share_encoder_decoder_embeddings else {}
    return NO_DROPOUT | ties


_UNSHARED = {
    "encoder.embeddings.word_embeddings": "encoder.embed_tokens",
    "decoder.embeddings.word_embeddings": "decoder.embed_tokens",
}

MARIAN = Family(
    model_types=("marian",),
    modules=MODULES,
    heads={
        "base": {**HEADS["base"], **_UNSHARED},
        "seq2seq-lm": {
            **HEADS["seq2seq-lm"],
            **{f"model.{ours}": f"model.{theirs}" for ours, theirs in _UNSHARED.items()},
        },
    },
    renamed=RENAMED,
    implied=_implied,
    restored=_restored,
    required=_required,
    tables=("embed_positions",),
    config_class=DynMaskSeq2SeqConfig,
)
