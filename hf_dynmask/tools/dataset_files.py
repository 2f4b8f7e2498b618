"""Reads data sets for the commands."""

from __future__ import annotations

import codecs
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .reading import EXPECTED

FORMATS = {"csv": "csv", "tsv": "csv", "json": "json", "jsonl": "json", "parquet": "parquet", "txt": "text"}
TEXT = ("string", "large_string")  # types of columns
SAVED = ("state.json", "dataset_dict.json")  # files that `save_to_disk` writes, for a data set or for a dict of splits


def read_dataset(source: str, split: str = "train") -> Any:
    """
    Loads one split of a data set.

    Args:
        source (`str`): A Hub id; a local csv, json, parquet or text file (one row per line); a folder of such files;
            or a folder written by `save_to_disk`.
        split (`str`, *optional*, defaults to `"train"`): The split. A single file, or a single data set written by
            `save_to_disk`, is the split `"train"`.

    Returns:
        `datasets.Dataset`

    Raises:
        ImportError: `datasets` is not installed.
        ValueError: The file has another format or is broken; there is no such split; the name is a sample of the
            recipes.
        OSError: There is no such file, folder or Hub id.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError("reading data needs datasets: pip install 'hf_dynmask[data]'") from error
    if source.startswith("sample:"):
        raise ValueError(
            f"samples belong to the recipes: run `python recipes/command.py` instead of `hf-dynmask`; got {source}"
        )
    with _without_bars(datasets):
        return _read(datasets, source, split)


def _read(datasets: Any, source: str, split: str) -> Any:
    path = Path(source)
    if any((path / name).is_file() for name in SAVED):
        with _errors_of(source, "a saved data set"):
            saved = datasets.load_from_disk(source)
        return _split_of(saved, split)
    ending = path.suffix.removeprefix(".")
    if not source or (ending in FORMATS and not path.exists()):
        raise FileNotFoundError(f"the data must be a file, a folder or a Hub id; there is no file {source!r}")
    if not path.is_file():
        return datasets.load_dataset(source, split=split)
    if ending not in FORMATS:
        raise ValueError(f"a data file must end in one of {', '.join(f'.{name}' for name in FORMATS)}; got {source}")
    if FORMATS[ending] == "json":
        _check_json(path)
    options: dict[str, Any] = {"delimiter": "\t"} if ending == "tsv" else {}
    with _errors_of(source, FORMATS[ending]):
        return datasets.load_dataset(FORMATS[ending], data_files=os.path.abspath(path), split=split, **options)


@contextmanager
def _errors_of(source: str, form: str) -> Iterator[None]:
    """Turns any error of a reader into a `ValueError` that names the source."""
    try:
        yield
    except Exception as error:
        if type(error) is ValueError:  # about an unknown split, which the message names
            raise
        reason = error.__cause__ or error
        kind = "" if isinstance(reason, EXPECTED) else f"{type(reason).__name__}: "
        raise ValueError(f"{source} cannot be read as {form}: {kind}{reason}") from error


def _check_json(path: Path) -> None:
    """Raises for files on which readers raise `StopIteration` (empty) or crash the process (a single `null`)."""
    with path.open("rb") as file:
        start = file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()[:1]
    if start not in (b"{", b"["):
        raise ValueError(f"{path} cannot be read as json: it must begin with an object or a list; got {start!r}")


@contextmanager
def _without_bars(datasets: Any) -> Iterator[None]:
    had_bars = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if had_bars:
            datasets.enable_progress_bars()


def _split_of(saved: Any, split: str) -> Any:
    splits = saved if isinstance(saved, dict) else {"train": saved, str(saved.split or "train"): saved}
    if split not in splits:
        raise ValueError(f"the split must be one of {', '.join(map(repr, splits))}; got {split!r}")
    return splits[split]


def text_column(dataset: Any, column: str | None = None) -> list[str]:
    """
    The texts of a column.

    Args:
        dataset (`datasets.Dataset`): The data.
        column (`str`, *optional*): Its name. `None`: `text`, or the first column that holds text.

    Raises:
        ValueError: There is no such column, or it does not hold text.
    """
    columns = [name for name, feature in dataset.features.items() if getattr(feature, "dtype", None) in TEXT]
    if column is None:
        column = next((name for name in ("text", *columns) if name in columns), None)
    if column not in columns:
        wanted = "a column of text" if column is None else f"`{column}`, a column of text"
        raise ValueError(f"the data must have {wanted}; got {_described(dataset.features)}")
    return [text or "" for text in dataset[column]]


def _described(features: Any) -> str:
    return ", ".join(
        f"{name} ({getattr(feature, 'dtype', type(feature).__name__)})" for name, feature in features.items()
    )
