"""FlexAttention: the BlockMask against the cells of the oracle and against torch's own; forward on CPU; all on CUDA."""

import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_attention import MASKS, check_close, inputs_of, oracle_attention, pairs_of_tokens, with_gradients
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import create_block_mask, create_mask, flex_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_dynmask import masks
from hf_dynmask.modeling import attention_flex
from hf_dynmask.modeling.attention_flex import attend, block_mask, unsupported
from hf_dynmask.modeling.attention_reference import attend as attend_reference
from hf_dynmask.modeling.layout import SequenceLayout, in_heads, packed
from hf_dynmask.modeling.plan import MaskPlan
from strategies import LEAVES, batch_of, case_of, cases, examples, flat_side, leaves, without_some

SERVED = [leaf for leaf in LEAVES if "topk" not in leaf]
LONG_MASKS = [text for text in MASKS if "topk" not in text]
SPARSE = "causal & window(4095, 0) | global_tokens(16)"


@pytest.fixture(autouse=True, scope="module")
def forget_compiled():
    yield
    torch.compiler.reset()


def attend_flex(case, scaling=0.3):
    return lambda q, k, v: in_heads(attend(packed(q), packed(k), packed(v), case.plan(), scaling=scaling)[0])


def dense_blocks(numbers, columns):
    """Bool `(1, heads, rows, columns)` from a BlockMask's lists; a block is listed once."""
    blocks = torch.zeros(columns.shape, dtype=torch.int)
    listed = torch.arange(columns.shape[-1]) < numbers[..., None]
    blocks.scatter_add_(-1, columns.long(), listed.int())
    assert blocks.max() <= 1
    return blocks.bool()


def kept_and_full(found):
    """The blocks that a BlockMask has computed, and those without a mask; its lists for the backward pass agree."""
    partial = dense_blocks(found.kv_num_blocks, found.kv_indices)
    full = dense_blocks(found.full_kv_num_blocks, found.full_kv_indices)
    assert torch.equal(partial, dense_blocks(found.q_num_blocks, found.q_indices).mT)
    assert torch.equal(full, dense_blocks(found.full_q_num_blocks, found.full_q_indices).mT)
    assert not (partial & full).any()
    return partial | full, full


# --- the BlockMask -----------------------------------------------------------------------------------------------


def check_block_mask(case):
    """What it calls empty is empty, what it calls full is full, and cell by cell its mask is the oracle's."""
    truth = pairs_of_tokens(case)
    found = block_mask(case.plan(), case.batch.heads)
    assert found.shape[-2:] == truth.shape[-2:]
    cells = create_mask(found.mask_mod, 1, *truth.shape, device="cpu")
    assert torch.equal(cells[0], truth)
    exact = create_block_mask(found.mask_mod, 1, *truth.shape, device="cpu", BLOCK_SIZE=case.block_size)
    (kept, full), (any_allowed, all_allowed) = kept_and_full(found), kept_and_full(exact)
    assert (kept | ~any_allowed).all()
    assert (all_allowed | ~full).all()


with_tokens = cases(templates=SERVED).filter(lambda case: case.layout.num_tokens and case.key_layout.num_tokens)


@examples(300)
@given(with_tokens)
def test_block_mask_is_sound(case):
    check_block_mask(case)


@pytest.mark.parametrize("text", LONG_MASKS)
@pytest.mark.parametrize("sizes", [[1], [128, 1, 127], [300, 0, 63, 300], [1000]], ids=str)
def test_block_mask_of_long_sequences_is_sound(sizes, text):
    check_block_mask(case_of(batch_of(text, sizes, heads=2, choices=2), without_some(flat_side(sizes))))


@pytest.mark.parametrize(
    "text",
    [
        "full",
        "causal",
        "backward & window(200)",
        "causal & window(255, 0)",
        "chunk(96)",
        "chunk_causal(200)",
        "prefix(150)",
        "prefix | diagonal",
        "~span(100, 200)",
        "dense",
        "visible",
        "segments",
        "global_tokens",
        "causal & window(255, 0) | global_tokens(16)",
        "select(causal, window(200))",
        "heads(causal, window(200))",
    ],
)
def test_block_mask_equals_the_one_that_torch_makes(text):
    sizes = [700, 128, 1, 300, 256, 0, 60]
    side = flat_side(sizes)
    case = case_of(batch_of(text, sizes, heads=2, choices=2), side)
    ids = torch.arange(case.layout.num_tokens).div(100, rounding_mode="floor")[None]
    plan = MaskPlan(text, case.layout, fields=case.fields | {"segment_ids": ids, "global_tokens": ids == 3})
    found = block_mask(plan, 2)
    exact = create_block_mask(found.mask_mod, *found.shape, device="cpu")
    for name in ["kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"]:
        assert torch.equal(getattr(found, name), getattr(exact, name)), name
    for blocks, exact_blocks in zip(kept_and_full(found), kept_and_full(exact), strict=True):
        assert torch.equal(blocks, exact_blocks)


@pytest.mark.parametrize("text, heads", [("causal", 1), ("select(causal, full)", 1), ("heads(causal, full)", 4)])
def test_block_mask_differs_by_head_only_where_the_mask_does(text, heads):
    case = case_of(batch_of(text, [300, 60], heads=4, choices=2), flat_side([300, 60]))
    plan = case.plan()
    assert block_mask(plan, 4).shape == (1, heads, 360, 360)
    assert block_mask(plan, 4) is block_mask(plan, 4)


@pytest.mark.parametrize("heads", [1, 4])
def test_block_mask_of_an_explicit_mask(heads):
    layout = SequenceLayout.from_lengths(torch.tensor([260]), (1, 260))
    attention_mask = torch.zeros(1, heads, 260, 260, dtype=torch.bool)
    attention_mask[:, -1, :128] = True
    plan = MaskPlan("dense", layout, fields={"attention_mask": attention_mask})
    kept, full = kept_and_full(block_mask(plan, 4))
    assert kept.shape == (1, heads, 3, 3)
    assert kept[0, -1].tolist() == [[True] * 3, [False] * 3, [False] * 3]
    assert full[0, -1].tolist() == [[True, True, False], [False] * 3, [False] * 3]
    assert not kept[0, :-1].any()


@pytest.mark.parametrize("text", [*SERVED, "heads(causal, dense)", "select(causal, visible)"])
def test_mask_is_made_of_single_numbers(text, monkeypatch):
    """The kernels' compiler takes no other values in a mask, and gives wrong results where it meets them."""
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    @examples(1)
    @given(leaves([text]))
    def check(text):
        monkeypatch.setattr(attention_flex, "_compiled", lambda _: torch.compile(flex_attention, backend=keep))
        case = case_of(batch_of(text, [30, 20], heads=2, choices=2, seed=1), flat_side([30, 20]))
        attend_flex(case)(*inputs_of(case, 8, 8, dtype=torch.float32)[:3])
        calls = [node for node in graphs[-1].mask_fn_0.graph.nodes if node.op.startswith("call")]
        values = [value for node in calls for value in tree_leaves(node.meta.get("example_value"))]
        assert values
        assert all(value.dim() == 0 for value in values if isinstance(value, torch.Tensor)), text

    check()


# --- the cost of a BlockMask ---------------------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive, and of all that were made."""

    def __init__(self):
        super().__init__()
        self.live = self.most = self.made = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage() not in self.known:
                storage = tensor.untyped_storage()
                self.known.add(storage)
                self.count(storage.nbytes())
                weakref.finalize(storage, self.count, -storage.nbytes())
        return result

    def count(self, change):
        self.live += change
        self.made += max(change, 0)
        self.most = max(self.most, self.live)


def documents_of(tokens, documents):
    """Documents of random sizes end to end."""
    ends = torch.randperm(tokens - 1, generator=torch.Generator().manual_seed(0))[: documents - 1].sort().values + 1
    return SequenceLayout.from_lengths(torch.cat([torch.tensor([0]), ends, torch.tensor([tokens])]).diff())


@pytest.mark.parametrize("text, documents", [(SPARSE, 1), (SPARSE, 512), ("causal", 512)])
def test_block_mask_of_131072_tokens_takes_little_work_and_memory(text, documents):
    layout = documents_of(131072, documents)
    with LiveBytes() as memory:
        found = block_mask(MaskPlan(text, layout), 12)
    assert found.kv_indices.nbytes < memory.most < 100e6
    assert memory.made < 400e6  # cells would be 17e9 bytes


@pytest.mark.parametrize("documents", [1, 32])
def test_block_mask_takes_a_hundredth_of_the_work_of_torch(documents):
    layout = documents_of(8192, documents)  # the ratio grows with the length
    with LiveBytes() as ours:
        mask_mod = block_mask(MaskPlan(SPARSE, layout), 12).mask_mod
    with LiveBytes() as theirs:
        create_block_mask(mask_mod, 1, 1, 8192, 8192, device="cpu")
    assert theirs.made > 100 * ours.made


# --- attention -----------------------------------------------------------------------------------------------------


@examples(30)
@given(cases(templates=SERVED), st.sampled_from([(3, 3), (4, 7), (6, 2)]), st.sampled_from([0.3, 1.0]))
def test_output_on_cpu_equals_the_oracle(case, sizes, scaling):
    *inputs, _ = inputs_of(case, *sizes)
    output = attend_flex(case, scaling)(*inputs)
    check_close([output], [oracle_attention(case, scaling=scaling)(*inputs)], torch.float64)
    assert (output[0][~pairs_of_tokens(case).any(-1)] == 0).all()


@pytest.mark.parametrize("text", LONG_MASKS)
def test_output_of_long_sequences_on_cpu_equals_the_oracle(text):
    case = case_of(batch_of(text, [257, 0, 63, 130], heads=4, choices=2), flat_side([257, 0, 63, 130]))
    *inputs, _ = inputs_of(case, 8, 5, dtype=torch.float32)
    check_close(
        [attend_flex(case)(*inputs)],
        [oracle_attention(case, scaling=0.3)(*map(torch.Tensor.double, inputs))],
        torch.float32,
    )


def test_the_deepest_masks_are_traced_from_far_down():
    """Tracing takes dozens of frames for each mask inside a mask, and a program may have used hundreds before."""
    mask = masks.causal()
    for level in range(masks.MAX_DEPTH - 1):
        mask = (mask | masks.diagonal(), masks.chunk(4) & mask, masks.select(mask))[level % 3]
    assert mask.depth == masks.MAX_DEPTH
    case = case_of(batch_of(str(mask), [9, 4], heads=4, choices=1), flat_side([9, 4]))
    *inputs, _ = inputs_of(case, 8, 5)

    def far_down(levels):
        return far_down(levels - 1) if levels else attend_flex(case)(*inputs)

    check_close([far_down(300)], [oracle_attention(case, scaling=0.3)(*inputs)], torch.float64)


@pytest.mark.parametrize(
    "text", ["causal & window(20, 0)", "random(0.1, 7) | diagonal", "heads(causal, full) & visible"]
)
def test_bfloat16_on_cpu_is_no_worse_than_twice_the_eager_error(text):
    case = case_of(batch_of(text, [257, 63], heads=4), flat_side([257, 63]))
    inputs, plan = inputs_of(case, 32, 48, dtype=torch.bfloat16)[:3], case.plan()

    def error(implementation):
        return (in_heads(implementation(*map(packed, inputs), plan, scaling=0.3)[0]).double() - exact).norm()

    exact = oracle_attention(case, scaling=0.3)(*map(torch.Tensor.double, inputs))
    assert error(attend) <= 2 * error(attend_reference)


@pytest.mark.parametrize("queries, keys", [([0], [0]), ([3, 0], [0, 0]), ([0, 0], [2, 4]), ([], [])])
def test_batches_without_a_pair(queries, keys):
    layout, key_layout = (
        SequenceLayout.from_lengths(torch.tensor(sizes, dtype=torch.long)) for sizes in (queries, keys)
    )
    query, key, value = (
        torch.randn(n, heads, size, requires_grad=True)
        for heads, n, size in [(4, sum(queries), 8), (2, sum(keys), 8), (2, sum(keys), 6)]
    )
    output, weights = attend(query, key, value, MaskPlan("causal", layout, key_layout), scaling=1.0)
    assert weights is None
    assert output.shape == (sum(queries), 4, 6)
    for x, grad in zip([query, key, value], torch.autograd.grad(output.sum(), [query, key, value]), strict=True):
        assert torch.equal(grad, torch.zeros_like(x))
    assert (output == 0).all()


# --- what it cannot serve --------------------------------------------------------------------------------------------


def reason(
    text="causal",
    device="cuda",
    dtype=torch.bfloat16,
    sizes=(64, 64),
    dropout=0.0,
    needing_grad=(),
    block_size=128,
    capability=(7, 0),
    with_triton=True,
):
    plan = MaskPlan(text, SequenceLayout.from_lengths(torch.tensor([5])), block_size=block_size)
    with FakeTensorMode():
        query, key, value = (
            torch.empty(5, 2, sizes[name == "value"], device=device, dtype=dtype, requires_grad=name in needing_grad)
            for name in ("query", "key", "value")
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        patch.setattr(attention_flex, "find_spec", lambda name: name if with_triton else None)
        return unsupported(plan, query, key, value, dropout)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"text": "causal & topk(2)"}, "`topk` looks at all keys of a query at once"),
        ({"text": "heads(causal, topk(2))"}, "`topk` looks at all keys of a query at once"),
        ({"dropout": 0.1}, "it has no dropout"),
        *(
            ({"device": "cpu", "needing_grad": [name]}, "it has no backward pass on CPU")
            for name in ("query", "key", "value")
        ),
        ({"device": "mps"}, "it runs on CUDA devices and, without gradients, on CPU; got 'mps'"),
        ({"dtype": torch.float64}, "it supports torch.float16, torch.bfloat16, torch.float32; got torch.float64"),
        ({"sizes": (8, 64)}, "it supports head sizes of at least 16; got 8 and 64"),
        ({"sizes": (64, 15)}, "it supports head sizes of at least 16; got 64 and 15"),
        ({"block_size": 64}, "it supports block sizes that are multiples of 128; got 64"),
        ({"with_triton": False}, "it needs Triton, which is not installed"),
        ({"capability": (6, 1)}, "it supports GPUs of compute capability (7, 0) and later; got (6, 1)"),
    ],
    ids=str,
)
def test_what_it_cannot_serve(options, message):
    assert reason(**options) == message


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"needing_grad": ["query", "key", "value"], "sizes": (80, 48)},
        {"text": "heads(causal, random(0.5, 3))", "dtype": torch.float32},
        {"device": "cpu", "dtype": torch.float64, "sizes": (3, 2), "block_size": 4},
    ],
    ids=str,
)
def test_what_it_can_serve(options):
    assert reason(**options) is None


def test_on_cpu_it_serves_what_needs_no_gradients_now():
    with torch.no_grad():
        assert reason(device="cpu", needing_grad=["query", "key", "value"]) is None


# --- CUDA ------------------------------------------------------------------------------------------------------------


def on_cuda(case):
    layout, key_layout = case.layout.to("cuda"), case.key_layout.to("cuda")
    fields = {name: field.cuda() for name, field in case.fields.items()}
    return MaskPlan(case.batch.text, layout, layout if case.keys is case.queries else key_layout, fields=fields)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "text, sizes",  # few, as each is compiled: of one predicate, of fields, of heads, of a dense mask
    [
        ("causal & ~span(0, 40)", [63, 1]),
        ("visible | diagonal", [257, 0, 100, 257]),
        ("causal & window(30, 0) | global_tokens(3)", [257, 0, 100, 257]),
        ("heads(causal, window(40)) & custom(wedge)", [257, 0, 100, 257]),
        ("dense & select(causal, window(70))", [257, 0, 100, 257]),
    ],
    ids=str,
)
def test_compiled_output_and_gradients_are_no_worse_than_twice_the_eager_error(text, sizes, dtype):
    case = case_of(batch_of(text, sizes, heads=4, choices=2), without_some(flat_side(sizes)))
    plan, inputs = on_cuda(case), [x.cuda() for x in inputs_of(case, 32, 48)]

    def results(implementation, dtype):
        def run(*states):
            return in_heads(implementation(*map(packed, states), plan, scaling=0.3)[0])

        *states, grad = (x.to(dtype) for x in inputs)
        return run(*states), *with_gradients(run, *states, grad=grad)

    exact, eager, found = (
        results(attend_reference, torch.float64),
        results(attend_reference, dtype),
        results(attend, dtype),
    )
    names = "output without gradients", "output", "query gradient", "key gradient", "value gradient"
    for name, right, expected, got in zip(names, exact, eager, found, strict=True):
        error, eager_error = ((x.double() - right).norm().item() for x in (got, expected))
        assert error <= 2 * eager_error + 1e-5 * right.norm().item(), (
            f"{name}: error {error:.2e}, eager {eager_error:.2e}"
        )
    empty = ~pairs_of_tokens(case).any(-1).cuda()
    for got in found[:3]:
        assert (got[0][empty] == 0).all()
