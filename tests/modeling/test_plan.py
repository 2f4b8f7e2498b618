"""MaskPlan: the dense form in the batch's layout and the tiles to compute, against the oracle."""

import numpy as np
import pytest
import torch
from hypothesis import given

from hf_dynmask.modeling.layout import SequenceLayout
from hf_dynmask.modeling.plan import MaskPlan
from strategies import cases, examples

LONG = "causal & window(4095, 0) | global_tokens(16)"


def plan_of(case):
    return case.plan() if case.key_scores is None else case.plan().with_key_scores(case.head_scores)


def keys_of(tile, group):
    return np.concatenate([np.arange(group.keys)[part] for part in tile.keys])


def tile_pairs(plan, tile, group):
    """The pairs that a tile computes, as bool (sequences | 1, heads | 1, queries, keys) of the whole group."""
    queries, keys = np.arange(group.queries)[tile.queries], keys_of(tile, group)
    mask = plan.tile_mask(group, tile)
    allowed = np.ones((1, 1, len(queries), len(keys)), dtype=bool) if mask is None else mask.numpy()
    pairs = np.zeros((*allowed.shape[:2], group.queries, group.keys), dtype=bool)
    pairs[:, :, queries[:, None], keys] = np.tril(allowed) if tile.causal else allowed
    return pairs


@examples(1000)
@given(cases())
def test_dense_form_in_the_layout_of_the_batch(case):
    heads, (rows, width), (_, key_width) = case.batch.heads, case.layout.shape, case.key_layout.shape
    expected = np.zeros((rows, heads, width, key_width), dtype=bool)
    sequences = zip(case.queries.rows, case.queries.columns, case.keys.columns, case.oracle_masks, strict=True)
    for row, queries, keys, allowed in sequences:
        expected[row][:, queries[:, None], keys] = allowed
    np.testing.assert_array_equal(plan_of(case).dense(heads).expand(expected.shape).numpy(), expected)


@examples(1000)
@given(cases())
def test_tiles_hold_every_allowed_pair_and_no_query_twice(case):
    plan, masks, heads = plan_of(case), case.oracle_masks, case.batch.heads
    for run, part in plan.by_heads(heads):
        sequences = iter(plan.order)
        for group in part.groups:
            pairs = np.zeros((group.count, run.stop - run.start, group.queries, group.keys), dtype=bool)
            for tile in group.tiles:
                assert not pairs[:, :, tile.queries].any()
                pairs |= tile_pairs(part, tile, group)
            for sequence_pairs in pairs:
                np.testing.assert_array_equal(sequence_pairs, masks[next(sequences)][run])
        assert next(sequences, None) is None


@examples(200)
@given(cases())
def test_runs_of_heads_cover_all_heads_once(case):
    runs = [run for run, _ in case.plan().by_heads(case.batch.heads)]
    assert [head for run in runs for head in range(run.start, run.stop)] == list(range(case.batch.heads))


@pytest.mark.parametrize(
    "text, fields, most",
    [
        ("causal & window(255, 0)", {}, (256 + 2 * 128) * 8192),
        ("window(64) | prefix(16)", {}, (129 + 3 * 128 + 128) * 8192),
        ("chunk(512)", {}, 512 * 8192),
        ("segments", {"segment_ids": torch.arange(8192).div(512, rounding_mode="floor")[None]}, 512 * 8192),
        ("causal & window(255, 0) | global_tokens(16)", {}, (256 + 3 * 128 + 128) * 8192),
        ("shared_question", {"segment_ids": torch.arange(8192).div(512, rounding_mode="floor")[None]}, 2 * 512 * 8192),
        ("global_tokens | diagonal", {"global_tokens": torch.arange(8192)[None] == 4000}, 3 * 128 * 8192),
        ("select(window(64), full)", {"mask_choice": torch.tensor([0])}, (129 + 2 * 128) * 8192),
        ("visible & window(64)", {"hidden_spans": torch.tensor([[[1024, 4096]]])}, (129 + 2 * 128) * 4500),
    ],
)
def test_work_of_a_sparse_mask_grows_linearly_with_length(text, fields, most):
    (group,) = MaskPlan(text, SequenceLayout.from_lengths(torch.tensor([8192])), fields=fields).groups
    sizes = [(tile.queries.stop - tile.queries.start, len(keys_of(tile, group))) for tile in group.tiles]
    assert 0 < sum(queries * keys for queries, keys in sizes) <= most


def test_a_plan_of_a_long_sequence_is_small():
    (group,) = MaskPlan(LONG, SequenceLayout.from_lengths(torch.tensor([131_072]))).groups
    assert len(group.tiles) == 131_072 // 128
    assert group.tiles[0].keys == (slice(0, 131_072),)  # the global tokens' block sees all
    assert all(len(tile.keys) <= 2 for tile in group.tiles)
    assert sum(len(keys_of(tile, group)) for tile in group.tiles[1:]) <= 1024 * (4096 + 2 * 128)


@pytest.mark.parametrize("text", ["full", "causal"])
def test_full_and_causal_masks_need_no_mask_tensor(text):
    layout = SequenceLayout.from_lengths(torch.tensor([300, 300, 5]), (3, 300))
    plan = MaskPlan(text, layout)
    for group in plan.groups:
        assert group.is_whole
        assert plan.tile_mask(group, group.tiles[0]) is None
        assert group.tiles[0].causal == (text == "causal")


def test_tiles_of_a_full_block_carry_no_mask():
    (group,) = MaskPlan("chunk(128)", SequenceLayout.from_lengths(torch.tensor([256]))).groups
    assert [tile.is_partial for tile in group.tiles] == [False, False]


def test_layouts_of_different_batches():
    layout, other = (SequenceLayout.from_lengths(torch.tensor(sizes)) for sizes in ([3, 4], [3, 4, 0]))
    with pytest.raises(ValueError, match=r"`key_layout` must hold as many sequences as `layout`, 2; got 3"):
        MaskPlan("full", layout, other)


@pytest.mark.parametrize(
    "text, fields, message",
    [
        ("segments", {}, r"the mask 'segments' reads the field `segment_ids`, which the batch lacks; it has none"),
        (
            "segments",
            {"segment_ids": torch.zeros(2, 4)},
            r"the field `segment_ids` must have shape \(2, 5\); got \(2, 4\)",
        ),
        ("prefix", {"prefix_lengths": torch.zeros(3)}, r"the field `prefix_lengths` must have shape \(2\); got \(3,\)"),
        ("visible", {"hidden_spans": torch.zeros(2, 2)}, r"the field `hidden_spans` must have .*; got \(2, 2\)"),
        ("global_tokens", {"global_tokens": torch.zeros(5)}, r"`global_tokens` must have shape \(2, 5\); got \(5,\)"),
        ("select(full)", {"mask_choice": torch.ones(2).long()}, r"`mask_choice` must hold 0 to 0 for .*; got 1"),
        (
            "dense",
            {"attention_mask": torch.ones(2, 4, 5)},
            r"`attention_mask` must have shape \(2, 5, 5\).*\(2, 4, 5\)",
        ),
        ("dense", {"attention_mask": torch.ones(2, 5)}, r"`attention_mask` must have shape .*; got \(2, 5\)"),
        ("dense", {"attention_mask": torch.ones(2, 5, 5)}, r"`attention_mask` must be bool; got torch.float32"),
    ],
)
def test_fields_that_do_not_fit(text, fields, message):
    layout = SequenceLayout.from_lengths(torch.tensor([5, 3]), (2, 5))
    with pytest.raises(ValueError, match=message):
        MaskPlan(text, layout, fields=fields)


def test_fields_of_keys_that_do_not_fit():
    layout, key_layout = (SequenceLayout.from_lengths(torch.tensor(sizes), (2, 5)) for sizes in ([2, 3], [5, 1]))
    fields = {"segment_ids": torch.zeros(2, 5, dtype=torch.long)}
    message = "the field `key_segment_ids` must be given: keys have 5 positions, but `segment_ids` has values for 3"
    with pytest.raises(ValueError, match=message):
        MaskPlan("segments", layout, key_layout, fields=fields)
    with pytest.raises(ValueError, match=r"the field `key_segment_ids` must have shape \(2, 5\); got \(2, 4\)"):
        MaskPlan("segments", layout, key_layout, fields=fields | {"key_segment_ids": torch.zeros(2, 4)})
