"""Few graphs of `torch.compile` serve batches of many lengths."""

import random

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from graphs import CLOSE, ROWS, compiled, ids, make, with_labels
from hf_dynmask import DynMaskForMaskedLM


@pytest.fixture(autouse=True)
def fresh():
    torch.manual_seed(0)
    torch.compiler.reset()


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


@pytest.mark.parametrize("layout, backend", [(any_rows, "aot_eager"), (any_flat, "eager"), (any_mask, "eager")])
def test_few_graphs_for_a_hundred_sets_of_lengths(layout, backend):
    random.seed(0)
    model = make(DynMaskForMaskedLM, mask="causal & window(4, 0)").train()
    counter = CompileCounterWithBackend(backend)
    function = compiled(model, counter)
    with torch._dynamo.config.patch(recompile_limit=4, fail_on_recompile_limit_hit=True):
        for k in range(100):
            inputs = with_labels(layout())
            loss = function(**inputs).loss
            loss.backward()
            if k % 10 == 0:
                torch.testing.assert_close(loss, model(**inputs).loss, **CLOSE)
    assert counter.frame_count <= 4  # the first, and three recompilations
