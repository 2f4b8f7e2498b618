"""What a repository says about itself: links, changelog, workflows, hooks."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DOCUMENTS = [  # mkdocs checks the links of the site
    path for folder in (ROOT, ROOT / ".github", ROOT / "model_cards") for path in sorted(folder.glob("*.md"))
]
CHANGELOG = (ROOT / ".github" / "CHANGELOG.md").read_text(encoding="utf-8")
VERSION = re.findall(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)[0]
YAML = [
    path for folder in ("workflows", "ISSUE_TEMPLATE") for path in sorted((ROOT / ".github" / folder).glob("*.yml"))
]


def anchors(text: str) -> set[str]:
    """The anchors of headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"", text):
        target, _, anchor = "".join(link).partition("#")
        if re.match(r"\w+:", target):
            continue
        file = path.parent / target if target else path
        assert file.exists(), f"{path.name} links to {target}, which does not exist"
        assert not anchor or anchor in anchors(file.read_text(encoding="utf-8")), f"{path.name} links to #{anchor}"


def changelog(tag: str, root: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, root / ".ci" / "changelog.py", tag], capture_output=True, text=True)


def test_the_changelog_has_the_version():
    """The newest version with a date is that of the package; what came later is under `Unreleased`."""
    headings = re.findall(r"^## (.*)$", CHANGELOG, flags=re.MULTILINE)
    assert headings[0] == "Unreleased" or headings[0].startswith(f"{VERSION} - ")
    dated = headings[headings[0] == "Unreleased" :]
    assert all(re.fullmatch(r"\d+\.\d+\.\d+ - \d{4}-\d\d-\d\d", heading) for heading in dated)
    assert dated[0].startswith(f"{VERSION} - ")
    assert re.findall(r"^### (.*)$", CHANGELOG, flags=re.MULTILINE)


def test_a_release_has_a_section_with_a_date():
    run = changelog(f"v{VERSION}")
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("### ")


@pytest.mark.parametrize("tag", ["v999.0.0", "Unreleased", ""])
def test_another_tag_is_no_release(tag):
    run = changelog(tag)
    assert run.returncode == 1
    assert f"the tag must be that of the version in pyproject.toml, v{VERSION}" in run.stderr


@pytest.mark.parametrize("heading", [f"## {VERSION}", f"## {VERSION} - Unreleased", "## 0.0.1 - 2020-01-01"])
def test_a_version_without_a_dated_section_is_no_release(heading, tmp_path):
    for file in (".ci/changelog.py", "pyproject.toml"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / file)
    (tmp_path / ".github").mkdir()
    (tmp_path / ".github" / "CHANGELOG.md").write_text(f"# Changes\n\n{heading}\n\n### Added\n\n- More.\n")
    run = changelog(f"v{VERSION}", tmp_path)
    assert run.returncode == 1
    assert f"must have a section '## {VERSION} - YYYY-MM-DD'" in run.stderr


def test_the_release_workflow_asks_the_changelog():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())
    steps = [step.get("run", "") for step in workflow["jobs"]["build"]["steps"]]
    assert any(".ci/changelog.py" in step for step in steps) and any(".ci/wheel" in step for step in steps)
    assert workflow["jobs"]["publish"]["needs"] == "build"


@pytest.mark.parametrize("path", YAML, ids=lambda path: path.name)
def test_yaml_is_valid(path):
    assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict)


def test_hooks_run_the_ruff_of_the_tests():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    (revision,) = [repo["rev"] for repo in hooks["repos"] if repo["repo"].endswith("ruff-pre-commit")]
    assert f"ruff=={revision.removeprefix('v')}\n" in (ROOT / "tests" / "requirements.txt").read_text()
