"""dynmask_attention: every implementation's output and gradients against the oracle; empty rows; no leak."""

import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import oracle
from hf_dynmask import masks
from hf_dynmask.modeling import attention, attention_flex, attention_varlen
from hf_dynmask.modeling.attention import auto_choice, dynmask_attention
from hf_dynmask.modeling.attention_reference import attend as attend_reference
from hf_dynmask.modeling.layout import SequenceLayout, in_heads, packed
from hf_dynmask.modeling.plan import MaskPlan
from hf_dynmask.modeling.softmax import masked_weights
from operators import Operators
from strategies import LEAVES, batch_of, case_of, cases, examples, flat_side, leaves, without_some

IMPLEMENTATIONS = "blocks", "reference", "sdpa"  # those that serve every mask on every device; others have own files
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
SIZES = st.sampled_from([(3, 3), (4, 4), (4, 7), (6, 2)])  # D, Dv
MASKS = [
    "full",
    "causal",
    "causal & window(20, 0)",
    "window(3) | prefix(2)",
    "dilated(40, 4)",
    "chunk(50) & ~span(3, 60)",
    "causal & window(30, 0) | global_tokens(3)",
    "random(0.1, 7) | diagonal",
    "shared_question & ~global_tokens",
    "dense & select(causal, window(70))",
    "heads(causal, window(40)) & custom(wedge)",
    "causal & topk(20)",
    "window(9) | heads(causal & topk(5), backward & topk(7) & ~span(1, 50))",
]


@cache
def long_case(text, sizes, heads):
    """Long sequences in one flat row under a mask that has two of everything to choose from."""
    return case_of(batch_of(text, sizes, heads=heads, choices=2), flat_side(sizes))


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


def inputs_of(case, *sizes, dtype=torch.float64):
    """Query, key and value, the scores of the keys where the mask has `topk`, and a gradient for the output."""
    shape = case.batch.heads, case.batch.key_heads, *sizes
    *inputs, grad = random_inputs(case.layout, case.key_layout, shape, dtype)
    return *inputs, *([] if case.key_scores is None else [case.key_scores.to(dtype)]), grad


def with_gradients(attend, *inputs, grad):
    """The output of `attend(*inputs)` and the gradients of the inputs."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    output = attend(*inputs)
    return output.detach(), *torch.autograd.grad(output, inputs, grad.to(output.dtype))


def attend_with(implementation, mask, layout, **options) -> Callable[..., torch.Tensor]:
    """`dynmask_attention` as a function of query, key, value and, for masks with `topk`, the scores of the keys."""
    return lambda query, key, value, key_scores=None: dynmask_attention(
        query, key, value, mask, layout, key_scores=key_scores, implementation=implementation, **options
    )


def check_close(results, expected, dtype):
    for result, wanted in zip(results, expected, strict=True):
        assert result.dtype == dtype
        torch.testing.assert_close(result.double(), wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def by_sequence(flat, layout):
    """Each sequence's (heads, tokens, D)."""
    return flat[0].split(layout.sizes, dim=1)


def oracle_attention(case, **options):
    """The oracle as a function of flat tensors."""
    layout, key_layout, allowed = case.layout, case.key_layout, case.oracle_masks

    def attend(query, key, value, key_scores=None):
        sequences = [by_sequence(query, layout), by_sequence(key, key_layout), by_sequence(value, key_layout), allowed]
        scores = [None] * len(allowed)
        if key_scores is not None:
            of_heads = key_scores.repeat_interleave(query.shape[1] // key_scores.shape[1], 1)
            scores = [of_sequence[..., 0] for of_sequence in by_sequence(of_heads[..., None], key_layout)]
        outputs = [
            oracle.sequence_attention(*one, key_scores=score, **options)
            for *one, score in zip(*sequences, scores, strict=True)
        ]
        return torch.cat(outputs, dim=1)[None]

    return attend


def pairs_of_tokens(case):
    """Which flat query token may see which flat key token: bool (heads, queries, keys) of the whole batch."""
    layout, key_layout = case.layout, case.key_layout
    pairs = torch.zeros(case.batch.heads, layout.num_tokens, key_layout.num_tokens, dtype=torch.bool)
    queries, keys = (by_sequence(torch.arange(x.num_tokens)[None, None], x) for x in (layout, key_layout))
    for q, k, allowed in zip(queries, keys, case.oracle_masks, strict=True):
        pairs[:, q[0][:, None], k[0]] = torch.from_numpy(allowed)
    return pairs


def check_equals_the_oracle(case, inputs, implementations=IMPLEMENTATIONS, **options):
    """Output and gradients are the oracle's; exactly 0 for queries with no key to see."""
    *inputs, grad = inputs
    expected = with_gradients(oracle_attention(case, **options), *(x.double() for x in inputs), grad=grad.double())
    empty, plan = ~pairs_of_tokens(case).any(-1), case.plan()
    for name in implementations:
        results = with_gradients(attend_with(name, plan, case.layout, **options), *inputs, grad=grad)
        check_close(results, expected, grad.dtype)
        output, query_grad, *_ = results
        assert (output[0][empty] == 0).all()
        assert (query_grad[0][empty] == 0).all()


def check_no_leak(attend, inputs, token, seen):
    """What the query at `token` may not see changes no bit of its output and gets no gradient from it.

    `seen (heads, keys)` says what it may see. Scores that `topk` chooses by are known to all that choose.
    """
    query, key, value, *scores, grad = inputs
    others = torch.arange(query.shape[2]) != token
    hidden = ~seen.unflatten(0, (key.shape[1], -1)).any(1)  # of key heads: hidden to all heads that share one
    changed = []
    for x, places in [(query, others), (key, hidden), (value, hidden)]:
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x.dtype)
        changed.append(torch.where(places[..., None], 100 * noise, x))
    grad = grad.masked_fill(others[:, None], 0)
    output, _, *key_grads = with_gradients(attend, query, key, value, *scores, grad=grad)
    after, *_ = with_gradients(attend, *changed, *scores, grad=grad)
    assert torch.equal(after[:, :, token], output[:, :, token])
    assert torch.equal(attend(*changed, *scores)[:, :, token], attend(query, key, value, *scores)[:, :, token])
    for key_grad in key_grads:
        assert (key_grad[0][hidden if key_grad.shape[1] > 1 else hidden.all(0, keepdim=True)] == 0).all()


@examples(2000)
@given(cases(), SIZES, st.sampled_from([torch.float64, torch.float32]), st.sampled_from([None, 0.3]))
def test_output_and_gradients_equal_the_oracle(case, sizes, dtype, scaling):
    check_equals_the_oracle(case, inputs_of(case, *sizes, dtype=dtype), scaling=scaling)


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("leaf", LEAVES)
def test_output_and_gradients_of_each_leaf_equal_the_oracle(leaf, cross):
    @examples(15)
    @given(cases(text=leaves([leaf]), cross=cross), SIZES)
    def check(case, sizes):
        check_equals_the_oracle(case, inputs_of(case, *sizes))

    check()


@examples(300)
@given(cases(), SIZES)
def test_masked_weights_equal_the_oracle(case, sizes):
    check_equals_the_oracle(case, inputs_of(case, *sizes), ["reference"], apply_mask_to="weights")


@examples(400)
@given(cases().filter(lambda case: case.layout.num_tokens), SIZES, st.integers(0, 10**6))
def test_hidden_tokens_do_not_change_one_bit(case, sizes, token):
    token %= case.layout.num_tokens
    seen = pairs_of_tokens(case)[:, token]
    inputs, plan = inputs_of(case, *sizes, dtype=torch.float32), case.plan()
    for name in IMPLEMENTATIONS:
        check_no_leak(attend_with(name, plan, case.layout), inputs, token, seen)


CHOOSING = st.sampled_from(["causal & topk(2)", "window(3) & (topk(1) | span(1, 4))", "heads(topk(2), causal)"])


@examples(200)
@given(cases(text=CHOOSING, heads=[2, 4]).filter(lambda case: case.layout.num_tokens), st.integers(0, 10**6))
def test_scores_of_keys_that_are_no_candidates_do_not_change_one_bit(case, token):
    token %= case.layout.num_tokens
    without_choice = re.sub(r"topk\(\d\)", "full", case.batch.text)
    candidates = pairs_of_tokens(replace(case, batch=case.batch._replace(text=without_choice)))[:, token].any(0)
    *inputs, scores, _ = inputs_of(case, 4, 4, dtype=torch.float32)
    changed, plan = torch.where(candidates, scores, 100 * scores + 1), case.plan()
    for name in IMPLEMENTATIONS:
        attend = attend_with(name, plan, case.layout)
        assert torch.equal(attend(*inputs, changed)[:, :, token], attend(*inputs, scores)[:, :, token])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("text", MASKS)
def test_hidden_tokens_do_not_change_one_bit_of_long_sequences(text, implementation, dtype):
    case = long_case(text, (257, 63, 257), heads=2)
    inputs, pairs = inputs_of(case, 32, 16, dtype=dtype), pairs_of_tokens(case)
    for token in [0, 130, 256, 257, 400]:
        check_no_leak(attend_with(implementation, case.plan(), case.layout), inputs, token, pairs[:, token])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("text", MASKS)
@pytest.mark.parametrize("sizes", [(1,), (63, 1), (257, 63, 257), (1000,)], ids=str)
def test_odd_sizes(sizes, text, implementation):
    case = long_case(text, sizes, heads=4)
    check_equals_the_oracle(case, inputs_of(case, 8, 5, dtype=torch.float32), [implementation])


@pytest.mark.parametrize("implementation", [name for name in IMPLEMENTATIONS if name != "reference"])
@pytest.mark.parametrize("text", MASKS)
@pytest.mark.parametrize("sizes", [(64, 64), (32, 48)], ids=str)
def test_bfloat16_is_no_worse_than_twice_the_eager_error(sizes, text, implementation):
    case = long_case(text, (257, 63, 257), heads=4)
    inputs, plan = inputs_of(case, *sizes, dtype=torch.bfloat16), case.plan()

    def results(name, dtype):
        attend, (*cast, grad) = attend_with(name, plan, case.layout), [x.to(dtype) for x in inputs]
        return attend(*cast), *with_gradients(attend, *cast, grad=grad)

    exact = results("reference", torch.float64)
    errors, eager_errors = (
        [float((x.double() - right).norm()) for x, right in zip(results(name, torch.bfloat16), exact, strict=True)]
        for name in (implementation, "reference")
    )
    names = "output without gradients", "output", "query gradient", "key gradient", "value gradient", "scores gradient"
    for what, error, eager_error in zip(names, errors, eager_errors, strict=False):
        assert error <= 2 * eager_error, f"{what}: error {error:.2e}, eager {eager_error:.2e}"


GRADCHECKED = [
    "causal & ~span(0, 2)",  # queries 0 and 1 have no key
    "dense & window(2)",
    "select(segments, global_tokens) | diagonal",
    "heads(backward, random(0.5, 3))",
    "causal & topk(2)",
    "heads(topk(1), causal & (diagonal | topk(2)))",
]


@pytest.mark.parametrize(
    "implementation, apply_mask_to", [*((name, "scores") for name in IMPLEMENTATIONS), ("reference", "weights")]
)
@pytest.mark.parametrize("text", GRADCHECKED)
def test_gradcheck(text, implementation, apply_mask_to):
    side = without_some(flat_side([5, 1, 4]), seed=1)
    case = case_of(batch_of(text, [5, 1, 4], heads=2, choices=2), side, block_size=2)
    inputs = [x.requires_grad_() for x in inputs_of(case, 3, 2)[:-1]]
    attend = attend_with(implementation, case.plan(), case.layout, apply_mask_to=apply_mask_to)
    if case.key_scores is not None:
        scores = torch.randn(case.key_scores.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        inputs[-1] = scores.requires_grad_()  # a small step must not change which keys are chosen
    assert torch.autograd.gradcheck(attend, inputs)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_missing_tokens_are_as_if_they_were_not_there(implementation):
    """Every token of what is left sees the same as under a mask that hides the missing ones."""
    present = torch.tensor([[True, False, True, True, False], [False, True, True, True, True]])
    whole = SequenceLayout.from_lengths(torch.tensor([5, 5]), (2, 5))
    layout = whole.without(~present)
    query, key, value, _ = random_inputs(whole, whole, (2, 1, 4, 4))
    left = [whole.unflatten_heads(x) for x in (query, key, value)]
    output = attend_with(implementation, "window(2) & ~chunk(2)", layout)(*map(layout.flatten_heads, left))
    fields = {"attention_mask": present[:, None].expand(2, 5, 5)}
    expected = attend_with(implementation, "window(2) & ~chunk(2) & dense", whole, fields=fields)(query, key, value)
    expected = layout.flatten_heads(whole.unflatten_heads(expected))
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)


# --- masks of weights --------------------------------------------------------------------------------------------


def test_masked_weights_are_not_renormalised():
    weights, mask = torch.tensor([0.2, 0.3, 0.5, 0.1, 0.1]), torch.tensor([1, 1, 1, 1, 0], dtype=torch.bool)
    kept = masked_weights(weights, mask)
    torch.testing.assert_close(kept, torch.tensor([0.2, 0.3, 0.5, 0.1, 0]))
    values = torch.tensor([2.0, 3.0, 4.0, 5.0, 6.0])
    torch.testing.assert_close(kept * values, torch.tensor([0.4, 0.9, 2.0, 0.5, 0]))


FIRST_THREE = torch.tensor([[1, 1, 1, 0, 0]] * 3 + [[1, 1, 1, 1, 1]] * 2, dtype=torch.bool)


def weights_of(text, batch, fields, apply_mask_to):
    """Weights (batch, 2, 5, 5) of random queries and keys under a mask, and those under no mask."""
    layout = SequenceLayout.from_lengths(torch.tensor([5] * batch), (batch, 5))
    query, key, value, _ = map(packed, random_inputs(layout, layout, (2, 2, 4, 3)))
    weights, free = (
        attend_reference(query, key, value, plan, scaling=0.5, apply_mask_to=apply_mask_to)[1]
        for plan in (MaskPlan(text, layout, fields=fields), MaskPlan("full", layout))
    )
    return weights, free


@pytest.mark.parametrize("text", ["dense", "chunk_causal(3)"])
def test_first_three_rows_see_the_first_three_keys(text):
    fields = {"attention_mask": FIRST_THREE[None]}
    weights, free = weights_of(text, 1, fields, "weights")
    assert torch.equal(weights, free * FIRST_THREE)
    weights, free = weights_of(text, 1, fields, "scores")
    kept = free * FIRST_THREE
    torch.testing.assert_close(weights, kept / kept.sum(-1, keepdim=True))


@pytest.mark.parametrize("text", ["dense", "visible"])
def test_keys_hidden_in_one_example_alone(text):
    mask = torch.ones(2, 5, 5, dtype=torch.bool)
    mask[0, :, 2:] = False
    fields = {"attention_mask": mask, "hidden_spans": torch.tensor([[[2, 3]], [[0, 0]]])}
    weights, free = weights_of(text, 2, fields, "weights")
    assert torch.equal(weights, free * mask[:, None])
    assert (weights[0, :, :, 2:] == 0).all()
    assert torch.equal(weights[1], free[1])


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


@pytest.fixture
def fake_gpu(monkeypatch):
    """What implementations ask about a GPU, answered for a recent one."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(attention_varlen, "_tried", lambda *_: None)
    monkeypatch.setattr(attention_flex, "find_spec", lambda name: name)


def states_on(device, dtype):
    """Packed queries, keys or values that hold no values."""
    with FakeTensorMode():
        return torch.empty(5, 2, 64, device=device, dtype=dtype)


@pytest.mark.parametrize(
    "device, dtype, text, dropout, chosen",
    [
        ("cpu", torch.float32, "causal", 0.0, "blocks"),
        ("cpu", torch.bfloat16, "causal", 0.0, "blocks"),
        ("mps", torch.bfloat16, "causal", 0.0, "blocks"),
        *(("cuda", torch.bfloat16, text, 0.0, "varlen") for text in ("full", "causal", "causal & window(2, 0)")),
        ("cuda", torch.float16, "causal", 0.0, "varlen"),
        ("meta", torch.bfloat16, "causal", 0.1, "varlen"),
        ("cuda", torch.float32, "causal", 0.0, "varlen"),
        ("cuda", torch.float32, "full", 0.1, "varlen"),
        ("cuda", torch.float32, "causal & window(2, 0)", 0.1, "banded"),
        ("cuda", torch.float32, "backward", 0.0, "flex"),
        ("cuda", torch.bfloat16, "causal | prefix(2)", 0.0, "flex"),
        ("cuda", torch.bfloat16, "heads(causal, full)", 0.0, "flex"),
        ("meta", torch.bfloat16, "heads(causal, full)", 0.0, "flex"),
        ("cuda", torch.float64, "causal", 0.0, "blocks"),
        ("cuda", torch.bfloat16, "causal", 0.1, "varlen"),
        ("cuda", torch.bfloat16, "causal | prefix(2)", 0.1, "blocks"),
        ("cuda", torch.bfloat16, "causal & topk(2)", 0.0, "blocks"),
    ],
)
def test_auto_chooses_by_device_dtype_and_mask(device, dtype, text, dropout, chosen, fake_gpu):
    plan = MaskPlan(text, SequenceLayout.from_lengths(torch.tensor([5])))
    states = states_on(device, dtype)
    name, passed_over = auto_choice(plan, states, states, states, dropout)
    assert name == chosen
    order = ["varlen", "banded", "flex", "blocks"]
    assert list(passed_over) == order[: order.index(chosen)]


@pytest.mark.parametrize("chosen", ["varlen", "banded", "flex", "blocks"])
def test_auto_runs_what_it_chooses(chosen, monkeypatch):
    layout = SequenceLayout.from_lengths(torch.tensor([3]))
    inputs = random_inputs(layout, layout, (2, 2, 4, 4))[:3]
    result = torch.rand(3, 2, 4)
    monkeypatch.setattr(attention, "CUDA_LIKE", ("cpu",))
    monkeypatch.setattr(attention, "auto_choice", lambda *_: (chosen, {}))
    monkeypatch.setitem(attention.IMPLEMENTATIONS, chosen, attention.Implementation(lambda *_, **__: (result, None)))
    assert torch.equal(attend_with("auto", "full", layout)(*inputs), in_heads(result))


def test_flex_by_name_on_cpu():
    case = long_case("causal | prefix(3)", (63, 20), heads=2)
    *inputs, _ = inputs_of(case, 4, 4)
    output = attend_with("flex", case.plan(), case.layout)(*inputs)
    check_close([output], [oracle_attention(case)(*inputs)], torch.float64)


def test_auto_is_blocks_on_cpu_and_takes_text_mask_and_plan():
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
    *inputs, grad = random_inputs(layout, layout, (2, 1, 4, 6))
    results = with_gradients(attend_with(implementation, "causal", layout), *inputs, grad=grad)
    assert [tuple(result.shape) for result in results] == [(1, 2, 0, 6), (1, 2, 0, 4), (1, 1, 0, 4), (1, 1, 0, 6)]


# --- errors ------------------------------------------------------------------------------------------------------


def test_an_unknown_implementation_lists_the_known():
    layout = SequenceLayout.from_lengths(torch.tensor([3]))
    inputs = random_inputs(layout, layout, (2, 2, 4, 4))[:3]
    with pytest.raises(ValueError, match="`implementation` must be one of 'auto', .*'blocks'.*; got 'flash'"):
        attend_with("flash", "full", layout)(*inputs)


@pytest.mark.parametrize(
    "name, options, reason, able",
    [
        ("varlen", {"text": "causal"}, "it runs on CUDA devices; got 'cpu'", "'flex', 'blocks', 'reference', 'sdpa'"),
        (
            "varlen",
            {"text": "prefix(2)"},
            "it supports `full`, `causal` and windows; got 'prefix(2)'",
            "'flex', 'blocks",
        ),
        (
            "flex",
            {"text": "full", "needs_grad": True},
            "it has no backward pass on CPU",
            "'blocks', 'reference', 'sdpa'",
        ),
        ("flex", {"text": "full", "dropout": 0.1}, "it has no dropout", "'blocks', 'reference', 'sdpa'"),
        ("flex", {"text": "topk(2)"}, "`topk` looks at all keys of a query at once", "'blocks', 'reference', 'sdpa'"),
    ],
)
def test_an_implementation_that_cannot_serve_gives_the_reason_and_names_those_that_can(name, options, reason, able):
    layout, (query, key, value) = topk_inputs()
    query.requires_grad_(options.get("needs_grad", False))
    scores = torch.zeros(1, 1, 5) if "topk" in options["text"] else None
    attend = attend_with(name, options["text"], layout, dropout=options.get("dropout", 0.0))
    message = f"`implementation` '{name}' cannot be used here: {reason}. Those that can: {able}"
    with pytest.raises(ValueError, match=re.escape(message)):
        attend(query, key, value, scores)


def test_a_dtype_that_an_implementation_cannot_serve(fake_gpu):
    layout = SequenceLayout.from_lengths(torch.tensor([5]))
    states = in_heads(states_on("cuda", torch.float32))
    message = (
        "'varlen' cannot be used here: flash attention: it supports .*bfloat16; got torch.float32; memory-efficient "
        "attention: it supports `full` and `causal`; got the window .* Those that can: 'banded', 'flex', 'blocks'"
    )
    with pytest.raises(ValueError, match=message):
        attend_with("varlen", "window(2, 0)", layout)(states, states, states)


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


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32, torch.bfloat16), (torch.int64,) * 3])
def test_tensors_of_wrong_dtypes(dtypes):
    layout = SequenceLayout.from_lengths(torch.tensor([2, 3]))
    states = [torch.zeros(1, 4, 5, 8, dtype=dtype) for dtype in dtypes]
    with pytest.raises(ValueError, match=f"must have one floating-point dtype; got {', '.join(map(str, dtypes))}"):
        attend_with("auto", "full", layout)(*states)


def test_autocast_gives_tensors_one_dtype():
    layout = SequenceLayout.from_lengths(torch.tensor([2, 3]))
    states = [torch.zeros(1, 4, 5, 8, dtype=dtype) for dtype in (torch.bfloat16, torch.float32, torch.float32)]
    with torch.autocast("cpu", torch.bfloat16):
        assert attend_with("auto", "full", layout)(*states).dtype == torch.bfloat16


def test_what_are_no_masks_and_layouts():
    lengths = torch.tensor([2, 3])
    layout = SequenceLayout.from_lengths(lengths)
    query, key, value = random_inputs(layout, layout, (2, 2, 4, 4))[:3]
    with pytest.raises(ValueError, match="`layout` must be a SequenceLayout; got Tensor"):
        dynmask_attention(query, key, value, "full", lengths)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="a mask must be text such as .*; got None"):
        dynmask_attention(query, key, value, None, layout)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("dropout", [-0.1, 1.5])
def test_dropout_that_is_no_probability(dropout):
    layout = SequenceLayout.from_lengths(torch.tensor([2, 3]))
    inputs = random_inputs(layout, layout, (2, 2, 4, 4))[:3]
    with pytest.raises(ValueError, match=f"`dropout` must be from 0 to 1; got {dropout}"):
        attend_with("auto", "full", layout, dropout=dropout)(*inputs)


def topk_inputs(heads=4, key_heads=2):
    layout = SequenceLayout.from_lengths(torch.tensor([2, 3]))
    return layout, random_inputs(layout, layout, (heads, key_heads, 4, 4))[:3]


@pytest.mark.parametrize("shape", [(1, 4, 5), (1, 2, 4), (2, 2, 5), (2, 5), (1, 0, 5)], ids=str)
def test_scores_of_keys_of_wrong_shape(shape):
    layout, inputs = topk_inputs()
    message = rf"`key_scores` must have shape \(1, 1 \| 2, 5\); got {re.escape(str(shape))}"
    with pytest.raises(ValueError, match=message):
        attend_with("auto", "topk(1)", layout)(*inputs, torch.zeros(shape))


def test_scores_of_keys_that_nothing_chooses_by():
    layout, inputs = topk_inputs()
    with pytest.raises(ValueError, match=r"`key_scores` must come with a mask that has `topk`; got 'causal'"):
        attend_with("auto", "causal", layout)(*inputs, torch.zeros(1, 1, 5))


def test_topk_without_scores():
    layout, inputs = topk_inputs()
    with pytest.raises(ValueError, match=r"the mask 'causal & topk\(1\)' needs `key_scores`, which `topk` chooses by"):
        attend_with("auto", "causal & topk(1)", layout)(*inputs)


@pytest.mark.parametrize("implementation", ["auto", *IMPLEMENTATIONS])
def test_a_number_of_masks_that_does_not_divide_the_heads(implementation):
    layout, inputs = topk_inputs()
    with pytest.raises(ValueError, match="`heads` must be given a number of masks that divides the 4 heads; got 3"):
        attend_with(implementation, "heads(full, causal, full)", layout)(*inputs)


@pytest.mark.parametrize("implementation", ["auto", *IMPLEMENTATIONS])
def test_an_explicit_mask_of_another_number_of_heads(implementation):
    layout, inputs = topk_inputs()
    fields = {"attention_mask": torch.ones(1, 3, 5, 5, dtype=torch.bool)}
    with pytest.raises(ValueError, match="`attention_mask` must have .*4.*; got"):
        attend_with(implementation, "dense", layout, fields=fields)(*inputs)


@pytest.mark.parametrize("implementation", ["blocks", "sdpa"])
def test_masks_of_weights_are_served_by_the_reference(implementation):
    layout, inputs = topk_inputs()
    message = f"`apply_mask_to='weights'` needs the implementation .*'reference'; got '{implementation}'"
    with pytest.raises(ValueError, match=message):
        attend_with(implementation, "causal", layout, apply_mask_to="weights")(*inputs)


def test_masks_apply_to_scores_or_to_weights():
    layout, inputs = topk_inputs()
    with pytest.raises(ValueError, match="`apply_mask_to` must be .*; got 'values'"):
        attend_with("auto", "causal", layout, apply_mask_to="values")(*inputs)


def test_an_unknown_implementation_of_masks_of_weights_lists_the_known():
    layout, inputs = topk_inputs()
    with pytest.raises(ValueError, match="'reference'.*; got 'flash'"):
        attend_with("flash", "causal", layout, apply_mask_to="weights")(*inputs)


@pytest.mark.parametrize(("sizes", "gathers"), [((1, 1, 1), 2), ((1, 1, 2), 4)], ids=str)
def test_single_queries_are_used_where_they_are(sizes, gathers):
    """When a model generates, keys are filled up to one size, but not its queries, one a sequence."""
    layout, key_layout = (SequenceLayout.from_lengths(torch.tensor(lengths)) for lengths in (sizes, (9, 12, 14)))
    query, key, value, _ = random_inputs(layout, key_layout, (2, 2, 4, 4))
    with Operators() as operators:
        dynmask_attention(query, key, value, "full", layout, key_layout, implementation="blocks")
    assert operators.calls["aten.index_select.default"] == gathers


# --- NaN and infinity --------------------------------------------------------------------------------------------

POISONED = 1  # of the sequences of `apart`; neither the first nor the last in any order


def apart(name, text):
    """Three sequences, one of which lies between the others: flat, with tokens missing, in rows, or of two layouts."""
    sizes, key_sizes = (9, 7, 9), (5, 9, 7) if name == "cross" else None
    batch = batch_of(text, sizes, key_sizes, heads=4, choices=2)
    queries = flat_side(sizes)
    if name == "rows":
        rows = [range(size) for size in sizes]
        layout = SequenceLayout.from_lengths(torch.tensor(sizes), (3, 11))
        queries = queries._replace(layout=layout, rows=[0, 1, 2], columns=[torch.arange(len(row)) for row in rows])
    if name == "missing":
        queries = without_some(queries)
    return case_of(batch, queries, queries if key_sizes is None else flat_side(key_sizes))


def output_alone(attend, *states):
    """Without gradients, which FlexAttention does not have on a CPU."""
    return (attend(*states),)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("poisoned", ["query", "key", "value", "all"])
@pytest.mark.parametrize("name", ["flat", "missing", "rows", "cross"])
@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, "flex"])
def test_nan_stays_in_its_sequence(implementation, name, poisoned, value):
    for text in ("causal & window(2, 0)", "heads(full, visible | dense)"):
        case = apart(name, text)
        *inputs, grad = inputs_of(case, 4, 4)
        sides = case.layout, case.key_layout, case.key_layout
        others = [layout.sequence_ids != POISONED for layout in sides]
        attend = attend_with(implementation, case.plan(), case.layout)
        run = partial(with_gradients, attend, grad=grad.masked_fill(~others[0][:, None], 0))
        if implementation == "flex":
            run = partial(output_alone, attend)
        right = run(*inputs)
        first = [int((~own).nonzero()[0]) for own in others]
        for number, states in enumerate(("query", "key", "value")):
            if poisoned in (states, "all"):
                inputs[number] = inputs[number].clone()
                inputs[number][:, :, first[number]] = value
        found = run(*inputs)
        for result, wanted, own in zip(found, right, [others[0], *others], strict=False):
            torch.testing.assert_close(result[:, :, own], wanted[:, :, own], rtol=1e-10, atol=1e-10)
        if poisoned != "value" and value != value:
            assert not found[0][:, :, ~others[0]].isfinite().all()


@pytest.mark.parametrize("apply_mask_to", ["scores", "weights"])
def test_weights_of_a_flat_batch_are_those_of_its_sequences(apply_mask_to):
    case = apart("missing", "causal & window(2, 0)")
    query, key, value, _ = inputs_of(case, 4, 4)
    key[:, :, 8] = torch.nan
    query, key, value = packed(query), packed(key), packed(value)
    plan, sizes = case.plan(), case.layout.sizes
    _, weights = attend_reference(query, key, value, plan, scaling=0.5, apply_mask_to=apply_mask_to)
    assert weights.shape == (1, 4, *case.layout.shape[1:], *case.layout.shape[1:])
    flat = weights[0][:, case.layout.places][:, :, case.layout.places]
    ends = torch.tensor(sizes).cumsum(0).tolist()
    for start, stop in zip([0, *ends], ends, strict=False):
        own = SequenceLayout.from_attention_mask(torch.ones(1, stop - start))
        own = replace(own, positions=case.layout.positions[start:stop])
        q, k, v = (states[start:stop] for states in (query, key, value))
        _, expected = attend_reference(q, k, v, MaskPlan(plan.mask, own), scaling=0.5, apply_mask_to=apply_mask_to)
        torch.testing.assert_close(flat[:, start:stop, start:stop], expected[0], equal_nan=True)
        assert (flat[:, start:stop, :start] == 0).all() and (flat[:, start:stop, stop:] == 0).all()
