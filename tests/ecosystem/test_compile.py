"""`torch.compile` without a graph break: the results of every head."""

# pyright: reportOptionalMemberAccess=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportIndexIssue=false

from typing import Any

import pytest
import torch

from graphs import ROWS, SIZES, WIDTH, assert_same, flat, ids, make, present, rows, with_gaps, with_labels
from hf_dynmask import (
    DynMaskForCausalLM,
    DynMaskForConditionalGeneration,
    DynMaskForMaskedLM,
    DynMaskForMultipleChoice,
    DynMaskForQuestionAnswering,
    DynMaskForSequenceClassification,
    DynMaskForTokenClassification,
    DynMaskSeq2SeqConfig,
)


@pytest.fixture(autouse=True)
def fresh():
    torch.manual_seed(0)
    torch.compiler.reset()


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("layout", [flat, with_gaps])
def test_masked_language_model(layout, is_training):
    backend = "aot_eager" if is_training else "eager"
    assert_same(make(DynMaskForMaskedLM).train(is_training), with_labels(layout()), backend=backend)


@pytest.mark.parametrize("layout", [flat, with_gaps])
def test_causal_language_model(layout):
    settings: dict[str, Any] = {"position_type": "rotary", "norm_placement": "pre", "norm_type": "rms_norm"}
    assert_same(make(DynMaskForCausalLM, num_key_value_heads=1, **settings).train(), with_labels(layout()))


@pytest.mark.parametrize("columns", [3, torch.tensor([1, 4])])
def test_causal_language_model_of_some_columns(columns):
    model = make(DynMaskForCausalLM).eval()
    assert_same(model, rows() | {"use_cache": False, "logits_to_keep": columns}, backend="eager")


def test_token_classification():
    inputs = rows()
    labels = torch.randint(0, 2, (ROWS, WIDTH))
    inputs |= {"labels": labels, "output_hidden_states": True}
    assert_same(make(DynMaskForTokenClassification).train(), inputs)


@pytest.mark.parametrize("layout, backend", [(rows, "aot_eager"), (flat, "eager")])
def test_sequence_classification(layout, backend):
    labels = torch.randint(0, 2, (ROWS,))
    assert_same(make(DynMaskForSequenceClassification).train(), layout() | {"labels": labels}, backend=backend)


@pytest.mark.parametrize("layout, backend", [(rows, "aot_eager"), (flat, "eager")])
def test_question_answering(layout, backend):
    answers = {"start_positions": torch.tensor([6, 3, 0, 0, -1]), "end_positions": torch.tensor([6, 2, 0, 5, 80])}
    assert_same(make(DynMaskForQuestionAnswering).train(), layout() | answers, backend=backend)


def test_multiple_choice():
    inputs = {"input_ids": ids(2, 3, 5), "lengths": torch.tensor([[1, 5, 2], [3, 3, 4]])}
    inputs |= {"labels": torch.tensor([1, 2])}
    assert_same(make(DynMaskForMultipleChoice).train(), inputs, backend="eager")


@pytest.mark.parametrize("is_training", [True, False])
def test_encoder_decoder(is_training):
    config = DynMaskSeq2SeqConfig(**SIZES, decoder_start_token_id=1, mask="window(2)", cross_mask="~span(2, 1)")
    lengths = torch.tensor([2, 6, 0, 4, 3])
    labels = ids(ROWS, 6).masked_fill(~present(lengths, 6), -100)
    inputs = rows() | {"labels": labels, "decoder_lengths": lengths}
    backend = "aot_eager" if is_training else "eager"
    assert_same(DynMaskForConditionalGeneration(config).train(is_training), inputs, backend=backend)
