"""Registers DynMask with transformers' Auto classes and attention interfaces. No other module does."""

from collections.abc import Callable
from functools import wraps
from importlib import import_module
from typing import Any

from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForCTC,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
    masking_utils,
)

from .modeling.configuration_dynmask import DynMaskConfig
from .modeling.configuration_dynmask_recurrent import DynMaskRecurrentConfig
from .modeling.configuration_dynmask_seq2seq import DynMaskSeq2SeqConfig
from .modeling.modeling_dynmask import (
    DynMaskForCausalLM,
    DynMaskForCTC,
    DynMaskForMaskedLM,
    DynMaskForMultipleChoice,
    DynMaskForQuestionAnswering,
    DynMaskForSequenceClassification,
    DynMaskForTokenClassification,
    DynMaskModel,
)
from .modeling.modeling_dynmask_recurrent import (
    DynMaskRecurrentForSequenceClassification,
    DynMaskRecurrentForTokenClassification,
    DynMaskRecurrentModel,
)
from .modeling.modeling_dynmask_seq2seq import (
    DynMaskForConditionalGeneration,
    DynMaskSeq2SeqForSequenceClassification,
    DynMaskSeq2SeqModel,
)
from .stock import models as stock_models
from .stock.attention import dynmask_attention_forward
from .stock.batches import NAME
from .stock.masks import dynmask_mask, states_sequences

AUTO_CLASSES = {
    DynMaskConfig: {
        AutoModel: DynMaskModel,
        AutoModelForCausalLM: DynMaskForCausalLM,
        AutoModelForCTC: DynMaskForCTC,
        AutoModelForMaskedLM: DynMaskForMaskedLM,
        AutoModelForMultipleChoice: DynMaskForMultipleChoice,
        AutoModelForQuestionAnswering: DynMaskForQuestionAnswering,
        AutoModelForSequenceClassification: DynMaskForSequenceClassification,
        AutoModelForTokenClassification: DynMaskForTokenClassification,
    },
    DynMaskRecurrentConfig: {
        AutoModel: DynMaskRecurrentModel,
        AutoModelForSequenceClassification: DynMaskRecurrentForSequenceClassification,
        AutoModelForTokenClassification: DynMaskRecurrentForTokenClassification,
    },
    DynMaskSeq2SeqConfig: {
        AutoModel: DynMaskSeq2SeqModel,
        AutoModelForSeq2SeqLM: DynMaskForConditionalGeneration,
        AutoModelForSequenceClassification: DynMaskSeq2SeqForSequenceClassification,
    },
}


def register() -> None:
    """Registers the models with `AutoConfig` and the `AutoModel…` classes, and `attn_implementation="dynmask"`.

    May be called more than once.
    """
    for config_class, model_classes in AUTO_CLASSES.items():
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        classes = {AutoConfig: config_class, **model_classes}
        config_class.classes_in_code = {auto.__name__: _code_reference(ours) for auto, ours in classes.items()}
        for auto_class, model_class in model_classes.items():
            auto_class.register(config_class, model_class, exist_ok=True)
    AttentionInterface.register(NAME, dynmask_attention_forward)
    AttentionMaskInterface.register(NAME, dynmask_mask)
    _prepare_stock_models()
    _skip_sequence_detection()
    _refuse_other_attention()


def _code_reference(ours: type) -> str:
    """The `auto_map` entry for a class in an exported folder, such as `modeling_dynmask.DynMaskModel`."""
    return f"{ours.__module__.rpartition('.')[2]}.{ours.__name__}"


def model_class(config: PreTrainedConfig) -> Any:
    """The class that a DynMask checkpoint names in `architectures`; the base model if it names none."""
    classes, names = AUTO_CLASSES[type(config)], config.architectures or ()
    return next((ours for ours in classes.values() if ours.__name__ in names), classes[AutoModel])


def _prepare_stock_models() -> None:
    """Prepares or rejects a stock model when its `attn_implementation` is set.

    Transformers accepts a registered name for every model. Without this, a model with its own attention code would
    silently run that code, and a model with a saved mask would ignore the mask.
    """
    resolve = PreTrainedModel.get_correct_attn_implementation
    if hasattr(resolve, "settles_dynmask"):  # `functools.wraps` copies the attribute
        return

    @wraps(resolve)
    def get_correct_attn_implementation(self, requested_attention, is_init_check=False):
        newest = import_module(stock_models.__name__)  # in case the package was imported again
        return resolve(self, newest.settled(self, requested_attention), is_init_check)

    switch = PreTrainedModel.set_attn_implementation

    @wraps(switch)
    def set_attn_implementation(self, attn_implementation, *args, **kwargs):
        named = attn_implementation.get("") if isinstance(attn_implementation, dict) else attn_implementation
        if named == NAME:  # transformers only logs it where a model cannot
            import_module(stock_models.__name__).check_uses_interface(self)
        return switch(self, attn_implementation, *args, **kwargs)

    get_correct_attn_implementation.settles_dynmask = True  # type: ignore[attr-defined]
    PreTrainedModel.get_correct_attn_implementation = get_correct_attn_implementation
    PreTrainedModel.set_attn_implementation = set_attn_implementation


def _skip_sequence_detection() -> None:
    """Keeps transformers from detecting sequences in `position_ids` if the batch already says where they are.

    Detection would read values from the device, and build a mask for sequences that are already kept apart.
    """
    prepare = getattr(masking_utils, "_preprocess_mask_arguments", None)
    if prepare is None or hasattr(prepare, "trusts_stated_sequences"):
        return

    @wraps(prepare)
    def preprocess_mask_arguments(*args, **kwargs):
        config = kwargs["config"] if "config" in kwargs else args[0]
        if states_sequences(config):
            if "position_ids" in kwargs:
                kwargs["position_ids"] = None
            else:  # the fifth argument
                args = (*args[:4], None, *args[5:])
        return prepare(*args, **kwargs)

    preprocess_mask_arguments.trusts_stated_sequences = True  # type: ignore[attr-defined]
    masking_utils._preprocess_mask_arguments = preprocess_mask_arguments


def _refuse_other_attention() -> None:
    """Makes other attention implementations raise an error if the configuration has a mask expression.

    This also holds if another package replaces `get_correct_attn_implementation`, or the `forward` of a class, without
    calling ours.
    """
    for name, make_mask in list(AttentionMaskInterface._global_mapping.items()):
        if name != NAME and not hasattr(make_mask, "refuses_dynmask"):
            AttentionMaskInterface.register(name, _refusing(name, make_mask))


def _refusing(name: str, make_mask: Callable) -> Callable:
    @wraps(make_mask)
    def refusing(*args, **kwargs):
        stock_models.check_followed(kwargs.get("config"), name)
        return make_mask(*args, **kwargs)

    refusing.refuses_dynmask = True  # type: ignore[attr-defined]
    return refusing
