"""The recipe, end to end on tiny data, and its parts."""

import contextlib
import io
import json
import random
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from datasets import config as datasets_config
from huggingface_hub import ModelCard
from transformers import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertConfig,
    BertForTokenClassification,
    BertModel,
    BertTokenizer,
    EvalPrediction,
    pipeline,
)

from hf_dynmask import DynMaskForTokenClassification
from token_classification import (
    encode,
    encode_tags,
    entity_scores,
    load_sentences,
    main,
    make_card,
    most_frequent_tags,
    most_likely,
    new_tokenizer,
    score_predictions,
    spread,
)

TAGS = ["B-LOC", "B-PER", "I-LOC", "I-PER", "O"]


def sentence(draw: random.Random) -> dict[str, list[str]]:
    """Persons are two characters, places three; the rest has no name in it."""
    parts = [
        draw.choice(
            [("江河", ["B-PER", "I-PER"]), ("上海市", ["B-LOC", "I-LOC", "I-LOC"]), ("在", ["O"]), ("，", ["O"])]
        )
        for _ in range(draw.randint(1, 6))
    ]
    return {
        "tokens": [token for text, _ in parts for token in text],
        "ner_tags": [tag for _, tags in parts for tag in tags],
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with sentences, `names.jsonl`."""
    folder = tmp_path_factory.mktemp("token_classification")
    draw = random.Random(0)
    (folder / "names.jsonl").write_text("".join(json.dumps(sentence(draw)) + "\n" for _ in range(100)))
    return folder


@pytest.fixture(scope="module")
def run(folder):
    """The output folder of a run with `--baseline`, and what it printed."""
    options = {
        "dataset": folder / "names.jsonl",
        "output_dir": folder / "output",
        "model_card_dir": folder / "cards",
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "max_length": 12,
        "per_device_train_batch_size": 16,
        "learning_rate": 5e-3,
        "num_train_epochs": 3,
        "max_steps": -1,
        "save_strategy": "epoch",
    }
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(datasets_config, "HF_DATASETS_CACHE", folder / "datasets-cache")
        main([*arguments, "--baseline", "--use_cpu"])
    return folder / "output", printed.getvalue()


@pytest.fixture(scope="module")
def results(run):
    return json.loads((run[0] / "results.json").read_text())


@pytest.fixture
def splits(folder, monkeypatch):
    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", folder / "datasets-cache")
    return load_sentences(str(folder / "names.jsonl"))


# --- the run ---------------------------------------------------------------------------------------------------------


def test_saved_model_has_the_scores(run, results, splits):
    """Computed here from the saved files alone, one sentence at a time."""
    model = AutoModelForTokenClassification.from_pretrained(run[0])
    assert isinstance(model, DynMaskForTokenClassification)
    tokenizer = AutoTokenizer.from_pretrained(run[0])
    names: Any = model.config.id2label
    expected, found = [], []
    for row in splits["test"]:
        for start in range(0, len(row["tokens"]), 12):  # as `max_length` has it
            inputs = tokenizer("".join(row["tokens"][start : start + 12]), return_tensors="pt")
            found.append([names[i] for i in model(**inputs).logits[0].argmax(-1).tolist()])
            expected.append([TAGS[i] for i in row["ner_tags"][start : start + 12]])
    scores = entity_scores(expected, found)
    assert {name: results["runs"]["dynmask"][name] for name in scores} == pytest.approx(scores)
    assert results["trivial"]["f1"] == 1  # each of these characters has one tag alone


def test_baseline_follows_the_same_course(run, results):
    model = AutoModelForTokenClassification.from_pretrained(run[0])
    (checkpoint,) = (run[0] / "stock").glob("checkpoint-*8")
    stock = AutoModelForTokenClassification.from_pretrained(checkpoint)
    assert isinstance(stock, BertForTokenClassification)
    batch = AutoTokenizer.from_pretrained(run[0])(["江河在上海市", "在"], padding=True, return_tensors="pt")
    real = batch["attention_mask"].bool()
    found, expected = (candidate(**batch).logits[real] for candidate in (model, stock))
    torch.testing.assert_close(found, expected, atol=1e-2, rtol=0)
    assert expected.std() > 0.5
    assert results["runs"]["stock"]["f1"] == pytest.approx(results["runs"]["dynmask"]["f1"], abs=0.1)


def test_what_the_results_tell(results, splits):
    tokens = sum(map(len, splits["train"]["tokens"]))
    for figures in results["runs"].values():
        assert figures["train_tokens"] == 3 * tokens
    assert list(results["runs"]) == ["dynmask", "stock"]
    assert results["labels"] == TAGS
    assert results["model"]["name"].startswith("DynMaskForTokenClassification, 0.1 million weights")
    assert 0.1 < results["padding_share"] < 0.6


def test_model_card_is_the_results(run, results, folder):
    output, printed = run
    card = ModelCard.load(output / "README.md")
    assert str(card) == str(make_card(results))
    metadata: Any = card.data
    assert metadata.pipeline_tag == "token-classification"
    lines = [line for line in printed.splitlines() if line.startswith(("|", "Padding", "Without", "Speed-up"))]
    assert len(lines) == 7
    assert all(line in str(card) for line in lines)
    assert (folder / "cards" / "token_classification.md").read_text() == (output / "README.md").read_text()


def test_usage_of_the_card(run):
    """Characters of a text that is not split, in a pipeline."""
    tagger = pipeline("token-classification", model=str(run[0]), aggregation_strategy="simple", device="cpu")
    found: Any = tagger("江河在上海市")
    assert {(entity["start"], entity["end"]) for entity in found} <= {(0, 2), (3, 6)}


# --- its parts -------------------------------------------------------------------------------------------------------


def test_tokenizer_of_characters():
    tokenizer = new_tokenizer([["中国", "中"], ["国", "人", "１"]])
    encoded = tokenizer(["中国 人", "１"], padding=True)
    assert [tokenizer.convert_ids_to_tokens(ids) for ids in encoded["input_ids"]] == [
        ["中", "国", "[UNK]", "[UNK]"],
        ["[UNK]", "[PAD]", "[PAD]", "[PAD]"],
    ]
    assert len(tokenizer) == 4


def test_words_of_several_tokens():
    """Of a checkpoint with special tokens: the first token of a word has its tag, and long rows are cut in pieces."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "play", "##ing", "in", "rome"]
    tokenizer = BertTokenizer({word: i for i, word in enumerate(vocabulary)})
    rows = Dataset.from_dict({"tokens": [["playing", "in", "rome"], ["rome"]], "ner_tags": [[0, 1, 2], [2]]})
    pieces = encode(rows, tokenizer, max_length=5)
    assert pieces["input_ids"][:] == [[2, 5, 6, 7, 3], [2, 8, 3], [2, 8, 3]]
    assert pieces["labels"][:] == [[-100, 0, -100, 1, -100], [-100, 2, -100], [-100, 2, -100]]


def test_spread():
    assert spread([3, 4], [None, 0, 0, 1, None]) == [-100, 3, -100, 4, -100]


def test_scores_are_of_whole_entities():
    expected = [["B-PER", "I-PER", "O", "B-LOC"], ["O"]]
    found = [["B-PER", "I-PER", "O", "B-PER"], ["B-LOC"]]
    assert entity_scores(expected, found) == pytest.approx({"f1": 0.4, "precision": 1 / 3, "recall": 0.5})
    assert entity_scores([["O"]], [["O"]]) == {"f1": 0, "precision": 0, "recall": 0}


def test_padding_has_no_share_in_the_scores():
    logits = torch.nn.functional.one_hot(torch.tensor([[1, 3, 4], [0, 1, 1]]), 5)
    labels = np.array([[1, 3, 4], [0, -100, -100]])
    prediction = EvalPrediction(most_likely(logits, torch.tensor(labels)).numpy(), labels)
    assert score_predictions(prediction, TAGS) == {"f1": 1, "precision": 1, "recall": 1}


def test_most_frequent_tags():
    columns = {
        "train": {"input_ids": [[5, 5, 5, 6, 6, 8]], "labels": [[1, 1, 4, 4, -100, 4]]},
        "test": {"input_ids": [[5, 6, 7], [6, 5, 7]], "labels": [[1, 4, 4], [4, 1, 1]]},
    }
    data = DatasetDict({name: Dataset.from_dict(rows) for name, rows in columns.items()})
    assert most_frequent_tags(data, TAGS) == pytest.approx({"f1": 0.8, "precision": 1, "recall": 2 / 3})


def test_tags_that_are_classes_already():
    features = Features(tokens=List(Value("string")), ner_tags=List(ClassLabel(names=["O", "B-PER"])))
    rows = Dataset.from_dict({"tokens": [["a"]], "ner_tags": [[1]]}, features=features)
    assert encode_tags(DatasetDict({"train": rows}))["train"].features["ner_tags"].feature.names == ["O", "B-PER"]


def test_checkpoint_of_ones_own(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"江河上海市在，"]
    BertTokenizer({word: i for i, word in enumerate(vocabulary)}).save_pretrained(tmp_path / "model")
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    BertModel(config).save_pretrained(tmp_path / "model")
    options = ["--model", str(tmp_path / "model"), "--dataset", str(folder / "names.jsonl"), "--max_steps", "1"]
    main([*options, "--output_dir", str(tmp_path / "output"), "--use_cpu"])
    assert AutoModelForTokenClassification.from_pretrained(tmp_path / "output").config.source_model_type == "bert"


@pytest.mark.parametrize(
    "row, message",
    [
        ({"tokens": ["a"], "tags": ["O"]}, "must have the columns `tokens` and `ner_tags`; got tokens, tags"),
        ({"tokens": "a", "ner_tags": ["O"]}, r"column `tokens` must hold lists of texts; got Value\('string'\)"),
        (
            {"tokens": ["a"], "ner_tags": [1]},
            r"column `ner_tags` must hold lists of tags .*; got List\(Value\('int64'\)\)",
        ),
        ({"tokens": ["a", "b"], "ner_tags": ["O"]}, "must have a tag for each of the 2 tokens in row 0; got 1"),
    ],
)
def test_bad_data(tmp_path, monkeypatch, row, message):
    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", tmp_path / "cache")
    file = tmp_path / "names.jsonl"
    file.write_text(f"{json.dumps(row)}\n" * 2)
    with pytest.raises(ValueError, match=message):
        load_sentences(str(file))
