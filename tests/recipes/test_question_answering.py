"""The recipe, end to end on a tiny checkpoint, and its parts."""

import contextlib
import io
import json
import random
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from datasets import config as datasets_config
from huggingface_hub import ModelCard
from transformers import (
    AutoModelForQuestionAnswering,
    AutoTokenizer,
    BertConfig,
    BertForQuestionAnswering,
    BertModel,
    BertTokenizer,
    EvalPrediction,
)

from hf_dynmask import DynMaskForQuestionAnswering
from question_answering import Evaluation, best_span, load_questions, main, make_card, score, windows

PEOPLE = ["anna", "boris", "carla", "dan"]
PLACES = ["rome", "paris", "york"]
WORDS = [*PEOPLE, *PLACES, "lives", "in", "now", ".", "who", "where", "?"]
WINDOW = {"max_length": 16, "stride": 4}


def question(draw: random.Random) -> dict[str, Any]:
    """Where one of several people lives; about one in five is not among them."""
    people = draw.sample(PEOPLE, k=draw.randint(1, 4))
    homes = {person: draw.choice(PLACES) for person in people}
    context = " ".join(f"{person} lives in {home} now ." for person, home in homes.items())
    asked = draw.choice(people) if draw.random() < 0.8 else "who"
    answers: dict[str, list[Any]] = {"text": [], "answer_start": []}
    if asked in homes:
        lead = f"{asked} lives in "
        answers = {"text": [homes[asked]], "answer_start": [context.index(lead) + len(lead)]}
    return {"context": context, "question": f"where {asked} ?", "answers": answers}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a stock checkpoint, `model`, and questions, `questions.jsonl`."""
    folder = tmp_path_factory.mktemp("question_answering")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    BertTokenizer({word: i for i, word in enumerate(vocabulary)}).save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    BertModel(config).save_pretrained(folder / "model")
    draw = random.Random(0)
    (folder / "questions.jsonl").write_text("".join(json.dumps(question(draw)) + "\n" for _ in range(80)))
    return folder


@pytest.fixture(scope="module")
def run(folder):
    """The output folder of a run with `--baseline`, and what it printed."""
    options = {
        "model": folder / "model",
        "dataset": folder / "questions.jsonl",
        "output_dir": folder / "output",
        "model_card_dir": folder / "cards",
        "max_steps": 8,
        "learning_rate": 1e-2,
        "save_strategy": "steps",
        **WINDOW,
    }
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(datasets_config, "HF_DATASETS_CACHE", folder / "datasets-cache")
        main([*arguments, "--baseline", "--use_cpu"])
    return folder / "output", printed.getvalue()


@pytest.fixture(scope="module")
def results(run):
    return json.loads((run[0] / "results.json").read_text())


@pytest.fixture
def questions(folder, monkeypatch):
    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", folder / "datasets-cache")
    return load_questions(str(folder / "questions.jsonl"))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder / "model")


# --- the run ---------------------------------------------------------------------------------------------------------


def test_saved_model_has_the_scores(run, results, questions, tokenizer):
    """Computed here from the saved files alone, window by window, with padding and an attention mask."""
    model = AutoModelForQuestionAnswering.from_pretrained(run[0])
    assert isinstance(model, DynMaskForQuestionAnswering)
    rows = questions["test"]
    parts = windows(rows, tokenizer, **WINDOW)
    columns = ["input_ids", "token_type_ids"]
    batch = tokenizer.pad(parts.select_columns(columns).to_list(), padding="max_length", max_length=20)
    logits = model(**{name: torch.tensor(values) for name, values in batch.items()})
    evaluation = Evaluation(parts, list(rows["context"]), [answers["text"] for answers in rows["answers"]])
    answers = evaluation.answers(logits.start_logits.detach().numpy(), logits.end_logits.detach().numpy())
    scores = score(answers, evaluation.references)
    assert {name: results["runs"]["dynmask"][name] for name in scores} == pytest.approx(scores)


def test_the_baseline_is_the_stock_model(run, results):
    stock = AutoModelForQuestionAnswering.from_pretrained(run[0] / "stock" / "checkpoint-8")
    assert isinstance(stock, BertForQuestionAnswering)
    assert results["runs"]["stock"]["train_tokens"] == results["runs"]["dynmask"]["train_tokens"] > 0


def test_what_the_results_tell(results, folder, questions):
    assert list(results["runs"]) == ["dynmask", "stock"]
    assert results["dataset"] == {"name": str(folder / "questions.jsonl"), "rows": {"train": 72, "test": 8}}
    unanswerable = sum(not answers["text"] for answers in questions["test"]["answers"])
    assert results["trivial"]["f1"] == results["trivial"]["exact_match"] == 100 * unanswerable / 8
    assert results["training"]["stride"] == 4
    assert 0 < results["padding_share"] < 0.5


def test_model_card_is_the_results(run, results, folder):
    output, printed = run
    card = ModelCard.load(output / "README.md")
    assert str(card) == str(make_card(results))
    metadata: Any = card.data
    assert metadata.pipeline_tag == "question-answering"
    lines = [line for line in printed.splitlines() if line.startswith(("|", "Padding", "Without", "Speed-up"))]
    assert len(lines) == 7
    assert all(line in str(card) for line in lines)
    assert (folder / "cards" / "question_answering.md").read_text() == (output / "README.md").read_text()


# --- windows ---------------------------------------------------------------------------------------------------------


def test_windows_hold_the_answers(questions, tokenizer):
    """Each is as long as it is, neighbours share tokens, and the first answer is where the positions say."""
    rows = questions["train"]
    parts = windows(rows, tokenizer, **WINDOW).to_list()
    assert {len(part["input_ids"]) for part in parts} == {12, 16}
    seen = {row: 0 for row in range(len(rows))}
    for part in parts:
        answers, context = rows[part["row"]]["answers"], rows[part["row"]]["context"]
        first, last = part["start_positions"], part["end_positions"]
        places = [tuple(place) for place in part["offsets"] if place[0] >= 0]
        if (first, last) == (0, 0):
            continue
        assert context[part["offsets"][first][0] : part["offsets"][last][1]] == answers["text"][0]
        assert part["offsets"][first][0] == answers["answer_start"][0] and len(places) <= 16
        seen[part["row"]] += 1
    assert all((seen[row] > 0) == bool(rows[row]["answers"]["text"]) for row in seen)


def test_windows_overlap(tokenizer):
    context = " ".join(["anna", "lives", "in", "rome", "now", "."] * 2)
    rows = Dataset.from_dict({"context": [context], "question": ["where ?"], "answers": [{"text": []}]})
    parts = windows(rows, tokenizer, max_length=13, stride=5).to_list()
    first, second, third = ([place for place in part["offsets"] if place[0] >= 0] for part in parts)
    assert (len(first), len(second), len(third)) == (8, 8, 6)
    assert first[-5:] == second[:5] and second[-5:] == third[:5] and third[-1][1] == len(context)
    assert all(part["start_positions"] == part["end_positions"] == 0 for part in parts)


def test_window_is_too_short(questions, tokenizer):
    message = "`max_length` must leave more than stride=4 tokens for the context; got 4 beside the question in row 0"
    with pytest.raises(ValueError, match=message):
        windows(questions["train"], tokenizer, max_length=10, stride=4)


# --- answers ---------------------------------------------------------------------------------------------------------


def test_best_span():
    """Of the context, forwards, not too long; logits of padding do not count."""
    offsets = np.array([(-1, -1), (-1, -1), (0, 1), (1, 2), (2, 3)])
    starts, ends = np.array([9.0, 9, 1, 2, 4, 50]), np.array([9.0, 9, 1, 3, 0, 50])
    assert best_span(offsets, starts, ends) == (5, 3, 3)
    long = np.array([(i, i + 1) for i in range(40)])
    ends = np.arange(40.0)
    starts = np.where(np.arange(40) == 0, 5.0, 0.0)
    assert best_span(long, starts, ends) == (39, 10, 39)
    assert best_span(long, 3 * starts, ends) == (44, 0, 29)


def test_answer_is_the_best_of_all_windows():
    parts = {"row": [0, 0, 1], "offsets": [[(-1, -1), (0, 3)], [(-1, -1), (4, 7)], [(-1, -1), (0, 3)]]}
    evaluation = Evaluation(Dataset.from_dict(parts), ["one two", "six"], [["two"], []])
    logits: Any = np.array([[3.0, 1.0], [1.0, 2.0], [1.0, 0.0]])
    predictions: Any = (logits, logits)
    assert evaluation.answers(*predictions) == ["two", ""]
    assert evaluation(EvalPrediction(predictions, np.zeros(0))) == {"f1": 100, "exact_match": 100}


@pytest.mark.parametrize(
    "answer, references, exact_match, f1",
    [
        ("The  Ben Jonson!", ["Ben Jonson"], 100, 100),
        ("Ben Jonson", ["William", "ben"], 0, 200 / 3),
        ("a play play", ["play"], 0, 200 / 3),
        ("", ["play"], 0, 0),
        ("", [], 100, 100),
        ("play", [], 0, 0),
        ("the", [], 100, 100),
        ("", ["the", "play"], 0, 0),
    ],
)
def test_scores(answer, references, exact_match, f1):
    assert score([answer], [references]) == pytest.approx({"exact_match": exact_match, "f1": f1})


# --- data ------------------------------------------------------------------------------------------------------------

ROW = {"context": "in rome", "question": "where ?", "answers": {"text": ["rome"], "answer_start": [3]}}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"context": 3}, "column `context` must hold texts; got int64"),
        ({"answers": "rome"}, r"column `answers` must hold lists `text` and `answer_start`; got Value\('string'\)"),
        ({"answers": {"text": ["rome"], "answer_start": [0]}}, "'rome' must be in its context at 0; got 'in r' in row"),
    ],
)
def test_bad_data(tmp_path, monkeypatch, change, message):
    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", tmp_path / "cache")
    file = tmp_path / "questions.jsonl"
    file.write_text(f"{json.dumps(ROW | change)}\n" * 2)
    with pytest.raises(ValueError, match=message):
        load_questions(str(file))


def test_column_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "questions.jsonl").write_text(f"{json.dumps({'context': 'a', 'question': 'b'})}\n" * 2)
    with pytest.raises(ValueError, match="columns `context` and `question` and `answers`; got context, question"):
        load_questions(str(tmp_path / "questions.jsonl"))
