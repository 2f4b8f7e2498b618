"""A recipe started by `accelerate launch` with a shipped configuration, as a user would."""

import ast
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers.integrations.deepspeed import is_deepspeed_available

from recipe_examples import write_examples
from two_processes import free_port

ROOT = Path(__file__).parents[2]

ON_CPUS = ["--num_processes", "2", "--mixed_precision", "no"]
WITH_DEEPSPEED = pytest.mark.skipif(
    not is_deepspeed_available() or shutil.which("c++") is None,
    reason="needs `pip install deepspeed`, and a compiler for the operator by which its processes on CPUs talk",
)


@pytest.mark.parametrize(
    "configuration, more", [("two_cpus", []), pytest.param("zero3", ON_CPUS, marks=WITH_DEEPSPEED)]
)
def test_two_cpus(configuration, more, tmp_path):
    write_examples(tmp_path)
    options = {
        "model": tmp_path / "model",
        "dataset": tmp_path / "notes.csv",
        "output_dir": tmp_path / "output",
        "max_steps": 2,
        "per_device_train_batch_size": 8,
    }
    launch = ["-m", "accelerate.commands.launch", "--main_process_port", str(free_port())]
    launch += ["--config_file", f"recipes/accelerate/{configuration}.yaml", *more]
    launch += ["recipes/sequence_classification.py"]
    launch += [text for name, value in options.items() for text in (f"--{name}", str(value))]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    environment |= {"DS_ACCELERATOR": "cpu", "PATH": f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}"}  # ninja's
    run = subprocess.run([sys.executable, *launch], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("| hf_dynmask, lengths") == 1  # the main process alone reports
    results = json.loads((tmp_path / "output" / "results.json").read_text())
    assert results["environment"]["processes"] == 2
    assert load_file(tmp_path / "output" / "model.safetensors")


RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.py"))


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name not in ("command", "rebuild_cards")])
def test_threads_are_told_how_to_wait_before_torch_is_loaded(recipe):
    statements = ast.parse((ROOT / "recipes" / f"{recipe}.py").read_text(encoding="utf-8")).body
    first = next(each for each in statements if isinstance(each, ast.Import | ast.ImportFrom))
    assert ast.unparse(first) == "import support.threads"


@pytest.mark.parametrize("given, expected", [(None, "passive"), ("active", "active")])
def test_what_the_environment_says_stands(given, expected):
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {"PYTHONPATH": str(ROOT / "recipes")} | ({} if given is None else {"OMP_WAIT_POLICY": given})
    command = "import support.threads, os, sys; print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", command], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.split() == [expected, "False"]
