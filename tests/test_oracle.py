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
    ],
)
def test_masks_of_four_tokens(text, rows):
    fields = {"prefix_lengths": [3], "hidden_spans": [[[1, 2], [9, 0]]], "segment_ids": [[7, 8, 7, 8]]}
    expected = np.array([[cell == "1" for cell in row] for row in rows])
    np.testing.assert_array_equal(oracle.dense_mask(text, [4], fields=fields)[0], expected)


def test_mask_is_false_beyond_the_lengths():
    expected = np.zeros((3, 2, 3), dtype=bool)
    expected[0, :2, :1] = expected[1, :1, :3] = True
    np.testing.assert_array_equal(oracle.dense_mask("full", [2, 1, 0], key_lengths=[1, 3, 2]), expected)


def test_attention_of_one_query():
    query = torch.tensor([[[2.0], [1.0]]], dtype=torch.float64)
    key = torch.tensor([[[np.log(2.0)], [0.0], [9.0]]], dtype=torch.float64)
    value = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [5.0, 5.0]]], dtype=torch.float64)
    allowed = np.array([[True, True, False], [False, False, False]])
    output = oracle.sequence_attention(query, key, value, allowed, scaling=0.5)
    torch.testing.assert_close(output, torch.tensor([[[2 / 3, 1 / 3], [0.0, 0.0]]], dtype=torch.float64))


def test_attention_equals_a_softmax_over_the_allowed_keys_of_grouped_heads():
    query, key, value = (torch.randn(heads, 5, size, dtype=torch.float64) for heads, size in [(4, 3), (2, 3), (2, 6)])
    allowed = np.tril(np.ones((5, 5), dtype=bool))
    output = oracle.sequence_attention(query, key, value, allowed)
    for head in range(4):
        for i in range(5):
            keys, values = key[head // 2, : i + 1], value[head // 2, : i + 1]
            weights = (keys @ query[head, i] / 3**0.5).softmax(0)
            torch.testing.assert_close(output[head, i], weights @ values)
