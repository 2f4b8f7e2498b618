"""dynmask_attention: every implementation's output and gradients against the oracle; empty rows; no leak."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import oracle
from hf_dynmask import masks
from hf_dynmask.attention import IMPLEMENTATIONS, dynmask_attention
from hf_dynmask.layout import SequenceLayout
from hf_dynmask.plan import MaskPlan
from strategies import cases, examples

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
SHAPES = st.sampled_from([(1, 1, 3, 3), (2, 2, 4, 4), (4, 2, 4, 7), (3, 1, 6, 2)])  # H, Hk, D, Dv
MASKS = [
    "full",
    "causal",
    "causal & window(20, 0)",
    "window(3) | prefix(2)",
    "dilated(40, 4)",
    "chunk(50) & ~span(3, 60)",
]


def random_inputs(layout, key_layout, shape, dtype=torch.float64, seed=0):
    """Query, key and value, flat, and a gradient for the output."""
    heads, key_heads, size, value_size = shape
    queries, keys = layout.num_tokens, key_layout.num_tokens
    generator = torch.Generator().manual_seed(seed)
    sizes = [
        (heads, queries, size),
        (key_heads, keys, size),
        (key_heads, keys, value_size),
        (heads, queries, value_size),
    ]
    return [torch.randn(1, *size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]


def with_gradients(attend, query, key, value, grad):
    """The output of `attend(query, key, value)` and the gradients of the three inputs."""
    inputs = [x.detach().requires_grad_() for x in (query, key, value)]
    output = attend(*inputs)
    return output.detach(), *torch.autograd.grad(output, inputs, grad.to(output.dtype))


def attend_with(implementation, mask, layout, **options):
    """`dynmask_attention` as a function of query, key and value."""
    return lambda query, key, value: dynmask_attention(
        query, key, value, mask, layout, implementation=implementation, **options
    )


def check_close(results, expected, dtype):
    for result, wanted in zip(results, expected, strict=True):
        assert result.dtype == dtype
        torch.testing.assert_close(result.double(), wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def by_sequence(flat, layout):
    """Each sequence's (heads, tokens, D), in the order in which the batch names its sequences."""
    pieces = flat[0].split(layout.sizes, dim=1)
    return [pieces[place] for place in layout.rank.argsort()]


def oracle_attention(allowed, layout, key_layout, scaling=None):
    """The oracle as a function of flat tensors; `allowed` has one matrix a sequence."""

    def attend(query, key, value):
        sequences = by_sequence(query, layout), by_sequence(key, key_layout), by_sequence(value, key_layout), allowed
        outputs = [oracle.sequence_attention(*one, scaling) for one in zip(*sequences, strict=True)]
        return torch.cat([outputs[b] for b in layout.rank], dim=1)[None]

    return attend


def pairs_of_tokens(allowed, layout, key_layout):
    """Which flat query token may see which flat key token: bool (queries, keys) of the whole batch."""
    pairs = torch.zeros(layout.num_tokens, key_layout.num_tokens, dtype=torch.bool)
    queries, keys = (by_sequence(torch.arange(x.num_tokens)[None, None], x) for x in (layout, key_layout))
    for q, k, cells in zip(queries, keys, allowed, strict=True):
        pairs[q[0][:, None], k[0]] = torch.from_numpy(cells)
    return pairs


def check_no_leak(attend, inputs, token, seen):
    """What the query at `token` may not see changes no bit of its output and gets no gradient from it."""
    query, key, value, grad = inputs
    others = torch.arange(query.shape[2]) != token
    changed = []
    for x, hidden in [(query, others), (key, ~seen), (value, ~seen)]:
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x.dtype)
        changed.append(torch.where(hidden[:, None], 100 * noise, x))
    grad = grad.masked_fill(others[:, None], 0)
    output, _, key_grad, value_grad = with_gradients(attend, query, key, value, grad)
    assert torch.equal(with_gradients(attend, *changed, grad=grad)[0][:, :, token], output[:, :, token])
    assert torch.equal(attend(*changed)[:, :, token], attend(query, key, value)[:, :, token])
    assert (key_grad[:, :, ~seen] == 0).all()
    assert (value_grad[:, :, ~seen] == 0).all()


@examples(2000)
@given(cases(), SHAPES, st.sampled_from([torch.float64, torch.float32]), st.sampled_from([None, 0.3]))
def test_output_and_gradients_equal_the_oracle(case, shape, dtype, scaling):
    inputs = random_inputs(case.layout, case.key_layout, shape, dtype)
    allowed, plan = case.oracle_masks(), case.plan()
    attend = oracle_attention(allowed, case.layout, case.key_layout, scaling)
    expected = with_gradients(attend, *(x.double() for x in inputs))
    empty = ~pairs_of_tokens(allowed, case.layout, case.key_layout).any(1)
    for name in IMPLEMENTATIONS:
        results = with_gradients(attend_with(name, plan, case.layout, scaling=scaling), *inputs)
        check_close(results, expected, dtype)
        output, query_grad, *_ = results
        assert (output[:, :, empty] == 0).all()
        assert (query_grad[:, :, empty] == 0).all()


@examples(400)
@given(cases().filter(lambda case: case.layout.num_tokens), SHAPES, st.integers(0, 10**6))
def test_hidden_tokens_do_not_change_one_bit(case, shape, token):
    token %= case.layout.num_tokens
    seen = pairs_of_tokens(case.oracle_masks(), case.layout, case.key_layout)[token]
    inputs, plan = random_inputs(case.layout, case.key_layout, shape, torch.float32), case.plan()
    for name in IMPLEMENTATIONS:
        check_no_leak(attend_with(name, plan, case.layout), inputs, token, seen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("text", MASKS)
def test_hidden_tokens_do_not_change_one_bit_of_long_sequences(text, implementation, dtype):
    sizes = [257, 63, 257]
    layout = SequenceLayout.from_lengths(torch.tensor(sizes))
    inputs = random_inputs(layout, layout, (2, 1, 32, 16), dtype)
    pairs = pairs_of_tokens([oracle.sequence_mask(text, size) for size in sizes], layout, layout)
    for token in [0, 130, 256, 257, 400]:
        check_no_leak(attend_with(implementation, text, layout), inputs, token, pairs[token])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("text", MASKS)
@pytest.mark.parametrize("sizes", [[1], [63, 1], [257, 63, 257], [1000]], ids=str)
def test_odd_sizes(sizes, text, implementation):
    layout = SequenceLayout.from_lengths(torch.tensor(sizes))
    inputs = random_inputs(layout, layout, (4, 2, 8, 5), torch.float32)
    allowed = [oracle.sequence_mask(text, size) for size in sizes]
    expected = with_gradients(oracle_attention(allowed, layout, layout), *(x.double() for x in inputs))
    check_close(with_gradients(attend_with(implementation, text, layout), *inputs), expected, torch.float32)


@pytest.mark.parametrize("implementation", [name for name in IMPLEMENTATIONS if name != "reference"])
@pytest.mark.parametrize("text", MASKS)
@pytest.mark.parametrize("shape", [(4, 4, 64, 64), (4, 2, 32, 48)], ids=str)
def test_bfloat16_is_no_worse_than_twice_the_eager_error(shape, text, implementation):
    layout = SequenceLayout.from_lengths(torch.tensor([257, 100, 257]))
    inputs = random_inputs(layout, layout, shape, torch.bfloat16)

    def results(name, dtype):
        attend, cast = attend_with(name, text, layout), [x.to(dtype) for x in inputs]
        return attend(*cast[:3]), *with_gradients(attend, *cast)

    exact = results("reference", torch.float64)
    errors, eager_errors = (
        [float((x.double() - right).norm()) for x, right in zip(results(name, torch.bfloat16), exact, strict=True)]
        for name in (implementation, "reference")
    )
    names = "output without gradients", "output", "query gradient", "key gradient", "value gradient"
    for what, error, eager_error in zip(names, errors, eager_errors, strict=True):
        assert error <= 2 * eager_error, f"{what}: error {error:.2e}, eager {eager_error:.2e}"


@pytest.mark.parametrize("text", ["full", "causal & window(20, 0)", "window(3) | prefix(2)"])
@pytest.mark.parametrize("needed", range(3))
def test_a_gradient_asked_for_alone_is_the_same(text, needed):
    layout = SequenceLayout.from_lengths(torch.tensor([257, 63]))
    *inputs, grad = random_inputs(layout, layout, (2, 1, 4, 4))
    attend = attend_with("blocks", text, layout)
    wanted = with_gradients(attend, *inputs, grad=grad)[1 + needed]
    inputs[needed].requires_grad_()
    (alone,) = torch.autograd.grad(attend(*inputs), inputs[needed], grad)
    torch.testing.assert_close(alone, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("text", ["full", "causal", "causal & window(100, 0)"])
def test_dropout_keeps_the_expectation_and_its_gradient(text, implementation):
    torch.manual_seed(0)
    layout = SequenceLayout.from_lengths(torch.tensor([300, 200]))
    query, key, value, _ = random_inputs(layout, layout, (8, 8, 4, 4), torch.float32)
    value = torch.ones_like(value).requires_grad_()  # weights add up to 1, and so do outputs without dropout
    output = dynmask_attention(query, key, value, text, layout, dropout=0.25, implementation=implementation)
    (grad,) = torch.autograd.grad(output.sum(), value)
    assert output[:, :, :, 0].std() > 0.01
    assert output.mean().item() == pytest.approx(1.0, abs=0.02)
    assert grad.sum().item() == pytest.approx(output.sum().item(), rel=1e-4)  # the weights dropped are the same


def test_auto_is_blocks_and_takes_text_mask_and_plan():
    layout = SequenceLayout.from_lengths(torch.tensor([5, 3]), (2, 6))
    query, key, value, _ = random_inputs(layout, layout, (2, 1, 4, 4))
    outputs = [
        dynmask_attention(query, key, value, "causal", layout, implementation="blocks"),
        dynmask_attention(query, key, value, "causal", layout),
        dynmask_attention(query, key, value, masks.causal(), layout),
        dynmask_attention(query, key, value, MaskPlan("causal", layout), layout),
    ]
    assert all(torch.equal(output, outputs[0]) for output in outputs)


@pytest.mark.parametrize("implementation", ["auto", *IMPLEMENTATIONS])
@pytest.mark.parametrize("sizes, shape", [([0], (1, 4)), ([0, 0], (2, 0)), ([], (0, 3)), ([], None)])
def test_batches_without_a_token(sizes, shape, implementation):
    layout = SequenceLayout.from_lengths(torch.tensor(sizes, dtype=torch.long), shape)
    inputs = random_inputs(layout, layout, (2, 1, 4, 6))
    results = with_gradients(attend_with(implementation, "causal", layout), *inputs)
    assert [tuple(result.shape) for result in results] == [(1, 2, 0, 6), (1, 2, 0, 4), (1, 1, 0, 4), (1, 1, 0, 6)]


# --- errors ------------------------------------------------------------------------------------------------------


def test_an_unknown_implementation_lists_the_known():
    layout = SequenceLayout.from_lengths(torch.tensor([3]))
    inputs = random_inputs(layout, layout, (2, 2, 4, 4))[:3]
    known = ", ".join(map(repr, ["auto", *IMPLEMENTATIONS]))
    with pytest.raises(ValueError, match=f"`implementation` must be one of {known}; got 'flash'"):
        attend_with("flash", "full", layout)(*inputs)


def test_a_missing_field_is_named():
    layout = SequenceLayout.from_lengths(torch.tensor([3]))
    inputs = random_inputs(layout, layout, (2, 2, 4, 4))[:3]
    with pytest.raises(ValueError, match="the mask 'causal & segments' reads the field `segment_ids`, which the batch"):
        attend_with("auto", "causal & segments", layout)(*inputs)


@pytest.mark.parametrize(
    "name, shape, message",
    [
        ("query", (1, 4, 6, 8), r"`query` must have shape \(1, 4, 5, 8\); got \(1, 4, 6, 8\)"),
        ("query", (2, 4, 5, 8), r"`query` must have shape \(1, 4, 5, 8\); got \(2, 4, 5, 8\)"),
        ("query", (4, 5, 8), r"`query` must have .*; got \(4, 5, 8\)"),
        ("key", (1, 2, 4, 8), r"`key` must have shape \(1, 2, 5, 8\); got \(1, 2, 4, 8\)"),
        ("key", (1, 2, 5, 7), r"`key` must have shape \(1, 2, 5, 8\); got \(1, 2, 5, 7\)"),
        ("key", (1, 3, 5, 8), r"`key` must have a number of heads that divides the query's 4; got 3"),
        ("value", (1, 1, 5, 8), r"`value` must have shape \(1, 2, 5, 8\); got \(1, 1, 5, 8\)"),
        ("value", (1, 2, 4, 8), r"`value` must have shape \(1, 2, 5, 8\); got \(1, 2, 4, 8\)"),
    ],
)
def test_tensors_of_wrong_shape(name, shape, message):
    layout = SequenceLayout.from_lengths(torch.tensor([2, 3]))
    inputs = {"query": torch.zeros(1, 4, 5, 8), "key": torch.zeros(1, 2, 5, 8), "value": torch.zeros(1, 2, 5, 8)}
    inputs[name] = torch.zeros(shape)
    with pytest.raises(ValueError, match=message):
        attend_with("auto", "full", layout)(**inputs)
