"""
Runs the `hf-dynmask` command on sample models and data sets.

    python recipes/command.py audit sample:reviews --model sample:minilm --batch-size 32
    python recipes/command.py check sample:minilm --data sample:reviews

A sample can take the place of a model or of a data file. A data sample is replaced with its split `train`.
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from hf_dynmask.cli import app
from support.samples import MODELS, PREFIX, resolve_dataset, resolve_model


def main(arguments: list[str] | None = None) -> None:
    with TemporaryDirectory() as folder:
        given = sys.argv[1:] if arguments is None else arguments
        app([_resolved(argument, Path(folder)) for argument in given], prog_name="hf-dynmask")


def _resolved(argument: str, folder: Path) -> str:
    if not argument.startswith(PREFIX):
        return argument
    if argument.removeprefix(PREFIX) in MODELS:
        return resolve_model(argument)
    path = folder / "sample.parquet"
    resolve_dataset(argument)["train"].to_parquet(path)
    return str(path)


if __name__ == "__main__":
    main()
