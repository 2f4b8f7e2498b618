"""The recurrent baseline: the batch contract, its heads, training, saving."""

# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false

from typing import Any

import pytest
import torch
from datasets import Dataset
from huggingface_hub.errors import StrictDataclassError
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast, Trainer, TrainingArguments

from hf_dynmask import (
    DataCollatorWithLengths,
    DynMaskRecurrentConfig,
    DynMaskRecurrentForSequenceClassification,
    DynMaskRecurrentForTokenClassification,
    DynMaskRecurrentModel,
)

LENGTHS = torch.tensor([7, 3, 0, 1, 7, 5])
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def config(**settings):
    defaults: dict[str, Any] = {"vocab_size": 99, "hidden_size": 16, "hidden_dropout_prob": 0.0}
    return DynMaskRecurrentConfig(**defaults | settings)


@pytest.fixture(params=["lstm", "gru"])
def cell(request):
    return request.param


@pytest.fixture(params=[True, False], ids=["bidirectional", "forward"])
def bidirectional(request):
    return request.param


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def ids(width=9):
    return torch.randint(5, 99, (len(LENGTHS), width))


def present(width=9):
    return torch.arange(width) < LENGTHS[:, None]


# --- the bare model --------------------------------------------------------------------------------------------------


def test_each_sequence_comes_out_as_from_torch_alone(cell, bidirectional):
    model = DynMaskRecurrentModel(config(cell=cell, bidirectional=bidirectional, embedding_size=12)).eval()
    size = 8 if bidirectional else 16
    stock = {"lstm": nn.LSTM, "gru": nn.GRU}[cell](12, size, 2, bidirectional=bidirectional, batch_first=True)
    for layer, module in enumerate(model.layers):
        for name, weight in module.cells.named_parameters():
            stock.get_parameter(name.replace("_l0", f"_l{layer}")).data = weight.data
    inputs, slopes = ids(), torch.randn(6, 9, 16)
    output = model(inputs, lengths=LENGTHS)
    assert output.last_hidden_state.shape == (6, 9, 16)
    ((output.last_hidden_state * slopes).sum() + output.pooler_output.square().sum()).backward()
    for row, length in enumerate(LENGTHS.tolist()):
        assert (output.last_hidden_state[row, length:] == 0).all()
        if length == 0:
            assert (output.pooler_output[row] == 0).all()
            continue
        states, last = stock(model.word_embeddings(inputs[row : row + 1, :length]).detach())
        last = last[0] if cell == "lstm" else last
        torch.testing.assert_close(output.last_hidden_state[row, :length], states[0], **CLOSE)
        pooled = last[-2:, 0].flatten() if bidirectional else last[-1, 0]
        torch.testing.assert_close(output.pooler_output[row], pooled, **CLOSE)
        ((states[0] * slopes[row, :length]).sum() + pooled.square().sum()).backward()
    for layer, module in enumerate(model.layers):
        for name, weight in module.cells.named_parameters():
            expected = stock.get_parameter(name.replace("_l0", f"_l{layer}")).grad
            torch.testing.assert_close(weight.grad, expected, **CLOSE)


def test_rows_and_flat_and_attention_mask_agree(cell, bidirectional):
    model = DynMaskRecurrentModel(config(cell=cell, bidirectional=bidirectional)).eval()
    inputs = ids()
    rows = model(inputs, lengths=LENGTHS)

    flat = model(inputs[present()][None], lengths=LENGTHS)
    torch.testing.assert_close(flat.last_hidden_state[0], rows.last_hidden_state[present()], **CLOSE)
    torch.testing.assert_close(flat.pooler_output, rows.pooler_output, **CLOSE)

    wider, mask = torch.full((6, 12), 3), torch.zeros(6, 12)
    for row, length in enumerate(LENGTHS.tolist()):
        places = torch.randperm(12)[:length].sort().values
        wider[row, places], mask[row, places] = inputs[row, :length], 1
    anywhere = model(wider, attention_mask=mask)
    found = anywhere.last_hidden_state[mask.bool()]
    torch.testing.assert_close(found, rows.last_hidden_state[present()], **CLOSE)
    assert (anywhere.last_hidden_state[~mask.bool()] == 0).all()


def test_absent_and_missing_values_are_never_read(cell):
    model = DynMaskRecurrentModel(config(cell=cell)).eval()
    inputs, missing = ids(), torch.rand(6, 9) < 0.3
    embeds = model.word_embeddings(inputs).detach()
    expected = model(inputs, lengths=LENGTHS, missing=missing).last_hidden_state
    gone = missing | ~present()
    embeds[gone] = torch.nan
    embeds.requires_grad_()
    output = model(inputs_embeds=embeds, lengths=LENGTHS, missing=missing).last_hidden_state
    assert torch.equal(output, expected)
    assert (output[gone] == 0).all()
    output.sum().backward()
    assert embeds.grad.isfinite().all()
    assert (embeds.grad[gone] == 0).all()
    without = model(inputs, attention_mask=(~gone).long()).last_hidden_state
    torch.testing.assert_close(output, without, **CLOSE)


@pytest.mark.parametrize("lengths", [[0, 0], []])
def test_batches_without_tokens(cell, lengths):
    inputs = torch.ones(len(lengths), 4, dtype=torch.long)
    output = DynMaskRecurrentModel(config(cell=cell))(inputs, lengths=torch.tensor(lengths, dtype=torch.long))
    assert output.last_hidden_state.shape == (len(lengths), 4, 16)
    assert output.pooler_output.shape == (len(lengths), 16)
    assert (output.last_hidden_state == 0).all()


def test_hidden_states_come_in_the_layout_of_the_batch():
    model = DynMaskRecurrentModel(config(embedding_size=12)).eval()
    output = model(ids(), lengths=LENGTHS, output_hidden_states=True)
    assert [states.shape for states in output.hidden_states] == [(6, 9, 12), (6, 9, 16), (6, 9, 16)]
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)


def test_token_types_and_positions_have_no_effect():
    model = DynMaskRecurrentModel(config()).eval()
    inputs = ids()
    output = model(inputs, lengths=LENGTHS, token_type_ids=torch.ones(6, 9), position_ids=torch.arange(9)[None])
    assert torch.equal(output.last_hidden_state, model(inputs, lengths=LENGTHS).last_hidden_state)


@pytest.mark.parametrize("name", ["segment_ids", "prefix_lengths", "hidden_spans", "global_tokens", "mask_choice"])
def test_fields_of_masks_are_refused(name):
    with pytest.raises(ValueError, match=f"`{name}` must be None in a DynMaskRecurrentModel, which has no mask"):
        DynMaskRecurrentForTokenClassification(config())(ids(), lengths=LENGTHS, **{name: torch.ones(6, 9)})


# --- heads -----------------------------------------------------------------------------------------------------------

TOKEN_LABELS = torch.where(present(), torch.randint(0, 2, (6, 9)), -100)
HEADS = {
    DynMaskRecurrentForTokenClassification: TOKEN_LABELS,
    DynMaskRecurrentForSequenceClassification: torch.tensor([0, 1, 1, 0, 1, 0]),
}


@pytest.mark.parametrize("head", HEADS)
def test_heads_train_and_are_saved(head, cell, tmp_path):
    model = head(config(cell=cell)).train()
    batch = {"input_ids": ids(), "lengths": LENGTHS, "labels": HEADS[head]}
    output = model(**batch)
    real = batch["labels"] != -100
    torch.testing.assert_close(
        output.loss, nn.functional.cross_entropy(output.logits[real], batch["labels"][real]), **CLOSE
    )
    output.loss.backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in model.parameters())
    model.save_pretrained(tmp_path)
    loaded = head.from_pretrained(tmp_path)
    assert isinstance(loaded.config, DynMaskRecurrentConfig)
    assert torch.equal(loaded(**batch).logits, output.logits)


@pytest.mark.parametrize("head", HEADS)
def test_loss_over_several_batches_is_the_loss_over_all(head):
    model = head(config()).eval()
    batch = {"input_ids": ids(), "lengths": LENGTHS, "labels": HEADS[head]}
    items = (batch["labels"] != -100).sum()
    halves = [{name: value[rows] for name, value in batch.items()} for rows in (slice(0, 2), slice(2, 6))]
    parts = sum(model(**half, num_items_in_batch=items).loss for half in halves)
    torch.testing.assert_close(parts, model(**batch).loss)


def test_recurrent_weights_start_as_in_torch(cell):
    model = DynMaskRecurrentModel(config(cell=cell, hidden_size=50))
    for layer in model.layers:
        for weight in layer.cells.parameters():
            assert 0.15 < weight.abs().max() <= 0.2  # 1 / sqrt(25)


@pytest.mark.parametrize("flat", [False, True])
def test_training(cell, flat, tmp_path):
    """The class is the first token, which a model knows only if it remembers."""
    vocabulary = {name: place for place, name in enumerate(["[PAD]", "a", "b", "c"])}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(vocabulary)), pad_token="[PAD]")
    rows = []
    for _ in range(64):
        row = torch.randint(1, 4, (int(torch.randint(1, 9, ())),)).tolist()
        rows.append({"input_ids": row, "token_type_ids": [0] * len(row), "label": row[0] - 1})
    dataset = Dataset.from_list(rows)
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=80,
        per_device_train_batch_size=16,
        learning_rate=1e-2,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(
        DynMaskRecurrentForSequenceClassification(config(cell=cell, num_labels=3, initializer_range=0.2)),
        arguments,
        train_dataset=dataset,
        eval_dataset=dataset,
        data_collator=DataCollatorWithLengths(tokenizer, flat=flat),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    assert after < before / 5
    trainer.save_model()
    trainer.model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(after)


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        ({"lengths": LENGTHS + 3}, r"`lengths` must not be beyond the row width 9; got 10"),
        ({"input_ids": None}, r"exactly one of `input_ids` and `inputs_embeds` must be given; got neither"),
        (
            {"input_features": torch.zeros(6, 9, 5)},
            r"exactly one of `input_ids` and `inputs_embeds` must be given; got input_ids and input_features",
        ),
        ({"attention_mask": torch.ones(6, 8)}, r"`attention_mask` must have the input's shape \(6, 9\); got \(6, 8\)"),
        ({"missing": torch.ones(6, 9)}, r"`missing` must be bool of shape \(6, 9\); got torch.float32 \(6, 9\)"),
    ],
)
@pytest.mark.parametrize("head", [DynMaskRecurrentModel, DynMaskRecurrentForTokenClassification])
def test_bad_batches(head, change, message):
    with pytest.raises(ValueError, match=message):
        head(config())(**{"input_ids": ids(), "lengths": LENGTHS} | change)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"cell": "rnn"}, r"`cell` must be one of 'lstm', 'gru'; got 'rnn'"),
        ({"hidden_size": 15}, r"`hidden_size` must be even: each direction has half of it; got 15"),
        ({"num_hidden_layers": 0}, r"`num_hidden_layers` must be at least 1; got 0"),
    ],
)
def test_bad_configurations(settings, message):
    with pytest.raises(StrictDataclassError, match=message):
        config(**settings)
