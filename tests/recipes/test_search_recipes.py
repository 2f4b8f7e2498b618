"""Embedding and reranking, end to end on a tiny checkpoint, and their parts."""

import contextlib
import importlib
import io
import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import config as datasets_config
from huggingface_hub import ModelCard
from sentence_transformers import CrossEncoder, SentenceTransformer
from transformers import BertConfig, BertModel, BertTokenizer

from embedding import similarities
from reranking import pairs_of, reranked
from support.common import load_texts
from support.retrieval import Search

NAMES = [f"{first}{second}" for first in "bdfgklmnprst" for second in ("ana", "elo", "iru")]
WORDS = [*NAMES, "lives", "in", "now", ".", "where", "does", "live", "?"]
CLASSES = {"embedding": SentenceTransformer, "reranking": CrossEncoder}
DYNMASK: Any = {"attn_implementation": "dynmask"}


def write_examples(folder: Path) -> None:
    """A stock checkpoint, `model`, and questions, `questions.jsonl`, each with a paragraph of 1 to 6 sentences."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    BertTokenizer({word: i for i, word in enumerate(vocabulary)}).save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    BertModel(config).save_pretrained(folder / "model")
    draw = random.Random(0)
    with (folder / "questions.jsonl").open("w") as file:
        for _ in range(60):
            people = draw.sample(NAMES, k=draw.randint(1, 6))
            context = " ".join(f"{name} lives in {draw.choice(NAMES)} now ." for name in people)
            for name in people[:2]:
                file.write(json.dumps({"question": f"where does {name} live ?", "context": context}) + "\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("search")
    write_examples(folder)
    return folder


@pytest.fixture(scope="module", params=CLASSES)
def run(request, folder):
    """A run of a recipe with `--baseline`: its module, output folder, results, and what it printed."""
    name = request.param
    options = {
        "model": folder / "model",
        "dataset": folder / "questions.jsonl",
        "output_dir": folder / name,
        "model_card_dir": folder / "cards",
        "max_steps": 6,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "max_length": 20,
        "logging_steps": 1,
        "save_strategy": "steps",
    }
    arguments = [text for option, value in options.items() for text in (f"--{option}", str(value))]
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(datasets_config, "HF_DATASETS_CACHE", folder / "datasets-cache")
        importlib.import_module(name).main([*arguments, "--baseline", "--use_cpu"])
    results = json.loads((folder / name / "results.json").read_text())
    return SimpleNamespace(
        name=name,
        recipe=importlib.import_module(name),
        output=folder / name,
        results=results,
        printed=printed.getvalue(),
    )


@pytest.fixture
def data(folder, monkeypatch):
    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", folder / "datasets-cache")
    return load_texts(str(folder / "questions.jsonl"), "question", "context")


def measured(name: str, model: Any, search: Search) -> dict[str, float]:
    found = search.bm25()
    scores = reranked(model, search, found) if name == "reranking" else similarities(model, search)
    return search.measure_both(scores, found)


# --- the run ---------------------------------------------------------------------------------------------------------


def test_saved_model_has_the_scores(run, data):
    """By the stock model, loaded from the saved files alone."""
    model = CLASSES[run.name](str(run.output), device="cpu", model_kwargs={"attn_implementation": "sdpa"})
    found = measured(run.name, model, Search(data["test"]))
    assert {name: run.results["runs"]["dynmask"][name] for name in found} == pytest.approx(found)


def test_both_trainings_follow_one_course(run):
    losses = []
    for folder in (run.output, run.output / "stock"):
        history = json.loads((folder / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]
        losses.append([entry["loss"] for entry in history if "loss" in entry])
    assert len(losses[0]) == 6
    assert losses[0] == pytest.approx(losses[1], abs=2e-4)
    ours, stock = run.results["runs"]["dynmask"], run.results["runs"]["stock"]
    assert ours["train_tokens"] == stock["train_tokens"] > 0


def test_what_the_results_tell(run, data):
    results = run.results
    assert list(results["runs"]) == ["dynmask", "stock"]
    assert results["dataset"]["rows"] == {name: len(rows) for name, rows in data.items()}
    assert results["masks"] == {"attention": "full"}
    lengths = results["lengths"]
    assert max(each["quartiles"][-1] for each in lengths.values()) == 20
    assert list(lengths) == (["question", "context"] if run.name == "embedding" else ["question and context"])
    assert 0 < results["padding_share"] < 0.6
    search = Search(data["test"])
    assert results["trivial"]["mrr@10"] == search.measure(search.bm25())["mrr@10"] > 0.1
    assert ("untrained" in results) == (run.name == "embedding")


def test_references_of_the_untrained_model(run, data, folder):
    if run.name == "reranking":
        return
    model = SentenceTransformer(str(folder / "model"), device="cpu")
    model.max_seq_length = 20
    found = measured(run.name, model, Search(data["test"]))
    assert {name: run.results["untrained"][name] for name in found} == pytest.approx(found)


def test_model_card_is_the_results(run, folder):
    card = ModelCard.load(run.output / "README.md")
    assert str(card) == str(run.recipe.make_card(run.results))
    metadata: Any = card.data
    assert metadata.library_name == "sentence-transformers"
    lines = [line for line in run.printed.splitlines() if line.startswith(("|", "Padding", "Without", "Speed-up"))]
    assert len(lines) == 7 + 2 * ("untrained" in run.results)
    assert all(line in str(card) for line in lines)
    assert (folder / "cards" / f"{run.name}.md").read_text() == (run.output / "README.md").read_text()


def test_usage(run, capsys):
    """The code in the card."""
    exec(run.recipe.USAGE.replace("path/to/this/folder", str(run.output)), {})


# --- reranking -------------------------------------------------------------------------------------------------------


def test_pairs_to_learn_from(data):
    search = Search(data["train"])
    pairs = pairs_of(search, negatives=3, seed=0)
    rows = pairs.to_list()
    assert len(rows) == 4 * len(search.questions)
    found = search.bm25()
    for number, question in enumerate(search.questions):
        group = rows[4 * number : 4 * number + 4]
        assert {row["question"] for row in group} == {question}
        assert [row["label"] for row in group] == [1, 0, 0, 0]
        own, *wrong = (search.paragraphs.index(row["context"]) for row in group)
        assert own == search.own[number] and len({own, *wrong}) == 4
        assert all((found[number] > found[number, place]).sum() < 10 for place in wrong)
    assert pairs_of(search, negatives=3, seed=0).to_list() == rows
    assert pairs_of(search, negatives=3, seed=1).to_list() != rows


def test_more_negatives_than_there_are(data):
    search = Search(data["train"].select(range(6)))
    number = len(search.paragraphs)
    assert 2 < number < 10
    assert len(pairs_of(search, negatives=20, seed=0)) == 6 * number


def test_only_what_was_found_is_sorted(data):
    class Reader:
        def predict(self, pairs, **settings):
            return np.array([len(context) for _, context in pairs], dtype=np.float32)

    search = Search(data["train"], 5)
    found = search.bm25()
    reader: Any = Reader()
    scores = reranked(reader, search, found)
    assert scores.shape == found.shape == (5, len(search.paragraphs))
    assert np.isfinite(scores).sum(1).tolist() == [10] * 5
    for row, column in zip(*np.nonzero(np.isfinite(scores)), strict=True):
        assert scores[row, column] == len(search.paragraphs[column])
        assert (found[row] > found[row, column]).sum() < 10


# --- data ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLASSES)
def test_column_is_missing(name, tmp_path, folder, monkeypatch):
    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "questions.jsonl").write_text(f"{json.dumps({'question': 'a', 'text': 'b'})}\n" * 2)
    options = ["--model", str(folder / "model"), "--dataset", str(tmp_path / "questions.jsonl")]
    with pytest.raises(ValueError, match="columns `question` and `context`; got question, text"):
        importlib.import_module(name).main([*options, "--output_dir", str(tmp_path), "--use_cpu"])
