"""`torch.compile` without a graph break, and `torch.export`: the same results, and few graphs for many lengths."""

# pyright: reportOptionalMemberAccess=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportIndexIssue=false

import importlib
import io
import random
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

from hf_dynmask import (
    DynMaskConfig,
    DynMaskForCausalLM,
    DynMaskForConditionalGeneration,
    DynMaskForCTC,
    DynMaskForMaskedLM,
    DynMaskForMultipleChoice,
    DynMaskForQuestionAnswering,
    DynMaskForSequenceClassification,
    DynMaskForTokenClassification,
    DynMaskModel,
    DynMaskRecurrentConfig,
    DynMaskRecurrentForTokenClassification,
    DynMaskSeq2SeqConfig,
)
from hf_dynmask import graph as graph_module
from hf_dynmask.data import DataCollatorWithLengths
from hf_dynmask.modeling_dynmask import layout_of_batch

ROWS, WIDTH, VOCABULARY = 5, 9, 37
LENGTHS = torch.tensor([7, 3, 0, 1, 9])
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
SIZES: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 19}
SIZES |= {"num_hidden_layers": 1, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
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
    for name in ("hidden_states", "attentions"):
        found |= {f"{name}.{layer}": value for layer, value in enumerate(output.get(name) or ())}
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
    inputs |= {"labels": labels, "output_hidden_states": True}
    assert_same(make(DynMaskForTokenClassification).train(), inputs)


@pytest.mark.parametrize("layout", [rows, flat])
def test_sequence_classification(layout):
    labels = torch.randint(0, 2, (ROWS,))
    assert_same(make(DynMaskForSequenceClassification).train(), layout() | {"labels": labels})


@pytest.mark.parametrize("layout", [rows, flat])
def test_question_answering(layout):
    answers = {"start_positions": torch.tensor([6, 3, 0, 0, -1]), "end_positions": torch.tensor([6, 2, 0, 5, 80])}
    assert_same(make(DynMaskForQuestionAnswering).train(), layout() | answers)


def test_multiple_choice():
    inputs = {"input_ids": ids(2, 3, 5), "lengths": torch.tensor([[1, 5, 2], [3, 3, 4]])}
    inputs |= {"labels": torch.tensor([1, 2])}
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
    for mask in ("full", "causal", ["diagonal"]):
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


# --- How many graphs -------------------------------------------------------------------------------------------------


def random_lengths(width: int, sequences: int = ROWS) -> Tensor:
    return torch.tensor([random.randint(0, width) for _ in range(sequences)])


def any_rows() -> dict[str, Tensor]:
    width = random.randint(2, 60)
    return {"input_ids": ids(ROWS, width), "lengths": random_lengths(width)}


def any_flat() -> dict[str, Tensor]:
    lengths = random_lengths(20, random.randint(2, 9)) + 1
    return {"input_ids": ids(1, int(lengths.sum())), "lengths": lengths}


def any_mask() -> dict[str, Tensor]:
    width = random.randint(2, 60)
    return {"input_ids": ids(ROWS, width), "attention_mask": (torch.rand(ROWS, width) < 0.7).long()}


@pytest.mark.parametrize("layout", [any_rows, any_flat, any_mask])
def test_few_graphs_for_a_hundred_sets_of_lengths(layout):
    random.seed(0)
    model = make(DynMaskForMaskedLM, mask="causal & window(4, 0)").train()
    counter = CompileCounterWithBackend("aot_eager")
    function = compiled(model, counter)
    with torch._dynamo.config.patch(recompile_limit=4, fail_on_recompile_limit_hit=True):
        for k in range(100):
            inputs = with_labels(layout())
            loss = function(**inputs).loss
            loss.backward()
            if k % 10 == 0:
                torch.testing.assert_close(loss, model(**inputs).loss, **CLOSE)
    assert counter.frame_count <= 4  # the first, and three recompilations


# --- Other users of the compiler -------------------------------------------------------------------------------------


# Its norm of queries and keys is in full precision, and says so.
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")
def test_half_precision_by_autocast():
    model, inputs = make(DynMaskForTokenClassification, query_key_norm=True).eval(), rows()
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(**inputs).logits
        found = compiled(model)(**inputs).logits
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_gradient_checkpointing():
    model = make(DynMaskForTokenClassification).train()
    inputs = rows() | {"labels": torch.randint(0, 2, (ROWS, WIDTH))}
    expected = run(model, model, inputs)
    model.gradient_checkpointing_enable()
    found = run(compiled(model), model, inputs)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **CLOSE)


# torch.compile looks at every tensor's `.grad` where a graph ends.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("case", ["cache", "weights", "ctc", "recurrent", "features"])
def test_what_is_more_than_one_graph(case):
    inputs: dict[str, Any] = rows()
    model: Any = make(DynMaskForCausalLM).eval()
    if case == "weights":
        model = make(DynMaskForTokenClassification).eval()
        model.set_attn_implementation("eager")
        inputs |= {"output_attentions": True}
    elif case == "ctc":
        model = make(DynMaskForCTC, pad_token_id=0, ctc_zero_infinity=True).train()
        inputs |= {"labels": ids(ROWS, 2)}
    elif case == "recurrent":
        config = DynMaskRecurrentConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1)
        model = DynMaskRecurrentForTokenClassification(config).eval()
    elif case == "features":
        model = make(DynMaskForTokenClassification, num_features=3, conv_kernel=[3], conv_stride=[2]).eval()
        inputs = {"input_features": torch.randn(ROWS, WIDTH, 3), "lengths": LENGTHS}
    expected = run(model, model, inputs)
    found = run(torch.compile(model, backend="eager"), model, inputs)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **CLOSE)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_trainer(tmp_path):
    words = Tokenizer(WordLevel({"[PAD]": 0}, unk_token="[PAD]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]")

    def trained(**settings):
        torch.manual_seed(0)
        model = make(DynMaskForSequenceClassification)
        arguments: dict[str, Any] = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
        arguments |= {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "logging_steps": 1} | settings
        trainer = Trainer(
            model,
            TrainingArguments(output_dir=str(tmp_path), **arguments),
            data_collator=DataCollatorWithLengths(tokenizer),
            train_dataset=Dataset.from_list([{"input_ids": [1 + k] * (1 + k % 7), "labels": k % 2} for k in range(16)]),
        )
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    expected = trained()
    assert trained(torch_compile=True, torch_compile_backend="aot_eager") == pytest.approx(expected, abs=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_inductor():
    model = make(DynMaskForSequenceClassification, mask="window(2)").train()
    labels = torch.randint(0, 2, (ROWS,))
    assert_same(model, *(rows() | {"labels": labels} for _ in range(2)), backend="inductor", dynamic=True)


# --- Operators -------------------------------------------------------------------------------------------------------


def test_operators_keep_their_promises():
    """Shapes, strides, aliases and gradients are what the compiler is told."""
    torch.library.opcheck(graph_module.LAYOUT, ([ROWS, WIDTH], LENGTHS, None, None))
    layout = graph_module.LAYOUT([ROWS, WIDTH], LENGTHS, None, torch.rand(ROWS, WIDTH) < 0.2)
    tokens = graph_module.known(layout).layout.num_tokens
    query, key, value = (torch.randn(1, heads, tokens, 4, requires_grad=True) for heads in (4, 2, 2))
    spans = torch.randint(1, 3, (ROWS, 2, 2))
    for mask, names, fields in (("causal", "", []), ("visible", "hidden_spans", [spans])):
        tensors = query, key, value, None, None, layout, layout, fields
        torch.library.opcheck(graph_module.ATTENTION, (*tensors, mask, names, 0.5, 0.0, "scores", "auto"))


def test_a_layout_is_read_from_its_tensor_alone():
    described = graph_module.LAYOUT([ROWS, WIDTH], None, with_gaps()["attention_mask"], None)
    known, read = (graph_module.known(tensor).layout for tensor in (described, described.clone()))
    assert known is not read and known.shape == read.shape and known.sizes == read.sizes
    for name in ("rank", "indices", "positions"):
        assert torch.equal(getattr(known, name), getattr(read, name))


def test_nothing_is_kept_of_a_batch():
    model, function = make(DynMaskModel).eval(), None
    function = compiled(model)
    for _ in range(3):
        function(**rows()).last_hidden_state.sum().backward()
    assert len(graph_module._known) == 0


def test_code_that_is_loaded_twice():
    importlib.reload(graph_module)
    assert graph_module.ATTENTION.name() == "hf_dynmask::attention"
    test_every_layout(rows)


# --- torch.export ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", [DynMaskForSequenceClassification, DynMaskForCausalLM])
def test_export(head):
    model = make(head, layer_masks=["segments & causal"], use_cache=False).eval()
    batch, width = torch.export.Dim("batch"), torch.export.Dim("width")
    shapes = {"input_ids": {0: batch, 1: width}, "lengths": {0: batch}, "segment_ids": {0: batch, 1: width}}

    def inputs(lengths):
        size = len(lengths), int(lengths.max()) + 1
        return {"input_ids": ids(*size), "lengths": lengths, "segment_ids": torch.randint(0, 2, size)}

    program = torch.export.export(model, (), inputs(LENGTHS), dynamic_shapes=shapes)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    module = torch.export.load(file).module()
    for lengths in (LENGTHS, torch.tensor([4, 1]), torch.tensor([11, 0, 5, 2, 8, 33])):
        given = inputs(lengths)
        torch.testing.assert_close(module(**given).logits, model(**given).logits, **CLOSE)
