"""`torch.compile` as others use it (`Trainer`, autocast, checkpointing), and `torch.export`."""

# pyright: reportOptionalMemberAccess=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportIndexIssue=false

import io
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

from graphs import CLOSE, LENGTHS, ROWS, VOCABULARY, WIDTH, compiled, ids, make, rows, run
from hf_dynmask import (
    DynMaskForCausalLM,
    DynMaskForCTC,
    DynMaskForSequenceClassification,
    DynMaskForTokenClassification,
    DynMaskRecurrentConfig,
    DynMaskRecurrentForTokenClassification,
)
from hf_dynmask.data import DataCollatorWithLengths


@pytest.fixture(autouse=True)
def fresh():
    torch.manual_seed(0)
    torch.compiler.reset()


# Its norm of queries and keys is in full precision, and says so.
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")
def test_half_precision_by_autocast():
    model, inputs = make(DynMaskForTokenClassification, use_qk_norm=True).eval(), rows()
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


# --- torch.export -----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # of `torch.export.load` before torch 2.12
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
