"""The recipe, end to end on small pictures of one colour, and its parts."""

import contextlib
import csv
import io
import json
import random
from typing import Any

import pytest
import torch
from datasets import config as datasets_config
from huggingface_hub import ModelCard
from PIL import Image
from torch.testing import assert_close
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from hf_dynmask import DynMaskForConditionalGeneration
from image_captioning import character_f_score, main, make_card, make_tokenizer, read_picture
from support.samples import resolve_files

COLOURS = ["red", "lime", "blue", "black"]
EPOCHS = 15


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with pictures of many sizes, and `metadata.csv`."""
    folder = tmp_path_factory.mktemp("pictures")
    draw = random.Random(0)
    rows = []
    for i in range(40):
        colour = COLOURS[i % len(COLOURS)]
        Image.new("RGB", (draw.randint(4, 32), draw.randint(4, 32)), colour).save(folder / f"{i}.png")
        rows.append({"file_name": f"{i}.png", "text": f"{colour}"})
    with (folder / "metadata.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, ["file_name", "text"])
        table.writeheader()
        table.writerows(rows)
    return folder


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """The output folder of a run with `--baseline`, and what it printed."""
    output = tmp_path_factory.mktemp("output")
    options = {
        "dataset": folder,
        "output_dir": output,
        "model_card_dir": output / "cards",
        "max_side": 24,
        "patch": 4,
        "vocab_size": 300,
        "max_target_tokens": 8,
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "dropout": 0.0,
        "num_train_epochs": EPOCHS,
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,
    }
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(datasets_config, "HF_DATASETS_CACHE", output / "datasets-cache")
        main([*arguments, "--baseline", "--use_cpu"])
    return output, printed.getvalue()


@pytest.fixture(scope="module")
def output(run):
    return run[0]


@pytest.fixture(scope="module")
def results(output):
    return json.loads((output / "results.json").read_text())


# --- the run ---------------------------------------------------------------------------------------------------------


def test_saved_model_has_the_score(output, results, folder):
    """One picture at a time, from the saved files alone."""
    model: Any = AutoModelForSeq2SeqLM.from_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert isinstance(model, DynMaskForConditionalGeneration)
    texts, answers = [], []
    for row in resolve_files(str(folder))["test"].to_list():
        picture = {name: values[None] for name, values in read_picture(row["file_name"], 24, 4).items()}
        answers.append(tokenizer.decode(model.generate(**picture)[0], skip_special_tokens=True))
        texts.append(row["text"])
    assert character_f_score(texts, answers)["chrf"] == results["runs"]["dynmask"]["chrf"]


def test_it_beats_what_needs_no_model(results):
    assert results["runs"]["dynmask"]["chrf"] > results["trivial"]["chrf"] + 10


def test_real_patches_and_tokens_are_counted(output, results, folder):
    train, tokenizer = resolve_files(str(folder))["train"], AutoTokenizer.from_pretrained(output)
    counted = sum(len(read_picture(file, 24, 4)["input_features"]) for file in train["file_name"])
    counted += sum(len(ids) + 1 for ids in tokenizer(list(train["text"]))["input_ids"])  # and the end of each
    for figures in results["runs"].values():
        assert figures["train_tokens"] == EPOCHS * counted
    assert 0.1 < results["padding_share"] < 0.7


def test_what_the_results_tell(results, folder):
    assert list(results["runs"]) == ["dynmask", "padded"]
    assert results["dataset"] == {"name": str(folder), "rows": {"train": 36, "test": 4}}
    assert results["model"]["name"].startswith("DynMaskForConditionalGeneration, 0.1 million weights")


def test_model_card_is_the_results(output, results, run):
    card = ModelCard.load(output / "README.md")
    assert str(card) == str(make_card(results))
    assert (output / "cards" / "image_captioning.md").read_text() == (output / "README.md").read_text()
    assert (output / "cards" / "image_captioning.json").read_text() == (output / "results.json").read_text()
    lines = [line for line in run[1].splitlines() if line.startswith(("|", "Padding", "Without", "Speed-up"))]
    assert len(lines) == 7
    assert all(line in str(card) for line in lines)


# --- its parts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P"])
def test_picture_of_any_kind(tmp_path, mode):
    """A black one, 10 pixels wide and 6 high, in patches of 4: two rows of three, filled up with white."""
    black = (0, 0, 0, 255) if mode == "RGBA" else (0, 255) if mode == "LA" else 0
    Image.new(mode, (10, 6), black).save(tmp_path / "picture.png")
    picture = read_picture(str(tmp_path / "picture.png"), max_side=16, patch=4)
    assert picture["position_ids"].tolist() == [0, 1, 2, 4, 5, 6]
    expected = torch.zeros(3, 8, 12)
    expected[:, :6, :10] = -1
    found = picture["input_features"].reshape(2, 3, 3, 4, 4).permute(2, 0, 3, 1, 4).reshape(3, 8, 12)
    assert_close(found, expected)


def test_clear_parts_are_white(tmp_path):
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "picture.png")
    assert_close(read_picture(str(tmp_path / "picture.png"), 16, 4)["input_features"], torch.zeros(1, 48))


@pytest.mark.parametrize("size, patches", [((40, 20), 4 * 2), ((20, 40), 2 * 4), ((16, 16), 16), ((3, 5), 2)])
def test_only_large_pictures_are_made_smaller(tmp_path, size, patches):
    Image.new("RGB", size).save(tmp_path / "picture.png")
    assert len(read_picture(str(tmp_path / "picture.png"), max_side=16, patch=4)["input_features"]) == patches


def test_tokenizer():
    tokenizer = make_tokenizer(["A red kite.", "A red kite."], vocab_size=300)
    ids = tokenizer("A red kite.")["input_ids"]
    assert tokenizer.decode(ids) == "A red kite."
    assert len(ids) < len("A red kite.")
    assert [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id] == [0, 1, 2]


def test_character_f_score():
    assert character_f_score(["A kite."], ["A kite."]) == {"chrf": 100}
    assert character_f_score(["A kite."], ["xyz"]) == {"chrf": 0}
