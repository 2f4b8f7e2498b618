"""
Measures whether dynamic masking is better than static masking, with small new models and several seeds. There are three
parts:

    padding    classification of film reviews: rows padded to one fixed size, against rows with lengths
    targets    masked language modeling, then fine-tuning to classify film reviews: targets drawn once or ten
               times, against targets drawn again in every epoch
    masks      causal language modeling: one mask, against a window that widens during training

    python recipes/static_vs_dynamic.py

The seeds are `--seed` and the numbers after it. All variants of a part use the same seeds, and so the same initial
weights and order of examples. To run a single part on more seeds:

    python recipes/static_vs_dynamic.py --parts targets --num_seeds 5

Other options of `TrainingArguments` apply to all parts, except `--num_train_epochs`, which applies to the classifiers.
Results, card and figure are written to `--output_dir`.
"""

import support.threads  # noqa: F401

from dataclasses import asdict, dataclass, field, replace
from functools import partial
from math import log
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset, DatasetDict
from huggingface_hub import ModelCard
from tokenizers import BertWordPieceTokenizer
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertTokenizer,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

import causal_lm
import masked_lm
from hf_dynmask import (
    DataCollatorForDynamicMasking,
    DataCollatorWithLengths,
    DynMaskPreTrainedModel,
    MaskSchedule,
    from_transformers,
    to_transformers,
)
from sequence_classification import accuracy, encode_labels
from support.cards import Results, describe_environment, describe_source, describe_training
from support.common import ReportArguments, check_texts, dropout_of, load_columns, load_texts, names_of, parse_arguments
from support.measuring import Collator, train_and_evaluate, unigram_perplexity
from support.variants import Measured, Variants, make_figure, measure, report, variants_card

FINAL_MASK = "causal"
WIDENING = {0: "causal & window(31, 0)", 0.4: "causal & window(127, 0)", 0.8: FINAL_MASK}
PARTS = {
    "padding": "A new model is trained to classify. `fixed size`: the stock BERT, rows padded to `max_length`; "
    "`longest of batch`: the same, rows padded to the longest row of their batch; `lengths`: our model, no padding.",
    "targets": "A new masked language model is trained for `target_epochs` (its `seconds` are given) and fine-tuned to "
    "classify. Its targets are `drawn once`, `drawn ten times` (as in BERT: the epochs use the copies in turn) or "
    "`drawn in each epoch` (as in RoBERTa). The loss is measured on the same held-out targets for all variants. "
    "`frequencies` predicts from token frequencies, without a model.",
    "masks": f"A new language model is trained and evaluated. `fixed`: with the mask `{FINAL_MASK}`; `widening`: with "
    + ", ".join(f"`{mask}` from {start:.0%} of the steps on" for start, mask in WIDENING.items())
    + ". `frequencies` predicts from token frequencies, without a model.",
}
UNTRAINED = "frequencies"  # the variant without a model: predictions from token frequencies


def main(arguments: list[str] | None = None) -> None:
    recipe, training = parse_arguments([RecipeArguments, TrainingArguments], arguments, DEFAULTS)
    if recipe.num_seeds < 2:
        raise ValueError(
            f"`num_seeds` must be at least 2, to distinguish a difference from chance; got {recipe.num_seeds}"
        )
    seeds = range(training.seed, training.seed + recipe.num_seeds)

    sources = [recipe.documents if part == "masks" else recipe.dataset for part in recipe.parts]
    results = {
        "recipe": "static_vs_dynamic",
        "arguments": recipe.given,
        "seeds": list(seeds),
        "model": {"name": f"new models, {recipe.num_layers} layers of {recipe.hidden_size}"},
        "datasets": [describe_source(source) for source in dict.fromkeys(sources)],
        "training": describe_training(training)
        | {name: value for name, value in asdict(recipe).items() if name not in vars(ReportArguments())},
        "parts": {
            part: {"what": PARTS[part], "runs": measure(VARIANTS[part](recipe), training, seeds)}
            for part in recipe.parts
        },
        "environment": describe_environment(training.device),
    }
    report(results, make_card(results), make_figure(results), training, recipe.model_card_dir)


# --- Padding and targets ---------------------------------------------------------------------------------------------


class Reviews(NamedTuple):
    """Examples with `input_ids` and `label`, their tokenizer, and the label names."""

    data: DatasetDict
    tokenizer: PreTrainedTokenizerBase
    labels: list[str]


def load_reviews(recipe: "RecipeArguments") -> Reviews:
    data = encode_labels(load_columns(recipe.dataset, "text", "label"))
    check_texts(data, "text")
    pieces = BertWordPieceTokenizer()
    pieces.train_from_iterator(iter(data["train"]["text"]), recipe.vocab_size, show_progress=False)
    tokenizer = BertTokenizer(pieces.get_vocab())

    def tokenize(rows: dict[str, list[str]]) -> dict[str, Any]:
        return {"input_ids": tokenizer(rows["text"], truncation=True, max_length=recipe.max_length)["input_ids"]}

    labels = data["train"].features["label"].names
    return Reviews(data.map(tokenize, batched=True, remove_columns="text"), tokenizer, labels)


def new_model(auto_class: Any, recipe: "RecipeArguments", reviews: Reviews, **settings: Any) -> DynMaskPreTrainedModel:
    """A BERT-like model with random weights; dropout is 0.1 unless `settings` say otherwise."""
    config = BertConfig(
        vocab_size=len(reviews.tokenizer),
        hidden_size=recipe.hidden_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=max(1, recipe.hidden_size // 32),
        intermediate_size=4 * recipe.hidden_size,
        max_position_embeddings=recipe.max_length,
        initializer_range=recipe.hidden_size**-0.5,  # the usual 0.02 is too small for a small model
        **names_of(reviews.labels),
        **settings,
    )
    return from_transformers(auto_class.from_config(config))


def padding_variants(recipe: "RecipeArguments") -> Variants:
    reviews = load_reviews(recipe)

    def train(collator: Collator, stock: bool, training: TrainingArguments) -> Measured:
        model = new_model(AutoModelForSequenceClassification, recipe, reviews, **dropout_of(0.0))
        return train_classifier(to_transformers(model) if stock else model, collator, training, reviews)

    tokenizer = reviews.tokenizer
    fixed = DataCollatorWithPadding(tokenizer, padding="max_length", max_length=recipe.max_length)
    return {
        "fixed size": partial(train, fixed, True),
        "longest of batch": partial(train, DataCollatorWithPadding(tokenizer), True),
        "lengths": partial(train, DataCollatorWithLengths(tokenizer), False),
    }


def train_classifier(model: Any, collator: Collator, training: TrainingArguments, reviews: Reviews) -> Measured:
    trainer = Trainer(
        model,
        training,
        data_collator=collator,
        train_dataset=reviews.data["train"],
        eval_dataset=reviews.data["test"],
        processing_class=reviews.tokenizer,
        compute_metrics=accuracy,
    )
    run = train_and_evaluate(trainer, "accuracy")
    return {"accuracy": run["accuracy"], "seconds": run["train_seconds"]}


def target_variants(recipe: "RecipeArguments") -> Variants:
    reviews = load_reviews(recipe)
    few = DatasetDict({"train": some(reviews.data["train"], recipe.target_rows), "test": reviews.data["test"]})

    def frequencies(training: TrainingArguments) -> Measured:
        collator = DataCollatorForDynamicMasking(reviews.tokenizer, seed=training.seed)
        seen, held_out = masked_lm.tokens(few["train"], reviews.tokenizer), masked_lm.targets(few["test"], collator)
        return {"held-out loss": log(unigram_perplexity(seen, held_out))}

    def train(drawing: dict[str, Any], training: TrainingArguments) -> Measured:
        model = new_model(AutoModelForMaskedLM, recipe, reviews)
        collator = DataCollatorForDynamicMasking(reviews.tokenizer, seed=training.seed, **drawing)
        folder = str(Path(str(training.output_dir), "pretrained"))
        pretraining = replace(training, output_dir=folder, num_train_epochs=recipe.target_epochs)
        trainer = masked_lm.MaskedLMTrainer(
            model,
            pretraining,
            data_collator=collator,
            train_dataset=few["train"],
            eval_dataset=few["test"],
            processing_class=reviews.tokenizer,
            compute_metrics=masked_lm.perplexity,
            preprocess_logits_for_metrics=masked_lm.surprise,
        )
        pretrained = train_and_evaluate(trainer, "perplexity")
        trainer.save_model()
        trainer.accelerator.wait_for_everyone()
        set_seed(training.seed)  # the same initial classifier weights for all variants
        settings = names_of(reviews.labels) | dropout_of(0.0)
        classifier = AutoModelForSequenceClassification.from_pretrained(folder, **settings)
        tuned = train_classifier(classifier, DataCollatorWithLengths(reviews.tokenizer), training, reviews)
        return {
            "held-out loss": log(pretrained["perplexity"]),
            "accuracy": tuned["accuracy"],
            "seconds": pretrained["train_seconds"],
        }

    return {
        UNTRAINED: frequencies,
        "drawn once": partial(train, {"dynamic": False}),
        "drawn ten times": partial(train, {"dynamic": False, "copies": 10}),
        "drawn in each epoch": partial(train, {}),
    }


# --- Masks -----------------------------------------------------------------------------------------------------------


def mask_variants(recipe: "RecipeArguments") -> Variants:
    sizes = causal_lm.RecipeArguments(
        mask=FINAL_MASK,
        max_length=recipe.document_length,
        hidden_size=recipe.hidden_size,
        num_layers=recipe.num_layers,
    )
    texts = load_texts(recipe.documents, "text")
    texts = {
        "train": some(texts["train"], recipe.document_rows),
        "test": some(texts["test"], recipe.document_rows // 3),
    }
    tokenizer = causal_lm.new_tokenizer(texts["train"]["text"], recipe.vocab_size)
    data = DatasetDict({name: causal_lm.tokenize(rows, tokenizer, sizes.max_length) for name, rows in texts.items()})

    def frequencies(training: TrainingArguments) -> Measured:
        return {"perplexity": unigram_perplexity(*map(causal_lm.targets, (data["train"], data["test"])))}

    def train(masks: dict[float, str], training: TrainingArguments) -> Measured:
        model = causal_lm.new_model(sizes, tokenizer)
        training = replace(training, num_train_epochs=recipe.document_epochs)
        training.per_device_train_batch_size = training.per_device_eval_batch_size = recipe.document_batch_size
        trainer = Trainer(
            model,
            training,
            data_collator=DataCollatorWithLengths(tokenizer, flat=True),
            train_dataset=data["train"],
            eval_dataset=data["test"],
            processing_class=tokenizer,
            callbacks=[MaskSchedule(masks)],
            compute_metrics=causal_lm.perplexity,
            preprocess_logits_for_metrics=causal_lm.surprise,
        )
        run = train_and_evaluate(trainer, "perplexity")
        return {"perplexity": run["perplexity"], "seconds": run["train_seconds"]}

    fixed, widening = partial(train, {0: FINAL_MASK}), partial(train, WIDENING)
    return {UNTRAINED: frequencies, "fixed": fixed, "widening": widening}


def some(rows: Dataset, count: int) -> Dataset:
    return rows.shuffle(seed=0).select(range(min(count, len(rows))))


VARIANTS = {"padding": padding_variants, "targets": target_variants, "masks": mask_variants}


# --- Arguments and model card ----------------------------------------------------------------------------------------


@dataclass
class RecipeArguments(ReportArguments):
    parts: list[str] = field(
        default_factory=lambda: list(PARTS), metadata={"help": "What to measure.", "choices": list(PARTS)}
    )
    num_seeds: int = field(default=3, metadata={"help": "Number of seeds, at least 2."})
    dataset: str = field(
        default="sample:reviews",
        metadata={"help": "A Hub id, a csv, json or parquet file or a sample, with the columns `text` and `label`."},
    )
    documents: str = field(
        default="sample:wikitext",
        metadata={"help": "For `masks`: a Hub id, a csv, json, parquet or text file or a sample, with column `text`."},
    )
    hidden_size: int = field(default=64, metadata={"help": "Hidden size of the new models."})
    num_layers: int = field(default=2, metadata={"help": "Layers of the new models."})
    vocab_size: int = field(default=2000, metadata={"help": "Size of the vocabulary learned from the training data."})
    max_length: int = field(default=128, metadata={"help": "Tokens per review, and the width of rows of fixed size."})
    target_rows: int = field(default=350, metadata={"help": "Maximum number of reviews for masked language modeling."})
    target_epochs: int = field(default=40, metadata={"help": "Epochs of masked language modeling."})
    document_rows: int = field(default=250, metadata={"help": "Maximum number of training documents for `masks`."})
    document_length: int = field(default=1024, metadata={"help": "Tokens per document; longer ones are split."})
    document_batch_size: int = field(default=4, metadata={"help": "Documents per batch."})
    document_epochs: int = field(default=2, metadata={"help": "Epochs of the language model."})


DEFAULTS = {
    "output_dir": "outputs/static_vs_dynamic",
    "num_train_epochs": 2,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 32,
    "learning_rate": 2e-3,
    "logging_steps": 100,
}
LIMITS = (
    "What is best for models of this size, these texts and so few steps may not be best for larger models and longer "
    "training. Times were measured on a machine that may have been busy with other work."
)


def make_card(results: Results) -> ModelCard:
    return variants_card(results, title="Static versus dynamic masking", limits=LIMITS)


if __name__ == "__main__":
    main()
