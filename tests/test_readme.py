"""Every block of the README runs, one after the other, and it is short."""

import pytest

from documents import ROOT, blocks, go_to_scratch_root, run

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")  # on a CPU
README = ROOT / "README.md"


def test_code_runs(tmp_path, monkeypatch):
    """All with the same variables."""
    go_to_scratch_root(tmp_path, monkeypatch)
    namespace = {"__name__": "__main__"}
    for block in blocks(README):
        print(f"{README}:{block.line}")  # shown where it fails
        run(block, namespace)


def test_it_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 250
    assert sum(block.language == "python" for block in blocks(README)) >= 3
