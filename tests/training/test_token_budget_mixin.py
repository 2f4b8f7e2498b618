"""TokenBudgetMixin: what batches hold, real training, resuming, streams, two processes, bad settings."""

import json
import os
import subprocess
import sys
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from batches import assert_equal
from hf_dynmask import (
    DataCollatorForDynamicMasking,
    DataCollatorForFeatures,
    DataCollatorForSeq2SeqWithLengths,
    DataCollatorWithLengths,
    DynamicMaskingMixin,
    DynMaskConfig,
    DynMaskForQuestionAnswering,
    DynMaskForSequenceClassification,
    TokenBudgetBatchSampler,
    TokenBudgetMixin,
)
from masked_lm_examples import make_tokenizer, texts
from two_processes import free_port

ROWS = 60
MAX_TOKENS = 40
TOKENIZER = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"[PAD]": 0})), pad_token="[PAD]")
SHAPE: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}


class TokenBudgetTrainer(TokenBudgetMixin, Trainer):
    """As users write it."""


with_budget = partial(TokenBudgetTrainer, max_tokens=MAX_TOKENS)


class Collator:
    """Rows with lengths. Remembers the batches it made, by the first token of each example, its number."""

    def __init__(self):
        self.batches, self.lengths = [], []

    def __call__(self, features):
        lengths = torch.tensor([len(feature["input_ids"]) for feature in features])
        self.batches.append([int(feature["input_ids"][0]) for feature in features])
        self.lengths.append(lengths.tolist())
        ids = [torch.as_tensor(feature["input_ids"]) for feature in features]
        labels = torch.tensor([int(feature["labels"]) for feature in features])
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        return {"input_ids": padded, "lengths": lengths, "labels": labels}


def make_model():
    torch.manual_seed(0)
    return DynMaskForSequenceClassification(DynMaskConfig(vocab_size=ROWS, **SHAPE))


def rows(number=ROWS, /, **columns: Any):
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 13, (number,), generator=generator).tolist()
    data = [{"input_ids": [k] * length, "labels": k % 2} for k, length in enumerate(lengths)]
    return Dataset.from_list([{**row, **{name: make(row) for name, make in columns.items()}} for row in data])


def make_trainer(folder, data=None, trainer_class: Any = with_budget, **settings):
    names = ("max_tokens", "truncate", "buffer_size")
    of_trainer = {name: settings.pop(name) for name in names if name in settings}
    defaults: dict[str, Any] = {"num_train_epochs": 2, "save_strategy": "no", "learning_rate": 1e-3, "logging_steps": 1}
    arguments = TrainingArguments(str(folder), use_cpu=True, report_to="none", disable_tqdm=True, **defaults | settings)
    data = {"train_dataset": rows() if data is None else data, "eval_dataset": rows(8)}
    return trainer_class(make_model(), arguments, data_collator=Collator(), **data, **of_trainer)


def batches_of(trainer):
    return trainer.data_collator.batches


def numbers(batches):
    return sorted(number for batch in batches for number in batch)


def weights(trainer):
    return trainer.model.state_dict()


def same_weights(one, other):
    return all(torch.equal(weight, weights(other)[name]) for name, weight in weights(one).items())


# --- Batches ---------------------------------------------------------------------------------------------------------


def test_each_epoch_has_every_example_once_within_the_budget(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train()
    lengths = [len(row) for row in trainer.train_dataset["input_ids"]]
    steps = trainer.state.max_steps // 2
    assert trainer.state.global_step == len(batches_of(trainer)) == 2 * steps
    assert steps <= 1.1 * sum(lengths) / MAX_TOKENS + 1
    epochs = [batches_of(trainer)[:steps], batches_of(trainer)[steps:]]
    for batches in epochs:
        assert numbers(batches) == list(range(ROWS))
        assert all(sum(lengths[number] for number in batch) <= MAX_TOKENS for batch in batches)
    assert {frozenset(batch) for batch in epochs[0]} != {frozenset(batch) for batch in epochs[1]}


def test_evaluation_is_the_trainers_own(tmp_path):
    ours = make_trainer(tmp_path, per_device_eval_batch_size=3)
    stock = make_trainer(tmp_path, trainer_class=Trainer, per_device_eval_batch_size=3)
    assert ours.evaluate()["eval_loss"] == stock.evaluate()["eval_loss"]
    assert batches_of(ours) == batches_of(stock) == [[0, 1, 2], [3, 4, 5], [6, 7]]


@pytest.mark.parametrize("size, accumulation", [(4, 1), (4, 2), (7, 3)])
def test_without_a_budget_the_batch_size_is_that_of_the_mean_batch(size, accumulation, tmp_path):
    settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
    ours = make_trainer(tmp_path, max_tokens=None, **settings)
    stock = make_trainer(tmp_path, trainer_class=Trainer, **settings)
    ours.train()
    stock.train()
    assert ours.state.max_steps == stock.state.max_steps
    assert len(batches_of(ours)) == len(batches_of(stock))
    assert ours.get_total_train_batch_size(ours.args) == pytest.approx(size * accumulation, rel=0.1)


def test_gradient_accumulation_counts_batches(tmp_path):
    one = make_trainer(tmp_path, num_train_epochs=1)
    three = make_trainer(tmp_path, num_train_epochs=1, gradient_accumulation_steps=3)
    one.train()
    three.train()
    assert batches_of(one) == batches_of(three)
    assert three.state.global_step == -(-one.state.global_step // 3)
    mean = 3 * ROWS / len(batches_of(three))
    assert three.get_total_train_batch_size(three.args) == round(mean)


def test_the_seed_of_the_data(tmp_path):
    def batches(**seeds):
        trainer = make_trainer(tmp_path, **seeds)
        return list(trainer.get_train_dataloader().batch_sampler)

    assert batches(seed=5) == batches(seed=6, data_seed=5)
    assert batches(seed=5) != batches(seed=6)


def test_settings_of_the_trainers_loader_are_kept(tmp_path):
    settings = {"dataloader_num_workers": 2, "dataloader_persistent_workers": True, "dataloader_prefetch_factor": 3}
    ours = make_trainer(tmp_path, **settings).get_train_dataloader()
    stock = make_trainer(tmp_path, trainer_class=Trainer, **settings).get_train_dataloader()
    for name in ("num_workers", "persistent_workers", "prefetch_factor", "pin_memory", "in_order"):
        assert getattr(ours, name) == getattr(stock, name)
    assert ours.worker_init_fn.keywords == stock.worker_init_fn.keywords
    assert ours.dataset.column_names == stock.dataset.column_names
    trainer = make_trainer(tmp_path)
    trainer.get_train_dataloader()
    assert trainer.accelerator.even_batches
    assert trainer.accelerator.dispatch_batches is None


@pytest.mark.parametrize("column", ["length", "lengths", "tokens"])
def test_lengths_from_a_column(column, tmp_path):
    """Every example counts as half the budget."""
    data = rows(**{column: lambda row: MAX_TOKENS // 2})
    column = column if column == "tokens" else "length"
    loader = make_trainer(tmp_path, data, length_column_name=column).get_train_dataloader()
    assert {len(batch) for batch in loader.batch_sampler} == {2}


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("remove", [False, True])
@pytest.mark.parametrize("column", ["length", "lengths", "tokens"])
def test_a_column_of_lengths_reaches_no_model(column, remove, flat, tmp_path):
    """Nor does text, where the Trainer leaves all columns in."""
    data = rows(**{column: lambda row: len(row["input_ids"]), "text": lambda row: "a"})
    settings = {"length_column_name": column} if column == "tokens" else {}
    trainer = make_trainer(tmp_path, data, max_steps=2, remove_unused_columns=remove, **settings)
    trainer.data_collator = DataCollatorWithLengths(TOKENIZER, flat=flat)
    for batch in trainer.get_train_dataloader():
        assert set(batch) - {"attention_mask", "max_length_q"} == {"input_ids", "lengths", "labels"}
    trainer.train()
    assert isinstance(trainer.data_collator, DataCollatorWithLengths)


# --- Flat batches of one shape ---------------------------------------------------------------------------------------


def loader_of(folder, data, collator, trainer_class: Any = with_budget, **settings):
    trainer = make_trainer(folder, data, trainer_class, remove_unused_columns=False, **settings)
    trainer.data_collator = collator
    return trainer.get_train_dataloader()


def shapes(batch):
    return {name: tuple(values.shape) for name, values in batch.items() if name != "max_length_q"}


def batches_of_epochs(loader, epochs=3):
    for epoch in range(epochs):
        loader.set_epoch(epoch)
        yield from loader


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stream", [False, True])
def test_flat_batches_have_one_shape(stream, workers, tmp_path):
    """As the budget has it. Every example comes once, nothing behind the last counts."""
    data = rows(segment_ids=lambda row: row["input_ids"])
    data = data.to_iterable_dataset(num_shards=1) if stream else data
    settings = {"max_steps": 40, "dataloader_num_workers": 0 if stream else workers}
    loader = loader_of(tmp_path, data, DataCollatorWithLengths(TOKENIZER, flat=True), **settings)
    found = list(batches_of_epochs(loader))
    most = len(found[0]["lengths"])
    expected = {"input_ids": (1, 40), "segment_ids": (1, 40), "lengths": (most,), "labels": (most,)}
    assert all(shapes(batch) == expected for batch in found)
    assert most == 40 if stream else most < 16
    lengths = [len(row) for row in rows()["input_ids"]]
    assert sum(int(batch["lengths"].sum()) for batch in found) == 3 * sum(lengths)
    assert sum(int(batch["labels"].ne(-100).sum()) for batch in found) == 3 * ROWS


def test_rows_have_no_fixed_size(tmp_path):
    collator = DataCollatorWithLengths(TOKENIZER)
    loader = loader_of(tmp_path, rows(), collator)
    assert loader.collate_fn.collator is collator


@pytest.mark.parametrize("flat", [False, True])
def test_evaluation_has_a_row_an_example(flat, tmp_path):
    trainer = make_trainer(tmp_path, per_device_eval_batch_size=3)
    trainer.data_collator = collator = DataCollatorWithLengths(TOKENIZER, flat=flat)
    for loader in trainer.get_eval_dataloader(), trainer.get_test_dataloader(rows(8)):
        assert [batch["input_ids"].shape[0] for batch in loader] == [3, 3, 2]
    assert trainer.data_collator is collator
    trainer.get_train_dataloader()
    assert (collator.flat, collator.max_tokens, collator.max_sequences) == (flat, None, None)


def test_sizes_of_the_collator_itself(tmp_path):
    """Those are kept, and no batch has more examples."""
    collator = DataCollatorWithLengths(TOKENIZER, flat=True, max_tokens=48, max_sequences=5)
    data = rows()
    for data in rows(), rows().to_iterable_dataset():
        loader = loader_of(tmp_path, data, collator, max_steps=40)
        for batch in batches_of_epochs(loader):
            assert shapes(batch) == {"input_ids": (1, 48), "lengths": (5,), "labels": (5,)}
            assert batch["lengths"].sum() <= 40


def test_sizes_of_the_collator_itself_that_are_too_small(tmp_path):
    collator = DataCollatorWithLengths(TOKENIZER, flat=True, max_tokens=39, max_sequences=5)
    with pytest.raises(
        ValueError, match="`max_tokens` of the collator must be at least the budget .*, 40; got 39. Remo"
    ):
        loader_of(tmp_path, rows(), collator)


def test_truncated_examples_fit(tmp_path):
    settings = {"max_tokens": 6, "truncate": True, "max_steps": 3}
    data = rows(labels=lambda row: row["input_ids"])
    for some in data, data.to_iterable_dataset():
        for batch in loader_of(tmp_path, some, DataCollatorWithLengths(TOKENIZER, flat=True), **settings):
            assert batch["input_ids"].shape == batch["labels"].shape == (1, 6)


@pytest.mark.parametrize("given, truncate, expected", [(None, False, None), (30, False, 30), (None, True, 6)])
def test_flat_batches_carry_a_bound_of_the_longest(given, truncate, expected, tmp_path):
    collator, settings = DataCollatorWithLengths(TOKENIZER, flat=True, max_length=given), {"max_steps": 3}
    settings |= {"max_tokens": 6, "truncate": True} if truncate else {}
    expected = expected or max(map(len, rows()["input_ids"]))
    assert {batch["max_length_q"] for batch in loader_of(tmp_path, rows(), collator, **settings)} == {expected}


@pytest.mark.parametrize("column_sizes, expected", [(None, 2), ({"hidden_spans": 4}, 4)])
def test_lists_of_examples_have_one_size(column_sizes, expected, tmp_path):
    data = rows(hidden_spans=lambda row: [[0, 1]] * (row["input_ids"][0] % 3))
    collator = DataCollatorWithLengths(TOKENIZER, flat=True, column_sizes=column_sizes)
    found = [batch["hidden_spans"].shape[1:] for batch in batches_of_epochs(loader_of(tmp_path, data, collator))]
    assert set(found) == {(expected, 2)}
    stream = loader_of(tmp_path, data.to_iterable_dataset(), collator, max_steps=1)
    if column_sizes is None:
        with pytest.raises(ValueError, match="column `hidden_spans` must have one size in all batches"):
            list(stream)
    else:
        assert {batch["hidden_spans"].shape[1:] for batch in stream} == {(4, 2)}


def test_targets_of_frames(tmp_path):
    data = rows(
        input_features=lambda row: [[0.5]] * len(row["input_ids"]), labels=lambda row: [4] * (row["input_ids"][0] % 4)
    ).remove_columns("input_ids")
    found = [shapes(batch) for batch in loader_of(tmp_path, data, DataCollatorForFeatures(flat=True))]
    assert found == [found[0]] * len(found)
    most = found[0]["lengths"][0]
    assert found[0] == {"input_features": (1, 40, 1), "lengths": (most,), "labels": (most, 3)}


@pytest.mark.parametrize("settings", [{"num_train_epochs": 3}, {"max_steps": 45, "gradient_accumulation_steps": 2}])
def test_both_sides_of_pairs(settings, tmp_path):
    """The budget is of both; the rows are as wide as the batches of this training need."""
    data = rows(labels=lambda row: [4] * (row["input_ids"][0] % 7))
    data = data.map(lambda row: {"length": len(row["input_ids"]) + len(row["labels"])})
    loader = loader_of(tmp_path, data, DataCollatorForSeq2SeqWithLengths(TOKENIZER, flat=True), **settings)
    found = list(batches_of_epochs(loader, epochs=3 if "num_train_epochs" in settings else 6))
    names = {"lengths": "input_ids", "decoder_lengths": "labels"}
    for lengths, tokens in names.items():
        (size,) = {batch[tokens].shape for batch in found}
        assert size == (1, max(int(batch[lengths].sum()) for batch in found))
    assert len({batch["decoder_lengths"].shape for batch in found}) == 1
    assert all(batch["lengths"].sum() + batch["decoder_lengths"].sum() <= 40 for batch in found)


def test_pairs_of_a_stream(tmp_path):
    data = rows(labels=lambda row: [4] * (row["input_ids"][0] % 7))
    data = data.map(lambda row: {"length": len(row["input_ids"]) + len(row["labels"])}).to_iterable_dataset()
    collator = DataCollatorForSeq2SeqWithLengths(TOKENIZER, flat=True)
    for batch in loader_of(tmp_path, data, collator, max_steps=1):
        assert shapes(batch) == {"input_ids": (1, 40), "labels": (1, 40), "lengths": (40,), "decoder_lengths": (40,)}


class MaskedLMTrainer(DynamicMaskingMixin, TokenBudgetMixin, Trainer):
    """Both mixins."""


class OtherWayRound(TokenBudgetMixin, DynamicMaskingMixin, Trainer):
    """Both mixins."""


@pytest.mark.parametrize("trainer_class", [MaskedLMTrainer, OtherWayRound])
def test_targets_drawn_in_every_epoch(trainer_class, tmp_path):
    """The collator of the training, which hears of epochs, and that of the evaluation, whose targets never change."""
    collator = DataCollatorForDynamicMasking(make_tokenizer(), flat=True, at_least_one=True)
    examples = texts(30, 4, 12)
    data = Dataset.from_list(examples)
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", per_device_eval_batch_size=5)
    trainer = trainer_class(make_model(), arguments, collator, data, data.select(range(5)), max_tokens=40)
    loader = trainer.get_train_dataloader()
    collator.set_epoch(0)
    first = list(loader)
    assert {batch["labels"].shape for batch in first} == {(1, 40)}
    collator.set_epoch(1)
    second = list(loader)
    assert [batch["input_ids"].tolist() for batch in first] != [batch["input_ids"].tolist() for batch in second]
    (batch,) = trainer.get_eval_dataloader()
    expected = DataCollatorForDynamicMasking(make_tokenizer(), at_least_one=True).for_evaluation()
    assert_equal(batch, **expected(examples[:5]))


# --- What batches weigh ----------------------------------------------------------------------------------------------


class Gradients(TrainerCallback):
    """What the optimizer is given."""

    def on_pre_optimizer_step(self, args, state, control, model: Any = None, **kwargs):
        self.found = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def gradients(folder, trainer_class, model, collator, batches=1, **settings):
    """Of one step over all examples, some of which have no answer."""
    answers = {"start_positions": lambda row: 0, "end_positions": lambda row: len(row["input_ids"]) - 1}
    answers = {name: lambda row, make=make: make(row) if row["labels"] else -1 for name, make in answers.items()}
    data = rows(**answers).remove_columns("labels")
    names = {"per_device_train_batch_size": ROWS, "max_grad_norm": 0.0, "save_strategy": "no", "report_to": "none"}
    arguments = TrainingArguments(
        str(folder), gradient_accumulation_steps=batches, max_steps=1, use_cpu=True, disable_tqdm=True, **names
    )
    seen = Gradients()
    torch.manual_seed(0)
    trainer = trainer_class(model, arguments, data_collator=collator, train_dataset=data, callbacks=[seen], **settings)
    trainer.train()
    return seen.found


def qa_model():
    torch.manual_seed(0)
    nothing: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return DynMaskForQuestionAnswering(DynMaskConfig(vocab_size=ROWS, **SHAPE, **nothing))


@pytest.mark.parametrize("flat", [False, True])
def test_batches_weigh_as_many_as_they_have_answers(flat, tmp_path):
    plain = DataCollatorWithLengths(TOKENIZER, flat=flat)
    expected = gradients(tmp_path, Trainer, qa_model(), plain)
    batches = TokenBudgetBatchSampler([len(row) for row in rows()["input_ids"]], MAX_TOKENS).num_steps
    assert batches > 4
    found = gradients(tmp_path, TokenBudgetTrainer, qa_model(), plain, batches, max_tokens=MAX_TOKENS)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)


def test_stock_models_do_not_count_answers(tmp_path):
    """Their loss is the mean of a batch, which the Trainer then divides by the number of batches."""
    stock = BertForQuestionAnswering(BertConfig(vocab_size=ROWS, **SHAPE))
    trainer = TokenBudgetTrainer(stock, TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"))
    batch = DataCollatorWithLengths(TOKENIZER)([{"input_ids": [4, 5], "start_positions": 0, "end_positions": 1}])
    assert trainer._get_num_items_in_batch([batch], torch.device("cpu")) is None
    trainer = TokenBudgetTrainer(qa_model(), trainer.args)
    assert trainer._get_num_items_in_batch([batch], torch.device("cpu")) == 1


# --- Resuming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [3, 8])
def test_resumed_in_mid_epoch_ends_like_an_unbroken_run(stop, tmp_path):
    """Bit for bit, with dropout, in the first and in the second epoch."""
    settings = {"save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": 2}
    unbroken = make_trainer(tmp_path, **settings)
    unbroken.train()
    per_epoch = unbroken.state.max_steps // 2
    assert stop % per_epoch
    resumed = make_trainer(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
    assert same_weights(unbroken, resumed)
    assert numbers(batches_of(resumed)) == numbers(batches_of(unbroken)[-len(batches_of(resumed)) :])
    assert len(batches_of(resumed)) < len(batches_of(unbroken))


def test_a_resumed_stream_ends_like_an_unbroken_run(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 6, "buffer_size": 30}
    unbroken, resumed = (make_trainer(tmp_path, rows().to_iterable_dataset(), **settings) for _ in range(2))
    unbroken.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same_weights(unbroken, resumed)


# --- Streams and truncation ------------------------------------------------------------------------------------------


def test_a_stream(tmp_path):
    lengths = [len(row) for row in rows()["input_ids"]]
    trainer = make_trainer(tmp_path, rows().to_iterable_dataset(), max_steps=30, buffer_size=20)
    trainer.train()
    assert trainer.state.global_step == 30
    seen = batches_of(trainer)
    assert all(sum(lengths[number] for number in batch) <= MAX_TOKENS for batch in seen)
    passed = list(accumulate(len(batch) for batch in seen))
    ends = [1 + passed.index(epoch * ROWS) for epoch in (1, 2)]  # each pass has every example
    passes = [seen[: ends[0]], seen[ends[0] : ends[1]]]
    assert [numbers(batches) for batches in passes] == [list(range(ROWS))] * 2
    assert passes[0] != passes[1]


@pytest.mark.parametrize("make", [rows, lambda: rows().to_iterable_dataset()])
def test_examples_beyond_the_budget_are_cut(make, tmp_path):
    trainer = make_trainer(tmp_path, make(), max_tokens=6, truncate=True, max_steps=40, buffer_size=30)
    trainer.train()
    lengths = trainer.data_collator.lengths
    assert max(sum(batch) for batch in lengths) == max(max(batch) for batch in lengths) == 6


# --- Several processes -----------------------------------------------------------------------------------------------


def of_process(folder):
    """What each process of the test below runs: two epochs, the same resumed in the second, and a stream."""
    settings = {"max_tokens": 80, "ddp_find_unused_parameters": False, "logging_steps": 100}
    steps = len(make_trainer(folder, **settings).get_train_dataloader())
    stop = steps + 2
    unbroken = make_trainer(folder, save_strategy="steps", save_steps=stop, **settings)
    unbroken.train()
    resumed = make_trainer(folder, **settings)
    resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{stop}"))
    stream = make_trainer(folder, rows().to_iterable_dataset(), max_steps=3, buffer_size=30, **settings)
    stream.train()
    trainers = {"unbroken": unbroken, "resumed": resumed, "stream": stream}
    report = {name: batches_of(trainer) for name, trainer in trainers.items()}
    report |= {"steps": steps, "same weights": same_weights(unbroken, resumed)}
    report["mean examples"] = unbroken.get_total_train_batch_size(unbroken.args)
    (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(report))


def test_two_processes(tmp_path):
    here = Path(__file__)
    environment = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, [here.parents[2], here.parents[1] / "helpers"]))
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "error::UserWarning", str(here), str(tmp_path)],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    lengths = [len(row) for row in rows()["input_ids"]]
    steps = ranks[0]["steps"]
    for start in (0, steps):
        batches = [batch for rank in ranks for batch in rank["unbroken"][start : start + steps]]
        assert numbers(batches) == list(range(ROWS))
    for rank in ranks:
        assert len(rank["unbroken"]) == 2 * steps
        assert all(sum(lengths[number] for number in batch) <= 80 for batch in rank["unbroken"])
        assert rank["resumed"] == rank["unbroken"][steps + 2 :]
        assert rank["same weights"]
        assert rank["mean examples"] == round(ROWS / steps)
    assert [len(rank["stream"]) for rank in ranks] == [3, 3]
    of_stream = [batch for rank in ranks for batch in rank["stream"]]
    assert len(numbers(of_stream)) == len(set(numbers(of_stream)))


# --- Bad settings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"max_tokens": 11},
            "must be at least the longest example's length; got max_tokens=11, and example .* has 12 tok",
        ),
        ({"max_tokens": 0}, "`max_tokens` must be at least 1; got 0"),
        (
            {"train_sampling_strategy": "group_by_length"},
            "`train_sampling_strategy` must be 'random' .*'group_by_length'",
        ),
        ({"accelerator_config": {"split_batches": True}}, "`accelerator_config.split_batches` must not be set"),
        ({"accelerator_config": {"dispatch_batches": True}}, "`accelerator_config.dispatch_batches` must not be set"),
        ({"data": Dataset.from_dict({"labels": [1]})}, "must have a column `length` or `lengths` .*; got labels in"),
        ({"data": rows(length=lambda row: 1)}, "a batch has .* tokens, more than .*=40: .* do not fit the dataset"),
        ({"data": rows(length=str)}, "column `length` must hold the number of tokens of an example, an integer of"),
        ({"data": rows().to_iterable_dataset(), "max_tokens": None}, "`max_tokens` must be given for a stream"),
        (
            {"data": Dataset.from_dict({"labels": [1]}).to_iterable_dataset()},
            "or else `input_ids` or .*; got labels in",
        ),
    ],
)
def test_bad_settings(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **{"max_steps": 1, "data": rows(), **settings}).train()


def test_several_devices_in_a_process(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path)
    monkeypatch.setattr(trainer.args, "_n_gpu", 2)
    with pytest.raises(ValueError, match="this process has 2: start one process per device with `accelerate launch`"):
        trainer.train()


if __name__ == "__main__":
    of_process(Path(sys.argv[1]))
