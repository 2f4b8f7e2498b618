"""Reads checkpoints that may be broken. Errors name the checkpoint and say what is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from json import JSONDecodeError
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

EXPECTED = (ValueError, ImportError, OSError, StrictDataclassError)  # errors whose messages say what is wrong
MISMATCH = "ignore_mismatched_sizes"  # the option that transformers suggests when weights do not fit
NAMED = 3  # the number of weights that a message names


@contextmanager
def reading(source: str) -> Iterator[None]:
    """Turns library errors without a helpful message into a `ValueError` that names the checkpoint.

    Raises:
        ValueError: Reading failed, and the library's message does not say why.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, EXPECTED) and not isinstance(error, JSONDecodeError | UnicodeError):
            raise
        if MISMATCH in str(error):
            raise ValueError(f"{source} must hold weights of the shapes that its config.json describes") from error
        raise ValueError(f"{source} is broken or not a checkpoint: {type(error).__name__}: {error}") from error


def read_config(source: str) -> PreTrainedConfig:
    """The configuration of a checkpoint.

    Raises:
        ValueError: It is broken, or its model type is unknown.
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
    """Loads a checkpoint, of which no weight may be missing.

    Raises:
        ValueError: It is broken; weights are missing or differ in shape from its configuration.
        OSError: There is no such checkpoint.
    """
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # for the error below
    with reading(source):
        model, found = model_class.from_pretrained(source, **options)
    wrong = sorted({*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])})
    if wrong:
        more = f" and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
        raise ValueError(
            f"{source} must hold the weights that its config.json describes; missing or differing in shape are "
            f"{', '.join(wrong[:NAMED])}{more}"
        )
    return model
