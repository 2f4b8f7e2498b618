"""What every DynMask model has: how it is saved and loaded."""

from collections import OrderedDict
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.modeling_utils import PreTrainedModel

from .configuration_base import DynMaskBaseConfig, warn_of_other_code
from .layout import check_not_scattered


class DynMaskBaseModel(PreTrainedModel):
    """What [`DynMaskPreTrainedModel`] and [`DynMaskRecurrentPreTrainedModel`] share."""

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
            cls.config_class.register_for_auto_class()  # without which nobody finds the model

    def save_pretrained(self, save_directory, *args, **kwargs):
        self.config.check_shareable()
        super().save_pretrained(save_directory, *args, **kwargs)

    def _replicate_for_data_parallel(self):
        replica = super()._replicate_for_data_parallel()
        for name in ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"):
            setattr(replica, name, OrderedDict(getattr(replica, name)))  # which it would share with this model
        replica.register_forward_pre_hook(_check_replica, with_kwargs=True)
        return replica


def _check_replica(replica, args, kwargs) -> None:
    inputs = kwargs.get(replica.main_input_name)
    if inputs is not None:
        check_not_scattered(inputs, kwargs.get("lengths"), getattr(replica.config, "pad_token_id", None))


def _unreadable(source) -> str:
    """The file of weights that is broken; of a Hub id, that."""
    for path in sorted(Path(source).glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError:
            return str(path)
    return f"one of {source}"


__all__ = ["DynMaskBaseModel"]
