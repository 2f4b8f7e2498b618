"""The one place where DynMask enters transformers' Auto classes and attention interfaces."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .configuration_dynmask import DynMaskConfig
from .modeling_dynmask import (
    DynMaskForMaskedLM,
    DynMaskForMultipleChoice,
    DynMaskForQuestionAnswering,
    DynMaskForSequenceClassification,
    DynMaskForTokenClassification,
    DynMaskModel,
)

AUTO_CLASSES = {
    AutoModel: DynMaskModel,
    AutoModelForMaskedLM: DynMaskForMaskedLM,
    AutoModelForMultipleChoice: DynMaskForMultipleChoice,
    AutoModelForQuestionAnswering: DynMaskForQuestionAnswering,
    AutoModelForSequenceClassification: DynMaskForSequenceClassification,
    AutoModelForTokenClassification: DynMaskForTokenClassification,
}


def register() -> None:
    """Make `AutoConfig` and the `AutoModel…` classes find DynMask models; may be called again."""
    AutoConfig.register(DynMaskConfig.model_type, DynMaskConfig, exist_ok=True)
    for auto_class, model_class in AUTO_CLASSES.items():
        auto_class.register(DynMaskConfig, model_class, exist_ok=True)
