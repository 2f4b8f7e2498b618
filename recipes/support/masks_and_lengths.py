"""Describes the masks of a model and the lengths of its training rows: as plain values, in words, and as a figure."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from transformers import PreTrainedConfig

from hf_dynmask.modeling.masks import And, Leaf, Mask, Not, Or, head_runs, parse
from hf_dynmask.tools.audit import histogram
from hf_dynmask.tools.plotting import COLOURS, plot_mask

Described = dict[str, Any]

# What a token sees, for each leaf of the mask language. Leaves that read a field instead of an argument have their own.
WORDS = {
    "full": "every token",
    "causal": "itself and the tokens before it",
    "backward": "itself and the tokens after it",
    "diagonal": "itself",
    "window": "the tokens from {left} before it to {right} after it",
    "dilated": "the tokens up to {width} away, at distances that {step} divides",
    "chunk": "the tokens of its own chunk of {size}",
    "chunk_causal": "the tokens of its own and of earlier chunks of {size}",
    "prefix": "the first {n} tokens",
    "span": "the {length} tokens from position {start} on",
    "visible": "the tokens outside of `hidden_spans`",
    "segments": "the tokens of its own segment (`segment_ids`)",
    "shared_question": "the tokens of segment 0 and of its own (`segment_ids`)",
    "global_tokens": "the first {n} tokens, or every token if it is one of them",
    "random": "a random share of {keep} of the tokens (seed {seed})",
    "dense": "the tokens that the batch's `attention_mask` allows",
    "topk": "the {n} tokens with the highest learned scores",
    "custom": "the tokens that `{predicate}` allows",
    "heads": "by head: ",
    "select": "by `mask_choice` of its row: ",
}
WORDS_OF_FIELDS = {
    "prefix": "the tokens before the end of the prefix (`prefix_lengths`)",
    "global_tokens": "the tokens marked in `global_tokens`, or every token if it is marked itself",
}


# --- As plain values -------------------------------------------------------------------------------------------------


def describe_masks(config: PreTrainedConfig) -> dict[str, str]:
    """
    The mask expressions of a model, by the layers and heads that have them.

    Args:
        config ([`~transformers.PreTrainedConfig`]): A `DynMaskConfig` or `DynMaskSeq2SeqConfig`.
    """
    if not config.is_encoder_decoder:
        return _by_layer("attention", config, config.masks())
    encoder, decoder = config.encoder, config.decoder
    crossing = [parse(decoder.cross_mask)] * decoder.num_hidden_layers
    return (
        _by_layer("encoder", encoder, encoder.masks())
        | _by_layer("decoder", decoder, decoder.masks())
        | _by_layer("cross-attention", decoder, crossing)
    )


def _by_layer(side: str, config: Any, masks: Sequence[Mask]) -> dict[str, str]:
    """Groups neighbouring layers with equal expressions and, if heads differ, neighbouring heads."""
    heads = config.num_attention_heads
    found = {}
    for mask, group in groupby(range(len(masks)), key=lambda layer: masks[layer]):
        layers = list(group)
        for run, run_mask in head_runs(mask, heads):
            places = [_places("layer", layers, len(masks)), _places("head", range(heads)[run], heads)]
            found[", ".join(filter(None, [side, *places]))] = str(run_mask)
    return found


def _places(what: str, numbers: Sequence[int], count: int) -> str:
    """Names a range of layers or heads. Empty if it is all of them."""
    if len(numbers) == count:
        return ""
    return f"{what} {numbers[0]}" if len(numbers) == 1 else f"{what}s {numbers[0]} to {numbers[-1]}"


def describe_lengths(lengths: Iterable[int]) -> Described:
    """
    Statistics of the lengths of rows.

    Args:
        lengths (`list[int]`): The length of each row.

    Returns:
        `dict`: `mean`; `quartiles`, including minimum and maximum; `counts` of rows in bins of `width` lengths, which
        begin at the minimum.
    """
    numbers = list(lengths)
    first, *_ = bins = histogram(numbers)
    return {
        "mean": float(np.mean(numbers)),
        "quartiles": np.quantile(numbers, [0, 0.25, 0.5, 0.75, 1], method="inverted_cdf").tolist(),
        "width": first.last - first.first + 1,
        "counts": [each.count for each in bins],
    }


# --- In words --------------------------------------------------------------------------------------------------------


def mask_in_words(mask: Mask) -> str:
    """Describes what a token sees of its sequence."""
    match mask:
        case And():
            first, *rest = map(_operand, mask.parts)
            return f"{first}, restricted to {' and to '.join(rest)}"
        case Or():
            return " as well as ".join(map(_operand, mask.parts))
        case Not():
            return f"all but {_operand(mask.mask)}"
    assert isinstance(mask, Leaf)
    words = WORDS_OF_FIELDS if mask.name in WORDS_OF_FIELDS and mask.fields else WORDS
    return words[mask.name].format_map(vars(mask)) + "; ".join(map(mask_in_words, mask.parts))


def _operand(mask: Mask) -> str:
    words = mask_in_words(mask)
    return words if isinstance(mask, Leaf) else f"({words})"


def masks_in_words(masks: Mapping[str, str]) -> str:
    """A Markdown list of the masks that [`describe_masks`] returns."""
    return "\n".join(
        f"- {who}: `{text}`. "
        + ("In the source, each token of the target" if who.startswith("cross") else "In its own sequence, each token")
        + f" sees {mask_in_words(parse(text))}."
        for who, text in masks.items()
    )


def lengths_in_words(lengths: Mapping[str, Described]) -> str:
    """A Markdown list of the lengths of each column, as [`describe_lengths`] returns them."""
    lines = []
    for column, described in lengths.items():
        least, lower, middle, upper, most = (f"{quartile:,}" for quartile in described["quartiles"])
        lines.append(
            f"- `{column}`: from {least} to {most}, half of them from {lower} to {upper}; "
            f"median {middle}, mean {described['mean']:,.1f}."
        )
    return "\n".join(lines)


# --- As a figure -----------------------------------------------------------------------------------------------------


def draw(results: Described) -> Figure:
    """
    Draws a panel for each mask, over three sequences whose lengths are the quartiles of the training rows, and a panel
    for the lengths of each column.

    Args:
        results (`dict`): Has `masks` from [`describe_masks`], and `lengths` from [`describe_lengths`].
    """
    lengths = list(results["lengths"].items())
    panels = []
    for who, text in results["masks"].items():
        if not who.startswith("cross"):  # cross-attention has queries on one side and keys on the other
            panels.append((_draw_mask, who, text, lengths[-1 if who.startswith("decoder") else 0][1]))
    panels += [(_draw_lengths, column, described) for column, described in lengths]
    rows = -(-len(panels) // 2)
    figure = Figure(figsize=(9, 4.2 * rows), layout="constrained")
    for place, (draw_panel, *content) in enumerate(panels):
        draw_panel(figure.add_subplot(rows, 2, place + 1), *content)
    return figure


def _draw_mask(axis: Any, who: str, text: str, lengths: Described) -> None:
    _, *quartiles, _ = lengths["quartiles"]
    plot_mask(parse(text).without_choice(), quartiles, ax=axis)
    axis.set_ylabel(f"{who}: query position")


def _draw_lengths(axis: Any, column: str, lengths: Described) -> None:
    least, width, counts = lengths["quartiles"][0], lengths["width"], lengths["counts"]
    starts = [least + k * width - 0.5 for k in range(len(counts))]
    axis.bar(starts, counts, width, align="edge", color=COLOURS["full"])
    axis.axvline(lengths["mean"], color=COLOURS["allowed"], label="mean")
    axis.set_xlabel(f"length of {column}")
    axis.set_ylabel("training rows")
    axis.legend(frameon=False)
