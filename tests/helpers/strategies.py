"""Hypothesis strategies: random mask texts, ragged lengths, the fields that fit them, and layouts that hold them."""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st

import oracle
from hf_dynmask import masks
from hf_dynmask.modeling.layout import SequenceLayout
from hf_dynmask.modeling.plan import MaskPlan

for predicate in oracle.PREDICATES:
    masks.register(predicate, oracle.PREDICATES[predicate])


def examples(number):
    """Settings for a property: `number` examples, the same ones on every run."""
    return settings(max_examples=number, deadline=None, derandomize=True, database=None)


# Leaves as templates; NUMBERS says what may stand at each mark.
FIELD_FREE = ["full", "causal", "backward", "diagonal", "window({i})", "window({i}, {i})", "dilated({i}, {n})"]
FIELD_FREE += ["chunk({n})", "chunk_causal({n})", "prefix({i})", "span({i}, {i})", "global_tokens({i})"]
BY_CELL = ["random({keep}, {seed})", *(f"custom({name})" for name in oracle.PREDICATES), "dense", "topk({n})"]
LEAVES = [*FIELD_FREE, "prefix", "visible", "segments", "shared_question", "global_tokens", *BY_CELL]
NUMBERS = {
    "{i}": st.integers(0, 12),
    "{n}": st.integers(1, 7),
    "{keep}": st.sampled_from([0, 0.25, 0.5, 0.9, 1.0]),
    "{seed}": st.one_of(st.integers(0, 9), st.integers(0, 2**32 - 1)),
}
OPERATORS = ["{}", "~{}", "~({})", "{} & {}", "{} | {}"]
OPERATORS += ["{} & ({})", "({}) & {}", "({}) & ({})", "{} | ({})", "({}) | {}", "({}) | ({})"]


@st.composite
def leaves(draw, templates=LEAVES):
    text = draw(st.sampled_from(templates))
    for mark, numbers in NUMBERS.items():
        while mark in text:
            text = text.replace(mark, str(draw(numbers)), 1)
    return text


def options_of(name, counts):
    """Templates of `heads` or `select` with each of some numbers of masks."""
    return [f"{name}({', '.join(['{}'] * count)})" for count in counts]


@st.composite
def texts(draw, depth=4, templates=LEAVES, heads=1, choices=1):
    """Mask texts of operators nested up to `depth`, for a number of heads and of choices that a row has."""
    if depth == 0:
        return draw(leaves(templates))
    divisors = [count for count in range(1, heads + 1) if heads % count == 0]
    operators = OPERATORS + options_of("heads", divisors) + options_of("select", [choices])
    operator = draw(st.sampled_from(operators))
    if "~" in operator:  # which topk has no meaning for
        templates = [template for template in templates if "topk" not in template]
    depths = [draw(st.integers(0, depth - 1)) for _ in range(operator.count("{}"))]
    return operator.format(*(draw(texts(below, templates, heads, choices)) for below in depths))


@st.composite
def lengths(draw, max_length=17, max_rows=4):
    """Lengths of a ragged batch: zeros, ones, equal and odd lengths, also a single row."""
    length = st.sampled_from([0, *range(max_length + 1)])
    if draw(st.booleans()):
        return draw(st.lists(length, min_size=1, max_size=max_rows))
    return [draw(length)] * draw(st.integers(2, max_rows))


class Batch(NamedTuple):
    """A mask text for so many heads, a batch in the oracle's terms, and one tensor for every field a text may read."""

    text: str
    heads: int
    lengths: list[int]
    key_lengths: list[int]
    fields: dict[str, torch.Tensor]

    @property
    def key_heads(self):
        return 2 if self.heads % 2 == 0 else 1

    @property
    def dense(self):
        return oracle.dense_mask(self.text, self.lengths, self.key_lengths, self.fields, self.heads)


def batch_of(text, sizes, key_sizes=None, heads=1, choices=1, seed=0):
    """A batch with random fields; `choices` is the number of masks that each `select` of the text has."""
    random = np.random.default_rng(seed)
    batch = Batch(text, heads, sizes, sizes if key_sizes is None else key_sizes, {})
    rows, queries, keys = len(sizes), max(sizes), max(batch.key_lengths)
    mask_heads = [(), (1,), (heads,)][random.integers(3)]
    score_heads = random.choice([1, batch.key_heads])  # query heads of one key head share their scores
    key_scores = random.integers(-6, 6, (rows, score_heads, keys)) / 4  # with ties, exact in every dtype
    fields = {
        "segment_ids": random.integers(0, 3, (rows, queries)),
        "global_tokens": random.random((rows, queries)) < 0.2,
        "prefix_lengths": random.integers(0, queries + 2, rows),
        "hidden_spans": random.integers(0, queries + 2, (rows, random.integers(4), 2)),
        "mask_choice": random.integers(0, choices, rows),
        "attention_mask": random.random((rows, *mask_heads, queries, keys)) < 0.7,
        "key_scores": key_scores if score_heads == 1 else key_scores.repeat(heads // score_heads, axis=1),
    }
    if key_sizes is not None:
        fields["key_segment_ids"] = random.integers(0, 3, (rows, keys))
        fields["key_global_tokens"] = random.random((rows, keys)) < 0.2
    return batch._replace(fields={name: torch.from_numpy(field) for name, field in fields.items()})


@st.composite
def batches(draw, text=None, ragged=None, templates=LEAVES, heads=(1, 2, 3, 4), choices=(1, 2, 3), cross=None):
    """Batches of self-attention or, one in four or as `cross` says, of attention to sequences of other lengths."""
    sizes, key_sizes = draw(lengths() if ragged is None else ragged), None
    if draw(st.integers(0, 3)) == 0 if cross is None else cross:
        key_sizes = draw(st.lists(st.integers(0, 17), min_size=len(sizes), max_size=len(sizes)))
    heads, choices = draw(st.sampled_from(heads)), draw(st.sampled_from(choices))
    text = draw(texts(templates=templates, heads=heads, choices=choices) if text is None else text)
    return batch_of(text, sizes, key_sizes, heads, choices, draw(st.integers(0, 2**32 - 1)))


class Side(NamedTuple):
    """The queries or the keys of a batch.

    Sequence b stands in row `rows[b]`; its positions `positions[b]` are there, at the columns `columns[b]`.
    """

    layout: SequenceLayout
    rows: list[int]
    positions: list[np.ndarray]
    columns: list[np.ndarray]

    def spread(self, table, fill):
        """Values by sequence and position `(S, L, ...)` in the batch's layout `(B, T, ...)`."""
        batch = np.full((*self.layout.shape, *table.shape[2:]), fill, table.numpy().dtype)
        for row, columns, positions, values in zip(self.rows, self.columns, self.positions, table, strict=True):
            batch[row, columns] = values[positions]
        return torch.from_numpy(batch)

    def flat(self, table):
        """Values by sequence and position `(S, H, L)` as flat `(1, H, N)`."""
        return torch.cat([values[:, own] for values, own in zip(table, self.positions, strict=True)], dim=-1)[None]


def flat_side(sizes):
    """Sequences end to end in one row."""
    ends = np.cumsum([0, *sizes])
    columns = [np.arange(ends[b], ends[b + 1]) for b in range(len(sizes))]
    layout = SequenceLayout.from_lengths(torch.tensor(sizes), (1, int(ends[-1])))
    return Side(layout, [0] * len(sizes), [np.arange(size) for size in sizes], columns)


@st.composite
def row_sides(draw, sizes):
    """A row for each sequence, padded on the right or with absent tokens anywhere."""
    width = max(sizes) + draw(st.integers(0, 3))
    rows, shape = list(range(len(sizes))), (len(sizes), width)
    positions = [np.arange(size) for size in sizes]
    if draw(st.booleans()):
        return Side(SequenceLayout.from_lengths(torch.tensor(sizes), shape), rows, positions, positions)
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    columns = [np.sort(random.permutation(width)[:size]) for size in sizes]
    layout = SequenceLayout.from_attention_mask(torch.from_numpy(filled(shape, rows, columns)))
    return Side(layout, rows, positions, columns)


@st.composite
def sides(draw, sizes, flat):
    """Sequences flat or in rows; with missing tokens or none."""
    side = flat_side(sizes) if flat else draw(row_sides(sizes))
    return without_some(side, draw(st.integers(0, 2**32 - 1))) if draw(st.integers(0, 3)) == 0 else side


def without_some(side, seed=0):
    """The side with some of its tokens missing: the others keep their positions."""
    random = np.random.default_rng(seed)
    kept = [random.random(len(own)) < 0.7 for own in side.positions]
    positions, columns = (
        [own[here] for own, here in zip(all_, kept, strict=True)] for all_ in (side.positions, side.columns)
    )
    missing = ~filled(side.layout.shape, side.rows, columns)
    return Side(side.layout.without(torch.from_numpy(missing)), side.rows, positions, columns)


def filled(shape, rows, columns):
    """Bool array of `shape`: True at some columns of some rows."""
    cells = np.zeros(shape, dtype=bool)
    for row, own in zip(rows, columns, strict=True):
        cells[row, own] = True
    return cells


@dataclass(frozen=True)
class Case:
    """A batch laid out; `fields` are the batch's in the terms of the layout, `key_scores` flat `(1, 1 | Hk, Nk)`."""

    batch: Batch
    queries: Side
    keys: Side
    fields: dict[str, torch.Tensor]
    key_scores: torch.Tensor | None  # None: nothing chooses by them
    block_size: int

    @property
    def layout(self):
        return self.queries.layout

    @property
    def key_layout(self):
        return self.keys.layout

    def plan(self):
        return MaskPlan(self.batch.text, self.layout, self.key_layout, fields=self.fields, block_size=self.block_size)

    @property
    def head_scores(self):
        """The scores of the keys `(1, 1 | H, Nk)`, for each query head."""
        if self.key_scores is None or self.key_scores.shape[1] == 1:
            return self.key_scores
        return self.key_scores.repeat_interleave(self.batch.heads // self.batch.key_heads, 1)

    @cached_property
    def oracle_masks(self):
        """What each sequence's queries may see, (heads, queries, keys), in the batch's order of sequences."""
        text, heads, fields = self.batch.text, self.batch.heads, self.batch.fields
        return [
            oracle.sequence_mask(text, queries, keys, {name: field[b] for name, field in fields.items()}, heads)
            for b, (queries, keys) in enumerate(zip(self.queries.positions, self.keys.positions, strict=True))
        ]


def explicit_mask(mask, queries, keys):
    """An `attention_mask` by sequence and position in the batch's layout; what stands between sequences is True."""
    batch = np.ones((queries.layout.shape[0], *mask.shape[1:-2], queries.layout.shape[1], keys.layout.shape[1]), bool)
    for b, row in enumerate(queries.rows):
        cells = mask[b][..., queries.positions[b][:, None], keys.positions[b]]
        batch[row][..., queries.columns[b][:, None], keys.columns[b]] = cells
    return torch.from_numpy(batch)


def case_of(batch, queries, keys=None, block_size=128):
    """A batch laid out, its fields with it."""
    keys = queries if keys is None else keys
    fields = dict(batch.fields)
    key_scores = keys.flat(fields.pop("key_scores"))
    if key_scores.shape[1] > 1:
        key_scores = key_scores[:, :: batch.heads // batch.key_heads]
    fields["attention_mask"] = explicit_mask(fields["attention_mask"], queries, keys)
    for name, fill in [("segment_ids", -7), ("global_tokens", True)]:
        fields[name] = queries.spread(fields[name], fill)
        if f"key_{name}" in fields:
            fields[f"key_{name}"] = keys.spread(fields[f"key_{name}"], fill)
    return Case(batch, queries, keys, fields, key_scores if "topk" in batch.text else None, block_size)


@st.composite
def cases(draw, **options):
    batch, flat = draw(batches(**options)), draw(st.booleans())
    queries = draw(sides(batch.lengths, flat))
    keys = queries if batch.key_lengths is batch.lengths else draw(sides(batch.key_lengths, flat))
    return case_of(batch, queries, keys, draw(st.integers(1, 9)))
