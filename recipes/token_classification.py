"""
Trains a character-level tagger of names from random weights with the stock `Trainer`, on batches with lengths.

    python recipes/token_classification.py

uses sentences of Chinese news with persons, places and organisations. To also train the stock BERT on padded batches,
from the same weights:

    python recipes/token_classification.py --baseline

With your own checkpoint and data, from the Hub or from disk (columns `tokens` and `ner_tags`, lists):

    python recipes/token_classification.py --model google-bert/bert-base-chinese --dataset names.jsonl

All options of `TrainingArguments` apply. Results, model card and model are written to `--output_dir`. Metrics come from
seqeval itself, since `evaluate` would download its wrapper from the Hub.
"""

import support.threads  # noqa: F401

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, List
from seqeval.metrics import f1_score, precision_score, recall_score
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    EvalPrediction,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_dynmask import DataCollatorWithLengths, DynMaskConfig, DynMaskForTokenClassification, to_transformers
from support.common import (
    IGNORED,
    DropoutArguments,
    dropout_settings,
    load_columns,
    load_model,
    names_of,
    parse_arguments,
    special_token_ids,
)
from support.reporting import About, train_and_report
from support.samples import resolve_model

HEAD_SIZE = 32
PADDING, UNKNOWN = "[PAD]", "[UNK]"


def main(arguments: list[str] | None = None) -> None:
    recipe, training = parse_arguments([RecipeArguments, TrainingArguments], arguments, DEFAULTS)

    sentences = load_sentences(recipe.dataset)
    tags = sentences["train"].features["ner_tags"].feature.names
    checkpoint = None if recipe.model is None else resolve_model(recipe.model)
    if checkpoint is None:
        tokenizer = new_tokenizer(sentences["train"]["tokens"])
    else:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    data = DatasetDict({name: encode(rows, tokenizer, recipe.max_length) for name, rows in sentences.items()})

    set_seed(training.seed)
    settings = names_of(tags) | dropout_settings(recipe)
    if checkpoint is None:
        model = new_model(recipe, tokenizer, settings)
    else:
        model = load_model(checkpoint, "token-classification", AutoModelForTokenClassification, **settings)
    trainer = Trainer(
        model,
        training,
        data_collator=DataCollatorWithLengths(tokenizer),
        train_dataset=data["train"],
        eval_dataset=data["test"],
        processing_class=tokenizer,
        compute_metrics=partial(score_predictions, tags=tags),
        preprocess_logits_for_metrics=most_likely,
    )

    baselines = {}
    if recipe.baseline:
        stock = to_transformers(model, model.config.source_model_type or "bert")
        baselines["stock"] = (stock, DataCollatorForTokenClassification(tokenizer, return_tensors="pt"))
    train_and_report(
        ABOUT,
        recipe,
        trainer,
        AutoModelForTokenClassification.from_pretrained,
        baselines,
        settings={"dropout": model.config.hidden_dropout_prob, "max_length": recipe.max_length},
        labels=tags,
        trivial={"what": "by the most frequent tag of each token", **most_frequent_tags(data, tags)},
    )


# --- Data ------------------------------------------------------------------------------------------------------------


def load_sentences(source: str) -> DatasetDict:
    """Loads the columns `tokens` and `ner_tags`, lists of texts and of classes, without empty rows."""
    data = load_columns(source, "tokens", "ner_tags")
    for name, expected in {"tokens": "lists of texts", "ner_tags": "lists of tags such as 'B-PER'"}.items():
        found = data["train"].features[name]
        entry = getattr(found, "feature", None)
        is_of_classes = name == "ner_tags" and isinstance(entry, ClassLabel)
        if not (is_of_classes or getattr(entry, "dtype", None) in ("string", "large_string")):
            raise ValueError(f"column `{name}` must hold {expected}; got {found}")
    for rows in data.values():
        for row, (tokens, tags) in enumerate(zip(rows["tokens"], rows["ner_tags"], strict=True)):
            if len(tokens) != len(tags):
                raise ValueError(
                    f"`ner_tags` must have a tag for each of the {len(tokens)} tokens in row {row}; got {len(tags)}"
                )
    return encode_tags(data.filter(lambda row: len(row["tokens"]) > 0))


def encode_tags(data: DatasetDict) -> DatasetDict:
    """Encodes tags as classes. Tags that are texts are sorted first."""
    if isinstance(data["train"].features["ner_tags"].feature, ClassLabel):
        return data
    names = {tag for rows in data.values() for tags in rows["ner_tags"] for tag in tags}
    label = ClassLabel(names=sorted(names))
    features = Features(data["train"].features | {"ner_tags": List(label)})
    return data.map(lambda row: {"ner_tags": label.str2int(row["ner_tags"])}, features=features)


def new_tokenizer(sentences: Iterable[list[str]]) -> PreTrainedTokenizerBase:
    """A tokenizer with a token for each character that occurs at least twice."""
    counts = Counter(character for tokens in sentences for token in tokens for character in token)
    known = [character for character, count in counts.most_common() if count > 1]
    vocabulary = {token: i for i, token in enumerate([PADDING, UNKNOWN, *known])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PADDING,
        unk_token=UNKNOWN,
        model_input_names=["input_ids", "attention_mask"],
    )


def encode(rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """Splits sentences into pieces of at most `max_length` tokens. The first token of a word gets the word's tag."""

    def encoded(batch: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        pieces = tokenizer(
            batch["tokens"],
            is_split_into_words=True,
            truncation=True,
            max_length=max_length,
            return_overflowing_tokens=True,
        )
        labels = [
            spread(batch["ner_tags"][row], pieces.word_ids(piece))
            for piece, row in enumerate(pieces["overflow_to_sample_mapping"])
        ]
        return {"input_ids": pieces["input_ids"], "labels": labels}

    return rows.map(encoded, batched=True, remove_columns=rows.column_names)


def spread(tags: Sequence[int], words: Sequence[int | None]) -> list[int]:
    """Labels of tokens: the first token of a word has the word's tag, all other tokens are ignored."""
    before = [None, *words]
    return [
        IGNORED if word is None or word == previous else tags[word]
        for previous, word in zip(before, words, strict=False)
    ]


# --- Model -----------------------------------------------------------------------------------------------------------


def new_model(recipe: "RecipeArguments", tokenizer: Any, settings: dict[str, Any]) -> DynMaskForTokenClassification:
    """An encoder with random weights that BERT can represent."""
    config = DynMaskConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        num_hidden_layers=recipe.num_hidden_layers,
        num_attention_heads=max(1, recipe.hidden_size // HEAD_SIZE),
        intermediate_size=4 * recipe.hidden_size,
        max_position_embeddings=recipe.max_length,
        type_vocab_size=1,
        **special_token_ids(tokenizer),
        **settings,
    )
    return DynMaskForTokenClassification(config)


# --- Measuring -------------------------------------------------------------------------------------------------------


def most_likely(logits: Tensor, labels: Tensor) -> Tensor:
    """The most likely class of each token `(B, T)`."""
    return logits.argmax(-1)


def score_predictions(prediction: EvalPrediction, tags: list[str]) -> dict[str, float]:
    labels, predicted = np.asarray(prediction.label_ids), np.asarray(prediction.predictions)
    rows = [(row[row != IGNORED], found[row != IGNORED]) for row, found in zip(labels, predicted, strict=True)]
    return entity_scores([named(row, tags) for row, _ in rows], [named(found, tags) for _, found in rows])


def named(classes: Iterable[int], tags: list[str]) -> list[str]:
    return [tags[each] for each in classes]


def entity_scores(references: list[list[str]], predictions: list[list[str]]) -> dict[str, float]:
    """Scores of whole entities of the right type (Tjong Kim Sang and De Meulder, 2003), micro-averaged."""
    measures: dict[str, Any] = {"f1": f1_score, "precision": precision_score, "recall": recall_score}
    return {name: float(measure(references, predictions, zero_division=0)) for name, measure in measures.items()}


def most_frequent_tags(data: DatasetDict, tags: list[str]) -> dict[str, float]:
    """Scores of a tagger that gives each token its most frequent tag in `train`."""
    counts: defaultdict[int, Counter[int]] = defaultdict(Counter)
    for row in labelled(data["train"]):
        for token, label in row:
            counts[token][label] += 1
    overall = sum(counts.values(), Counter())
    rows = labelled(data["test"])
    found = [[(counts.get(token) or overall).most_common(1)[0][0] for token, _ in row] for row in rows]
    expected = [[label for _, label in row] for row in rows]
    return entity_scores([named(row, tags) for row in expected], [named(row, tags) for row in found])


def labelled(rows: Dataset) -> list[list[tuple[int, int]]]:
    """Pairs of token and label of each row, without ignored labels."""
    return [
        [(token, label) for token, label in zip(ids, labels, strict=True) if label != IGNORED]
        for ids, labels in zip(rows["input_ids"], rows["labels"], strict=True)
    ]


# --- Arguments and model card ----------------------------------------------------------------------------------------


@dataclass
class RecipeArguments(DropoutArguments):
    model: str | None = field(
        default=None, metadata={"help": "A checkpoint folder, a Hub id or a sample. None: a new BERT-like model."}
    )
    dataset: str = field(
        default="sample:names",
        metadata={"help": "A Hub id, a json or parquet file or a sample, with the columns `tokens` and `ner_tags`."},
    )
    max_length: int = field(default=512, metadata={"help": "Tokens per sentence; longer ones are split."})
    hidden_size: int = field(default=128, metadata={"help": f"Hidden size of a new model, with heads of {HEAD_SIZE}."})
    num_hidden_layers: int = field(default=3, metadata={"help": "Layers of a new model."})


DEFAULTS = {
    "output_dir": "outputs/token_classification",
    "max_steps": 2000,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 100,
    "learning_rate": 1e-3,
    "logging_steps": 100,
}
USAGE = """
import hf_dynmask  # registers the model type with transformers
from transformers import pipeline

tagger = pipeline("token-classification", model="path/to/this/folder", aggregation_strategy="simple")
tagger("新华社记者兰红光摄")
"""
LIMITS = (
    "It finds names like those in its training data, and misses or splits others. Do not rely on it to find or to "
    "redact all persons in a text."
)
ABOUT = About(
    recipe="token_classification",
    task="token-classification",
    metrics=["f1", "precision", "recall"],
    title="Named entity recognition",
    usage=USAGE,
    limits=LIMITS,
)
make_card = ABOUT.make_card

if __name__ == "__main__":
    main()
