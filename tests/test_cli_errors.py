"""Whatever a command is given, an error is one line on stderr, and the exit code 2."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast, ViTConfig, ViTModel
from typer.testing import CliRunner

from hf_dynmask import DynMaskConfig, DynMaskForMaskedLM, cli
from hf_dynmask.cli import app

SIZES: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
SIZES |= {"vocab_size": 20}
AUDIT = ["--model", "stock", "--batch-size", "2"]


def edited(**changes):
    def edit(folder):
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


def written(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def without_a_weight(folder):
    weights = load_file(folder / "model.safetensors")
    weights.pop(next(name for name in weights if "norm" in name.lower()))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


CHECKPOINTS = {
    "cut": lambda folder: os.truncate(folder / "model.safetensors", 500),
    "empty": written("model.safetensors", b""),
    "garbage": written("model.safetensors", os.urandom(4000)),
    "unweighted": lambda folder: (folder / "model.safetensors").unlink(),
    "partial": without_a_weight,
    "wider": edited(hidden_size=16),
    "deeper": edited(num_hidden_layers=3),
    "list": written("config.json", b"[1]"),
    "null": written("config.json", b"null"),
    "binary": written("config.json", b"\xff\xfe\x00"),
    "unknown": edited(model_type="resnet9000"),
    "words": edited(hidden_size="x"),
    "tokenizer": written("tokenizer.json", b"{"),
    "settings": written("tokenizer_config.json", b"[1]"),
}
DATA = {
    "good.csv": b"text\na a\na\n",
    "empty.csv": b"",
    "empty.json": b"",
    "empty.txt": b"",
    "binary.csv": b"\xff\xfe\x00\x01" * 99,
    "binary.json": b"\xff\xfe\x00\x01" * 99,
    "binary.parquet": b"\xff\xfe\x00\x01" * 99,
    "latin.txt": "übel\n".encode("latin1"),
    "header.csv": b"text\n",
    "numbers.csv": b"a,b\n1,2\n",
    "quotes.csv": b'text\n"a\nb,c,d\n',
    "cut.json": b'{"text":"a"}\n{"text":',
    "null.json": b"null",  # a lone one ends the process of the reader
    "number.json": b"5",
    "nothing.json": b'{"text":null}\n',
    "lists.json": b'{"text":["a","b"]}\n',
    "ids.json": b'{"input_ids":[1,2]}\n{"input_ids":null}\n',
    "letters.json": b'{"input_ids":"abc"}\n',
    "scalar.json": b'{"input_ids":5}\n',
    "marks.json": b'{"input_ids":[1],"attention_mask":["x"]}\n',
    "page.xml": b"<a/>",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Good and broken checkpoints and data, by the names above."""
    root = tmp_path_factory.mktemp("given")
    words = WordLevel({"[PAD]": 0, "a": 1, "[UNK]": 2}, unk_token="[UNK]")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), pad_token="[PAD]", unk_token="[UNK]")
    torch.manual_seed(0)
    models = {"stock": BertForMaskedLM(BertConfig(**SIZES)), "ours": DynMaskForMaskedLM(DynMaskConfig(**SIZES))}
    for kind, model in models.items():
        model.save_pretrained(root / kind)
        tokenizer.save_pretrained(root / kind)
        for name, spoil in CHECKPOINTS.items():
            spoil(shutil.copytree(root / kind, root / f"{kind}-{name}").resolve())
    vit: dict[str, Any] = {name: SIZES[name] for name in SIZES if name != "vocab_size"}
    ViTModel(ViTConfig(**vit, image_size=8, patch_size=4)).save_pretrained(root / "vit")
    for name, content in DATA.items():
        (root / name).write_bytes(content)
    Dataset.from_dict({"text": ["a"]}).save_to_disk(root / "saved")
    os.truncate(next((root / "saved").glob("*.arrow")), 20)
    (root / "dangling.csv").symlink_to("nowhere")
    (root / "nothing-here").mkdir()
    (root / "occupied").mkdir()
    (root / "occupied" / "mine").write_text("mine")
    return root


def run(arguments, folder, monkeypatch):
    monkeypatch.chdir(folder)
    return CliRunner().invoke(app, arguments)


def broken(kind, name, message):
    return [([command, f"{kind}-{name}", *more], message) for command, *more in (["check"], ["convert", "out"])]


UNLIKE = "must hold the weights that its config.json describes; missing or differing in shape are"
GIVEN: list[tuple[list[str], str]] = [
    # The command line
    (["shwo"], "No such command 'shwo'"),
    (["--bogus"], "No such option: --bogus"),
    (["show"], "Missing argument 'EXPR'"),
    (["show", "full"], "Missing option '--lengths'"),
    (["show", "full", "--lengths", "3", "--bogus"], "No such option: --bogus"),
    (["show", "full", "--lengths", "3", "--heads", "x"], "Invalid value for '--heads'"),
    (["show", "full", "--lengths", "3", "--heads", "100000000000"], "Invalid value for '--heads'"),
    (["show", "full", "--lengths", "3", "--block-size", "9" * 30], "Invalid value for '--block-size'"),
    (["check", "stock", "--dtype", "float8"], "Invalid value for '--dtype'"),
    (["env", "x"], "unexpected extra argument"),
    # Lengths, fields and pictures
    (["show", "full", "--lengths", "100000000000"], "at most 1,048,576 tokens; got 100,000,000,000"),
    (["show", "full", "--lengths", ",".join(["600000"] * 2)], "at most 1,048,576 tokens; got 1,200,000"),
    (["show", "full", "--lengths", ""], "--lengths must be numbers separated by commas"),
    (
        ["show", "segments", "--lengths", "5", "--field", "segment_ids=null"],
        "--field must be .*; got 'segment_ids=null'",
    ),
    (["show", "segments", "--lengths", "1", "--field", "segment_ids=[[null]]"], "--field must be .*; got .*null"),
    (["show", "segments", "--lengths", "1", "--field", "segment_ids={}"], "--field must be .*; got .*{}"),
    (["show", "segments", "--lengths", "1", "--field", f"segment_ids=[[{'9' * 30}]]"], "--field must be"),
    (["show", "segments", "--lengths", "1", "--field", "segment_ids=" + "[" * 9000], "--field must be"),
    (["show", "full", "--lengths", "3", "--png", "."], "Is a directory"),
    (["show", "full", "--lengths", "100000", "--block-size", "1", "--png", "a.png"], "100,000 blocks, .* for 4,096"),
    (["show", "fu\x00ll", "--lengths", "3"], "mask does not parse at column"),
    # Checkpoints
    *broken("stock", "cut", "stock-cut is broken or not a checkpoint: SafetensorError"),
    *broken("stock", "empty", "stock-empty is broken or not a checkpoint: SafetensorError"),
    *broken("stock", "garbage", "stock-garbage is broken or not a checkpoint: SafetensorError"),
    *broken("ours", "cut", "ours-cut/model.safetensors cannot be read"),
    *broken("stock", "unweighted", "no file named model.safetensors, .* stock-unweighted"),
    *broken("stock", "partial", f"stock-partial {UNLIKE} bert.*LayerNorm"),
    *broken("stock", "wider", "stock-wider must hold (the )?weights (of the shapes )?that its config.json describes"),
    *broken("stock", "deeper", f"stock-deeper {UNLIKE} bert.encoder.layer.1.*more"),
    *broken("ours", "partial", f"ours-partial {UNLIKE} .*norm"),
    *broken("ours", "wider", f"ours-wider {UNLIKE} "),
    (["export", "ours-deeper", "out"], f"ours-deeper {UNLIKE} model.layers.1"),
    *broken("stock", "list", "stock-list"),
    *broken("ours", "null", "ours-null is broken or not a checkpoint: TypeError"),
    *broken("ours", "binary", "ours-binary/config.json' is not a valid JSON file"),
    *broken("stock", "unknown", "model type `resnet9000`"),
    *broken("stock", "words", "'hidden_size' expected int, got str"),
    (["audit", "good.csv", "--model", "stock-list", "--batch-size", "2"], "stock-list"),
    (["audit", "good.csv", "--model", "stock-tokenizer", "--batch-size", "2"], "stock-tokenizer is broken.*JSONDecode"),
    (["convert", "stock-tokenizer", "out"], "stock-tokenizer is broken or not a checkpoint: JSONDecodeError"),
    (["export", "ours-settings", "out"], "ours-settings is broken or not a checkpoint: (Attribute|Type)Error"),
    (["check", "stock", "--data", "good.csv", "--column", "b"], "must have `b`, a column of text; got text"),
    (["check", "vit"], "a model to check must read tokens; ViTModel reads `pixel_values`"),
    (["check", "nothing-here"], "nothing-here"),
    (["check", "good.csv"], "good.csv"),
    (["check", "no/such/model"], "no/such/model"),
    (["check", ""], ""),
    (["export", "stock", "out"], "stock must be a DynMask checkpoint; got one of type 'bert'"),
    (
        ["convert", "stock", "out", "--to", "bert"],
        "--to must be left out unless the checkpoint is a DynMask one",
    ),
    (["convert", "ours", "out", "--to", "nope"], "nope"),
    # Where to write
    (["convert", "stock", "occupied"], "occupied"),
    (["convert", "stock", "good.csv"], "good.csv"),
    (["export", "ours", "good.csv/out"], "good.csv"),
    (["export", "ours", "/dev/null/out"], "/dev/null"),
    (["audit", "good.csv", *AUDIT, "--output", "no/such/a.png"], "No such file or directory"),
    # Data
    (["audit", "", *AUDIT], "the data must be a file, a folder or a Hub id; there is no file ''"),
    (["audit", "no-such.csv", *AUDIT], "there is no file 'no-such.csv'"),
    (["audit", "dangling.csv", *AUDIT], "there is no file 'dangling.csv'"),
    (["audit", "nothing-here", *AUDIT], "nothing-here"),
    (["audit", "saved", *AUDIT], "saved cannot be read as a saved data set: Expected to read"),
    (["audit", "empty.csv", *AUDIT], "empty.csv cannot be read as csv: No columns"),
    (
        ["audit", "empty.json", *AUDIT],
        "empty.json cannot be read as json: it must begin with an object or a list; got b''",
    ),
    (["audit", "empty.txt", *AUDIT], "empty.txt cannot be read as text"),
    (["audit", "binary.csv", *AUDIT], "binary.csv cannot be read as csv: 'utf-8' codec can't decode"),
    (["audit", "binary.json", *AUDIT], "binary.json cannot be read as json: it must begin"),
    (["audit", "binary.parquet", *AUDIT], "binary.parquet cannot be read as parquet: Parquet magic bytes not found"),
    (["audit", "latin.txt", *AUDIT], "latin.txt cannot be read as text: 'utf-8' codec can't decode"),
    (["audit", "header.csv", *AUDIT], 'Instruction "train" corresponds to no data'),
    (["audit", "numbers.csv", *AUDIT], r"must have a column of text; got a \(int64\), b \(int64\)"),
    (["audit", "quotes.csv", *AUDIT], "quotes.csv cannot be read as csv: Error tokenizing data"),
    (["audit", "cut.json", *AUDIT], "cut.json cannot be read as json: JSON parse error"),
    (["audit", "null.json", *AUDIT], "null.json cannot be read as json: it must begin .*; got b'n'"),
    (["audit", "number.json", *AUDIT], "number.json cannot be read as json: it must begin .*; got b'5'"),
    (["audit", "nothing.json", *AUDIT], r"must have a column of text; got text \(null\)"),
    (["audit", "lists.json", *AUDIT], r"must have a column of text; got text \(List\)"),
    (["audit", "ids.json", *AUDIT], "`input_ids` must hold a list of tokens; got None in example 1"),
    (["audit", "letters.json", *AUDIT], "`input_ids` must hold a list of tokens; got 'abc' in example 0"),
    (["audit", "scalar.json", *AUDIT], "`input_ids` must hold a list of tokens; got 5 in example 0"),
    (["audit", "marks.json", *AUDIT], "`attention_mask` of an example must hold 0 or 1; got .*x"),
    (["audit", "page.xml", *AUDIT], "a data file must end in one of"),
    (["audit", "good.csv", *AUDIT, "--split", "nope"], 'Unknown split "nope"'),
    (["audit", "good.csv", *AUDIT, "--column", "b"], "must have `b`, a column of text; got text"),
    (["audit", "good.csv", *AUDIT, "--target", "text"], "BertConfig needs no column of targets"),
    (["audit", "good.csv", "--model", "stock", "--batch-size", "0"], "Invalid value for '--batch-size'"),
    (["audit", "good.csv", "--model", "stock", "--batch-size", "9" * 20], "Invalid value for '--batch-size'"),
]


@pytest.mark.parametrize("arguments, message", GIVEN, ids=[" ".join(given)[:60] for given, _ in GIVEN])
def test_an_error_is_one_line(arguments, message, folder, monkeypatch):
    result = run(arguments, folder, monkeypatch)
    assert result.exit_code == 2
    assert re.fullmatch(f"error: .*{message}.*\n", result.stderr), result.stderr
    assert not (folder / "out").exists()


def test_libraries_report_again_afterwards(folder, monkeypatch):
    level, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    run(["check", "stock-wider"], folder, monkeypatch)
    assert (transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()) == (level, bars)


@pytest.mark.parametrize(
    "error, message",
    [
        (RuntimeError("several\n\nlines  of it"), "RuntimeError: several lines of it"),
        (KeyError("x"), "KeyError: 'x'"),
        (StopIteration(), "StopIteration"),
        (MemoryError(), "MemoryError"),
        (RecursionError("too deep"), "RecursionError: too deep"),
        (AssertionError(), "AssertionError"),
        (PermissionError(13, "Permission denied", "mine"), r"\[Errno 13\] Permission denied: 'mine'"),
        (ValueError("x" * 5000), "x{400} …"),
        (ValueError(), "ValueError"),
    ],
)
def test_any_error_is_one_line(error, message, monkeypatch):
    def fails(text):
        raise error

    monkeypatch.setattr(cli, "parse", fails)
    result = CliRunner().invoke(app, ["show", "full", "--lengths", "3"])
    assert result.exit_code == 2
    assert re.fullmatch(f"error: {message}\n", result.stderr), result.stderr


def test_an_interrupt_is_no_traceback(monkeypatch):
    def interrupted(text):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "parse", interrupted)
    result = CliRunner().invoke(app, ["show", "full", "--lengths", "3"])
    assert result.exit_code in (1, 130)
    assert "Traceback" not in result.stderr


def test_a_reader_that_stops_reading():
    """As `head` does."""
    arguments = ["-m", "hf_dynmask.cli", "show", "full", "--lengths", ",".join(["30"] * 200)]
    process = subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    said = process.stderr.read()
    process.stderr.close()
    assert process.wait(60) in (0, 1)
    assert "Traceback" not in said
    assert "error:" not in said
