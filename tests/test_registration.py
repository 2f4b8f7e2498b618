"""The Auto classes find DynMask models, also what was saved."""

import pytest
import torch
from transformers import AutoConfig, AutoModel

from hf_dynmask import DynMaskConfig
from hf_dynmask.registration import AUTO_CLASSES, register


def config():
    return DynMaskConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, mask="window(3)"
    )


@pytest.mark.parametrize("auto_class", AUTO_CLASSES)
def test_auto_class_saves_and_loads(auto_class, tmp_path):
    model = auto_class.from_config(config())
    assert type(model) is AUTO_CLASSES[auto_class]
    model.save_pretrained(tmp_path)
    loaded = auto_class.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert loaded.config.mask == "window(3)"
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight)


def test_registering_again_changes_nothing():
    register()
    assert isinstance(AutoConfig.for_model("dynmask"), DynMaskConfig)
    assert isinstance(AutoModel.from_config(config()), AUTO_CLASSES[AutoModel])
