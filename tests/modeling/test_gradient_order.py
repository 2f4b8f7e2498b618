"""Gradients come in one order, whatever is in a batch: ZeRO-2 adds up those of all processes in that order."""

from typing import Any

import pytest
import torch
from torch import Tensor

from hf_dynmask import (
    DynMaskConfig,
    DynMaskForCausalLM,
    DynMaskForConditionalGeneration,
    DynMaskForCTC,
    DynMaskForMaskedLM,
    DynMaskForQuestionAnswering,
    DynMaskForSequenceClassification,
    DynMaskForTokenClassification,
    DynMaskSeq2SeqConfig,
)

SHAPE: dict[str, Any] = {"vocab_size": 50, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
SHAPE |= {"intermediate_size": 12}
LENGTHS = [[5, 9], [6, 6], [1, 1], [9, 0], [0, 0], [300, 4], [7]]  # of one length or several, empty, of many blocks


def config(mask: str = "full", **settings: Any) -> DynMaskConfig:
    fields: dict[str, Any] = SHAPE | {"num_labels": 50} | settings
    return DynMaskConfig(mask=mask, **fields)


def two_sides() -> DynMaskForConditionalGeneration:
    ids: dict[str, Any] = {"decoder_start_token_id": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return DynMaskForConditionalGeneration(DynMaskSeq2SeqConfig(**SHAPE, **ids))


def texts(lengths: list[int]) -> dict[str, Tensor]:
    width = max(1, *lengths)
    return {"input_ids": torch.randint(5, 50, (len(lengths), width)), "lengths": torch.tensor(lengths)}


def with_labels(lengths: list[int]) -> dict[str, Tensor]:
    batch = texts(lengths)
    return batch | {"labels": batch["input_ids"]}


def without_labels(lengths: list[int]) -> dict[str, Tensor]:
    batch = texts(lengths)
    return batch | {"labels": torch.full_like(batch["input_ids"], -100)}


def of_sequences(*names: str):
    return lambda lengths: texts(lengths) | {name: torch.zeros(len(lengths), dtype=torch.long) for name in names}


def frames(lengths: list[int]) -> dict[str, Tensor]:
    labels = torch.full((len(lengths), 1), -100)
    features = torch.randn(len(lengths), max(1, *lengths), 3)
    return {"input_features": features, "lengths": torch.tensor(lengths), "labels": labels}


MODELS: dict[str, Any] = {
    "masked lm": (lambda: DynMaskForMaskedLM(config("window(2)")), with_labels, without_labels),
    "topk": (lambda: DynMaskForMaskedLM(config("topk(3)")), with_labels, without_labels),
    "causal lm": (lambda: DynMaskForCausalLM(config("causal", position_type="rotary")), with_labels, without_labels),
    "tokens": (lambda: DynMaskForTokenClassification(config()), with_labels, without_labels),
    "sequences": (lambda: DynMaskForSequenceClassification(config()), of_sequences("labels")),
    "answers": (lambda: DynMaskForQuestionAnswering(config()), of_sequences("start_positions", "end_positions")),
    "frames": (lambda: DynMaskForCTC(config(num_features=3, conv_kernel=[3], conv_stride=[2])), frames),
    "two sides": (two_sides, with_labels, without_labels),
}


@pytest.mark.parametrize("name", MODELS)
def test_gradients_come_in_one_order(name):
    make, *kinds = MODELS[name]
    model = make().train()
    seen: list[str] = []
    for weight, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, weight=weight: seen.append(weight))
    orders = {}
    for make_batch in kinds:
        for lengths in LENGTHS:
            model(**make_batch(lengths)).loss.backward()
            orders[make_batch.__name__, str(lengths)] = tuple(seen)
            seen.clear()
    assert len(next(iter(orders.values()))) == len(list(model.parameters()))
    assert len(set(orders.values())) == 1, orders
