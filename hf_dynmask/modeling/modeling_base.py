"""The base of every DynMask model: saving and loading, and checks of the keywords that its forward pass is given."""

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from functools import wraps
from inspect import Parameter, signature
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging
from transformers.utils.generic import TransformersKwargs

from .configuration_base import DynMaskBaseConfig, warn_of_other_code
from .layout import check_not_scattered

logger = logging.get_logger(__name__)

Forward = TypeVar("Forward", bound=Callable[..., Any])
# Keywords that transformers and its Trainer pass to models of any class.
FOR_ANY_MODEL = frozenset(TransformersKwargs.__annotations__) | {"return_dict", "use_cache", "skip_logits"}


def known_keywords(*further: str) -> Callable[[Forward], Forward]:
    """Decorator that makes a `forward` raise for unknown keywords.

    Known keywords are those in its signature, those that transformers passes to models of any class, and `further`.

    Raises:
        TypeError: The `forward` is called with an unknown keyword (the message gives the nearest known one), or with
            `is_causal`, which models of transformers know and a DynMask model cannot follow.
    """

    def decorate(forward: Forward) -> Forward:
        named = [name for name, kind in signature(forward).parameters.items() if kind.kind != Parameter.VAR_KEYWORD]
        known = frozenset(named[1:]) | FOR_ANY_MODEL | frozenset(further)

        @wraps(forward)
        def checked(self, *args, **kwargs):
            for name in kwargs:
                if name not in known:
                    raise TypeError(unknown_keyword(f"{type(self).__name__}.forward()", name, known))
            if kwargs.get("is_causal") is not None:
                raise TypeError(
                    f"`is_causal` must be left out: the masks of a {type(self).__name__} are those of its "
                    f"configuration, see `set_mask`; got {kwargs['is_causal']}"
                )
            return forward(self, *args, **kwargs)

        return cast(Forward, checked)

    return decorate


def unknown_keyword(function: str, name: str, known: frozenset[str]) -> str:
    """The error message for an unknown keyword of a function."""
    nearest = get_close_matches(name, sorted(known), n=1)
    hint = f"did you mean `{nearest[0]}`?" if nearest else f"it knows {', '.join(sorted(known))}"
    return f"{function} got an unexpected keyword argument `{name}`; {hint}"


class DynMaskBaseModel(PreTrainedModel):
    """Base class of [`DynMaskPreTrainedModel`] and [`DynMaskRecurrentPreTrainedModel`]."""

    config: DynMaskBaseConfig

    def __init__(self, config: DynMaskBaseConfig):
        super().__init__(config)
        warn_of_other_code(config)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except SafetensorError as error:
            name = _unreadable(pretrained_model_name_or_path)
            raise ValueError(f"the weights must be whole safetensors files; {name} cannot be read: {error}") from error

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoModel"):
        super().register_for_auto_class(auto_class)
        if cls.config_class is not None:
            cls.config_class.register_for_auto_class()  # auto classes find the model by its configuration

    def save_pretrained(self, save_directory, *args, **kwargs):
        self.config.check_shareable()
        if kwargs.get("state_dict") is None and not all(map(_is_whole, self.parameters())):
            raise ValueError(
                "weights must be whole to be saved; got the parts that ZeRO-3 leaves on each process: save with the "
                "`save_model` of the Trainer, or give the `state_dict` that Accelerate gathers"
            )
        super().save_pretrained(save_directory, *args, **kwargs)

    def _replicate_for_data_parallel(self):
        replica = super()._replicate_for_data_parallel()
        for name in ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"):
            setattr(replica, name, OrderedDict(getattr(replica, name)))  # else shared with this model
        replica.register_forward_pre_hook(_check_replica, with_kwargs=True)
        return replica


def warn_of_adapters_alone(model: Any, mask: object) -> None:
    """Makes a model warn when an adapter is saved without it, since the adapter does not hold the model's `mask`."""
    get_base_model = getattr(model, "get_base_model", None)  # of a PEFT model
    model = model if get_base_model is None else get_base_model()
    model._mask_that_was_set = mask  # type: ignore[assignment]
    if _warn_of_adapter not in model._state_dict_pre_hooks.values():
        model.register_state_dict_pre_hook(_warn_of_adapter)


def warn_of_unread_fields(model: PreTrainedModel, fields: Iterable[str], read: set[str]) -> None:
    """Warns once about a field that is given but that no mask reads, so that it has no effect."""
    for name in fields:
        if name not in read and name != "attention_mask" and not torch.compiler.is_compiling():
            logger.warning_once(
                f"{type(model).__name__} got `{name}`, but no mask of it reads this field; "
                f"its masks read {', '.join(sorted(read)) or 'none'}"
            )


def _warn_of_adapter(model: PreTrainedModel, prefix: str, keep_vars: bool) -> None:
    mask = model._mask_that_was_set
    is_of_adapter = "base_model." in prefix or hasattr(model, "peft_config")
    if mask is not None and is_of_adapter:
        warnings.warn(
            f"an adapter is saved without the mask of its model, {mask!r}: save the model too, or call "
            f"`set_mask(model, {mask!r})` where the adapter is loaded",
            stacklevel=2,
        )


def _is_whole(weight: Tensor) -> bool:
    return getattr(weight, "ds_numel", weight.numel()) == weight.numel()  # DeepSpeed sets `ds_numel`


def _check_replica(replica, args, kwargs) -> None:
    inputs = kwargs.get(replica.main_input_name)
    if inputs is not None:
        check_not_scattered(inputs, kwargs.get("lengths"), getattr(replica.config, "pad_token_id", None))


def _unreadable(source) -> str:
    """The path of the weights file that cannot be read, or a description if `source` is an id on the Hub."""
    for path in sorted(Path(source).glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError:
            return str(path)
    return f"one of {source}"


__all__ = ["DynMaskBaseModel"]
