"""What the fields of a configuration may hold, which may be a stranger's: a type, a range and a message each."""

from collections.abc import Callable
from dataclasses import fields
from inspect import getattr_static
from os.path import commonprefix
from sys import float_info
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils import logging

from .masks import parse, shown

LARGEST = 2**31 - 1  # of integers
MOST_LABELS = 10**6  # that a configuration may ask for by their number; transformers makes a name for each
Check = Callable[[str, Any], None]
Config = TypeVar("Config", bound=type)

logger = logging.get_logger(__name__)


def ranges(**checks: Check) -> Callable[[Config], Config]:
    """Decorates a configuration, beneath `strict`: has values of fields checked when they are set, after their types.

    Args:
        checks (`Callable`): By field, `check(name, value)` raises a `ValueError` for a value that the field cannot
            have. `None` is not checked.
    """

    def wrap(config: Config) -> Config:
        for name, check in checks.items():
            field = config.__dataclass_fields__[name]
            field.metadata = MappingProxyType({**field.metadata, "validator": [_validator(name, check)]})
        return config

    return wrap


def _validator(name: str, check: Check) -> Callable[[Any], None]:
    def validate(value: Any) -> None:
        if value is not None:
            check(name, value)

    return validate


# --- Checks ----------------------------------------------------------------------------------------------------------


def at_least(minimum: int, maximum: int = LARGEST) -> Check:
    """Integers from `minimum` to `maximum`."""

    def check(name: str, value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"`{name}` must be an integer; got {shown(value)}")
        if value < minimum:
            raise ValueError(f"`{name}` must be at least {minimum}; got {shown(value)}")
        if value > maximum:
            raise ValueError(f"`{name}` must be at most {maximum}; got {shown(value)}")

    return check


def number(wanted: str, is_right: Callable[[float], bool]) -> Check:
    """Finite numbers of which something is right."""

    def check(name: str, value: Any) -> None:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (is_number and abs(value) <= float_info.max and is_right(value)):
            raise ValueError(f"`{name}` must be {wanted}; got {shown(value)}")

    return check


positive = number("a finite number above 0", lambda value: value > 0)
not_negative = number("a finite number of at least 0", lambda value: value >= 0)
probability = number("a number from 0 to 1", lambda value: 0 <= value <= 1)


def one_of(*choices: Any) -> Check:
    """One of some values."""

    def check(name: str, value: Any) -> None:
        if value not in choices:
            raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}; got {shown(value)}")

    return check


def each(check_one: Check) -> Check:
    """A list, every entry of which passes a check."""

    def check(name: str, value: Any) -> None:
        if not isinstance(value, list | tuple):
            raise ValueError(f"`{name}` must be a list; got {shown(value)}")
        for place, entry in enumerate(value):
            check_one(f"{name}[{place}]", entry)

    return check


def activation(name: str, value: Any) -> None:
    """A name of transformers' activations."""
    if value not in ACT2FN:
        raise ValueError(
            f"`{name}` must be the name of an activation of transformers: {', '.join(ACT2FN)}; got {shown(value)}"
        )


def mask_text(name: str, value: Any) -> None:
    """An expression of the mask language."""
    try:
        parse(value)
    except ValueError as error:
        raise ValueError(f"`{name}`: {error}") from None


def rotary(name: str, value: Any) -> None:
    """Parameters of rotary positions, as transformers names them; those it does not name are its to warn of."""
    for key in value.keys() & ROTARY.keys():
        if value[key] is not None or key in NEEDED:
            ROTARY[key](f"{name}[{key!r}]", value[key])


NEEDED = {"rope_type", "rope_theta"}  # which are filled in where they are absent, not where they are `None`
ROTARY: dict[str, Check] = {
    "rope_type": one_of(*{"default": None, **ROPE_INIT_FUNCTIONS}),
    "rope_theta": positive,
    "partial_rotary_factor": positive,
    "factor": positive,
    "original_max_position_embeddings": at_least(1),
    "attention_factor": positive,
    "beta_fast": positive,
    "beta_slow": positive,
    "short_factor": each(positive),
    "long_factor": each(positive),
    "low_freq_factor": positive,
    "high_freq_factor": positive,
    "mscale": not_negative,
    "mscale_all_dim": not_negative,
    "truncate": one_of(True, False),
}


# --- What transformers reads -----------------------------------------------------------------------------------------


def checked_settings(config: PreTrainedConfig, given: dict[str, Any]) -> dict[str, Any]:
    """What a configuration was given beside its own fields, once it is sure that transformers can read it and its own.

    A setting that nobody knows stays an attribute, as everywhere in transformers; one that looks like a slip of the pen
    is warned of.

    Raises:
        ValueError: A setting would replace a method or attribute of the class, or is out of its range.
    """
    names = {field.name for field in fields(config)}
    for name, value in given.items():
        _check_free(type(config), name, value)
        near = [known for known in sorted(names - given.keys()) if _one_slip_apart(name, known)]
        if near and not hasattr(config, name):
            logger.warning(f"`{name}` is no field of {type(config).__name__} and has no effect; is it `{near[0]}`?")
    if given.get("per_layer_config") is not None:
        raise ValueError(
            "`per_layer_config` must be None: DynMask models have equal layers, which may differ in `layer_masks`; got "
            f"{shown(given['per_layer_config'])}"
        )
    if "num_labels" in given:
        at_least(1, MOST_LABELS)("num_labels", given["num_labels"])
    if config.id2label is not None:
        _check_labels(config.id2label)
    for name, value in (("dtype", config.dtype), ("torch_dtype", given.get("torch_dtype"))):
        if isinstance(value, str) and not getattr(getattr(torch, value, None), "is_floating_point", False):
            raise ValueError(f"`{name}` must be the name of a floating dtype of torch; got {shown(value)}")
    return given


def _check_free(config_class: type[PreTrainedConfig], name: str, value: Any) -> None:
    taken = getattr_static(config_class, name, None)
    can_be_set = taken is None or isinstance(taken, property) and taken.fset is not None
    if name.startswith("__") or not (can_be_set or name == "model_type"):
        raise ValueError(
            f"`{name}` must not be given: it is no field of {config_class.__name__}, but part of its code; got "
            f"{shown(value)}"
        )


def _check_labels(id2label: dict) -> None:
    if not id2label:
        raise ValueError("`id2label` must have at least one label; got {}")
    for key in id2label:
        try:
            int(key)
        except ValueError:
            raise ValueError(f"`id2label` must have integers for keys; got {shown(key)}") from None


def _one_slip_apart(name: str, known: str) -> bool:
    """Whether one character is missing, too many or another one, or two neighbours have changed places."""
    start = len(commonprefix([name, known]))
    ends = name[start:], known[start:]
    left, right = (end[: len(end) - len(commonprefix([text[::-1] for text in ends]))] for end in ends)
    return max(len(left), len(right)) == 1 or len(left) == 2 and left == right[::-1]


__all__ = []
