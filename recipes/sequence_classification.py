"""
Fine-tunes a BERT-like checkpoint to classify texts, with the stock `Trainer`, on batches that carry lengths.

    python recipes/sequence_classification.py

takes the sample reviews and MiniLM. To train the stock model on padded batches too, from the same weights:

    python recipes/sequence_classification.py --baseline

With a model and data of your own, from the Hub or from disk (columns `text` and `label`):

    python recipes/sequence_classification.py --model google-bert/bert-base-uncased --dataset reviews.csv

Every option of `TrainingArguments` applies. Results, model card and model go to `--output_dir`.
"""

from dataclasses import dataclass, field
from functools import partial

import numpy as np
from datasets import ClassLabel, DatasetDict, Features
from huggingface_hub import ModelCard
from sklearn.metrics import accuracy_score
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_dynmask import DataCollatorWithLengths, DynMaskPreTrainedModel, to_transformers
from support.cards import Results, describe_source, describe_training, model_card, report
from support.common import CommonArguments, dropout_of, load_columns, load_model, names_of, parse_arguments
from support.measuring import Contenders, compare
from support.samples import resolve_model

METRIC = "accuracy"
DEFAULTS = {
    "output_dir": "outputs/sequence_classification",
    "num_train_epochs": 2,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 32,
    "learning_rate": 1e-4,
    "logging_steps": 50,
}
USAGE = """
import hf_dynmask  # registers the model type with transformers
from transformers import pipeline

classifier = pipeline("text-classification", model="path/to/this/folder")
classifier("A film to remember.")
"""
LIMITS = (
    "Every text gets one of the labels, whatever it is about, and a probability that nobody has compared with how "
    "often it is right."
)


@dataclass
class RecipeArguments(CommonArguments):
    model: str = field(default="sample:minilm", metadata={"help": "A checkpoint folder, a Hub id or a sample."})
    dataset: str = field(
        default="sample:reviews",
        metadata={"help": "A Hub id, a csv, json or parquet file or a sample, with the columns `text` and `label`."},
    )
    dropout: float = field(
        default=0.0,
        metadata={"help": "Of hidden states and attention weights; at 0 the two trainings follow one course."},
    )


def main(arguments: list[str] | None = None) -> None:
    recipe, training = parse_arguments([RecipeArguments, TrainingArguments], arguments, DEFAULTS)
    training.include_num_input_tokens_seen = "non_padding"  # the parser takes it for a boolean

    checkpoint = resolve_model(recipe.model)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    data = encode_labels(load_columns(recipe.dataset, "text", "label"))
    labels = data["train"].features["label"].names
    data = data.map(lambda rows: tokenizer(rows["text"], truncation=True), batched=True, remove_columns="text")

    set_seed(training.seed)
    model = load_classifier(checkpoint, labels, recipe.dropout)
    contenders: Contenders = {"dynmask": (model, DataCollatorWithLengths(tokenizer))}
    if recipe.baseline:
        contenders["stock"] = (to_transformers(model), DataCollatorWithPadding(tokenizer))
    trainer_of = partial(make_trainer, data=data, tokenizer=tokenizer)
    compared = compare(contenders, trainer_of, training, AutoModelForSequenceClassification, [METRIC])

    results = {
        "recipe": "sequence_classification",
        "arguments": recipe.given,
        "task": "text-classification",
        "metric": METRIC,
        "model": describe_source(recipe.model),
        "dataset": describe_source(recipe.dataset) | {"rows": {name: len(rows) for name, rows in data.items()}},
        "labels": labels,
        "training": describe_training(training) | {"dropout": recipe.dropout},
        **compared,
    }
    report(results, make_card(results), training, recipe.model_card_dir)


def encode_labels(data: DatasetDict) -> DatasetDict:
    """Labels as classes: those of `train`, in their order."""
    label = data["train"].features["label"]
    if not isinstance(label, ClassLabel):
        label = ClassLabel(names=[str(name) for name in sorted(set(data["train"]["label"]))])
        features = Features(data["train"].features | {"label": label})
        data = data.map(lambda row: {"label": label.str2int(str(row["label"]))}, features=features)
    if len(label.names) < 2:
        raise ValueError(f"`label` must tell at least two classes apart; got {', '.join(label.names)}")
    return data


def load_classifier(checkpoint: str, labels: list[str], dropout: float) -> DynMaskPreTrainedModel:
    settings = names_of(labels) | dropout_of(dropout)
    return load_model(checkpoint, "sequence-classification", AutoModelForSequenceClassification, **settings)


def make_trainer(model, collator, training: TrainingArguments, data: DatasetDict, tokenizer) -> Trainer:
    return Trainer(
        model,
        training,
        data_collator=collator,
        train_dataset=data["train"],
        eval_dataset=data["test"],
        processing_class=tokenizer,
        compute_metrics=accuracy,
    )


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {METRIC: float(accuracy_score(prediction.label_ids, np.argmax(prediction.predictions, axis=-1)))}


def make_card(results: Results) -> ModelCard:
    return model_card(results, title=f"Text classification: {', '.join(results['labels'])}", usage=USAGE, limits=LIMITS)


if __name__ == "__main__":
    main()
