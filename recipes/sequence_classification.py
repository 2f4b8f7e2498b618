"""
Fine-tunes a BERT-like checkpoint to classify texts with the stock `Trainer`, on batches with lengths.

    python recipes/sequence_classification.py

uses film reviews and MiniLM. To also train the stock model on padded batches, from the same weights:

    python recipes/sequence_classification.py --baseline

With your own model and data, from the Hub or from disk (columns `text` and `label`):

    python recipes/sequence_classification.py --model google-bert/bert-base-uncased --dataset reviews.csv

All options of `TrainingArguments` apply. Results, model card and model are written to `--output_dir`.
"""

import support.threads  # noqa: F401

from dataclasses import dataclass, field

import numpy as np
from datasets import ClassLabel, DatasetDict, Features
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

from hf_dynmask import DataCollatorWithLengths, to_transformers
from support.common import DropoutArguments, dropout_settings, load_columns, load_model, names_of, parse_arguments
from support.reporting import About, train_and_report
from support.samples import resolve_model


def main(arguments: list[str] | None = None) -> None:
    recipe, training = parse_arguments([RecipeArguments, TrainingArguments], arguments, DEFAULTS)

    checkpoint = resolve_model(recipe.model)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    data = encode_labels(load_columns(recipe.dataset, "text", "label"))
    labels = data["train"].features["label"].names
    data = data.map(lambda rows: tokenizer(rows["text"], truncation=True), batched=True, remove_columns="text")

    set_seed(training.seed)
    settings = names_of(labels) | dropout_settings(recipe)
    model = load_model(checkpoint, "sequence-classification", AutoModelForSequenceClassification, **settings)
    trainer = Trainer(
        model,
        training,
        data_collator=DataCollatorWithLengths(tokenizer),
        train_dataset=data["train"],
        eval_dataset=data["test"],
        processing_class=tokenizer,
        compute_metrics=accuracy,
    )

    train_and_report(
        ABOUT,
        recipe,
        trainer,
        AutoModelForSequenceClassification.from_pretrained,
        {"stock": (to_transformers(model), DataCollatorWithPadding(tokenizer))} if recipe.baseline else {},
        settings={"dropout": model.config.hidden_dropout_prob},
        labels=labels,
    )


def encode_labels(data: DatasetDict) -> DatasetDict:
    """Encodes labels as classes. The order is that of the sorted labels of `train`."""
    label = data["train"].features["label"]
    if not isinstance(label, ClassLabel):
        label = ClassLabel(names=[str(name) for name in sorted(set(data["train"]["label"]))])
        features = Features(data["train"].features | {"label": label})
        data = data.map(lambda row: {"label": label.str2int(str(row["label"]))}, features=features)
    if len(label.names) < 2:
        raise ValueError(f"`label` must have at least two classes; got {', '.join(label.names)}")
    return data


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float(accuracy_score(prediction.label_ids, np.argmax(prediction.predictions, axis=-1)))}


# --- Arguments and model card ----------------------------------------------------------------------------------------


@dataclass
class RecipeArguments(DropoutArguments):
    model: str = field(default="sample:minilm", metadata={"help": "A checkpoint folder, a Hub id or a sample."})
    dataset: str = field(
        default="sample:reviews",
        metadata={"help": "A Hub id, a csv, json or parquet file or a sample, with the columns `text` and `label`."},
    )


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
LIMITS = "Every text gets one of the labels, whatever it is about. The probabilities are not calibrated."
ABOUT = About(
    recipe="sequence_classification",
    task="text-classification",
    metrics=["accuracy"],
    title="Text classification: {labels}",
    usage=USAGE,
    limits=LIMITS,
)
make_card = ABOUT.make_card

if __name__ == "__main__":
    main()
