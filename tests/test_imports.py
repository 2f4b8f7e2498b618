"""Who may import whom in the package, and what `import hf_dynmask` does besides registering: nothing."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from math import inf
from pathlib import Path
from typing import NamedTuple

import pytest

REPOSITORY = Path(__file__).parents[1]

# A room may import from its own level and from those above it in this list.
LEVELS = [
    ["modeling.messages", "modeling.field_shapes"],
    ["modeling.layout"],
    ["modeling.fields", "modeling.frames"],
    ["modeling.mask_expressions"],
    ["modeling.mask_leaves"],
    ["modeling.mask_text"],
    ["modeling.masks"],
    ["modeling.plan", "modeling.softmax", "modeling.configuration_*", "modeling.compile_ops"],
    ["data"],  # which needs no model
    ["modeling.kv_cache", "modeling.graph_layout"],
    ["modeling.attention_*"],
    ["modeling.attention"],
    ["modeling.graph_attention"],
    ["modeling.batch", "modeling.embedding", "modeling.losses"],
    ["modeling.features", "modeling.generation"],
    ["modeling.modules", "modeling.modeling_base"],
    ["modeling.heads"],
    ["modeling.modeling_*"],
    ["stock"],
    ["registration", "conversion"],
    ["training"],
    ["tools"],
    ["cli"],
]
TRAVELS_WITH_A_CHECKPOINT = ["configuration_*", "modeling_*"]


class Import(NamedTuple):
    line: int
    target: str  # absolute and dotted, down to the imported name
    sibling: str  # `name` of `from .name import ...`, else empty


def imports(path: Path, root: Path) -> Iterator[Import]:
    """Every import of a file, those in functions included."""
    package = path.relative_to(root).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (Import(node.lineno, alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = node.module or ""
            sibling = module if node.level == 1 and "." not in module else ""
            for alias in node.names:
                yield Import(node.lineno, ".".join(filter(None, [*base, module, alias.name])), sibling)


def room(target: str) -> str | None:
    """Which room of the package a dotted name is in, in `modeling` with the file; empty for the package itself, `None`
    for anything else."""
    first, *parts = target.split(".")
    if first != "hf_dynmask":
        return None
    return ".".join(parts[: 2 if parts[:1] == ["modeling"] else 1])


def level(name: str) -> float:
    """The place of a room in LEVELS; names of the package itself come after all."""
    return next((place for place, rooms in enumerate(LEVELS) if any(fnmatch(name, each) for each in rooms)), inf)


def broken_directions(root: Path) -> Iterator[str]:
    package = root / "hf_dynmask"
    for path in sorted(package.rglob("*.py")):
        here = room(".".join(path.relative_to(root).with_suffix("").parts))
        if here is None or here.endswith("__init__"):
            continue
        if level(here) == inf:
            yield f"{path.name}: {here} has no place in LEVELS"
        for line, target, _ in imports(path, root):
            there = room(target)
            if there is None or there == here:
                continue
            if level(there) > level(here):
                yield f"{path.name}:{line}: imports {target} of a later level"
            elif fnmatch(here, "modeling.attention_*") and fnmatch(there, "modeling.attention_*"):
                yield f"{path.name}:{line}: an attention implementation imports another, {target}"


def imports_of_recipes_or_tests(root: Path) -> Iterator[str]:
    """The package imports neither; recipes do not import tests. Both hold scripts, so a bare name may be meant."""
    for folder, forbidden in {"hf_dynmask": ["recipes", "tests", "support"], "recipes": ["tests"]}.items():
        names = {*forbidden, *(path.stem for other in forbidden for path in (root / other).glob("**/*.py"))}
        for path in sorted((root / folder).rglob("*.py")):
            for line, target, _ in imports(path, root):
                if target.split(".")[0] in names:
                    yield f"{path.name}:{line}: {folder} imports {target}"


def private_names_in_recipes(root: Path) -> Iterator[str]:
    for path in sorted((root / "recipes").rglob("*.py")):
        for line, target, _ in imports(path, root):
            if room(target) is not None and re.search(r"\._(?!_)", target):
                yield f"{path.name}:{line}: a recipe imports {target}"


def untransportable_imports(root: Path) -> Iterator[str]:
    """Transformers copies a checkpoint's code by following `from .name import ...` from file to file in one folder."""
    package = root / "hf_dynmask" / "modeling"
    waiting = [path for pattern in TRAVELS_WITH_A_CHECKPOINT for path in sorted(package.glob(f"{pattern}.py"))]
    travelling = set()
    while waiting:
        path = waiting.pop()
        if path in travelling:
            continue
        travelling.add(path)
        for line, target, sibling in imports(path, root):
            file = package / f"{sibling}.py"
            if room(target) is None:
                continue
            if file.is_file():
                waiting.append(file)
            else:
                yield f"{path.name}:{line}: travels with a checkpoint, yet {target} is not from `.name` beside it"


RULES = [broken_directions, imports_of_recipes_or_tests, private_names_in_recipes, untransportable_imports]


@pytest.mark.parametrize("rule", RULES)
def test_imports(rule):
    assert list(rule(REPOSITORY)) == []


def violations(folder: Path, files: dict[str, str]) -> list[str]:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return [violation for rule in RULES for violation in rule(folder)]


ALLOWED = {
    "hf_dynmask/__init__.py": "from .modeling import masks\nfrom .registration import register",
    "hf_dynmask/modeling/layout.py": "import torch",
    "hf_dynmask/modeling/masks.py": "",
    "hf_dynmask/modeling/plan.py": "from .layout import X\nfrom .masks import Y",
    "hf_dynmask/modeling/attention_blocks.py": "from .plan import X",
    "hf_dynmask/modeling/attention.py": "from .attention_blocks import X",
    "hf_dynmask/modeling/modeling_dynmask.py": "from .attention import X",
    "hf_dynmask/modeling/modeling_other.py": "from .modeling_dynmask import X",
    "hf_dynmask/registration.py": "import hf_dynmask.modeling.masks\nfrom .modeling.modeling_dynmask import X",
    "hf_dynmask/conversion/__init__.py": "from .bert import X",
    "hf_dynmask/conversion/bert.py": "from ..modeling.modeling_dynmask import X\nfrom ..modeling.plan import Y",
    "recipes/train.py": "from support import samples\nfrom hf_dynmask import masks\nfrom hf_dynmask.data import X",
    "recipes/support/samples.py": "",
    "tests/helpers/oracle.py": "import hf_dynmask._private\nfrom support import samples",
}


def test_what_is_allowed(tmp_path):
    assert violations(tmp_path, ALLOWED) == []


@pytest.mark.parametrize(
    "name, text, violation",
    [
        (
            "hf_dynmask/modeling/masks.py",
            "from .plan import X",
            "masks.py:1: imports hf_dynmask.modeling.plan.X of a later level",
        ),
        ("hf_dynmask/data/rows.py", "def f():\n    from .. import cli", "rows.py:2: imports hf_dynmask.cli of a later"),
        ("hf_dynmask/data/rows.py", "from ..cli import X", "rows.py:1: imports hf_dynmask.cli.X of a later level"),
        ("hf_dynmask/data/rows.py", "import hf_dynmask.cli", "rows.py:1: imports hf_dynmask.cli of a later level"),
        ("hf_dynmask/data/rows.py", "from hf_dynmask import X", "rows.py:1: imports hf_dynmask.X of a later level"),
        ("hf_dynmask/data/rows.py", "import hf_dynmask", "rows.py:1: imports hf_dynmask of a later level"),
        ("hf_dynmask/helpers.py", "", "helpers.py: helpers has no place"),
        ("hf_dynmask/helpers/__init__.py", "", "__init__.py: helpers has no place"),
        (
            "hf_dynmask/modeling/attention_flex.py",
            "from .attention_blocks import X",
            "attention_flex.py:1: an attention implementation imports another, hf_dynmask.modeling.attention_blocks.X",
        ),
        ("hf_dynmask/modeling/plan.py", "import tests.oracle", "plan.py:1: hf_dynmask imports tests.oracle"),
        ("hf_dynmask/data/rows.py", "from support.samples import X", "rows.py:1: hf_dynmask imports support.samples.X"),
        ("recipes/train.py", "import oracle", "train.py:1: recipes imports oracle"),
        (
            "recipes/train.py",
            "from hf_dynmask.modeling.plan import _X",
            "train.py:1: a recipe imports hf_dynmask.modeling.plan._X",
        ),
        ("recipes/train.py", "from hf_dynmask._plan import X", "train.py:1: a recipe imports hf_dynmask._plan.X"),
        (
            "hf_dynmask/modeling/plan.py",
            "from . import masks",
            "plan.py:1: travels with a checkpoint, yet hf_dynmask.modeling.masks is",
        ),
        ("hf_dynmask/modeling/plan.py", "from hf_dynmask.modeling.masks import X", "plan.py:1: travels"),
        ("hf_dynmask/modeling/plan.py", "import hf_dynmask.modeling.masks", "plan.py:1: travels"),
        ("hf_dynmask/modeling/modeling_other.py", "from .attention.inner import X", "modeling_other.py:1: travels"),
    ],
)
def test_what_is_not(tmp_path, name, text, violation):
    found = violations(tmp_path, {**ALLOWED, name: text})
    assert len(found) == 1
    assert found[0].startswith(violation)


# --- what importing does ---------------------------------------------------------------------------------------------

# Runs in an interpreter of its own, with the module's name as argument. What torch and transformers load on first use,
# and do while loading, is theirs: it is done before watching.
WATCH = """
import importlib, os, random, sys, warnings
import numpy, torch
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.bert import modeling_bert

effects = []

def watch(event, arguments):
    if event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR):
        effects.append(f"writes {arguments[0]}")
    elif event in ("os.mkdir", "os.putenv", "os.unsetenv", "socket.connect", "subprocess.Popen"):
        effects.append(f"{event} {arguments[0]}")

def state():
    return {
        "random numbers": (random.getstate(), str(numpy.random.get_state()), torch.get_rng_state().tolist()),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "default dtype": torch.get_default_dtype(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "gradients": torch.is_grad_enabled(),
        "warning filters": list(warnings.filters),
        "search path": list(sys.path),
    }

before, modules = state(), set(sys.modules)
print("from here on", file=sys.stderr)  # what transformers' own imports say is not ours
sys.addaudithook(watch)
importlib.import_module(sys.argv[1])
effects += [f"changes {name}" for name, value in state().items() if value != before[name]]
effects += [f"imports {name}" for name in ("datasets", "evaluate", "matplotlib") if name in set(sys.modules) - modules]
for effect in effects:
    print(effect)
"""


def effects_of_import(name: str, folder: Path) -> list[str]:
    command = [sys.executable, "-B", "-c", WATCH, name]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return run.stdout.splitlines() + run.stderr.partition("from here on\n")[2].splitlines()


def test_importing_the_package_has_no_effect():
    assert effects_of_import("hf_dynmask", REPOSITORY) == []


def test_the_watch_sees_effects(tmp_path):
    (tmp_path / "loud.py").write_text(
        "import os, sys, torch, datasets\n"
        "open('file', 'w').close()\n"
        "os.environ['LOUD'] = '1'\n"
        "torch.manual_seed(1)\n"
        "print('loaded', file=sys.stderr)\n"
    )
    effects = effects_of_import("loud", tmp_path)
    assert {"writes file", "os.putenv b'LOUD'", "changes random numbers", "imports datasets", "loaded"} <= set(effects)
