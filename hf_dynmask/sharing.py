"""Checkpoints for others: with the code that reads them, and written as a whole or not at all."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from .configuration_base import changed_code
from .registration import AUTO_CLASSES, model_class

CHECKPOINT = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json")


def export(model: PreTrainedModel, folder: str | os.PathLike, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    """
    Writes a checkpoint that works where this package is not installed.

    There `AutoModel….from_pretrained(folder, trust_remote_code=True)` gives the same outputs, with torch and
    transformers alone; the model can be trained, and saved again. `config.json` holds the version of this package and
    the SHA-256 of each file of code. Where the package is installed, it is used, and the code in the folder is not.

    Args:
        model ([`~transformers.PreTrainedModel`]): A model of this package. It is left as it is.
        folder (`str` or `os.PathLike`):
            Is written beside its place first, and put there as a whole: when something fails, what was there stays.
            Of a former export weights, configuration and code are replaced; other files stay.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): Goes into the folder, too.

    Raises:
        ValueError: `model` is not of this package, or has a `custom(...)` mask; `folder` holds something that is not a
            former export.

    Example:

    ```python
    >>> export(model, "for-everyone", tokenizer)
    >>> AutoModelForMaskedLM.from_pretrained("for-everyone", trust_remote_code=True)  # without this package
    ```
    """
    _check(model)
    with replacing(folder) as new:
        write(model, new, tokenizer)


def write(model: PreTrainedModel, folder: Path, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    """What [`export`] writes, into a folder that is there."""
    config, model.config = model.config, copy.deepcopy(model.config)
    try:
        model.config.auto_map = _auto_map(type(config))
        model.save_pretrained(folder)
    finally:
        model.config = config
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    verify(folder)


def load(source: str) -> Any:
    """A checkpoint of ours, of the class that it names.

    Raises:
        ValueError: It is of another model.
        OSError: There is no such checkpoint.
    """
    config = AutoConfig.from_pretrained(source)
    if type(config) not in AUTO_CLASSES:
        raise ValueError(f"{source} must be a DynMask checkpoint; got one of type {config.model_type!r}")
    return model_class(config).from_pretrained(source)


def load_tokenizer(source: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a checkpoint, if there is one."""
    return AutoTokenizer.from_pretrained(source) if get_tokenizer_config(source) else None


def verify(folder: str | os.PathLike) -> None:
    """
    Compares the code in a folder that [`export`] has written with the hashes in its `config.json`.

    Raises:
        ValueError: The folder is no export; a file is missing, or is not what was exported.
    """
    code = code_of(Path(folder))
    if code is None:
        raise ValueError(f"`folder` must be one that was exported, with the hashes of its code; got {folder}")
    if changed := changed_code(code["sha256"], Path(folder)):
        raise ValueError(
            f"the code in {folder} must be what hf_dynmask {code['version']} exported, by the hashes in config.json; "
            f"changed or missing: {', '.join(changed)}"
        )


@contextmanager
def replacing(folder: str | os.PathLike) -> Iterator[Path]:
    """A new folder that takes the place of `folder` at the end of the block, unless there is an error.

    Raises:
        ValueError: `folder` holds something that is not a former export.
    """
    place = Path(folder).resolve()
    code = code_of(place)
    if code is None and place.exists() and (place.is_file() or any(place.iterdir())):
        raise ValueError(f"`folder` must be new, empty or a former export; {folder} holds something else")
    new = place.with_name(f".{place.name}-{uuid4().hex}")
    try:
        if code is None:
            new.mkdir(parents=True)
        else:
            shutil.copytree(place, new, symlinks=True, ignore=shutil.ignore_patterns(*CHECKPOINT, *code["sha256"]))
        yield new
        _put(new, place)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _put(new: Path, place: Path) -> None:
    if not place.exists():
        new.rename(place)
        return
    former = new.with_name(f"{new.name}.former")
    place.rename(former)
    try:
        new.rename(place)
    except OSError:
        former.rename(place)
        raise
    shutil.rmtree(former, ignore_errors=True)


def code_of(folder: Path) -> dict[str, Any] | None:
    """What an export's `config.json` says of its code; `None` of any other folder."""
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8")).get("dynmask_code")
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def _check(model: PreTrainedModel) -> None:
    known = [ours for classes in AUTO_CLASSES.values() for ours in classes.values()]
    if type(model) not in known:
        names = ", ".join(ours.__name__ for ours in known)
        raise ValueError(f"`model` must be one of {names}; got {type(model).__name__}")
    model.config.check_shareable()


def _auto_map(config_class: type[PreTrainedConfig]) -> dict[str, str]:
    """Where code that is loaded from a folder has the classes of this configuration."""
    classes = {AutoConfig: config_class, **AUTO_CLASSES[config_class]}
    return {auto.__name__: f"{ours.__module__.rpartition('.')[2]}.{ours.__name__}" for auto, ours in classes.items()}
