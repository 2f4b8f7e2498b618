"""
Fine-tunes a BERT-like checkpoint to embed questions near the paragraphs that answer them, with the trainer of
sentence-transformers. Batches are ordinary padded ones; the stock model computes only their real tokens.

    python recipes/embedding.py

uses questions of SQuAD and MiniLM. To also train the same model without this package, from the same weights:

    python recipes/embedding.py --baseline

With your own model and data, from the Hub or from disk (columns `question` and `context`, a text that answers it):

    python recipes/embedding.py --model google-bert/bert-base-uncased --dataset rajpurkar/squad_v2

The other paragraphs of a batch are the negatives of a question. For evaluation, each held-out question is searched in
all held-out paragraphs. The results are compared with those of BM25, and with those of the model before training. All
options of `SentenceTransformerTrainingArguments` apply. Results, model card and model are written to `--output_dir`.
"""

import support.threads  # noqa: F401

from functools import partial
from typing import Any

import numpy as np
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from transformers import set_seed

import hf_dynmask  # noqa: F401  # registers `attn_implementation="dynmask"` with transformers
from support.common import dropout_settings, load_texts, parse_arguments
from support.reporting import About, train_and_report
from support.retrieval import HYBRID, METRICS, Evaluator, Search, SearchArguments, token_counts
from support.samples import resolve_model


def main(arguments: list[str] | None = None) -> None:
    recipe, training = parse_arguments([SearchArguments, SentenceTransformerTrainingArguments], arguments, DEFAULTS)

    checkpoint = resolve_model(recipe.model)
    data = load_texts(recipe.dataset, "question", "context")
    search = Search(data["test"])
    found = search.bm25()

    def measure(model: Any) -> dict[str, float]:
        return search.measure_both(similarities(model, search), found)

    set_seed(training.seed)
    load = partial(load_model, recipe=recipe, device=str(training.device))
    model = load(checkpoint, "dynmask")
    trainer = SentenceTransformerTrainer(
        model,
        training,
        train_dataset=data["train"],
        loss=MultipleNegativesRankingLoss(model),
        evaluator=Evaluator(measure),
    )

    train_and_report(
        ABOUT,
        recipe,
        trainer,
        load,
        {"stock": (load(checkpoint, "sdpa"), None)} if recipe.baseline else {},
        settings={"dropout": model.config.hidden_dropout_prob, "max_length": recipe.max_length},
        rows=data,
        lengths={name: token_counts(model, data["train"][name]) for name in ("question", "context")},
        trivial={"what": "BM25", **search.measure(found)},
        untrained={"what": f"`{recipe.model}` as it is", **measure(model)},
    )


def load_model(folder: str, attn_implementation: str = "dynmask", *, recipe: SearchArguments, device: str) -> Any:
    """Loads a checkpoint. If it has no pooling, sentence-transformers adds mean pooling."""
    model = SentenceTransformer(
        folder,
        device=device,
        model_kwargs={"attn_implementation": attn_implementation},
        config_kwargs=dropout_settings(recipe),
    )
    model.max_seq_length = recipe.max_length
    return model


def similarities(model: SentenceTransformer, search: Search) -> np.ndarray:
    """The similarity `(Q, P)` of each question's embedding to each paragraph's."""
    embedded = model.encode_query(search.questions), model.encode_document(search.paragraphs)
    return np.asarray(model.similarity(*embedded))


# --- Defaults and model card -----------------------------------------------------------------------------------------

DEFAULTS = {
    "output_dir": "outputs/embedding",
    "max_steps": 24,
    "per_device_train_batch_size": 64,
    "learning_rate": 1e-4,
    "batch_sampler": "no_duplicates",  # a question's own paragraph must not be among the wrong answers
    "logging_steps": 4,
}
USAGE = """
import hf_dynmask  # registers attn_implementation="dynmask" with transformers
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("path/to/this/folder", model_kwargs={"attn_implementation": "dynmask"})
question = model.encode_query("Who wrote the play?")
texts = model.encode_document(["The play was written by Ben Jonson.", "It rained all day in London."])
model.similarity(question, texts)
"""
LIMITS = (
    "It finds texts of the kind that it was trained on. The questions were written by people who saw the paragraphs "
    "and used their words, which favours BM25. `hybrid_mrr@10` is the MRR of the sum of both scores, each standardized."
)
ABOUT = About(
    recipe="embedding",
    task="sentence-similarity",
    metrics=[*METRICS, HYBRID],
    title="Embeddings for search",
    usage=USAGE,
    limits=LIMITS,
    library="sentence-transformers",
)
make_card = ABOUT.make_card

if __name__ == "__main__":
    main()
