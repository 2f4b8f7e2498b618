"""The mask language: text form, dense form and classification of ranges, against the oracle."""

import operator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import oracle
from hf_dynmask import masks
from strategies import FIELD_FREE, Batch, batches, examples, leaves, lengths, texts

# --- text form ---------------------------------------------------------------------------------------------------


@examples(2000)
@given(texts())
def test_text_round_trip(text):
    mask = masks.parse(text)
    assert masks.parse(str(mask)) == mask
    assert hash(masks.parse(str(mask))) == hash(mask)
    assert str(masks.parse(str(mask))) == str(mask)


@pytest.mark.parametrize(
    "text, made",
    [
        ("full", masks.full()),
        ("causal & window(255, 0)", masks.causal() & masks.window(255, 0)),
        ("backward | ~diagonal", masks.backward() | ~masks.diagonal()),
        ("window(3)", masks.window(3)),
        ("window(3, 3)", masks.window(3)),
        ("dilated(4, 2) & chunk(8)", masks.dilated(4, 2) & masks.chunk(8)),
        ("chunk_causal(8) | prefix(3)", masks.chunk_causal(8) | masks.prefix(3)),
        ("prefix & ~span(3, 5)", masks.prefix() & ~masks.span(3, 5)),
        ("visible & segments", masks.visible() & masks.segments()),
    ],
)
def test_text_and_python_make_the_same_mask(text, made):
    assert masks.parse(text) == made
    assert masks.parse(str(made)) == made


@pytest.mark.parametrize(
    "text, explicit",
    [
        ("causal | prefix & visible", "causal | (prefix & visible)"),
        ("causal & prefix | visible", "(causal & prefix) | visible"),
        ("~causal & prefix", "(~causal) & prefix"),
        ("~causal | prefix", "(~causal) | prefix"),
        ("~~causal", "~(~causal)"),
        ("causal & full & visible", "(causal & full) & visible"),
        ("causal | full | visible", "(causal | full) | visible"),
        (" ( causal)&window( 3 ,4 )  ", "causal & window(3, 4)"),
    ],
)
def test_precedence_is_that_of_python(text, explicit):
    assert masks.parse(text) == masks.parse(explicit)


def test_grouping_survives_the_text_form():
    assert masks.parse("(causal | full) & visible") != masks.parse("causal | full & visible")
    assert masks.parse("~(causal & full)") != masks.parse("~causal & full")


# --- dense form --------------------------------------------------------------------------------------------------


@examples(2000)
@given(batches())
def test_dense_equals_the_oracle(batch):
    dense = masks.parse(batch.text).dense(torch.tensor(batch.lengths), fields=batch.fields)
    expected = oracle.dense_mask(batch.text, batch.lengths, fields=batch.fields)
    assert dense.dtype == torch.bool
    np.testing.assert_array_equal(dense.numpy(), expected[:, None])


@examples(300)
@given(st.data())
def test_dense_with_keys_of_other_lengths(data):
    queries = data.draw(lengths())
    keys = data.draw(st.lists(st.integers(0, 17), min_size=len(queries), max_size=len(queries)))
    text = data.draw(texts(templates=FIELD_FREE))
    dense = masks.parse(text).dense(torch.tensor(queries), key_lengths=torch.tensor(keys))
    np.testing.assert_array_equal(dense.numpy(), oracle.dense_mask(text, queries, keys)[:, None])


def test_an_empty_batch_has_an_empty_dense_mask():
    assert masks.causal().dense(torch.zeros(0, dtype=torch.long)).shape[0] == 0


# --- classification of ranges ------------------------------------------------------------------------------------


def split(width, size):
    """First and last index of each block of `size`, the last one shorter where it must be."""
    first = torch.arange(0, width, size)
    return first, (first + size).clamp(max=width) - 1


def allowed_share(allowed, q_lo, q_hi, k_lo, k_hi):
    """Share of allowed cells in ranges of `allowed (batch, Tq, Tk)`; exactly 0 or 1 where none or all are."""
    sums = np.pad(allowed.cumsum(1).cumsum(2), [(0, 0), (1, 0), (1, 0)])
    b = np.arange(len(allowed))[:, None, None]
    q_lo, q_end, k_lo, k_end = (np.asarray(index) for index in (q_lo, q_hi + 1, k_lo, k_hi + 1))
    cells = sums[b, q_end, k_end] - sums[b, q_lo, k_end] - sums[b, q_end, k_lo] + sums[b, q_lo, k_lo]
    return cells / ((q_end - q_lo) * (k_end - k_lo))


def check_classification(batch: Batch, *ranges, exact=False):
    """*always* and *never* are right wherever they are said; `exact`: they are said wherever they are right."""
    width = max(batch.lengths)
    allowed = oracle.dense_mask(batch.text, [width] * len(batch.lengths), fields=batch.fields)
    share = allowed_share(allowed, *ranges)
    answers = masks.parse(batch.text).classify(*ranges, fields=batch.fields)
    always, never = (np.broadcast_to(answer.numpy(), share.shape) for answer in answers)
    assert always.dtype == never.dtype == bool
    assert (share[always] == 1).all()
    assert (share[never] == 0).all()
    if exact:
        np.testing.assert_array_equal(always, share == 1)
        np.testing.assert_array_equal(never, share == 0)


@examples(2000)
@given(batches(), st.integers(1, 9), st.integers(1, 9))
def test_classification_of_a_block_grid_is_sound(batch, query_block, key_block):
    (q_lo, q_hi), (k_lo, k_hi) = split(max(batch.lengths), query_block), split(max(batch.lengths), key_block)
    check_classification(batch, q_lo[None, :, None], q_hi[None, :, None], k_lo[None, None], k_hi[None, None])


@examples(1000)
@given(batches(ragged=lengths().filter(any)), st.integers(0, 2**32 - 1))
def test_classification_of_any_ranges_of_each_row_is_sound(batch, seed):
    generator = torch.Generator().manual_seed(seed)
    ends = torch.randint(max(batch.lengths), (2, 2, len(batch.lengths), 5), generator=generator).sort(0).values
    (q_lo, k_lo), (q_hi, k_hi) = ends
    check_classification(batch, q_lo[..., None], q_hi[..., None], k_lo[:, None], k_hi[:, None])


@examples(500)
@given(batches())
def test_single_cells_are_never_in_doubt(batch):
    index = torch.arange(max(batch.lengths))
    q, k = index[None, :, None], index[None, None]
    check_classification(batch, q, q, k, k, exact=True)


@examples(300)
@given(leaves(templates=[leaf for leaf in FIELD_FREE if "dilated" not in leaf]), st.integers(1, 6), st.integers(1, 6))
def test_blocks_of_a_leaf_are_in_doubt_only_where_they_are_mixed(text, query_block, key_block):
    (q_lo, q_hi), (k_lo, k_hi) = split(17, query_block), split(17, key_block)
    ranges = q_lo[None, :, None], q_hi[None, :, None], k_lo[None, None], k_hi[None, None]
    check_classification(Batch(text, [17], {}), *ranges, exact=True)


@examples(300)
@given(texts(depth=2), texts(depth=2), batches(ragged=lengths().filter(any)))
def test_operators_combine_the_three_values_as_kleene_does(left, right, batch):
    first, last = split(max(batch.lengths), 4)
    ranges = first[None, :, None], last[None, :, None], first[None, None], last[None, None]

    def classify(text):
        return torch.broadcast_tensors(*masks.parse(text).classify(*ranges, fields=batch.fields))

    (always_l, never_l), (always_r, never_r) = classify(left), classify(right)
    for text, always, never in [
        (f"~({left})", never_l, always_l),
        (f"({left}) & ({right})", always_l & always_r, never_l | never_r),
        (f"({left}) | ({right})", always_l | always_r, never_l & never_r),
    ]:
        said_always, said_never = classify(text)
        assert (said_always >= always).all()
        assert (said_never >= never).all()


# --- bands -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, band",
    [
        ("full", (None, None)),
        ("causal", (None, 0)),
        ("backward", (0, None)),
        ("diagonal", (0, 0)),
        ("window(3, 1)", (3, 1)),
        ("causal & window(3)", (3, 0)),
        ("window(2, 7) & backward & window(5, 1)", (0, 1)),
        ("causal & full", (None, 0)),
    ],
)
def test_bands(text, band):
    assert masks.parse(text).band() == band


@examples(300)
@given(st.lists(leaves(FIELD_FREE), min_size=1, max_size=3).map(" & ".join))
def test_a_mask_that_names_a_band_is_that_band(text):
    band = masks.parse(text).band()
    if band is not None:
        left, right = (99 if side is None else side for side in band)
        expected = oracle.sequence_mask(f"window({left}, {right})", 17)
        np.testing.assert_array_equal(oracle.sequence_mask(text, 17), expected)


# --- errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, message",
    [
        ("", r"at column 1"),
        ("causal &", r"at column 9"),
        ("causal & & full", r"at column 10"),
        ("causal & )", r"at column 10"),
        ("causal full", r"at column 8"),
        ("causal & fulll", r"at column 10: unknown mask `fulll`; known are .*causal, .*window"),
        ("  causal & fulll", r"at column 12: unknown mask `fulll`"),
        ("full & 3", r"at column 8: expected a mask"),
        ("full + causal", r"at column 1: expected a mask, `&`, `\|`, `~` or parentheses"),
        ("full and causal", r"at column 1: expected a mask"),
        ("__import__('os')", r"at column 1(1|2)?: "),
        ("full & causal.name", r"at column 8: expected a mask"),
        ("full & window", r"at column 8: `window` takes \(left, right\); got 0 arguments"),
        ("full & span(1, 2, 3)", r"at column 8: `span` takes \(start, length\); got 3 arguments"),
        ("full & window(right=3)", r"at column 8: expected a mask"),
        ("full & window(causal)", r"at column 15: expected a number"),
        ("full & window(2 ** 99)", r"at column 15: expected a number"),
        ("full & window(True)", r"at column 15: expected a number"),
        ("full & window(-1)", r"at column 8: `left` of `window` must be an integer of at least 0; got -1"),
        ("full & window(1, -1)", r"at column 8: `right` of `window` must be an integer of at least 0; got -1"),
        ("full & chunk(1.5)", r"at column 8: `size` of `chunk` must be an integer of at least 1; got 1.5"),
        ("full & chunk(0)", r"at column 8: `size` of `chunk` must be an integer of at least 1; got 0"),
        ("full & dilated(3, 0)", r"at column 8: `step` of `dilated` must be an integer of at least 1; got 0"),
        ("full & window(99999999999999999999)", r"at column 8: `left` of `window` must be at most"),
        ("~" * 5000 + "full", r"mask does not parse: nested too deeply"),
    ],
)
def test_text_that_does_not_parse(text, message):
    with pytest.raises(ValueError, match=message):
        masks.parse(text)


@pytest.mark.parametrize("text", [None, 5, ["causal"]])
def test_a_mask_that_is_no_text(text):
    with pytest.raises(ValueError, match=r"a mask must be text such as 'causal & window\(255, 0\)'; got "):
        masks.parse(text)


def test_operators_take_masks_alone():
    with pytest.raises(TypeError, match="unsupported operand"):
        operator.and_(masks.causal(), "full")


@pytest.mark.parametrize(
    "text, names",
    [
        ("causal & prefix(3)", set()),
        ("causal | prefix", {"prefix_lengths"}),
        ("~visible & (segments | prefix)", {"hidden_spans", "segment_ids", "prefix_lengths"}),
    ],
)
def test_fields_are_those_the_leaves_read(text, names):
    assert masks.parse(text).fields == names


def test_a_field_that_the_batch_lacks():
    mask, index = masks.parse("causal & segments"), torch.arange(3)
    message = r"the mask 'causal & segments' reads the field `segment_ids`, which the batch lacks; it has "
    with pytest.raises(ValueError, match=message + "none"):
        mask.dense(torch.tensor([3]))
    with pytest.raises(ValueError, match=message + "`prefix_lengths`"):
        mask.classify(index, index, index, index, fields={"prefix_lengths": torch.tensor([1])})


@pytest.mark.parametrize(
    "text, field, shape, message",
    [
        ("segments", "segment_ids", (3,), r"`segment_ids` must have shape \(2, T\); got \(3,\)"),
        ("segments", "segment_ids", (3, 4), r"`segment_ids` must have shape \(2, T\); got \(3, 4\)"),
        ("prefix", "prefix_lengths", (2, 1), r"`prefix_lengths` must have shape \(2\); got \(2, 1\)"),
        ("visible", "hidden_spans", (2, 3, 3), r"`hidden_spans` must have shape \(2, K, 2\); got \(2, 3, 3\)"),
    ],
)
def test_a_field_of_wrong_shape(text, field, shape, message):
    with pytest.raises(ValueError, match=message):
        masks.parse(text).dense(torch.tensor([4, 2]), fields={field: torch.zeros(shape, dtype=torch.long)})
