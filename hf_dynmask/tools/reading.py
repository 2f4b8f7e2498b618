"""Checkpoints that may be broken: errors in reading them say which one it is and what is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from json import JSONDecodeError
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

EXPECTED = (ValueError, ImportError, OSError, StrictDataclassError)  # their messages say what is wrong
MISMATCH = "ignore_mismatched_sizes"  # the setting that transformers names after its report of weights that do not fit
NAMED = 3  # weights in a message


@contextmanager
def reading(source: str) -> Iterator[None]:
    """Errors of libraries in reading a checkpoint, as a `ValueError` with its name.

    Raises:
        ValueError: Reading failed for a reason that its message does not give.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, EXPECTED) and not isinstance(error, JSONDecodeError | UnicodeError):
            raise
        if MISMATCH in str(error):
            raise ValueError(f"{source} must hold weights of the shapes that its config.json describes") from error
        raise ValueError(f"{source} is broken, or no checkpoint: {type(error).__name__}: {error}") from error


def read_config(source: str) -> PreTrainedConfig:
    """The configuration of a checkpoint.

    Raises:
        ValueError: It is broken, or of an unknown model.
        OSError: There is none.
    """
    with reading(source):
        return AutoConfig.from_pretrained(source)


def read_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint.

    Raises:
        ValueError: It is broken.
        OSError: There is none.
    """
    with reading(source):
        return AutoTokenizer.from_pretrained(source)


def read_model(model_class: Any, source: str, **options: Any) -> Any:
    """A checkpoint with all its weights, none of them made up.

    Raises:
        ValueError: It is broken; weights are missing, or are of other shapes than its configuration says.
        OSError: There is no such checkpoint.
    """
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # told of in place of a long report
    with reading(source):
        model, found = model_class.from_pretrained(source, **options)
    wrong = sorted({*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])})
    if wrong:
        more = f" and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
        raise ValueError(
            f"{source} must hold the weights that its config.json describes; missing or of another shape are "
            f"{', '.join(wrong[:NAMED])}{more}"
        )
    return model
