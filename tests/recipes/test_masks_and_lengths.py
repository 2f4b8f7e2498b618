"""What model cards say and show of masks and lengths."""

import random
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_hex

from hf_dynmask import DynMaskConfig, DynMaskSeq2SeqConfig
from hf_dynmask.modeling.masks import Leaf, parse, register
from hf_dynmask.tools.plotting import COLOURS
from support.masks_and_lengths import (
    WORDS,
    describe_lengths,
    describe_masks,
    draw,
    lengths_in_words,
    mask_in_words,
    masks_in_words,
)

SIZES: dict[str, Any] = {"vocab_size": 9, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4}


# --- Masks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config, expected",
    [
        (DynMaskConfig(**SIZES), {"attention": "full"}),
        (
            DynMaskConfig(**SIZES, layer_masks=["full", "window(2)", "window(2)"]),
            {"attention, layer 0": "full", "attention, layers 1 to 2": "window(2, 2)"},
        ),
        (
            DynMaskConfig(**SIZES, mask="heads(full, causal & topk(2), causal & topk(2), diagonal)"),
            {
                "attention, head 0": "full",
                "attention, heads 1 to 2": "causal & topk(2)",
                "attention, head 3": "diagonal",
            },
        ),
        (
            DynMaskSeq2SeqConfig(**SIZES, encoder={"mask": "window(3)"}),
            {"encoder": "window(3, 3)", "decoder": "causal", "cross-attention": "full"},
        ),
    ],
)
def test_masks_of_a_model(config, expected):
    assert describe_masks(config) == expected


@pytest.mark.parametrize(
    "text, words",
    [
        ("full", "every token"),
        (
            "causal & window(9, 0)",
            "itself and the tokens before it, restricted to the tokens from 9 before it to 0 after it",
        ),
        ("causal | prefix(4)", "itself and the tokens before it as well as the first 4 tokens"),
        ("~span(3, 5)", "all but the 5 tokens from position 3 on"),
        (
            "causal & window(2) & chunk(8)",
            "itself and the tokens before it, restricted to the tokens from 2 before it to 2 after it and to the "
            "tokens of its own chunk of 8",
        ),
        ("~(diagonal | chunk(8))", "all but (itself as well as the tokens of its own chunk of 8)"),
        ("prefix", "the tokens before the end of the prefix (`prefix_lengths`)"),
        ("global_tokens", "the tokens marked in `global_tokens`, or every token if it is marked itself"),
        ("heads(full, diagonal)", "by head: every token; itself"),
        ("random(0.5, 7)", "a random share of 0.5 of the tokens (seed 7)"),
    ],
)
def test_words(text, words):
    assert mask_in_words(parse(text)) == words


def leaves(kind: type = Leaf) -> set[str]:
    names = {kind.name} if "name" in vars(kind) else set()
    return names.union(*(leaves(each) for each in kind.__subclasses__()))


def test_there_are_words_for_the_whole_language():
    register("near", lambda i, j: (i - j).abs() < 2)
    texts = "full causal backward diagonal window(2) dilated(4,2) chunk(2) chunk_causal(2) prefix(2) prefix span(1,2) "
    texts += "visible segments shared_question global_tokens(1) global_tokens random(0.5,1) dense heads(full) "
    texts += "select(full) topk(2) custom(near)"
    found = [parse(text) for text in texts.split()]
    assert {type(mask).name for mask in found if isinstance(mask, Leaf)} == leaves() == WORDS.keys()
    assert all("{" not in mask_in_words(mask) and "None" not in mask_in_words(mask) for mask in found)


def test_sentences():
    masks = {"decoder": "causal", "cross-attention": "full"}
    assert masks_in_words(masks) == (
        "- decoder: `causal`. In its own sequence, each token sees itself and the tokens before it.\n"
        "- cross-attention: `full`. In the source, each token of the target sees every token."
    )


# --- Lengths ---------------------------------------------------------------------------------------------------------


def test_lengths():
    draws = random.Random(0)
    lengths = [draws.randint(3, 200) for _ in range(999)]
    found = describe_lengths(lengths)
    assert found["mean"] == pytest.approx(np.mean(lengths))
    ordered = sorted(lengths)
    assert found["quartiles"] == [ordered[k] for k in (0, 249, 499, 749, 998)]
    edges = found["quartiles"][0] + found["width"] * np.arange(len(found["counts"]) + 1)
    assert found["counts"] == np.histogram(lengths, edges)[0].tolist()
    assert sum(found["counts"]) == 999


def test_equal_lengths():
    assert describe_lengths([7, 7]) == {"mean": 7.0, "quartiles": [7] * 5, "width": 1, "counts": [2]}


def test_lengths_in_words():
    described = {"input_ids": {"mean": 1234.56, "quartiles": [2, 30, 400, 5000, 60000], "width": 1, "counts": [9]}}
    expected = "- `input_ids`: from 2 to 60,000, half of them from 30 to 5,000; median 400, mean 1,234.6."
    assert lengths_in_words(described) == expected


# --- The figure ------------------------------------------------------------------------------------------------------


def test_figure():
    """Masks over sequences as long as the quartiles, of their own side; bars as high as the counts."""
    lengths = {"input_ids": describe_lengths([1, 2, 2, 4]), "labels": describe_lengths([3, 5, 6, 9])}
    masks = {"encoder": "full", "decoder": "causal & topk(2)", "cross-attention": "full"}
    encoder, decoder, *bars = draw({"masks": masks, "lengths": lengths}).axes
    assert (encoder.get_xlim(), decoder.get_xlim()) == ((0, 1 + 2 + 2), (0, 3 + 5 + 6))
    assert (encoder.get_title(loc="left"), decoder.get_title(loc="left")) == ("full", "causal & full")
    assert decoder.get_ylabel() == "decoder: query position"
    for axis, (column, of_rows) in zip(bars, lengths.items(), strict=True):
        assert axis.get_xlabel() == f"length of {column}"
        patches: Any = axis.patches
        assert [bar.get_height() for bar in patches] == of_rows["counts"]
        assert [bar.get_x() + 0.5 for bar in patches][0] == of_rows["quartiles"][0]
        assert {to_hex(bar.get_facecolor()).upper() for bar in patches} == {COLOURS["full"]}
        assert np.asarray(axis.lines[0].get_xdata()).tolist() == [of_rows["mean"]] * 2
