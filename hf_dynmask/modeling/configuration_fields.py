"""What the fields of a configuration may hold, which may be a stranger's: a type, a range and a message each."""

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

LARGEST = 2**31 - 1  # of integers
MOST_LABELS = 10**5  # that a number may ask for: transformers makes a name for each, in half a second
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


def of_type(kind: Any, wanted: str) -> Check:
    """Values of a type."""

    def check(name: str, value: Any) -> None:
        if not isinstance(value, kind):
            raise ValueError(f"`{name}` must be {wanted}; got {shown(value)}")

    return check


boolean = of_type(bool, "True or False")
text = of_type(str, "text")
dictionary = of_type(dict, "a dictionary")
_label = of_type(str | int, "text")  # or a number, as Python has it


def each(check_one: Check) -> Check:
    """A list, every entry of which passes a check."""

    def check(name: str, value: Any) -> None:
        of_type(list | tuple, "a list")(name, value)
        for place, entry in enumerate(value):
            check_one(f"{name}[{place}]", entry)

    return check


def mapping(check_key: Check, check_value: Check) -> Check:
    """A dictionary that is not empty, every key and value of which pass a check."""

    def check(name: str, value: Any) -> None:
        dictionary(name, value)
        if not value:
            raise ValueError(f"`{name}` must have at least one entry; got {{}}")
        for key, entry in value.items():
            check_key(f"{name}.keys()", key)
            check_value(f"{name}[{key!r}]", entry)

    return check


def activation(name: str, value: Any) -> None:
    """A name of transformers' activations."""
    if value not in ACT2FN:
        raise ValueError(
            f"`{name}` must be the name of an activation of transformers: {', '.join(ACT2FN)}; got {shown(value)}"
        )


def is_by_layer_type(rope_parameters: Any) -> bool:
    """Whether these are rotary parameters by layer type rather than those of all layers."""
    return bool(rope_parameters) and any(isinstance(value, dict) for value in rope_parameters.values())


def rotary(name: str, value: Any) -> None:
    """Rotary parameters as transformers names them, of all layers or by layer type.

    Transformers warns of parameters that it does not know.
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


def _whole(name: str, value: Any) -> None:
    """An integer, or one in text, as keys of JSON are."""
    if not re.fullmatch(r"-?[0-9]{1,18}", str(value), re.ASCII):
        raise ValueError(f"`{name}` must be an integer; got {shown(value)}")


def _floating(name: str, value: Any) -> None:
    """A floating dtype of torch, or its name."""
    dtype = getattr(torch, value, None) if isinstance(value, str) else value
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"`{name}` must be a floating dtype of torch, or its name; got {shown(value)}")


def _references(name: str, value: Any) -> None:
    """Where code has classes: a text each, or a list of them for tokenizers."""
    dictionary(name, value)
    for key, entry in value.items():
        of_type(str | list | tuple, "text, or a list")(f"{name}[{key!r}]", entry)


SETTINGS: dict[str, Check] = {  # not all have a type that transformers checks, nor do all its releases check alike
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
    """What [`~transformers.PreTrainedConfig`] is to be given, checked, as are its own fields.

    A setting that is no field becomes an attribute, as of any configuration. If its name is nearly that of a field, a
    warning says so.

    Args:
        config ([`~transformers.PreTrainedConfig`]): The configuration in its `__post_init__`.
        given (`dict[str, Any]`): What it was given that is no field of its class.
        of_parts (`Iterable[str]`, *optional*): Further names that it knows, as fields of its parts.

    Raises:
        ValueError: A setting would replace a method or attribute of the class, or is out of its range.
    """
    names = {field.name for field in fields(config)}
    absent = sorted(names.union(of_parts) - given.keys())
    for name, value in given.items():
        if name in FORMER_NAMES:
            raise ValueError(f"`{name}` is a former name of `{FORMER_NAMES[name]}`; got {shown(value)}")
        _check_free(type(config), name, value)
        near = [known for known in absent if _one_slip_apart(name, known)]
        if near and not hasattr(config, name):
            logger.warning_once(f"`{name}` is no field of {type(config).__name__}; is it meant to be `{near[0]}`?")
    settings = {name: getattr(config, name) for name in names} | given
    for name in SETTINGS.keys() & settings.keys():
        if settings[name] is not None or name == "num_labels":
            SETTINGS[name](name, settings[name])
    unread = {"per_layer_config": "equal layers, which may differ in `layer_masks`"}
    if "rope_parameters" not in names:
        unread |= dict.fromkeys(("rope_parameters", "rope_scaling"), "no rotary positions of its own")
    for name, reason in unread.items():
        if given.get(name) is not None:
            raise ValueError(f"`{name}` must be None: a {type(config).__name__} has {reason}; got {shown(given[name])}")
    return given


def _check_free(config_class: type[PreTrainedConfig], name: str, value: Any) -> None:
    taken = getattr_static(config_class, name, None)
    if isinstance(taken, property):
        is_code = taken.fset is None
    else:  # a subclass may have defaults that are no fields
        is_code = hasattr(taken, "__get__") or hasattr(PreTrainedConfig, name) and name != "model_type"
    if is_code or name.startswith("__"):
        raise ValueError(
            f"`{name}` must not be given: it is no field of {config_class.__name__}, but part of its code; got "
            f"{shown(value)}"
        )


def check_padding(config: Any) -> None:
    """Raises a `ValueError` where a table of token embeddings has no row for padding."""
    pad, size = config.pad_token_id, config.vocab_size
    if pad is not None and not -size <= pad < size:
        raise ValueError(f"`pad_token_id` must be None or a token id below vocab_size={size}; got {shown(pad)}")


def _one_slip_apart(name: str, known: str) -> bool:
    """Whether one character is missing, too many or another one, or two neighbours have changed places."""
    if abs(len(name) - len(known)) > 1:
        return False
    start = len(commonprefix([name, known]))
    ends = name[start:], known[start:]
    left, right = (end[: len(end) - len(commonprefix([text[::-1] for text in ends]))] for end in ends)
    return max(len(left), len(right)) == 1 or len(left) == 2 and left == right[::-1]


__all__ = []
