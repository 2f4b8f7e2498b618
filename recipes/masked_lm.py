"""
Fine-tunes a BERT-like checkpoint to fill in masked words with the stock `Trainer`, on batches with lengths. Targets are
drawn again in every epoch.

    python recipes/masked_lm.py

uses sections of WikiText-2 and MiniLM, which gets a new head. To also train the stock model on padded batches, from the
same weights and on the same targets:

    python recipes/masked_lm.py --baseline

With your own model and data, from the Hub or from disk (column `text`), and spans of words as targets:

    python recipes/masked_lm.py --model google-bert/bert-base-uncased --dataset notes.txt --strategy span

All options of `TrainingArguments` apply. Results, model card and model are written to `--output_dir`.
"""

import support.threads  # noqa: F401

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset, DatasetDict
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoTokenizer,
    EvalPrediction,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_dynmask import DataCollatorForDynamicMasking, DynamicMaskingMixin, to_transformers
from support.common import IGNORED, DropoutArguments, dropout_settings, load_model, load_texts, parse_arguments
from support.measuring import perplexity_of, unigram_perplexity
from support.reporting import About, train_and_report
from support.samples import resolve_model


class MaskedLMTrainer(DynamicMaskingMixin, Trainer):
    """Sets the collator's epoch."""


def main(arguments: list[str] | None = None) -> None:
    recipe, training = parse_arguments([RecipeArguments, TrainingArguments], arguments, DEFAULTS)

    checkpoint = resolve_model(recipe.model)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    masking = {"mlm_probability": recipe.mlm_probability, "strategy": recipe.strategy}
    collator = DataCollatorForDynamicMasking(tokenizer, seed=training.seed, **masking)
    texts = load_texts(recipe.dataset, "text")
    data = DatasetDict({name: tokenize(rows, tokenizer, recipe.max_length) for name, rows in texts.items()})
    data["test"] = data["test"].select(range(min(recipe.eval_rows, len(data["test"]))))

    set_seed(training.seed)
    model = load_model(checkpoint, "masked-lm", AutoModelForMaskedLM, **dropout_settings(recipe))
    if not has_head(checkpoint):
        start_from_frequencies(model.get_output_embeddings().bias, tokens(data["train"], tokenizer))
    trainer = MaskedLMTrainer(
        model,
        training,
        data_collator=collator,
        train_dataset=data["train"],
        eval_dataset=data["test"],
        processing_class=tokenizer,
        compute_metrics=perplexity,
        preprocess_logits_for_metrics=surprise,
    )

    baselines = {}
    if recipe.baseline:
        baselines["stock"] = (to_transformers(model), PaddedRows(tokenizer, seed=training.seed, **masking))
    unigrams = unigram_perplexity(tokens(data["train"], tokenizer), targets(data["test"], collator))
    train_and_report(
        ABOUT,
        recipe,
        trainer,
        AutoModelForMaskedLM.from_pretrained,
        baselines,
        settings={"dropout": model.config.hidden_dropout_prob, "max_length": recipe.max_length} | masking,
        trivial={"what": "from the frequency of each token alone", "perplexity": unigrams},
    )


def tokenize(rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """Splits texts into pieces of at most `max_length` tokens. Each piece has special tokens."""

    def pieces(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        cut = tokenizer(batch["text"], truncation=True, max_length=max_length, return_overflowing_tokens=True)
        return {"input_ids": cut["input_ids"]}

    return rows.map(pieces, batched=True, remove_columns=rows.column_names)


def has_head(checkpoint: str) -> bool:
    """Whether a checkpoint has a masked-LM head. If not, a new one is added."""
    return any(name.endswith("ForMaskedLM") for name in AutoConfig.from_pretrained(checkpoint).architectures or ())


def start_from_frequencies(bias: Tensor, seen: list[int]) -> None:
    """Sets the bias `(V,)` of a new head to the log frequency of each token, with add-one smoothing.

    Without this, a short training would mostly learn these frequencies.
    """
    counts = torch.bincount(torch.tensor(seen), minlength=len(bias)) + 1
    with torch.no_grad():
        bias.copy_((counts / counts.sum()).log())


class PaddedRows(DataCollatorForDynamicMasking):
    """The same targets without `lengths`, for stock models."""

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        batch = super().__call__(features)
        del batch["lengths"]
        return batch


def surprise(logits: Tensor, labels: Tensor) -> Tensor:
    """
    Negative log-likelihood `(B, T)` of each label; 0 for tokens that are not targets.

    The trainer keeps these numbers instead of the logits, which would take too much memory.
    """
    found = torch.zeros(labels.shape, device=logits.device)
    is_target = labels != IGNORED
    found[is_target] = cross_entropy(logits[is_target].float(), labels[is_target], reduction="none")
    return found


def perplexity(prediction: EvalPrediction) -> dict[str, float]:
    return {"perplexity": perplexity_of(prediction.predictions, prediction.label_ids)}


def tokens(rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """All tokens that can be targets."""
    special = set(tokenizer.all_special_ids)
    return [token for ids in rows["input_ids"] for token in ids if token not in special]


def targets(rows: Dataset, collator: DataCollatorForDynamicMasking) -> list[int]:
    """All targets of the evaluation."""
    labels = collator.for_evaluation()(rows.to_list())["labels"]
    return labels[labels != IGNORED].tolist()


# --- Arguments and model card ----------------------------------------------------------------------------------------


@dataclass
class RecipeArguments(DropoutArguments):
    model: str = field(default="sample:minilm", metadata={"help": "A checkpoint folder, a Hub id or a sample."})
    dataset: str = field(
        default="sample:wikitext",
        metadata={"help": "A Hub id, a csv, json, parquet or text file or a sample, with the column `text`."},
    )
    max_length: int = field(default=256, metadata={"help": "Tokens per text; longer ones are split."})
    mlm_probability: float = field(default=0.15, metadata={"help": "Probability that a token is a target."})
    strategy: str = field(default="token", metadata={"help": "The unit of targets: `token`, `whole_word` or `span`."})
    eval_rows: int = field(default=300, metadata={"help": "Maximum number of pieces for evaluation."})


DEFAULTS = {
    "output_dir": "outputs/masked_lm",
    "max_steps": 150,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8,
    "learning_rate": 3e-4,
    "logging_steps": 25,
}
USAGE = """
import hf_dynmask  # registers the model type with transformers
from transformers import pipeline

filler = pipeline("fill-mask", model="path/to/this/folder")
filler("The river flows into the [MASK].")
"""
LIMITS = "It fills in likely words, not true ones."
ABOUT = About(
    recipe="masked_lm",
    task="fill-mask",
    metrics=["perplexity"],
    title="Masked language model",
    usage=USAGE,
    limits=LIMITS,
)
make_card = ABOUT.make_card

if __name__ == "__main__":
    main()
