"""transformers' own common model tests, from the source distribution of the installed version.

The wheel carries no tests. The source distribution carries `tests/test_*.py`, but not the subfolders from which these
import relatively; `_STAND_INS` holds the few names that they take from there.
"""

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import transformers

from support.samples import SampleError, fetch_source_distribution

_PACKAGE = "_transformers_tests"

_STAND_INS = {
    "exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    "generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    # What `ConfigTester` passes to every configuration and reads back.
    "utils.test_configuration_utils": {
        "config_common_kwargs": {
            "return_dict": False,
            "output_hidden_states": True,
            "output_attentions": True,
            "dtype": "float16",
            "chunk_size_feed_forward": 5,
            "architectures": ["SomeModel"],
            "id2label": {0: "no", 1: "yes"},
            "label2id": {"no": 0, "yes": 1},
            "problem_type": "regression",
        }
    },
}


class _NoMarkers:
    """In place of `pytest.mark`: the markers of transformers' tests are declared in its own pytest configuration."""

    def __getattr__(self, name: str):
        return lambda test: test


def _import_package(folder: Path) -> None:
    """Makes `folder` importable as `_PACKAGE`, with the stand-ins in place."""
    init = folder / "__init__.py"
    init.touch()
    spec = importlib.util.spec_from_file_location(_PACKAGE, init, submodule_search_locations=[str(folder)])
    assert spec is not None
    sys.modules[_PACKAGE] = importlib.util.module_from_spec(spec)
    for path, names in _STAND_INS.items():
        parent, _, _ = path.partition(".")
        sys.modules[f"{_PACKAGE}.{parent}"] = ModuleType(parent)
        sys.modules[f"{_PACKAGE}.{path}"] = module = ModuleType(path)
        vars(module).update(names)


def load(name: str) -> ModuleType:
    """
    One of transformers' test modules, such as `"test_modeling_common"`.

    Where the source distribution cannot be fetched, the importing test module is skipped; in continuous integration
    (`CI=true`) that is an error.
    """
    if _PACKAGE not in sys.modules:
        try:
            _import_package(fetch_source_distribution("transformers", transformers.__version__) / "tests")
        except SampleError as error:
            if os.environ.get("CI") == "true":
                raise
            pytest.skip(str(error), allow_module_level=True)
    with mock.patch.object(pytest, "mark", _NoMarkers()):
        return importlib.import_module(f"{_PACKAGE}.{name}")
