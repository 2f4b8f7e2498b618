"""Every Python block of the README runs as it stands."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)


def test_the_readme_has_code():
    assert len(BLOCKS) >= 3


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_code_runs(number, tmp_path):
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")  # the block reads as if pasted at the root of the repository
    run = subprocess.run(
        [sys.executable, "-c", BLOCKS[number]], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    # What a line prints stands behind it as a comment.
    for said in re.findall(r"^print\(.*\)  # (.*)$", BLOCKS[number], flags=re.MULTILINE):
        assert said in run.stdout
