"""Batches that Accelerate or DataParallel takes apart: rows go on as with padding masks, flat batches are refused."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import concatenate
from datasets import Dataset
from torch import nn
from transformers import (
    BertConfig,
    BertForTokenClassification,
    DataCollatorForTokenClassification,
    Trainer,
    TrainingArguments,
)

from hf_dynmask import (
    DataCollatorForFeatures,
    DataCollatorForSeq2SeqWithLengths,
    DataCollatorWithLengths,
    from_transformers,
)
from masked_lm_examples import make_tokenizer
from two_processes import in_two_processes

SHAPE: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
BATCH_SIZE = 4
LENGTHS = [6, 2, 5, 6, 1, 6, 4, 6, 6, 3, 6, 2, 4, 6]  # the longest of each batch is 6, as dispatched batches need
ROWS = [{"input_ids": [k + 5] * length, "labels": [k % 2] * length} for k, length in enumerate(LENGTHS)]
SETTINGS = {
    "as they are": {},
    "uneven": {"even_batches": False},
    "split": {"split_batches": True},
    "dispatched": {"dispatch_batches": True},
    "dispatched and split": {"dispatch_batches": True, "split_batches": True},
}
TOKENIZER = make_tokenizer()
COLLATORS: dict[str, Any] = {
    "stock": DataCollatorForTokenClassification(TOKENIZER, return_tensors="pt"),
    "rows": DataCollatorWithLengths(TOKENIZER),
    "flat": DataCollatorWithLengths(TOKENIZER, flat=True),
    "flat, of one shape": DataCollatorWithLengths(TOKENIZER, flat=True, max_tokens=24, max_sequences=6),
}


class Seen:
    """Which examples a model was given, in training and after it, by their first tokens."""

    def __init__(self, model: nn.Module):
        self.training: list[list[int]] = []
        self.evaluation: list[list[int]] = []
        model.register_forward_pre_hook(self.look, with_kwargs=True)

    def look(self, model, args, batch):
        ids, lengths = batch["input_ids"], batch.get("lengths")
        first = ids[:, 0]
        if lengths is not None and len(lengths) > len(ids):  # flat
            first = ids[0, lengths.cumsum(0) - lengths]
        (self.training if model.training else self.evaluation).append((first - 5).tolist())


def make_trainer(kind: str, settings: dict[str, Any], folder: Path) -> tuple[Trainer, Seen]:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=205, **SHAPE, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    stock = BertForTokenClassification(config)
    model = stock if kind == "stock" else from_transformers(stock, "token-classification")
    seen = Seen(model)
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=BATCH_SIZE,
        per_device_eval_batch_size=BATCH_SIZE,
        num_train_epochs=1,
        train_sampling_strategy="sequential",
        accelerator_config=settings,
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    data: Any = Dataset.from_list(ROWS)
    return Trainer(model, arguments, data_collator=COLLATORS[kind], train_dataset=data, eval_dataset=data), seen


def train_and_predict(kind: str, name: str, folder: Path) -> dict[str, Any]:
    trainer, seen = make_trainer(kind, SETTINGS[name], folder)
    found = {"training": seen.training, "evaluation": seen.evaluation}
    if name != "uneven":  # whose results no Trainer can gather
        predicted = trainer.predict(trainer.eval_dataset)  # type: ignore[arg-type]
        found |= {"predictions": torch.tensor(predicted.predictions), "labels": torch.tensor(predicted.label_ids)}
    trainer.train()
    return found


# --- Two processes ---------------------------------------------------------------------------------------------------


def of_process(folder: Path) -> None:
    """What a process of two sees with each of the settings, and how flat batches end."""
    rank = os.environ["RANK"]
    found = {(kind, name): train_and_predict(kind, name, folder) for kind in ("stock", "rows") for name in SETTINGS}
    for name in ("as they are", "uneven", "split"):
        trainer, seen = make_trainer("flat", SETTINGS[name], folder)
        trainer.train()
        found["flat", name] = {"training": seen.training}
    torch.save(found, folder / f"{rank}.pt")
    messages = []
    for kind in ("flat", "flat, of one shape"):
        trainer, _ = make_trainer(kind, SETTINGS["dispatched and split"], folder)
        with pytest.raises(ValueError) as error:
            trainer.train()
        messages.append(str(error.value))
    (folder / f"{rank}.json").write_text(json.dumps(messages))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("split")
    in_two_processes(of_process, folder, "transformers.trainer", "hf_dynmask", "datasets")
    return folder


@pytest.fixture(scope="module")
def of_ranks(ranks):
    return [torch.load(ranks / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", SETTINGS)
def test_each_process_has_the_rows_of_a_stock_one(name, of_ranks):
    for found in of_ranks:
        for when in ("training", "evaluation"):
            assert found["rows", name][when] == found["stock", name][when]
    seen = [k for found in of_ranks for batch in found["rows", name]["training"] for k in batch]
    assert set(seen) == set(range(len(ROWS)))
    assert name != "uneven" or len(seen) == len(ROWS)


@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "uneven"])
def test_predictions_are_those_of_one_process(name, of_ranks, tmp_path):
    expected = train_and_predict("rows", "as they are", tmp_path)
    for found in of_ranks:
        for what in ("predictions", "labels"):
            torch.testing.assert_close(found["rows", name][what], expected[what], atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["as they are", "uneven", "split"])
def test_flat_batches_that_each_process_collates(name, of_ranks):
    for found in of_ranks:
        assert found["flat", name]["training"] == found["rows", name]["training"]


def test_flat_batches_are_not_dispatched(ranks):
    for rank in range(2):
        for message in json.loads((ranks / f"{rank}.json").read_text()):
            assert "`lengths` of a flat batch must be whole; got 2 of them" in message
            assert "`dispatch_batches=False`" in message


PAIRS = [{"input_ids": [5, 6, 7], "labels": [8]}, {"input_ids": [9], "labels": [4, 5]}]
FRAMES = [{"input_features": [[0.5], [1.0]]}, {"input_features": [[2.0]]}]


@pytest.mark.parametrize(
    "collator, examples, name",
    [
        (COLLATORS["flat"], ROWS[:2], "input_ids"),
        (COLLATORS["flat, of one shape"], ROWS[:2], "input_ids"),
        (DataCollatorForSeq2SeqWithLengths(TOKENIZER, flat=True), PAIRS, "input_ids"),
        (DataCollatorForFeatures(flat=True), FRAMES, "input_features"),
    ],
)
def test_flat_batches_are_not_joined(collator, examples, name):
    """As Accelerate joins batches to dispatch them, here some of one size."""
    batch = collator(examples)
    with pytest.raises(ValueError, match=f"`{name}` of a flat batch must have 1 row, .*; got 2. Collate with `flat=F"):
        concatenate([batch, batch])


# --- DataParallel ----------------------------------------------------------------------------------------------------


def scattered(batch: dict[str, Any], parts: int) -> list[dict[str, Any]]:
    """What DataParallel gives each of its devices: chunks along dimension 0."""
    chunks = zip(*(values.chunk(parts) for values in batch.values()), strict=False)
    return [dict(zip(batch, values, strict=True)) for values in chunks]


@pytest.mark.parametrize("parts", [2, 3])
def test_rows_are_scattered(parts, tmp_path):
    model: Any = make_trainer("rows", {}, tmp_path)[0].model
    batch = COLLATORS["rows"](ROWS[:8])
    outputs = [model(**part) for part in scattered(batch, parts)]
    assert len(outputs) == parts
    expected = model(**batch)
    torch.testing.assert_close(torch.cat([output.logits for output in outputs]), expected.logits, atol=1e-6, rtol=0)


def test_flat_batches_are_not_scattered(tmp_path):
    model: Any = make_trainer("flat", {}, tmp_path)[0].model
    (part,) = scattered(COLLATORS["flat"](ROWS[:8]), 2)  # the one row goes to one device, with half of the lengths
    with pytest.raises(
        ValueError, match="be followed by padding only; .* cannot be split over devices: use rows for that"
    ):
        replica_of(model)(**part)


def replica_of(model):
    """What DataParallel runs on a device, here with the weights of the model itself."""
    replica = model._replicate_for_data_parallel()
    replica._parameters = model._parameters
    return replica


@pytest.fixture(params=["ours", "stock"])
def replica(request, tmp_path):
    if request.param == "ours":
        return replica_of(make_trainer("flat", {}, tmp_path)[0].model)
    stock = BertForTokenClassification(BertConfig(**SHAPE))
    stock.set_attn_implementation("dynmask")
    return replica_of(stock)


TWO = [{"input_ids": [5, 6, 7], "labels": [0, 1, 1]}, {"input_ids": [8, 9], "labels": [1, 0]}]


def test_one_sequence_of_a_flat_batch_on_a_device(replica):
    """No more sequences than devices: the first device sees its own length with the tokens of all."""
    (part,) = scattered(COLLATORS["flat"](TWO), 2)
    part.pop("labels")
    message = r"a row on a replica of DataParallel must be followed by padding only; got 3 tokens in a row of 5"
    with pytest.raises(ValueError, match=message):
        replica(**part)


@pytest.mark.parametrize("pad_token_id", [0, None])
@pytest.mark.parametrize("kind, parts", [("rows", 1), ("rows", 2), ("flat", 1)])
def test_what_a_replica_takes(kind, parts, pad_token_id, replica):
    replica.config.pad_token_id = pad_token_id
    for part in scattered(COLLATORS[kind](TWO), parts):
        assert replica(**part).loss.isfinite()


def test_a_model_that_was_replicated_is_not_a_replica(tmp_path):
    model: Any = make_trainer("flat", {}, tmp_path)[0].model
    model._replicate_for_data_parallel()
    tokens = torch.tensor([[5, 6, 7, 8, 9]])
    assert model(input_ids=tokens, lengths=torch.tensor([3])).logits.isfinite().all()  # what is behind is absent


class Stream(torch.utils.data.IterableDataset):
    """Accelerate dispatches the batches of a stream, in one process too."""

    def __iter__(self):
        return iter(ROWS)


def test_a_stream_of_flat_batches_in_one_process_loses_no_sequence(tmp_path):
    trainer, _ = make_trainer("flat", {}, tmp_path)
    trainer.train_dataset, trainer.args.max_steps = Stream(), 4
    batches = list(trainer.get_train_dataloader())
    lengths = torch.cat([batch["lengths"] for batch in batches])
    assert lengths.tolist() == LENGTHS
    assert all(int(batch["lengths"].sum()) == batch["input_ids"].shape[1] for batch in batches)
