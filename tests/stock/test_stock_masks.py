"""Masks of stock models where keys come out of a cache: `generate` in all its ways gives what it gives with eager."""

from typing import Any

import pytest
import torch

from hf_dynmask import set_mask
from stock_models import random_stock

LEFT = torch.tensor([[5, 6, 7, 8, 9], [0, 0, 10, 11, 12]])
RIGHT = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 0, 0]])
FAMILIES: dict[str, dict[str, Any]] = {
    "bart": {"pad_token_id": 0, "decoder_start_token_id": 1, "eos_token_id": 2},
    "gpt2": {},
    "llama": {},
    "mistral": {"sliding_window": 3},
    "qwen2": {},
}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "without a cache": {"use_cache": False},
    "beams": {"num_beams": 3},
    "sampling": {"do_sample": True},
    "static cache": {"cache_implementation": "static"},
    "static cache, beams": {"cache_implementation": "static", "num_beams": 2},
    "chunks": {"prefill_chunk_size": 2},
    "chunks, static cache": {"prefill_chunk_size": 2, "cache_implementation": "static"},
}


def generated(model, tokens, **settings):
    torch.manual_seed(0)
    mask = (tokens != 0).long()
    settings = {"max_new_tokens": 7, "do_sample": False, "disable_compile": True, **settings}
    return model.generate(tokens, attention_mask=mask, **settings).tolist()


def both(family):
    task = "seq2seq-lm" if family == "bart" else "causal-lm"
    for implementation in ("dynmask", "eager"):
        model = random_stock(family, task, **FAMILIES[family])
        model.set_attn_implementation(implementation)
        yield model


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_generation(family, way):
    if family == "bart" and "chunks" in way:
        pytest.skip("transformers cuts the encoder's mask, and eager attends to its padding")
    tokens = RIGHT if family == "bart" else LEFT
    found, expected = (generated(model, tokens, **WAYS[way]) for model in both(family))
    assert found == expected


@pytest.mark.parametrize("family", ["bart", "gpt2", "llama"])
def test_assisted_generation(family):
    model, stock = both(family)
    tokens = LEFT[:1]
    expected = generated(stock, tokens)
    assert generated(model, tokens, assistant_model=next(both(family))) == expected
    assert generated(stock, tokens, assistant_model=model) == expected
    looked_up = {"prompt_lookup_num_tokens": 2}
    assert generated(model, tokens, **looked_up) == generated(stock, tokens, **looked_up)


@pytest.mark.parametrize("way", ["greedy", "static cache", "chunks", "chunks, static cache"])
def test_generation_with_a_mask(way):
    model, _ = both("llama")
    set_mask(model, "causal & window(2, 0)")
    expected = generated(model, LEFT, use_cache=False)
    assert generated(model, LEFT, **WAYS[way]) == expected


def test_going_on_from_a_cache():
    model, stock = both("llama")
    mask = (LEFT != 0).long()
    expected = stock(input_ids=LEFT, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(0)).logits
    output = model(input_ids=LEFT[:, :3], attention_mask=mask[:, :3], use_cache=True)
    name = "cache" if "cache" in output else "past_key_values"
    position_ids = (mask.cumsum(1) - 1)[:, 3:]
    later = model(input_ids=LEFT[:, 3:], attention_mask=mask, position_ids=position_ids, **{name: output[name]})
    torch.testing.assert_close(later.logits[0], expected[0, 3:], atol=1e-5, rtol=1e-4)
