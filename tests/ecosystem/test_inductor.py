"""`torch.compile` with its own backend, inductor, whose C++ takes some seconds to compile."""

import pytest
import torch

from graphs import ROWS, assert_same, make, rows
from hf_dynmask import DynMaskForSequenceClassification


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_inductor():
    torch.manual_seed(0)
    torch.compiler.reset()
    model = make(DynMaskForSequenceClassification, mask="window(2)").train()
    labels = torch.randint(0, 2, (ROWS,))
    assert_same(model, *(rows() | {"labels": labels} for _ in range(2)), backend="inductor", dynamic=True)
