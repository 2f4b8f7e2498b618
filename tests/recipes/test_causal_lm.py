"""The recipe, end to end on a tiny text, and its parts."""

import contextlib
import io
import json
import random
from math import exp

import pytest
import torch
from datasets import Dataset
from datasets import config as datasets_config
from transformers import AutoModelForCausalLM, AutoTokenizer, EvalPrediction, LlamaForCausalLM

from causal_lm import main, new_tokenizer, perplexity, surprise, targets, tokenize
from hf_dynmask import DynMaskForCausalLM
from support.common import load_texts
from support.measuring import unigram_perplexity

WORDS = ["a", "the", "film", "plot", "was", "is", "not", "very", "good", "bad"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with texts, `notes.csv`."""
    folder = tmp_path_factory.mktemp("causal_lm")
    draw = random.Random(0)
    rows = [" ".join(draw.choices(WORDS, k=draw.randint(1, 20))) for _ in range(60)]
    (folder / "notes.csv").write_text("\n".join(["text", *rows, '" "']) + "\n")
    return folder


@pytest.fixture(scope="module")
def run(folder):
    """The output folder of a run with `--baseline`, and what it printed."""
    options = {
        "dataset": folder / "notes.csv",
        "output_dir": folder / "output",
        "max_steps": 6,
        "max_length": 16,
        "vocab_size": 300,
        "hidden_size": 16,
        "num_layers": 2,
        "learning_rate": 1e-2,
        "save_strategy": "steps",
    }
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(datasets_config, "HF_DATASETS_CACHE", folder / "datasets-cache")
        main([*arguments, "--baseline", "--use_cpu"])
    return folder / "output", printed.getvalue()


def test_results_and_card(run):
    output, printed = run
    results = json.loads((output / "results.json").read_text())
    runs = results["runs"]
    assert runs["dynmask"]["train_tokens"] == runs["stock"]["train_tokens"] > 0
    assert runs["dynmask"]["perplexity"] == pytest.approx(runs["stock"]["perplexity"], rel=1e-3)
    assert results["model"]["name"].startswith("DynMaskForCausalLM, 0.0 million weights")
    assert results["masks"] == {"attention": "causal"}
    assert 2 <= results["lengths"]["input_ids"]["quartiles"][0] < results["lengths"]["input_ids"]["quartiles"][-1] == 16
    card = (output / "README.md").read_text()
    for text in (f"{runs['dynmask']['perplexity']:.3f}", f"{results['trivial']['perplexity']:.3f}"):
        assert text in card
        assert text in printed


def test_the_saved_model_is_the_baseline_s_twin(run):
    output, _ = run
    model = AutoModelForCausalLM.from_pretrained(output)
    stock = AutoModelForCausalLM.from_pretrained(output / "stock" / "checkpoint-6")
    assert isinstance(model, DynMaskForCausalLM)
    assert isinstance(stock, LlamaForCausalLM)
    inputs = AutoTokenizer.from_pretrained(output)("the film was not", return_tensors="pt")
    torch.testing.assert_close(model(**inputs).logits, stock(**inputs).logits, atol=1e-3, rtol=1e-3)
    assert model.generate(**inputs, max_new_tokens=4, do_sample=False).shape[1] == inputs["input_ids"].shape[1] + 4


def test_texts_are_cut_in_pieces_that_start_without_a_target():
    tokenizer = new_tokenizer(iter(["the film was good"] * 9), 270)
    rows = tokenize(Dataset.from_dict({"text": ["the film was good " * 3, "a"]}), tokenizer, 8)
    whole = tokenizer("the film was good " * 3)["input_ids"] + [tokenizer.eos_token_id]
    pieces = [ids for ids in rows["input_ids"] if ids != [*tokenizer("a")["input_ids"], tokenizer.eos_token_id]]
    assert sum(map(len, pieces)) in (len(whole), len(whole) - 1)  # a last piece of one token has no target
    assert all(len(ids) <= 8 for ids in rows["input_ids"])
    assert all(labels == [-100, *ids[1:]] for ids, labels in zip(rows["input_ids"], rows["labels"], strict=True))


def test_perplexity_is_over_the_targets():
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 5, 7), torch.tensor([[-100, 1, 2, -100, 3], [-100, 4, -100, -100, -100]])
    log_probabilities = logits.log_softmax(-1)
    expected = [log_probabilities[b, t - 1, labels[b, t]] for b in range(2) for t in range(1, 5) if labels[b, t] >= 0]
    found = perplexity(EvalPrediction(surprise(logits, labels).numpy(), labels.numpy()))
    assert found["perplexity"] == pytest.approx(exp(-float(torch.stack(expected).mean())), rel=1e-5)


def test_unigram_perplexity():
    assert unigram_perplexity([1, 1, 2], [1, 3]) == pytest.approx((3 / 6 * 1 / 6) ** -0.5)


def test_targets_are_all_but_the_first():
    assert targets(Dataset.from_dict({"labels": [[-100, 1, 2], [-100, 3]]})) == [1, 2, 3]


def test_texts_must_have_their_column(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")
    (tmp_path / "notes.csv").write_text("words\na\nb\n")
    with pytest.raises(ValueError, match="must have the column `text`; got words"):
        load_texts(str(tmp_path / "notes.csv"), "text")
