"""Models in the graphs of `torch.compile`: layouts, masks, what a batch may not say, and the operators."""

# pyright: reportOptionalMemberAccess=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportIndexIssue=false

import importlib

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from graphs import CLOSE, LAYOUTS, LENGTHS, ROWS, WIDTH, assert_same, compiled, ids, make, present, rows, run, with_gaps
from hf_dynmask import DynMaskModel
from hf_dynmask.modeling import compile_ops, graph_attention, graph_layout
from hf_dynmask.modeling.batch import layout_of_batch
from hf_dynmask.modeling.modules import AttentionSettings

SETTINGS = AttentionSettings("auto", "scores")


@pytest.fixture(autouse=True)
def fresh():
    torch.manual_seed(0)
    torch.compiler.reset()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout):
    assert_same(make(DynMaskModel, mask="causal & window(2, 0)").eval(), layout())


def test_fixed_flat_rows_are_compiled_once():
    """Whatever the lengths of their sequences."""
    model, places, slots = make(DynMaskModel, mask="causal & window(2, 0)").train(), 24, 6
    counter = CompileCounterWithBackend("aot_eager")
    function = compiled(model, backend=counter)
    for number in range(20):
        generator = torch.Generator().manual_seed(number)
        lengths = torch.randint(0, 5, (slots,), generator=generator)
        inputs = {"input_ids": ids(1, places), "lengths": lengths}
        expected, found = run(model, model, inputs), run(function, model, inputs)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, **CLOSE)
    assert counter.frame_count == 1


@pytest.mark.parametrize("pooling", ["last", "mean", "late"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_pooled(layout, pooling):
    model = make(DynMaskModel, classifier_pooling=pooling, classifier_transform="lm_head", pad_token_id=7)
    assert_same(model.eval(), layout(), backend="eager")


# --- Masks ------------------------------------------------------------------------------------------------------------


def fields() -> dict[str, Tensor]:
    return {
        "segment_ids": torch.randint(0, 2, (ROWS, WIDTH)),
        "prefix_lengths": torch.randint(0, 4, (ROWS,)),
        "hidden_spans": torch.randint(1, 3, (ROWS, 2, 2)),
        "global_tokens": torch.rand(ROWS, WIDTH) < 0.2,
        "mask_choice": torch.randint(0, 2, (ROWS,)),
    }


MASKS = ["causal | prefix", "segments & visible", "select(full, causal)", "global_tokens | diagonal"]


def test_masks_by_layer_and_head_that_read_fields():
    model = make(DynMaskModel, num_hidden_layers=3, layer_masks=[*MASKS[1:3], f"heads({MASKS[0]}, {MASKS[3]})"])
    assert_same(model.eval(), rows() | fields(), backend="eager")


def test_explicit_mask_and_missing_values():
    inputs = rows() | {"attention_mask": torch.rand(ROWS, 2, WIDTH, WIDTH) < 0.7}
    inputs |= {"missing": torch.rand(ROWS, WIDTH) < 0.3}
    assert_same(make(DynMaskModel, mask="window(3) | diagonal").eval(), inputs, backend="eager")


def test_learned_choice_of_keys():
    assert_same(make(DynMaskModel, mask="topk(2) & causal", num_key_value_heads=1).eval(), rows())


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_other_implementations(implementation):
    model = make(DynMaskModel, mask="causal").eval()
    model.set_attn_implementation(implementation)
    assert_same(model, rows(), backend="eager")


def test_few_tokens_or_none():
    model = make(DynMaskModel).eval()
    lengths = [LENGTHS, torch.zeros_like(LENGTHS), torch.tensor([0, 0, 1, 0, 0])]
    assert_same(model, *(rows() | {"lengths": of_rows} for of_rows in lengths))


def test_another_mask_is_followed():
    model = make(DynMaskModel).eval()
    function, inputs = compiled(model, "eager"), rows()
    for mask in ("full", "causal", ["diagonal"]):
        model.set_mask(mask)
        torch.testing.assert_close(function(**inputs)[0], model(**inputs)[0], **CLOSE)


# --- What a batch does not say ----------------------------------------------------------------------------------------


def test_what_stands_at_absent_places_is_never_read():
    model = make(DynMaskModel).eval()
    embeds = torch.randn(ROWS, WIDTH, 16)
    function = compiled(model)
    outputs = []
    for value in (torch.nan, torch.inf, 3.0):
        embeds = embeds.masked_fill(~present()[..., None], value).requires_grad_()
        output = function(inputs_embeds=embeds, lengths=LENGTHS).last_hidden_state
        outputs.append(output)
        (grad,) = torch.autograd.grad(output.square().sum(), embeds)
        assert (output[~present()] == 0).all() and (grad[~present()] == 0).all()
        assert grad[present()].isfinite().all()
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize(
    "lengths, message",
    [
        (LENGTHS + 3, r"`lengths` must not be beyond the row width 9; got 12"),
        (LENGTHS - 1, r"`lengths` must not be negative; got -1"),
        (LENGTHS[:2], r"`lengths` must have one entry a row, shape \(5,\).*got shape \(2,\)"),
        (LENGTHS.float(), r"`lengths` must be integers; got dtype torch.float32"),
    ],
)
def test_wrong_lengths(lengths, message):
    with pytest.raises(ValueError, match=message):
        compiled(make(DynMaskModel).eval())(ids(ROWS, WIDTH), lengths=lengths)


def test_field_that_is_not_there():
    with pytest.raises(ValueError, match="the mask 'segments' reads the field `segment_ids`, which the batch lacks"):
        compiled(make(DynMaskModel, mask="segments").eval())(**rows())


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_dropout_is_the_same_in_forward_and_backward(is_checkpointed):
    """The loss is linear in the values: their gradient foretells it where the same weights were dropped."""
    model = make(DynMaskModel, num_hidden_layers=1, attention_probs_dropout_prob=0.5).train()
    attention = model.layers[0].attention
    attention.o_proj.bias.data.zero_()
    attention.q_proj.weight.data.zero_()  # all keys count the same: weights do not depend on the inputs
    weights = torch.randn(ROWS, WIDTH, 16)

    class Linear(nn.Module):
        def forward(self, values):
            layout = layout_of_batch((ROWS, WIDTH), values.device, LENGTHS, None)
            (plan,) = model._plans(layout, layout, None, {}, in_graph=True)
            flat = layout.flatten(values)[0]
            if is_checkpointed:
                return layout.unflatten(checkpoint(attention, flat, plan, SETTINGS, use_reentrant=False)[0][None])
            return layout.unflatten(attention(flat, plan, SETTINGS)[0][None])

    attention.v_proj.bias.data.zero_()
    values = torch.randn(ROWS, WIDTH, 16, requires_grad=True)
    function, state = compiled(Linear()), torch.get_rng_state()
    losses = []
    for _ in range(2):
        loss = (function(values) * weights).sum()
        (grad,) = torch.autograd.grad(loss, values)
        torch.testing.assert_close((grad * values).sum(), loss, **CLOSE)
        losses.append(loss.item())
    assert losses[0] != losses[1]
    torch.set_rng_state(state)
    assert (function(values) * weights).sum().item() == losses[0]


def test_dropout_needs_a_known_generator():
    with (
        pytest.raises(ValueError, match="dropout in a graph must be on a CPU or a CUDA device; got 'meta'"),
        graph_attention._random_from(torch.tensor(1), torch.device("meta")),
    ):
        pass


# --- Operators --------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # torch 2.14's own
def test_operators_keep_their_promises():
    """Shapes, strides, aliases and gradients are what the compiler is told."""
    torch.library.opcheck(graph_layout.LAYOUT, ([ROWS, WIDTH], LENGTHS, None, None, None, True))
    layout = graph_layout.LAYOUT([ROWS, WIDTH], LENGTHS, None, torch.rand(ROWS, WIDTH) < 0.2, None, True)
    tokens = graph_layout.known(layout).layout.num_tokens
    query, key, value = (torch.randn(tokens, heads, 4, requires_grad=True) for heads in (4, 2, 2))
    spans = torch.randint(1, 3, (ROWS, 2, 2))
    for mask, names, fields in (("causal", "", []), ("visible", "hidden_spans", [spans])):
        tensors = query, key, value, None, None, layout, layout, fields
        torch.library.opcheck(graph_attention.ATTENTION, (*tensors, mask, names, 0.5, 0.0, "scores", "auto"))


def test_a_layout_is_read_from_its_tensor_alone():
    described = graph_layout.LAYOUT([ROWS, WIDTH], None, with_gaps()["attention_mask"], None, None, False)
    known, read = (graph_layout.known(tensor).layout for tensor in (described, described.clone()))
    assert known is not read and known.shape == read.shape and known.sizes == read.sizes
    for name in ("lengths", "indices", "positions", "sequence_ids"):
        assert torch.equal(getattr(known, name), getattr(read, name))


def test_nothing_is_kept_of_a_batch():
    model, function = make(DynMaskModel).eval(), None
    function = compiled(model)
    for _ in range(3):
        function(**rows()).last_hidden_state.sum().backward()
    assert len(graph_layout._known) == 0


def test_code_that_is_loaded_twice():
    before = graph_attention.ATTENTION
    for module in (compile_ops, graph_layout, graph_attention):
        importlib.reload(module)
    assert before.name() != graph_attention.ATTENTION.name()
    test_every_layout(rows)
