"""The releases that the tests run on: those that pyproject.toml allows, the earliest included."""

import re
from pathlib import Path

import pytest
from conftest import FAULTS_OF_OLD_RELEASES, WARNINGS_OF_OLD_RELEASES
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]


def dependencies() -> dict[str, Requirement]:
    """What pyproject.toml asks for, the extra `data` included; read as text since Python 3.10 has no `tomllib`."""
    text = (ROOT / "pyproject.toml").read_text()
    text = text.partition("\ndependencies = [")[2].partition("\n[project.scripts]")[0]
    lines = re.findall(r'^(?:    |data = \[)"([^"]+)"', text, flags=re.MULTILINE)
    return {each.name: each for each in map(Requirement, lines)}


def earliest() -> dict[str, Version]:
    lines = re.findall(r"^(\w+)==([\w.]+)", (ROOT / "tests" / "floor.txt").read_text(), flags=re.MULTILINE)
    return {name: Version(version) for name, version in lines}


@pytest.mark.parametrize("name", dependencies())
def test_the_floor_is_the_lower_bound(name):
    (bound,) = [each.version for each in dependencies()[name].specifier if each.operator == ">="]
    assert earliest()[name] == Version(bound)


@pytest.mark.parametrize("faults", [FAULTS_OF_OLD_RELEASES, WARNINGS_OF_OLD_RELEASES])
def test_faults_are_of_releases_that_are_supported(faults):
    for release, _ in faults:
        requirement = Requirement(release)
        assert earliest()[requirement.name] in requirement.specifier
