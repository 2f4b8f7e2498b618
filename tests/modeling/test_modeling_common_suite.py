"""Our models under transformers' own common model tests; every test that is skipped stands in a table below."""

import re
import tempfile
import unittest

import pytest
import torch

from hf_dynmask import (
    DynMaskConfig,
    DynMaskForCausalLM,
    DynMaskForConditionalGeneration,
    DynMaskForCTC,
    DynMaskForMaskedLM,
    DynMaskForMultipleChoice,
    DynMaskForQuestionAnswering,
    DynMaskForSequenceClassification,
    DynMaskForTokenClassification,
    DynMaskModel,
    DynMaskRecurrentConfig,
    DynMaskRecurrentForSequenceClassification,
    DynMaskRecurrentForTokenClassification,
    DynMaskRecurrentModel,
    DynMaskSeq2SeqConfig,
    DynMaskSeq2SeqForSequenceClassification,
    DynMaskSeq2SeqModel,
)
from transformers_suite import load

modeling_common = load("test_modeling_common")
configuration_common = load("test_configuration_common")

# The suite knows what a model is for by the tables of the Auto classes, into which `register` does not write.
MODEL_CLASSES = {
    "MODEL_MAPPING_NAMES": DynMaskModel,
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": DynMaskForCausalLM,
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES": DynMaskForMaskedLM,
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": DynMaskForSequenceClassification,
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES": DynMaskForTokenClassification,
    "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES": DynMaskForQuestionAnswering,
    "MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES": DynMaskForMultipleChoice,
}
RECURRENT_CLASSES = {
    "MODEL_MAPPING_NAMES": DynMaskRecurrentModel,
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": DynMaskRecurrentForSequenceClassification,
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES": DynMaskRecurrentForTokenClassification,
}
SEQ2SEQ_CLASSES = {
    "MODEL_MAPPING_NAMES": DynMaskSeq2SeqModel,
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES": DynMaskForConditionalGeneration,
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": DynMaskSeq2SeqForSequenceClassification,
}
FAMILIES = {
    DynMaskConfig: MODEL_CLASSES,
    DynMaskRecurrentConfig: RECURRENT_CLASSES,
    DynMaskSeq2SeqConfig: SEQ2SEQ_CLASSES,
}
for config_class, model_classes in FAMILIES.items():
    for table, model_class in model_classes.items():
        names = getattr(modeling_common, table)
        setattr(modeling_common, table, {**names, config_class.model_type: model_class.__name__})

# Names of tests (regular expressions that match them whole) -> why they are skipped.
NOT_FOR_US = {
    r"test_generation_tester_mixin_inheritance": "the source distribution has no generation tests: test_generation.py",
    r"test_sdpa_can_dispatch_non_composite_models": "it wants `sdpa` as the default; ours is `dynmask`",
    r"test_(moe|output_router|eager_matches_batched_and_grouped)_\w+": "there is no mixture of experts",
    r"test_(can_load_from_already_mapped_keys|reverse_loading_mapping)": "no weights are renamed while loading",
    r"test_keep_in_fp32_modules(_exist|_strict\w*)?": "no module has to stay in float32",
    r"test_bc_cache_name_forward": "it wants a warning for one of the two names; both are good: test_modeling_base.py",
    r"test_capture_outputs_decorator": "hidden states are returned by the model's loop, not caught by hooks",
    r"test_can_capture_specific_layers_hidden_states": "`output_hidden_states` means all layers or none",
    r"test_resize_position_vector_embeddings": "as for stock BERT, a position table is not resized",
    r"test_sliding_window_mask": "a window is a mask expression, not the option `sliding_window`",
    r"test_(tp_plan|tied_head_has_a_tp_plan)_\w+": "there is no tensor-parallel plan",
    r"test_(vision_axial_rope|model_rope_with_partial_rotation)": "rotary positions have one axis and turn whole heads",
    r"test_eager_matches_sdpa_inference_\w+_output_attentions": "weights are an error under `sdpa`, not just absent",
}
NOT_WITH_ONE_SIDE = {
    r"test_\w+_composite_models?": "a DynMask model is not made of several models",
    r"test_internal_model_config_and_subconfig_are_same": "DynMaskConfig has no configurations inside",
    r"test_encoder_decoder_loss_no_double_shift": "there is no encoder-decoder",
}
NOT_WITHOUT_ROTARY = {r"test_model_rope_\w+": "runs on the configuration with rotary positions"}
NOT_WITH_FRAMES = {
    r"test_(inputs_embeds\w*|model_get_set_embeddings|resize_(tokens_)?embeddings\w*)": "frames are not in a table",
    r"test_enable_input_require_grads_with_gradient_checkpointing": "frames are not in a table",
    r"test_load_with_mismatched_shapes": "it changes `vocab_size`, on which no weight depends",
}
NOT_RECURRENT = {
    r"test_multimodal_outputs_are_returned": "has no attention",
    r"test_(attention_\w+|can_set_attention_dynamically\w*|eager_matches_sdpa_inference\w*)": "has no attention",
    r"test_(flash_attn|flex_attention|sdpa)_\w+": "has no attention",
    r"test_(training_)?(gradient_checkpointing|enable_input_require_grads)\w*": "cells are not checkpointed",
}
NOT_WITHOUT_DECODER = {r"test_causal_lm_loss_honors_shift_labels": "runs on the configuration with a causal mask"}
NOT_WITH_TWO_SIDES = {
    r"test_load_with_mismatched_shapes": "it changes `vocab_size`, which each side has for itself",
    r"test_encoder_decoder_loss_no_double_shift": "the loss is of real tokens, before logits go back into rows",
    r"test_\w+_composite_models?": "its sides are DynMask models alike; see test_implementations_agree",
}
NOT_IN_AN_ENCODER = NOT_FOR_US | NOT_WITH_ONE_SIDE | NOT_WITHOUT_ROTARY | NOT_WITHOUT_DECODER
# These skip themselves where the hardware or the package is not there, or `RUN_SLOW` is not set.
NEEDS = {
    r"test_(cpu|disk)_offload\w*": "an accelerator",
    r"test_can_load_with_(device_context_manager|global_device_set)": "an accelerator",
    r"test_model_parallelism": "several accelerators",
    r"test_\w+_with_deepspeed\w*": "deepspeed and an accelerator",
    r"test_flash_attn_\w+": "flash-attn or the kernels package, and a GPU",
    r"test_kernels_can_load_without_crashing": "the kernels package and an accelerator",
    r"test_flex_attention_with_grads": "an accelerator",
    r"test_sdpa_can_(dispatch_on_flash|compile_dynamic)": "an accelerator, slow",
    r"test_torch_compile_for_training": "an accelerator, slow",
}


def reason_in(table, name):
    return next((reason for pattern, reason in table.items() if re.fullmatch(pattern, name)), None)


def suite_tests(test_class):
    return [name for name in dir(test_class) if name.startswith("test_") and callable(getattr(test_class, name))]


class DynMaskModelTester:
    """What the suite asks about a model: its sizes, a small configuration, a batch."""

    batch_size = 13
    seq_length = 7
    num_choices = 4
    is_training = True
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4
    vocab_size = 99

    def __init__(self, **options):
        self.options = options

    def get_config(self):
        sizes = {name: getattr(self, name) for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
        return DynMaskConfig(
            **sizes, vocab_size=self.vocab_size, intermediate_size=37, max_position_embeddings=64, **self.options
        )

    def prepare_config_and_inputs_for_common(self):
        shape = (self.batch_size, self.seq_length)
        inputs = {
            "input_ids": modeling_common.ids_tensor(shape, self.vocab_size),
            "token_type_ids": modeling_common.ids_tensor(shape, 2),
            "attention_mask": modeling_common.random_attention_mask(shape),
        }
        return self.get_config(), inputs


class FramesModelTester(DynMaskModelTester):
    """The same with frames in place of tokens."""

    encoder_seq_length = 4  # behind a stride of 2

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        shape = (self.batch_size, self.seq_length)
        inputs = {
            "input_features": modeling_common.floats_tensor([*shape, config.num_features]),
            "attention_mask": modeling_common.random_attention_mask(shape),
        }
        return config, inputs


class RecurrentModelTester(DynMaskModelTester):
    """The same for recurrent layers."""

    def get_config(self):
        sizes = {name: getattr(self, name) for name in ("hidden_size", "num_hidden_layers", "vocab_size")}
        return DynMaskRecurrentConfig(**sizes, **self.options)


class Seq2SeqModelTester(DynMaskModelTester):
    """The same for two sides."""

    def get_config(self):
        names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
        sizes = {name: getattr(self, name) for name in names}
        sizes |= {"intermediate_size": 37, "max_position_embeddings": 64}
        return DynMaskSeq2SeqConfig(decoder_start_token_id=2, **sizes, **self.options)

    def prepare_config_and_inputs_for_common(self):
        shape = (self.batch_size, self.seq_length)
        inputs = {
            "input_ids": modeling_common.ids_tensor(shape, self.vocab_size),
            "attention_mask": modeling_common.random_attention_mask(shape),
            "decoder_input_ids": modeling_common.ids_tensor(shape, self.vocab_size),
            "decoder_attention_mask": modeling_common.random_attention_mask(shape),
        }
        return self.get_config(), inputs


class CommonModelTests(modeling_common.ModelTesterMixin):
    """The suite on a configuration with `options`, without what `skipped` names."""

    model_tester_class = DynMaskModelTester
    options: dict = {}
    skipped = NOT_FOR_US | NOT_WITH_ONE_SIDE
    all_model_classes = tuple(each for each in MODEL_CLASSES.values() if each is not DynMaskForCausalLM)
    test_can_init_all_missing_weights_before_2023 = True  # it runs for old models on demand, and ours bears no year

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        for name in suite_tests(cls):
            if reason := reason_in(cls.skipped, name):
                setattr(cls, name, unittest.skip(reason)(getattr(cls, name)))

    def setUp(self):
        self.model_tester = self.model_tester_class(**self.options)

    def skipTest(self, reason):
        if not reason_in(NEEDS, self._testMethodName):
            raise AssertionError(f"{self._testMethodName} skips itself and is in no table: {reason}")
        super().skipTest(reason)

    def test_config(self):
        arguments = {"num_hidden_layers": DynMaskModelTester.num_hidden_layers, **self.options}
        configuration_common.ConfigTester(self, config_class=DynMaskConfig, **arguments).run_common_tests()

    def test_model_outputs_equivalence(self):
        # It asks for attention weights as well, which only `eager` computes.
        self.model_tester.options = {**self.options, "attn_implementation": "eager"}
        super().test_model_outputs_equivalence()

    def test_attention_that_is_asked_for_is_loaded(self):
        for model_class in self.all_model_classes:
            with tempfile.TemporaryDirectory() as folder:
                model_class(self.model_tester.get_config()).save_pretrained(folder)
                for asked in (None, "dynmask", "sdpa", "eager"):
                    model = model_class.from_pretrained(folder, attn_implementation=asked)
                    self.assertEqual(model.config._attn_implementation, asked or "dynmask")


class TestBertLike(CommonModelTests, unittest.TestCase):
    options = {"type_vocab_size": 2}
    skipped = NOT_IN_AN_ENCODER


class TestLlamaLike(CommonModelTests, unittest.TestCase):
    all_model_classes = tuple(MODEL_CLASSES.values())
    options = {
        "norm_placement": "pre",
        "norm_type": "rms_norm",
        "position_type": "rotary",
        "gated_feed_forward": True,
        "num_key_value_heads": 2,
        "value_head_dim": 6,
        "attention_bias": False,
        "mlp_bias": False,
        "mask": "causal & window(3, 0)",
        "classifier_pooling": "last",
        "classifier_transform": "none",
        "classifier_bias": False,
    }


class TestElectraLikeWithFixedPositions(CommonModelTests, unittest.TestCase):
    options = {
        "embedding_size": 16,
        "position_type": "sinusoidal",
        "layer_masks": ["full", "causal | prefix(2)"],
        "classifier_pooling": "mean",
        "classifier_transform": "lm_head",
    }
    skipped = NOT_IN_AN_ENCODER


class TestSpeechLike(CommonModelTests, unittest.TestCase):
    model_tester_class = FramesModelTester
    options = {"num_features": 5, "conv_kernel": [3, 3], "conv_stride": [1, 2]}
    skipped = NOT_IN_AN_ENCODER | NOT_WITH_FRAMES
    all_model_classes = (DynMaskModel, DynMaskForSequenceClassification, DynMaskForCTC)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        if return_labels and model_class is DynMaskForCTC:
            inputs["labels"] = torch.full((self.model_tester.batch_size, 1), 3)
        return inputs


class TestRecurrent(CommonModelTests, unittest.TestCase):
    model_tester_class = RecurrentModelTester
    options = {"cell": "gru"}
    skipped = NOT_IN_AN_ENCODER | NOT_RECURRENT
    all_model_classes = tuple(RECURRENT_CLASSES.values())
    has_attentions = False

    def test_config(self):
        configuration_common.ConfigTester(
            self,
            config_class=DynMaskRecurrentConfig,
            common_properties=["hidden_size", "num_hidden_layers"],
            num_hidden_layers=RecurrentModelTester.num_hidden_layers,
            **self.options,
        ).run_common_tests()


class TestSeq2Seq(CommonModelTests, unittest.TestCase):
    model_tester_class = Seq2SeqModelTester
    skipped = NOT_FOR_US | NOT_WITHOUT_ROTARY | NOT_WITHOUT_DECODER | NOT_WITH_TWO_SIDES
    all_model_classes = tuple(SEQ2SEQ_CLASSES.values())
    is_encoder_decoder = True

    def test_config(self):
        tester = configuration_common.ConfigTester(
            self, config_class=DynMaskSeq2SeqConfig, has_text_modality=False, common_properties=["encoder", "decoder"]
        )
        # Both sides are of one class: which of them `DynMaskConfig.from_pretrained` reads is not said.
        tester.create_and_test_config_from_and_save_pretrained_composite = lambda: None
        tester.run_common_tests()

    def test_load_save_without_tied_weights(self):
        self.model_tester.options = {"share_embeddings": False}  # shared ones are tied by definition
        super().test_load_save_without_tied_weights()


SUITES = [TestBertLike, TestLlamaLike, TestElectraLikeWithFixedPositions, TestSpeechLike, TestRecurrent, TestSeq2Seq]
TABLES = [
    NOT_FOR_US,
    NOT_WITH_ONE_SIDE,
    NOT_WITH_TWO_SIDES,
    NOT_WITHOUT_ROTARY,
    NOT_WITHOUT_DECODER,
    NOT_WITH_FRAMES,
    NOT_RECURRENT,
    NEEDS,
]


@pytest.mark.parametrize("table", TABLES)
def test_tables_name_tests_of_the_suite(table):
    names = suite_tests(modeling_common.ModelTesterMixin)
    assert [pattern for pattern in table if not any(re.fullmatch(pattern, name) for name in names)] == []


@pytest.mark.parametrize("suite", SUITES)
def test_skipped_tests_are_in_a_table(suite):
    skipped = [name for name in suite_tests(suite) if getattr(getattr(suite, name), "__unittest_skip__", False)]
    assert [name for name in skipped if not reason_in(suite.skipped | NEEDS, name)] == []
