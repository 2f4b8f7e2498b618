"""Checks that the code in a checkpoint is what was exported, and that it equals the code of this package."""

from __future__ import annotations

import json
import os
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import snapshot_download
from transformers.dynamic_module_utils import get_relative_imports
from transformers.utils import CONFIG_NAME

from ..modeling.configuration_base import HERE, REFERENCE, changed_code, code_of, hash_of
from ..registration import AUTO_CLASSES
from .reading import read_config

# Files that may have an `auto_map`.
CONFIGS = (
    CONFIG_NAME,
    "tokenizer_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)


def verify_code(source: str) -> str | None:
    """[`verify`] for a folder or Hub id. Returns `None` if there is no code, or if it is not a checkpoint of this
    package."""
    config = read_config(source)
    if type(config) not in AUTO_CLASSES:
        return None
    is_here = Path(source).is_dir()
    folder = Path(source if is_here else snapshot_download(source, allow_patterns=["*.json", "*.py"]))
    return verify(folder) if config.dynmask_code is not None or _reached(folder) else None


def verify(folder: str | os.PathLike) -> str:
    """
    Compares the code in an export with the hashes in its `config.json`, and with this package if it has the version
    that `config.json` names.

    Returns:
        `str`: What the code was compared with.

    Raises:
        ValueError: `config.json` lists no code; a file is missing or differs from what was exported; `auto_map` names
            code that is not listed or not in the folder.
    """
    folder = Path(folder)
    code = code_of(folder)
    if code is None or not code["sha256"]:
        raise ValueError(f"`folder` must be an export, whose config.json lists hashes of its code; {folder} lists none")
    reached, files, of_version = _reached(folder), code["sha256"], f"hf_dynmask {code['version']}"
    is_installed = code["version"] == version("hf_dynmask")
    problems = {
        "changed or missing": [name for name in files if _hash_inside(folder, name) != files[name]],
        "not listed": sorted(reached - files.keys()),
        "unlike the installed code": changed_code(files, HERE) if is_installed else [],
    }
    if any(problems.values()):
        found = "; ".join(f"{what}: {', '.join(names)}" for what, names in problems.items() if names)
        raise ValueError(
            f"the code in {folder} must be what {of_version} exported, by the hashes in config.json; {found}"
        )
    if is_installed:
        return f"the installed {of_version}"
    return f"the hashes in its own config.json alone: {of_version}, which it names, is not installed"


def _reached(folder: Path) -> set[str]:
    """Names of the code files in a folder that transformers would run, starting from the `auto_map` of each
    configuration."""
    found: set[str] = set()
    left = {f"{reference.partition('.')[0]}.py" for name in CONFIGS for reference in _references(folder / name)}
    while left:
        found |= left
        paths = [folder / name for name in left if _hash_inside(folder, name) is not None]
        left = {f"{module}.py" for path in paths for module in _imports(path)} - found
    return found


def _imports(path: Path) -> list[str]:
    try:
        return get_relative_imports(path)
    except UnicodeDecodeError:  # not Python
        return []


def _references(path: Path) -> list[str]:
    """The references in the `auto_map` of a configuration, such as `modeling_dynmask.DynMaskModel`."""
    try:
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (ValueError, RecursionError):
        raise ValueError(f"{path} must be valid JSON; it cannot be read") from None
    auto_map = config.get("auto_map") if isinstance(config, dict) else None
    entries = auto_map.values() if isinstance(auto_map, dict) else [] if auto_map is None else [auto_map]
    references = [part for entry in entries for part in (entry if isinstance(entry, list) else [entry]) if part]
    for reference in references:
        if not (isinstance(reference, str) and REFERENCE.fullmatch(reference)):
            raise ValueError(f"`auto_map` in {path} must name a module of the folder and a class; got {reference!r}")
    return references


def _hash_inside(folder: Path, name: str) -> str | None:
    """SHA-256 of a file in a folder; `None` if it does not exist or is a link to a file elsewhere."""
    inside, file = folder.resolve(), (folder / name).resolve()
    blobs = inside.parent.parent / "blobs"  # snapshots in the Hub's cache consist of links
    return hash_of(file) if file.parent in (inside, blobs) else None
