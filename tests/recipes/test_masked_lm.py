"""The recipe, end to end on a tiny checkpoint, and its parts."""

import contextlib
import io
import json
import random
from math import ceil, exp
from typing import Any

import pytest
import torch
from datasets import Dataset
from datasets import config as datasets_config
from huggingface_hub import ModelCard
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    BertTokenizer,
    EvalPrediction,
)

from hf_dynmask import DataCollatorForDynamicMasking, DynMaskForMaskedLM
from masked_lm import (
    PaddedRows,
    has_head,
    main,
    make_card,
    perplexity,
    start_from_frequencies,
    surprise,
    targets,
    tokenize,
    tokens,
)
from support.common import load_texts

WORDS = ["a", "the", "film", "plot", "was", "is", "not", "very", "good", "bad"]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, "##ly"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a stock checkpoint, `model`, and texts, `notes.csv`."""
    folder = tmp_path_factory.mktemp("masked_lm")
    BertTokenizer({word: i for i, word in enumerate(VOCABULARY)}).save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
    )
    BertModel(config).save_pretrained(folder / "model")
    draw = random.Random(0)
    rows = [" ".join(draw.choices(WORDS, k=draw.randint(4, 24))) for _ in range(60)]
    (folder / "notes.csv").write_text("\n".join(["text", *rows, '" "']) + "\n")
    return folder


def arguments(folder, **options) -> list[str]:
    options = {"model": folder / "model", "dataset": folder / "notes.csv", "output_dir": folder / "output", **options}
    return [text for name, value in options.items() for text in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def run(folder):
    """The output folder of a run with `--baseline`, and what it printed."""
    options = {"model_card_dir": folder / "cards", "num_train_epochs": 2, "max_steps": -1, "max_length": 16}
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(datasets_config, "HF_DATASETS_CACHE", folder / "datasets-cache")
        command = arguments(folder, learning_rate=1e-2, save_strategy="epoch", strategy="whole_word", **options)
        main([*command, "--baseline", "--use_cpu"])
    return folder / "output", printed.getvalue()


@pytest.fixture(scope="module")
def results(run):
    return json.loads((run[0] / "results.json").read_text())


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder / "model")


# --- the run ---------------------------------------------------------------------------------------------------------


def test_saved_model_has_the_perplexity(run, results, folder, tokenizer, monkeypatch):
    """Computed here from the saved files alone, on padded rows with an attention mask."""
    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", folder / "datasets-cache")
    model = AutoModelForMaskedLM.from_pretrained(run[0])
    assert isinstance(model, DynMaskForMaskedLM)
    rows = tokenize(load_texts(str(folder / "notes.csv"), "text")["test"], tokenizer, 16)
    batch = PaddedRows(tokenizer, seed=42, strategy="whole_word").for_evaluation()(rows.to_list())
    labels = batch.pop("labels")
    loss = cross_entropy(model(**batch).logits.detach().transpose(1, 2), labels)
    assert results["runs"]["dynmask"]["perplexity"] == pytest.approx(exp(float(loss)), rel=1e-4)


def test_baseline_follows_the_same_course(run, results, tokenizer):
    """Two epochs with targets of their own: the same for both models."""
    model = AutoModelForMaskedLM.from_pretrained(run[0])
    steps = 2 * ceil(results["dataset"]["rows"]["train"] / 8)
    stock = AutoModelForMaskedLM.from_pretrained(run[0] / "stock" / f"checkpoint-{steps}")
    assert isinstance(stock, BertForMaskedLM)
    batch = tokenizer(["the film was [MASK]", "bad"], padding=True, return_tensors="pt")
    real = batch["attention_mask"].bool()
    found, expected = (candidate(**batch).logits[real] for candidate in (model, stock))
    torch.testing.assert_close(found, expected, atol=1e-2, rtol=0)
    ours, theirs = results["runs"]["dynmask"], results["runs"]["stock"]
    assert ours["perplexity"] == pytest.approx(theirs["perplexity"], rel=1e-3)
    assert ours["train_tokens"] == theirs["train_tokens"] > 0


def test_model_card_is_the_results(run, results, folder):
    output, printed = run
    assert results["training"]["strategy"] == "whole_word"
    assert 0 < results["padding_share"] < 0.6
    card = ModelCard.load(output / "README.md")
    assert str(card) == str(make_card(results))
    metadata: Any = card.data
    assert metadata.pipeline_tag == "fill-mask"
    lines = [line for line in printed.splitlines() if line.startswith(("|", "Padding", "Without", "Speed-up"))]
    assert len(lines) == 7
    assert all(line in str(card) for line in lines)
    assert (folder / "cards" / "masked_lm.md").read_text() == (output / "README.md").read_text()


# --- its parts -------------------------------------------------------------------------------------------------------


def test_texts_are_cut_in_pieces(tokenizer):
    rows = Dataset.from_dict({"text": ["the film was very good", "a"]})
    assert tokenize(rows, tokenizer, 5)["input_ids"][:] == [[2, 6, 7, 9, 3], [2, 12, 13, 3], [2, 5, 3]]


def test_padded_rows_have_the_same_targets(tokenizer):
    rows = [{"input_ids": [2, *range(5, length), 3]} for length in (15, 7)]
    ours, theirs = DataCollatorForDynamicMasking(tokenizer), PaddedRows(tokenizer)
    for collator in (ours, theirs):
        collator.set_epoch(3)
    found, expected = theirs(rows), ours(rows)
    assert torch.equal(found["input_ids"], expected["input_ids"]) and torch.equal(found["labels"], expected["labels"])
    assert found.keys() == {"input_ids", "labels", "attention_mask"}
    assert found["attention_mask"].sum(1).tolist() == expected["lengths"].tolist() == [12, 4]


def test_perplexity_is_over_the_targets():
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 3, 7), torch.tensor([[-100, 1, 2], [4, -100, -100]])
    log_probabilities = logits.log_softmax(-1)
    places = [(0, 1), (0, 2), (1, 0)]
    expected = -torch.stack([log_probabilities[b, t, labels[b, t]] for b, t in places]).mean()
    kept = surprise(logits, labels)
    assert kept.shape == labels.shape  # and not one number for each word of the vocabulary
    found = perplexity(EvalPrediction(kept.numpy(), labels.numpy()))
    assert found["perplexity"] == pytest.approx(exp(float(expected)), rel=1e-5)


def test_tokens_and_targets(tokenizer):
    rows = Dataset.from_dict({"input_ids": [[2, *range(5, 15), 3], [2, 5, 3]]})
    assert tokens(rows, tokenizer) == [*range(5, 15), 5]
    collator = DataCollatorForDynamicMasking(tokenizer, mlm_probability=1)
    assert targets(rows, collator) == tokens(rows, tokenizer)


def test_a_new_head_starts_from_frequencies(run, folder):
    assert not has_head(str(folder / "model")) and has_head(str(folder / "output"))
    bias = torch.nn.Parameter(torch.zeros(4))
    start_from_frequencies(bias, [1, 1, 2])
    torch.testing.assert_close(bias.exp().tolist(), [1 / 7, 3 / 7, 2 / 7, 1 / 7])


def test_tokenizer_without_a_mask_token(folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.mask_token = None
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="`tokenizer.mask_token` must be set"):
        main(arguments(folder, model=tmp_path / "model", output_dir=tmp_path / "output"))


@pytest.mark.parametrize(
    "text, message",
    [
        ("words\na\nb\n", "must have the column `text`; got words"),
        ("text\n1\n2\n", "`text` must hold texts; got int64"),
    ],
)
def test_bad_data(folder, tmp_path, monkeypatch, text, message):
    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "notes.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        main(arguments(folder, dataset=tmp_path / "notes.csv", output_dir=tmp_path / "output"))
