"""What a run says before its first step when it does not fit the checkpoint that it resumes from."""

import json
import logging
import re
import shutil
from functools import partial
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_dynmask import (
    DataCollatorForDynamicMasking,
    DataCollatorWithLengths,
    DynamicMaskingMixin,
    DynMaskConfig,
    DynMaskForMaskedLM,
    MaskSchedule,
    TokenBudgetMixin,
)
from hf_dynmask.training.resuming import KEY, ResumingMixin
from masked_lm_examples import make_tokenizer, texts

TOKENIZER = make_tokenizer()
SHAPE: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
ROWS = [row | {"labels": row["input_ids"]} for row in texts(24, 2, 12, seed=1)]
OF_ONE_LENGTH = [{name: ids[:4] for name, ids in row.items()} for row in ROWS if len(row["input_ids"]) >= 4]
MASKING = partial(DataCollatorForDynamicMasking, TOKENIZER, at_least_one=True)


class Budget(TokenBudgetMixin, Trainer):
    pass


class Masking(DynamicMaskingMixin, Trainer):
    pass


class Both(TokenBudgetMixin, DynamicMaskingMixin, Trainer):
    pass


class FirstStep(Exception):
    pass


class Stop(TrainerCallback):
    """Of a run that resumes nothing but its beginning matters."""

    def on_step_begin(self, args, state, control, **kwargs):
        raise FirstStep


def make(folder, kind: Any = Budget, rows: Any = ROWS, collator=None, callbacks=(), **settings: Any) -> Any:
    """Steps of two batches; a checkpoint after each."""
    of_budget: dict[str, Any] = {"max_tokens": 40} if kind is not Masking else {}
    of_budget |= {name: settings.pop(name) for name in ("max_tokens", "truncate", "buffer_size") if name in settings}
    defaults: dict[str, Any] = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 1, "seed": 5}
    defaults |= {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "report_to": "none"}
    defaults |= {"use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False}
    return kind(
        DynMaskForMaskedLM(DynMaskConfig(vocab_size=205, **SHAPE)),
        TrainingArguments(str(folder), **defaults | settings),
        data_collator=collator or (DataCollatorWithLengths(TOKENIZER) if kind is Budget else MASKING()),
        train_dataset=Dataset.from_list(rows) if isinstance(rows, list) else rows,
        callbacks=list(callbacks),
        **of_budget,
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of trainings, each made once, and their steps an epoch."""
    made = {}

    def run(kind=Budget, rows=ROWS, **settings):
        key = kind, id(rows), tuple(settings)
        if key not in made:
            folder = tmp_path_factory.mktemp("run")
            trainer = make(folder, kind, rows, **settings)
            trainer.train()
            made[key] = folder, trainer.state.max_steps // 2
        return made[key]

    return run


def begin(trainer, checkpoint, caplog):
    """What a run that resumes warns of."""
    trainer.add_callback(Stop)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "hf_dynmask"), pytest.raises(FirstStep):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    return " ".join(record.message for record in caplog.records if record.name.startswith("hf_dynmask"))


def shifted(rows):
    return [*rows[1:], rows[0]]


def longer(rows):
    return [*rows[:-1], {name: ids + ids[:1] for name, ids in rows[-1].items()}]


OTHER: list[tuple[Any, dict[str, Any], str]] = [
    (Budget, {"max_tokens": 60}, "max_tokens was 40 and is 60"),
    (Budget, {"max_tokens": 24}, "max_tokens was 40 and is 24"),
    (Budget, {"max_tokens": None}, r"max_tokens was 40 and is \d+"),
    (Budget, {"truncate": True}, "truncate was False and is True"),
    (Budget, {"seed": 6}, "seed was 5 and is 6"),
    (Budget, {"data_seed": 7}, "seed was 5 and is 7"),
    (Budget, {"gradient_accumulation_steps": 1}, "gradient_accumulation_steps was 2 and is 1"),
    (Budget, {"rows": ROWS[:-1]}, "number of examples was 24 and is 23, another dataset"),
    (Budget, {"rows": longer(ROWS)}, "another dataset, or another order"),
    (Budget, {"rows": shifted(ROWS)}, "another dataset, or another order"),
    (Budget, {"max_tokens": 60, "seed": 6}, "seed was 5 and is 6, max_tokens was 40 and is 60"),
    (Masking, {"seed": 6}, "seed was 5 and is 6"),
    (Masking, {"per_device_train_batch_size": 4}, "batch size was 3 and is 4"),
    (Masking, {"gradient_accumulation_steps": 4}, "gradient_accumulation_steps was 2 and is 4"),
    (Masking, {"rows": shifted(ROWS)}, "another dataset, or another order"),
    (Masking, {"rows": ROWS * 2}, "number of examples was 24 and is 48"),
    (Both, {"max_tokens": 60}, "max_tokens was 40 and is 60"),
]


@pytest.mark.parametrize("kind, settings, message", OTHER)
def test_other_batches_in_mid_epoch(kind, settings, message, runs, tmp_path):
    folder, _ = runs(kind)
    trainer = make(tmp_path, kind, **settings)
    expected = f"checkpoint of step 1 makes other batches: {message}.*some examples .* twice, others never.*ignore_data"
    with pytest.raises(ValueError, match=expected):
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-1"))
    assert trainer.state.global_step == 1


def test_another_order_of_examples_of_one_length(runs, tmp_path):
    folder, _ = runs(Budget, OF_ONE_LENGTH, max_tokens=16)
    with pytest.raises(ValueError, match="another dataset, or another order"):
        make(tmp_path, rows=shifted(OF_ONE_LENGTH), max_tokens=16).train(
            resume_from_checkpoint=str(folder / "checkpoint-1")
        )


def test_another_number_of_processes(runs, tmp_path, monkeypatch):
    folder, _ = runs()
    monkeypatch.setattr(ResumingMixin, "_num_replicas", 2)
    with pytest.raises(ValueError, match="number of processes was 1 and is 2"):
        make(tmp_path).train(resume_from_checkpoint=str(folder / "checkpoint-1"))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"max_tokens": 60}, "max_tokens was 40 and is 60"),
        ({"buffer_size": 20}, "buffer_size was 10 and is 20"),
        ({"seed": 6}, "seed was 5 and is 6"),
    ],
)
def test_streams(settings, message, runs, tmp_path):
    stream = Dataset.from_list(ROWS).to_iterable_dataset()
    same = {"rows": stream, "max_steps": 2, "buffer_size": 10}
    make(tmp_path, **same).train()
    with pytest.raises(ValueError, match=message):
        make(tmp_path, **same | settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


SAME: list[tuple[Any, dict[str, Any]]] = [
    (Budget, {}),
    (Budget, {"num_train_epochs": 5, "learning_rate": 1e-3, "logging_steps": 3}),
    (Budget, {"per_device_train_batch_size": 8}),
    (Budget, {"data_seed": 5, "seed": 9}),
    (Budget, {"max_tokens": np.int64(40)}),
    (Budget, {"rows": Dataset.from_list(ROWS).with_format("torch")}),
    (Budget, {"rows": Dataset.from_list([row | {"note": "n"} for row in ROWS])}),
    (Budget, {"restore_callback_states_from_checkpoint": True}),
    (Masking, {}),
    (Masking, {"dataloader_num_workers": 1, "max_steps": 20}),
    (Both, {}),
]


@pytest.mark.parametrize("kind, settings", SAME)
def test_an_honest_run_hears_nothing(kind, settings, runs, tmp_path, caplog):
    """In mid-epoch and at its end, in the first epoch and the second; nor from transformers of callbacks."""
    folder, steps = runs(kind)
    for step in (1, steps, steps + 1):
        assert begin(make(tmp_path, kind, **settings), folder / f"checkpoint-{step}", caplog) == ""
        assert "callbacks not included" not in caplog.text


def test_the_record_goes_on(runs, tmp_path, caplog):
    """A run that resumed leaves its own record for the next one."""
    folder, steps = runs()
    make(tmp_path, seed=6, num_train_epochs=3).train(resume_from_checkpoint=str(folder / f"checkpoint-{steps}"))
    later = tmp_path / f"checkpoint-{steps + 1}"
    assert begin(make(tmp_path / "again", seed=6), later, caplog) == ""
    with pytest.raises(ValueError, match="seed was 6 and is 5"):
        make(tmp_path / "again").train(resume_from_checkpoint=str(later))


def test_at_the_end_of_an_epoch(runs, tmp_path, caplog):
    """Batches of later epochs are others, with as many steps; those behind are complete."""
    folder, steps = runs()
    warned = begin(make(tmp_path, seed=6), folder / f"checkpoint-{steps}", caplog)
    assert (
        f"checkpoint of step {steps} makes other batches: seed was 5 and is 6. The checkpoint ends an epoch" in warned
    )
    with pytest.raises(ValueError, match="max_tokens was 40 and is 24"):  # whose epochs have more steps
        make(tmp_path, max_tokens=24).train(resume_from_checkpoint=str(folder / f"checkpoint-{steps}"))


def test_an_epoch_that_begins_again(runs, tmp_path, caplog):
    folder, _ = runs()
    trainer = make(tmp_path, max_tokens=60, ignore_data_skip=True)
    warned = begin(trainer, folder / "checkpoint-1", caplog)
    assert (
        "max_tokens was 40 and is 60. The current epoch starts again, so examples that it has had come twice" in warned
    )


@pytest.mark.parametrize("kind", [Budget, Masking])
def test_a_checkpoint_without_a_record(kind, runs, tmp_path, caplog):
    """Of a former release: in mid-epoch a warning, at its end none. Later checkpoints have one."""
    folder, steps = runs(kind)
    for step, expected in ((1, "the checkpoint of step 1 has no record of its batches"), (steps, "")):
        copy = shutil.copytree(folder / f"checkpoint-{step}", tmp_path / f"copy-{step}")
        state = json.loads((copy / "trainer_state.json").read_text())
        del state["stateful_callbacks"][KEY]
        (copy / "trainer_state.json").write_text(json.dumps(state))
        assert begin(make(tmp_path / "run", kind), copy, caplog).startswith(expected)
    make(tmp_path / "run", kind).train(resume_from_checkpoint=str(tmp_path / "copy-1"))
    assert KEY in json.loads((tmp_path / "run/checkpoint-2/trainer_state.json").read_text())["stateful_callbacks"]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"seed": 3}, "seed was 0 and is 3"),
        ({"mlm_probability": 0.3}, "mlm_probability was 0.15 and is 0.3"),
        ({"mlm_probability": {0: 0.15, 4: 0.3}}, r"mlm_probability was 0.15 and is \{'0': 0.15, '4': 0.3\}"),
        ({"strategy": "span"}, "strategy was 'token' and is 'span'"),
        ({"dynamic": False}, "dynamic was True and is False"),
    ],
)
def test_other_targets(settings, message, runs, tmp_path, caplog):
    folder, _ = runs(Masking)
    warned = begin(make(tmp_path, Masking, collator=MASKING(**settings)), folder / "checkpoint-1", caplog)
    assert re.search(f"checkpoint of step 1 draws other targets than before: {message}", warned)


# --- Mask schedules --------------------------------------------------------------------------------------------------


def test_schedules(tmp_path, caplog):
    """The mask that a checkpoint was trained with is the one that was logged last."""
    masks: dict[int | float, str] = {0: "window(2)", 2: "window(4, 4)", 4: "full"}
    trainer = make(tmp_path, Masking, callbacks=[MaskSchedule(masks)], max_steps=5)
    trainer.train()

    def resumed(step, masks):
        trainer = make(tmp_path / "again", Masking, callbacks=[MaskSchedule(masks)], max_steps=5)
        return begin(trainer, tmp_path / f"checkpoint-{step}", caplog)

    for step in range(1, 5):
        assert resumed(step, masks) == ""
    assert resumed(3, {0: "causal", 3: "window(4)"}) == ""  # the same mask in other words
    warned = resumed(3, {0: "full"})
    assert (
        "checkpoint of step 3 was trained with the mask 'window(4, 4)'; the run that resumes from it has 'full'"
        in warned
    )
    assert "has 'causal' there" in resumed(1, {0: "causal"})
    assert "trained with the mask 'window(2)'" in resumed(1, {0.0: "window(3)"})
