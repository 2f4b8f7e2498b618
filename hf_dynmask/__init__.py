"""Exact dynamic attention masks for Hugging Face Transformers: lengths in, no work on padding.

Importing the package changes six things in transformers, and has no other effect:

- `AutoConfig` and the `AutoModel…` classes find its models.
- `MODEL_FOR_CAUSAL_LM_MAPPING_NAMES`, by which the Trainer's label smoothing knows whose labels to shift, has the names
  of its causal models.
- `attn_implementation="dynmask"` is known, for transformers' own models.
- `PreTrainedModel.get_correct_attn_implementation`, by which a model settles on its attention, is wrapped. A model
  whose configuration has a mask, see [`set_mask`], gets `"dynmask"`; another attention is an error.
- `masking_utils._preprocess_mask_arguments` is wrapped, so that transformers looks for no sequences in `position_ids`
  where a model runs with `"dynmask"` on a batch that says where they are.
- The functions of `AttentionMaskInterface`, which make the masks of other attention, raise that error too: should
  another package have put its own method in place of the one above.

Where a model of transformers is first to run with `"dynmask"`, the `forward` of its class is wrapped, so that its
layers can look up what it was given. Models of the class that run with another attention behave as before. All of it
may be wrapped by others, and happens once, however often the package is imported.
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
