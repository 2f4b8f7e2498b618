"""Two processes on CPUs, by DDP and by FSDP2, follow the course of one; the configurations of `accelerate launch`."""

import json
import os
from pathlib import Path

import pytest
import torch
from accelerate.commands.config import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DeepSpeedPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from datasets import config as datasets_config
from safetensors.torch import load_file

import masked_lm
import sequence_classification
from launched import CONFIGURATIONS, deepspeed_environment, launched
from on_cpus import take_cpus_for_gpus
from recipe_examples import write_examples
from two_processes import in_two_processes

STEPS = 6  # four an epoch, all of them full: Accelerate would fill up others from the beginning

# --- Configurations of `accelerate launch` ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, expected",
    {
        "one_process": {"num_processes": 1, "multi_gpu": False, "use_fsdp": False, "use_deepspeed": False},
        "two_cpus": {"num_processes": 2, "multi_gpu": True, "mixed_precision": "no"},
        "ddp": {"multi_gpu": True, "mixed_precision": "bf16"},
        "fsdp2": {"use_fsdp": True, "fsdp_version": 2, "fsdp_state_dict_type": "FULL_STATE_DICT"},
        "zero2": {"use_deepspeed": True, "zero_stage": 2},
        "zero3": {"use_deepspeed": True, "zero_stage": 3, "zero3_save_16bit_model": True},
    }.items(),
)
def test_accelerate_takes_the_configuration(name, expected):
    arguments = launched(name)
    assert {key: getattr(arguments, key) for key in expected} == expected
    config = load_config_from_file(str(CONFIGURATIONS / f"{name}.yaml"))
    nested = config.fsdp_config | config.deepspeed_config  # type: ignore[operator, union-attr]
    assert nested.keys() <= vars(launch_command_parser().parse_args(["script.py"])).keys()


@pytest.mark.parametrize("name, stage", [("zero2", 2), ("zero3", 3)])
def test_accelerate_makes_a_deepspeed_configuration(name, stage, monkeypatch):
    for variable, value in deepspeed_environment(name).items():
        monkeypatch.setenv(variable, value)
    plugin = DeepSpeedPlugin()
    assert plugin.deepspeed_config["zero_optimization"]["stage"] == stage
    assert plugin.deepspeed_config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] == (stage == 3)
    assert plugin.deepspeed_config["train_micro_batch_size_per_gpu"] == "auto"  # as the Trainer's arguments say
    assert plugin.deepspeed_config["gradient_accumulation_steps"] == "auto"
    assert plugin.deepspeed_config["gradient_clipping"] == "auto"
    assert plugin.zero3_init_flag == (stage == 3)


# --- DDP and FSDP2 ---------------------------------------------------------------------------------------------------

# The stock model of masked language modeling cannot be shared out: torch refuses its bias, which two modules have.
WITHOUT_BASELINE = ("FSDP2", "masked_lm")
RECIPES = {"sequence_classification": sequence_classification.main, "masked_lm": masked_lm.main}


def run(recipe: str, folder: Path, name: str, batch_size: int) -> None:
    options = {
        "model": folder / "model",
        "dataset": folder / "notes.csv",
        "output_dir": folder / name / recipe,
        "per_device_train_batch_size": batch_size,
        "max_steps": STEPS,
        "save_strategy": "steps",
        "save_steps": STEPS,
        "logging_steps": 1,
        "dropout": 0,  # also without a baseline
        "learning_rate": 1e-3,
    }
    arguments = [text for option, value in options.items() for text in (f"--{option}", str(value))]
    baseline = str((name, recipe) != WITHOUT_BASELINE)
    RECIPES[recipe]([*arguments, "--baseline", baseline, "--disable_tqdm", "True", "--use_cpu"])


def of_process(folder: Path) -> None:
    """For a process of two."""
    datasets_config.HF_DATASETS_CACHE = folder / "cache"
    for recipe in RECIPES:
        run(recipe, folder, "DDP", batch_size=8)
    environment = prepare_multi_gpu_env(launched("fsdp2", "--num_processes", "2", "--mixed_precision", "no"))
    fsdp = ("ACCELERATE_", "FSDP_")
    os.environ.update({name: value for name, value in environment.items() if name.startswith(fsdp)})
    take_cpus_for_gpus()
    for recipe in RECIPES:
        run(recipe, folder, "FSDP2", batch_size=8)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    write_examples(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets_config, "HF_DATASETS_CACHE", folder / "cache")
        in_two_processes(of_process, folder, "transformers.trainer", "hf_dynmask", "datasets")
        for recipe in RECIPES:
            run(recipe, folder, "one process", batch_size=16)
    return folder


@pytest.mark.parametrize("model", ["sequence_classification", "sequence_classification/stock", "masked_lm"])
@pytest.mark.parametrize("name", ["DDP", "FSDP2"])
def test_the_course_of_one_process(name, model, runs):
    """Losses of each step, and weights at the end."""
    folders = [runs / run / model / f"checkpoint-{STEPS}" for run in (name, "one process")]
    states = [json.loads((folder / "trainer_state.json").read_text()) for folder in folders]
    found, expected = ([entry["loss"] for entry in state["log_history"] if "loss" in entry] for state in states)
    assert len(found) == STEPS
    assert found == pytest.approx(expected, abs=1e-5)
    found, expected = (load_file(folder / "model.safetensors") for folder in folders)
    found = {weight: found[weight] for weight in expected}  # FSDP2 saves a tied weight under both of its names
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", ["DDP", "FSDP2"])
def test_the_report_of_one_process(name, recipe, runs):
    found, expected = (json.loads((runs / run / recipe / "results.json").read_text()) for run in (name, "one process"))
    assert (found["environment"]["processes"], expected["environment"]["processes"]) == (2, 1)
    metric = found["metric"]
    for contender in found["runs"]:
        assert found["runs"][contender]["train_tokens"] == expected["runs"][contender]["train_tokens"] > 0
    assert found["runs"]["dynmask"][metric] == pytest.approx(expected["runs"]["dynmask"][metric], rel=1e-4)
    assert found["padding_share"] == pytest.approx(expected["padding_share"], abs=0.1)
    saved = load_file(runs / name / recipe / "model.safetensors")
    of_checkpoint = load_file(runs / name / recipe / f"checkpoint-{STEPS}/model.safetensors")
    torch.testing.assert_close(saved, of_checkpoint, atol=0, rtol=0)
