"""`pipeline(...)` on converted models: what the stock model says, also for texts of different lengths in one batch."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, processors
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    pipeline,
)
from transformers.utils import logging

from hf_dynmask import from_transformers

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = ["a", "the", "film", "plot", "was", "is", "not", "very", "good", "bad"]
TEXTS = ["the film was [MASK]", "a very good plot is not a bad plot [MASK] the film", "[MASK]", "the plot was [MASK]"]
SIZES: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "num_hidden_layers": 2}
SIZES |= {"vocab_size": len(SPECIAL) + len(WORDS)}
LABELS = {"id2label": {0: "contradiction", 1: "entailment"}, "label2id": {"contradiction": 0, "entailment": 1}}


@pytest.fixture(scope="module")
def tokenizer():
    words = Tokenizer(WordLevel({word: k for k, word in enumerate(SPECIAL + WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    words.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))  # pyright: ignore[reportAttributeAccessIssue]
    names = dict(zip(("pad", "unk", "cls", "sep", "mask"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(
        tokenizer_object=words, padding_side="left", **{f"{name}_token": text for name, text in names.items()}
    )


def nearly(value):
    """`value` with its numbers to be compared approximately."""
    if isinstance(value, dict):
        return {name: nearly(each) for name, each in value.items()}
    if isinstance(value, list):
        return [nearly(each) for each in value]
    return pytest.approx(value, abs=1e-5) if isinstance(value, float | np.floating) else value


def make(stock_class, config):
    torch.manual_seed(0)
    return stock_class(config).eval()


@pytest.mark.parametrize(
    "task, stock_class, settings, inputs",
    [
        ("feature-extraction", BertModel, {}, TEXTS),
        ("text-classification", BertForSequenceClassification, {"top_k": None}, TEXTS),
        ("zero-shot-classification", BertForSequenceClassification, {"candidate_labels": ["good", "very bad"]}, TEXTS),
        ("token-classification", BertForTokenClassification, {"aggregation_strategy": "simple"}, TEXTS),
        ("fill-mask", BertForMaskedLM, {"top_k": 3}, TEXTS),
        ("text-generation", LlamaForCausalLM, {"max_new_tokens": 5, "do_sample": False}, [*TEXTS, "film"]),
    ],
)
def test_tasks(task, stock_class, settings, inputs, tokenizer, caplog):
    config_class = stock_class.config_class
    config = config_class(**SIZES, **(LABELS if "equence" in stock_class.__name__ else {}), pad_token_id=0)
    if config_class is LlamaConfig:
        config.bos_token_id = config.eos_token_id = 2
    stock = make(stock_class, config)
    logging.enable_propagation()
    try:
        ours = pipeline(task, model=from_transformers(copy.deepcopy(stock)), tokenizer=tokenizer, device="cpu")
    finally:
        logging.disable_propagation()
    assert not [record for record in caplog.records if "not supported" in record.message]
    expected: Any = pipeline(task, model=stock, tokenizer=tokenizer, device="cpu")(inputs, **settings)
    assert ours(inputs, **settings) == nearly(expected)
    together: Any = ours(inputs, batch_size=len(inputs), **settings)
    if task == "feature-extraction":  # hands padding out along with the tokens
        together = [[rows[0][-len(alone[0]) :]] for rows, alone in zip(together, expected, strict=True)]
    assert together == nearly(expected)
