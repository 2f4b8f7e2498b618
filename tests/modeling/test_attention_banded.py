"""Windows by plain matrix products: against the oracle, with tails, and apart from other sequences."""

import re

import pytest
import torch
from hypothesis import assume, given
from test_attention import check_close, inputs_of, oracle_attention, random_inputs, with_gradients

from hf_dynmask.modeling import attention_banded
from hf_dynmask.modeling.attention_banded import Blocks, attend, unsupported
from hf_dynmask.modeling.layout import SequenceLayout, in_heads, packed
from hf_dynmask.modeling.plan import MaskPlan
from strategies import cases, examples, leaves

WINDOWS = leaves(["diagonal", "window({i})", "window({i}, {i})"])


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(attention_banded, "SMALLEST_BLOCK", 3)


@examples(400)
@given(cases(cross=False, text=WINDOWS))
def test_output_and_gradients_equal_the_oracle(case):
    plan = case.plan()
    *inputs, grad = inputs_of(case, 4, 4)
    query, key, value = map(packed, inputs)
    assume(unsupported(plan, query, key, value) is None)
    expected = with_gradients(oracle_attention(case, scaling=0.3), *inputs, grad=grad)
    found = with_gradients(
        lambda q, k, v: in_heads(attend(packed(q), packed(k), packed(v), plan, scaling=0.3)[0]), *inputs, grad=grad
    )
    check_close(found, expected, torch.float64)


def test_nan_stays_in_its_sequence():
    layout = SequenceLayout.from_lengths(torch.tensor([5, 2, 6]))
    plan = MaskPlan("window(2)", layout)
    query, key, value = states = [packed(x) for x in random_inputs(layout, layout, (2, 2, 8, 8))[:3]]
    right = attend(query, key, value, plan, scaling=0.5)[0]
    for poisoned in range(3):
        inputs = [x.clone() for x in states]
        inputs[poisoned][6] = torch.nan
        query, key, value = inputs
        output = attend(query, key, value, plan, scaling=0.5)[0]
        others = layout.sequence_ids != 1
        assert torch.equal(output[others], right[others])
        assert output[~others].isnan().all()


@pytest.mark.parametrize(
    "band, tokens, blocks", [((2, 0), 10, (4, 3, 2, 0, 2)), ((9, 1), 5, (1, 5, 5, 1, 0)), ((0, 0), 3, (1, 3, 0, 0, 0))]
)
def test_blocks(band, tokens, blocks):
    assert Blocks.of(band, tokens) == blocks


@pytest.mark.parametrize(
    "text, message",
    [
        ("causal", "it supports windows between the tokens of one layout; got 'causal'"),
        ("segments", "it supports windows between the tokens of one layout; got 'segments'"),
        ("window(2)", r"it holds at most 10 scores at once; got 168 with 'window\(2, 2\)'"),
    ],
)
def test_what_it_cannot_serve(text, message, monkeypatch):
    monkeypatch.setattr(attention_banded, "LARGEST", 10)
    layout = SequenceLayout.from_lengths(torch.tensor([5, 5]))
    plan = MaskPlan(text, layout, fields={"segment_ids": torch.zeros(1, 10, dtype=torch.long)})
    states = torch.zeros(10, 2, 8)
    found = unsupported(plan, states, states, states)
    assert found is not None
    assert re.fullmatch(message, found)
