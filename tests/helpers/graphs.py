"""Small models and batches for tests of `torch.compile`, and the comparison with a model that is not compiled."""

# pyright: reportOptionalMemberAccess=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportIndexIssue=false

from typing import Any

import torch
from torch import Tensor

from hf_dynmask import DynMaskConfig

ROWS, WIDTH, VOCABULARY = 5, 9, 37
LENGTHS = torch.tensor([7, 3, 0, 1, 9])
CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}
SIZES: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 19}
SIZES |= {"num_hidden_layers": 1, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SIZES |= {"max_position_embeddings": 64, "initializer_range": 0.3}


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


def compiled(model, backend: Any = "aot_eager", **settings):
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


def with_labels(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    labels = ids(*inputs["input_ids"].shape)
    return inputs | {"labels": labels.masked_fill(torch.rand(labels.shape) < 0.5, -100)}
