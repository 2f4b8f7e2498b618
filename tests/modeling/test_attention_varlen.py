"""Packed flash kernels: what they are called with means the mask (by their documentation), and all of it on CUDA."""

import inspect
import sys
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from test_attention import check_close, inputs_of, oracle_attention, random_inputs, with_gradients
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.varlen import varlen_attn

import oracle
from hf_dynmask.modeling import attention_varlen
from hf_dynmask.modeling.attention_reference import attend as attend_reference
from hf_dynmask.modeling.attention_varlen import GROUPED, attend, unsupported
from hf_dynmask.modeling.layout import SequenceLayout
from hf_dynmask.modeling.plan import MaskPlan
from strategies import cases, examples, leaves

BANDS = ["full", "causal", "backward", "diagonal", "window({i})", "window({i}, {i})"]
KERNELS = "torch", "flash-attn"


def attend_varlen(plan, scaling, **options):
    return lambda query, key, value: attend(query, key, value, plan, scaling=scaling, **options)[0]


# --- what the kernels are called with ----------------------------------------------------------------------------


def documented_attention(packed, scaling, window):
    """Attention of packed `(tokens, heads, size)`, one sequence at a time, as both kernels' documentation has it."""
    q, k, v, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k = packed
    left, right = window
    outputs = [q.new_empty(0, q.shape[1], v.shape[2])]
    for cu_seq_lens in (cu_seq_lens_q, cu_seq_lens_k):
        assert cu_seq_lens.dtype == torch.int32
        assert cu_seq_lens[0] == 0
    for sequence in zip(
        q.split(cu_seq_lens_q.diff().tolist()),
        k.split(cu_seq_lens_k.diff().tolist()),
        v.split(cu_seq_lens_k.diff().tolist()),
        strict=True,
    ):
        query, key, value = (states.transpose(0, 1) for states in sequence)
        queries, keys = query.shape[1], key.shape[1]
        assert queries <= max_length_q < 2**31 > max_length_k >= keys
        assert max(window) < 2**31
        i, j = torch.arange(queries)[:, None] + keys - queries, torch.arange(keys)
        allowed = ((j >= i - left) | (left < 0)) & ((j <= i + right) | (right < 0))
        outputs.append(oracle.sequence_attention(query, key, value, allowed[None], scaling).transpose(0, 1))
    return torch.cat(outputs)


@contextmanager
def kernel(name, dropouts=None):
    """One of the kernels in a form for the CPU; it is called with what the real one takes."""

    def of_torch(*packed, **options):
        given = inspect.signature(varlen_attn).bind(*packed, **options)
        assert packed[0].shape[1] == packed[1].shape[1] or options.items() >= GROUPED.items()
        return documented_attention(packed, given.arguments["scale"], given.arguments["window_size"])

    def of_flash_attn(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
    ):
        if dropouts is not None:
            dropouts.append(dropout_p)
        packed = q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        return documented_attention(packed, softmax_scale, (window_size[0], 0) if causal else window_size)

    module = ModuleType("flash_attn")
    module.__spec__ = ModuleSpec("flash_attn", None)
    module.flash_attn_varlen_func = of_flash_attn  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_varlen, "varlen_attn", of_torch)
        patch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: name == "torch")
        if name == "flash-attn":
            patch.setitem(sys.modules, "flash_attn", module)
        yield


@examples(600)
@given(cases(text=st.lists(leaves(BANDS), min_size=1, max_size=3).map(" & ".join)), st.sampled_from(KERNELS))
def test_output_and_gradients_equal_the_oracle(case, name):
    plan = case.plan()
    assume(attention_varlen._unsupported_mask(plan) is None)
    *inputs, grad = inputs_of(case, 4, 4)
    expected = with_gradients(oracle_attention(case, scaling=0.3), *inputs, grad=grad)
    with kernel(name):
        found = with_gradients(attend_varlen(plan, 0.3), *inputs, grad=grad)
    check_close(found, expected, torch.float64)


@pytest.mark.parametrize("text, window", [
    ("full", (-1, -1)),
    ("causal", (-1, 0)),
    ("backward", (0, -1)),
    ("causal & window(2, 5)", (2, 0)),
    ("window(3) & window(9, 1)", (3, 1)),
    (f"window({2**62}, 0)", (7, 0)),
])  # fmt: skip
def test_window(text, window):
    layout = SequenceLayout.from_lengths(torch.tensor([7, 3]))
    inputs = random_inputs(layout, layout, (4, 2, 8, 8))[:3]
    found = []

    def record(*packed, scale, window_size, enable_gqa=False):
        found.append((window_size, scale, packed[3] is packed[4]))  # one tensor says that queries and keys share it
        return packed[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_varlen, "varlen_attn", record)
        patch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
        attend_varlen(MaskPlan(text, layout), 0.5)(*inputs)
    assert found == [(window, 0.5, True)]


def test_dropout_is_flash_attns():
    layout, dropouts = SequenceLayout.from_lengths(torch.tensor([7, 3])), []
    inputs = random_inputs(layout, layout, (2, 2, 8, 8))[:3]
    with kernel("flash-attn", dropouts):
        attend_varlen(MaskPlan("causal", layout), 0.5, dropout=0.25)(*inputs)
    assert dropouts == [0.25]


@pytest.mark.parametrize("text", ["full", "causal", "window(2, 1)"])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_torch_takes_what_it_is_called_with(text, key_heads, monkeypatch):
    """On tensors without storage, forward and backward: names, types and shapes are right."""
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    layout = SequenceLayout.from_lengths(torch.tensor([7, 3])).to("meta")
    *inputs, grad = (x.to("meta") for x in random_inputs(layout, layout, (4, key_heads, 64, 64), torch.bfloat16))
    plan = MaskPlan(text, layout)
    results = with_gradients(attend_varlen(plan, 0.5), *inputs, grad=grad)
    assert [result.shape for result in results] == [grad.shape, *(x.shape for x in inputs)]


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
GAPS = LAYOUT.without(torch.tensor([[False, True, False, False, False], [False] * 5]))


def reason(
    text="causal",
    key_layout=None,
    layout=LAYOUT,
    device="cuda",
    dtype=torch.bfloat16,
    sizes=(64, 64),
    dropout=0.0,
    needs_grad=False,
    capability=(8, 0),
    flash_in_torch=True,
):
    with FakeTensorMode():
        query, key, value = (
            torch.empty(1, 2, 9, sizes[place], device=device, dtype=dtype, requires_grad=needs_grad)
            for place in (0, 0, 1)
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        patch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: flash_in_torch)
        patch.setattr(attention_varlen, "find_spec", lambda name: None)
        return unsupported(MaskPlan(text, layout, key_layout), query, key, value, dropout)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"text": "causal | prefix(2)"}, "it serves `full`, `causal` and windows; got 'causal | prefix(2)'"),
        (
            {"key_layout": LAYOUT.by_length()},
            "between queries and keys of different layouts it serves `full`; got 'causal'",
        ),
        (
            {"layout": GAPS, "text": "window(1, 0)"},
            "its windows count tokens, not positions, and tokens are missing; got 'window(1, 0)'",
        ),
        ({"device": "cpu"}, "it runs on CUDA devices; got 'cpu'"),
        ({"dtype": torch.float32}, "it takes torch.float16 and torch.bfloat16; got torch.float32"),
        ({"sizes": (64, 32)}, "it takes values of the head size of queries, 64; got 32"),
        ({"sizes": (36, 36)}, "it takes head sizes that are multiples of 8 up to 256; got 36"),
        ({"sizes": (264, 264)}, "it takes head sizes that are multiples of 8 up to 256; got 264"),
        (
            {"sizes": (256, 256), "needs_grad": True},
            "it takes head sizes that are multiples of 8 up to 192; got 256",
        ),
        ({"capability": (7, 5)}, "it takes GPUs of compute capability (8, 0) and later; got (7, 5)"),
        ({"dropout": 0.1}, "its dropout is flash-attn's, not installed"),
        ({"flash_in_torch": False}, "without flash attention in PyTorch it is flash-attn's, not installed"),
    ],
    ids=str,
)
def test_what_they_cannot_serve(options, message):
    assert reason(**options) == message


@pytest.mark.parametrize(
    "options",
    [
        {"needs_grad": True, "sizes": (192, 192)},
        {"text": "window(1, 0)", "dtype": torch.float16, "sizes": (256, 256)},
        {"text": "full", "key_layout": LAYOUT.by_length()},
        {"text": "full", "layout": GAPS},
        {"text": "causal & window(0)", "layout": GAPS},
    ],
    ids=str,
)
def test_what_they_can_serve(options):
    assert reason(**options) is None


# --- CUDA ----------------------------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)], ids=str)
@pytest.mark.parametrize("text", ["full", "causal", "backward", "window(20, 3)", "causal & window(40, 0)", "cross"])
def test_output_and_gradients_are_no_worse_than_twice_the_eager_error(text, heads, dtype):
    layout = key_layout = SequenceLayout.from_lengths(torch.tensor([257, 0, 1, 100, 257])).to("cuda")
    if text == "cross":
        text, key_layout = "full", SequenceLayout.from_lengths(torch.tensor([63, 5, 0, 300, 1])).by_length().to("cuda")
    plan = MaskPlan(text, layout, key_layout)
    inputs = [x.cuda() for x in random_inputs(layout, key_layout, (*heads, 64, 64))]
    query, key, value = (x.to(dtype) for x in inputs[:3])
    assert unsupported(plan, query, key, value) is None

    def results(implementation, dtype):
        *states, grad = (x.to(dtype) for x in inputs)
        return with_gradients(lambda *states: implementation(*states, plan, scaling=0.125)[0], *states, grad=grad)

    exact, eager = results(attend_reference, torch.float64), results(attend_reference, dtype)
    names = "output", "query gradient", "key gradient", "value gradient"
    for name, right, expected, got in zip(names, exact, eager, results(attend, dtype), strict=True):
        error, eager_error = ((x.double() - right).norm().item() for x in (got, expected))
        assert error <= 2 * eager_error, f"{name}: error {error:.2e}, eager {eager_error:.2e}"
