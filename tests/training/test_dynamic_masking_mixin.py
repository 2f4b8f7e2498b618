"""DynamicMaskingMixin: what models see in real Trainer runs, stopped and resumed, and in evaluations in between."""

from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_dynmask import DynamicMaskingMixin, DynMaskConfig, DynMaskForMaskedLM
from hf_dynmask.data import DataCollatorWithLengths
from masked_lm_examples import collated, make, make_tokenizer, texts

TRAIN, HELD_OUT = texts(12, 8, 16, seed=3), texts(6, 8, 16, seed=4)
EPOCHS = 3


class MaskedLMTrainer(DynamicMaskingMixin, Trainer):
    pass


def make_model():
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 24,
    }
    return DynMaskForMaskedLM(DynMaskConfig(vocab_size=205, **shape))


class Seen(TrainerCallback):
    """The batches that a model gets: of training, by epoch, and of evaluation."""

    def __init__(self, model):
        self.training: list[dict] = []
        self.evaluation: list[dict] = []
        self.epochs: list[list[dict]] = []
        model.register_forward_pre_hook(self._look, with_kwargs=True)

    def _look(self, model, args, batch):
        kept = {name: batch[name].clone() for name in ("input_ids", "lengths", "labels")}
        (self.training if model.training else self.evaluation).append(kept)

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.training = []
        self.epochs.append(self.training)


def make_trainer(folder, *, kind: Any = MaskedLMTrainer, train=TRAIN, collator=None, **settings):
    defaults = {
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 3,
        "num_train_epochs": EPOCHS,
        "save_strategy": "no",
        "dataloader_pin_memory": False,
    }
    arguments = TrainingArguments(
        str(folder), use_cpu=True, report_to="none", disable_tqdm=True, **{**defaults, **settings}
    )
    model = make_model()
    seen = Seen(model)
    trainer = kind(
        model,
        arguments,
        data_collator=collator or make(None, at_least_one=True),
        train_dataset=Dataset.from_list(train) if isinstance(train, list) else train,
        eval_dataset=Dataset.from_list(HELD_OUT),
        callbacks=[seen],
    )
    return trainer, seen


def expected(epoch, rows):
    return collated([make(epoch, at_least_one=True)(rows)])


EVALUATION = collated([make(None, at_least_one=True).for_evaluation()(HELD_OUT)])


@pytest.mark.parametrize("workers, persistent", [(0, False), (2, False), (2, True)])
def test_training_with_evaluations_in_mid_epoch(workers, persistent, tmp_path):
    trainer, seen = make_trainer(
        tmp_path,
        dataloader_num_workers=workers,
        dataloader_persistent_workers=persistent,
        eval_strategy="steps",
        eval_steps=2,
        eval_on_start=True,
    )
    trainer.train()
    assert [collated(batches) for batches in seen.epochs] == [expected(epoch, TRAIN) for epoch in range(EPOCHS)]
    assert len(seen.evaluation) == 2 * (1 + 9)  # batches: at the start, and after every second of 18 steps
    for number in range(0, 20, 2):
        assert collated(seen.evaluation[number : number + 2]) == EVALUATION


def test_a_run_resumed_in_mid_epoch_sees_what_an_unbroken_one_does(tmp_path):
    trainer, unbroken = make_trainer(tmp_path, save_strategy="steps", save_steps=3)
    trainer.train()
    for step, epoch in [(3, 0), (9, 1), (12, 2)]:
        trainer, resumed = make_trainer(tmp_path / "resumed")
        trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert len(resumed.epochs) == EPOCHS - epoch
        assert collated(resumed.epochs[0]) == collated(unbroken.epochs[epoch][step % 6 :])
        assert [collated(batches) for batches in resumed.epochs[1:]] == [
            expected(later, TRAIN) for later in range(epoch + 1, EPOCHS)
        ]


def test_a_second_training_begins_anew(tmp_path):
    trainer, seen = make_trainer(tmp_path, num_train_epochs=2)
    trainer.train()
    trainer.train()
    assert [collated(batches) for batches in seen.epochs] == [expected(epoch, TRAIN) for epoch in (0, 1, 0, 1)]


def test_a_stream_without_length(tmp_path):
    """The Trainer cannot say which share of an epoch is done."""
    stream = IterableDataset.from_generator(lambda: iter(TRAIN))
    trainer, seen = make_trainer(tmp_path, train=stream, max_steps=18)
    trainer.train()
    assert [collated(batches) for batches in seen.epochs] == [expected(epoch, TRAIN) for epoch in range(EPOCHS)]


def test_evaluation_and_prediction_without_training(tmp_path):
    trainer, seen = make_trainer(tmp_path)
    trainer.evaluate()
    assert collated(seen.evaluation) == EVALUATION
    seen.evaluation.clear()
    trainer.predict(Dataset.from_list(HELD_OUT))  # type: ignore[arg-type]
    assert collated(seen.evaluation) == EVALUATION
    assert trainer.data_collator is not trainer.get_eval_dataloader().collate_fn


@pytest.mark.parametrize("as_list", [False, True], ids=["data set", "list"])
def test_columns_of_the_collator_reach_it(as_list, tmp_path):
    """A Trainer drops what its model does not read."""
    columns = {"input_ids": [7, 8, 9], "word_ids": [0, 0, 1], "special_tokens_mask": [0, 0, 1], "other": 1}
    rows: Any = [{**columns, "idx": i} for i in range(12)]
    data = torch.utils.data.Subset(rows, range(12)) if as_list else rows
    collator = make(None, strategy="whole_word", mlm_probability=0.5)
    trainer, seen = make_trainer(tmp_path, train=data, collator=collator, num_train_epochs=1)
    trainer.train()
    labels = [tuple(labels) for batch in seen.epochs[0] for labels in batch["labels"].tolist()]
    assert set(labels) == {(-100, -100, -100), (7, 8, -100)}


TEXTS: dict[str, list[Any]] = {
    "text": ["a b", "c"],
    "a text that is none": ["a b", None],
    "words": [["a", "b", "c"], ["d"]],
    "sentences": [[["a"], ["b", "c"]], [["d"]]],
    "idx": ["page 1", "page 2"],
    "label": ["good", "bad"],
    "labels": [["O", "B-PER", "O"], ["O", "O", "O"]],
}


@pytest.mark.parametrize("form", [None, "numpy", "torch"])
@pytest.mark.parametrize("remove", [False, True])
@pytest.mark.parametrize("name", TEXTS)
def test_columns_of_text(name, remove, form, tmp_path):
    """They reach no model, also where all columns of the data set reach the collator; `idx` tells examples apart."""
    columns = {"input_ids": [[7, 8, 9], [9, 8, 7]], "word_ids": [[None, 0, 0], [0, 1, 1]], name: TEXTS[name]}
    settings = {"max_steps": 1, "per_device_train_batch_size": 2, "remove_unused_columns": remove}
    data = Dataset.from_dict(columns).with_format(form)
    trainer, seen = make_trainer(tmp_path, train=data, collator=make(None, strategy="whole_word"), **settings)
    trainer.data_collator.set_epoch(0)
    (batch,) = trainer.get_train_dataloader()
    assert set(batch) == {"input_ids", "lengths", "attention_mask", "labels"}
    trainer.train()
    assert len(seen.epochs[0]) == 1


def test_a_stock_trainer_does_not_tell_the_epoch(tmp_path):
    trainer, _ = make_trainer(tmp_path, kind=Trainer)
    with pytest.raises(ValueError, match="the epoch must be known, .* `DynamicMaskingMixin`"):
        trainer.train()


def test_another_collator(tmp_path):
    message = "`data_collator` of a Trainer with .* must be a `DataCollatorForDynamicMasking`; got DataCollatorWithLen"
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, collator=DataCollatorWithLengths(make_tokenizer()))
