"""
Fine-tunes a BERT-like checkpoint to fill in masked words, with the stock `Trainer`, on batches that carry lengths, with
targets drawn anew in every epoch.

    python recipes/masked_lm.py

takes sections of WikiText-2 and MiniLM, which gets a new head. To train the stock model on padded batches too, from the
same weights and on the same targets:

    python recipes/masked_lm.py --baseline

With a model and data of your own, from the Hub or from disk (column `text`), and spans of words for targets:

    python recipes/masked_lm.py --model google-bert/bert-base-uncased --dataset notes.txt --strategy span

Every option of `TrainingArguments` applies. Results, model card and model go to `--output_dir`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from datasets import Dataset, DatasetDict
from huggingface_hub import ModelCard
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
from support.cards import Results, describe_source, describe_training, model_card, report
from support.common import IGNORED, CommonArguments, dropout_of, load_model, load_texts, parse_arguments
from support.measuring import Contenders, compare, perplexity_of, unigram_perplexity
from support.samples import resolve_model

METRIC = "perplexity"
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
LIMITS = "The words that it fills in are likely ones, not true ones."


@dataclass
class RecipeArguments(CommonArguments):
    model: str = field(default="sample:minilm", metadata={"help": "A checkpoint folder, a Hub id or a sample."})
    dataset: str = field(
        default="sample:wikitext",
        metadata={"help": "A Hub id, a csv, json, parquet or text file or a sample, with the column `text`."},
    )
    max_length: int = field(default=256, metadata={"help": "Tokens of a text; longer ones are cut in pieces."})
    mlm_probability: float = field(default=0.15, metadata={"help": "Of each token to be a target."})
    strategy: str = field(default="token", metadata={"help": "Targets are a `token`, a `whole_word` or a `span`."})
    eval_rows: int = field(default=300, metadata={"help": "Pieces of text that the model is evaluated on, at most."})
    dropout: float = field(
        default=0.0,
        metadata={"help": "Of hidden states and attention weights; at 0 the two trainings follow one course."},
    )


class MaskedLMTrainer(DynamicMaskingMixin, Trainer):
    """Tells the collator each epoch."""


class PaddedRows(DataCollatorForDynamicMasking):
    """The same targets with an attention mask alone, for stock models."""

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        batch = super().__call__(features)
        del batch["lengths"]
        return batch


def main(arguments: list[str] | None = None) -> None:
    recipe, training = parse_arguments([RecipeArguments, TrainingArguments], arguments, DEFAULTS)
    training.include_num_input_tokens_seen = "non_padding"  # the parser takes it for a boolean

    checkpoint = resolve_model(recipe.model)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    masking = {"mlm_probability": recipe.mlm_probability, "strategy": recipe.strategy}
    collator = DataCollatorForDynamicMasking(tokenizer, seed=training.seed, **masking)
    texts = load_texts(recipe.dataset, "text")
    data = DatasetDict({name: tokenize(rows, tokenizer, recipe.max_length) for name, rows in texts.items()})
    data["test"] = data["test"].select(range(min(recipe.eval_rows, len(data["test"]))))

    set_seed(training.seed)
    settings = dropout_of(recipe.dropout)
    model = load_model(checkpoint, "masked-lm", AutoModelForMaskedLM, **settings)
    if not has_head(checkpoint):
        start_from_frequencies(model.get_output_embeddings().bias, tokens(data["train"], tokenizer))
    contenders: Contenders = {"dynmask": (model, collator)}
    if recipe.baseline:
        contenders["stock"] = (to_transformers(model), PaddedRows(tokenizer, seed=training.seed, **masking))
    trainer_of = partial(make_trainer, data=data, tokenizer=tokenizer)
    compared = compare(contenders, trainer_of, training, AutoModelForMaskedLM, [METRIC])

    results = {
        "recipe": "masked_lm",
        "arguments": recipe.given,
        "task": "fill-mask",
        "metric": METRIC,
        "model": describe_source(recipe.model),
        "dataset": describe_source(recipe.dataset) | {"rows": {name: len(rows) for name, rows in data.items()}},
        "trivial": {
            "what": "from the frequency of each token alone",
            METRIC: unigram_perplexity(tokens(data["train"], tokenizer), targets(data["test"], collator)),
        },
        "training": describe_training(training)
        | {"dropout": recipe.dropout, "max_length": recipe.max_length}
        | masking,
        **compared,
    }
    report(results, make_card(results), training, recipe.model_card_dir)


def tokenize(rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """Pieces of at most `max_length` tokens, each with the special tokens of a text."""

    def pieces(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        cut = tokenizer(batch["text"], truncation=True, max_length=max_length, return_overflowing_tokens=True)
        return {"input_ids": cut["input_ids"]}

    return rows.map(pieces, batched=True, remove_columns=rows.column_names)


def has_head(checkpoint: str) -> bool:
    """Whether a checkpoint is of a masked language model, and not of a bare one, to which a new head is added."""
    return any(name.endswith("ForMaskedLM") for name in AutoConfig.from_pretrained(checkpoint).architectures or ())


def start_from_frequencies(bias: Tensor, seen: list[int]) -> None:
    """Sets the bias of a new head `(V,)` to the logarithm of each token's frequency, which otherwise is learned first,
    for as long as a short training lasts. Each counts one more than it is."""
    counts = torch.bincount(torch.tensor(seen), minlength=len(bias)) + 1
    with torch.no_grad():
        bias.copy_((counts / counts.sum()).log())


def make_trainer(model, collator, training: TrainingArguments, data: DatasetDict, tokenizer) -> Trainer:
    return MaskedLMTrainer(
        model,
        training,
        data_collator=collator,
        train_dataset=data["train"],
        eval_dataset=data["test"],
        processing_class=tokenizer,
        compute_metrics=perplexity,
        preprocess_logits_for_metrics=surprise,
    )


def surprise(logits: Tensor, labels: Tensor) -> Tensor:
    """
    Negative log-likelihood `(B, T)` of each label, 0 where there is no target.

    A trainer keeps what this returns in place of all logits of the evaluation, which take as much for each token of the
    vocabulary.
    """
    found = torch.zeros(labels.shape, device=logits.device)
    is_target = labels != IGNORED
    found[is_target] = cross_entropy(logits[is_target].float(), labels[is_target], reduction="none")
    return found


def perplexity(prediction: EvalPrediction) -> dict[str, float]:
    return {METRIC: perplexity_of(prediction.predictions, prediction.label_ids)}


def tokens(rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """All tokens that may be targets."""
    special = set(tokenizer.all_special_ids)
    return [token for ids in rows["input_ids"] for token in ids if token not in special]


def targets(rows: Dataset, collator: DataCollatorForDynamicMasking) -> list[int]:
    """All targets of the evaluation."""
    labels = collator.for_evaluation()(rows.to_list())["labels"]
    return labels[labels != IGNORED].tolist()


def make_card(results: Results) -> ModelCard:
    return model_card(results, title="Masked language model", usage=USAGE, limits=LIMITS)


if __name__ == "__main__":
    main()
