"""Every block of the README runs by itself."""

import pytest

from documents import ROOT, blocks, go_to_scratch_root, run

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")  # on a CPU
BLOCKS = blocks(ROOT / "README.md")


def test_the_readme_has_code():
    assert sum(block.language == "python" for block in BLOCKS) >= 3


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"line {block.line}")
def test_code_runs(block, tmp_path, monkeypatch):
    go_to_scratch_root(tmp_path, monkeypatch)
    run(block, {"__name__": "__main__"})
