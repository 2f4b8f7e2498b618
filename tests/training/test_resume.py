"""A training that is cut off, killed or on a full disk, goes on from its last good checkpoint to the same weights."""

import os
import random
import resource
import shutil
import signal
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors import SafetensorError
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from dying import CONTEXT, SIGNALS, calls_of, die
from hf_dynmask import (
    DataCollatorForDynamicMasking,
    DataCollatorWithLengths,
    DynamicMaskingMixin,
    DynMaskConfig,
    DynMaskForMaskedLM,
    TokenBudgetMixin,
)
from masked_lm_examples import make_tokenizer, texts

EPOCHS, SAVE_STEPS = 2, 2
ROWS = [row | {"labels": row["input_ids"]} for row in texts(22, 2, 12, seed=1)]
SHAPE: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}


class BudgetFirst(TokenBudgetMixin, DynamicMaskingMixin, Trainer):
    pass


class MaskingFirst(DynamicMaskingMixin, TokenBudgetMixin, Trainer):
    pass


def plain(*args, **kwargs):
    return Trainer(*args, data_collator=DataCollatorWithLengths(make_tokenizer()), **kwargs)


def both(trainer_class):
    def make(*args, **kwargs):
        collator = DataCollatorForDynamicMasking(make_tokenizer(), at_least_one=True)
        return trainer_class(*args, data_collator=collator, max_tokens=40, **kwargs)

    return make


TRAINERS: dict[str, Any] = {
    "shuffled rows": plain,
    "budget, then masking": both(BudgetFirst),
    "masking, then budget": both(MaskingFirst),
}


def make_trainer(kind: str, folder: Path, *callbacks: TrainerCallback, **settings: Any) -> Trainer:
    """With dropout, gradient accumulation and a learning rate that falls."""
    torch.manual_seed(0)
    defaults: dict[str, Any] = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    defaults |= {"num_train_epochs": EPOCHS, "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": SAVE_STEPS}
    defaults |= {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False}
    return TRAINERS[kind](
        DynMaskForMaskedLM(DynMaskConfig(vocab_size=205, **SHAPE)),
        TrainingArguments(str(folder), **defaults | settings),
        train_dataset=Dataset.from_list(ROWS),
        callbacks=list(callbacks),
    )


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in trainer.model.state_dict().items()}  # type: ignore[union-attr]


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], what: str = "") -> None:
    assert found.keys() == expected.keys()
    different = [name for name in found if not torch.equal(found[name], expected[name])]
    assert not different, f"{what}: {different}"


# --- Killed ----------------------------------------------------------------------------------------------------------


class Killed(TrainerCallback):
    """Ends its own process, with no time to tidy up."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def train_until_killed(kind: str, folder: Path, step: int) -> None:
    make_trainer(kind, folder, Killed(step)).train()


@pytest.mark.parametrize("kind", TRAINERS)
def test_a_killed_process_ends_like_an_unbroken_one(kind, tmp_path):
    """Bit for bit. It is killed at a random step in mid-epoch, behind the first checkpoint."""
    unbroken = make_trainer(kind, tmp_path / "unbroken")
    unbroken.train()
    steps = unbroken.state.max_steps
    step = random.Random().choice([step for step in range(SAVE_STEPS + 1, steps) if step % (steps // EPOCHS)])

    context = get_context("forkserver")
    context.set_forkserver_preload(["transformers.trainer", "hf_dynmask", "datasets"])
    process = context.Process(target=train_until_killed, args=(kind, tmp_path / "killed", step))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL

    last = get_last_checkpoint(str(tmp_path / "killed"))
    assert last == str(tmp_path / "killed" / f"checkpoint-{(step - 1) // SAVE_STEPS * SAVE_STEPS}")
    resumed = make_trainer(kind, tmp_path / "killed")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == steps
    assert_same(weights(resumed), weights(unbroken), f"killed at step {step}")
    assert [entry["loss"] for entry in resumed.state.log_history if "loss" in entry] == [
        entry["loss"] for entry in unbroken.state.log_history if "loss" in entry
    ]


@pytest.mark.skipif(CONTEXT is None, reason="needs fork")
@pytest.mark.parametrize("how", SIGNALS, ids=lambda how: how.name)
def test_a_process_that_dies_while_it_saves(how, tmp_path):
    """The checkpoint is whole or refused; the earlier one stays whole, and the next run saves over a broken one."""
    kill_while_it_saves(how, tmp_path, times=3)


def kill_while_it_saves(how: signal.Signals, folder: Path, times: int) -> None:
    trainer = make_trainer("shuffled rows", folder, max_steps=2 * SAVE_STEPS)
    trainer.train()
    earlier, last = (folder / f"checkpoint-{k * SAVE_STEPS}" for k in (1, 2))
    save = partial(trainer._save_checkpoint, trainer.model, None)  # type: ignore[arg-type]
    save()
    whole = contents(earlier), contents(last)
    calls = calls_of(save)
    chosen = random.Random(how)
    for moment in (chosen.randint(1, calls) for _ in range(times)):
        shutil.rmtree(last)
        die(moment, how, save)
        assert contents(earlier) == whole[0]
        if not last.exists() or contents(last) != whole[1]:
            with pytest.raises((OSError, ValueError)):
                make_trainer("shuffled rows", folder, max_steps=5).train(resume_from_checkpoint=str(last))
        save()
        assert contents(last) == whole[1]


def contents(folder: Path) -> dict[str, bytes]:
    """Of each file; of the random state only whether it is there, since refused trainings set the seed."""
    return {path.name: b"" if path.name == "rng_state.pth" else path.read_bytes() for path in folder.iterdir()}


# --- A full disk -----------------------------------------------------------------------------------------------------


class FullDisk(TrainerCallback):
    """From a step on, a file has room for a share of the weights and no more."""

    def __init__(self, step: int, share: float):
        self.step, self.share = step, share

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            saved = Path(str(args.output_dir), f"checkpoint-{self.step - SAVE_STEPS}", "model.safetensors")
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(self.share * saved.stat().st_size), resource.RLIM_INFINITY))


@pytest.fixture
def room_again():
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(
    "share, message",
    [
        (0.5, "Can't find a valid checkpoint at .*checkpoint-6"),
        (1.5, r"No such file .*checkpoint-6.*trainer_state\.json"),
    ],
    ids=["weights", "optimizer"],
)
def test_a_full_disk_leaves_the_last_good_checkpoint(share, message, room_again, tmp_path):
    """Also where no more than one is kept. A checkpoint that there was no room for is refused, never used in part."""
    unbroken = make_trainer("shuffled rows", tmp_path / "unbroken")
    unbroken.train()
    folder = tmp_path / "full"
    trainer = make_trainer("shuffled rows", folder, FullDisk(3 * SAVE_STEPS, share), save_total_limit=1)
    with pytest.raises((OSError, RuntimeError, SafetensorError), match="File too large|inline_container"):
        trainer.train()
    room_again()
    good, broken = folder / f"checkpoint-{2 * SAVE_STEPS}", folder / f"checkpoint-{3 * SAVE_STEPS}"
    assert sorted(folder.iterdir()) == [good, broken]
    with pytest.raises((OSError, ValueError), match=message):
        make_trainer("shuffled rows", folder).train(resume_from_checkpoint=True)
    resumed = make_trainer("shuffled rows", folder)
    resumed.train(resume_from_checkpoint=str(good))
    assert_same(weights(resumed), weights(unbroken))
