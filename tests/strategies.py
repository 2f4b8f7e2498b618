"""Hypothesis strategies: random mask texts, ragged lengths, the fields that fit them, and layouts that hold them."""

from typing import NamedTuple

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st

import oracle
from hf_dynmask.layout import SequenceLayout
from hf_dynmask.plan import MaskPlan


def examples(number):
    """Settings for a property: `number` examples, the same ones on every run."""
    return settings(max_examples=number, deadline=None, derandomize=True, database=None)


# Leaves as templates: {i} stands for an index from 0, {n} for a size from 1.
FIELD_FREE = ["full", "causal", "backward", "diagonal", "window({i})", "window({i}, {i})", "dilated({i}, {n})"]
FIELD_FREE += ["chunk({n})", "chunk_causal({n})", "prefix({i})", "span({i}, {i})"]
FIELDS = ["prefix", "visible", "segments"]
OPERATORS = ["{}", "~{}", "~({})", "{} & {}", "{} | {}"]
OPERATORS += ["{} & ({})", "({}) & {}", "({}) & ({})", "{} | ({})", "({}) | {}", "({}) | ({})"]


@st.composite
def leaves(draw, templates=FIELD_FREE + FIELDS):
    text = draw(st.sampled_from(templates))
    while "{" in text:
        name, number = ("{i}", st.integers(0, 12)) if "{i}" in text else ("{n}", st.integers(1, 7))
        text = text.replace(name, str(draw(number)), 1)
    return text


@st.composite
def texts(draw, depth=4, templates=FIELD_FREE + FIELDS):
    """Mask texts of operators nested up to `depth`, with and without parentheses."""
    if depth == 0:
        return draw(leaves(templates))
    operator = draw(st.sampled_from(OPERATORS))
    operands = (draw(texts(draw(st.integers(0, depth - 1)), templates)) for _ in range(operator.count("{}")))
    return operator.format(*operands)


@st.composite
def lengths(draw, max_length=17, max_rows=4):
    """Lengths of a ragged batch: zeros, ones, equal and odd lengths, also a single row."""
    length = st.sampled_from([0, *range(max_length + 1)])
    if draw(st.booleans()):
        return draw(st.lists(length, min_size=1, max_size=max_rows))
    return [draw(length)] * draw(st.integers(2, max_rows))


class Batch(NamedTuple):
    text: str
    lengths: list[int]
    fields: dict[str, torch.Tensor]


@st.composite
def batches(draw, text=None, ragged=None):
    """A mask text, lengths, and one tensor for every field any text may read."""
    ragged = draw(lengths() if ragged is None else ragged)
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows, width = len(ragged), max(ragged)
    fields = {
        "segment_ids": random.integers(0, 3, (rows, width)),
        "prefix_lengths": random.integers(0, width + 2, rows),
        "hidden_spans": random.integers(0, width + 2, (rows, draw(st.integers(0, 3)), 2)),
    }
    tensors = {name: torch.from_numpy(field) for name, field in fields.items()}
    return Batch(draw(texts() if text is None else text), ragged, tensors)


@st.composite
def layouts(draw, sizes, flat):
    """Layouts of `sizes`: flat, padded on the right, or holed; in the batch's order or sorted by length."""
    width = max(sizes) + draw(st.integers(0, 3))
    if flat:
        layout = SequenceLayout.from_lengths(torch.tensor(sizes))
    elif draw(st.booleans()):
        layout = SequenceLayout.from_lengths(torch.tensor(sizes), (len(sizes), width))
    else:
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
        places = torch.rand(len(sizes), width, generator=generator).argsort(1)
        layout = SequenceLayout.from_attention_mask(places < torch.tensor(sizes)[:, None])
    return layout.by_length() if draw(st.booleans()) else layout


class Case(NamedTuple):
    """A mask over queries and keys; `batch` is in the oracle's terms, `fields` are the same in those of the layout."""

    batch: Batch
    key_lengths: list[int]
    layout: SequenceLayout
    key_layout: SequenceLayout
    fields: dict[str, torch.Tensor]
    block_size: int

    def plan(self):
        return MaskPlan(self.batch.text, self.layout, self.key_layout, fields=self.fields, block_size=self.block_size)

    def oracle_masks(self):
        """What each sequence's queries may see, in the order in which the batch names its sequences."""
        dense = oracle.dense_mask(self.batch.text, self.batch.lengths, self.key_lengths, self.batch.fields)
        return [cells[:q, :k] for cells, q, k in zip(dense, self.batch.lengths, self.key_lengths, strict=True)]


@st.composite
def cases(draw):
    """Self-attention, or attention to sequences of other lengths under a mask that reads no field of the keys."""
    flat = draw(st.booleans())
    if draw(st.integers(0, 3)):
        batch = draw(batches())
        layout = key_layout = draw(layouts(batch.lengths, flat))
        key_lengths = batch.lengths
    else:
        batch = draw(batches(texts(templates=[*FIELD_FREE, "prefix", "visible"])))
        key_lengths = draw(st.lists(st.integers(0, 17), min_size=len(batch.lengths), max_size=len(batch.lengths)))
        layout, key_layout = draw(layouts(batch.lengths, flat)), draw(layouts(key_lengths, flat))
    ids = [batch.fields["segment_ids"][b, : batch.lengths[b]] for b in layout.rank]
    fields = batch.fields | {"segment_ids": layout.unflatten(torch.cat(ids)[None], fill=-7)}
    return Case(batch, key_lengths, layout, key_layout, fields, draw(st.integers(1, 9)))
