"""The recipe, end to end on tiny models, and its statistics."""

import contextlib
import io
import json
import random

import numpy as np
import pytest
from datasets import config as datasets_config
from huggingface_hub import ModelCard
from scipy.stats import ttest_rel
from transformers import TrainingArguments

import static_vs_dynamic
from static_vs_dynamic import UNTRAINED, main, make_card
from support.variants import difference, finding, measure, summarize

FIGURE = "static_vs_dynamic.png"
WORDS = ["a", "the", "film", "plot", "was", "is", "not", "very", "good", "bad", "dull", "great"]
SIZES = {
    "num_seeds": 2,
    "hidden_size": 16,
    "num_layers": 1,
    "vocab_size": 300,
    "max_length": 32,
    "target_rows": 32,
    "target_epochs": 3,
    "document_length": 100,
    "num_train_epochs": 2,
    "per_device_train_batch_size": 8,
    "learning_rate": 1e-2,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with reviews, `reviews.csv`, and documents that are longer than the first windows, `documents.csv`."""
    folder = tmp_path_factory.mktemp("static_vs_dynamic")
    draw = random.Random(0)

    def text(most: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(2, most)))

    reviews = [f"{review},{'yes' if 'good' in review else 'no'}" for review in (text(20) for _ in range(200))]
    (folder / "reviews.csv").write_text("\n".join(["text,label", *reviews]) + "\n")
    (folder / "documents.csv").write_text("\n".join(["text", *(text(100) for _ in range(40))]) + "\n")
    return folder


def arguments(folder, **options) -> list[str]:
    sources = {"dataset": folder / "reviews.csv", "documents": folder / "documents.csv"}
    options = {**sources, "output_dir": folder / "output", **SIZES, **options}
    return [text for name, value in options.items() for text in (f"--{name}", str(value))] + ["--use_cpu"]


@pytest.fixture(scope="module")
def run(folder):
    """The output folder of a run, and what it printed."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(datasets_config, "HF_DATASETS_CACHE", folder / "datasets-cache")
        main(arguments(folder, model_card_dir=folder / "cards"))
    return folder / "output", printed.getvalue()


@pytest.fixture(scope="module")
def results(run):
    return json.loads((run[0] / "results.json").read_text())


# --- the run ---------------------------------------------------------------------------------------------------------


def test_padding_changes_no_accuracy(results):
    fixed, longest, lengths = (run["accuracy"] for run in results["parts"]["padding"]["runs"].values())
    assert fixed == longest == lengths
    assert len(set(fixed)) == SIZES["num_seeds"]  # each seed has a course of its own


def test_targets_are_drawn_as_often_as_said(results):
    """Up to the tenth epoch, ten drawings are one for each epoch."""
    _, once, ten_times, each_epoch = (run["held-out loss"] for run in results["parts"]["targets"]["runs"].values())
    assert ten_times == each_epoch
    assert all(a != b for a, b in zip(once, each_epoch, strict=True))


def test_mask_follows_the_schedule(results):
    frequencies, fixed, widening = (run["perplexity"] for run in results["parts"]["masks"]["runs"].values())
    assert all(a != pytest.approx(b, rel=1e-6) for a, b in zip(fixed, widening, strict=True))
    assert all(1 < perplexity < SIZES["vocab_size"] for perplexity in frequencies + fixed + widening)


def test_card_figure_and_table_are_the_results(run, results, folder):
    output, printed = run
    card = str(ModelCard.load(output / "README.md"))
    assert card == str(make_card(results))
    assert printed[printed.index("### Padding") :].strip() in card and f"]({FIGURE})" in card
    for part in results["parts"].values():
        for values in (found["seconds"] for name, found in part["runs"].items() if name != UNTRAINED):
            assert f"| {np.mean(values):.1f} ± {np.std(values, ddof=1):.1f} " in printed
    assert str(folder) not in card.replace(str(folder / "reviews.csv"), "").replace(str(folder / "documents.csv"), "")
    cards = {"static_vs_dynamic.json": "results.json", "static_vs_dynamic.md": "README.md", FIGURE: FIGURE}
    for copy, original in cards.items():
        assert (folder / "cards" / copy).read_bytes() == (output / original).read_bytes()
    picture = (output / FIGURE).read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) < 100_000


def test_one_part(folder, tmp_path, monkeypatch):
    def variants(recipe):
        return {name: lambda training: {"perplexity": float(training.seed)} for name in ("fixed", "widening")}

    monkeypatch.setitem(static_vs_dynamic.VARIANTS, "masks", variants)
    main(arguments(folder, parts="masks", output_dir=tmp_path, seed=7))
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["parts"]) == ["masks"]
    assert results["parts"]["masks"]["runs"] == {name: {"perplexity": [7, 8]} for name in ("fixed", "widening")}
    assert results["datasets"] == [{"name": str(folder / "documents.csv")}]
    assert "### Padding" not in (tmp_path / "README.md").read_text()


# --- its parts -------------------------------------------------------------------------------------------------------


def test_measure_takes_the_variants_in_turns(tmp_path):
    turns = []

    def variant(name: str):
        def train(training) -> dict[str, float]:
            turns.append((name, training.seed))
            return {"seconds": float(len(turns))}

        return train

    training = TrainingArguments(str(tmp_path), seed=0, use_cpu=True)
    runs = measure({name: variant(name) for name in "ab"}, training, [3, 4])
    assert turns == [("a", 3), ("b", 3), ("a", 4), ("b", 4)]
    assert runs == {"a": {"seconds": [1, 3]}, "b": {"seconds": [2, 4]}}
    assert training.seed == 0


def test_difference_is_that_of_the_paired_t_test():
    ours, theirs = np.random.default_rng(0).normal(size=(2, 5)).tolist()
    mean, margin = difference(ours, theirs)
    expected = ttest_rel(ours, theirs).confidence_interval(0.95)
    assert (mean - margin, mean + margin) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize(
    "metric, ours, theirs, words",
    [
        ("accuracy", [0.81, 0.82], [0.71, 0.72], "accuracy +0.100 ± 0.000 (better)"),
        ("accuracy", [0.7, 0.8], [0.8, 0.7], "accuracy +0.000 ± 1.271 (may be chance)"),
        ("accuracy", [0.5, 0.5], [0.5001, 0.5001], "accuracy -0.000 ± 0.000 (the same)"),
        ("held-out loss", [3.1, 3.2, 3.3], [3.0, 3.1, 3.2], "held-out loss +0.100 ± 0.000 (worse)"),
        ("perplexity", [10.0, 10.0], [12.0, 12.0], "perplexity -2.0 ± 0.0 (better)"),
        ("seconds", [10.0, 12.0], [22.0, 22.0], "seconds -11.0 ± 12.7 (may be chance, 2.00"),
    ],
)
def test_finding(metric, ours, theirs, words):
    assert finding(metric, ours, theirs).startswith(words)


def test_the_last_variant_is_set_against_each_other_one():
    runs = {name: {"accuracy": [value, value + 0.01]} for name, value in {"a": 0.5, "b": 0.7, "c": 0.6}.items()}
    runs["c"]["seconds"] = [1.0, 2.0]
    lines = summarize(runs).splitlines()
    assert lines[2] == "| a       | 0.505 ± 0.007 |           |"
    assert lines[-2:] == [
        "- `c` against `a`: accuracy +0.100 ± 0.000 (better).",
        "- `c` against `b`: accuracy -0.100 ± 0.000 (worse).",
    ]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_seeds": 1}, "`num_seeds` must be at least 2, to distinguish a difference from chance; got 1"),
        ({"parts": "padding", "dataset": "documents.csv"}, "must have the columns `text` and `label`; got text"),
        ({"parts": "masks", "documents": "numbers.csv"}, "column `text` must hold texts; got int64"),
        ({"parts": "targets", "dataset": "numbers.csv"}, "column `text` must hold texts; got int64"),
    ],
)
def test_bad_input(folder, tmp_path, monkeypatch, options, message):
    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (folder / "numbers.csv").write_text("text,label\n" + 10 * "1,no\n2,yes\n")
    files = {name: folder / value for name, value in options.items() if str(value).endswith(".csv")}
    with pytest.raises(ValueError, match=message):
        main(arguments(folder, **{"output_dir": tmp_path, **options, **files}))


def test_unknown_part(folder, capsys):
    with pytest.raises(SystemExit):
        main(arguments(folder, parts="luck"))
    assert "choose from" in capsys.readouterr().err
