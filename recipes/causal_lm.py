"""
Trains a Llama-like language model from scratch with the stock `Trainer`, on flat batches: no padding and no packing.

    python recipes/causal_lm.py

uses sections of WikiText-2. To also train the stock Llama on padded batches, from the same weights:

    python recipes/causal_lm.py --baseline

With your own checkpoint and data, from the Hub or from disk (column `text`):

    python recipes/causal_lm.py --model HuggingFaceTB/SmolLM2-135M --dataset notes.txt --learning_rate 1e-4

All options of `TrainingArguments` apply. Results, model card and model are written to `--output_dir`.
"""

import support.threads  # noqa: F401

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    EvalPrediction,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_dynmask import DataCollatorWithLengths, DynMaskConfig, DynMaskForCausalLM, to_transformers
from support.common import IGNORED, CommonArguments, load_model, load_texts, parse_arguments, special_token_ids
from support.measuring import perplexity_of, unigram_perplexity
from support.reporting import About, train_and_report
from support.samples import resolve_model

END, PADDING = "<|endoftext|>", "<|padding|>"


def main(arguments: list[str] | None = None) -> None:
    recipe, training = parse_arguments([RecipeArguments, TrainingArguments], arguments, DEFAULTS)

    texts = load_texts(recipe.dataset, "text")
    checkpoint = None if recipe.model is None else resolve_model(recipe.model)
    if checkpoint is None:
        tokenizer = new_tokenizer(texts["train"]["text"], recipe.vocab_size)
    else:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    data = DatasetDict({name: tokenize(rows, tokenizer, recipe.max_length) for name, rows in texts.items()})
    data["test"] = data["test"].select(range(min(recipe.eval_rows, len(data["test"]))))

    set_seed(training.seed)
    if checkpoint is None:
        model = new_model(recipe, tokenizer)
    else:
        model = load_model(checkpoint, "causal-lm", AutoModelForCausalLM, mask=recipe.mask)
    trainer = Trainer(
        model,
        training,
        data_collator=DataCollatorWithLengths(tokenizer, flat=True),
        train_dataset=data["train"],
        eval_dataset=data["test"],
        processing_class=tokenizer,
        compute_metrics=perplexity,
        preprocess_logits_for_metrics=surprise,
    )

    baselines = {}
    if recipe.baseline:
        stock = to_transformers(model, model.config.source_model_type or "llama")
        baselines["stock"] = (stock, DataCollatorForTokenClassification(tokenizer, return_tensors="pt"))
    unigrams = unigram_perplexity(targets(data["train"]), targets(data["test"]))
    train_and_report(
        ABOUT,
        recipe,
        trainer,
        AutoModelForCausalLM.from_pretrained,
        baselines,
        settings={"mask": recipe.mask, "max_length": recipe.max_length},
        trivial={"what": "from the frequency of each token alone", "perplexity": unigrams},
    )


def new_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """A byte-level byte-pair encoding (arXiv:1508.07909) learned from the texts."""
    pairs = ByteLevelBPETokenizer()
    pairs.train_from_iterator(iter(texts), vocab_size, special_tokens=[END, PADDING], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=pairs, eos_token=END, bos_token=END, pad_token=PADDING)


def tokenize(rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """Appends an end token to each text, and splits it into pieces of at most `max_length` tokens. The first token of a
    piece is not a target."""
    end = tokenizer.eos_token_id

    def pieces(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        whole = [ids + [end] for ids in tokenizer(batch["text"], add_special_tokens=False)["input_ids"]]
        cut = [ids[start : start + max_length] for ids in whole for start in range(0, len(ids), max_length)]
        cut = [ids for ids in cut if len(ids) > 1]
        return {"input_ids": cut, "labels": [[IGNORED, *ids[1:]] for ids in cut]}

    return rows.map(pieces, batched=True, remove_columns=rows.column_names)


def new_model(recipe: "RecipeArguments", tokenizer: Any) -> DynMaskForCausalLM:
    """A Llama-like decoder: rotary positions, RMSNorm before each sublayer, gated feed-forward, no biases."""
    config = DynMaskConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=max(1, recipe.hidden_size // 64),
        intermediate_size=8 * recipe.hidden_size // 3 // 8 * 8,
        hidden_act="silu",
        gated_feed_forward=True,
        norm_type="rms_norm",
        norm_placement="pre",
        embedding_norm=False,
        position_type="rotary",
        attention_bias=False,
        mlp_bias=False,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        use_pooler=False,
        max_position_embeddings=recipe.max_length,
        mask=recipe.mask,
        **special_token_ids(tokenizer),
    )
    return DynMaskForCausalLM(config)


def targets(rows: Dataset) -> list[int]:
    """All targets in the order of the rows."""
    return [label for labels in rows["labels"] for label in labels[1:]]


def surprise(logits: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood `(B, T - 1)` of each token after the first; 0 for tokens that are not targets."""
    return cross_entropy(logits[:, :-1].transpose(1, 2).float(), labels[:, 1:], ignore_index=IGNORED, reduction="none")


def perplexity(prediction: EvalPrediction) -> dict[str, float]:
    return {"perplexity": perplexity_of(prediction.predictions, np.asarray(prediction.label_ids)[:, 1:])}


# --- Arguments and model card ----------------------------------------------------------------------------------------


@dataclass
class RecipeArguments(CommonArguments):
    model: str | None = field(
        default=None, metadata={"help": "A checkpoint folder, a Hub id or a sample. None: a new Llama-like model."}
    )
    dataset: str = field(
        default="sample:wikitext",
        metadata={"help": "A Hub id, a csv, json, parquet or text file or a sample, with the column `text`."},
    )
    mask: str = field(default="causal", metadata={"help": "Mask expression, such as `causal & window(127, 0)`."})
    max_length: int = field(default=512, metadata={"help": "Tokens per document; longer ones are split."})
    vocab_size: int = field(default=4096, metadata={"help": "Vocabulary size of a new model."})
    hidden_size: int = field(default=256, metadata={"help": "Hidden size of a new model."})
    num_layers: int = field(default=4, metadata={"help": "Layers of a new model."})
    eval_rows: int = field(default=400, metadata={"help": "Maximum number of documents for evaluation."})


DEFAULTS = {
    "output_dir": "outputs/causal_lm",
    "max_steps": 400,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8,
    "learning_rate": 2e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,
    "adam_beta2": 0.98,
    "logging_steps": 50,
}
USAGE = """
import hf_dynmask  # registers the model type with transformers
from transformers import pipeline

writer = pipeline("text-generation", model="path/to/this/folder")
writer("The history of", max_new_tokens=40)
"""
LIMITS = "Its texts resemble its training data in form, but their content is made up."
ABOUT = About(
    recipe="causal_lm",
    task="text-generation",
    metrics=["perplexity"],
    title="Language model",
    usage=USAGE,
    limits=LIMITS,
)
make_card = ABOUT.make_card

if __name__ == "__main__":
    main()
