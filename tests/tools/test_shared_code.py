"""Changed code is found: by hashes, by what `auto_map` reaches, and by the installed package."""

import json
import os
import re
import shutil
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import StrictDataclassError
from typer.testing import CliRunner

from hf_dynmask import DynMaskConfig, DynMaskForMaskedLM, DynMaskRecurrentConfig, DynMaskRecurrentModel
from hf_dynmask.cli import app
from hf_dynmask.tools.shared_code import verify, verify_code
from hf_dynmask.tools.sharing import export
from stock_models import random_stock

SIZES: dict[str, Any] = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1}


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "model"
    export(DynMaskForMaskedLM(DynMaskConfig(**SIZES, num_attention_heads=2, intermediate_size=8)), folder)
    return folder


@pytest.fixture
def folder(exported, tmp_path) -> Path:
    return shutil.copytree(exported, tmp_path / "model")


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def change(folder: Path, **entries: Any) -> None:
    (folder / "config.json").write_text(json.dumps(read(folder) | entries))


def append(folder: Path, name: str, text: str = "import os\n") -> None:
    with (folder / name).open("a") as file:
        file.write(text)


def rehash(folder: Path, *names: str, of_version: str | None = None) -> None:
    """As one does who changes code and does not want it to be seen."""
    code = read(folder)["dynmask_code"]
    code["sha256"] |= {name: sha256((folder / name).read_bytes()).hexdigest() for name in names}
    change(folder, dynmask_code=code | ({"version": of_version} if of_version else {}))


def edited(folder):
    append(folder, "masks.py")


def edited_and_rehashed(folder):
    append(folder, "masks.py")
    rehash(folder, "masks.py")


def missing(folder):
    (folder / "plan.py").unlink()


def hashes_emptied(folder):
    append(folder, "masks.py")
    change(folder, dynmask_code=read(folder)["dynmask_code"] | {"sha256": {}})


def record_removed(folder):
    config = read(folder)
    del config["dynmask_code"]
    (folder / "config.json").write_text(json.dumps(config))


def one_unlisted(folder):
    code = read(folder)["dynmask_code"]
    append(folder, "masks.py")
    del code["sha256"]["masks.py"]
    change(folder, dynmask_code=code)


def further_module(folder):
    (folder / "extra.py").write_text("import os\n")
    append(folder, "masks.py", "from .extra import os\n")
    rehash(folder, "masks.py", of_version="0.0.1")


def further_module_that_is_listed(folder):
    further_module(folder)
    rehash(folder, "extra.py", of_version=version("hf_dynmask"))


def other_model_class(folder):
    (folder / "extra.py").write_text("class Model: pass\n")
    change(folder, auto_map=read(folder)["auto_map"] | {"AutoModelForMaskedLM": "extra.Model"})


def of_a_tokenizer(folder):
    (folder / "tok.py").write_text("class Tokenizer: pass\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["tok.Tokenizer", None]}}))


def of_a_processor(folder):
    (folder / "processor_config.json").write_text(json.dumps({"auto_map": {"AutoProcessor": "proc.Processor"}}))


def of_another_repository(folder):
    change(folder, auto_map={"AutoModelForMaskedLM": "someone/else--modeling_dynmask.DynMaskForMaskedLM"})


def of_a_path(folder):
    change(folder, auto_map={"AutoModelForMaskedLM": "/home/someone/settings.X"})


def of_a_number(folder):
    change(folder, auto_map={"AutoModelForMaskedLM": 3})


def linked_out(folder):
    (folder / "masks.py").rename(folder.parent / "masks.py")
    (folder / "masks.py").symlink_to("../masks.py")


def a_pipe(folder):
    (folder / "masks.py").unlink()
    os.mkfifo(folder / "masks.py")


CHANGES = {
    edited: "changed or missing: masks.py",
    edited_and_rehashed: "unlike the installed code: masks.py",
    missing: "changed or missing: plan.py",
    hashes_emptied: "must be an export, .* lists none",
    record_removed: "must be an export, .* lists none",
    one_unlisted: "not listed: masks.py",
    further_module: "not listed: extra.py",
    further_module_that_is_listed: "unlike the installed code: .*extra.py",
    other_model_class: "not listed: extra.py",
    of_a_tokenizer: "not listed: tok.py",
    of_a_processor: "not listed: proc.py",
    of_another_repository: "`auto_map` in .*config.json must name a module of the folder and a class; got 'someone",
    of_a_path: "`auto_map` in .*config.json must name a module of the folder and a class; got '/home",
    of_a_number: r"`auto_map\['AutoModelForMaskedLM'\]` must be text, or a list; got 3",
    linked_out: "changed or missing: masks.py",
    a_pipe: "changed or missing: masks.py",
}


@pytest.mark.parametrize("how", CHANGES, ids=lambda how: how.__name__)
def test_changed_code(how, folder):
    how(folder)
    with pytest.raises((ValueError, StrictDataclassError), match=CHANGES[how]):
        verify_code(str(folder))
    result = CliRunner().invoke(app, ["check", str(folder), "--dtype", "float32"])
    assert result.exit_code == 2
    assert result.stdout == ""
    assert re.search(CHANGES[how], result.stderr.replace("\n", " "))


@pytest.mark.parametrize(
    "record",
    [3, [], "text", {}, {"version": 3, "sha256": {}}, {"sha256": {}}, {"version": "0.1.0"}]
    + [{"version": "0.1.0", "sha256": hashes} for hashes in ([], {"masks.py": 3}, {"masks.py": "0"})]
    + [{"version": "0.1.0", "sha256": {name: "0" * 64}} for name in ("../masks.py", "/etc/passwd", "masks", "")],
)
def test_records_of_code_that_are_none(record, folder):
    with pytest.raises(StrictDataclassError, match="`dynmask_code` must |'dynmask_code' expected a dict"):
        DynMaskConfig(dynmask_code=record)
    change(folder, dynmask_code=record)
    with pytest.raises(StrictDataclassError, match="`dynmask_code` must |'dynmask_code' expected a dict"):
        verify_code(str(folder))
    with pytest.raises(ValueError, match="`folder` must be new, empty or an earlier export"):
        export(DynMaskForMaskedLM(DynMaskConfig(**SIZES, num_attention_heads=2, intermediate_size=8)), folder)


def test_what_is_said_of_code_that_was_not_changed(folder):
    assert re.fullmatch(r"the installed hf_dynmask [\d.]+", verify(folder))
    result = CliRunner().invoke(app, ["check", str(folder), "--dtype", "float32"])
    assert result.exit_code == 0
    assert re.search(r"^code: no difference from the installed hf_dynmask [\d.]+$", result.stdout, re.MULTILINE)
    append(folder, "masks.py")
    rehash(folder, "masks.py", of_version="0.0.1")
    said = "the hashes in its own config.json alone: hf_dynmask 0.0.1, which it names, is not installed"
    assert verify(folder) == said


def test_links_of_the_cache_of_the_hub(folder, tmp_path):
    snapshot = tmp_path / "cache" / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    (tmp_path / "cache" / "blobs").mkdir()
    for path in folder.iterdir():
        blob = path.rename(tmp_path / "cache" / "blobs" / sha256(path.read_bytes()).hexdigest())
        (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    assert verify(snapshot)


def test_checkpoints_without_code(tmp_path):
    DynMaskRecurrentModel(DynMaskRecurrentConfig(**SIZES)).save_pretrained(tmp_path / "ours")
    random_stock("bert", "base").save_pretrained(tmp_path / "stock")
    (tmp_path / "ours" / "train.py").write_text("import os\n")  # which nothing reaches
    assert verify_code(str(tmp_path / "ours")) is None
    assert verify_code(str(tmp_path / "stock")) is None
    for name in ("ours", "stock"):
        with pytest.raises(ValueError, match="`folder` must be an export"):
            verify(tmp_path / name)
