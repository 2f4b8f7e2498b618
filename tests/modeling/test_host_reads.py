"""What a GPU would be waited for: on the device `meta`, which takes the way of CUDA, every look at a value raises."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportOptionalMemberAccess=false

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertForSequenceClassification

import hf_dynmask
from hf_dynmask import DynMaskConfig, DynMaskSeq2SeqConfig, SequenceLayout
from hf_dynmask.modeling.attention_flex import block_mask
from hf_dynmask.modeling.batch import layout_of_batch
from hf_dynmask.modeling.plan import MaskPlan
from operators import Operators

TOKENS, SLOTS, TARGETS = 48, 6, 32
SIZES = {"vocab_size": 37, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "num_hidden_layers": 2}
SIZES |= {"max_position_embeddings": 64}
MASKS = ["full", "causal", "window(3)", "causal & window(5, 0)"]
FLEX_MASKS = ["causal | prefix", "segments & causal", "visible", "shared_question", "global_tokens | window(3)"]
FLEX_MASKS += ["select(full, causal)", "heads(full, causal | prefix(2))", "random(0.5, 3)", "dilated(3, 2)", "chunk(4)"]
FLEX_MASKS += ["chunk_causal(4)", "~span(3, 2)", "global_tokens(2) | diagonal"]


def zeros(*shape, dtype=torch.long):
    return torch.zeros(*shape, dtype=dtype, device="meta")


def flat():
    return {"input_ids": zeros(1, TOKENS), "lengths": zeros(SLOTS)}


LABELS = {
    "DynMaskForSequenceClassification": lambda: {"labels": zeros(SLOTS)},
    "DynMaskForTokenClassification": lambda: {"labels": zeros(1, TOKENS)},
    "DynMaskForMaskedLM": lambda: {"labels": zeros(1, TOKENS)},
    "DynMaskForCausalLM": lambda: {"labels": zeros(1, TOKENS)},
    "DynMaskForQuestionAnswering": lambda: {"start_positions": zeros(SLOTS), "end_positions": zeros(SLOTS)},
}


def make(head, config, dtype=torch.bfloat16):
    with torch.device("meta"):
        return getattr(hf_dynmask, head)(config).to(dtype).train()


def dropout(share):
    return {"hidden_dropout_prob": share, "attention_probs_dropout_prob": share}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("share", [0.0, 0.1])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("head", LABELS)
def test_a_training_step_on_a_flat_row_reads_nothing(head, mask, share, dtype):
    model = make(head, DynMaskConfig(**SIZES, mask=mask, **dropout(share)), dtype)
    model(**flat(), **LABELS[head]()).loss.backward()
    assert all(weight.grad is not None for weight in model.model.layers.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("share", [0.0, 0.1])
def test_an_encoder_decoder_reads_nothing(share, dtype):
    sides = {
        name: SIZES | dropout(share) | {"mask": mask} for name, mask in (("encoder", "full"), ("decoder", "causal"))
    }
    config = DynMaskSeq2SeqConfig(**sides, decoder_start_token_id=1, pad_token_id=0)
    targets = {"labels": zeros(1, TARGETS), "decoder_lengths": zeros(SLOTS)}
    make("DynMaskForConditionalGeneration", config, dtype)(**flat(), **targets).loss.backward()
    make("DynMaskSeq2SeqForSequenceClassification", config, dtype)(**flat(), labels=zeros(SLOTS)).loss.backward()


def test_frames_missing_values_and_packing_arguments_read_nothing():
    frames = SIZES | {"num_features": 8, "conv_kernel": [3, 3], "conv_stride": [1, 2]}
    model = make("DynMaskForSequenceClassification", DynMaskConfig(**frames))
    features = zeros(1, TOKENS, 8, dtype=torch.bfloat16)
    model(input_features=features, lengths=zeros(SLOTS), labels=zeros(SLOTS)).loss.backward()
    model = make("DynMaskForTokenClassification", DynMaskConfig(**SIZES))
    labels = {"labels": zeros(1, TOKENS)}
    model(**flat(), **labels, missing=zeros(1, TOKENS, dtype=torch.bool)).loss.backward()
    ends = {name: zeros(SLOTS + 1, dtype=torch.int32) for name in ("cu_seq_lens_q", "cu_seq_lens_k")}
    bounds = {"max_length_q": 9, "max_length_k": 9}
    model(zeros(1, TOKENS), position_ids=zeros(1, TOKENS), **ends, **bounds, **labels).loss.backward()


@pytest.mark.parametrize("bounds, longest", [({}, 48), ({"max_length_q": 9}, 9), ({"max_length_q": zeros(1)[0]}, 48)])
def test_a_bound_of_the_longest(bounds, longest):
    """A number that the host has; of rows it is the width."""
    lengths = zeros(SLOTS)
    assert layout_of_batch((1, TOKENS), lengths.device, lengths, None, packing=bounds).longest == longest
    with Operators(value=17):
        assert layout_of_batch((SLOTS, 8), lengths.device, lengths, None, packing=bounds).longest == 8


@pytest.mark.parametrize("position_type, longest", [("learned", 128), ("rotary", 400)])
def test_kernels_are_started_for_sequences_that_can_be(position_type, longest):
    """A table of 64 positions; the pieces of a tail have 128 tokens."""
    calls = []

    class Bounds(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "_flash_attention_forward" in str(function):
                calls.append(args[5:7])
            return function(*args, **kwargs or {})

    model = make("DynMaskModel", DynMaskConfig(**SIZES, position_type=position_type))
    inputs = {"input_ids": zeros(1, 400), "lengths": zeros(SLOTS)}
    model(**inputs)  # the kernel is tried before
    with Bounds():
        model(**inputs)
    assert calls == [(longest, longest)] * SIZES["num_hidden_layers"]


@pytest.mark.parametrize("mask", FLEX_MASKS)
def test_plans_and_block_masks_read_nothing(mask):
    fields = {"segment_ids": zeros(1, TOKENS), "prefix_lengths": zeros(SLOTS), "hidden_spans": zeros(SLOTS, 2, 2)}
    fields |= {"global_tokens": zeros(1, TOKENS, dtype=torch.bool), "mask_choice": zeros(SLOTS)}
    layout = SequenceLayout.from_lengths(zeros(SLOTS), (1, TOKENS))
    assert block_mask(MaskPlan(mask, layout, fields=fields), 2).shape[2:] == (TOKENS, TOKENS)


@pytest.mark.parametrize("mask", ["causal | prefix", "segments & causal"])
def test_a_training_step_with_other_masks_reads_nothing(mask):
    model = make("DynMaskForTokenClassification", DynMaskConfig(**SIZES, mask=mask, **dropout(0.0)))
    fields = {"segment_ids": zeros(1, TOKENS)} if "segments" in mask else {"prefix_lengths": zeros(SLOTS)}
    model(**flat(), **fields, labels=zeros(1, TOKENS)).loss.backward()


@pytest.mark.parametrize("head", LABELS)
def test_rows_are_read_once(head):
    model, width = make(head, DynMaskConfig(**SIZES)), TOKENS // SLOTS
    labels = {name: zeros(SLOTS, width) if len(of.shape) > 1 else of for name, of in LABELS[head]().items()}
    ids = {"input_ids": zeros(SLOTS, width)}
    for inputs in (ids | {"lengths": zeros(SLOTS)}, ids | {"attention_mask": zeros(SLOTS, width)}):
        with Operators(value=17) as operators:
            model(**inputs, **labels).loss.backward()
        assert operators.reads == 1


def test_without_lengths_nothing_is_read():
    with Operators() as operators:
        make("DynMaskModel", DynMaskConfig(**SIZES))(zeros(SLOTS, 8)).last_hidden_state.sum().backward()
    assert operators.reads == 0


@pytest.mark.parametrize("share", [0.0, 0.1])
def test_a_step_takes_no_more_operators_than_stock_berts(share):
    """Of as many tokens, without padding."""
    config = SIZES | {"num_hidden_layers": 12} | dropout(share)
    head = "DynMaskForSequenceClassification"
    model = make(head, DynMaskConfig(**config, type_vocab_size=2))
    with Operators() as ours:
        model(**flat(), **LABELS[head]()).loss.backward()
    with torch.device("meta"):
        stock = BertForSequenceClassification(BertConfig(**config, attn_implementation="sdpa")).bfloat16().train()
    with Operators() as theirs:
        stock(zeros(SLOTS, TOKENS // SLOTS), labels=zeros(SLOTS)).loss.backward()
    assert ours.calls.total() <= theirs.calls.total()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("mask", ["full", "causal & window(5, 0)"])
@pytest.mark.parametrize("head", LABELS)
@pytest.mark.filterwarnings("ignore:aten.*an autograd kernel was not registered:UserWarning")
def test_a_graph_of_a_flat_row_hides_nothing(head, mask, dtype):
    """One graph forward and one backward, with attention in them, and no operator that CUDA graphs could not take."""
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    torch.compiler.reset()
    model = make(head, DynMaskConfig(**SIZES, mask=mask, **dropout(0.1)), dtype)
    compiled = torch.compile(model, backend=aot_autograd(fw_compiler=keep), fullgraph=True)
    for _ in range(2):
        compiled(**flat(), **LABELS[head]()).loss.backward()
    assert len(graphs) == 2
    operators = {str(node.target) for graph in graphs for node in graph.graph.nodes if node.op == "call_function"}
    assert not [name for name in operators if "dynmask" in name or "local_scalar" in name or "nonzero" in name]
    kernel = "_flash" if dtype == torch.bfloat16 else "_efficient" if mask == "full" else "softmax"
    assert any(kernel in name and "backward" not in name for name in operators)
