"""Runs the code of a Markdown document, block after block, as a reader would."""

import ast
import re
import shlex
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from typer.testing import CliRunner

from hf_dynmask.cli import app

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PRINTED = re.compile(r".*\)  # (?P<text>.*)$")
ERROR = re.compile(r"(?P<name>\w+Error): (?P<text>.*)$")
IS_COMMENT = re.compile("# ").match


class Block(NamedTuple):
    language: str
    code: str
    line: int  # of its fence


def blocks(path: Path) -> list[Block]:
    text = path.read_text(encoding="utf-8")
    return [Block(match[1], match[2], text.count("\n", 0, match.start()) + 1) for match in FENCE.finditer(text)]


def run_python(code: str, namespace: dict[str, Any]) -> None:
    """
    Runs statement by statement, and checks what comments say: behind a `print(…)` what it prints, and below any other
    statement the error that it raises, `# ValueError: …`.
    """
    lines = code.splitlines()
    for statement in ast.parse(code).body:
        end = statement.end_lineno
        assert end is not None
        run = compile(ast.Module([statement], []), "<block>", "exec")
        below = " ".join(line.removeprefix("# ") for line in takewhile(IS_COMMENT, lines[end:]))
        if raised := ERROR.match(below):
            with pytest.raises(Exception, match=re.escape(raised["text"]).replace("…", ".*")) as info:
                exec(run, namespace)
            assert info.type.__name__ == raised["name"]
            continue
        printed = StringIO()
        with redirect_stdout(printed):
            exec(run, namespace)
        said = PRINTED.match(lines[end - 1])
        if said and lines[statement.lineno - 1].startswith("print("):
            assert said["text"] in printed.getvalue()


def run_shell(code: str) -> None:
    """Runs each `hf-dynmask` command; of other commands, the files that they name must be there."""
    for words in commands(code):
        if words[0] == "hf-dynmask":
            result = CliRunner().invoke(app, words[1:])
            assert result.exit_code == 0, f"{shlex.join(words)}\n{result.output}"
        for word in words[1:]:
            if word.startswith(("recipes/", "tests/", ".ci/")):
                assert (ROOT / word).exists(), f"{word} is missing, which `{shlex.join(words)}` names"


def commands(code: str) -> Iterator[list[str]]:
    for line in code.replace("\\\n", " ").splitlines():
        for command in line.split(" && "):
            if words := shlex.split(command, comments=True):
                yield words


def go_to_scratch_root(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes an empty folder look like the root of the repository, and the current one."""
    (folder / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(folder)


def run(block: Block, namespace: dict[str, Any]) -> None:
    """Runs a block of Python or shell; what is in another language is for reading only."""
    if block.language == "python":
        assert len(namespace) > 1 or "hf_dynmask" in block.code, "`hf_dynmask` must be imported first"
        run_python(block.code, namespace)
    elif block.language == "bash":
        run_shell(block.code)
