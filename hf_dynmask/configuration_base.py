"""What every DynMask configuration has: a version, and the code that goes with a shared checkpoint."""

from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from shutil import copyfile

from huggingface_hub.dataclasses import strict, validated_field
from transformers.configuration_utils import PreTrainedConfig
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import logging

CONFIG_VERSION = 1  # raised where older code would misread what newer code saves
HERE = Path(__file__).parent  # of the package, or of the copy of a checkpoint's code that transformers runs

logger = logging.get_logger(__name__)


def _readable(config_version: int) -> None:
    if config_version > CONFIG_VERSION:
        raise ValueError(
            f"`config_version` must be at most {CONFIG_VERSION}, which is what this code reads; got {config_version}: "
            "the checkpoint needs a newer hf_dynmask, or the code that it came with"
        )


@strict
class DynMaskBaseConfig(PreTrainedConfig):
    """
    What [`DynMaskConfig`], [`DynMaskSeq2SeqConfig`] and [`DynMaskRecurrentConfig`] share.

    Args:
        config_version (`int`, *optional*, defaults to 1): Of the format that the configuration is saved in.

    Raises:
        StrictDataclassError: The version is newer than this code.
    """

    config_version: int = validated_field(_readable, default=CONFIG_VERSION)

    def check_shareable(self) -> None:
        """Raise a `ValueError` where something cannot travel with a checkpoint."""

    def save_pretrained(self, save_directory, *args, **kwargs):
        self.check_shareable()
        if __package__ == "hf_dynmask" and getattr(self, "auto_map", None):
            self._add_code(Path(save_directory))
        super().save_pretrained(save_directory, *args, **kwargs)

    def _add_code(self, folder: Path) -> None:
        """The files that `auto_map` speaks of, into the folder, and their hashes, into this configuration.

        Code that came with a checkpoint is saved again by transformers, and the hashes stay.
        """
        modules = {reference.partition(".")[0] for reference in self.auto_map.values()}
        files = {path for module in modules if (path := HERE / f"{module}.py").is_file()}
        files |= {Path(found) for path in files for found in get_relative_import_files(path)}
        folder.mkdir(parents=True, exist_ok=True)
        for path in files:
            copyfile(path, folder / path.name)
        hashes = {path.name: _hash(path) for path in sorted(files)}
        self.dynmask_code = {"version": version("hf_dynmask"), "sha256": hashes}


def changed_code(hashes: dict[str, str], folder: Path) -> list[str]:
    """The names of files in `folder` that are missing or have another SHA-256 than `hashes` say."""
    return [name for name, value in hashes.items() if not (folder / name).is_file() or _hash(folder / name) != value]


def warn_of_other_code(config: PreTrainedConfig) -> None:
    """Warn where the code that runs is not that which the checkpoint was shared with."""
    code = getattr(config, "dynmask_code", None)
    if code and (changed := changed_code(code["sha256"], HERE)):
        logger.warning_once(
            f"the checkpoint was shared with the code of hf_dynmask {code['version']}; "
            f"what runs now differs from it in {', '.join(changed)}"
        )


def _hash(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()


__all__ = ["CONFIG_VERSION", "DynMaskBaseConfig"]
