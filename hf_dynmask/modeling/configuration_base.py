"""The base of every DynMask configuration: its format version, and the code that is saved with a shared checkpoint."""

import json
import re
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from shutil import copyfile
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict, validated_field
from transformers.configuration_utils import PreTrainedConfig
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import CONFIG_NAME, logging

from .configuration_former import with_current_names
from .messages import shown

CONFIG_VERSION = 2  # increased when older code would misread what newer code saves; hf_dynmask 0.1.0 has version 1
HERE = Path(__file__).parent  # in the package, or in the copy of a checkpoint's code that transformers runs
REFERENCE = re.compile(r"(\w+)\.\w+")  # a class in an `auto_map`
MODULE = re.compile(r"\w+\.py")
SHA256 = re.compile(r"[0-9a-f]{64}")
CHUNK = 2**20  # bytes

logger = logging.get_logger(__name__)


def _package_version() -> str:
    try:
        return version("hf_dynmask")
    except PackageNotFoundError:  # code that came with a checkpoint
        return "(the code of a checkpoint)"


def _check_version(config_version: int) -> None:
    if config_version > CONFIG_VERSION:
        raise ValueError(
            f"`config_version` must be at most {CONFIG_VERSION}, the newest that hf_dynmask {_package_version()} "
            f"reads; got {config_version}: the checkpoint needs a newer hf_dynmask, or the code that it came with"
        )


def _check_record(code: Any) -> None:
    """Raises unless `code` is `None` or holds the version of the package and the SHA-256 of each file."""
    if code is None:
        return
    code_version, hashes = (code.get("version"), code.get("sha256")) if isinstance(code, dict) else (None, None)
    if not (isinstance(code_version, str) and isinstance(hashes, dict)):
        raise ValueError(f"`dynmask_code` must be {{'version': text, 'sha256': {{file: hash}}}}; got {shown(code)}")
    for name, value in hashes.items():
        if not (MODULE.fullmatch(name) and isinstance(value, str) and SHA256.fullmatch(value)):
            raise ValueError(
                "`dynmask_code` must give a SHA-256 of 64 hexadecimal digits for names such as 'masks.py'; "
                f"got {shown({name: value})}"
            )


@strict
class DynMaskBaseConfig(PreTrainedConfig):
    """
    Base class of [`DynMaskConfig`], [`DynMaskSeq2SeqConfig`] and [`DynMaskRecurrentConfig`].

    Args:
        config_version (`int`, *optional*, defaults to 2):
            Version of the file format. Files of earlier versions are converted to the current version when they are
            loaded.
        dynmask_code (`dict`, *optional*):
            For a checkpoint that was saved with its code: the `version` of this package and the `sha256` of each file.

    Raises:
        StrictDataclassError: The version is newer than this code, or `dynmask_code` is not such a dictionary.
    """

    # The `auto_map` of a checkpoint with code: `module.Class` of each auto class. The registration fills it in.
    classes_in_code: ClassVar[dict[str, str]] = {}

    config_version: int = validated_field(_check_version, default=CONFIG_VERSION)
    dynmask_code: dict[str, Any] | None = validated_field(_check_record, default=None)

    def __post_init__(self, **kwargs):
        self.config_version = CONFIG_VERSION
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        current = with_current_names(config_dict)
        parts: Any = cls.sub_configs
        for part in parts.keys() & current.keys():
            if isinstance(current[part], dict):
                current[part] = with_current_names(current[part])
        return super().from_dict(current, **kwargs)

    @classmethod
    def from_json_file(cls, json_file):
        return cls.from_dict(cls._dict_from_json_file(json_file))

    def check_shareable(self) -> None:
        """Raises a `ValueError` if part of the configuration cannot be saved with a checkpoint."""

    def save_pretrained(self, save_directory, *args, **kwargs):
        self.check_shareable()
        is_ours = __package__ == "hf_dynmask.modeling" and "classes_in_code" in vars(type(self))  # not a subclass
        if is_ours and getattr(self, "auto_map", None):
            self._add_code(Path(save_directory))
        super().save_pretrained(save_directory, *args, **kwargs)

    def _add_code(self, folder: Path) -> None:
        """Copies the files of this configuration's classes into the folder and records their hashes.

        An `auto_map` from a checkpoint is not trusted, so it is written again. It keeps a class of other code if the
        file of that class is in the folder: transformers puts it there when the saved model is of that class. Code that
        came with a checkpoint does not get here: transformers copies it, and its hashes stay as they are.
        """
        files = {HERE / f"{reference.partition('.')[0]}.py" for reference in self.classes_in_code.values()}
        files |= {Path(found) for path in files for found in get_relative_import_files(path)}
        ours = {path.name for path in files}
        theirs = {
            name: reference
            for name, reference in self.auto_map.items()
            if (file := _file_of(reference)) is not None and file not in ours and (folder / file).is_file()
        }
        self.auto_map = self.classes_in_code | theirs
        folder.mkdir(parents=True, exist_ok=True)
        former = code_of(folder)
        for path in files:
            _put(path, folder / path.name, replaces=former is not None and path.name in former["sha256"])
        hashes = {path.name: hash_of(path) for path in sorted(files)}
        self.dynmask_code = {"version": version("hf_dynmask"), "sha256": hashes}


def _file_of(reference: Any) -> str | None:
    """The file of a reference `module.Class`; `None` if it has another form."""
    found = REFERENCE.fullmatch(reference) if isinstance(reference, str) else None
    return f"{found[1]}.py" if found else None


def _put(source: Path, target: Path, replaces: bool) -> None:
    """Copies a source file. It does not follow a link at the target, and does not replace a file of other code."""
    is_there = target.is_symlink() or target.exists()
    if target.is_dir() or (is_there and not replaces and hash_of(target) != hash_of(source)):
        logger.warning(
            f"{target} is kept, since it does not belong to hf_dynmask: the checkpoint will not load where the package "
            "is not installed; save it to another folder"
        )
        return
    if is_there:
        target.unlink()
    copyfile(source, target)


def code_of(folder: Path) -> dict[str, Any] | None:
    """`dynmask_code` of the `config.json` in a folder, see [`DynMaskBaseConfig`]; `None` if there is none."""
    path = folder / CONFIG_NAME
    try:
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        code = config.get("dynmask_code") if isinstance(config, dict) else None
        _check_record(code)
    except (OSError, ValueError, RecursionError):
        return None
    return code


def changed_code(hashes: dict[str, str], folder: Path) -> list[str]:
    """The names of files in `folder` that are missing, or whose SHA-256 differs from `hashes`."""
    return [name for name, value in hashes.items() if hash_of(folder / name) != value]


def warn_of_other_code(config: PreTrainedConfig) -> None:
    """Warns if the code that runs differs from the code that the checkpoint was saved with."""
    code = getattr(config, "dynmask_code", None)
    if code and (changed := changed_code(code["sha256"], HERE)):
        logger.warning_once(
            f"the checkpoint was saved with the code of hf_dynmask {code['version']}; "
            f"the code that runs differs from it in {', '.join(changed)}"
        )


def hash_of(path: Path) -> str | None:
    """SHA-256 of a file; `None` if it is not a regular file."""
    if not path.is_file():
        return None
    found = sha256()
    with path.open("rb") as file:
        while part := file.read(CHUNK):
            found.update(part)
    return found.hexdigest()


__all__ = ["CONFIG_VERSION", "DynMaskBaseConfig"]
