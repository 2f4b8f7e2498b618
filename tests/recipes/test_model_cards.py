"""The committed model cards and figures are those that the recipes make of the committed results; no number is new."""

import importlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import InferenceClient, ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from PIL import Image
from scipy.stats import ttest_rel

from rebuild_cards import main
from support.cards import command, source_of_figure
from support.variants import CONFIDENCE, METRICS

CARDS = Path(__file__).parents[2] / "model_cards"
FILES = sorted(CARDS.glob("*.json"))
LICENCES = {"apache-2.0", "cc-by-2.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "gpl-2.0", "unknown"}  # of those the Hub knows
LANGUAGES = {"en", "es", "zh"}
NOT_SERVED = {"text-ranking"}  # a task of the Hub that InferenceClient has no method for
IS_OF_THE_HUB = re.compile(r"[\w.-]+/[\w.-]+").fullmatch


@pytest.fixture(params=FILES, ids=lambda file: file.stem)
def file(request) -> Path:
    return request.param


@pytest.fixture
def results(file) -> dict[str, Any]:
    return json.loads(file.read_text())


@pytest.fixture
def card(file) -> ModelCard:
    return ModelCard.load(file.with_suffix(".md"))


def test_each_card_has_its_results():
    stems = {file.stem for file in FILES}
    assert {file.stem for file in CARDS.glob("*.md")} - {"README"} == stems
    assert {file.stem for file in CARDS.glob("*.png")} == stems


def test_card_agrees_with_its_results(file, results):
    card = importlib.import_module(results["recipe"]).make_card(results)
    assert results["recipe"] == file.stem
    assert file.with_suffix(".md").read_text() == str(card)


def test_figure_is_of_the_results(file, results, card):
    picture = file.with_suffix(".png")
    with Image.open(picture) as opened:
        assert opened.info["Source"] == source_of_figure(results)
    assert picture.stat().st_size < 60_000
    (described,) = re.findall(rf"!\[(.+)\]\({re.escape(picture.name)}\)", card.text)
    assert len(described) > 20


def test_cards_are_rebuilt_from_results_alone(file, results, card, tmp_path):
    copy = tmp_path / file.name
    shutil.copy(file, copy)
    main([str(copy)])
    assert copy.with_suffix(".md").read_text() == str(card)
    with Image.open(copy.with_suffix(".png")) as opened, Image.open(file.with_suffix(".png")) as committed:
        assert opened.info["Source"] == committed.info["Source"]


# --- Metadata --------------------------------------------------------------------------------------------------------


def test_metadata(results, card):
    data = card.data.to_dict()
    assert (data["library_name"], data["tags"]) == (results.get("library", "transformers"), ["hf_dynmask"])
    assert set(data["language"]) <= LANGUAGES
    assert set(data["license"]) <= LICENCES
    assert all(map(IS_OF_THE_HUB, filter(None, [data.get("base_model"), *data.get("datasets", [])])))
    starts_from = {"sample:minilm": "sentence-transformers/all-MiniLM-L6-v2"}
    assert data.get("base_model") == starts_from.get(results["model"]["name"])


def test_index_of_metrics(file, results, card):
    data = card.data.to_dict()
    if file.stem == "static_vs_dynamic":  # compares ways to train, and hands on no model
        assert "model-index" not in data
        return
    name, measured = model_index_to_eval_results(data["model-index"])
    assert name == file.stem
    assert measured == card.data.eval_results
    metrics = [results["metric"], *results.get("others", [])]
    expected = {metric: results["runs"]["dynmask"][metric] for metric in metrics}
    assert {each.metric_name: each.metric_value for each in measured} == expected
    assert data["metrics"] == list(dict.fromkeys(each.metric_type for each in measured))
    for each in measured:
        assert each.task_type == data["pipeline_tag"]
        assert each.task_type in NOT_SERVED or hasattr(InferenceClient, each.task_type.replace("-", "_"))
        assert each.dataset_type == data.get("datasets", [results["dataset"]["name"]])[0]
        assert each.dataset_split and each.dataset_args == {"rows": results["dataset"]["rows"]["test"]}


# --- Text ------------------------------------------------------------------------------------------------------------


def test_sections(results, card):
    headings = re.findall("(?m)^## (.+)$", card.text)
    shown = ["Results"] if "parts" in results else ["Results", "Masks and lengths", "Use"]
    ending = ["Limits and risks", "Model and data", "How to reproduce", "Training", "Environment"]
    assert headings == shown + ending
    assert f"```bash\n{command(results)}\n```" in card.text
    for mask in results.get("masks", {}).values():
        assert f"`{mask}`. In " in card.text


def numbers_in(text: str) -> list[str]:
    return re.findall(r"(?<![\w.])[+-]?\d+(?:,\d{3})*(?:\.\d+)?(?:e[+-]?\d+)?%?", re.sub("(?s)```.*?```", "", text))


def values_of(results: Any) -> Iterator[float]:
    """All numbers, but for those of histograms, which no text has."""
    if isinstance(results, dict):
        results = [value for name, value in results.items() if name not in ("counts", "width")]
    if isinstance(results, list):
        for value in results:
            yield from values_of(value)
    elif isinstance(results, int | float):
        yield results


def derived(results: dict[str, Any]) -> Iterator[str]:
    """Speed-ups, and margins over what needs no model or no training."""
    runs = results.get("runs", {})
    for padded in runs.keys() - {"dynmask"}:
        yield f"{runs['dynmask']['tokens_per_second'] / runs[padded]['tokens_per_second']:.2f}"
    for reference in {"trivial", "untrained"} & results.keys():
        yield f"{runs['dynmask'][results['metric']] - results[reference][results['metric']]:+.3f}"


def derived_of_seeds(results: dict[str, Any]) -> Iterator[str]:
    """Means and standard deviations; differences, their confidence intervals, ratios of seconds."""
    yield f"{CONFIDENCE:.0%}"
    for part in results.get("parts", {}).values():
        *_, last = part["runs"].values()
        for run in part["runs"].values():
            for metric, numbers in run.items():
                digits = METRICS[metric].digits
                interval = ttest_rel(last[metric], numbers).confidence_interval(CONFIDENCE) if run is not last else None
                yield from (f"{number:.{digits}f}" for number in (np.mean(numbers), np.std(numbers, ddof=1)))
                if interval is not None:
                    half = 0 if np.isnan(interval.high) else (interval.high - interval.low) / 2
                    yield f"{half:.{digits}f}"
                    yield f"{np.mean(last[metric]) - np.mean(numbers):+.{digits}f}"
                    yield f"{np.mean(numbers) / np.mean(last[metric]):.2f}"


def unsupported(text: str, results: dict[str, Any]) -> list[str]:
    """Numbers of a text that are neither in the results, as they are or rounded, nor derived from them."""
    formats = ("{}", "{:,}", "{:,.0f}", "{:,.1f}", "{:.3f}", "{:.1%}")
    known = {form.format(value) for value in values_of(results) for form in formats}
    known |= {*numbers_in(json.dumps(results)), *derived(results), *derived_of_seeds(results)}
    return [number for number in numbers_in(text) if number not in known]


def test_numbers_are_those_of_the_results(results, card):
    assert len(numbers_in(str(card))) > 20
    assert unsupported(str(card), results) == []
    assert unsupported("| 0.1234567 | seen 987,654 times, 12.34% |", results) == ["0.1234567", "987,654", "12.34%"]
