"""Labels of every head: how exact a loss is in low precision, and what wrong ones are called."""

# pyright: reportOptionalMemberAccess=false

from typing import Any

import pytest
import torch

from hf_dynmask import (
    DynMaskConfig,
    DynMaskForCausalLM,
    DynMaskForConditionalGeneration,
    DynMaskForMaskedLM,
    DynMaskForMultipleChoice,
    DynMaskForQuestionAnswering,
    DynMaskForSequenceClassification,
    DynMaskForTokenClassification,
    DynMaskSeq2SeqConfig,
)

SIZES: dict[str, Any] = {
    "vocab_size": 30,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
}
LENGTHS = torch.tensor([5, 3, 1])
IDS = torch.arange(5, 20).view(3, 5)


def head(model_class, **settings):
    torch.manual_seed(0)
    return model_class(DynMaskConfig(**SIZES, **settings)).eval()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("is_autocast", [True, False])
@pytest.mark.parametrize("num_labels, scale", [(1, 1e5), (4, 1.0)])  # numbers; shares of classes
def test_labels_of_floats_are_not_rounded(dtype, is_autocast, num_labels, scale):
    model: Any = head(DynMaskForSequenceClassification, num_labels=num_labels)
    model.to(dtype=torch.float32 if is_autocast else dtype)
    labels = torch.linspace(0.1, 1, 3 * num_labels).view(3, num_labels) * scale
    with torch.autocast("cpu", dtype, enabled=is_autocast and dtype != torch.float32):
        output = model(IDS, lengths=LENGTHS, labels=labels)
    criterion = torch.nn.MSELoss() if num_labels == 1 else torch.nn.BCEWithLogitsLoss()
    torch.testing.assert_close(output.loss, criterion(output.logits.float(), labels))


@pytest.mark.parametrize("labels", [torch.tensor([[2], [0], [1]]), torch.tensor([[2.5], [0.5], [1.5]])])
def test_labels_in_a_column_beside_unused_slots(labels):
    model = head(DynMaskForSequenceClassification, num_labels=1 if labels.is_floating_point() else 3)
    expected = model(IDS, lengths=LENGTHS, labels=labels[:, 0]).loss
    flat = torch.cat([row[:length] for row, length in zip(IDS, LENGTHS, strict=True)])
    inputs = {"input_ids": torch.nn.functional.pad(flat, (0, 2))[None], "lengths": torch.cat([LENGTHS, LENGTHS * 0])}
    filled = torch.nn.functional.pad(labels, (0, 0, 0, 3), value=-100)
    torch.testing.assert_close(model(**inputs, labels=filled).loss, expected)


@pytest.mark.parametrize(
    "num_labels, labels, message",
    [
        (3, [0, 1, 3], r"`labels` must be from 0 to 2; got 3"),
        (3, [0, -1, 1], r"`labels` must be from 0 to 2; got -1"),
        (3, [0, 1], r"`labels` must have shape \(3,\) or \(3, 1\); got \(2,\) \(integer labels name one class"),
        (3, [0.0, 1.0, 2.0], r"`labels` must have shape \(3, 3\); got \(3,\) \(.* float labels have a value"),
        (2, [[0.0, 1.0, 0.0], [0.0, 1.0, 0.0]], r"`labels` must have shape \(3, 2\); got \(2, 3\)"),
        (1, [0.5, 1.5], r"`labels` must have shape \(3,\) or \(3, 1\); got \(2,\)$"),
    ],
)
def test_wrong_labels_of_sequences(num_labels, labels, message):
    with pytest.raises(ValueError, match=message):
        head(DynMaskForSequenceClassification, num_labels=num_labels)(IDS, labels=torch.tensor(labels))


@pytest.mark.parametrize("model_class", [DynMaskForTokenClassification, DynMaskForMaskedLM, DynMaskForCausalLM])
@pytest.mark.parametrize("is_training", [True, False])
def test_wrong_labels_of_tokens(model_class, is_training):
    model = head(model_class, num_labels=30).train(is_training)
    with pytest.raises(ValueError, match=r"`labels` must be from 0 to 29; got 30"):
        model(IDS, lengths=LENGTHS, labels=torch.full_like(IDS, 30))
    with pytest.raises(ValueError, match=r"`labels` must have shape \(3, 5\); got \(3, 4\)"):
        model(IDS, lengths=LENGTHS, labels=IDS[:, 1:])


def test_wrong_labels_of_choices():
    model = head(DynMaskForMultipleChoice)
    with pytest.raises(ValueError, match=r"`labels` must be from 0 to 2; got 3"):
        model(IDS[None], labels=torch.tensor([3]))
    with pytest.raises(ValueError, match=r"`labels` must have shape \(1,\); got \(2,\)"):
        model(IDS[None], labels=torch.tensor([0, 1]))


def test_wrong_labels_of_targets():
    model = DynMaskForConditionalGeneration(DynMaskSeq2SeqConfig(**SIZES, decoder_start_token_id=1)).eval()
    with pytest.raises(ValueError, match=r"of the decoder's inputs: `input_ids` must be from 0 to 29; got 30"):
        model(IDS, labels=torch.full_like(IDS, 30))
    with pytest.raises(ValueError, match=r"`labels` must have shape \(B, T\); got \(3,\)"):
        model(IDS, labels=torch.tensor([1, 2, 3]))


@pytest.mark.parametrize(
    "start, end, message",
    [
        ([1, 2, 0], None, "`start_positions` and `end_positions` must come together; got `start_positions` alone"),
        (None, [1, 2, 0], "got `end_positions` alone"),
        ([1, 2, 0, 0], [1, 2, 0, 0], r"`start_positions` must have shape \(3,\) or \(3, 1\); got \(4,\)"),
        ([1, 2, 0], [1, 2], r"`end_positions` must have shape \(3,\) or \(3, 1\); got \(2,\)"),
        ([1, 2, 0], [1.0, 2.0, 0.0], "`end_positions` must be integers; got dtype torch.float32"),
    ],
)
def test_wrong_answers(start, end, message):
    names = {"start_positions": start, "end_positions": end}
    answer = {name: torch.tensor(value) for name, value in names.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        head(DynMaskForQuestionAnswering)(IDS, lengths=LENGTHS, **answer)


def test_answers_in_a_graph_of_rows_of_any_size():
    model = head(DynMaskForQuestionAnswering)
    inputs = {"input_ids": IDS, "lengths": LENGTHS, "start_positions": LENGTHS - 1, "end_positions": LENGTHS}
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=True)
    torch.testing.assert_close(compiled(**inputs).loss, model(**inputs).loss)
