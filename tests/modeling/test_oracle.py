"""The oracle against examples worked by hand."""

import numpy as np
import pytest
import torch

import oracle


@pytest.mark.parametrize(
    "text, rows",
    [
        ("full", ["1111", "1111", "1111", "1111"]),
        ("causal", ["1000", "1100", "1110", "1111"]),
        ("backward", ["1111", "0111", "0011", "0001"]),
        ("diagonal", ["1000", "0100", "0010", "0001"]),
        ("window(1)", ["1100", "1110", "0111", "0011"]),
        ("window(2, 0)", ["1000", "1100", "1110", "0111"]),
        ("window(0, 1)", ["1100", "0110", "0011", "0001"]),
        ("dilated(3, 2)", ["1010", "0101", "1010", "0101"]),
        ("dilated(1, 2)", ["1000", "0100", "0010", "0001"]),
        ("chunk(3)", ["1110", "1110", "1110", "0001"]),
        ("chunk_causal(3)", ["1110", "1110", "1110", "1111"]),
        ("prefix(2)", ["1100", "1100", "1100", "1100"]),
        ("prefix", ["1110", "1110", "1110", "1110"]),
        ("span(1, 2)", ["0110", "0110", "0110", "0110"]),
        ("visible", ["1001", "1001", "1001", "1001"]),
        ("segments", ["1010", "0101", "1010", "0101"]),
        ("causal | prefix(2)", ["1100", "1100", "1110", "1111"]),
        ("causal & ~span(0, 1)", ["0000", "0100", "0110", "0111"]),
        ("diagonal | causal & prefix(1)", ["1000", "1100", "1010", "1001"]),
        ("~(diagonal | causal) & prefix(3)", ["0110", "0010", "0000", "0000"]),
        ("shared_question", ["1100", "1100", "1110", "1101"]),
        ("global_tokens(1) | diagonal", ["1111", "1100", "1010", "1001"]),
        ("global_tokens", ["0010", "0010", "1111", "0010"]),
        ("random(0, 5)", ["0000", "0000", "0000", "0000"]),
        ("random(1, 5)", ["1111", "1111", "1111", "1111"]),
        ("dense", ["1001", "0000", "0110", "0001"]),
        ("dense | diagonal", ["1001", "0100", "0110", "0001"]),
        ("select(full, causal)", ["1000", "1100", "1110", "1111"]),
        ("select(full, causal) & ~span(0, 1)", ["0000", "0100", "0110", "0111"]),
        ("topk(2)", ["0101", "0101", "0101", "0101"]),
        ("topk(3)", ["1101", "1101", "1101", "1101"]),  # keys 0 and 2 tie; the first is taken
        ("topk(2) & causal", ["1000", "1100", "1100", "0101"]),
        ("causal & ~span(1, 1) & topk(1)", ["1000", "1000", "1000", "0001"]),
        ("causal & (diagonal | topk(1))", ["1000", "0100", "0110", "0101"]),
        ("(topk(1) | diagonal) & window(9, 0)", ["1000", "0100", "0110", "0101"]),
        ("topk(1) & topk(2)", ["0100", "0100", "0100", "0100"]),  # each chooses among all
        ("select(topk(9), topk(1)) & ~span(1, 1)", ["0001", "0001", "0001", "0001"]),
        ("custom(wedge)", ["1100", "1111", "1111", "1111"]),
    ],
)
def test_masks_of_four_tokens(text, rows):
    fields = {
        "prefix_lengths": [3],
        "hidden_spans": [[[1, 2], [9, 0]]],
        "segment_ids": [[7, 8, 7, 8]] if "segments" in text else [[0, 0, 1, 2]],
        "global_tokens": [[False, False, True, False]],
        "attention_mask": np.array([[[1, 0, 0, 1], [0, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]]], dtype=bool),
        "mask_choice": [1],
        "key_scores": [[[1.0, 9.0, 1.0, 2.0]]],
    }
    np.testing.assert_array_equal(oracle.dense_mask(text, [4], fields=fields)[0, 0], cells(rows))


def cells(rows):
    return np.array([[cell == "1" for cell in row] for row in rows])


def test_masks_that_differ_by_head():
    fields = {
        "attention_mask": [[np.eye(2, dtype=bool), ~np.eye(2, dtype=bool), np.eye(2, dtype=bool), np.zeros((2, 2))]],
        "key_scores": [[[1, 2], [2, 1], [1, 1], [0, 9]]],
    }
    for text, heads in [
        ("heads(full, causal)", [["11", "11"], ["11", "11"], ["10", "11"], ["10", "11"]]),
        ("heads(full, causal, backward, ~full)", [["11", "11"], ["10", "11"], ["11", "01"], ["00", "00"]]),
        ("causal & heads(full, heads(full, ~full))", [["10", "11"], ["10", "11"], ["00", "00"], ["00", "00"]]),
        ("dense", [["10", "01"], ["01", "10"], ["10", "01"], ["00", "00"]]),
        ("topk(1)", [["01", "01"], ["10", "10"], ["10", "10"], ["01", "01"]]),
        ("topk(1) & heads(full, causal)", [["01", "01"], ["10", "10"], ["10", "10"], ["10", "01"]]),
    ]:
        expected = np.array([cells(head) for head in heads])
        np.testing.assert_array_equal(oracle.dense_mask(text, [2], fields=fields, heads=4)[0], expected)


def test_fields_of_keys_in_sequences_of_their_own():
    fields = {
        "segment_ids": [[4, 5]],
        "key_segment_ids": [[5, 0, 4]],
        "global_tokens": [[False, True]],
        "key_global_tokens": [[False, False, True]],
    }
    for text, rows in [
        ("segments", ["001", "100"]),
        ("shared_question", ["011", "110"]),
        ("global_tokens", ["001", "111"]),
    ]:
        np.testing.assert_array_equal(oracle.dense_mask(text, [2], [3], fields)[0, 0], cells(rows))


def test_the_mask_of_the_positions_that_are_there():
    np.testing.assert_array_equal(oracle.sequence_mask("window(2, 0)", [0, 3, 5])[0], cells(["100", "010", "011"]))
    scores = {"key_scores": [[1, 9, 2, 3]]}
    np.testing.assert_array_equal(oracle.sequence_mask("topk(1)", [0, 2, 3], fields=scores)[0], cells(["001"] * 3))


def test_the_hash_of_random_is_that_of_murmur_hash_3():
    # MurmurHash3_x86_32 of the empty text is its finaliser applied to the seed; these are its published values.
    assert [oracle.mix(seed) for seed in (0, 1, 0xFFFFFFFF)] == [0, 0x514E28B7, 0x81F16F39]
    assert oracle.sequence_mask("random(0.3, 11)", range(200)).mean() == pytest.approx(0.3, abs=0.01)


def test_mask_is_false_beyond_the_lengths():
    expected = np.zeros((3, 1, 2, 3), dtype=bool)
    expected[0, 0, :2, :1] = expected[1, 0, :1, :3] = True
    np.testing.assert_array_equal(oracle.dense_mask("full", [2, 1, 0], key_lengths=[1, 3, 2]), expected)


def test_attention_of_one_query():
    query = torch.tensor([[[2.0], [1.0]]], dtype=torch.float64)
    key = torch.tensor([[[np.log(2.0)], [0.0], [9.0]]], dtype=torch.float64)
    value = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [5.0, 5.0]]], dtype=torch.float64)
    allowed = np.array([[[True, True, False], [False, False, False]]])
    output = oracle.sequence_attention(query, key, value, allowed, scaling=0.5)
    torch.testing.assert_close(output, torch.tensor([[[2 / 3, 1 / 3], [0.0, 0.0]]], dtype=torch.float64))


def test_attention_equals_a_softmax_over_the_allowed_keys_of_grouped_heads():
    query, key, value = (torch.randn(heads, 5, size, dtype=torch.float64) for heads, size in [(4, 3), (2, 3), (2, 6)])
    allowed = np.tril(np.ones((1, 5, 5), dtype=bool))
    output = oracle.sequence_attention(query, key, value, allowed)
    for head in range(4):
        for i in range(5):
            keys, values = key[head // 2, : i + 1], value[head // 2, : i + 1]
            weights = (keys @ query[head, i] / 3**0.5).softmax(0)
            torch.testing.assert_close(output[head, i], weights @ values)


def test_scores_of_keys_add_to_those_of_pairs():
    query, key = torch.zeros(1, 1, 2), torch.zeros(1, 2, 2)
    value = torch.tensor([[[1.0], [0.0]]])
    key_scores = torch.tensor([[3.0, 1.0]]).log()
    output = oracle.sequence_attention(query, key, value, np.ones((1, 1, 2), dtype=bool), key_scores=key_scores)
    torch.testing.assert_close(output, torch.tensor([[[0.75]]]))


def test_a_mask_of_weights_leaves_the_others_as_they_are():
    query, value = torch.ones(1, 1, 1), torch.eye(3)[None]
    weights = torch.tensor([0.2, 0.3, 0.5])
    allowed = np.array([[[True, True, False]]])
    output = oracle.sequence_attention(query, weights.log().view(1, 3, 1), value, allowed, 1.0, apply_mask_to="weights")
    torch.testing.assert_close(output, torch.tensor([[[0.2, 0.3, 0.0]]]))
