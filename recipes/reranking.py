"""
Fine-tunes a BERT-like checkpoint to rerank the top results of BM25, with the trainer of sentence-transformers. Batches
are ordinary padded ones; the stock model computes only their real tokens.

    python recipes/reranking.py

uses questions of SQuAD and MiniLM. To also train the same model without this package, from the same weights:

    python recipes/reranking.py --baseline

With your own model and data, from the Hub or from disk (columns `question` and `context`, a text that answers it):

    python recipes/reranking.py --model google-bert/bert-base-uncased --dataset rajpurkar/squad_v2

The cross-encoder reads a question and a paragraph as one text. It is trained on each question with its own paragraph
and with other paragraphs that BM25 finds. On held-out questions and paragraphs, it is compared with the order of BM25.
All options of `CrossEncoderTrainingArguments` apply. Results, model card and model are written to `--output_dir`.
"""

import support.threads  # noqa: F401

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from datasets import Dataset
from sentence_transformers import CrossEncoder, CrossEncoderTrainer, CrossEncoderTrainingArguments
from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss
from torch import nn
from transformers import TrainingArguments, set_seed

import hf_dynmask  # noqa: F401  # registers `attn_implementation="dynmask"` with transformers
from support.common import dropout_settings, load_texts, parse_arguments
from support.reporting import About, train_and_report
from support.retrieval import HYBRID, METRICS, TOP, Evaluator, Search, SearchArguments, token_counts
from support.samples import resolve_model


def main(arguments: list[str] | None = None) -> None:
    recipe, training = parse_arguments([RecipeArguments, CrossEncoderTrainingArguments], arguments, DEFAULTS)

    checkpoint = resolve_model(recipe.model)
    data = load_texts(recipe.dataset, "question", "context")
    search = Search(data["test"], recipe.eval_rows)
    found = search.bm25()
    pairs = pairs_of(Search(data["train"]), recipe.negatives, training.seed)

    load = partial(load_model, recipe=recipe, training=training)
    model = load(checkpoint, "dynmask")
    trainer = CrossEncoderTrainer(
        model,
        training,
        train_dataset=pairs,
        loss=BinaryCrossEntropyLoss(model),
        evaluator=Evaluator(lambda model: search.measure_both(reranked(model, search, found), found)),
    )

    train_and_report(
        ABOUT,
        recipe,
        trainer,
        load,
        {"stock": (load(checkpoint, "sdpa"), None)} if recipe.baseline else {},
        settings={
            "dropout": model.config.hidden_dropout_prob,
            "max_length": recipe.max_length,
            "negatives": recipe.negatives,
        },
        rows={"train": data["train"], "test": search.questions},
        lengths={"question and context": token_counts(model, pairs["question"], pairs["context"])},
        trivial={"what": "the order of BM25", **search.measure_both(found, found)},
    )


def load_model(
    folder: str, attn_implementation: str = "dynmask", *, recipe: "RecipeArguments", training: TrainingArguments
) -> Any:
    """Loads a checkpoint. If it has no head, it gets the same random head each time."""
    set_seed(training.seed)
    return CrossEncoder(
        folder,
        num_labels=1,
        max_length=recipe.max_length,
        device=str(training.device),
        model_kwargs={"attn_implementation": attn_implementation},
        config_kwargs=dropout_settings(recipe),
    )


def pairs_of(search: Search, negatives: int, seed: int) -> Dataset:
    """
    Training pairs of questions and paragraphs.

    Args:
        search ([`Search`]): The questions and paragraphs.
        negatives (`int`): Wrong paragraphs per question, drawn from the `TOP` best results of BM25.
        seed (`int`): Seed of the draws.

    Returns:
        `Dataset`: The columns `question`, `context`, and `label`: 1 for the question's own paragraph, else 0.
    """
    draw = np.random.default_rng(seed)
    rows = []
    for question, own, scores in zip(search.questions, search.own, search.bm25(), strict=True):
        wrong = [place for place in best(scores) if place != own]
        for place in [own, *draw.choice(wrong, min(negatives, len(wrong)), replace=False)]:
            rows.append({"question": question, "context": search.paragraphs[place], "label": float(place == own)})
    return Dataset.from_list(rows)


def best(scores: np.ndarray) -> np.ndarray:
    """The indices of the `TOP` highest scores, of scores `(..., P)`."""
    return np.argsort(-scores, axis=-1, kind="stable")[..., :TOP]


def reranked(model: CrossEncoder, search: Search, found: np.ndarray) -> np.ndarray:
    """The model's scores `(Q, P)` for the `TOP` paragraphs with the highest scores `found`; `-inf` for all others."""
    places = best(found)
    pairs = [
        (question, search.paragraphs[place])
        for question, row in zip(search.questions, places, strict=True)
        for place in row
    ]
    predicted = model.predict(pairs, activation_fn=nn.Identity())  # a sigmoid would round high scores to ties
    scores = np.full_like(found, -np.inf)
    np.put_along_axis(scores, places, predicted.reshape(places.shape), axis=1)
    return scores


# --- Arguments and model card ----------------------------------------------------------------------------------------


@dataclass
class RecipeArguments(SearchArguments):
    negatives: int = field(default=1, metadata={"help": "Wrong paragraphs per question in training."})
    eval_rows: int = field(default=150, metadata={"help": "Maximum number of questions for evaluation."})


DEFAULTS = {
    "output_dir": "outputs/reranking",
    "max_steps": 120,
    "per_device_train_batch_size": 16,
    "learning_rate": 2e-4,
    "logging_steps": 10,
}
USAGE = """
import hf_dynmask  # registers attn_implementation="dynmask" with transformers
from sentence_transformers import CrossEncoder

model = CrossEncoder("path/to/this/folder", model_kwargs={"attn_implementation": "dynmask"})
model.rank("Who wrote the play?", ["The play was written by Ben Jonson.", "It rained all day in London."])
"""
LIMITS = (
    "It reranks texts that a search has found, and cannot find texts that the search has missed. `hybrid_mrr@10` is "
    "the MRR of the sum of its scores and those of BM25, each standardized."
)
ABOUT = About(
    recipe="reranking",
    task="text-ranking",
    metrics=[HYBRID, *METRICS],
    title="Reranking search results",
    usage=USAGE,
    limits=LIMITS,
    library="sentence-transformers",
)
make_card = ABOUT.make_card

if __name__ == "__main__":
    main()
