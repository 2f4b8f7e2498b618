"""CONTRIBUTING says in which files things are declared; here they are counted in the sources."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from hf_dynmask.conversion.engine import FAMILIES
from hf_dynmask.modeling.attention import IMPLEMENTATIONS
from hf_dynmask.modeling.field_shapes import FIELD_SHAPES
from hf_dynmask.modeling.mask_leaves import LEAVES

ROOT = Path(__file__).parents[1]
CONTRIBUTING = (ROOT / ".github" / "CONTRIBUTING.md").read_text()
COMPUTED = {"attention_mask", "key_scores"}  # fields of every model, or that it computes itself
FIELDS = sorted(FIELD_SHAPES.keys() - COMPUTED - LEAVES.keys())  # `global_tokens` is the name of a leaf, too
# Leaves that some code treats in its own way: common masks, learned scores, masks that are not expressions.
SPECIAL = {"causal", "custom", "dense", "full", "select", "topk", "window"}
ORDINARY = sorted(LEAVES.keys() - SPECIAL)


def words(path: Path) -> Iterator[str]:
    """The names and strings in the code of a file; docstrings and other strings of several words match no name."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Name(id=word) | ast.Attribute(attr=word) | ast.arg(arg=word) | ast.keyword(arg=str(word)):
                yield word
            case ast.ClassDef(name=word) | ast.FunctionDef(name=word) | ast.Constant(value=str(word)):
                yield word
            case ast.ImportFrom(module=str(word)):
                yield word


WORDS = {str(path.relative_to(ROOT)): set(words(path)) for path in sorted((ROOT / "hf_dynmask").rglob("*.py"))}


def files_with(word: str) -> set[str]:
    return {path for path, found in WORDS.items() if word in found}


def files_named(heading: str) -> set[str]:
    """The files of the package that CONTRIBUTING names for what an entry is about."""
    (entry,) = re.findall(rf"(?ms)^- \*\*{heading}\*\*.*?(?=^- |\Z)", CONTRIBUTING)
    return {path for path in re.findall(r"`(hf_dynmask/[\w/]+\.py)`", entry) if "NAME" not in path}


def test_the_places_exist():
    for path in re.findall(r"`((?:hf_dynmask|tests|recipes)/[\w/.]+)`", CONTRIBUTING):
        if "NAME" not in path:
            assert (ROOT / path).exists(), path


@pytest.mark.parametrize("name", ORDINARY)
def test_a_leaf_is_one_class_and_its_constructor(name):
    assert len(ORDINARY) >= 10
    assert files_with(LEAVES[name].__name__) == files_named("A mask leaf")


@pytest.mark.parametrize("name", FIELDS)
def test_a_field(name):
    assert len(FIELDS) == 4
    leaves = {"hf_dynmask/modeling/mask_leaves.py"}
    special = {  # spans may differ in number, and begin before their sequence; transformers has segments of its own
        "hidden_spans": {"hf_dynmask/data/collators.py", "hf_dynmask/modeling/fields.py"},
        "segment_ids": {"hf_dynmask/stock/masks.py"},
    }
    assert files_with(name) - leaves - special.get(name, set()) == files_named("A field that a leaf reads")


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_family_is_one_file(model_type):
    strings = {
        path
        for path in WORDS
        for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value == model_type
    }
    assert len(strings) == 1
    (path,) = strings
    assert Path(path).parent == Path("hf_dynmask/conversion")
    importing = files_with(Path(path).stem) - {path}
    assert all(Path(other).parent == Path(path).parent for other in importing)  # families that share its code
    assert "hf_dynmask/conversion/engine.py" not in importing


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_backend_is_one_file_and_one_table(name):
    assert (ROOT / f"hf_dynmask/modeling/attention_{name}.py").exists()
    assert files_with(f"attention_{name}") == files_named("An attention backend")
