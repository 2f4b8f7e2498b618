"""Exports checkpoints with the code that loads them."""

from __future__ import annotations

import copy
import json
import os
import re
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..modeling.configuration_base import HERE, code_of
from ..registration import AUTO_CLASSES, model_class
from . import folders
from .reading import read_config, read_model, reading
from .shared_code import verify

FORMER_FILES = ("cached.py", "graph.py")  # code files in exports of earlier releases


def export(model: PreTrainedModel, folder: str | os.PathLike, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    """
    Writes a checkpoint that can be loaded where this package is not installed.

    `AutoModel….from_pretrained(folder, trust_remote_code=True)` loads it there, with torch and transformers only. The
    model has the same outputs, and can be trained and saved again. `config.json` holds the version of this package and
    the SHA-256 of each code file. Where the package is installed, it is used instead of the code in the folder.

    Args:
        model ([`~transformers.PreTrainedModel`]): A model of this package. It is not changed.
        folder (`str` or `os.PathLike`):
            The folder to write. It is written to a temporary folder first and then put in place as a whole, so that the
            old folder is left if something fails. In an earlier export, weights, configuration and code are replaced;
            other files and subfolders are kept.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): Also saved to the folder.

    Raises:
        ValueError: `model` is not a model of this package, or has a `custom(...)` mask; `folder` holds something other
            than an earlier export, is a mount point, or contains the working directory.

    Example:

    ```python
    >>> export(model, "for-everyone", tokenizer)
    >>> model = AutoModelForMaskedLM.from_pretrained("for-everyone", trust_remote_code=True)  # without this package
    ```
    """
    _check(model)
    with replacing(folder) as new:
        write(model, new, tokenizer)


def write(model: PreTrainedModel, folder: Path, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    """Writes an export into an existing folder."""
    config, model.config = model.config, copy.deepcopy(model.config)
    try:
        model.config.auto_map = dict(config.classes_in_code)
        model.save_pretrained(folder)
    finally:
        model.config = config
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    verify(folder)


def load(source: str) -> Any:
    """Loads a DynMask checkpoint as the class that its configuration names.

    Raises:
        ValueError: It is not a DynMask checkpoint, is broken, or lacks weights.
        OSError: There is no such checkpoint.
    """
    config = read_config(source)
    if type(config) not in AUTO_CLASSES:
        raise ValueError(f"{source} must be a DynMask checkpoint; got one of type {config.model_type!r}")
    return read_model(model_class(config), source)


def load_tokenizer(source: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a checkpoint, if there is one."""
    with reading(source):
        return AutoTokenizer.from_pretrained(source) if get_tokenizer_config(source) else None


def replacing(folder: str | os.PathLike) -> AbstractContextManager[Path]:
    """[`hf_dynmask.tools.folders.replacing`] for a `folder` that must be new, empty or an earlier export."""
    return folders.replacing(folder, _written)


def _written(folder: Path) -> set[str] | None:
    """Names of the files that an export has written to a folder; `None` if the folder is not an export.

    A code file counts if `config.json` lists it and this package has a file of that name. A file of weights counts if
    the index lists it.
    """
    code = code_of(folder)
    if code is None:
        return None
    files = {*FORMER_FILES, *(path.name for path in HERE.glob("*.py"))} & code["sha256"].keys()
    return {CONFIG_NAME, GENERATION_CONFIG_NAME, SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME} | files | _shards(folder)


def _shards(folder: Path) -> set[str]:
    """Names of the weight files that the index lists."""
    try:
        names = json.loads((folder / SAFE_WEIGHTS_INDEX_NAME).read_text(encoding="utf-8"))["weight_map"].values()
        return {name for name in names if re.fullmatch(r"model-\d{5}-of-\d{5}\.safetensors", name)}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return set()


def _check(model: PreTrainedModel) -> None:
    known = [ours for classes in AUTO_CLASSES.values() for ours in classes.values()]
    if type(model) not in known:
        names = ", ".join(ours.__name__ for ours in known)
        raise ValueError(f"`model` must be one of {names}; got {type(model).__name__}")
    model.config.check_shareable()
