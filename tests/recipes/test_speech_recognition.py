"""The recipe, end to end on short melodies whose notes are letters, and its parts."""

import contextlib
import csv
import io
import json
import random
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from datasets import config as datasets_config
from huggingface_hub import ModelCard
from transformers import AutoModelForCTC, Speech2TextFeatureExtractor, pipeline

from hf_dynmask import DynMaskForCTC
from speech_recognition import error_rates, log_mel, main, make_card, make_tokenizer, normalize
from support.cards import describe_new_model
from support.measuring import best_constant
from support.samples import resolve_files

NOTES = {"a": 300.0, "b": 900.0, "c": 2500.0}  # Hz
RATES = [8000, 16000, 44100]


def melody(text: str, rate: int) -> np.ndarray:
    """A note of 0.2 s for each letter, and a pause of 0.1 s behind it."""
    time = np.arange(int(0.2 * rate)) / rate
    pause = np.zeros(rate // 10)
    noise = np.random.default_rng(0)
    notes = [part for letter in text for part in (0.5 * np.sin(2 * np.pi * NOTES[letter] * time), pause)]
    sound = np.concatenate(notes)
    return sound + 0.01 * noise.standard_normal(len(sound))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with recordings at several rates, of one channel and of two, and `metadata.csv`."""
    folder = tmp_path_factory.mktemp("speech")
    draw = random.Random(0)
    rows = []
    for i in range(40):
        text = "".join(draw.choices("abc", k=draw.randint(1, 5)))
        sound = melody(text, RATES[i % 3])
        soundfile.write(folder / f"{i}.ogg", np.stack([sound, sound], -1) if i % 2 else sound, RATES[i % 3])
        rows.append({"file_name": f"{i}.ogg", "text": f"{text.upper()}!"})
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
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "dropout": 0.0,
        "num_train_epochs": 30,
        "per_device_train_batch_size": 6,
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


def test_saved_model_has_the_error_rate(output, results, folder):
    """One recording at a time, from the saved files alone; transformers' own pipeline hears the same."""
    recognizer: Any = pipeline("automatic-speech-recognition", model=str(output), device="cpu")
    assert isinstance(recognizer.model, DynMaskForCTC)
    heard, texts = [], []
    for row in resolve_files(str(folder))["test"].to_list():
        features = torch.tensor(log_mel(row["file_name"], recognizer.feature_extractor))
        heard.append(recognizer.tokenizer.decode(recognizer.model(input_features=features[None]).logits[0].argmax(-1)))
        texts.append(normalize(row["text"]))
        sound, rate = soundfile.read(row["file_name"], always_2d=True)
        if rate == 16000:
            assert recognizer({"raw": sound.mean(1), "sampling_rate": rate})["text"] == heard[-1]
    assert error_rates(texts, heard)["cer"] == results["runs"]["dynmask"]["cer"]


def test_it_beats_what_needs_no_model(results):
    assert results["runs"]["dynmask"]["cer"] < 0.5 * results["trivial"]["cer"]


def test_real_frames_are_counted(results, folder):
    extractor = Speech2TextFeatureExtractor()
    files = resolve_files(str(folder))["train"]["file_name"]
    frames = sum(len(log_mel(file, extractor)) for file in files)
    for figures in results["runs"].values():
        assert figures["train_tokens"] == 30 * frames
    assert 0.1 < results["padding_share"] < 0.6


def test_what_the_results_tell(results, folder, output):
    assert list(results["runs"]) == ["dynmask", "padded"]
    assert results["dataset"] == {"name": str(folder), "rows": {"train": 36, "test": 4}}
    assert results["model"] == describe_new_model(AutoModelForCTC.from_pretrained(output))
    assert results["training"]["dropout"] == 0.0


def test_model_card_is_the_results(output, results, run):
    card = ModelCard.load(output / "README.md")
    assert str(card) == str(make_card(results))
    assert (output / "cards" / "speech_recognition.md").read_text() == (output / "README.md").read_text()
    assert (output / "cards" / "speech_recognition.json").read_text() == (output / "results.json").read_text()
    lines = [line for line in run[1].splitlines() if line.startswith(("|", "Padding", "Without", "Speed-up"))]
    assert len(lines) == 7
    assert all(line in str(card) for line in lines)


# --- its parts -------------------------------------------------------------------------------------------------------


def test_rates_and_channels_make_no_difference(tmp_path):
    extractor = Speech2TextFeatureExtractor(do_ceptral_normalize=False)
    frames = []
    for i, rate in enumerate((16000, 44100)):
        sound = np.stack([melody("abc", rate)] * (i + 1), -1)
        soundfile.write(tmp_path / "sound.wav", sound, rate, subtype="FLOAT")
        frames.append(torch.tensor(log_mel(str(tmp_path / "sound.wav"), extractor)))
    assert frames[0].shape == frames[1].shape == (88, 80)
    loud = frames[0].argmax(-1)[[10, 40, 70]]  # within each note: the same bin is the loudest
    assert loud.tolist() == frames[1].argmax(-1)[[10, 40, 70]].tolist()
    assert loud.tolist() == sorted(set(loud.tolist()))


@pytest.mark.parametrize("sound, found", [(np.zeros(16000), "silence"), (np.ones(400), "0.025 s")])
def test_no_sound(tmp_path, sound, found):
    soundfile.write(tmp_path / "sound.wav", sound, 16000)
    with pytest.raises(ValueError, match=rf"sound.wav` must hold at least 0.05 s of sound; got {found}"):
        log_mel(str(tmp_path / "sound.wav"), Speech2TextFeatureExtractor())


@pytest.mark.parametrize(
    "text, spelt",
    [
        ("¡Un  ÑANDÚ, corriendo!", "un ñandú corriendo"),
        ("Don’t — 25 a_b", "don't 25 a b"),
        ("e\u0301", "\u00e9"),
    ],
)
def test_normalize(text, spelt):
    assert normalize(text) == spelt


def test_nothing_to_spell():
    with pytest.raises(ValueError, match="`text` must hold letters; got '…'"):
        normalize("…")


def test_tokenizer():
    tokenizer = make_tokenizer(["lo oye", "ñu"])
    ids = tokenizer("lo oye ñu").input_ids
    assert tokenizer.pad_token_id == 0
    assert len(tokenizer) == len({"<pad>", "<unk>", "|", *"loyeñu"})
    assert tokenizer.decode(ids, group_tokens=False) == "lo oye ñu"
    assert tokenizer.decode([ids[0], ids[0], 0, ids[0], ids[1]]) == "llo"


def test_error_rates():
    rates = error_rates(["un oso", "una rata"], ["un oso", "una rana"])
    assert rates == {"cer": 1 / 14, "wer": 1 / 4}


def test_best_constant():
    data = {"train": {"text": ["b", "aa", "b", "ab"]}, "test": {"text": ["aa", "ab"]}}
    found = best_constant(data, "cer", error_rates, lower_is_better=True)  # pyright: ignore[reportArgumentType]
    assert found == {"what": "always 'aa', the best of the 3 most frequent texts", "cer": 1 / 4}
