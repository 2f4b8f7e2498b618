"""What every test run starts from."""

import gc
import os
from importlib.metadata import version

import pytest
from packaging.requirements import Requirement

# The tests read local folders only. Set before any Hugging Face library is imported, which reads it once.
os.environ["HF_HUB_OFFLINE"] = "1"

# Tests that meet faults of old releases -> which releases have the fault, and what it is. They must fail there.
FAULTS_OF_OLD_RELEASES: dict[str, tuple[str, str]] = {}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        release, fault = FAULTS_OF_OLD_RELEASES.get(item.nodeid, ("", ""))
        if release and version(Requirement(release).name) in Requirement(release).specifier:
            item.add_marker(pytest.mark.xfail(reason=f"{release}: {fault}"))


def pytest_collection_finish():
    """Each training collects garbage; the modules that are loaded by now are none, and need not be looked at again."""
    gc.freeze()
