"""Translation and summarization, end to end on tiny data, and their parts."""

import contextlib
import io
import json
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from datasets import config as datasets_config
from huggingface_hub import ModelCard
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, BartForConditionalGeneration, EvalPrediction

import summarization
import translation
from hf_dynmask import DynMaskForConditionalGeneration
from support.common import load_texts
from support.measuring import padding_share
from support.samples import DATASETS, resolve_dataset
from support.seq2seq import Evaluation, train_tokenizer

RECIPES: dict[str, Any] = {"translation": translation, "summarization": summarization}
COLUMNS = {"translation": ("source", "target"), "summarization": ("text", "summary")}
WORDS = ["red", "green", "house", "tree", "river", "small", "old", "the"]
USUAL = "ja, das ist es"  # most targets: what a model learns first


@pytest.fixture(scope="module", params=RECIPES)
def run(request, tmp_path_factory):
    """The recipe, the folder of a run with `--baseline` and what it printed."""
    recipe, folder = RECIPES[request.param], tmp_path_factory.mktemp(request.param)
    source, target = COLUMNS[request.param]
    draw = random.Random(0)
    rows = [
        {
            source: " ".join(draw.choices(WORDS, k=draw.randint(1, 9))),
            target: USUAL if draw.random() < 0.7 else " ".join(draw.choices("xyz", k=3)),
        }
        for _ in range(100)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {
        "dataset": folder / "pairs.jsonl",
        "output_dir": folder / "output",
        "model_card_dir": folder / "cards",
        "vocab_size": 300,
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "max_source_tokens": 12,
        "max_target_tokens": 10,
        "dropout": 0,
        "num_train_epochs": 4,
        "per_device_train_batch_size": 10,
        "save_strategy": "epoch",
    }
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(datasets_config, "HF_DATASETS_CACHE", folder / "datasets-cache")
        recipe.main([*arguments, "--baseline", "--use_cpu"])
        splits = resolve_dataset(str(folder / "pairs.jsonl"))
    results = json.loads((folder / "output/results.json").read_text())
    return SimpleNamespace(
        about=recipe.ABOUT,
        score=recipe.score,
        columns=(source, target),
        folder=folder,
        output=folder / "output",
        printed=printed.getvalue(),
        results=results,
        splits=splits,
    )


# --- the runs --------------------------------------------------------------------------------------------------------


def test_saved_model_has_the_quality(run):
    """Computed here from the saved files alone, on padded rows with an attention mask."""
    model = AutoModelForSeq2SeqLM.from_pretrained(run.output)
    tokenizer = AutoTokenizer.from_pretrained(run.output)
    assert isinstance(model, DynMaskForConditionalGeneration)
    sources = list(run.splits["test"][run.columns[0]])
    batch = tokenizer(sources, padding=True, truncation=True, max_length=12, return_tensors="pt")
    answers = tokenizer.batch_decode(model.generate(**batch), skip_special_tokens=True)
    found = run.score([answer.strip() for answer in answers], list(run.splits["test"][run.columns[1]]))
    assert found == pytest.approx({name: run.results["runs"]["dynmask"][name] for name in found})


def test_baseline_follows_the_same_course(run):
    """Same weights to start from, same batches: after four epochs the two models still say the same."""
    model = AutoModelForSeq2SeqLM.from_pretrained(run.output)
    (checkpoint,) = (run.output / "stock").glob("checkpoint-36")
    stock = AutoModelForSeq2SeqLM.from_pretrained(checkpoint)
    assert isinstance(stock, BartForConditionalGeneration)
    batch = AutoTokenizer.from_pretrained(run.output)(["the old house", "tree"], padding=True, return_tensors="pt")
    labels = torch.tensor([[5, 6, 7], [8, 9, 10]])
    found, expected = (candidate.eval()(**batch, labels=labels).logits for candidate in (model, stock))
    torch.testing.assert_close(found, expected, atol=1e-2, rtol=0)
    assert expected.std() > 0.1


def test_real_tokens_of_both_sides_are_counted(run):
    tokenizer = AutoTokenizer.from_pretrained(run.output)
    tokens = 0
    for column, limit in ((run.columns[0], 12), (run.columns[1], 10)):
        encoded = tokenizer(list(run.splits["train"][column]), truncation=True, max_length=limit)
        tokens += sum(map(len, encoded["input_ids"]))
    for figures in run.results["runs"].values():
        assert figures["train_tokens"] == 4 * tokens
        assert figures["tokens_per_second"] == pytest.approx(4 * tokens / figures["train_seconds"])
    assert 0.05 < run.results["padding_share"] < 0.6


def test_what_the_results_tell(run):
    assert list(run.results["runs"]) == ["dynmask", "stock"]
    assert run.results["dataset"]["rows"] == {"train": 90, "test": 10}
    assert run.results["training"]["num_train_epochs"] == 4
    assert run.results["masks"] == {"encoder": "full", "decoder": "causal", "cross-attention": "full"}
    sums = [90 * lengths["mean"] for lengths in run.results["lengths"].values()]
    assert run.results["runs"]["dynmask"]["train_tokens"] == 4 * round(sum(sums))
    trivial, metric = run.results["trivial"], run.about.metrics[0]
    assert 0 <= trivial[metric] < run.results["runs"]["dynmask"][metric] <= 100


def test_model_card_is_the_results(run):
    card = ModelCard.load(run.output / "README.md")
    assert str(card) == str(run.about.make_card(run.results))
    metadata: Any = card.data
    assert metadata.pipeline_tag == run.about.task
    for name, written in {"json": "results.json", "md": "README.md"}.items():
        assert (run.folder / "cards" / f"{run.about.recipe}.{name}").read_text() == (run.output / written).read_text()


def test_printed_summary_states_the_margin(run):
    metric = run.about.metrics[0]
    margin = run.results["runs"]["dynmask"][metric] - run.results["trivial"][metric]
    assert f"The trained model differs by {margin:+.3f}." in run.printed
    lines = [line for line in run.printed.splitlines() if line.startswith(("|", "Padding", "Without", "Speed-up"))]
    assert len(lines) == 7
    assert all(line in (run.output / "README.md").read_text() for line in lines)


# --- their parts -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([{"source": "the old house", "target": "la casa vieja"}] * 3, vocab_size=270)


def test_tokenizer_keeps_every_text(tokenizer):
    texts = ["the old house", "¿Dónde está?", "  two  spaces ", "日本 🙂", ""]
    encoded = tokenizer(texts)["input_ids"]
    assert all(ids[-1] == tokenizer.eos_token_id and tokenizer.pad_token_id not in ids for ids in encoded)
    decoded = tokenizer.batch_decode(encoded, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert [text.removeprefix(" ") for text in decoded] == [text.removeprefix(" ") for text in texts]
    assert len(tokenizer) == 270


def test_answers_are_scored_without_padding(tokenizer):
    """Rows that the trainer filled up with -100, against references that are longer than any label."""
    answers = ["la casa", "la casa vieja del río"]
    ids = [[tokenizer.bos_token_id, *tokenizer(answer)["input_ids"]] for answer in answers]
    predictions = np.full((2, max(map(len, ids)) + 2), -100)
    for row, answer in zip(predictions, ids, strict=True):
        row[: len(answer)] = answer
    evaluation = Evaluation(translation.score, tokenizer, answers)
    assert evaluation(EvalPrediction(predictions, np.zeros((2, 1)))) == pytest.approx({"chrf": 100, "bleu": 100})


def test_scores():
    assert translation.score(["abc"], ["xyz"]) == {"chrf": 0, "bleu": 0}
    found = summarization.score(["a b c", "x"], ["a b d", "y"])
    assert found == pytest.approx({"rouge1": 100 / 3, "rouge2": 25, "rougeL": 100 / 3})


def test_trivial_answers():
    train, test = (Dataset.from_dict({"source": [name], "summary": [name]}) for name in ("train", "test"))
    texts = DatasetDict({"train": train, "test": test})
    assert summarization.summaries_of_others(texts) == ["train"]


def test_padding_share_of_both_sides():
    batch = {
        "input_ids": torch.zeros(2, 3),
        "lengths": torch.tensor([3, 1]),
        "labels": torch.zeros(2, 5),
        "decoder_lengths": torch.tensor([5, 4]),
    }
    assert padding_share([batch]) == 3 / 16


@pytest.mark.parametrize(
    "row, message",
    [
        ({"source": "a", "text": "b"}, "must have the columns `source` and `target`; got source, text"),
        ({"source": "a", "target": 3}, "column `target` must hold texts; got int64"),
    ],
)
def test_bad_data(tmp_path, monkeypatch, row, message):
    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", tmp_path / "cache")
    file = tmp_path / "data.jsonl"
    file.write_text(f"{json.dumps(row)}\n" * 2)
    with pytest.raises(ValueError, match=message):
        load_texts(str(file), "source", "target")


# --- samples ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, columns, rows",
    [("sentences", ["source", "target"], (30_000, 500)), ("news", ["text", "summary"], (9_498, 500))],
)
def test_samples(name, columns, rows):
    data = resolve_dataset(f"sample:{name}")
    assert (len(data["train"]), len(data["test"])) == rows
    assert data["train"].column_names == data["test"].column_names == columns
    assert all(text.strip() for split in data.values() for column in columns for text in split[column])
    assert not set(data["train"][columns[0]]) & set(data["test"][columns[0]])
    assert DATASETS[name].licence
