"""
Trains a speech recogniser from random weights with the stock `Trainer`, on batches of frames with lengths.

    python recipes/speech_recognition.py

uses short phrases of spoken Spanish. To also train the same model on padded batches:

    python recipes/speech_recognition.py --baseline

With a folder of your own recordings, in any format that libsndfile reads, and a `metadata.csv` with the columns
`file_name` and `text`:

    python recipes/speech_recognition.py --dataset path/to/folder --num_hidden_layers 12 --hidden_size 512

Log-mel frames pass through two convolutions and an encoder, which is trained with connectionist temporal classification
(CTC) on characters. All options of `TrainingArguments` apply. Results, model card and model are written to
`--output_dir`.
"""

import support.threads  # noqa: F401

import copy
import json
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from math import gcd
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jiwer
import numpy as np
import soundfile
from datasets import Array2D, DatasetDict, Features, List, Value
from scipy.signal import resample_poly
from torch import Tensor
from transformers import (
    AutoModelForCTC,
    EvalPrediction,
    Speech2TextFeatureExtractor,
    Trainer,
    TrainingArguments,
    Wav2Vec2CTCTokenizer,
    set_seed,
)

from hf_dynmask import DataCollatorForFeatures, DynMaskConfig, DynMaskForCTC
from support.common import CommonArguments, parse_arguments
from support.measuring import best_constant, without_lengths
from support.reporting import About, train_and_report
from support.samples import resolve_files

MEL_BINS = 80


def main(arguments: list[str] | None = None) -> None:
    recipe, training = parse_arguments([RecipeArguments, TrainingArguments], arguments, DEFAULTS)

    texts = resolve_files(recipe.dataset).map(lambda row: {"text": normalize(row["text"])})
    tokenizer = make_tokenizer(texts["train"]["text"])
    extractor = Speech2TextFeatureExtractor(feature_size=MEL_BINS, num_mel_bins=MEL_BINS)
    data = extract_features(texts, extractor, tokenizer)
    if training.process_index == 0:
        extractor.save_pretrained(training.output_dir)

    set_seed(training.seed)
    model = make_model(recipe, tokenizer)
    collator = DataCollatorForFeatures()
    trainer = Trainer(
        model,
        training,
        data_collator=collator,
        train_dataset=data["train"],
        eval_dataset=data["test"],
        processing_class=tokenizer,
        compute_metrics=partial(spelling_mistakes, tokenizer=tokenizer),
        preprocess_logits_for_metrics=most_likely,
    )

    train_and_report(
        ABOUT,
        recipe,
        trainer,
        AutoModelForCTC.from_pretrained,
        {"padded": (copy.deepcopy(model), without_lengths(collator))} if recipe.baseline else {},
        settings={"dropout": recipe.dropout},
        trivial=best_constant(texts, "cer", error_rates, lower_is_better=True),
    )


# --- Data ------------------------------------------------------------------------------------------------------------


def normalize(text: str) -> str:
    """Normalises a text to lower-case letters, digits and apostrophes, with single spaces between words."""
    composed = unicodedata.normalize("NFC", text).lower().replace("’", "'")
    spelt = " ".join(re.sub(r"[^\w\s']|_", " ", composed).split())
    if not spelt:
        raise ValueError(f"`text` must hold letters; got {text!r}")
    return spelt


def make_tokenizer(texts: Iterable[str]) -> Wav2Vec2CTCTokenizer:
    """A tokenizer with a token for each character of the texts. The first token, `<pad>`, is the blank of CTC."""
    characters = sorted(set("".join(texts)) - {" "})
    vocabulary = {character: i for i, character in enumerate(["<pad>", "<unk>", "|", *characters])}
    with TemporaryDirectory() as folder:  # one per process
        file = Path(folder, "vocab.json")
        file.write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
        return Wav2Vec2CTCTokenizer(str(file), bos_token=None, eos_token=None)  # pyright: ignore[reportArgumentType]


def extract_features(
    texts: DatasetDict, extractor: Speech2TextFeatureExtractor, tokenizer: Wav2Vec2CTCTokenizer
) -> DatasetDict:
    """Computes `input_features (T, MEL_BINS)`, one frame every 10 ms, and `labels` from `file_name` and `text`."""

    def extract(row: dict[str, str]) -> dict[str, Any]:
        return {
            "input_features": log_mel(row["file_name"], extractor),
            "labels": tokenizer(row["text"])["input_ids"],
        }

    features = Features(input_features=Array2D((None, MEL_BINS), "float32"), labels=List(Value("int64")))
    data = texts.map(extract, features=features, remove_columns=texts["train"].column_names, desc="Log-mel frames")
    return data.with_format("torch")


def log_mel(file: str, extractor: Speech2TextFeatureExtractor) -> np.ndarray:
    """Frames `(T, MEL_BINS)` of a recording; each bin has mean 0 and variance 1."""
    sound, rate = soundfile.read(file, dtype="float32", always_2d=True)
    common = gcd(rate, extractor.sampling_rate)
    mono = resample_poly(sound.mean(1), extractor.sampling_rate // common, rate // common)
    seconds = len(mono) / extractor.sampling_rate
    if seconds < 0.05 or not mono.any():
        found = f"{seconds:.3f} s" if mono.any() else "silence"
        raise ValueError(f"`{file}` must hold at least 0.05 s of sound; got {found}")
    return extractor(mono, sampling_rate=extractor.sampling_rate)["input_features"][0]


# --- Model -----------------------------------------------------------------------------------------------------------


def make_model(recipe: "RecipeArguments", tokenizer: Wav2Vec2CTCTokenizer) -> DynMaskForCTC:
    """A model with random weights."""
    config = DynMaskConfig(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.get_vocab()["<pad>"],
        num_features=MEL_BINS,
        conv_kernel=[3, 3],
        conv_stride=[2, 2],
        hidden_size=recipe.hidden_size,
        intermediate_size=4 * recipe.hidden_size,
        num_hidden_layers=recipe.num_hidden_layers,
        num_attention_heads=recipe.hidden_size // 64,
        norm_placement="pre",
        embedding_norm=False,
        position_type="rotary",
        initializer_range=recipe.hidden_size**-0.5,  # the usual 0.02 is too small for a small model
        hidden_dropout_prob=recipe.dropout,
        attention_probs_dropout_prob=recipe.dropout,
        ctc_zero_infinity=True,
    )
    return DynMaskForCTC(config)


# --- Measuring -------------------------------------------------------------------------------------------------------


def most_likely(logits: Tensor, labels: Tensor) -> Tensor:
    """The most likely token of each frame `(B, T)`. Absent frames have logits of 0, so they get token 0, the blank."""
    return logits.argmax(-1)


def spelling_mistakes(prediction: EvalPrediction, tokenizer: Any) -> dict[str, float]:
    def decode(ids: Any, collapse: bool) -> list[str]:
        return tokenizer.batch_decode(np.where(ids < 0, tokenizer.pad_token_id, ids), group_tokens=collapse)

    return error_rates(decode(prediction.label_ids, False), decode(prediction.predictions, True))


def error_rates(texts: list[str], hypotheses: list[str]) -> dict[str, float]:
    """Character (`cer`) and word error rates (`wer`)."""
    return {"cer": jiwer.cer(texts, hypotheses), "wer": jiwer.wer(texts, hypotheses)}


# --- Arguments and model card ----------------------------------------------------------------------------------------


@dataclass
class RecipeArguments(CommonArguments):
    dataset: str = field(
        default="sample:phrases",
        metadata={"help": "A folder of recordings with `metadata.csv`, or a sample."},
    )
    hidden_size: int = field(default=192, metadata={"help": "Hidden size of the encoder, with heads of 64."})
    num_hidden_layers: int = field(default=4, metadata={"help": "Layers of the encoder."})
    dropout: float = field(default=0.2, metadata={"help": "Dropout of hidden states and attention weights."})


DEFAULTS = {
    "output_dir": "outputs/speech_recognition",
    "num_train_epochs": 20,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 32,
    "learning_rate": 1e-3,
    "logging_steps": 50,
}
USAGE = """
import hf_dynmask  # registers the model type with transformers
import soundfile
from transformers import pipeline

recognizer = pipeline("automatic-speech-recognition", model="path/to/this/folder")
sound, sampling_rate = soundfile.read("speech.wav")  # one channel, 16,000 Hz
recognizer({"raw": sound, "sampling_rate": sampling_rate})
"""
LIMITS = (
    "It is less accurate on voices, accents and microphones that differ from its training data. It spells by ear and "
    "knows no words."
)
ABOUT = About(
    recipe="speech_recognition",
    task="automatic-speech-recognition",
    metrics=["cer", "wer"],
    title="Character-level speech recognition",
    usage=USAGE,
    limits=LIMITS,
    unit="frames",
)
make_card = ABOUT.make_card

if __name__ == "__main__":
    main()
