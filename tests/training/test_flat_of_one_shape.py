"""Flat batches of one shape give the losses, gradients and trained weights of rows, for every head."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from hf_dynmask import TokenBudgetMixin
from hf_dynmask.data.flat import with_settings
from trainer_twins import HEADS, Head
from two_processes import in_two_processes

FLAT = [name for name, head in HEADS.items() if "flat" in head.kinds]
MAX_TOKENS = 16  # of the budget


def of_one_shape(head: Head, model: Any, examples: list[dict[str, Any]], tokens: int, sequences: int) -> Any:
    """A flat collator whose batches have so many places and sequences more than these examples need."""
    batch = head.flat(model)(examples)  # type: ignore[misc]
    main = "input_features" if "input_features" in batch else "input_ids"
    sizes: dict[str, Any] = {"max_tokens": batch[main].shape[1] + tokens, "max_sequences": len(examples) + sequences}
    if "decoder_lengths" in batch:
        sizes["max_target_tokens"] = batch["labels"].shape[1] + tokens
    if main == "input_features":
        sizes["column_sizes"] = {"labels": 5}
    return with_settings(head.flat(model), **sizes)  # type: ignore[misc]


def loss_and_gradients(model: Any, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
    model.zero_grad()
    loss = model(**batch, **kwargs).loss
    loss.backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return {"loss": loss.detach(), **gradients}


@pytest.mark.parametrize("tokens, sequences", [(0, 0), (0, 3), (1, 0), (9, 5)])
@pytest.mark.parametrize("name", FLAT)
def test_losses_and_gradients_are_those_of_rows(name, tokens, sequences):
    head = HEADS[name]
    model = head.model("flat").eval()
    examples: Any = list(head.examples())
    for some in (examples, examples[1:4], examples[5:6]):
        expected = loss_and_gradients(model, head.rows(model)(some))
        found = loss_and_gradients(model, of_one_shape(head, model, some, tokens, sequences)(some))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", FLAT)
def test_a_mean_over_the_targets_of_several_batches(name):
    """As the Trainer counts them: the labels that are not -100, of all batches of a step."""
    head = HEADS[name]
    model = head.model("flat").eval()
    examples: Any = list(head.examples())
    rows, flat = head.rows(model)(examples), of_one_shape(head, model, examples, 7, 4)(examples)
    if "labels" in rows:
        number, own = (batch["labels"].ne(-100).sum() for batch in (rows, flat))
        if "causal" not in name:  # a flat row has no label at the first token of a sequence
            assert number == own
    if "our attention" in name or "labels" not in rows:
        return
    expected = loss_and_gradients(model, rows, num_items_in_batch=29)
    found = loss_and_gradients(model, flat, num_items_in_batch=29)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


# --- In a Trainer ----------------------------------------------------------------------------------------------------


class BudgetTrainer(TokenBudgetMixin, Trainer):
    """As users write it."""


class Shapes:
    """Those of the batches that a model was trained on."""

    def __init__(self, model: nn.Module):
        self.found: set[Any] = set()
        model.register_forward_pre_hook(self.look, with_kwargs=True)

    def look(self, model: nn.Module, args: Any, batch: dict[str, Any]) -> None:
        if model.training:
            others = ("num_items_in_batch", "max_length_q")
            shapes = {name: values.shape for name, values in batch.items() if name not in others}
            self.found.add(tuple(sorted(shapes.items())))


def trained(name: str, kind: str, folder: Path, resume: str | None = None, **settings: Any) -> dict[str, Any]:
    """Losses that were logged, and the weights."""
    head = HEADS[name]
    model = head.model(kind)
    shapes = Shapes(model)
    defaults: dict[str, Any] = {"num_train_epochs": 2, "logging_steps": 1, "save_strategy": "no"}
    defaults |= {"optim": "sgd", "learning_rate": 0.05}  # Adam scales up the rounding errors of gradients that are 0
    arguments = TrainingArguments(
        str(folder),
        **{**defaults, **settings},
        ddp_find_unused_parameters=False,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    data = head.examples()
    collator = getattr(head, kind)(model)
    trainer = BudgetTrainer(model, arguments, collator, data, data, max_tokens=MAX_TOKENS)
    trainer.train(resume_from_checkpoint=resume)
    assert len(shapes.found) == 1 or kind == "rows"
    logs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"loss": logs, "eval_loss": trainer.evaluate()["eval_loss"], **model.state_dict()}


def assert_alike(found: dict[str, Any], expected: dict[str, Any]) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", [name for name in FLAT if name != "CTC"])  # whose attention has dropout
def test_training_is_that_of_rows(name, tmp_path):
    """In batches of one shape, shuffled in each epoch, some of them accumulated."""
    settings: dict[str, Any] = {"gradient_accumulation_steps": 2}
    assert_alike(trained(name, "flat", tmp_path, **settings), trained(name, "rows", tmp_path, **settings))


def test_resumed_in_mid_epoch(tmp_path):
    expected = trained("a class", "flat", tmp_path, save_strategy="steps", save_steps=1)
    found = trained("a class", "flat", tmp_path, resume=str(tmp_path / "checkpoint-4"))
    torch.testing.assert_close(found, expected, atol=0, rtol=0)


OF_TWO = ["a class", "a number", "masked LM", "an answer"]


def of_process(folder: Path) -> None:
    """What each of two processes ends with."""
    for name in OF_TWO:
        for kind in ("rows", "flat"):
            torch.save(trained(name, kind, folder), folder / f"{name}, {kind}, {os.environ['RANK']}.pt")


def test_two_processes(tmp_path):
    in_two_processes(of_process, tmp_path, "transformers.trainer", "hf_dynmask", "datasets")
    for name in OF_TWO:
        for rank in range(2):
            found, expected = (torch.load(tmp_path / f"{name}, {kind}, {rank}.pt") for kind in ("flat", "rows"))
            assert_alike(found, expected)
