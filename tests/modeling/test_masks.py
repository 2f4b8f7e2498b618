"""The mask language: text form, dense form and classification of ranges, against the oracle."""

import copy
import inspect
import operator
import pickle
import sys
from functools import reduce

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import oracle
from hf_dynmask import masks
from hf_dynmask.modeling.layout import SequenceLayout
from hf_dynmask.modeling.plan import MaskPlan
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


@pytest.mark.parametrize(
    "text, same",
    [
        ("\n  causal\n\t& window(255,\r\n 0)\n", "causal & window(255, 0)"),
        ("window ( 1_000 , 2 , )", "window(1000, 2)"),
        ("random(.5, 1)", "random(5e-1, 1)"),
        ("full()", "full"),
        ("causal & (full & visible)", "causal & full & visible"),
        ("(((causal)))", "causal"),
    ],
)
def test_texts_of_one_meaning(text, same):
    assert masks.parse(text) == masks.parse(same)


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


@pytest.mark.parametrize("lengths", [torch.zeros(0, dtype=torch.long), []])
def test_an_empty_batch_has_an_empty_dense_mask(lengths):
    assert masks.causal().dense(lengths).shape[0] == 0


def test_lengths_may_be_lists():
    dense = masks.causal().dense(torch.tensor([2, 1]), key_lengths=torch.tensor([3, 0]))
    assert torch.equal(masks.causal().dense([2, 1], key_lengths=[3, 0]), dense)
    with pytest.raises(ValueError, match="`key_lengths` must be integers; got dtype torch.float32"):
        masks.causal().dense([2, 1], key_lengths=[3.0, 0.0])  # type: ignore[list-item]


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


# --- chains and nesting ------------------------------------------------------------------------------------------


def around(mask: masks.Mask, levels: int) -> masks.Mask:
    """Made of the mask by `levels` operators, one inside the other."""
    for level in range(levels):
        mask = (mask | masks.diagonal(), mask & masks.window(2), masks.select(mask), masks.heads(mask))[level % 4]
    return mask


def walk(mask: masks.Mask) -> None:
    """Calls all that goes through an expression."""
    lengths = torch.tensor([3])
    fields = {"mask_choice": torch.tensor([0]), "key_scores": torch.rand(1, 1, 3)}
    assert mask.fields <= fields.keys()
    assert not mask.holds(masks.Custom)
    assert not mask.is_relative or mask.band() is None or mask.band()
    assert mask == copy.deepcopy(mask) == pickle.loads(pickle.dumps(mask))
    assert hash(mask) == hash(copy.copy(mask))
    assert len(repr(mask)) > len(str(mask))
    dense = mask.dense(lengths, fields=fields)
    always, never = mask.classify(*torch.tensor([0, 2, 0, 2])[:, None, None, None].unbind(), fields=fields)
    assert dense.all() or not always.any()
    assert not (dense.any() and never.any())
    plan = MaskPlan(mask, SequenceLayout.from_lengths(lengths), fields={"mask_choice": fields["mask_choice"]})
    for _, of_heads in plan.with_key_scores(torch.rand(1, 1, 3)).by_heads(1):
        assert len(repr(of_heads.mask)) > 0
        assert of_heads.dense().shape == (1, 1, 3, 3)


@pytest.mark.parametrize("leaf", [masks.causal(), masks.topk(2)], ids=str)
def test_all_that_goes_through_the_deepest_masks(leaf):
    mask = around(leaf, masks.MAX_DEPTH - 1)
    assert mask.depth == masks.MAX_DEPTH
    assert masks.parse(str(mask)) == mask
    in_little_room(walk, mask)
    with pytest.raises(ValueError, match=r"masks must be at most 16 deep in one another .*; got 17"):
        around(mask, 1)
    with pytest.raises(ValueError, match="mask does not parse at column 1: masks must be at most 16 deep"):
        masks.parse(f"select({mask})")


def in_little_room(call, *arguments):
    """The call, with room for as many frames as a program that is deep in others may have left."""
    frames, limit = len(inspect.stack(0)), sys.getrecursionlimit()
    sys.setrecursionlimit(frames + 400)
    try:
        call(*arguments)
    finally:
        sys.setrecursionlimit(limit)


@pytest.mark.parametrize("join", [operator.and_, operator.or_])
@pytest.mark.parametrize("leaf", [masks.causal(), masks.topk(2)], ids=str)
def test_all_that_goes_through_long_chains(leaf, join):
    mask = reduce(join, [masks.window(n) for n in range(300)], leaf)
    assert mask.depth == 2
    assert masks.parse(str(mask)) == mask
    in_little_room(walk, mask)


@pytest.mark.parametrize("join", [operator.and_, operator.or_])
def test_chains_made_in_python(join):
    mask = reduce(join, [masks.causal()] * 5000)
    assert str(mask).count("causal") == 5000
    in_little_room(walk, mask)
    assert reduce(join, [masks.causal()] * 5000, masks.causal()) == join(mask, masks.causal())


@pytest.mark.parametrize(
    "join", [operator.and_, operator.or_, lambda mask, _: mask | mask, lambda mask, _: masks.heads(mask, mask)]
)
def test_masks_of_too_many_leaves(join):
    with pytest.raises(ValueError, match=r"a mask must be made of at most 8192 leaves; got (8193|16384)"):
        reduce(join, [masks.causal()] * 10**5)


def test_a_chain_is_grouped_in_no_way():
    a, b, c = masks.causal(), masks.window(3), masks.visible()
    assert a & (b & c) == (a & b) & c
    assert str(a | (b | c)) == "causal | window(3, 3) | visible"
    assert a & (b | c) != (a & b) | c


def test_runs_of_heads_are_found_without_looking_at_each():
    mask = masks.parse("heads(full, causal) & heads(full, full, window(3), full)")
    assert [(run, str(found)) for run, found in masks.head_runs(mask, 4 * 10**12)] == [
        (slice(0, 2 * 10**12), "full & full"),
        (slice(2 * 10**12, 3 * 10**12), "causal & window(3, 3)"),
        (slice(3 * 10**12, 4 * 10**12), "causal & full"),
    ]


def test_numbers_too_large_to_write():
    with pytest.raises(ValueError, match=r"`left` of `window` must be at most .*; got an integer of 16610 bits"):
        masks.window(10**5000)
    with pytest.raises(ValueError, match=r"`left` of `window` must be an integer .*; got an integer of 16610 bits"):
        masks.window(-(10**5000))


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
        ("full + causal", r"at column 6: expected `&`, `\|` or the end, not '\+'"),
        ("full and causal", r"at column 6: expected `&`, `\|` or the end, not 'and'"),
        ("__import__('os')", r"at column 1(1|2)?: "),
        ("full & causal.name", r"at column 14: expected `&`, `\|` or the end, not '\.'"),
        ("full & window", r"at column 8: `window` takes \(left, right\); got 0 arguments"),
        ("full & span(1, 2, 3)", r"at column 8: `span` takes \(start, length\); got 3 arguments"),
        ("full & window(right=3)", r"at column 15: expected a number, not 'right'"),
        ("full & window(causal)", r"at column 15: expected a number"),
        ("full & window(2 ** 99)", r"at column 17: expected `,` or `\)`, not '\*'"),
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
        ("  ", r"at column 3: expected a mask, not the end; got '  '"),
        ("causal  # only the past\n& window(2, 0)", r"at line 1, column 9: expected `&`, `\|` or the end, not '#'"),
        ("window(4) # & causal", r"at column 11: expected `&`, `\|` or the end, not '#'"),
        ("# causal", r"at column 1: expected a mask, not '#'"),
        ("causal &\n  fulll", r"at line 2, column 3: unknown mask `fulll`"),
        ("causal\nfull", r"at line 2, column 1: expected `&`, .* not 'full'"),
        ("causal; full", r"at column 7: expected .*, not ';'"),
        ("causal \\\n& full", r"at line 1, column 8: expected .*, not '\\\\'"),
        ("causal\f& full", r"at column 7: expected .*, not '\\x0c'"),
        ("causal\x00", r"at column 7: expected .*, not '\\x00'"),
        ("causal\xa0& full", r"at column 7: expected .*, not '\\xa0'"),
        ("\ufeffcausal", r"at column 1: expected a mask, not '\\ufeff'"),
        ("causal\u2028& full", r"at column 7: expected .*, not '\\u2028'"),
        ("\uff43ausal", r"at column 1: expected a mask, not '\uff43'"),
        ("c\u0430usal", r"at column 1: unknown mask `c`"),
        ("causal\u0301", r"at column 7: expected .*, not "),
        ("window(\u0663)", r"at column 8: expected a number, not '\u0663'"),
        ("window(0x10)", r"at column 9: expected `,` or `\)`, not 'x10'"),
        ("window(010)", r"at column 9: expected `,` or `\)`, not '10'"),
        ("window(1__0)", r"at column 9: expected `,` or `\)`, not '__0'"),
        ("window(1e400)", r"`left` of `window` must be an integer of at least 0; got inf"),
        ("window(4j)", r"at column 9: expected `,` or `\)`, not 'j'"),
        ("window(nan)", r"at column 8: expected a number, not 'nan'"),
        ("window(--4)", r"at column 9: expected a number, not '-'"),
        ("window(" + "9" * 5000 + ")", r"at column 8: a number must have at most 100 characters; got 5000"),
        ("random(0." + "1" * 5000 + ", 0)", r"at column 8: a number must have at most 100 characters; got 5002"),
        ("window(*causal)", r"at column 8: expected a number, not '\*'"),
        ("heads(*full)", r"at column 7: expected a mask, not '\*'"),
        ("heads(,)", r"at column 7: expected a mask, not ','"),
        ("heads(full causal)", r"at column 12: expected `,` or `\)`, not 'causal'"),
        ("(full, causal)", r"at column 6: expected `&`, `\|` or `\)`, not ','"),
        ("(causal := full)", r"at column 9: expected .*, not ':'"),
        ("f'{causal}'", r"at column 1: unknown mask `f`"),
        ("'causal'", r'at column 1: expected a mask, not "\'"'),
        ("causal if full else causal", r"at column 8: expected .*, not 'if'"),
        ("lambda: causal", r"at column 1: unknown mask `lambda`"),
        ("[causal for _ in full]", r"at column 1: expected a mask, not '\['"),
        ("causal()()", r"at column 9: expected .*, not '\('"),
        ("(causal", r"at column 8: expected `&`, `\|` or `\)`, not the end"),
        ("window(4", r"at column 9: expected `,` or `\)`, not the end"),
        ("None", r"at column 1: unknown mask `None`"),
        ("~" * 5000 + "full", r"at column 17: parentheses and `~` must be less than 16 deep in one another; got more"),
        ("(" * 5000 + "full" + ")" * 5000, r"at column 17: parentheses and `~` must be less than 16 deep"),
        ("heads(" * 2000 + "full" + ")" * 2000, r"at column 97: parentheses and `~` must be less than 16 deep"),
        ("causal & (full | " * 900 + "full" + ")" * 900, r"parentheses and `~` must be less than 16 deep"),
        (" & ".join(["causal"] * 5000), r"the text of a mask must have at most 16384 characters; got 44997"),
        (" " * 10**6, r"the text of a mask must have at most 16384 characters; got 1000000"),
        ("x" * 10_000, r"unknown mask `x{100}`; .* got 'x{199}… \(10002 characters\)"),
    ],
)
def test_text_that_does_not_parse(text, message):
    with pytest.raises(ValueError, match=message):
        masks.parse(text)


@pytest.mark.parametrize("text", [None, 5, ["causal"], b"causal", ["causal"] * 10_000])
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


@pytest.mark.parametrize("name", ["my mask", "größe", "", "3rd"])
def test_custom_masks_have_names_that_the_language_can_read(name):
    message = f"`name` of a custom mask must be an identifier of ASCII characters; got '{name}'"
    with pytest.raises(ValueError, match=message):
        masks.register(name, oracle.PREDICATES["wedge"])


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


# --- dtypes of integers ------------------------------------------------------------------------------------------

SMALL = [torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint32]
NUMBERED = ["window(0, 100)", "window({0})", "window(100, {0})", "dilated({0}, 3)", "dilated(90, {0})", "chunk({0})"]
NUMBERED += ["chunk(50)", "chunk_causal({0})", "chunk_causal(50)", "prefix({0})", "prefix(100)", "global_tokens({0})"]
NUMBERED += ["span({0}, {0})", "span(100, {0})", "span(20, 100)", "random(0.5, 7)", "full", "causal", "backward"]
NUMBERED += ["diagonal", "custom(wedge)", "~window({0}) | causal & dilated(64, 2)"]
OF_FIELDS = ["prefix", "visible", "segments", "shared_question", "select(full, causal, window(3))"]
LENGTH = 110  # positions of which the sum of two is beyond int8, and twice that beyond uint8


def fields_of(dtype):
    fields = {
        "prefix_lengths": torch.tensor([100, 0]),
        "hidden_spans": torch.tensor([[[100, 120], [3, 4]], [[0, 0], [127, 127]]]),
        "segment_ids": torch.arange(2 * LENGTH).view(2, LENGTH) // 3 % 127,
        "mask_choice": torch.tensor([1, 2]),
    }
    return {name: field.to(dtype) for name, field in fields.items()}


@pytest.mark.parametrize("dtype", SMALL, ids=str)
@pytest.mark.parametrize("text", [text.format(2**62) for text in NUMBERED] + OF_FIELDS)
def test_small_integers_give_the_answers_of_int64(text, dtype):
    mask = masks.parse(text)
    lengths, expected_fields = torch.tensor([LENGTH, 77]), fields_of(torch.int64)
    expected = mask.dense(lengths, key_lengths=lengths.flip(0), fields=expected_fields)
    found = mask.dense(lengths.to(dtype), key_lengths=lengths.flip(0).to(dtype), fields=fields_of(dtype))
    assert torch.equal(found, expected)
    lo, hi = split(LENGTH, 13)
    ends = lo[None, :, None], hi[None, :, None], lo[None, None], hi[None, None]
    own = (None, None) if text not in OF_FIELDS else (fields_of(dtype), expected_fields)
    found = mask.classify(*(end.to(dtype) for end in ends), fields=own[0])
    assert torch.equal(torch.stack(found), torch.stack(mask.classify(*ends, fields=own[1])))


@pytest.mark.parametrize("far", [2**31, 2**40, 2**62])
@pytest.mark.parametrize(
    "text, always",
    [
        ("window({0})", True),
        ("window(0, {0})", False),
        ("dilated({0}, 1)", True),
        ("span(0, {0})", True),
        ("span({0}, {0})", False),
        ("span(3, {0})", False),
        ("prefix({0})", True),
        ("chunk({0})", True),
        ("chunk_causal({0})", True),
        ("global_tokens({0})", True),
    ],
)
def test_numbers_beyond_any_position(text, always, far):
    mask, first, end = masks.parse(text.format(far)), torch.tensor([0]), torch.tensor([5])
    cells = mask.dense(torch.tensor([6]))
    every, none = mask.classify(first, end, first, end)
    assert every.item() is always is bool(cells.all())
    assert none.item() is not bool(cells.any())
    last = torch.tensor([2**63 - 1])  # the largest position that a tensor holds
    assert masks.window(far).classify(last, last, last, last)[0].item()
    assert masks.span(1, far).classify(last, last, last, last)[1].item()


@pytest.mark.parametrize(
    "span, hidden",
    [
        ([2, 3], [2, 3, 4]),
        ([2, 2**63 - 1], [2, 3, 4, 5]),  # a sum beyond 64 bits
        ([5, 2**62], [5]),
        ([9, 2], []),  # behind the end
        ([4, 100], [4, 5]),
        ([-2, 4], [0, 1]),  # begins before the sequence
        ([-(2**63), 2**63 - 1], []),
        ([-9, 4], []),
        ([3, 0], []),
        ([3, -1], []),
        ([2**63 - 1, 2**63 - 1], []),
        ([-(2**63), -(2**63)], []),
    ],
)
def test_spans_that_are_not_inside_the_sequence(span, hidden):
    fields = {"hidden_spans": torch.tensor([[span]])}
    visible = masks.visible().dense(torch.tensor([6]), fields=fields)[0, 0, 0]
    assert (~visible).nonzero().flatten().tolist() == hidden
    places = torch.arange(6)[None]
    always, never = masks.visible().classify(places, places, places, places, fields)
    assert always[0].tolist() == visible.tolist()
    assert never[0].tolist() == (~visible).tolist()


@pytest.mark.parametrize("prefix, seen", [(-3, 0), (0, 0), (2, 2), (9, 4), (-(2**63), 0), (2**63 - 1, 4)])
def test_prefixes_that_are_not_inside_the_sequence(prefix, seen):
    fields = {"prefix_lengths": torch.tensor([prefix])}
    assert masks.prefix().dense(torch.tensor([4]), fields=fields)[0, 0, 0].sum() == seen


def test_segments_may_have_any_numbers():
    fields = {"segment_ids": torch.tensor([[-(2**63), 2**63 - 1, -1, -1]])}
    expected = fields["segment_ids"][0][:, None] == fields["segment_ids"][0]
    assert torch.equal(masks.segments().dense(torch.tensor([4]), fields=fields)[0, 0], expected)


NOT_INTEGERS = [torch.float32, torch.bfloat16, torch.float64, torch.bool, torch.complex64, torch.uint64]


@pytest.mark.parametrize("dtype", NOT_INTEGERS, ids=str)
def test_lengths_positions_and_fields_that_are_no_integers(dtype):
    ones, integers = torch.ones(1).to(dtype), torch.ones(1, dtype=torch.long)
    with pytest.raises(ValueError, match=f"`lengths` must be integers; got dtype {dtype}"):
        masks.full().dense(ones)
    with pytest.raises(ValueError, match=f"`key_lengths` must be integers; got dtype {dtype}"):
        masks.full().dense(integers, key_lengths=ones)
    ends = dict.fromkeys(["q_lo", "q_hi", "k_lo", "k_hi"], integers)
    for name in ends:
        with pytest.raises(ValueError, match=f"`{name}` must be integers; got dtype {dtype}"):
            masks.causal().classify(**ends | {name: ones})  # pyright: ignore[reportArgumentType]
    for text, name, shape in [
        ("prefix", "prefix_lengths", (1,)),
        ("visible", "hidden_spans", (1, 1, 2)),
        ("segments", "segment_ids", (1, 1)),
        ("select(full)", "mask_choice", (1,)),
    ]:
        with pytest.raises(ValueError, match=f"`{name}` must be integers; got dtype {dtype}"):
            masks.parse(text).dense(integers, fields={name: torch.zeros(shape).to(dtype)})


def test_lengths_that_are_negative():
    with pytest.raises(ValueError, match="`lengths` must not be negative; got -1"):
        masks.full().dense(torch.tensor([3, -1], dtype=torch.int8))
    with pytest.raises(ValueError, match="`key_lengths` must not be negative; got -2"):
        masks.full().dense(torch.tensor([3]), key_lengths=torch.tensor([-2]))


def test_scores_of_integers():
    with pytest.raises(ValueError, match="the field `key_scores` must be floating point; got torch.int64"):
        masks.topk(1).dense(torch.tensor([3]), fields={"key_scores": torch.zeros(1, 1, 3, dtype=torch.long)})
