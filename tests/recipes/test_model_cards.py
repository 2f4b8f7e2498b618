"""The committed model cards are those that the recipes make of the committed results."""

import importlib
import json
from pathlib import Path

import pytest

import seq2seq

CARDS = Path(__file__).parents[2] / "model_cards"


@pytest.mark.parametrize("file", sorted(CARDS.glob("*.json")), ids=lambda file: file.stem)
def test_card_agrees_with_its_results(file):
    results = json.loads(file.read_text())
    recipe = importlib.import_module(results["recipe"])
    card = seq2seq.make_card(recipe.TASK, results) if hasattr(recipe, "TASK") else recipe.make_card(results)
    assert results["recipe"] == file.stem
    assert file.with_suffix(".md").read_text() == str(card)


def test_each_card_has_its_results():
    assert {file.stem for file in CARDS.glob("*.md")} - {"README"} == {file.stem for file in CARDS.glob("*.json")}
