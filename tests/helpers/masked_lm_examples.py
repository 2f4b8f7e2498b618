"""Masked language modeling: a small vocabulary, examples, and the batches that a collator makes from them."""

from functools import cache

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from transformers import PreTrainedTokenizerFast

from hf_dynmask.data import DataCollatorForDynamicMasking

SPECIAL = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
PAD, UNK, CLS, SEP, MASK = range(5)
WORDS = range(5, 145)  # ids of tokens that begin a word
PIECES = range(145, 205)  # ids of tokens that continue one


@cache
def make_tokenizer(word="w{}", piece="##{}", **special):
    tokens = [*SPECIAL.values(), *(word.format(i) for i in WORDS), *(piece.format(i) for i in PIECES)]
    backend = Tokenizer(WordPiece({token: i for i, token in enumerate(tokens)}, unk_token="[UNK]"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{**SPECIAL, **special})


def make(epoch: int | None = 0, **settings):
    collator = DataCollatorForDynamicMasking(make_tokenizer(), **settings)
    if epoch is not None:
        collator.set_epoch(epoch)
    return collator


def texts(number, least=40, most=60, seed=0):
    """Examples of random ids, [CLS] ... [SEP]; a third of the tokens continue a word."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(least, most, number, endpoint=True)
    pieces = [generator.random(length) < 0.3 for length in lengths]
    rows = [np.where(piece, *(generator.choice(kind, len(piece)) for kind in (PIECES, WORDS))) for piece in pieces]
    return [{"input_ids": [CLS, *row.tolist(), SEP]} for row in rows]


def collated(batches):
    """The batches' sequences, by what they were before masking: `{ids: (ids, labels)}`."""
    seen = {}
    for batch in batches:
        for ids, labels, length in zip(batch["input_ids"], batch["labels"], batch["lengths"], strict=True):
            ids, labels = ids[:length], labels[:length]
            seen[tuple(torch.where(labels == -100, ids, labels).tolist())] = (ids.tolist(), labels.tolist())
    return seen
