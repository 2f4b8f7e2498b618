"""The pages of the site: all of their code runs, and they name all that is public."""

import re
from pathlib import Path

import pytest

import hf_dynmask
from documents import ROOT, blocks, go_to_scratch_root, run
from hf_dynmask.modeling.mask_leaves import LEAVES

PAGES = ROOT / ".github" / "pages" / "docs"
pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")  # on a CPU
FILES = sorted(PAGES.rglob("*.md"))
LANGUAGES = {"python", "bash", "text", "gallery"}


def page_id(path: Path) -> str:
    return str(path.relative_to(PAGES))


@pytest.mark.parametrize("path", [path for path in FILES if blocks(path)], ids=page_id)
def test_code_runs(path, tmp_path, monkeypatch):
    """Block after block, all of a page with the same variables."""
    go_to_scratch_root(tmp_path, monkeypatch)
    namespace = {"__name__": "__main__"}
    for block in blocks(path):
        print(f"{path}:{block.line}")  # shown where it fails
        run(block, namespace)


@pytest.mark.parametrize("path", FILES, ids=page_id)
def test_blocks_say_what_they_are(path):
    fences = re.findall(r"^\s*```(.*)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert set(fences[::2]) <= LANGUAGES and set(fences[1::2]) <= {""}


def test_the_reference_has_each_public_name_once():
    names = [name for path in FILES for name in re.findall(r"^::: hf_dynmask\.(\w+)$", path.read_text(), re.MULTILINE)]
    assert sorted(names) == sorted(hf_dynmask.__all__)


def test_the_gallery_has_each_mask():
    text = (PAGES / "masks.md").read_text(encoding="utf-8")
    assert {name for name in LEAVES if not re.search(rf"\b{name}\b", text)} == set()
