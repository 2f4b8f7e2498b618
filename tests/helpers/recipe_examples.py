"""Inputs of a recipe in a test: a small stock checkpoint and a few texts with labels."""

from pathlib import Path

import torch
from transformers import BertConfig, BertModel, BertTokenizer

WORDS = ["the", "film", "plot", "was", "is", "not", "very", "good", "bad"]


def write_examples(folder: Path) -> None:
    """A checkpoint without a head, `model`, and 72 texts with labels, `notes.csv`."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    BertTokenizer({word: i for i, word in enumerate(vocabulary)}).save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    BertModel(config).save_pretrained(folder / "model")
    rows = [f"{' '.join(WORDS[k * n % 9] for n in range(4 + 5 * k % 17))},{k % 2}" for k in range(1, 73)]
    (folder / "notes.csv").write_text("\n".join(["text,label", *rows]) + "\n")
