"""Search for the paragraph that answers a question: BM25, measures, and what the recipes for it share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import bm25s
import numpy as np
import Stemmer
from datasets import Dataset
from sentence_transformers.base.evaluation import BaseEvaluator

from support.common import DropoutArguments

TOP = 10  # results that a reader looks at, in `mrr@10` and `recall@10`


@dataclass
class SearchArguments(DropoutArguments):
    """Arguments of a recipe for search."""

    model: str = field(default="sample:minilm", metadata={"help": "A checkpoint folder, a Hub id or a sample."})
    dataset: str = field(
        default="sample:squad",
        metadata={"help": "A Hub id, a csv, json or parquet file or a sample, with `question` and `context`."},
    )
    max_length: int = field(
        default=256, metadata={"help": "Tokens of what the model reads at once; longer texts are cut."}
    )


class Search:
    """
    A search for each question's own paragraph among those of all rows.

    Args:
        rows (`Dataset`): Has the columns `question` and `context`; questions may share a paragraph.
        max_questions (`int`, *optional*): Only the first ones are asked.

    Attributes:
        questions, paragraphs (`list[str]`): The questions, and each paragraph once.
        own (`np.ndarray` of shape `(Q,)`): Which of the paragraphs is a question's own.
    """

    def __init__(self, rows: Dataset, max_questions: int | None = None):
        places = {text: place for place, text in enumerate(dict.fromkeys(rows["context"]))}
        self.questions = list(rows["question"])[:max_questions]
        self.paragraphs = list(places)
        self.own = np.array([places[text] for text in rows["context"]][:max_questions])

    def bm25(self) -> np.ndarray:
        """Scores `(Q, P)` of all paragraphs by BM25, on stems of English words other than stop words."""
        words = {"stopwords": "en", "stemmer": Stemmer.Stemmer("english"), "show_progress": False}
        index = bm25s.BM25()
        index.index(bm25s.tokenize(self.paragraphs, **words), show_progress=False)
        asked: Any = bm25s.tokenize(self.questions, return_ids=False, **words)
        nothing = np.zeros(len(self.paragraphs), dtype=index.dtype)  # of a question of stop words alone
        return np.stack([index.get_scores(question) if question else nothing for question in asked])

    def measure(self, scores: np.ndarray) -> dict[str, float]:
        """
        The mean reciprocal rank of the questions' own paragraphs among the first 10, and how many of them are among the
        first 1 and 10.

        Args:
            scores (`np.ndarray` of shape `(Q, P)`):
                The higher, the earlier; `-inf` for paragraphs that were not found. Among equal scores, the own
                paragraph counts as the last.
        """
        own = np.take_along_axis(scores, self.own[:, None], 1)
        ranks = np.where(np.isneginf(own[:, 0]), np.inf, (scores >= own).sum(1))
        return {
            f"mrr@{TOP}": float(np.where(ranks <= TOP, 1 / ranks, 0).mean()),
            **{f"recall@{first}": float((ranks <= first).mean()) for first in (1, TOP)},
        }

    def measure_both(self, scores: np.ndarray, others: np.ndarray) -> dict[str, float]:
        """[`measure`] of scores, and as `hybrid_mrr@10` that of the sum of both, each standardized over what was found
        for a question in both."""
        is_found = np.isfinite(scores) & np.isfinite(others)
        both = np.where(is_found, _standardized(scores, is_found) + _standardized(others, is_found), -np.inf)
        return self.measure(scores) | {HYBRID: self.measure(both)[METRICS[0]]}


def _standardized(scores: np.ndarray, is_found: np.ndarray) -> np.ndarray:
    """Scores `(Q, P)` with mean 0 and, unless they are all equal, variance 1 for each question."""
    centred = scores - scores.mean(1, keepdims=True, where=is_found)
    return centred / np.maximum(centred.std(1, keepdims=True, where=is_found), 1e-6)


METRICS = [f"mrr@{TOP}", "recall@1", f"recall@{TOP}"]
HYBRID = f"hybrid_mrr@{TOP}"


class Evaluator(BaseEvaluator):
    """What a trainer of sentence-transformers makes of a function that takes a model and returns measures by name."""

    def __init__(self, measure: Callable[[Any], dict[str, float]]):
        super().__init__()
        self.measure = measure

    def __call__(self, model: Any, *args: Any, **kwargs: Any) -> dict[str, float]:
        return dict(self.measure(model))  # the trainer renames its entries


def token_counts(model: Any, *columns: Sequence[str]) -> list[int]:
    """Tokens that a model of sentence-transformers reads of each text or, of two columns, each pair."""
    read = model.tokenizer(*map(list, columns), truncation=True, max_length=model.max_seq_length)
    return [len(ids) for ids in read["input_ids"]]
