"""MaskSchedule: which mask is in force when, real Trainer runs stopped and resumed, what is logged, bad schedules."""

import math
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed import destroy_process_group, init_process_group
from torch.nn.parallel import DataParallel, DistributedDataParallel
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from hf_dynmask import DynMaskConfig, DynMaskForSequenceClassification, MaskSchedule
from strategies import examples

STEPS = 8
SCHEDULE = {0: "window(1)", 0.5: "window(3)", 7: "full"}
IN_FORCE = ["window(1)"] * 4 + ["window(3)"] * 3 + ["full"]  # in each of the 8 steps
SHAPE: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def make_model(**settings):
    torch.manual_seed(0)
    return DynMaskForSequenceClassification(DynMaskConfig(vocab_size=50, **SHAPE, **settings))


def rows(number=2 * STEPS):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 50, (number, 12), generator=generator).tolist()
    return Dataset.from_list([{"input_ids": row, "lengths": 5 + k % 8, "labels": k % 2} for k, row in enumerate(ids)])


def make_trainer(model, folder, *callbacks, data=None, **settings):
    defaults = {"per_device_train_batch_size": 2, "max_steps": STEPS, "save_strategy": "no", "learning_rate": 1e-3}
    arguments = TrainingArguments(
        str(folder), use_cpu=True, report_to="none", disable_tqdm=True, **{**defaults, **settings}
    )
    data = rows() if data is None else data
    return Trainer(model, arguments, train_dataset=data, eval_dataset=rows(2), callbacks=list(callbacks))


class Watch(TrainerCallback):
    """What a tracker hears, and the model's mask at every step and evaluation."""

    def __init__(self):
        self.heard, self.in_steps, self.in_evaluations = [], [], []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.heard.append((state.global_step, dict(logs or {})))

    def on_substep_end(self, args, state, control, model: Any = None, **kwargs):
        self.in_steps.append(model.config.mask)

    on_pre_optimizer_step = on_substep_end

    def on_evaluate(self, args, state, control, model: Any = None, **kwargs):
        self.in_evaluations.append((state.global_step, model.config.mask))


# --- Which mask is in force ------------------------------------------------------------------------------------------


def drive(schedule, steps, model, start=0):
    """The schedule through a training of `steps`, without a Trainer: the mask of each step, the last one, the state."""
    state, control, seen = TrainerState(max_steps=steps, global_step=start), TrainerControl(), []
    schedule.on_train_begin(None, state, control, model=model)
    while state.global_step < steps:
        schedule.on_step_begin(None, state, control, model=model)
        seen.append(model.config.mask)
        state.global_step += 1
        schedule.on_step_end(None, state, control, model=model)
    return seen, model.config.mask, state


@pytest.mark.parametrize(
    "masks, steps, expected, last",
    [
        (SCHEDULE, STEPS, IN_FORCE, "full"),
        ({0: "causal"}, 3, ["causal"] * 3, "causal"),
        ({0.0: "causal", 1: "full"}, 3, ["causal", "full", "full"], "full"),
        ({0: "causal", 1.0: "full"}, 3, ["causal"] * 3, "full"),
        ({0: "causal", 0.1: "full"}, 30, ["causal"] * 3 + ["full"] * 27, "full"),  # 0.1 * 30 > 3 in floats
        ({0: "causal", 0.5: "full"}, 5, ["causal"] * 3 + ["full"] * 2, "full"),  # 2.5 steps are rounded up
        ({0: "causal", 0.4: "window(2)", 0.5: "full"}, 2, ["causal", "full"], "full"),  # both after the first step
        ({0: "causal", 2: "window(2)", 9: "full"}, 4, ["causal"] * 2 + ["window(2)"] * 2, "window(2)"),
    ],
)
def test_the_mask_of_each_step(masks, steps, expected, last):
    assert drive(MaskSchedule(masks), steps, make_model())[:2] == (expected, last)


@given(st.integers(1, 200), st.integers(0, 200), st.integers(0, 100))
@examples(100)
def test_a_fraction_is_in_force_from_the_first_step_that_is_that_far(steps, start, percent):
    model = make_model()
    schedule = MaskSchedule({0: "causal", percent / 100: "full"} if percent else {0: "full"})
    seen, _, _ = drive(schedule, steps, model, start)
    assert seen == ["full" if 100 * step >= percent * steps else "causal" for step in range(start, steps)]


def test_it_wins_over_masks_of_the_layers():
    model = make_model(layer_masks=["causal", "full"])
    drive(MaskSchedule({0: "window(2)"}), 1, model)
    assert [str(mask) for mask in model.config.masks()] == ["window(2, 2)"] * 2


@pytest.fixture
def process_group(tmp_path):
    init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    destroy_process_group()


def compiled(model):
    return torch.compile(model, backend="eager")


@torch.no_grad()  # with gradients torch.compile warns of its own doings
@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize(
    "wrap",
    [DataParallel, DistributedDataParallel, compiled, lambda model: compiled(DistributedDataParallel(model))],
    ids=["DataParallel", "DistributedDataParallel", "compiled", "compiled DistributedDataParallel"],
)
def test_wrapped_models(wrap):
    """The next forward pass of the wrapper has the new mask."""
    inputs = {"input_ids": torch.tensor(rows(1)["input_ids"]), "lengths": torch.tensor([12])}
    model = make_model().eval()
    wrapper = wrap(model)
    state, control = TrainerState(max_steps=2), TrainerControl()
    schedule = MaskSchedule({0: "window(1)", 1: "causal"})
    schedule.on_train_begin(None, state, control, model=wrapper)
    logits = []
    for step, mask in enumerate(["window(1)", "causal"]):
        state.global_step = step
        schedule.on_step_begin(None, state, control, model=wrapper)
        assert model.config.mask == mask
        logits.append(wrapper(**inputs).logits)
        torch.testing.assert_close(logits[-1], model(**inputs).logits)
    assert not torch.allclose(*logits)


# --- Real training ---------------------------------------------------------------------------------------------------


def weights(trainer):
    return trainer.model.state_dict()


def same_weights(one, other):
    return all(torch.equal(weight, weights(other)[name]) for name, weight in weights(one).items())


def test_a_training(tmp_path):
    watch = Watch()
    settings = {"logging_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True}
    trainer = make_trainer(make_model(), tmp_path, MaskSchedule(SCHEDULE), watch, **settings)
    trainer.train()

    assert watch.in_steps == IN_FORCE
    changes = [(0, "window(1)", 0), (4, "window(3)", 1), (7, "full", 2)]
    heard = [(step, logs["mask"], logs["mask_stage"]) for step, logs in watch.heard if "mask" in logs]
    history = [(e["step"], e["mask"], e["mask_stage"]) for e in trainer.state.log_history if "mask" in e]
    assert heard == history == changes
    losses = [entry["step"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses == [2, 4, 6, 8]
    # An evaluation has the mask of the step count at which it stands.
    evaluations = [(0, "window(1)"), (2, "window(1)"), (4, "window(3)"), (6, "window(3)"), (8, "full")]
    assert watch.in_evaluations == evaluations


@pytest.mark.parametrize("stop", [3, 4, 5, 7])
def test_resumed_training_ends_like_an_unbroken_one(stop, tmp_path):
    """Bit for bit, with dropout; the model that resumes is made anew, with no mask of the schedule on it."""
    watch, settings = Watch(), {"save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": 2}
    unbroken = make_trainer(make_model(), tmp_path, MaskSchedule(SCHEDULE), **settings)
    unbroken.train()
    resumed = make_trainer(make_model(), tmp_path, MaskSchedule(SCHEDULE), watch, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))

    assert same_weights(unbroken, resumed)
    assert watch.in_steps == [mask for mask in IN_FORCE[stop:] for _ in range(2)]
    first = next(logs for _, logs in watch.heard)
    assert first["mask"] == IN_FORCE[stop]

    plain = make_trainer(make_model(), tmp_path / "plain", **{**settings, "save_strategy": "no"})
    plain.train()
    assert not same_weights(unbroken, plain)


def test_checkpoints_have_the_mask_of_their_step(tmp_path):
    make_trainer(make_model(), tmp_path, MaskSchedule(SCHEDULE), save_strategy="steps", save_steps=4).train()
    masks = [DynMaskConfig.from_pretrained(tmp_path / f"checkpoint-{step}").mask for step in (4, 8)]
    assert masks == ["window(3)", "full"]


@pytest.mark.parametrize("best", range(1, STEPS + 1))
def test_the_best_checkpoint_comes_back_with_its_mask(best, tmp_path):
    """And the model is what it was when it was evaluated, whichever step was the best."""
    schedule, seen = MaskSchedule({0: "window(1)", 3: "window(3)", 6: "full"}), {}

    class Judge(TrainerCallback):
        def on_evaluate(self, args, state, control, model, metrics, **kwargs):
            seen[state.global_step] = model.config.mask
            metrics["eval_fitness"] = -abs(state.global_step - best)

    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    settings |= {"load_best_model_at_end": True, "metric_for_best_model": "fitness", "greater_is_better": True}
    model = make_model()
    trainer = make_trainer(model, tmp_path, schedule, Judge(), **settings)
    trainer.train()
    assert trainer.state.best_global_step == best
    assert model.config.mask == seen[best]
    again = DynMaskForSequenceClassification.from_pretrained(tmp_path / f"checkpoint-{best}")
    assert again.config.mask == seen[best]


def test_a_stock_model(tmp_path):
    """The loss of each stage is that of the stage's mask."""
    torch.manual_seed(0)
    config = BertConfig(vocab_size=50, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **SHAPE)
    model = BertForSequenceClassification(config)
    model.set_attn_implementation("dynmask")
    data = rows().remove_columns("lengths")

    def losses(schedule):
        settings = {"learning_rate": 0.0, "logging_steps": 1, "max_steps": 2}
        trainer = make_trainer(model, tmp_path, schedule, data=data, **settings)
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    narrow, full = losses(MaskSchedule({0: "diagonal"})), losses(MaskSchedule({0: "full"}))
    assert losses(MaskSchedule({0: "diagonal", 0.5: "full"})) == [narrow[0], full[1]]
    assert narrow[1] != full[1]


# --- Bad schedules ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "masks, message",
    [
        ({}, r"`masks` must map steps or fractions of the training to masks; got \{\}"),
        ("full", "`masks` must map steps or fractions .*; got 'full'"),
        ({5: "full"}, "first key of `masks` must be 0, the start of training; got 5"),
        ({0: "full", -1: "causal"}, r"must be a number of steps \(an int of at least 0\) or .*; got -1"),
        ({0: "full", 1.5: "causal"}, r"or a fraction of the training \(a float from 0 to 1\); got 1.5"),
        ({0: "full", math.nan: "causal"}, "a float from 0 to 1.*; got nan"),
        ({0: "full", True: "causal"}, "a key of `masks` must be .*; got True"),
        ({0: "full", "0.5": "causal"}, "a key of `masks` must be .*; got '0.5'"),
        ({0: "full", 0.5: "causal", 0.25: "full"}, "keys of `masks` must be increasing; got 0.25 after 0.5"),
        ({0: "full", 9: "causal", 0.5: "full", 8: "full"}, "keys of `masks` must be increasing; got 8 after 9"),
        ({0: "full", 0.5: "windw(3)"}, r"`masks\[0.5\]`: mask does not parse at column 1: unknown mask `windw`"),
        ({0: "full", 3: "causal &"}, r"`masks\[3\]`: mask does not parse at column 9"),
        ({0: None}, r"`masks\[0\]`: a mask must be text .*; got None"),
    ],
)
def test_bad_schedules(masks, message):
    with pytest.raises(ValueError, match=message):
        MaskSchedule(masks)


def test_steps_and_fractions_must_rise_together():
    schedule = MaskSchedule({0: "full", 60: "causal", 0.5: "full"})
    drive(schedule, 120, make_model())
    message = "keys of `masks` must be increasing; got 0.5, which is step 50 of 100, after 60, which is step 60"
    with pytest.raises(ValueError, match=message):
        drive(schedule, 100, make_model())


def test_a_mask_that_does_not_fit_the_model_is_found_when_training_begins(tmp_path):
    schedule = MaskSchedule({0: "full", 0.9: "heads(full, causal, diagonal)"})
    with pytest.raises(ValueError, match="a number of masks that divides the 2 heads; got 3"):
        make_trainer(make_model(), tmp_path, schedule).train()
