"""A search among paragraphs and its measures."""

import numpy as np
import pytest
from datasets import Dataset

from support.retrieval import Evaluator, Search

ROWS = {
    "question": ["who wrote plays?", "who painted?", "when did it rain?", "was it raining?"],
    "context": ["Ben wrote a play.", "Ann painted walls.", "It rained on Monday.", "It rained on Monday."],
}


@pytest.fixture
def search():
    return Search(Dataset.from_dict(ROWS))


def test_each_paragraph_once(search):
    assert search.questions == ROWS["question"]
    assert search.paragraphs == ["Ben wrote a play.", "Ann painted walls.", "It rained on Monday."]
    assert search.own.tolist() == [0, 1, 2, 2]


def test_fewer_questions_among_all_paragraphs():
    search = Search(Dataset.from_dict(ROWS), 2)
    assert (search.questions, search.own.tolist(), len(search.paragraphs)) == (ROWS["question"][:2], [0, 1], 3)
    assert search.bm25().shape == (2, 3)
    assert len(Search(Dataset.from_dict(ROWS), 9).questions) == 4


def test_bm25_finds_stems(search):
    assert search.bm25().argmax(1).tolist() == [0, 1, 2, 2]
    assert search.measure(search.bm25()) == {"mrr@10": 1, "recall@1": 1, "recall@10": 1}


def test_bm25_of_questions_without_a_known_word():
    """One has stop words alone, one other words."""
    rows = Dataset.from_dict({"question": ["is it?", "elephants?"], "context": ["Ben wrote.", "Ann painted."]})
    search = Search(rows)
    assert search.bm25().tolist() == [[0, 0], [0, 0]]
    assert search.measure(search.bm25())["mrr@10"] == 0.5  # the last of those with equal scores


def search_of(paragraphs: int, own: list[int]) -> Search:
    texts = [str(place) for place in range(paragraphs)]
    search = Search(Dataset.from_dict({"question": texts, "context": texts}))
    search.own = np.array(own)
    return search


def test_measures():
    """Ranks 1, 2, 10 and 11, and one that was not found."""
    scores = -np.arange(20.0)[None].repeat(5, 0)
    scores[4, 0] = -np.inf
    found = search_of(20, [0, 1, 9, 10, 0]).measure(scores)
    assert found == pytest.approx({"mrr@10": (1 + 1 / 2 + 1 / 10) / 5, "recall@1": 1 / 5, "recall@10": 3 / 5})


@pytest.mark.parametrize("equal, rank", [(0, 1), (1, 2), (4, 5)])
def test_equal_scores_count_against_the_own_paragraph(equal, rank):
    scores = np.zeros((1, 8))
    scores[0, : equal + 1] = 1
    assert search_of(8, [0]).measure(scores)["mrr@10"] == pytest.approx(1 / rank)


def test_few_paragraphs_of_which_the_own_was_not_found():
    scores = np.array([[-np.inf, 1.0, 0.0]])
    assert search_of(3, [0]).measure(scores) == {"mrr@10": 0, "recall@1": 0, "recall@10": 0}


def test_both_searches_together():
    """Together they find what neither finds alone, whatever the scale of the scores is."""
    scores, others = np.array([[0.8, 0.9, 0.1, 0.2]]), np.array([[800.0, 100.0, 900.0, 200.0]])
    found = search_of(4, [0]).measure_both(scores, others)
    assert found == {"mrr@10": 0.5, "recall@1": 0, "recall@10": 1, "hybrid_mrr@10": 1}


def test_both_searches_of_what_was_found():
    """What was not found has no part in mean and variance: with it, the third paragraph would win."""
    scores, others = np.array([[1.5, 1.0, 2.0, -np.inf]]), np.array([[3.0, 1.0, 1.5, 900.0]])
    found = search_of(4, [0]).measure_both(scores, others)
    assert found == {"mrr@10": 0.5, "recall@1": 0, "recall@10": 1, "hybrid_mrr@10": 1}
    assert search_of(4, [3]).measure_both(scores, others)["hybrid_mrr@10"] == 0


def test_equal_scores_have_no_part_in_the_sum():
    found = search_of(3, [1]).measure_both(np.full((1, 3), 7.0), np.array([[1.0, 3.0, 2.0]]))
    assert (found["mrr@10"], found["hybrid_mrr@10"]) == (pytest.approx(1 / 3), 1)


def test_evaluator(search):
    found = search.measure(search.bm25())
    evaluator = Evaluator(lambda model: found if model == "model" else {})
    measured = evaluator("model", output_path="out", epoch=1, steps=3)
    assert measured == found and measured is not found
