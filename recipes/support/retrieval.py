"""Search for the paragraph that answers a question: BM25, metrics, and arguments of the recipes for search."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import bm25s
import numpy as np
import Stemmer
from datasets import Dataset
from sentence_transformers.base.evaluation import BaseEvaluator

from support.common import DropoutArguments

TOP = 10  # the number of results in `mrr@10` and `recall@10`


@dataclass
class SearchArguments(DropoutArguments):
    """Arguments of a recipe for search."""

    model: str = field(default="sample:minilm", metadata={"help": "A checkpoint folder, a Hub id or a sample."})
    dataset: str = field(
        default="sample:squad",
        metadata={"help": "A Hub id, a csv, json or parquet file or a sample, with `question` and `context`."},
    )
    max_length: int = field(
        default=256, metadata={"help": "Tokens that the model reads at once; longer texts are truncated."}
    )


class Search:
    """
    A search for each question's own paragraph among those of all rows.

    Args:
        rows (`Dataset`): Has the columns `question` and `context`; questions may share a paragraph.
        max_questions (`int`, *optional*): Use only the first questions.

    Attributes:
        questions, paragraphs (`list[str]`): The questions, and each paragraph once.
        own (`np.ndarray` of shape `(Q,)`): The index of each question's own paragraph.
    """

    def __init__(self, rows: Dataset, max_questions: int | None = None):
        places = {text: place for place, text in enumerate(dict.fromkeys(rows["context"]))}
        self.questions = list(rows["question"])[:max_questions]
        self.paragraphs = list(places)
        self.own = np.array([places[text] for text in rows["context"]][:max_questions])

    def bm25(self) -> np.ndarray:
        """BM25 scores `(Q, P)` of all paragraphs, on the stems of English words without stop words."""
        words = {"stopwords": "en", "stemmer": Stemmer.Stemmer("english"), "show_progress": False}
        index = bm25s.BM25()
        index.index(bm25s.tokenize(self.paragraphs, **words), show_progress=False)
        asked: Any = bm25s.tokenize(self.questions, return_ids=False, **words)
        nothing = np.zeros(len(self.paragraphs), dtype=index.dtype)  # for a question with only stop words
        return np.stack([index.get_scores(question) if question else nothing for question in asked])

    def measure(self, scores: np.ndarray) -> dict[str, float]:
        """
        The mean reciprocal rank of the questions' own paragraphs, 0 beyond rank 10, and the shares of them that are
        among the first 1 and 10.

        Args:
            scores (`np.ndarray` of shape `(Q, P)`):
                Higher scores rank first; `-inf` means that a paragraph was not found. In a tie, the question's own
                paragraph ranks last.
        """
        own = np.take_along_axis(scores, self.own[:, None], 1)
        ranks = np.where(np.isneginf(own[:, 0]), np.inf, (scores >= own).sum(1))
        return {
            f"mrr@{TOP}": float(np.where(ranks <= TOP, 1 / ranks, 0).mean()),
            **{f"recall@{first}": float((ranks <= first).mean()) for first in (1, TOP)},
        }

    def measure_both(self, scores: np.ndarray, others: np.ndarray) -> dict[str, float]:
        """[`measure`] of `scores`, and `hybrid_mrr@10`: the MRR of the sum of `scores` and `others`, each standardized
        over the paragraphs that both have found for a question."""
        is_found = np.isfinite(scores) & np.isfinite(others)
        both = np.where(is_found, _standardized(scores, is_found) + _standardized(others, is_found), -np.inf)
        return self.measure(scores) | {HYBRID: self.measure(both)[METRICS[0]]}


def _standardized(scores: np.ndarray, is_found: np.ndarray) -> np.ndarray:
    """Scores `(Q, P)` with mean 0 and variance 1 for each question. Equal scores become 0."""
    centred = scores - scores.mean(1, keepdims=True, where=is_found)
    return centred / np.maximum(centred.std(1, keepdims=True, where=is_found), 1e-6)


METRICS = [f"mrr@{TOP}", "recall@1", f"recall@{TOP}"]
HYBRID = f"hybrid_mrr@{TOP}"


class Evaluator(BaseEvaluator):
    """An evaluator for sentence-transformers, made from a function that takes a model and returns metrics by name."""

    def __init__(self, measure: Callable[[Any], dict[str, float]]):
        super().__init__()
        self.measure = measure

    def __call__(self, model: Any, *args: Any, **kwargs: Any) -> dict[str, float]:
        return dict(self.measure(model))  # the trainer renames its entries


def token_counts(model: Any, *columns: Sequence[str]) -> list[int]:
    """The number of tokens that a model of sentence-transformers reads of each text or, with two columns, each pair."""
    encoded = model.tokenizer(*map(list, columns), truncation=True, max_length=model.max_seq_length)
    return [len(ids) for ids in encoded["input_ids"]]
