"""Packed kernels: what they are called with means the mask (by their documentation), and all of it on CUDA."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from test_attention import check_close, inputs_of, oracle_attention, random_inputs, with_gradients
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import oracle
from hf_dynmask.modeling import attention_varlen
from hf_dynmask.modeling.attention_reference import attend as attend_reference
from hf_dynmask.modeling.attention_varlen import TAIL_PIECES, attend, unsupported
from hf_dynmask.modeling.layout import SequenceLayout, in_heads, packed
from hf_dynmask.modeling.plan import MaskPlan
from strategies import cases, examples, leaves

BANDS = ["full", "causal", "backward", "diagonal", "window({i})", "window({i}, {i})"]


def attend_varlen(plan, scaling, **options):
    return lambda q, k, v: in_heads(attend(packed(q), packed(k), packed(v), plan, scaling=scaling, **options)[0])


# --- what the kernels are called with ----------------------------------------------------------------------------


def documented_attention(packed):
    """Attention of packed `(tokens, heads, size)`, one sequence at a time, as the kernels' documentation has it."""
    left, right = packed.band
    outputs = [packed.query.new_empty(0, packed.query.shape[1], packed.value.shape[2])]
    for ends, states in ((packed.ends, packed.query), (packed.key_ends, packed.key)):
        assert ends.dtype == torch.int32
        assert ends[0] == 0 and ends[-1] == len(states)
    for sequence in zip(
        packed.query.split(packed.ends.diff().tolist()),
        packed.key.split(packed.key_ends.diff().tolist()),
        packed.value.split(packed.key_ends.diff().tolist()),
        strict=True,
    ):
        query, key, value = (states.transpose(0, 1) for states in sequence)
        queries, keys = query.shape[1], key.shape[1]
        assert queries <= packed.longest and keys <= packed.key_longest
        i, j = torch.arange(queries)[:, None] + keys - queries, torch.arange(keys)
        allowed = torch.ones(queries, keys, dtype=torch.bool)
        allowed &= True if left is None else j >= i - left
        allowed &= True if right is None else j <= i + right
        outputs.append(oracle.sequence_attention(query, key, value, allowed[None], packed.scaling).transpose(0, 1))
    return torch.cat(outputs)


@contextmanager
def kernel(function=documented_attention):
    """A kernel in a form for the CPU; it is called with what the real ones take."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_varlen, "_kernel", lambda *_: (function, None))
        yield


@examples(600)
@given(cases(text=st.lists(leaves(BANDS), min_size=1, max_size=3).map(" & ".join)))
def test_output_and_gradients_equal_the_oracle(case):
    plan = case.plan()
    assume(attention_varlen._unsupported_mask(plan) is None)
    *inputs, grad = inputs_of(case, 4, 4)
    expected = with_gradients(oracle_attention(case, scaling=0.3), *inputs, grad=grad)
    with kernel():
        found = with_gradients(attend_varlen(plan, 0.3), *inputs, grad=grad)
    check_close(found, expected, torch.float64)


SMALLEST, LARGEST = TAIL_PIECES


@pytest.mark.parametrize("bound", [7, SMALLEST + 9, 9 * LARGEST])
@pytest.mark.parametrize("places", [10, 11, 10 + SMALLEST, 10 + 3 * LARGEST + 5])
def test_a_tail_is_of_sequences_of_its_own(places, bound, monkeypatch):
    monkeypatch.setattr("hf_dynmask.modeling.layout.reads_are_free", lambda device: False)
    layout = SequenceLayout.from_lengths(torch.tensor([7, 0, 3, 0, 0]), (1, places))
    layout = replace(layout, longest=bound)
    assert layout.num_tokens == places
    packed = []
    with kernel(lambda arguments: packed.append(arguments) or arguments.query):
        inputs = random_inputs(layout, layout, (2, 2, 8, 8))[:3]
        attend_varlen(MaskPlan("causal", layout), 0.5)(*inputs)
    sizes = packed[0].ends.diff()
    assert sizes[:5].tolist() == [7, 0, 3, 0, 0]
    assert sizes.sum() == places and sizes[5:].max() <= max(SMALLEST, min(bound, LARGEST))
    assert sizes.max() <= packed[0].longest <= min(places, max(bound, SMALLEST))


class Recorded(TorchDispatchMode):
    """The calls of operators whose name holds `part`."""

    def __init__(self, part):
        super().__init__()
        self.part, self.calls = part, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if self.part in str(function):
            self.calls.append((args, kwargs or {}))
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("text, is_causal, window", [
    ("full", False, (-1, -1)),
    ("causal", True, (-1, 0)),
    ("backward", False, (0, -1)),
    ("causal & window(2, 5)", False, (2, 0)),
    ("window(3) & window(9, 1)", False, (3, 1)),
    (f"window({2**62}, 0)", False, (7, 0)),
])  # fmt: skip
def test_what_flash_attention_is_given(text, is_causal, window):
    layout = SequenceLayout.from_lengths(torch.tensor([7, 3]), (2, 7)).to("meta")
    inputs = [x.to("meta") for x in random_inputs(layout, layout, (4, 2, 8, 8), torch.bfloat16)[:3]]
    attend_varlen(MaskPlan(text, layout), 0.5)(*inputs)  # tried before
    with Recorded("_flash_attention_forward") as recorded:
        attend_varlen(MaskPlan(text, layout), 0.5, dropout=0.25)(*inputs)
    ((arguments, options),) = recorded.calls
    assert arguments[3] is arguments[4]  # one tensor says that queries and keys share it
    assert arguments[7:9] == (0.25, is_causal)
    assert (options["window_size_left"], options["window_size_right"]) == window and options["scale"] == 0.5


@pytest.mark.parametrize("text, mask_type", [("full", 0), ("causal", 1)])
def test_what_memory_efficient_attention_is_given(text, mask_type):
    layout = SequenceLayout.from_lengths(torch.tensor([7, 3]), (2, 7)).to("meta")
    inputs = [x.to("meta") for x in random_inputs(layout, layout, (4, 2, 8, 8), torch.float32)[:3]]
    attend_varlen(MaskPlan(text, layout), 0.5)(*inputs)  # tried before
    with Recorded("_efficient_attention_forward") as recorded:
        attend_varlen(MaskPlan(text, layout), 0.5, dropout=0.25)(*inputs)
    ((arguments, _),) = recorded.calls
    assert [x.shape for x in arguments[:3]] == [(1, 10, 4, 8)] * 3  # heads are repeated
    assert arguments[8:10] == (0.25, mask_type)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("text", ["full", "causal"])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_torch_takes_what_it_is_called_with(text, key_heads, dtype):
    """On tensors without values, forward and backward: names, types and shapes are right."""
    layout = SequenceLayout.from_lengths(torch.tensor([7, 3])).to("meta")
    *inputs, grad = (x.to("meta") for x in random_inputs(layout, layout, (4, key_heads, 64, 64), dtype))
    plan = MaskPlan(text, layout)
    results = with_gradients(attend_varlen(plan, 0.5, dropout=0.1), *inputs, grad=grad)
    assert [result.shape for result in results] == [grad.shape, *(x.shape for x in inputs)]


@pytest.mark.parametrize("kernel", ["_flash", "_efficient"])
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_operators_are_tried_in_any_mode(mode, kernel):
    attention_varlen._tried.cache_clear()
    with mode():
        assert attention_varlen._tried(kernel, "meta", None, torch.bfloat16) is None


def test_an_operator_that_is_wrong_is_said(monkeypatch):
    monkeypatch.setattr(attention_varlen, "_efficient", lambda packed: packed.value * 1.2)
    try:
        found = attention_varlen._tried("_efficient", "cpu", None, torch.float64)
        assert found == "PyTorch's operator gives wrong values here"
        monkeypatch.setattr(attention_varlen, "_efficient", documented_attention)
        attention_varlen._tried.cache_clear()
        assert attention_varlen._tried("_efficient", "cpu", None, torch.float64) is None
    finally:
        attention_varlen._tried.cache_clear()


def test_an_operator_that_is_gone_is_said(monkeypatch):
    def missing(packed):
        raise AttributeError("no such operator")

    attention_varlen._tried.cache_clear()
    monkeypatch.setattr(attention_varlen, "_flash", missing)
    layout = SequenceLayout.from_lengths(torch.tensor([7, 3])).to("meta")
    try:
        states = torch.empty(10, 2, 64, device="meta", dtype=torch.bfloat16)
        assert unsupported(MaskPlan("full", layout), states, states, states) is None  # the other one serves
        found = unsupported(MaskPlan("window(2)", layout), states, states, states)
        assert found is not None
        assert "flash attention: PyTorch's operator does not work here: no such operator" in found
        assert "memory-efficient attention: it supports `full` and `causal`; got the window (2, 2)" in found
    finally:
        attention_varlen._tried.cache_clear()


@pytest.mark.parametrize("queries, keys", [([0], [0]), ([3, 0], [0, 0]), ([0, 0], [2, 4]), ([], [])])
def test_batches_without_a_pair(queries, keys):
    layout, key_layout = (
        SequenceLayout.from_lengths(torch.tensor(sizes, dtype=torch.long)) for sizes in (queries, keys)
    )
    *inputs, grad = random_inputs(layout, key_layout, (4, 2, 8, 8))
    plan = MaskPlan("full", layout, key_layout)
    output, *grads = with_gradients(attend_varlen(plan, 0.5), *inputs, grad=grad)
    assert torch.equal(output, torch.zeros_like(grad))
    for x, found in zip(inputs, grads, strict=True):
        assert torch.equal(found, torch.zeros_like(x))


# --- what they cannot serve --------------------------------------------------------------------------------------


LAYOUT = SequenceLayout.from_lengths(torch.tensor([5, 4]), (2, 5))
OTHER = SequenceLayout.from_lengths(torch.tensor([5, 4]), (2, 5))
GAPS = LAYOUT.without(torch.tensor([[False, True, False, False, False], [False] * 5]))


def reason(
    text="causal",
    key_layout=None,
    layout=LAYOUT,
    device="cuda",
    dtype=torch.bfloat16,
    sizes=(64, 64),
    needs_grad=False,
    capability=(8, 0),
):
    with FakeTensorMode():
        query, key, value = (
            torch.empty(9, 2, sizes[place], device=device, dtype=dtype, requires_grad=needs_grad) for place in (0, 0, 1)
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        patch.setattr(attention_varlen, "_tried", lambda *_: None)
        return unsupported(MaskPlan(text, layout, key_layout), query, key, value)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"text": "causal | prefix(2)"}, "it supports `full`, `causal` and windows; got 'causal | prefix(2)'"),
        ({"key_layout": OTHER}, "between queries and keys of different layouts it supports `full`; got 'causal'"),
        (
            {"layout": GAPS, "text": "window(1, 0)"},
            "its windows count tokens, not positions, and tokens are missing; got 'window(1, 0)'",
        ),
        ({"device": "cpu"}, "it runs on CUDA devices; got 'cpu'"),
        (
            {"dtype": torch.float32, "text": "window(3, 0)"},
            "flash attention: it supports torch.float16 and torch.bfloat16; got torch.float32; memory-efficient "
            "attention: it supports `full` and `causal`; got the window (3, 0)",
        ),
        (
            {"dtype": torch.float64},
            "flash attention: it supports torch.float16 and torch.bfloat16; got torch.float64; memory-efficient "
            "attention: it supports torch.float16, torch.bfloat16, torch.float32; got torch.float64",
        ),
        (
            {"sizes": (64, 36)},
            "flash attention: it supports values with the head size of queries, 64; got 36; memory-efficient "
            "attention: it supports head sizes that are multiples of 8; got 64 and 36",
        ),
        (
            {"sizes": (264, 264), "text": "backward"},
            "flash attention: it supports head sizes that are multiples of 8 up to 256; got 264; memory-efficient "
            "attention: it supports `full` and `causal`; got the window (0, None)",
        ),
        (
            {"sizes": (256, 256), "needs_grad": True, "text": "backward"},
            "flash attention: it supports head sizes that are multiples of 8 up to 192; got 256; memory-efficient "
            "attention: it supports `full` and `causal`; got the window (0, None)",
        ),
        (
            {"capability": (7, 5)},
            "flash attention: it supports GPUs of compute capability (8, 0) and later; got (7, 5); memory-efficient "
            "attention: it supports torch.bfloat16 on GPUs of compute capability (8, 0) and later",
        ),
    ],
    ids=str,
)
def test_what_they_cannot_serve(options, message):
    assert reason(**options) == message


@pytest.mark.parametrize(
    "options",
    [
        {"needs_grad": True, "sizes": (192, 192)},
        {"needs_grad": True, "sizes": (256, 256)},  # memory-efficient
        {"text": "window(1, 0)", "dtype": torch.float16, "sizes": (256, 256)},
        {"dtype": torch.float32, "sizes": (36, 64)},
        {"dtype": torch.float16, "capability": (7, 5)},
        {"text": "full", "key_layout": OTHER},
        {"text": "full", "layout": GAPS},
        {"text": "causal & window(0)", "layout": GAPS},
    ],
    ids=str,
)
def test_what_they_can_serve(options):
    assert reason(**options) is None


# --- CUDA ----------------------------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)], ids=str)
@pytest.mark.parametrize("text", ["full", "causal", "cross", "backward", "window(20, 3)", "causal & window(40, 0)"])
def test_output_and_gradients_are_no_worse_than_twice_the_eager_error(text, heads, dtype):
    layout = key_layout = SequenceLayout.from_lengths(torch.tensor([257, 0, 1, 100, 257])).to("cuda")
    if text == "cross":
        text, key_layout = "full", SequenceLayout.from_lengths(torch.tensor([63, 5, 0, 300, 1])).to("cuda")
    plan = MaskPlan(text, layout, key_layout)
    inputs = [x.cuda() for x in random_inputs(layout, key_layout, (*heads, 64, 64))]
    query, key, value = (packed(x.to(dtype)) for x in inputs[:3])
    if dtype == torch.float32 and text not in ("full", "causal"):
        assert unsupported(plan, query, key, value) is not None
        return
    assert unsupported(plan, query, key, value) is None
    poison = [torch.full_like(state, torch.nan) for state in (query, key, value) * 8]
    del poison  # what a kernel does not write is NaN

    def results(implementation, dtype):
        *states, grad = (x.to(dtype) for x in inputs)
        return with_gradients(
            lambda *states: in_heads(implementation(*map(packed, states), plan, scaling=0.125)[0]), *states, grad=grad
        )

    exact, eager = results(attend_reference, torch.float64), results(attend_reference, dtype)
    names = "output", "query gradient", "key gradient", "value gradient"
    for name, right, expected, got in zip(names, exact, eager, results(attend, dtype), strict=True):
        error, eager_error = ((x.double() - right).norm().item() for x in (got, expected))
        rounding = 1e-6 * right.norm().item() if dtype == torch.float32 else 0
        assert error <= 2 * eager_error + rounding, f"{name}: error {error:.2e}, eager {eager_error:.2e}"
