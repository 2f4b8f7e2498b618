"""Exact dynamic attention masks for Hugging Face Transformers: lengths in, no work on padding.

Importing the package changes seven things in transformers, and has no other effect:

- `AutoConfig` and the `AutoModel…` classes find the models of this package.
- `MODEL_FOR_CAUSAL_LM_MAPPING_NAMES` contains our causal models. The Trainer's label smoothing uses it to decide
  whether to shift the labels.
- `attn_implementation="dynmask"` is registered for the models of transformers.
- `PreTrainedModel.get_correct_attn_implementation`, which resolves a model's `attn_implementation`, is wrapped. A model
  whose configuration has a mask (see [`set_mask`]) gets `"dynmask"`; asking for another implementation raises an error.
- `PreTrainedModel.set_attn_implementation` is wrapped. Asking for `"dynmask"` raises an error if the model computes
  attention by itself, where transformers only logs a warning.
- `masking_utils._preprocess_mask_arguments` is wrapped, so that transformers does not look for sequences in
  `position_ids` if a model runs with `"dynmask"` and the batch says where its sequences are.
- The functions in `AttentionMaskInterface` that make masks for other implementations are wrapped. They raise the same
  error, in case another package has replaced `get_correct_attn_implementation`.

When a stock model first runs with `"dynmask"`, the `forward` of its class is wrapped, so that its layers can look up
the batch. Models of that class with another attention implementation behave as before. Other packages may wrap the same
functions. Importing the package again changes nothing more.
"""

from .conversion import from_transformers, to_transformers
from .data import (
    DataCollatorForDynamicMasking,
    DataCollatorForFeatures,
    DataCollatorForSeq2SeqWithLengths,
    DataCollatorWithLengths,
    TokenBudgetBatchSampler,
    TokenBudgetIterableDataset,
)
from .modeling import masks
from .modeling.attention import dynmask_attention
from .modeling.configuration_dynmask import DynMaskConfig
from .modeling.configuration_dynmask_recurrent import DynMaskRecurrentConfig
from .modeling.configuration_dynmask_seq2seq import DynMaskSeq2SeqConfig
from .modeling.layout import SequenceLayout
from .modeling.modeling_dynmask import (
    DynMaskForCausalLM,
    DynMaskForCTC,
    DynMaskForMaskedLM,
    DynMaskForMultipleChoice,
    DynMaskForQuestionAnswering,
    DynMaskForSequenceClassification,
    DynMaskForTokenClassification,
    DynMaskModel,
    DynMaskPreTrainedModel,
)
from .modeling.modeling_dynmask_recurrent import (
    DynMaskRecurrentForSequenceClassification,
    DynMaskRecurrentForTokenClassification,
    DynMaskRecurrentModel,
    DynMaskRecurrentPreTrainedModel,
)
from .modeling.modeling_dynmask_seq2seq import (
    DynMaskForConditionalGeneration,
    DynMaskSeq2SeqForSequenceClassification,
    DynMaskSeq2SeqModel,
    DynMaskSeq2SeqPreTrainedModel,
)
from .modeling.plan import MaskPlan
from .registration import register
from .stock.attention import set_mask
from .tools.plotting import plot_mask
from .tools.sharing import export
from .training import CapturedStepMixin, DynamicMaskingMixin, MaskSchedule, ThroughputCallback, TokenBudgetMixin

register()

__all__ = [
    "CapturedStepMixin",
    "DataCollatorForDynamicMasking",
    "DataCollatorForFeatures",
    "DataCollatorForSeq2SeqWithLengths",
    "DataCollatorWithLengths",
    "DynMaskConfig",
    "DynMaskForCTC",
    "DynMaskForCausalLM",
    "DynMaskForConditionalGeneration",
    "DynMaskForMaskedLM",
    "DynMaskForMultipleChoice",
    "DynMaskForQuestionAnswering",
    "DynMaskForSequenceClassification",
    "DynMaskForTokenClassification",
    "DynMaskModel",
    "DynMaskPreTrainedModel",
    "DynMaskRecurrentConfig",
    "DynMaskRecurrentForSequenceClassification",
    "DynMaskRecurrentForTokenClassification",
    "DynMaskRecurrentModel",
    "DynMaskRecurrentPreTrainedModel",
    "DynMaskSeq2SeqConfig",
    "DynMaskSeq2SeqForSequenceClassification",
    "DynMaskSeq2SeqModel",
    "DynMaskSeq2SeqPreTrainedModel",
    "DynamicMaskingMixin",
    "MaskPlan",
    "MaskSchedule",
    "SequenceLayout",
    "ThroughputCallback",
    "TokenBudgetBatchSampler",
    "TokenBudgetIterableDataset",
    "TokenBudgetMixin",
    "dynmask_attention",
    "export",
    "from_transformers",
    "masks",
    "plot_mask",
    "set_mask",
    "to_transformers",
]
