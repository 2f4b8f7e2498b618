"""ONNX: a model leaves as its stock twin, whose rows and lengths may be of any size."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertForTokenClassification

from hf_dynmask import from_transformers, to_transformers

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

SIZES: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "num_hidden_layers": 2}
SIZES |= {"vocab_size": 20, "num_labels": 3}
LENGTHS = [torch.tensor([5, 2, 9]), torch.tensor([3]), torch.tensor([1, 17, 4, 8, 2])]


def rows(lengths):
    width = int(lengths.max())
    input_ids = torch.arange(len(lengths) * width).reshape(len(lengths), width) % 20
    return input_ids, (torch.arange(width) < lengths[:, None]).long()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("stock_class", [BertForSequenceClassification, BertForTokenClassification])
def test_outputs_of_any_lengths(stock_class, tmp_path):
    torch.manual_seed(0)
    model = from_transformers(stock_class(BertConfig(**SIZES))).eval()
    input_ids, attention_mask = rows(LENGTHS[0])
    size = {0: torch.export.Dim("rows"), 1: torch.export.Dim("width")}
    torch.onnx.export(
        to_transformers(copy.deepcopy(model)).eval(),
        kwargs={"input_ids": input_ids, "attention_mask": attention_mask},
        f=tmp_path / "model.onnx",
        dynamic_shapes={"input_ids": size, "attention_mask": size},
        dynamo=True,
        output_names=["logits"],
        verbose=False,
    )
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for lengths in LENGTHS:
        input_ids, attention_mask = rows(lengths)
        inputs = {"input_ids": input_ids.numpy(), "attention_mask": attention_mask.numpy()}
        found = session.run(["logits"], inputs)[0]
        with torch.no_grad():
            expected = model(input_ids, lengths=lengths).logits.numpy()
        if expected.ndim == 3:
            found = found * attention_mask.numpy()[..., None]
        np.testing.assert_allclose(found, expected, atol=1e-5)
