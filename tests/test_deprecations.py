"""Our models and our attention use nothing that transformers has deprecated.

Its `FutureWarning`s are errors wherever tests run; what its logger says, each message once a process, is read here.
"""

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers.utils.logging import warning_once

from hf_dynmask import from_transformers
from stock_models import random_stock
from trainer_twins import HEADS, make_trainer, trained

GENERATIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "without a cache": {"use_cache": False},
    "beams": {"num_beams": 2},
    "static cache": {"cache_implementation": "static"},
    "all outputs": {"return_dict_in_generate": True, "output_scores": True, "output_hidden_states": True},
}


@pytest.fixture
def deprecations() -> Iterator[list[str]]:
    """What transformers logs about deprecated names."""
    said: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "deprecat" in record.getMessage().lower():
                said.append(record.getMessage())

    listener = Listener(logging.WARNING)
    logger = logging.getLogger("transformers")
    warning_once.cache_clear()
    logger.addHandler(listener)
    yield said
    logger.removeHandler(listener)


def test_what_is_deprecated_is_heard(deprecations):
    warning_once(logging.getLogger("transformers.utils.generic"), "`a` is deprecated")
    assert deprecations == ["`a` is deprecated"]


@pytest.mark.parametrize("head", HEADS)
def test_training_and_evaluation(head, tmp_path, deprecations):
    for kind in HEADS[head].kinds:
        trained(make_trainer(HEADS[head], kind, tmp_path, {"max_steps": 1}))
    assert deprecations == []


@pytest.mark.parametrize("how", GENERATIONS)
@pytest.mark.parametrize("model_type, task", [("llama", "causal-lm"), ("bart", "seq2seq-lm")])
@pytest.mark.parametrize("ours", ["model", "attention"])
def test_generation(ours, model_type, task, how, deprecations):
    model: Any = random_stock(model_type, task)
    if ours == "model":
        model = from_transformers(model)
    else:
        model.set_attn_implementation("dynmask")
    model.eval()
    ids = torch.arange(3, 13).view(2, 5)
    with torch.no_grad():
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, **GENERATIONS[how])
        model(ids, labels=ids)
    assert deprecations == []
