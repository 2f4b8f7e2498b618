"""The Auto classes find DynMask models, also what was saved."""

from functools import wraps

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForQuestionAnswering, PreTrainedModel
from transformers.utils.generic import find_labels

from hf_dynmask import DynMaskConfig, DynMaskRecurrentConfig, DynMaskSeq2SeqConfig
from hf_dynmask.registration import AUTO_CLASSES, register

SIZES = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1}
SETTINGS = {
    DynMaskConfig: {"num_attention_heads": 2, "intermediate_size": 8, "mask": "window(3)"},
    DynMaskRecurrentConfig: {"cell": "gru"},
    DynMaskSeq2SeqConfig: {"decoder_start_token_id": 2},
}


all_auto_classes = pytest.mark.parametrize(
    "config_class, auto_class", [(config, auto_class) for config in AUTO_CLASSES for auto_class in AUTO_CLASSES[config]]
)


@all_auto_classes
def test_auto_class_saves_and_loads(config_class, auto_class, tmp_path):
    model = auto_class.from_config(config_class(**SIZES, **SETTINGS[config_class]))
    assert type(model) is AUTO_CLASSES[config_class][auto_class]
    model.save_pretrained(tmp_path)
    loaded = auto_class.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    for name, value in SETTINGS[config_class].items():
        assert getattr(loaded.config, name) == value
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight)


@all_auto_classes
def test_the_trainer_finds_the_labels_of_every_batch(config_class, auto_class):
    if auto_class is not AutoModel:
        expected = ["start_positions", "end_positions"] if auto_class is AutoModelForQuestionAnswering else ["labels"]
        assert find_labels(AUTO_CLASSES[config_class][auto_class]) == expected


def test_registering_again_changes_nothing():
    register()
    assert isinstance(AutoConfig.for_model("dynmask"), DynMaskConfig)
    for config_class, auto_classes in AUTO_CLASSES.items():
        model = AutoModel.from_config(config_class(**SIZES, **SETTINGS[config_class]))
        assert type(model) is auto_classes[AutoModel]


def test_registering_behind_the_wrapper_of_another_package(monkeypatch):
    settle = PreTrainedModel.get_correct_attn_implementation

    @wraps(settle)
    def of_another(self, *args, **kwargs):
        return settle(self, *args, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "get_correct_attn_implementation", of_another)
    register()
    assert PreTrainedModel.get_correct_attn_implementation is of_another
