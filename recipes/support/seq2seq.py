"""Shared by the text-to-text recipes: arguments, tokenizer, encoder-decoder and evaluation."""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import DatasetDict
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import DataCollatorForSeq2Seq, EvalPrediction, PreTrainedTokenizerFast

from hf_dynmask import DynMaskForConditionalGeneration, DynMaskSeq2SeqConfig, to_transformers
from support.common import DropoutArguments, dropout_settings, special_token_ids
from support.measuring import Baselines

PAD, START, END = "<pad>", "<s>", "</s>"
HEAD_SIZE = 64
DEFAULTS = {
    "per_device_train_batch_size": 64,
    "per_device_eval_batch_size": 100,
    "learning_rate": 2e-3,
    "predict_with_generate": True,
    "logging_steps": 50,
}


@dataclass
class Seq2SeqArguments(DropoutArguments):
    """Arguments of the text-to-text recipes. Each recipe sets its own data set and lengths."""

    dataset: str
    max_source_tokens: int
    max_target_tokens: int
    vocab_size: int = field(default=2000, metadata={"help": "Size of the vocabulary learned from the training data."})
    hidden_size: int = field(default=128, metadata={"help": f"Hidden size of both sides, with heads of {HEAD_SIZE}."})
    num_hidden_layers: int = field(default=2, metadata={"help": "Layers of each side."})


# --- Data ------------------------------------------------------------------------------------------------------------


def train_tokenizer(rows: Iterable[Any], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level byte-pair encoding (Radford et al., 2019) of sources and targets. Every text ends in [`END`]."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel()
    backend.decoder = decoders.ByteLevel()
    learned = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator((text for row in rows for text in row.values()), learned)
    backend.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, backend.token_to_id(END))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=START,
        eos_token=END,
        model_input_names=["input_ids", "attention_mask"],
    )


def encode(texts: DatasetDict, tokenizer: PreTrainedTokenizerFast, *limits: int) -> DatasetDict:
    """`input_ids` and `labels` of sources and targets, each truncated to its limit of tokens."""

    def encoded(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        sources, targets = (
            tokenizer(column, truncation=True, max_length=limit)["input_ids"]
            for column, limit in zip(rows.values(), limits, strict=True)
        )
        return {"input_ids": sources, "labels": targets}

    return texts.map(encoded, batched=True, remove_columns=texts["train"].column_names)


# --- Model -----------------------------------------------------------------------------------------------------------


def new_model(
    recipe: Seq2SeqArguments, tokenizer: PreTrainedTokenizerFast, **generation: Any
) -> DynMaskForConditionalGeneration:
    """An encoder-decoder with random weights that converts to BART. `generation` holds generation settings."""
    side = {
        "vocab_size": len(tokenizer),
        "hidden_size": recipe.hidden_size,
        "num_hidden_layers": recipe.num_hidden_layers,
        "num_attention_heads": recipe.hidden_size // HEAD_SIZE,
        "intermediate_size": 4 * recipe.hidden_size,
        "position_offset": 2,  # as BART's
        "initializer_range": recipe.hidden_size**-0.5,  # the usual 0.02 is too small for a small model
        "max_position_embeddings": max(recipe.max_source_tokens, recipe.max_target_tokens + 1) + 2,
        **dropout_settings(recipe),
    }
    ids = special_token_ids(tokenizer)
    config = DynMaskSeq2SeqConfig(encoder=side, decoder=side, decoder_start_token_id=ids["bos_token_id"], **ids)
    model = DynMaskForConditionalGeneration(config)
    model.generation_config.update(max_length=recipe.max_target_tokens + 1, **generation)
    return model


def dropout_of_decoder(model: DynMaskForConditionalGeneration) -> float:
    config: Any = model.config.decoder
    return config.hidden_dropout_prob


def bart_baseline(model: DynMaskForConditionalGeneration, tokenizer: PreTrainedTokenizerFast) -> Baselines:
    """A BART with the same weights and generation settings, on padded batches."""
    stock = to_transformers(model, "bart")
    stock.generation_config = copy.deepcopy(model.generation_config)
    return {"stock": (stock, DataCollatorForSeq2Seq(tokenizer, stock))}


# --- Measuring --------------------------------------------------------------------------------------------------------


@dataclass
class Evaluation:
    """Scores generated texts against the untruncated references.

    Args:
        score (`Callable`): Takes answers and references, and returns each metric under its name.
        tokenizer ([`~transformers.PreTrainedTokenizerFast`]): Decodes the answers.
        references (`list[str]`): The right answers, one per row.
    """

    score: Callable[[list[str], list[str]], dict[str, float]]
    tokenizer: PreTrainedTokenizerFast
    references: list[str]

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        ids: Any = prediction.predictions
        ids = np.where(ids < 0, self.tokenizer.pad_token_id, ids)  # the trainer pads with -100
        answers = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return self.score([answer.strip() for answer in answers], self.references)
