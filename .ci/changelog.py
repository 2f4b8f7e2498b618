#!/usr/bin/env python3
"""Prints the changelog section of a release, given its tag. Fails if there is no such section, or if it has no date."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
RELEASE = re.compile(r"^## (\d\S*) - (\d{4}-\d\d-\d\d)\n(.*?)(?=^## |\Z)", re.DOTALL | re.MULTILINE)


def main(tag: str) -> None:
    version = tag.removeprefix("v")
    project = re.findall(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    if project != [version]:
        sys.exit(f"error: the tag must be that of the version in pyproject.toml, v{project[0]}; got {tag}")
    changes = (ROOT / ".github" / "CHANGELOG.md").read_text(encoding="utf-8")
    sections = {number: text.strip() for number, _, text in RELEASE.findall(changes)}
    if not sections.get(version):
        sys.exit(f"error: CHANGELOG.md must have a section '## {version} - YYYY-MM-DD'; got {', '.join(sections)}")
    print(sections[version])


if __name__ == "__main__":
    main(*sys.argv[1:])
