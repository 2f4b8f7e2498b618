"""`torch.compile` without a graph break, and `torch.export`: same outputs and gradients, few graphs for many lengths."""

# pyright: reportOptionalMemberAccess=false, reportArgumentType=false, reportAttributeAccessIssue=false

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from hf_dynmask import (
    DynMaskConfig,
    DynMaskForCausalLM,
    DynMaskForConditionalGeneration,
    DynMaskForMaskedLM,
    DynMaskForMultipleChoice,
    DynMaskForQuestionAnswering,
    DynMaskForSequenceClassification,
    DynMaskForTokenClassification,
    DynMaskModel,
    DynMaskSeq2SeqConfig,
)

ROWS, WIDTH, VOCABULARY = 5, 9, 37
LENGTHS = torch.tensor([7, 3, 0, 1, 9])
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
SIZES: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 19}
SIZES |= {"num_hidden_layers": 2, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SIZES |= {"max_position_embeddings": 64, "initializer_range": 0.3}


@pytest.fixture(autouse=True)
def fresh():
    torch.manual_seed(0)
    torch.compiler.reset()


def make(head, **settings):
    return head(DynMaskConfig(**SIZES | settings))


def ids(*shape) -> Tensor:
    return torch.randint(1, VOCABULARY, shape)


def present(lengths=LENGTHS, width=WIDTH) -> Tensor:
    return torch.arange(width) < lengths[:, None]


def rows() -> dict[str, Tensor]:
    return {"input_ids": ids(ROWS, WIDTH), "lengths": LENGTHS}


def flat() -> dict[str, Tensor]:
    return {"input_ids": ids(1, int(LENGTHS.sum())), "lengths": LENGTHS}


def with_gaps() -> dict[str, Tensor]:
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 1, 0, 1, 1, 0], [0] * 9, [1] * 9, [1] + [0] * 8])
    return {"input_ids": ids(ROWS, WIDTH), "attention_mask": mask}


def without_padding() -> dict[str, Tensor]:
    return {"input_ids": ids(ROWS, WIDTH)}


LAYOUTS = [rows, flat, with_gaps, without_padding]


def compiled(model, backend="aot_eager", **settings):
    return torch.compile(model, backend=backend, fullgraph=True, **settings)


def run(function, model, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor of the outputs, and the gradient of every weight."""
    model.zero_grad()
    output = function(**inputs)
    found = {name: value for name, value in output.items() if isinstance(value, Tensor)}
    loss = found.get("loss")
    loss = sum(value.square().mean() for value in found.values()) if loss is None else loss
    loss.backward()
    grads = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    return {name: value.detach() for name, value in found.items()} | grads


def assert_same(model, *batches: dict[str, Tensor], **settings):
    function = compiled(model, **settings)
    for inputs in batches:
        expected = run(model, model, inputs)
        found = run(function, model, inputs)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


# --- Batches and heads -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout):
    assert_same(make(DynMaskModel, mask="causal & window(2, 0)").eval(), layout())


def with_labels(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    labels = ids(*inputs["input_ids"].shape)
    return inputs | {"labels": labels.masked_fill(torch.rand(labels.shape) < 0.5, -100)}


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("layout", [flat, with_gaps])
def test_masked_language_model(layout, is_training):
    assert_same(make(DynMaskForMaskedLM).train(is_training), with_labels(layout()))


@pytest.mark.parametrize("layout", [flat, with_gaps])
def test_causal_language_model(layout):
    settings: dict[str, Any] = {"position_type": "rotary", "norm_placement": "before", "norm_type": "rms_norm"}
    assert_same(make(DynMaskForCausalLM, num_key_value_heads=1, **settings).train(), with_labels(layout()))


@pytest.mark.parametrize("columns", [0, 3, torch.tensor([1, 4])])
def test_causal_language_model_of_some_columns(columns):
    model = make(DynMaskForCausalLM).eval()
    assert_same(model, rows() | {"use_cache": False, "logits_to_keep": columns}, backend="eager")


def test_token_classification():
    inputs = rows()
    labels = torch.randint(0, 2, (ROWS, WIDTH))
    assert_same(make(DynMaskForTokenClassification).train(), inputs | {"labels": labels})


@pytest.mark.parametrize("layout", [rows, flat])
def test_sequence_classification(layout):
    labels = torch.randint(0, 2, (ROWS,))
    assert_same(make(DynMaskForSequenceClassification).train(), layout() | {"labels": labels})


@pytest.mark.parametrize("layout", [rows, flat])
def test_question_answering(layout):
    answers = {"start_positions": torch.tensor([6, 3, 0, 0, -1]), "end_positions": torch.tensor([6, 2, 0, 5, 80])}
    assert_same(make(DynMaskForQuestionAnswering).train(), layout() | answers)


def test_multiple_choice():
    inputs = {"input_ids": ids(2, 3, 5), "lengths": torch.tensor([[1, 5, 2], [3, 3, 4]]), "labels": torch.tensor([1, 2])}
    assert_same(make(DynMaskForMultipleChoice).train(), inputs)


@pytest.mark.parametrize("is_training", [True, False])
def test_encoder_decoder(is_training):
    config = DynMaskSeq2SeqConfig(**SIZES, decoder_start_token_id=1, mask="window(2)", cross_mask="~span(2, 1)")
    lengths = torch.tensor([2, 6, 0, 4, 3])
    labels = ids(ROWS, 6).masked_fill(~present(lengths, 6), -100)
    inputs = rows() | {"labels": labels, "decoder_lengths": lengths}
    assert_same(DynMaskForConditionalGeneration(config).train(is_training), inputs)


# --- Masks -----------------------------------------------------------------------------------------------------------


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
    assert_same(model.eval(), rows() | fields())


def test_explicit_mask_and_missing_values():
    inputs = rows() | {"attention_mask": torch.rand(ROWS, 2, WIDTH, WIDTH) < 0.7}
    inputs |= {"missing": torch.rand(ROWS, WIDTH) < 0.3}
    assert_same(make(DynMaskModel, mask="window(3) | diagonal").eval(), inputs)


def test_learned_choice_of_keys():
    assert_same(make(DynMaskModel, mask="topk(2) & causal", num_key_value_heads=1).eval(), rows())


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_other_implementations(implementation):
    model = make(DynMaskModel, mask="causal").eval()
    model.set_attn_implementation(implementation)
    assert_same(model, rows())


def test_another_mask_is_followed():
    model = make(DynMaskModel).eval()
    function, inputs = compiled(model, "eager"), rows()
    for mask in ("full", "causal", ["diagonal", "full"]):
        model.set_mask(mask)
        torch.testing.assert_close(function(**inputs)[0], model(**inputs)[0], **CLOSE)


# --- What a batch does not say ---------------------------------------------------------------------------------------


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


def test_dropout_is_the_same_in_forward_and_backward():
    """The loss is linear in the values: their gradient foretells it where the same weights were dropped."""
    model = make(DynMaskModel, num_hidden_layers=1, attention_probs_dropout_prob=0.5).train()
    attention = model.layers[0].attention
    attention.o_proj.bias.data.zero_()
    attention.q_proj.weight.data.zero_()  # all keys count the same: weights do not depend on the inputs
    weights = torch.randn(ROWS, WIDTH, 16)

    class Linear(nn.Module):
        def forward(self, values):
            layout = layout_of_batch((ROWS, WIDTH), values.device, LENGTHS, None, in_graph=True)
            (plan,) = model._plans(layout, layout, None, {})
            return layout.unflatten(attention(layout.flatten(values), plan)[0])

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
