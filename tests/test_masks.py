"""The mask language: text form, dense form and classification of ranges, against the oracle."""

import operator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import oracle
from hf_dynmask import masks
from strategies import FIELD_FREE, LEAVES, Batch, batches, examples, leaves, texts

# --- text form ---------------------------------------------------------------------------------------------------


@examples(2000)
@given(texts(heads=4, choices=3))
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
        ("shared_question | global_tokens(4)", masks.shared_question() | masks.global_tokens(4)),
        ("global_tokens & dense", masks.global_tokens() & masks.dense()),
        ("random(0.1, 7) | random(1e-05, 0)", masks.random(0.1, 7) | masks.random(0.00001, 0)),
        ("random(1, 0)", masks.random(1.0, 0)),
        ("causal & topk(5)", masks.causal() & masks.topk(5)),
        ("full & custom(wedge)", masks.full() & masks.custom("wedge")),
        ("heads(full, causal | diagonal)", masks.heads(masks.full(), masks.causal() | masks.diagonal())),
        ("select(full, heads(causal))", masks.select(masks.full(), masks.heads(masks.causal()))),
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


PER_HEAD = "heads(", "dense", "topk("  # what makes heads differ


def check_dense(batch: Batch):
    """The dense form is the oracle's; one for all heads where nothing in the expression tells them apart."""
    lengths, key_lengths = torch.tensor(batch.lengths), torch.tensor(batch.key_lengths)
    fields, heads = batch.fields, batch.heads
    dense = masks.parse(batch.text).dense(lengths, key_lengths=key_lengths, fields=fields, heads=heads)
    assert dense.dtype == torch.bool
    assert dense.shape[1] in (1, heads)
    assert dense.shape[1] == 1 or any(name in batch.text for name in PER_HEAD)
    expected = batch.dense
    np.testing.assert_array_equal(dense.expand(expected.shape).numpy(), expected)


@examples(2000)
@given(batches())
def test_dense_equals_the_oracle(batch):
    check_dense(batch)


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("leaf", LEAVES)
def test_dense_of_each_leaf_equals_the_oracle(leaf, cross):
    @examples(20)
    @given(batches(leaves([leaf]), cross=cross))
    def check(batch):
        check_dense(batch)

    check()


@examples(100)
@given(st.data())
def test_keys_without_fields_of_their_own_read_those_of_the_queries(data):
    text = texts(templates=["segments", "shared_question", "global_tokens", "causal"])
    batch = data.draw(batches(text, choices=[1], cross=False))
    shorter = [data.draw(st.integers(0, length)) for length in batch.lengths]
    check_dense(batch._replace(key_lengths=shorter))


def test_random_keeps_as_many_pairs_as_it_says():
    dense = masks.random(0.3, 11).dense(torch.tensor([1000]))
    assert dense.double().mean().item() == pytest.approx(0.3, abs=0.003)
    assert not torch.equal(dense, masks.random(0.3, 12).dense(torch.tensor([1000])))


def test_random_of_large_seeds_and_positions():
    dense = masks.random(0.5, 2**32 - 1).dense(torch.tensor([3]), key_lengths=torch.tensor([70_000]))
    expected = oracle.sequence_mask(f"random(0.5, {2**32 - 1})", range(3), range(70_000))
    np.testing.assert_array_equal(dense[0].numpy(), expected)


def test_an_empty_batch_has_an_empty_dense_mask():
    assert masks.causal().dense(torch.zeros(0, dtype=torch.long)).shape[0] == 0


# --- classification of ranges ------------------------------------------------------------------------------------


def split(width, size):
    """First and last index of each block of `size`, the last one shorter where it must be."""
    first = torch.arange(0, width, size)
    return first, (first + size).clamp(max=width) - 1


def allowed_share(allowed, q_lo, q_hi, k_lo, k_hi):
    """Share of allowed cells in ranges of `allowed (batch, heads, Tq, Tk)`; exactly 0 or 1 where none or all are."""
    sums = np.pad(allowed.sum(1).cumsum(1).cumsum(2), [(0, 0), (1, 0), (1, 0)])
    b = np.arange(len(allowed))[:, None, None]
    q_lo, q_end, k_lo, k_end = (np.asarray(index) for index in (q_lo, q_hi + 1, k_lo, k_hi + 1))
    cells = sums[b, q_end, k_end] - sums[b, q_lo, k_end] - sums[b, q_end, k_lo] + sums[b, q_lo, k_lo]
    return cells / (allowed.shape[1] * (q_end - q_lo) * (k_end - k_lo))


def check_classification(batch: Batch, *ranges, exact=False):
    """*always* and *never* are right wherever they are said; `exact`: they are said wherever they are right."""
    rows = len(batch.lengths)
    whole = batch._replace(lengths=[max(batch.lengths)] * rows, key_lengths=[max(batch.key_lengths)] * rows)
    share = allowed_share(whole.dense, *ranges)
    answers = masks.parse(batch.text).classify(*ranges, fields=batch.fields)
    always, never = (np.broadcast_to(answer.numpy(), share.shape) for answer in answers)
    assert always.dtype == never.dtype == bool
    assert (share[always] == 1).all()
    assert (share[never] == 0).all()
    if exact:
        np.testing.assert_array_equal(always, share == 1)
        np.testing.assert_array_equal(never, share == 0)


def grid(batch: Batch, query_block, key_block):
    """Ranges `(1, nq, 1)` and `(1, 1, nk)` of the blocks of a batch's attention matrix."""
    (q_lo, q_hi), (k_lo, k_hi) = split(max(batch.lengths), query_block), split(max(batch.key_lengths), key_block)
    return q_lo[None, :, None], q_hi[None, :, None], k_lo[None, None], k_hi[None, None]


@examples(2000)
@given(batches(), st.integers(1, 9), st.integers(1, 9))
def test_classification_of_a_block_grid_is_sound(batch, query_block, key_block):
    check_classification(batch, *grid(batch, query_block, key_block))


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("leaf", LEAVES)
def test_classification_of_each_leaf_is_sound(leaf, cross):
    @examples(20)
    @given(batches(leaves([leaf]), cross=cross), st.integers(1, 9), st.integers(1, 9))
    def check(batch, query_block, key_block):
        check_classification(batch, *grid(batch, query_block, key_block))

    check()


@examples(1000)
@given(batches().filter(lambda batch: any(batch.lengths) and any(batch.key_lengths)), st.integers(0, 2**32 - 1))
def test_classification_of_any_ranges_of_each_row_is_sound(batch, seed):
    generator = torch.Generator().manual_seed(seed)
    (q_lo, q_hi), (k_lo, k_hi) = (
        torch.randint(max(sizes), (2, len(batch.lengths), 5), generator=generator).sort(0).values
        for sizes in (batch.lengths, batch.key_lengths)
    )
    check_classification(batch, q_lo[..., None], q_hi[..., None], k_lo[:, None], k_hi[:, None])


BY_RANGES = [leaf for leaf in LEAVES if not leaf.startswith(("random", "custom", "topk"))]  # leaves that say of ranges


@examples(500)
@given(batches(templates=BY_RANGES, heads=[1]))
def test_single_cells_are_never_in_doubt(batch):
    check_classification(batch, *grid(batch, 1, 1), exact=True)


@examples(300)
@given(leaves(templates=[leaf for leaf in FIELD_FREE if "dilated" not in leaf]), st.integers(1, 6), st.integers(1, 6))
def test_blocks_of_a_leaf_are_in_doubt_only_where_they_are_mixed(text, query_block, key_block):
    batch = Batch(text, 1, [17], [17], {})
    check_classification(batch, *grid(batch, query_block, key_block), exact=True)


@examples(300)
@given(texts(depth=2, templates=BY_RANGES), texts(depth=2, templates=BY_RANGES), batches(choices=[1]))
def test_operators_combine_the_three_values_as_kleene_does(left, right, batch):
    ranges = grid(batch, 4, 4)

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
        expected = oracle.sequence_mask(f"window({left}, {right})", range(17))
        np.testing.assert_array_equal(oracle.sequence_mask(text, range(17)), expected)


# --- errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, message",
    [
        ("", r"at column 1"),
        ("causal &", r"at column 9"),
        ("causal & & full", r"at column 10"),
        ("causal & )", r"at column 10"),
        ("causal full", r"at column 8"),
        ("causal & fulll", r"at column 10: unknown mask `fulll`; did you mean `full`\? known are .*causal, .*window"),
        ("gobal_tokens(3)", r"at column 1: unknown mask `gobal_tokens`; did you mean `global_tokens`\? known are"),
        ("heads(full, casual)", r"at column 13: unknown mask `casual`; did you mean `causal`\? known are"),
        ("full | xyzzy", r"at column 8: unknown mask `xyzzy`; known are"),
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
        ("full & shared_question(1)", r"at column 8: `shared_question` takes \(\); got 1 argument"),
        ("global_tokens(1, 2)", r"at column 1: `global_tokens` takes \(n\); got 2 arguments"),
        ("global_tokens(0.5)", r"at column 1: `n` of `global_tokens` must be an integer of at least 0; got 0.5"),
        ("random(0.5)", r"at column 1: `random` takes \(keep, seed\); got 1 argument"),
        ("random(1.5, 0)", r"at column 1: `keep` of `random` must be a number from 0 to 1; got 1.5"),
        ("random(-0.1, 0)", r"at column 1: `keep` of `random` must be a number from 0 to 1; got -0.1"),
        ("random(0.5, -1)", r"at column 1: `seed` of `random` must be an integer of at least 0; got -1"),
        ("random(0.5, 1.5)", r"at column 1: `seed` of `random` must be an integer of at least 0; got 1.5"),
        ("random(0.5, 4294967296)", r"at column 1: `seed` of `random` must be at most 4294967295; got 4294967296"),
        ("full & dense(1)", r"at column 8: `dense` takes \(\); got 1 argument"),
        ("topk", r"at column 1: `topk` takes \(n\); got 0 arguments"),
        ("topk(2, 3)", r"at column 1: `topk` takes \(n\); got 2 arguments"),
        ("topk(0)", r"at column 1: `n` of `topk` must be an integer of at least 1; got 0"),
        ("topk(full)", r"at column 6: expected a number"),
        ("full & heads", r"at column 8: `heads` must be given masks; got none"),
        ("heads(3)", r"at column 7: expected a mask"),
        ("select()", r"at column 1: `select` must be given masks; got none"),
        ("full | select(full, 1)", r"at column 21: expected a mask"),
        ("custom", r"at column 1: `custom` takes \(predicate\); got 0 arguments"),
        ("custom(3)", r"at column 8: expected the name of a registered mask"),
        ("custom('wedge')", r"at column 8: expected the name of a registered mask"),
        ("full & custom(hedge)", r"at column 8: no custom mask `hedge` .*; known are .*every_third, .*wedge"),
        ("full & ~topk(3)", r"at column 8: `~` cannot be applied to `topk`"),
        ("~(full & heads(full, topk(3)))", r"at column 1: `~` cannot be applied to `topk`"),
        ("~~select(full | topk(3))", r"at column 2: `~` cannot be applied to `topk`"),
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


@pytest.mark.parametrize("mask", [masks.topk(1), masks.causal() & masks.topk(1), masks.heads(masks.topk(1))], ids=str)
def test_no_complement_of_what_topk_chooses(mask):
    with pytest.raises(ValueError, match=r"`~` cannot be applied to `topk`, which chooses among what is allowed"):
        operator.invert(mask)


@pytest.mark.parametrize("make", [masks.heads, masks.select])
def test_a_choice_among_what_is_no_mask(make):
    with pytest.raises(ValueError, match=rf"`{make.name}` must be given masks; got 'full'"):
        make("full")


def test_custom_masks_have_names_that_the_language_can_read():
    with pytest.raises(ValueError, match="`name` of a custom mask must be an identifier; got 'my mask'"):
        masks.register("my mask", oracle.PREDICATES["wedge"])


@pytest.mark.parametrize("heads", [1, 3, 4])
def test_a_number_of_masks_that_does_not_divide_the_heads(heads):
    mask, count = (
        (masks.parse("causal & heads(full, diagonal)"), 2)
        if heads != 4
        else (masks.parse("heads(full, full, diagonal)"), 3)
    )
    message = f"`heads` must be given a number of masks that divides the {heads} heads; got {count}"
    with pytest.raises(ValueError, match=message):
        mask.dense(torch.tensor([3]), heads=heads)


@pytest.mark.parametrize("choice", [-1, 2])
def test_a_choice_out_of_range(choice):
    fields = {"mask_choice": torch.tensor([0, choice])}
    message = rf"the field `mask_choice` must hold 0 to 1 for 'select\(full, causal\)'; got {choice}"
    with pytest.raises(ValueError, match=message):
        masks.parse("~select(full, causal)").dense(torch.tensor([3, 2]), fields=fields)


def test_operators_take_masks_alone():
    with pytest.raises(TypeError, match="unsupported operand"):
        operator.and_(masks.causal(), "full")


@pytest.mark.parametrize(
    "text, names",
    [
        ("causal & prefix(3)", set()),
        ("causal | prefix", {"prefix_lengths"}),
        ("~visible & (segments | prefix)", {"hidden_spans", "segment_ids", "prefix_lengths"}),
        ("shared_question | global_tokens", {"segment_ids", "global_tokens"}),
        ("global_tokens(3) & random(0.5, 1) & custom(wedge)", set()),
        ("select(dense, heads(topk(3)))", {"mask_choice", "attention_mask", "key_scores"}),
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


DTYPES = {"attention_mask": torch.bool, "global_tokens": torch.bool, "key_scores": torch.float32}


@pytest.mark.parametrize(
    "text, field, shape, message",
    [
        ("segments", "segment_ids", (3,), r"`segment_ids` must have shape \(2, T\); got \(3,\)"),
        ("segments", "segment_ids", (3, 4), r"`segment_ids` must have shape \(2, T\); got \(3, 4\)"),
        ("prefix", "prefix_lengths", (2, 1), r"`prefix_lengths` must have shape \(2\); got \(2, 1\)"),
        ("visible", "hidden_spans", (2, 3, 3), r"`hidden_spans` must have shape \(2, K, 2\); got \(2, 3, 3\)"),
        ("segments", "key_segment_ids", (3, 4), r"`key_segment_ids` must have shape \(2, T\); got \(3, 4\)"),
        ("segments", "segment_ids", (2, 3), r"`segment_ids` must have .*; got \(2, 3\)"),
        ("global_tokens", "global_tokens", (4,), r"`global_tokens` must have shape \(2, T\); got \(4,\)"),
        ("select(full)", "mask_choice", (3,), r"`mask_choice` must have shape \(2\); got \(3,\)"),
        ("dense", "attention_mask", (4, 4), r"`attention_mask` must have shape \(2, 1 \| H, Tq, Tk\); got \(4, 4\)"),
        ("dense", "attention_mask", (2, 3, 4), r"`attention_mask` must have shape .*; got \(2, (1, )?3, 4\)"),
        ("dense", "attention_mask", (2, 3, 4, 4), r"`attention_mask` must have shape .*; got \(2, 3, 4, 4\)"),
        ("topk(1)", "key_scores", (2, 4), r"`key_scores` must have shape \(2, 1 \| H, Tk\); got \(2, 4\)"),
        ("topk(1)", "key_scores", (2, 3, 4), r"`key_scores` must have shape .*; got \(2, 3, 4\)"),
    ],
)
def test_a_field_of_wrong_shape(text, field, shape, message):
    fields = {"segment_ids": torch.zeros(2, 4, dtype=torch.long)} if field == "key_segment_ids" else {}
    fields[field] = torch.zeros(shape, dtype=DTYPES.get(field, torch.long))
    with pytest.raises(ValueError, match=message):
        masks.parse(text).dense(torch.tensor([4, 2]), fields=fields)


@pytest.mark.parametrize(
    "text, field, shape", [("global_tokens", "global_tokens", (1, 3)), ("dense", "attention_mask", (1, 3, 3))]
)
def test_a_field_that_must_be_bool(text, field, shape):
    with pytest.raises(ValueError, match=f"the field `{field}` must be bool; got torch.float32"):
        masks.parse(text).dense(torch.tensor([3]), fields={field: torch.zeros(shape)})
