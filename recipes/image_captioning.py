"""
Trains an encoder-decoder from random weights to caption pictures, with the stock `Seq2SeqTrainer`. Batches hold patches
and lengths: a picture of any size is a sequence of its own length.

    python recipes/image_captioning.py

uses small pictures with captions. To also train the same model on padded batches:

    python recipes/image_captioning.py --baseline

With a folder of your own pictures and a `metadata.csv` with the columns `file_name` and `text`:

    python recipes/image_captioning.py --dataset path/to/folder --max_side 256 --num_hidden_layers 8

All options of `Seq2SeqTrainingArguments` apply. Results, model card and model are written to `--output_dir`.
"""

import support.threads  # noqa: F401

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import sacrebleu
import torch
from datasets import Array2D, DatasetDict, Features, List, Value
from PIL import Image
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from transformers import (
    AutoModelForSeq2SeqLM,
    EvalPrediction,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    set_seed,
)

from hf_dynmask import DataCollatorForSeq2SeqWithLengths, DynMaskForConditionalGeneration, DynMaskSeq2SeqConfig
from hf_dynmask.data import patch_positions, patches
from support.common import CommonArguments, parse_arguments, special_token_ids
from support.measuring import best_constant, without_lengths
from support.reporting import About, train_and_report
from support.samples import resolve_files

PAD, START, END = "<pad>", "<s>", "</s>"


def main(arguments: list[str] | None = None) -> None:
    recipe, training = parse_arguments([RecipeArguments, Seq2SeqTrainingArguments], arguments, DEFAULTS)

    texts = resolve_files(recipe.dataset)
    tokenizer = make_tokenizer(texts["train"]["text"], recipe.vocab_size)
    data = extract_features(texts, tokenizer, recipe)

    set_seed(training.seed)
    model = make_model(recipe, tokenizer)
    collator = DataCollatorForSeq2SeqWithLengths(tokenizer, model)
    trainer = Seq2SeqTrainer(
        model,
        training,
        data_collator=collator,
        train_dataset=data["train"],
        eval_dataset=data["test"],  # pyright: ignore[reportArgumentType]: annotated for data sets of torch only
        processing_class=tokenizer,
        compute_metrics=partial(overlap, tokenizer=tokenizer),
    )

    train_and_report(
        ABOUT,
        recipe,
        trainer,
        AutoModelForSeq2SeqLM.from_pretrained,
        {"padded": (copy.deepcopy(model), without_lengths(collator))} if recipe.baseline else {},
        settings={"dropout": recipe.dropout},
        trivial=best_constant(texts, "chrf", character_f_score),
    )


# --- Data ------------------------------------------------------------------------------------------------------------


def make_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level byte-pair encoding learned from the texts."""
    pairs = ByteLevelBPETokenizer()
    pairs.train_from_iterator(iter(texts), vocab_size, special_tokens=[PAD, START, END], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=pairs, pad_token=PAD, bos_token=START, eos_token=END)


def extract_features(texts: DatasetDict, tokenizer: PreTrainedTokenizerFast, recipe: "RecipeArguments") -> DatasetDict:
    """Computes the columns that the model reads from `file_name` and `text`."""

    def extract(row: dict[str, str]) -> dict[str, Any]:
        ids = tokenizer(row["text"])["input_ids"][: recipe.max_target_tokens - 1]
        picture = read_picture(row["file_name"], recipe.max_side, recipe.patch)
        return {name: values.numpy() for name, values in picture.items()} | {"labels": [*ids, tokenizer.eos_token_id]}

    features = Features(
        input_features=Array2D((None, 3 * recipe.patch**2), "float32"),
        position_ids=List(Value("int64")),
        labels=List(Value("int64")),
    )
    data = texts.map(extract, features=features, remove_columns=texts["train"].column_names, desc="Patches")
    return data.with_format("torch")


def read_picture(file: str, max_side: int, patch: int) -> dict[str, Tensor]:
    """The patches of a picture and their positions: `input_features (T, 3 * patch**2)` and `position_ids (T,)`.

    Pixels range from -1 (black) to 0 (white, the background).
    """
    with Image.open(file) as opened:
        drawn = opened.convert("RGBA")
    picture = Image.alpha_composite(Image.new("RGBA", drawn.size, "white"), drawn).convert("RGB")
    picture.thumbnail((max_side, max_side))
    pixels = torch.tensor(np.asarray(picture)).permute(2, 0, 1) / 255 - 1
    return {
        "input_features": patches(pixels, patch),
        "position_ids": patch_positions(pixels, patch, columns=-(-max_side // patch)),
    }


# --- Model -----------------------------------------------------------------------------------------------------------


def make_model(recipe: "RecipeArguments", tokenizer: PreTrainedTokenizerFast) -> DynMaskForConditionalGeneration:
    """A model with random weights."""
    columns = -(-recipe.max_side // recipe.patch)
    side: dict[str, Any] = {
        "hidden_size": recipe.hidden_size,
        "intermediate_size": 4 * recipe.hidden_size,
        "num_hidden_layers": recipe.num_hidden_layers,
        "num_attention_heads": recipe.hidden_size // 64,
        "norm_placement": "pre",
        "initializer_range": recipe.hidden_size**-0.5,  # the usual 0.02 is too small for a small model
        "hidden_dropout_prob": recipe.dropout,
        "attention_probs_dropout_prob": recipe.dropout,
    }
    ids = special_token_ids(tokenizer)
    config = DynMaskSeq2SeqConfig(
        encoder=side | {"num_features": 3 * recipe.patch**2, "max_position_embeddings": columns**2},
        decoder=side | {"vocab_size": len(tokenizer), "max_position_embeddings": recipe.max_target_tokens},
        decoder_start_token_id=ids["bos_token_id"],
        **ids,
    )
    model = DynMaskForConditionalGeneration(config)
    model.generation_config.update(max_length=recipe.max_target_tokens)
    return model


# --- Measuring -------------------------------------------------------------------------------------------------------


def overlap(prediction: EvalPrediction, tokenizer: Any) -> dict[str, float]:
    def decode(ids: Any) -> list[str]:
        return tokenizer.batch_decode(np.where(ids < 0, tokenizer.pad_token_id, ids), skip_special_tokens=True)

    return character_f_score(decode(prediction.label_ids), decode(prediction.predictions))


def character_f_score(texts: list[str], answers: list[str]) -> dict[str, float]:
    """chrF, from 0 to 100 (Popović, 2015)."""
    return {"chrf": sacrebleu.corpus_chrf(answers, [texts]).score}


# --- Arguments and model card ----------------------------------------------------------------------------------------


@dataclass
class RecipeArguments(CommonArguments):
    dataset: str = field(
        default="sample:pictures", metadata={"help": "A folder of pictures with `metadata.csv`, or a sample."}
    )
    max_side: int = field(default=128, metadata={"help": "Longest side in pixels; larger pictures are scaled down."})
    patch: int = field(default=16, metadata={"help": "Side of a patch in pixels."})
    max_target_tokens: int = field(default=32, metadata={"help": "Longer captions are truncated."})
    vocab_size: int = field(default=1000, metadata={"help": "Size of the vocabulary learned from the captions."})
    hidden_size: int = field(default=192, metadata={"help": "Hidden size of both sides, with heads of 64."})
    num_hidden_layers: int = field(default=3, metadata={"help": "Layers of each side."})
    dropout: float = field(default=0.2, metadata={"help": "Dropout of hidden states and attention weights."})


DEFAULTS = {
    "output_dir": "outputs/image_captioning",
    "num_train_epochs": 30,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 40,
    "learning_rate": 1e-3,
    "predict_with_generate": True,
    "generation_num_beams": 4,
    "logging_steps": 50,
}
USAGE = """
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
from image_captioning import read_picture  # recipes/image_captioning.py

model = AutoModelForSeq2SeqLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
picture = {name: values[None] for name, values in read_picture("picture.png", max_side=128, patch=16).items()}
tokenizer.decode(model.generate(**picture)[0], skip_special_tokens=True)
"""
LIMITS = "It describes every picture in terms of its training captions, even if the picture shows something else."
ABOUT = About(
    recipe="image_captioning",
    task="image-to-text",
    metrics=["chrf"],
    title="Image captioning",
    usage=USAGE,
    limits=LIMITS,
    unit="patches and tokens",
)
make_card = ABOUT.make_card

if __name__ == "__main__":
    main()
