"""MaskPlan: the dense form in the batch's layout and the tiles to compute, against the oracle."""

import numpy as np
import pytest
import torch
from hypothesis import given

from hf_dynmask.layout import SequenceLayout
from hf_dynmask.plan import MaskPlan
from strategies import cases, examples


def places(layout):
    """Row and columns of each sequence's tokens, in the order in which the batch names its sequences."""
    found = {}
    for sequence, indices in zip(layout.rank.tolist(), layout.indices.split(layout.sizes), strict=True):
        rows, columns = np.divmod(indices.numpy(), max(layout.shape[1], 1))
        found[sequence] = rows, columns
    return [found[sequence] for sequence in range(len(found))]


def tile_pairs(tile, group):
    """The pairs that a tile computes, as bool (sequences, queries, keys)."""
    pairs = np.zeros((group.count, group.queries, group.keys), dtype=bool)
    queries = np.arange(group.queries)[tile.queries]
    keys = np.arange(group.keys)[tile.keys]
    allowed = np.ones((1, len(queries), len(keys)), dtype=bool) if tile.allowed is None else tile.allowed[:, 0].numpy()
    pairs[:, queries[:, None], keys] = np.tril(allowed) if tile.causal else allowed
    return pairs


@examples(1000)
@given(cases())
def test_dense_form_in_the_layout_of_the_batch(case):
    expected = np.zeros((case.layout.shape[0], case.layout.shape[1], case.key_layout.shape[1]), dtype=bool)
    sequences = zip(places(case.layout), places(case.key_layout), case.oracle_masks(), strict=True)
    for (rows, queries), (_, keys), cells in sequences:
        expected[rows[:, None], queries[:, None], keys] = cells
    np.testing.assert_array_equal(case.plan().dense.numpy(), expected[:, None])


@examples(1000)
@given(cases())
def test_tiles_hold_every_allowed_pair_and_no_query_twice(case):
    plan, masks = case.plan(), case.oracle_masks()
    layout, key_layout = plan.arranged
    assert layout.rank.tolist() == key_layout.rank.tolist()
    sequences = iter(layout.rank.tolist())
    for group in plan.groups:
        pairs = np.zeros((group.count, group.queries, group.keys), dtype=bool)
        for tile in group.tiles:
            assert not pairs[:, tile.queries].any()
            pairs |= tile_pairs(tile, group)
        for sequence_pairs in pairs:
            np.testing.assert_array_equal(sequence_pairs, masks[next(sequences)])
    assert next(sequences, None) is None


@pytest.mark.parametrize(
    "text, fields, most",
    [
        ("causal & window(255, 0)", {}, (256 + 2 * 128) * 8192),
        ("window(64) | prefix(16)", {}, (129 + 3 * 128 + 128) * 8192),
        ("chunk(512)", {}, 512 * 8192),
        ("segments", {"segment_ids": torch.arange(8192).div(512, rounding_mode="floor")[None]}, 512 * 8192),
        ("visible & window(64)", {"hidden_spans": torch.tensor([[[1024, 4096]]])}, (129 + 2 * 128) * 4500),
    ],
)
def test_work_of_a_sparse_mask_grows_linearly_with_length(text, fields, most):
    (group,) = MaskPlan(text, SequenceLayout.from_lengths(torch.tensor([8192])), fields=fields).groups
    keys = torch.arange(8192)
    assert 0 < sum((tile.queries.stop - tile.queries.start) * len(keys[tile.keys]) for tile in group.tiles) <= most


@pytest.mark.parametrize("text", ["full", "causal"])
def test_full_and_causal_masks_need_no_mask_tensor(text):
    layout = SequenceLayout.from_lengths(torch.tensor([300, 300, 5]), (3, 300))
    for group in MaskPlan(text, layout).groups:
        assert group.is_whole
        assert group.tiles[0].allowed is None
        assert group.tiles[0].causal == (text == "causal")


def test_tiles_of_a_full_block_carry_no_mask():
    (group,) = MaskPlan("chunk(128)", SequenceLayout.from_lengths(torch.tensor([256]))).groups
    assert [tile.allowed for tile in group.tiles] == [None, None]


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
    ],
)
def test_fields_that_do_not_fit(text, fields, message):
    layout = SequenceLayout.from_lengths(torch.tensor([5, 3]), (2, 5))
    with pytest.raises(ValueError, match=message):
        MaskPlan(text, layout, fields=fields)
