"""A sweep of `TrainingArguments`: what each changes with ours, on every head, is what it changes with stock models.

`FIELDS`, at the end, is the table: it says of each field which setting of `SETTINGS` sweeps it, which test does, or why
there is nothing to compare.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import IterableDataset
from transformers import (
    EarlyStoppingCallback,
    GenerationConfig,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
    logging,
)

from hf_dynmask import MaskSchedule, ThroughputCallback
from trainer_twins import HEADS, LENGTHS, Outcome, assert_same, make_trainer, trained, with_our_attention

NAMES = {each.name for each in fields(TrainingArguments)}
OF_PAIRS = {each.name for each in fields(Seq2SeqTrainingArguments)} - NAMES
OF_STOCK = tuple(name for name, head in HEADS.items() if head.ours is with_our_attention)
CHECKPOINTING = "activation_checkpointing" if "activation_checkpointing" in NAMES else "gradient_checkpointing"


@pytest.fixture(scope="module", autouse=True)
def few_objects():
    """The Trainer collects garbage before it trains, which takes longer than a run here: of all modules loaded."""
    gc.freeze()
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()
    gc.unfreeze()


@pytest.fixture(autouse=True)
def as_before():
    """`full_determinism` is a setting of the process."""
    yield
    torch.use_deterministic_algorithms(False)


def of_every_head(*, but: tuple[str, ...] = ()):
    return pytest.mark.parametrize("head", [name for name in HEADS if name not in but])


# --- Settings ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """
    Args:
        arguments: What is swept.
        also: What that needs, which is swept elsewhere.
        stock: Arguments of the stock model in place of `arguments`, where it is wrong under these.
        heads: On which it is tried.
        rows_only: Heads whose flat batches stock code cannot read; the reason beside.
        refused: How it ends with some of them, and with their references: a part of the message.
        tolerance: Of all that is compared.
    """

    arguments: Mapping[str, Any]
    also: Mapping[str, Any] = field(default_factory=dict)
    stock: Mapping[str, Any] | None = None
    heads: tuple[str, ...] = tuple(HEADS)
    rows_only: tuple[str, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    tolerance: float = 1e-5


EVERY_STEP = {"eval_strategy": "steps", "eval_steps": 1}
NO_IDS = {"CTC": "whose items are dictionaries with an 'input_ids' key"}
SETTINGS = {
    "optimizer": Setting(
        {
            "max_steps": 4,
            "learning_rate": 0.05,
            "lr_scheduler_type": "cosine",
            "lr_scheduler_kwargs": {"num_cycles": 0.4},
            "warmup_steps": 1,
            "optim": "adamw_torch",
            "weight_decay": 0.3,
            "adam_beta1": 0.8,
            "adam_beta2": 0.9,
            "adam_epsilon": 1e-2,
            "max_grad_norm": 0.3,
            "full_determinism": True,
        }
    ),
    # The losses of BERT and BART are given the number of items and do not read it: those of several batches add up.
    "accumulation": Setting(
        {
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "average_tokens_across_devices": False,
            "num_train_epochs": 2,
        },
        stock={"per_device_train_batch_size": 4, "num_train_epochs": 2},
        tolerance=1e-4,
    ),
    "order": Setting(
        {
            "seed": 7,
            "data_seed": 3,
            "dataloader_drop_last": True,
            "train_sampling_strategy": "group_by_length",
            "length_column_name": "number_of_tokens",
        },
        refused=NO_IDS,
    ),
    "balance": Setting({"train_sampling_strategy": "batch_rebalance"}, heads=("masked LM", "CTC"), refused=NO_IDS),
    "label smoothing": Setting(
        {"label_smoothing_factor": 0.1},
        refused={
            "several classes": "Expected dtype int32/int64 for index",  # the Trainer smooths labels that are numbers
            "a number": "Expected dtype int32/int64 for index",
            "CTC": "size .* must match|Size does not match",
        },
    ),
    "bfloat16": Setting({"bf16": True}, tolerance=2e-2),
    "bfloat16 in evaluation": Setting({"bf16_full_eval": True}, tolerance=1e-2),
    "float16 in evaluation": Setting({"fp16_full_eval": True}, tolerance=1e-2),
    "checkpointing": Setting(
        {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": False}},
        refused={"recurrent, a class": "does not support (gradient|activation) checkpointing"},
    ),
    "reentrant checkpointing": Setting(
        {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": True}},
        refused={"recurrent, a class": "does not support (gradient|activation) checkpointing"},
    ),
    # Without an attention mask the Trainer counts the numbers in frames that are not the tokenizer's pad id.
    "counting": Setting(
        {
            "include_num_input_tokens_seen": "non_padding",
            "torch_empty_cache_steps": 1,
            "use_cache": True,
            "remove_unused_columns": False,
        },
        rows_only=("CTC",),
    ),
    "evaluation in parts": Setting(
        {
            "per_device_eval_batch_size": 2,
            "eval_do_concat_batches": False,
            "eval_accumulation_steps": 1,
            "eval_use_gather_object": True,
            "include_for_metrics": ["inputs", "loss"],
            "logging_nan_inf_filter": False,
        }
    ),
    "evaluation by batch": Setting({"batch_eval_metrics": True, "include_for_metrics": ["inputs", "loss"]}),
    "evaluation of losses": Setting(
        {
            "prediction_loss_only": True,
            "eval_on_start": True,
            "eval_strategy": "steps",
            "eval_steps": 1,
            "eval_delay": 2,
            "logging_strategy": "steps",
            "logging_steps": 2,
            "logging_first_step": True,
        }
    ),
    "the best": Setting(
        {
            "save_strategy": "steps",
            "save_steps": 1,
            "save_total_limit": 1,
            "load_best_model_at_end": True,
            "metric_for_best_model": "score",
            "greater_is_better": False,
        },
        also=EVERY_STEP,
    ),
    "the best alone": Setting(
        {"save_strategy": "best", "load_best_model_at_end": True, "save_only_model": True, "save_on_each_node": True},
        also=EVERY_STEP,
    ),
    "loading": Setting(
        {
            "dataloader_num_workers": 1,
            "dataloader_persistent_workers": True,
            "dataloader_prefetch_factor": 1,
            "dataloader_multiprocessing_context": "fork",
            "dataloader_in_order": False,
        },
        heads=("masked LM",),
    ),
    "batches taken apart": Setting(
        {"accelerator_config": {"split_batches": True, "dispatch_batches": True, "even_batches": False}}
    ),
}
CASES = [(name, head) for name, setting in SETTINGS.items() for head in setting.heads]


def arguments_of(setting: Setting, head: str, kind: str) -> dict[str, Any]:
    """Those of a stock model are its own, too, where only its attention is ours."""
    stock = kind == "padded" and setting.stock is not None and head not in OF_STOCK
    return {**setting.also, **(setting.stock if stock and setting.stock is not None else setting.arguments)}


@pytest.mark.parametrize("name, head", CASES, ids=[f"{head}: {name}" for name, head in CASES])
def test_a_setting_does_what_it_does_in_stock(name, head, tmp_path):
    setting = SETTINGS[name]

    def outcome(kind: str) -> Outcome:
        return trained(make_trainer(HEADS[head], kind, tmp_path / kind, arguments_of(setting, head, kind)))

    if head in setting.refused:
        for kind in ("padded", *HEADS[head].kinds):
            with pytest.raises((RuntimeError, ValueError), match=setting.refused[head]):
                outcome(kind)
        return
    right = outcome("padded")
    for kind in ("rows",) if head in setting.rows_only else HEADS[head].kinds:
        assert_same(outcome(kind), right, setting.tolerance)


# --- Arguments of the Trainer itself ----------------------------------------------------------------------------------


@of_every_head()
def test_a_loss_and_a_look_at_logits_of_ones_own(head, tmp_path):
    """While training, the Trainer takes the labels out of the batch: the model has to give logits."""
    seen = []

    def loss(outputs, labels, num_items_in_batch=None):
        logits = outputs["logits"] if "logits" in outputs else (outputs["start_logits"], outputs["end_logits"])
        return HEADS[head].score(logits, labels) / (num_items_in_batch or 1)

    def look(logits, labels):
        seen.append(labels)
        return logits

    def outcome(kind: str) -> Outcome:
        own = {"compute_loss_func": loss, "preprocess_logits_for_metrics": look}
        return trained(make_trainer(HEADS[head], kind, tmp_path / kind, {"learning_rate": 1e-3}, own))

    right = outcome("padded")
    for kind in HEADS[head].kinds:
        assert_same(outcome(kind), right)
    assert seen and all(labels is not None for labels in seen)


class Stream(IterableDataset):
    """Examples one after the other. Accelerate collates them in one place and deals out parts of batches."""

    def __init__(self, head: str):
        self.examples = HEADS[head].examples().to_list()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.examples)


@of_every_head()
def test_streams(head, tmp_path):
    def outcome(kind: str) -> Outcome:
        streams = {"train_dataset": Stream(head), "eval_dataset": Stream(head)}
        return trained(make_trainer(HEADS[head], kind, tmp_path / kind, {"max_steps": 4}, streams))

    right = outcome("padded")
    for kind in HEADS[head].kinds:
        assert_same(outcome(kind), right)


# --- Fields with a test of their own ----------------------------------------------------------------------------------


def largest_noise(self, low, high):
    """In place of `Tensor.uniform_`."""
    return self.fill_(high)


def with_noise(head: str, kind: str, folder: Path, **settings: Any) -> Outcome:
    trainer = make_trainer(HEADS[head], kind, folder / kind, {"neftune_noise_alpha": 5.0, **settings})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "uniform_", largest_noise)
        return trained(trainer)


@of_every_head(but=(*OF_STOCK, "CTC"))
def test_noise_of_embeddings(head, tmp_path):
    """As large as the length of each sequence says. That of stock models depends on the width of the padded batch, so
    they are given one sequence at a time."""
    one = {"per_device_train_batch_size": 1}
    right = with_noise(head, "padded", tmp_path, **one, max_steps=3)
    for kind in HEADS[head].kinds:
        assert_same(with_noise(head, kind, tmp_path, **one, max_steps=3), right)
        parts = with_noise(head, kind, tmp_path, **one, gradient_accumulation_steps=3, max_steps=1)
        together = with_noise(head, kind, tmp_path, per_device_train_batch_size=3, max_steps=1)
        assert together.logs[0]["loss"] == pytest.approx(parts.logs[0]["loss"], abs=1e-5)


@pytest.mark.parametrize("head", OF_STOCK)
def test_noise_of_embeddings_of_stock_models(head, tmp_path):
    assert_same(with_noise(head, "rows", tmp_path), with_noise(head, "padded", tmp_path))
    with pytest.raises(ValueError, match="NEFTune must have rows"):
        with_noise(head, "flat", tmp_path)


def test_noise_of_frames(tmp_path):
    with pytest.raises(NotImplementedError, match="get_input_embeddings"):  # they have no table of embeddings
        with_noise("CTC", "rows", tmp_path)


@pytest.mark.parametrize("head", ["masked LM", "pairs", "CTC"])
def test_all_input_tokens_are_counted(head, tmp_path):
    """Padding too, of which a flat batch has none."""

    def count(kind: str) -> int:
        trainer = make_trainer(HEADS[head], kind, tmp_path, {"include_num_input_tokens_seen": "all"})
        trainer.train()
        return trainer.state.num_input_tokens_seen

    of_one = 2 if head == "CTC" else 1  # the Trainer counts numbers, of which a frame has two
    of_lengths = sum(len(row) for row in HEADS[head].examples()[0:][["input_ids", "input_features"][of_one - 1]])
    assert count("rows") == count("padded") > count("flat") == of_lengths * of_one


def resumed(head: str, kind: str, folder: Path, *callbacks: Any, **settings: Any) -> tuple[Outcome, Outcome]:
    """What comes of a run, and of one that goes on from its second step."""
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, **settings}
    runs = []
    for checkpoint in (None, str(folder / "checkpoint-2")):
        of_run = [callback() for callback in callbacks]
        trainer = make_trainer(
            HEADS[head], kind, folder, {**settings, "resume_from_checkpoint": checkpoint}, {"callbacks": of_run}
        )
        runs.append(trained(trainer, resume_from_checkpoint=trainer.args.resume_from_checkpoint))
    return runs[0], runs[1]


@of_every_head()
def test_a_run_that_goes_on(head, tmp_path):
    """With `ignore_data_skip` from the first example again."""
    right = resumed(head, "padded", tmp_path / "padded", ignore_data_skip=True)
    for kind in HEADS[head].kinds:
        for found, expected in zip(resumed(head, kind, tmp_path / kind, ignore_data_skip=True), right, strict=True):
            assert_same(found, expected)


def test_callbacks_of_a_run_that_goes_on(tmp_path):
    """Ours have no state to restore, and keep their place beside those that have."""
    unbroken, found = resumed(
        "a class",
        "rows",
        tmp_path,
        lambda: EarlyStoppingCallback(early_stopping_patience=9),
        lambda: MaskSchedule({0: "window(1)", 3: "full"}),
        restore_callback_states_from_checkpoint=True,
        metric_for_best_model="loss",
        **EVERY_STEP,
    )
    for name, weight in unbroken.weights.items():
        torch.testing.assert_close(found.weights[name], weight, atol=1e-6, rtol=0)
    assert [entry["mask"] for entry in found.logs if "mask" in entry] == ["window(1)", "window(1)", "full"]


@pytest.mark.parametrize("kind", ["rows", "flat"])
def test_batches_that_fit_are_found(kind, tmp_path):
    """What a batch counted that did not fit is forgotten."""

    def outcome(kind: str, **of_trainer: Any) -> Trainer:
        trainer = make_trainer(HEADS["a class"], kind, tmp_path / kind, {"auto_find_batch_size": True}, of_trainer)

        def room_for_two(model, args, batch):
            if model.training and len(batch["labels"]) > 2:
                raise RuntimeError("CUDA out of memory.")

        trainer.model.register_forward_pre_hook(room_for_two, with_kwargs=True)  # type: ignore[union-attr]
        trainer.train()
        return trainer

    right, found = outcome("padded"), outcome(kind)
    assert (
        found.state.train_batch_size == right.state.train_batch_size in (1, 2)
    )  # early releases of accelerate halve it
    assert_same(Outcome.of(found), Outcome.of(right))
    counted = outcome(kind, callbacks=[ThroughputCallback()]).state.log_history[-1]
    assert counted["train_real_tokens"] == sum(LENGTHS)


@pytest.mark.parametrize(
    "settings",
    [
        {"generation_max_length": 6},
        {"generation_max_length": 5, "generation_num_beams": 2, "sortish_sampler": True},
        {"generation_config": GenerationConfig(max_new_tokens=3, decoder_start_token_id=2, eos_token_id=5)},
    ],
    ids=["greedy", "beams", "configuration"],
)
def test_generation(settings, tmp_path):
    def predicted(kind: str) -> Any:
        settings_of_both = {"predict_with_generate": True, **settings}
        trainer = make_trainer(HEADS["pairs"], kind, tmp_path, settings_of_both, {"compute_metrics": None})
        trainer.train()
        return trainer.predict(HEADS["pairs"].examples())  # type: ignore[arg-type]

    right, found = predicted("padded"), predicted("rows")
    np.testing.assert_array_equal(found.predictions, right.predictions)
    assert found.metrics["test_loss"] == pytest.approx(right.metrics["test_loss"], abs=1e-5)
    with pytest.raises(ValueError, match="row"):
        predicted("flat")


def test_labels_of_other_names(tmp_path):
    """What the Trainer takes for labels it returns, in the order given."""

    def predicted(kind: str) -> Any:
        settings = {"label_names": ["end_positions", "start_positions"]}
        trainer = make_trainer(HEADS["an answer"], kind, tmp_path, settings, {"compute_metrics": None})
        return trainer.predict(HEADS["an answer"].examples())  # type: ignore[arg-type]

    right = predicted("padded")
    for kind in ("rows", "flat"):
        found = predicted(kind)
        for each, expected in zip(found.label_ids, right.label_ids, strict=True):
            np.testing.assert_array_equal(each, expected)
        assert found.metrics["test_loss"] == pytest.approx(right.metrics["test_loss"], abs=1e-5)


def test_columns_that_no_model_reads(tmp_path):
    """Left out by default; with `remove_unused_columns=False` a stock model swallows them."""
    examples = HEADS["a class"].examples()
    data = {"train_dataset": examples.add_column("number", list(range(len(examples))))}  # type: ignore[call-arg]
    make_trainer(HEADS["a class"], "rows", tmp_path, {}, data).train()
    trainer = make_trainer(HEADS["a class"], "rows", tmp_path, {"remove_unused_columns": False}, data)
    with pytest.raises(TypeError, match="unexpected keyword argument `number`"):
        trainer.train()


# --- The table --------------------------------------------------------------------------------------------------------

PLACE = "a place, or who hears of it"
PROCESSES = "of several processes: test_processes.py, test_split_batches.py, test_loss_split.py and their like"
OF_GPUS = "needs a GPU"
SCRIPTS = "for scripts; the Trainer does not read it"
HUB = "tests/test_hub.py"
COMPILED = "tests/ecosystem/test_compile_users.py"
LIGER = "puts other code into stock classes, by their model type; it knows none of ours"
OTHER_OPTIMIZERS = "of optimizers that come with other packages; they see parameters, and no batches"
FIELDS: dict[str, Any] = {
    "accelerator_config": "batches taken apart",
    "activation_checkpointing": "checkpointing",
    "activation_checkpointing_kwargs": "checkpointing",
    "adam_beta1": "optimizer",
    "adam_beta2": "optimizer",
    "adam_epsilon": "optimizer",
    "auto_find_batch_size": test_batches_that_fit_are_found,
    "average_tokens_across_devices": "accumulation",
    "batch_eval_metrics": "evaluation by batch",
    "bf16": "bfloat16",
    "bf16_full_eval": "bfloat16 in evaluation",
    "data_seed": "order",
    "dataloader_drop_last": "order",
    "dataloader_in_order": "loading",
    "dataloader_multiprocessing_context": "loading",
    "dataloader_num_workers": "loading",
    "dataloader_persistent_workers": "loading",
    "dataloader_pin_memory": OF_GPUS,
    "dataloader_prefetch_factor": "loading",
    "ddp_backend": PROCESSES,
    "ddp_broadcast_buffers": PROCESSES,
    "ddp_bucket_cap_mb": PROCESSES,
    "ddp_find_unused_parameters": PROCESSES,
    "ddp_static_graph": PROCESSES,
    "ddp_timeout": PROCESSES,
    "debug": "looks at activations and changes none; stock BERT ends in it, at a mask of booleans",
    "deepspeed": PROCESSES,
    "disable_tqdm": PLACE,
    "do_eval": SCRIPTS,
    "do_predict": SCRIPTS,
    "do_train": SCRIPTS,
    "enable_jit_checkpoint": "a checkpoint like any other, when a signal comes: test_resume.py",
    "eval_accumulation_steps": "evaluation in parts",
    "eval_delay": "evaluation of losses",
    "eval_do_concat_batches": "evaluation in parts",
    "eval_on_start": "evaluation of losses",
    "eval_steps": "evaluation of losses",
    "eval_strategy": "evaluation of losses",
    "eval_use_gather_object": "evaluation in parts",
    "fp16": OF_GPUS,
    "fp16_full_eval": "float16 in evaluation",
    "fsdp": PROCESSES,
    "fsdp_config": PROCESSES,
    "full_determinism": "optimizer",
    "generation_config": test_generation,
    "generation_max_length": test_generation,
    "generation_num_beams": test_generation,
    "gradient_accumulation_steps": "accumulation",
    "gradient_checkpointing": "checkpointing",
    "gradient_checkpointing_kwargs": "checkpointing",
    "greater_is_better": "the best",
    "hub_always_push": HUB,
    "hub_model_id": HUB,
    "hub_private_repo": HUB,
    "hub_revision": HUB,
    "hub_strategy": HUB,
    "hub_token": HUB,
    "ignore_data_skip": test_a_run_that_goes_on,
    "include_for_metrics": "evaluation in parts",
    "include_num_input_tokens_seen": "counting",
    "label_names": test_labels_of_other_names,
    "label_smoothing_factor": "label smoothing",
    "learning_rate": "optimizer",
    "length_column_name": "order",
    "liger_kernel_config": LIGER,
    "load_best_model_at_end": "the best",
    "local_rank": PROCESSES,
    "log_level": PLACE,
    "log_level_replica": PLACE,
    "log_on_each_node": PLACE,
    "logging_first_step": "evaluation of losses",
    "logging_nan_inf_filter": "evaluation in parts",
    "logging_steps": "evaluation of losses",
    "logging_strategy": "evaluation of losses",
    "lr_scheduler_kwargs": "optimizer",
    "lr_scheduler_type": "optimizer",
    "max_grad_norm": "optimizer",
    "max_steps": "optimizer",
    "metric_for_best_model": "the best",
    "neftune_noise_alpha": test_noise_of_embeddings,
    "num_train_epochs": "accumulation",
    "optim": "optimizer",
    "optim_args": OTHER_OPTIMIZERS,
    "optim_target_modules": OTHER_OPTIMIZERS,
    "output_dir": PLACE,
    "parallelism_config": PROCESSES,
    "per_device_eval_batch_size": "evaluation in parts",
    "per_device_train_batch_size": "accumulation",
    "predict_with_generate": test_generation,
    "prediction_loss_only": "evaluation of losses",
    "project": PLACE,
    "push_to_hub": HUB,
    "remove_unused_columns": "counting",
    "report_to": PLACE,
    "restore_callback_states_from_checkpoint": test_callbacks_of_a_run_that_goes_on,
    "resume_from_checkpoint": test_a_run_that_goes_on,
    "run_name": PLACE,
    "save_on_each_node": "the best alone",
    "save_only_model": "the best alone",
    "save_steps": "the best",
    "save_strategy": "the best",
    "save_total_limit": "the best",
    "seed": "order",
    "skip_memory_metrics": "measures memory",
    "sortish_sampler": test_generation,
    "tf32": OF_GPUS,
    "torch_compile": COMPILED,
    "torch_compile_backend": COMPILED,
    "torch_compile_mode": COMPILED,
    "torch_empty_cache_steps": "counting",
    "trackio_bucket_id": PLACE,
    "trackio_space_id": PLACE,
    "trackio_static_space_id": PLACE,
    "train_sampling_strategy": "order",
    "use_cache": "counting",
    "use_cpu": OF_GPUS,
    "use_liger_kernel": LIGER,
    "warmup_steps": "optimizer",
    "weight_decay": "optimizer",
}


def test_the_table_has_every_field():
    missing = sorted((NAMES | OF_PAIRS) - FIELDS.keys())
    assert not missing, f"sweep {', '.join(missing)} in a setting or a test here, or give a reason why not, in `FIELDS`"


def test_the_table_is_true():
    swept = {name for setting in SETTINGS.values() for name in setting.arguments}
    for name in FIELDS.keys() & NAMES:
        setting = SETTINGS.get(FIELDS[name]) if isinstance(FIELDS[name], str) else None
        assert name not in swept or setting is not None, f"{name} is swept, and the table gives another reason"
        renamed = name.replace("gradient_checkpointing", CHECKPOINTING)
        assert setting is None or renamed in setting.arguments, f"{name} is not in the setting {FIELDS[name]!r}"
