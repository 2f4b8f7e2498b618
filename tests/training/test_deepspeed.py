"""Two processes on CPUs by DeepSpeed's ZeRO-2 and ZeRO-3 follow the course of two by DDP, save, and resume."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import Dataset
from transformers import (
    AutoModelForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.integrations.deepspeed import is_deepspeed_available, is_deepspeed_zero3_enabled

from hf_dynmask import (
    DataCollatorForDynamicMasking,
    DataCollatorForSeq2SeqWithLengths,
    DataCollatorWithLengths,
    DynamicMaskingMixin,
    DynMaskConfig,
    DynMaskForCausalLM,
    DynMaskForConditionalGeneration,
    DynMaskForMaskedLM,
    DynMaskSeq2SeqConfig,
    MaskSchedule,
    ThroughputCallback,
    TokenBudgetMixin,
    from_transformers,
    to_transformers,
)
from hf_dynmask.conversion.zero3 import whole_weights
from launched import deepspeed_environment
from masked_lm_examples import make_tokenizer, texts
from two_processes import in_two_processes

pytestmark = pytest.mark.skipif(not is_deepspeed_available(), reason="needs `pip install deepspeed`")

SHAPE: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
SHAPE |= {"vocab_size": 205, "initializer_range": 0.3}  # so that what lies below the head tells in the loss
IDS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
STEPS, SAVE_STEPS = 2, 1  # in one epoch: resumed in the midst of it
KINDS = ("targets anew, budget", "causal, flat", "two sides")
WAYS = {"ZeRO-2": "zero2", "ZeRO-3": "zero3"}
TEXTS = [row | {"labels": row["input_ids"]} for row in texts(16, 2, 12, seed=1)]


class Rows(Dataset):
    """Examples, and the numbers of those that were asked for."""

    def __init__(self, rows: list[dict[str, Any]]):
        self.rows = rows
        self.seen: list[int] = []

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        self.seen.append(number)
        return dict(self.rows[number])


class MaskedLMTrainer(TokenBudgetMixin, DynamicMaskingMixin, Trainer):
    pass


class Numbers(TrainerCallback):
    """How many numbers of the weights this process holds between two steps."""

    found = -1

    def on_step_end(self, args, state, control, *, model, **kwargs):
        self.found = sum(weight.numel() for weight in model.parameters())


class Kind(NamedTuple):
    model: PreTrainedModel
    collator: Any
    trainer: Any = Trainer
    options: dict[str, Any] = {}


def kinds() -> dict[str, Kind]:
    """Models with random weights, and how each is trained."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    return {
        "targets anew, budget": Kind(
            DynMaskForMaskedLM(DynMaskConfig(**SHAPE)),
            DataCollatorForDynamicMasking(tokenizer, at_least_one=True),
            trainer=MaskedLMTrainer,
            options={"max_tokens": 20, "callbacks": [MaskSchedule({0: "window(2)", 0.5: "full"})]},
        ),
        "causal, flat": Kind(
            DynMaskForCausalLM(
                DynMaskConfig(mask="causal & topk(3)", position_type="rotary", norm_placement="pre", **SHAPE)
            ),
            DataCollatorWithLengths(tokenizer, flat=True),
            options={"callbacks": [ThroughputCallback()]},
        ),
        "two sides": Kind(
            DynMaskForConditionalGeneration(DynMaskSeq2SeqConfig(decoder_start_token_id=1, **IDS, **SHAPE)),
            DataCollatorForSeq2SeqWithLengths(tokenizer),
        ),
    }


def make_trainer(kind: Kind, checkpoint: Path, folder: Path) -> Trainer:
    """Of a model that is loaded after its arguments are made, which tell it of ZeRO-3."""
    torch.manual_seed(0)
    arguments = TrainingArguments(
        str(folder),
        num_train_epochs=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        adam_epsilon=1e-4,  # far above the rounding of gradients, which Adam would make steps of
        logging_steps=1,
        save_strategy="steps",
        save_steps=SAVE_STEPS,
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=False,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    share_out_small_weights(arguments)
    rows: Any = Rows(TEXTS)
    model = type(kind.model).from_pretrained(checkpoint)
    return kind.trainer(
        model, arguments, data_collator=kind.collator, train_dataset=rows, eval_dataset=TEXTS, **kind.options
    )


def share_out_small_weights(arguments: Any) -> None:
    """ZeRO-3 keeps those of fewer than 100,000 numbers whole, which are all of a model in a test."""
    if is_deepspeed_zero3_enabled():
        for config in (arguments.deepspeed_plugin.deepspeed_config, arguments.deepspeed_plugin.dschf.config):
            config["zero_optimization"]["stage3_param_persistence_threshold"] = 0


def train(kind: Kind, folder: Path, way: str) -> dict[str, Any]:
    """From the first step on, and from a checkpoint on."""
    found: dict[str, Any] = {}
    for name, checkpoint in (("unbroken", None), ("resumed", str(folder / way / f"checkpoint-{SAVE_STEPS}"))):
        trainer: Any = make_trainer(kind, folder / "start", folder / way)
        numbers = Numbers()
        trainer.add_callback(numbers)
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model(str(folder / way / name))
        found[name] = {
            "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
            "held out": trainer.evaluate()["eval_loss"],
            "seen": trainer.train_dataset.seen,
            "numbers": numbers.found,
            "generated": generated(trainer, kind),
        }
    return found


def generated(trainer: Any, kind: Kind) -> list[list[int]]:
    """What a model says to texts that are other ones on each process, and end at other steps."""
    if not trainer.model.can_generate():
        return []
    text = TEXTS[trainer.args.process_index]["input_ids"]
    settings = {"max_new_tokens": 3 + trainer.args.process_index, "do_sample": False}
    return trainer.model.generate(torch.tensor([text]), synced_gpus=is_deepspeed_zero3_enabled(), **settings).tolist()


# --- Two processes ---------------------------------------------------------------------------------------------------


def of_process(folder: Path) -> None:
    """What a process of two finds."""
    found: dict[Any, Any] = {(name, "DDP"): train(kind, folder / name, "DDP") for name, kind in kinds().items()}
    from deepspeed import ops

    ops.__compatible_ops__["deepspeed_shm_comm"] = False  # which would be compiled first; gloo does as well
    for way, configuration in WAYS.items():
        os.environ.update(deepspeed_environment(configuration, "--num_processes", "2", "--mixed_precision", "no"))
        found |= {(name, way): train(kind, folder / name, way) for name, kind in kinds().items()}
    found["converted"] = convert(folder)
    if not torch.accelerator.is_available():
        settings = {"cpu": {"use_cpu": True}, "not told": {}}
        found["processes"] = {
            name: TrainingArguments(str(folder), report_to="none", **options).world_size
            for name, options in settings.items()
        }
    torch.save(found, folder / f"{os.environ['RANK']}.pt")


def convert(folder: Path) -> dict[str, Any]:
    """Models of ours and stock ones, made of each other by ZeRO-3: loaded from a checkpoint, and shared out."""
    arguments = TrainingArguments(str(folder), report_to="none", use_cpu=True)
    share_out_small_weights(arguments)
    stock: Any = BertForMaskedLM.from_pretrained(folder / "bert")
    models: dict[str, Any] = {
        "of a checkpoint": from_transformers(folder / "bert"),
        "of a model": from_transformers(stock),
        "and back": to_transformers(DynMaskForMaskedLM.from_pretrained(folder / "ours")),
        "new": AutoModelForMaskedLM.from_config(DynMaskConfig(**SHAPE)),
    }
    shared_out = [model.get_input_embeddings().weight.numel() == 0 for model in (stock, *models.values())]
    with whole_weights(models["new"]):
        found = {
            name: {key: weight.clone() for key, weight in model.state_dict().items()} for name, model in models.items()
        }
    return found | {"shared out": shared_out}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deepspeed")
    for name, kind in kinds().items():
        kind.model.save_pretrained(folder / name / "start")
    stock = BertForMaskedLM(BertConfig(**SHAPE))
    stock.save_pretrained(folder / "bert")
    from_transformers(stock).save_pretrained(folder / "ours")
    in_two_processes(of_process, folder, "transformers.trainer", "hf_dynmask")
    return folder


@pytest.fixture(scope="module")
def of_ranks(folder):
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_the_course_of_ddp(way, name, of_ranks, folder):
    """Losses of each step, held-out loss, weights, and texts; of a run that resumes, too."""
    for of_rank in of_ranks:
        expected = of_rank[name, "DDP"]["unbroken"]
        assert len(expected["losses"]) == STEPS
        for run in ("unbroken", "resumed"):
            found = of_rank[name, way][run]
            assert found["losses"] == pytest.approx(expected["losses"], abs=1e-5)
            assert found["held out"] == pytest.approx(expected["held out"], abs=1e-5)
            assert found["generated"] == expected["generated"]
    expected = load_file(folder / name / "DDP" / "unbroken" / "model.safetensors")
    for run in ("unbroken", "resumed"):
        found = load_file(folder / name / way / run / "model.safetensors")
        found = {weight: found[weight] for weight in expected}  # ZeRO-2 saves a tied weight under both of its names
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_each_process_has_examples_of_its_own(way, name, of_ranks):
    """Every example is seen once."""
    seen = [of_rank[name, way]["unbroken"]["seen"] for of_rank in of_ranks]
    assert sorted(sum(seen, [])) == list(range(len(TEXTS)))
    assert seen == [of_rank[name, "DDP"]["unbroken"]["seen"] for of_rank in of_ranks]


@pytest.mark.parametrize("name", KINDS)
def test_weights_are_shared_out(name, of_ranks):
    """By ZeRO-3: between two steps a process holds none whole."""
    numbers = [of_ranks[0][name, way]["unbroken"]["numbers"] for way in WAYS]
    assert numbers[0] > 0 == numbers[1]


def test_conversion_where_weights_are_shared_out(of_ranks, folder):
    """What is converted is whole on every process; a model that is loaded or made by a configuration is not."""
    ours, stock = (load_file(folder / name / "model.safetensors") for name in ("ours", "bert"))
    for of_rank in of_ranks:
        found = of_rank["converted"]
        assert found["shared out"] == [True, False, False, False, True]
        for name, expected in (("of a checkpoint", ours), ("of a model", ours), ("and back", stock)):
            torch.testing.assert_close({key: found[name][key] for key in expected}, expected, atol=0, rtol=0)


def test_new_weights_where_they_are_shared_out(of_ranks):
    """The same on both processes, with the spread that the configuration asks for, and tied."""
    first, second = (of_rank["converted"]["new"] for of_rank in of_ranks)
    torch.testing.assert_close(first, second, atol=0, rtol=0)
    table = first["model.embeddings.word_embeddings.weight"]
    assert float(table.std()) == pytest.approx(SHAPE["initializer_range"], rel=0.05)
    assert bool((first["model.embeddings.norm.weight"] == 1).all())
    assert first["lm_head.decoder.weight"].equal(table)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="on accelerators Accelerate knows how processes talk")
def test_cpus_have_to_be_asked_for(of_ranks):
    """Without `use_cpu=True` Accelerate takes each process for the only one: all would train on the same examples."""
    assert [of_rank["processes"] for of_rank in of_ranks] == [{"cpu": 2, "not told": 1}] * 2
