"""A configuration is data: what it says never chooses which file is read, written or removed."""

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForMaskedLM

from hf_dynmask import DynMaskConfig, DynMaskForMaskedLM, DynMaskModel
from hf_dynmask.modeling.configuration_base import HERE, hash_of
from hf_dynmask.tools.shared_code import verify
from hf_dynmask.tools.sharing import export

SIZES: dict[str, Any] = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture
def folder(tmp_path) -> Path:
    DynMaskForMaskedLM(DynMaskConfig(**SIZES, intermediate_size=8)).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def change(folder: Path, **entries: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


@pytest.mark.parametrize(
    "reference",
    [
        "{home}/settings.X",
        "../home/settings.X",
        "model/../../home/settings.X",
        "someone/else--modeling_dynmask.DynMaskForMaskedLM",
        "{home}/settings--{home}/settings.X",
        "file://{home}/settings.X",
        "settings.X",
        "cli.app",  # of the package, and nothing that travels
        "conversion/bert.BERT",
        "modeling_dynmask",
        ".",
        "",
        ["modeling_dynmask.DynMaskModel"],
    ],
)
def test_what_is_published_is_not_chosen_by_auto_map(reference, folder, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "settings.py").write_text("PASSWORD = 1\n")
    if isinstance(reference, str):
        reference = reference.format(home=tmp_path / "home")
    change(folder, auto_map={"AutoModelForMaskedLM": reference})
    for name, loaded in {
        "model": AutoModelForMaskedLM.from_pretrained(folder),
        "config": AutoConfig.from_pretrained(folder),
    }.items():
        loaded.save_pretrained(tmp_path / "saved" / name)
        saved = tmp_path / "saved" / name
        assert not {"settings.py", "cli.py", "bert.py"} & set(os.listdir(saved))
        auto_map = json.loads((saved / "config.json").read_text())["auto_map"]
        assert auto_map["AutoModelForMaskedLM"] == "modeling_dynmask.DynMaskForMaskedLM"
        assert verify(saved)


OF_OTHERS = """
from hf_dynmask import DynMaskConfig, DynMaskForMaskedLM


class MyConfig(DynMaskConfig):
    model_type = "my_dynmask"


class MyModel(DynMaskForMaskedLM):
    pass


class MyOwnModel(DynMaskForMaskedLM):
    config_class = MyConfig
"""


@pytest.mark.parametrize("name", ["MyModel", "MyOwnModel"])
def test_classes_of_others_stay_in_auto_map(name, tmp_path, monkeypatch):
    """What transformers has put there for a class that is registered, and saved with its file."""
    (tmp_path / "my_model.py").write_text(OF_OTHERS)
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("my_model")
    model_class = getattr(module, name)
    monkeypatch.setattr(DynMaskConfig, "_auto_class", None)
    model_class.register_for_auto_class("AutoModelForMaskedLM")
    model = model_class(model_class.config_class(**SIZES, intermediate_size=8))
    for _ in range(2):  # into a folder that is new, and over what is there
        model.save_pretrained(tmp_path / "saved")
        auto_map = json.loads((tmp_path / "saved" / "config.json").read_text())["auto_map"]
        assert auto_map["AutoModelForMaskedLM"] == f"my_model.{name}"
        assert (tmp_path / "saved" / "my_model.py").read_text() == OF_OTHERS
    assert (
        auto_map["AutoConfig"]
        == {
            "MyModel": "configuration_dynmask.DynMaskConfig",
            "MyOwnModel": "my_model.MyConfig",
        }[name]
    )
    assert (tmp_path / "saved" / "plan.py").exists() == (name == "MyModel")  # the code of the configuration's package
    monkeypatch.delitem(sys.modules, "my_model")


def test_code_of_others_is_kept_where_a_checkpoint_is_saved(folder, tmp_path, caplog):
    export(DynMaskModel.from_pretrained(folder), tmp_path / "shared")
    caplog.clear()
    model = DynMaskModel.from_pretrained(tmp_path / "shared")
    (tmp_path / "work").mkdir()
    (tmp_path / "elsewhere.py").write_text("mine")
    (tmp_path / "work" / "plan.py").write_text("mine")
    (tmp_path / "work" / "masks.py").symlink_to("../elsewhere.py")
    (tmp_path / "work" / "layout.py").mkdir()
    for _ in range(2):
        model.save_pretrained(tmp_path / "work")
        assert (tmp_path / "work" / "plan.py").read_text() == (tmp_path / "elsewhere.py").read_text() == "mine"
        assert (tmp_path / "work" / "layout.py").is_dir()
        (tmp_path / "work" / "config.json").unlink()
    said = sorted(message for message in caplog.messages if "is kept" in message)
    assert [Path(message.split()[0]).name for message in said] == [
        name for name in ("layout.py", "masks.py", "plan.py") for _ in range(2)
    ]
    assert "does not belong to hf_dynmask: the checkpoint will not load where the package is not installed" in said[0]


def test_code_is_not_written_through_links(folder, tmp_path):
    export(DynMaskModel.from_pretrained(folder), tmp_path / "shared")
    model = DynMaskModel.from_pretrained(tmp_path / "shared")
    model.save_pretrained(tmp_path / "again")
    for name, text in (("masks.py", "mine"), ("plan.py", (HERE / "plan.py").read_text())):
        (tmp_path / name).write_text(text)
        (tmp_path / "again" / name).unlink()
        (tmp_path / "again" / name).symlink_to(f"../{name}")
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "masks.py").read_text() == "mine"
    assert not (tmp_path / "again" / "masks.py").is_symlink()
    assert verify(tmp_path / "again")


def test_files_are_hashed_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_dynmask.modeling.configuration_base.CHUNK", 3)
    (tmp_path / "file").write_bytes(b"0123456789")
    assert hash_of(tmp_path / "file") == "84d89877f0d4041efb6bf91a16f0248f2fd573e6af05c19f96bedb9f882f7882"
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "nothing", "."):
        assert hash_of(tmp_path / name) is None
