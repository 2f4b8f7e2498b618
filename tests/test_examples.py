"""The examples in the docstrings of public names run, and print what they say."""

import doctest
from collections.abc import Iterator
from inspect import getdoc
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import AutoModelForMaskedLM, BertConfig, BertForMaskedLM, Trainer, TrainingArguments

import hf_dynmask
from masked_lm_examples import make_tokenizer

TINY: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def examples() -> Iterator[Any]:
    for name in hf_dynmask.__all__:
        text = (getdoc(getattr(hf_dynmask, name)) or "").replace("```python\n", "").replace("```", "")
        test = doctest.DocTestParser().get_doctest(text, {}, name, None, None)
        if test.examples:
            yield pytest.param(test, id=name)


@pytest.fixture
def names() -> dict[str, Any]:
    """What the examples do not make themselves."""
    tokenizer = make_tokenizer()
    dataset = Dataset.from_dict({"input_ids": [[5, 6, 7], [8, 9]] * 8})
    return {
        **{name: getattr(hf_dynmask, name) for name in hf_dynmask.__all__},
        **{"AutoModelForMaskedLM": AutoModelForMaskedLM, "DataLoader": DataLoader, "Trainer": Trainer, "torch": torch},
        "args": TrainingArguments("outputs", use_cpu=True, report_to="none"),
        "collator": hf_dynmask.DataCollatorWithLengths(tokenizer),
        "model": hf_dynmask.from_transformers(BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **TINY))),
        "tokenizer": tokenizer,
        **dict.fromkeys(("dataset", "train", "held_out"), dataset),
    }


@pytest.mark.parametrize("test", list(examples()))
def test_example(test, names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = "google-bert/bert-base-uncased"  # what some examples load, as a local folder
    BertForMaskedLM(BertConfig(vocab_size=200, **TINY)).save_pretrained(folder)
    test.globs = names
    said: list[str] = []
    doctest.DocTestRunner().run(test, out=said.append)
    assert not said, "".join(said)
