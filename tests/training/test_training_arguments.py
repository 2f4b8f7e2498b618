"""A sweep of `TrainingArguments`: what each changes with ours, on every head, is what it changes with stock models.

`FIELDS` is the table. It names a setting of `SETTINGS` in which the field is swept, a test below, or the reason why there
is nothing to compare.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Seq2SeqTrainingArguments, TrainingArguments, logging

from trainer_twins import HEADS, assert_same, make_trainer, trained

NAMES = [each.name for each in fields(TrainingArguments)]
NEWEST = "activation_checkpointing" in NAMES
CHECKPOINTING = "activation_checkpointing" if NEWEST else "gradient_checkpointing"


@pytest.fixture(scope="module", autouse=True)
def few_objects():
    """The Trainer collects garbage before it trains, which takes longer than a run here: of all modules loaded."""
    gc.freeze()
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()
    gc.unfreeze()


# --- The settings -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """
    Args:
        arguments: What is swept.
        also: Arguments that it needs, of which others are the row of the table.
        stock: Arguments for the stock model in place of `arguments`, where it is wrong under these; the reason beside.
        of_trainer: Arguments of the Trainer itself.
        heads: On which it is tried.
        refused: How it ends with some of them, and with their references: part of the message.
        tolerance: Of all that is compared.
    """

    arguments: Mapping[str, Any] = field(default_factory=dict)
    also: Mapping[str, Any] = field(default_factory=dict)
    stock: Mapping[str, Any] | None = None
    of_trainer: Mapping[str, Any] = field(default_factory=dict)
    heads: tuple[str, ...] = tuple(HEADS)
    refused: Mapping[str, str] = field(default_factory=dict)
    tolerance: float = 1e-5


def squares(outputs, labels, num_items_in_batch=None):
    """A loss that looks at all that is predicted, and at nothing else."""
    logits = [outputs[name] for name in ("logits", "start_logits", "end_logits") if name in outputs]
    return sum(each.float()[each != 0].square().sum() for each in logits) / 100


STEPS = {"eval_strategy": "steps", "eval_steps": 1}
OF_FLOATS = {name: "gather\\(\\): Expected dtype int32/int64" for name in ("several classes", "a number")}
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
        }
    ),
    # The losses of BERT and BART take the number of items and do not read it: those of several batches add up.
    "accumulation": Setting(
        {
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "average_tokens_across_devices": False,
            "num_train_epochs": 2,
        },
        stock={"per_device_train_batch_size": 4, "num_train_epochs": 2},
    ),
    "order": Setting(
        {
            "seed": 7,
            "data_seed": 3,
            "dataloader_drop_last": True,
            "train_sampling_strategy": "group_by_length",
            "length_column_name": "lengths",
        },
        refused={"CTC": "whose items are dictionaries with an 'input_ids' key"},
    ),
    "balance": Setting(
        also={"train_sampling_strategy": "batch_rebalance"},
        refused={"CTC": "whose items are dictionaries with an 'input_ids' key"},
    ),
    "label smoothing": Setting(
        {"label_smoothing_factor": 0.1}, refused={**OF_FLOATS, "CTC": "[Ss]ize .* must match|Size does not match"}
    ),
    "half precision": Setting({"bf16": True}, tolerance=2e-2),
    "half precision in evaluation": Setting({"bf16_full_eval": True}, tolerance=1e-2),
    "checkpoints of activations": Setting(
        {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": False}},
        refused={"recurrent, a class": "does not support (gradient|activation) checkpointing"},
    ),
    "reentrant checkpoints": Setting(
        also={CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": True}},
        refused={"recurrent, a class": "does not support (gradient|activation) checkpointing"},
    ),
    "counting": Setting(
        {"include_num_input_tokens_seen": "non_padding", "torch_empty_cache_steps": 1, "use_cache": True},
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
    "evaluation by batch": Setting({"batch_eval_metrics": True}, also={"include_for_metrics": ["inputs", "loss"]}),
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
    "the best of all": Setting(
        {
            "save_strategy": "steps",
            "save_steps": 1,
            "save_total_limit": 1,
            "load_best_model_at_end": True,
            "metric_for_best_model": "score",
            "greater_is_better": False,
        },
        also=STEPS,
    ),
    "the best alone": Setting(
        {"save_only_model": True, "save_on_each_node": True},
        also={**STEPS, "save_strategy": "best", "load_best_model_at_end": True},
    ),
    "columns": Setting({"remove_unused_columns": False}),
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
    "determinism": Setting({"full_determinism": True}),
    "batches taken apart": Setting(
        {"accelerator_config": {"split_batches": True, "dispatch_batches": True, "even_batches": False}}
    ),
    "graphs": Setting(
        {"torch_compile": True, "torch_compile_backend": "aot_eager"}, stock={}, heads=("a class",), tolerance=1e-4
    ),
    # Arguments of the Trainer beside those in TrainingArguments.
    "a loss of one's own": Setting(of_trainer={"compute_loss_func": squares}),
    "logits made ready": Setting(of_trainer={"preprocess_logits_for_metrics": lambda logits, labels: logits}),
}


def outcome(setting: Setting, head: str, kind: str, folder: Path):
    arguments = setting.arguments if kind != "padded" or setting.stock is None else setting.stock
    trainer = make_trainer(HEADS[head], kind, folder / kind, {**setting.also, **arguments}, setting.of_trainer)
    return trained(trainer)


CASES = [(name, head) for name, setting in SETTINGS.items() for head in setting.heads]


@pytest.fixture(autouse=True)
def as_before():
    """Determinism is a setting of the process."""
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name, head", CASES, ids=[f"{head}: {name}" for name, head in CASES])
def test_a_setting_does_what_it_does_in_stock(name, head, tmp_path):
    setting = SETTINGS[name]
    if head in setting.refused:
        for kind in ("padded", *HEADS[head].kinds):
            with pytest.raises((RuntimeError, ValueError), match=setting.refused[head]):
                outcome(setting, head, kind, tmp_path)
        return
    right = outcome(setting, head, "padded", tmp_path)
    for kind in HEADS[head].kinds:
        assert_same(outcome(setting, head, kind, tmp_path), right, setting.tolerance)
