"""The `hf-dynmask` command: what it prints is what the mask says; bad input is one line and exit code 2."""

import re
import shlex
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib import image, pyplot
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import BartConfig, BertConfig, DebertaConfig, M2M100Config
from typer.main import get_command
from typer.testing import CliRunner

from hf_dynmask import DynMaskConfig, cli, masks
from hf_dynmask.cli import app
from hf_dynmask.modeling import attention_flex, attention_varlen
from hf_dynmask.tools.plotting import EMPTY, FULL, PARTIAL, mask_panels

EXPRESSION = "causal & window(3, 0) | global_tokens(2)"
SEGMENTS = "[[0, 0, 1, 1, 1], [0, 1, 0, 0, 0]]"
ALLOWED = {"█": True, "■": True, "·": False, " ": False}
STATES = {"█": FULL, "▒": PARTIAL, " ": EMPTY}


def run(*arguments, width=80):
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": str(width)})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def squares(output):
    """The glyphs of each sequence's square, borders left out."""
    found = []
    for line in output.splitlines():
        if line.startswith("sequence "):
            found.append([])
        elif row := re.match(r" {0,5}\d+  (.*)", line):
            found[-1].append(row[1].replace("│ ", "")[::2])
    return found


def cells(square):
    return torch.tensor([[ALLOWED[glyph] for glyph in row] for row in square])


# --- show ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [[], ["--block-size", "4"], ["--block-size", "1"]])
@pytest.mark.parametrize("lengths", [[12, 5], [1], [36], [3, 0, 2]])
@pytest.mark.parametrize("expression", [EXPRESSION, "full", "~full", "random(0.5, 7) & causal"])
def test_show_prints_what_the_dense_form_says(expression, lengths, options):
    result = run("show", expression, "--lengths", ",".join(map(str, lengths)), *options, width=160)
    assert result.exit_code == 0
    dense = masks.parse(expression).dense(torch.tensor(lengths))
    found = squares(result.output)
    assert len(found) == len(lengths)
    for square, of_sequence, length in zip(found, dense, lengths, strict=True):
        assert len(square) == length
        assert all(len(row) == length for row in square)
        assert not length or torch.equal(cells(square), of_sequence[0, :length, :length])


def test_show_as_a_user_runs_it():
    command = [sys.executable, "-m", "hf_dynmask.cli", "show", EXPRESSION, "--lengths", "12,5", "--block-size", "4"]
    result = subprocess.run(command, capture_output=True, text=True, check=True, encoding="utf-8")
    # transformers imports torchao, where it is installed, which reports what it has no use for on this machine.
    assert [line for line in result.stderr.splitlines() if "torchao" not in line and "_pytree.py" not in line] == []
    assert result.stdout.startswith(f"{EXPRESSION}\n100 of 169 pairs; blocks of 4: 1 full, 11 partial, 1 empty\n")
    wide = """\
sequence 0: 12 tokens
        0           5           10
     0  ■ ■ ■ ■ │ ■ ■ ■ ■ │ ■ ■ ■ ■
     1  ■ ■ ■ ■ │ ■ ■ ■ ■ │ ■ ■ ■ ■
     2  ■ ■ ■ · │ · · · · │ · · · ·
     3  ■ ■ ■ ■ │ · · · · │ · · · ·
        ────────┼─────────┼─────────
     4  ■ ■ ■ ■ │ ■ · · · │
     5  ■ ■ ■ ■ │ ■ ■ · · │
     6  ■ ■ · ■ │ ■ ■ ■ · │
     7  ■ ■ · · │ ■ ■ ■ ■ │
        ────────┼─────────┼─────────
     8  ■ ■ · · │ · ■ ■ ■ │ ■ · · ·
     9  ■ ■ · · │ · · ■ ■ │ ■ ■ · ·
    10  ■ ■ · · │ · · · ■ │ ■ ■ ■ ·
    11  ■ ■ · · │ · · · · │ ■ ■ ■ ■
"""
    assert wide in re.sub(" +$", "", result.stdout, flags=re.MULTILINE)


@pytest.mark.parametrize("width, block_size", [(80, 128), (40, 128), (24, 256)])
def test_large_lengths_are_drawn_as_blocks(width, block_size):
    """As large as it takes to fit into the terminal."""
    result = run("show", EXPRESSION, "--lengths", "1800,5", width=width)
    (panel,) = mask_panels(EXPRESSION, [1800, 5], block_size=block_size, with_cells=False)
    assert f"blocks of {block_size}: " in result.output
    for square, sequence in zip(squares(result.output), panel.sequences, strict=True):
        assert [[STATES[glyph] for glyph in row] for row in square] == sequence.states.tolist()
    assert max(map(len, result.output.splitlines()[3:-2])) <= width


def test_a_very_long_sequence():
    result = run("show", EXPRESSION, "--lengths", "131072")
    assert "131,072 tokens" in result.output
    assert len(squares(result.output)[0]) == 36


def test_heads_and_fields():
    options = ["--heads", "4", "--field", f"segment_ids={SEGMENTS}"]
    result = run("show", "heads(causal, segments)", "--lengths", "5,3", *options)
    assert result.exit_code == 0
    fields = {"segment_ids": torch.tensor([[0, 0, 1, 1, 1], [0, 1, 0, 0, 0]])}
    dense = masks.parse("heads(causal, segments)").dense(torch.tensor([5, 3]), fields=fields, heads=4)
    first, second, third, fourth = squares(result.output)
    assert "heads 0 to 1: causal" in result.output
    assert "heads 2 to 3: segments" in result.output
    for square, row, head, length in ((first, 0, 0, 5), (second, 1, 1, 3), (third, 0, 2, 5), (fourth, 1, 3, 3)):
        assert torch.equal(cells(square), dense[row, head, :length, :length])


def test_png(tmp_path):
    path = tmp_path / "mask.png"
    result = run("show", EXPRESSION, "--lengths", "12,5", "--png", str(path))
    assert result.output == f"wrote {path}\n"
    height, width, _ = image.imread(path).shape
    assert min(height, width) >= 1000
    pyplot.close("all")


def test_several_masks(tmp_path):
    """In the terminal one after another; in an image side by side."""
    found = [squares(run("show", expression, "--lengths", "5,3").output) for expression in ("causal", "window(1)")]
    both = run("show", "causal", "window(1)", "--lengths", "5,3")
    assert squares(both.output) == found[0] + found[1]
    assert both.output.count("hidden") == 1
    path = tmp_path / "masks.png"
    options = ["--field", f"segment_ids={SEGMENTS}", "--png", str(path)]
    assert run("show", "causal", "segments", "--lengths", "5,3", *options).output == f"wrote {path}\n"
    height, width, _ = image.imread(path).shape
    assert width > 1.5 * height
    pyplot.close("all")


def test_png_without_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    result = run("show", "causal", "--lengths", "3", "--png", str(tmp_path / "mask.png"))
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "error: plots need matplotlib: pip install 'hf_dynmask[plot]'\n"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["causal &", "--lengths", "3"], "column 9: expected a mask, not the end; got 'causal &'"),
        (["full & windw(3)", "--lengths", "3"], "column 8: unknown mask `windw`; did you mean `window`"),
        (["causal", "--lengths", "12,a"], "--lengths must be numbers separated by commas.*; got '12,a'"),
        (["causal", "--lengths", "-3"], "`lengths` must not be negative; got -3"),
        (
            ["segments | prefix", "--lengths", "5,3"],
            r"the mask reads the field `prefix_lengths`: give it as --field 'prefix_lengths=JSON', of shape \(2\)",
        ),
        (["segments", "--lengths", "5,3"], r"`segment_ids`: give it as .*, of shape \(2, 5\)"),
        (["dense", "--lengths", "5,3"], r"`attention_mask`: give it as .*, of shape \(2, 1, 5, 5\)"),
        (["visible", "--lengths", "5,3"], r"`hidden_spans`: give it as .*, of shape \(2, K, 2\)"),
        (["prefix", "--lengths", "5", "--field", "prefix_lengths"], "--field must be NAME=JSON .*; got 'prefix_length"),
        (
            ["segments", "--lengths", "2,1", "--field", "segment_ids=[[0, 1], [0]]"],
            "--field must be .* lists of equal lengths",
        ),
        (["segments", "--lengths", "2", "--field", "segment_ids=[0, 1]"], r"`segment_ids` must have shape \(1, T\)"),
        (["causal", "--lengths", "3", "--field", "x=[1]"], "--field x: the mask does not read it; .* reads: none"),
        (["heads(full, causal)", "--lengths", "3"], "a number of masks that divides the 1 heads; got 2"),
        (["causal", "--lengths", "900", "--block-size", "8"], "--block-size 8 makes 113 blocks, .* room for 36: "),
        (["causal", "--lengths", "3", "--png", "no/such/folder/mask.png"], "No such file or directory"),
        (
            ["causal", "full", "--lengths", "3", "--png", "a.png", "--block-size", "2"],
            "--block-size must be left out for an image of several",
        ),
    ],
)
def test_bad_input_is_one_line(arguments, message):
    result = run("show", *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert re.fullmatch(f"error: .*{message}.*\n", result.stderr), result.stderr


@pytest.mark.parametrize("option", ["--block-size", "--heads"])
def test_numbers_from_one(option):
    result = run("show", "causal", "--lengths", "3", option, "0")
    assert result.exit_code == 2
    assert option in result.stderr
    assert "Traceback" not in result.stderr


# --- env -------------------------------------------------------------------------------------------------------------


def rows_of_table(output):
    """The cells of each row of a table; lines that go on with a row are joined to it."""
    rows = []
    for line in output.splitlines():
        cells = [cell.strip() for cell in line.split("│")[1:-1]]
        if cells and (cells[0] or not rows):
            rows.append([[cell] for cell in cells])
        elif cells:
            for whole, cell in zip(rows[-1], cells, strict=True):
                whole.extend([cell] if cell else [])
    return [tuple("\n".join(whole) for whole in row) for row in rows]


def test_env_without_an_accelerator(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    result = run("env", width=160)
    assert result.exit_code == 0
    assert f"torch {torch.__version__}, " in result.output
    assert "; device: cpu\n" in result.output
    reason = "chosen only on CUDA devices; got 'cpu'"
    rows = [
        (text, "all", "blocks", f"varlen: {reason}\nbanded: {reason}\nflex: {reason}") for text in cli.KINDS_OF_MASKS
    ]
    assert rows_of_table(result.output) == rows


@pytest.mark.parametrize(
    "config, told",
    [
        (BertConfig(), "this bert model computes real tokens alone."),
        (
            BertConfig.from_dict({"dynmask_unpad": False}),
            "padded rows as they are, since its configuration has `dynmask_unpad=False`.",
        ),
        (BartConfig(), "the encoder of this bart model computes real tokens alone; its decoder computes padded rows."),
        (
            M2M100Config(),
            "the encoder of this m2m_100 model computes padded rows as they are, since it takes no `position_ids`;",
        ),
        (DynMaskConfig(), "This dynmask model computes real tokens alone."),
    ],
    ids=["bert", "switched off", "bart", "m2m_100", "ours"],
)
def test_env_of_a_model(config, told, tmp_path):
    config.save_pretrained(tmp_path)
    assert told in " ".join(run("env", "--model", str(tmp_path)).output.split())


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # of old releases
def test_env_of_a_model_that_cannot(tmp_path):
    DebertaConfig().save_pretrained(tmp_path)
    result = run("env", "--model", str(tmp_path))
    assert result.exit_code == 2
    assert "error: attn_implementation='dynmask' needs a model that uses transformers' attention" in result.output


@pytest.mark.parametrize("policy", [None, "", "ACTIVE", "passive", " PASSIVE"])
def test_env_says_how_threads_wait(policy, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if policy is not None:
        monkeypatch.setenv("OMP_WAIT_POLICY", policy)
    output = run("env").output
    assert f"\n{torch.get_num_threads()} threads; OMP_WAIT_POLICY=" in output
    if "passive" in str(policy).lower():
        assert "OMP_WAIT_POLICY=passive: waiting threads leave their cores to others" in output
    else:
        assert f"OMP_WAIT_POLICY={policy or 'unset'}: waiting threads keep their cores busy." in output
        assert "with OMP_WAIT_POLICY=passive" in output


def without_values(make):
    """`make` whose tensors hold no values and may be on any device."""

    def make_fake(*sizes, **options):
        with FakeTensorMode():
            return make(*sizes, **options)

    return make_fake


def test_env_on_cuda(monkeypatch):
    """The choice is the one that attention makes, and so are its reasons."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(attention_varlen, "_tried", lambda *_: None)
    monkeypatch.setattr(attention_flex, "find_spec", lambda name: name)
    monkeypatch.setattr(torch, "empty", without_values(torch.empty))
    result = run("env", width=200)
    assert "; device: cuda (A GPU)\n" in result.output
    assert "OMP_WAIT_POLICY" not in result.output
    rows = rows_of_table(result.output)
    assert rows[:2] == [("full", "all", "varlen", ""), ("causal", "all", "varlen", "")]
    window = "causal & window(255, 0)"
    assert rows[2] == (window, "bfloat16\nbfloat16, dropout", "varlen", "")
    assert rows[3][:3] == (window, "float32\nfloat32, dropout", "banded")
    why = rows[3][3].replace("\n", " ")
    assert "got torch.float32; memory-efficient attention: it supports `full` and `causal`" in why
    general = (
        "varlen: it supports `full`, `causal` and windows; got 'causal | prefix(16)'\n"
        "banded: it supports windows between the tokens of one layout; got 'causal | prefix(16)'"
    )
    assert rows[-3:-1] == [
        ("causal | prefix(16)", "bfloat16\nfloat32", "flex", general),
        (
            "causal | prefix(16)",
            "bfloat16, dropout\nfloat32, dropout",
            "blocks",
            f"{general}\nflex: it has no dropout",
        ),
    ]
    mask, cases, runs, why = rows[-1]
    assert (mask, cases, runs) == ("causal & topk(16)", "all", "blocks")
    assert why.endswith("\nflex: `topk` looks at all keys of a query at once")


COMMANDS: dict[str, Any] = get_command(app).commands  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_an_example_that_runs(name):
    command = COMMANDS[name]
    program, of_command, *arguments = shlex.split(command.epilog.removeprefix("Example: "))
    assert (program, of_command) == ("hf-dynmask", name)
    with command.make_context(name, arguments):  # raises for an option or a value that it does not take
        pass
    help_text = run(name, "--help").output
    assert " ".join(command.epilog.split()) in " ".join(help_text.split())
    assert max(map(len, help_text.splitlines())) <= 80


def test_progress_is_shown_on_a_terminal_alone(monkeypatch, capsys):
    with cli._progress("counting"):
        pass
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes it for a terminal
    with cli._progress("counting"):
        pass
    shown = capsys.readouterr()
    assert shown.out == "" and "counting" in shown.err and "0:00:00" in shown.err


def test_the_entry_point():
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    (target,) = re.findall(r'^hf-dynmask = "(.+)"$', text, flags=re.MULTILINE)
    assert EntryPoint("hf-dynmask", target, "console_scripts").load() is app
