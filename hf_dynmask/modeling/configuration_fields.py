"""Checks of configuration fields, whose values may come from an untrusted checkpoint: types, ranges and messages."""

import re
from collections.abc import Callable, Iterable
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

from .configuration_former import FORMER_NAMES, LAYER_TYPES
from .messages import shown

LARGEST = 2**31 - 1  # the largest integer that a field may have
MOST_LABELS = 10**5  # the largest `num_labels`: transformers makes a name per label, which takes half a second here
Check = Callable[[str, Any], None]
Config = TypeVar("Config", bound=type)

logger = logging.get_logger(__name__)


def ranges(**checks: Check) -> Callable[[Config], Config]:
    """Class decorator for a configuration, below `strict`: checks the values of fields when they are set.

    Types are checked first.

    Args:
        checks (`Callable`): For each field, a function `check(name, value)` that raises a `ValueError` for an invalid
            value. `None` is not checked.
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


def number(wanted: str, condition: Callable[[float], bool]) -> Check:
    """Finite numbers that meet a condition; `wanted` describes them in the error."""

    def check(name: str, value: Any) -> None:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (is_number and abs(value) <= float_info.max and condition(value)):
            raise ValueError(f"`{name}` must be {wanted}; got {shown(value)}")

    return check


positive = number("a finite number above 0", lambda value: value > 0)
not_negative = number("a finite number of at least 0", lambda value: value >= 0)
probability = number("a number from 0 to 1", lambda value: 0 <= value <= 1)


def one_of(*choices: Any) -> Check:
    """One of the given values."""

    def check(name: str, value: Any) -> None:
        if value not in choices:
            raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}; got {shown(value)}")

    return check


def of_type(kind: Any, wanted: str) -> Check:
    """Values of a type; `wanted` describes them in the error."""

    def check(name: str, value: Any) -> None:
        if not isinstance(value, kind):
            raise ValueError(f"`{name}` must be {wanted}; got {shown(value)}")

    return check


boolean = of_type(bool, "True or False")
text = of_type(str, "text")
dictionary = of_type(dict, "a dictionary")
_label = of_type(str | int, "text")  # in Python, labels may be numbers


def each(check_one: Check) -> Check:
    """A list whose entries all pass a check."""

    def check(name: str, value: Any) -> None:
        of_type(list | tuple, "a list")(name, value)
        for place, entry in enumerate(value):
            check_one(f"{name}[{place}]", entry)

    return check


def mapping(check_key: Check, check_value: Check) -> Check:
    """A non-empty dictionary whose keys and values all pass a check."""

    def check(name: str, value: Any) -> None:
        dictionary(name, value)
        if not value:
            raise ValueError(f"`{name}` must have at least one entry; got {{}}")
        for key, entry in value.items():
            check_key(f"{name}.keys()", key)
            check_value(f"{name}[{key!r}]", entry)

    return check


def activation(name: str, value: Any) -> None:
    """The name of an activation function of transformers."""
    if value not in ACT2FN:
        raise ValueError(
            f"`{name}` must be the name of an activation of transformers: {', '.join(ACT2FN)}; got {shown(value)}"
        )


def is_by_layer_type(rope_parameters: Any) -> bool:
    """Whether there are rotary parameters for each layer type rather than one set for all layers."""
    return bool(rope_parameters) and any(isinstance(value, dict) for value in rope_parameters.values())


def rotary(name: str, value: Any) -> None:
    """Rotary parameters under transformers' names, for all layers or by layer type.

    Transformers itself warns about unknown parameters.
    """
    dictionary(name, value)
    if is_by_layer_type(value):
        for kind, parameters in value.items():
            one_of(*LAYER_TYPES)(f"{name}.keys()", kind)
            dictionary(f"{name}[{kind!r}]", parameters)
            _rotary_parameters(f"{name}[{kind!r}]", parameters)
    else:
        _rotary_parameters(name, value)


def _rotary_parameters(name: str, value: dict[str, Any]) -> None:
    for key in value.keys() & ROTARY.keys():
        if value[key] is not None or key in NEEDED:
            ROTARY[key](f"{name}[{key!r}]", value[key])


NEEDED = {"rope_type", "rope_theta"}  # must not be `None`: transformers only fills them in if they are absent
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


def _whole(name: str, value: Any) -> None:
    """An integer, or its text, since JSON keys are text."""
    if not re.fullmatch(r"-?[0-9]{1,18}", str(value), re.ASCII):
        raise ValueError(f"`{name}` must be an integer; got {shown(value)}")


def _floating(name: str, value: Any) -> None:
    """A floating dtype of torch, or its name."""
    dtype = getattr(torch, value, None) if isinstance(value, str) else value
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"`{name}` must be a floating dtype of torch, or its name; got {shown(value)}")


def _references(name: str, value: Any) -> None:
    """An `auto_map`: a reference per auto class, or a list of references for tokenizers."""
    dictionary(name, value)
    for key, entry in value.items():
        of_type(str | list | tuple, "text, or a list")(f"{name}[{key!r}]", entry)


SETTINGS: dict[str, Check] = {  # transformers checks only some of these types, and not the same ones in all releases
    "transformers_version": text,
    "architectures": each(text),
    "output_hidden_states": boolean,
    "output_attentions": boolean,
    "return_dict": boolean,
    "dtype": _floating,
    "torch_dtype": _floating,
    "chunk_size_feed_forward": at_least(0),
    "is_encoder_decoder": boolean,
    "num_labels": at_least(1, MOST_LABELS),
    "id2label": mapping(_whole, _label),
    "label2id": mapping(_label, _whole),
    "problem_type": one_of("regression", "single_label_classification", "multi_label_classification"),
    "auto_map": _references,
    "attn_implementation": of_type(str | dict, "text, or a dictionary"),
    "rope_scaling": rotary,
    "rope_theta": positive,
    "partial_rotary_factor": positive,
    "layer_types": each(text),
    "mlp_layer_types": each(text),
    "mtp_layer_types": each(text),
}


def checked_settings(config: PreTrainedConfig, given: dict[str, Any], of_parts: Iterable[str] = ()) -> dict[str, Any]:
    """Checks the settings that a configuration passes on to [`~transformers.PreTrainedConfig`], and its own fields.

    A setting that is not a field becomes an attribute, as in any configuration. If its name is almost that of a field,
    a warning says so.

    Args:
        config ([`~transformers.PreTrainedConfig`]): The configuration, which is in its `__post_init__`.
        given (`dict[str, Any]`): The settings that are not fields of its class; they are returned.
        of_parts (`Iterable[str]`, *optional*): Names of fields that belong to its parts.

    Raises:
        ValueError: A setting would replace a method or attribute of the class, or is out of its range.
    """
    names = {field.name for field in fields(config)}
    not_given = sorted(names.union(of_parts) - given.keys())
    for name, value in given.items():
        if name in FORMER_NAMES:
            raise ValueError(f"`{name}` is a former name of `{FORMER_NAMES[name]}`; got {shown(value)}")
        _check_free(type(config), name, value)
        near = [known for known in not_given if _one_slip_apart(name, known)]
        if near and not hasattr(config, name):
            logger.warning_once(f"`{name}` is no field of {type(config).__name__}; is it meant to be `{near[0]}`?")
    settings = {name: getattr(config, name) for name in names} | given
    for name in SETTINGS.keys() & settings.keys():
        if settings[name] is not None or name == "num_labels":
            SETTINGS[name](name, settings[name])
    unsupported = {"per_layer_config": "equal layers, which may differ in `layer_masks`"}
    if "rope_parameters" not in names:
        unsupported |= dict.fromkeys(("rope_parameters", "rope_scaling"), "no rotary positions of its own")
    for name, reason in unsupported.items():
        if given.get(name) is not None:
            raise ValueError(f"`{name}` must be None: a {type(config).__name__} has {reason}; got {shown(given[name])}")
    return given


def _check_free(config_class: type[PreTrainedConfig], name: str, value: Any) -> None:
    """Raises if a setting would replace a method or attribute of the class."""
    taken = getattr_static(config_class, name, None)
    if isinstance(taken, property):
        is_code = taken.fset is None
    else:  # plain class attributes may be defaults of a subclass
        is_code = hasattr(taken, "__get__") or hasattr(PreTrainedConfig, name) and name != "model_type"
    if is_code or name.startswith("__"):
        raise ValueError(
            f"`{name}` must not be given: it is no field of {config_class.__name__}, but part of its code; got "
            f"{shown(value)}"
        )


def check_padding(config: Any) -> None:
    """Raises a `ValueError` if the table of token embeddings has no row for padding."""
    pad, size = config.pad_token_id, config.vocab_size
    if pad is not None and not -size <= pad < size:
        raise ValueError(f"`pad_token_id` must be None or a token id below vocab_size={size}; got {shown(pad)}")


def _one_slip_apart(name: str, known: str) -> bool:
    """Whether two names differ by one missing, extra or wrong character, or by two swapped neighbours."""
    if abs(len(name) - len(known)) > 1:
        return False
    start = len(commonprefix([name, known]))
    ends = name[start:], known[start:]
    left, right = (end[: len(end) - len(commonprefix([text[::-1] for text in ends]))] for end in ends)
    return max(len(left), len(right)) == 1 or len(left) == 2 and left == right[::-1]


__all__ = []
