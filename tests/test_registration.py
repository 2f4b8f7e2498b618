"""The Auto classes find DynMask models, also what was saved."""

import subprocess
import sys
from functools import wraps
from typing import Any

import pytest
import torch
from transformers import (
    AttentionMaskInterface,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedModel,
)
from transformers.utils.generic import find_labels

from hf_dynmask import DynMaskConfig, DynMaskRecurrentConfig, DynMaskSeq2SeqConfig, set_mask
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


# --- Beside other packages -------------------------------------------------------------------------------------------

LLAMA: dict[str, Any] = {"vocab_size": 37, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
LLAMA |= {"intermediate_size": 16}
MASK = "causal & window(1, 0)"
IDS = torch.arange(5, 14)[None]


def llama(**settings) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**LLAMA), **settings).eval()


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    """A folder with a mask, and the logits that follow it."""
    model, folder = llama(attn_implementation="dynmask"), tmp_path_factory.mktemp("masked")
    set_mask(model, MASK)
    model.save_pretrained(folder)
    return folder, model(IDS).logits


def stock_method(self, requested_attention, is_init_check=False):
    """Of a package that puts its own in place of ours."""
    return "sdpa" if requested_attention is None else requested_attention


@pytest.mark.parametrize("implementation", [None, "sdpa", "eager"])
def test_a_method_that_is_replaced_without_calling_ours(implementation, masked, monkeypatch):
    """A mask is followed, or there is an error: never another attention without it."""
    folder, _ = masked
    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedModel, "get_correct_attn_implementation", stock_method)
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=implementation)
        with pytest.raises(ValueError, match="has the mask 'causal & window.*alone can follow; got"):
            model(IDS)


def test_a_model_that_the_method_did_not_make_ready(masked, monkeypatch):
    folder, expected = masked
    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedModel, "get_correct_attn_implementation", stock_method)
        for each in (LlamaModel, LlamaForCausalLM):
            patch.setattr(each, "forward", getattr(each.forward, "announces", each.forward))
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="dynmask")
        torch.testing.assert_close(model(IDS).logits, expected)
        with pytest.raises(ValueError, match="`lengths` must be given to a model that is made ready"):
            model(IDS, lengths=torch.tensor([4, 5]))
        model.config._attn_implementation = "eager"
        with pytest.raises(ValueError, match="alone can follow; got 'eager'"):
            model(IDS)
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(model(IDS).logits, expected)


@pytest.mark.parametrize("with_name", [True, False])
def test_a_method_that_is_wrapped_and_registered_again(with_name, masked, monkeypatch):
    """Should the wrapper not say what it wraps, ours is in it twice, and settles the same."""
    folder, expected = masked
    settle, calls = PreTrainedModel.get_correct_attn_implementation, []

    def of_another(self, *args, **kwargs):
        calls.append(args)
        return settle(self, *args, **kwargs)

    monkeypatch.setattr(
        PreTrainedModel, "get_correct_attn_implementation", wraps(settle)(of_another) if with_name else of_another
    )
    register()
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert calls and model.config._attn_implementation == "dynmask"
    torch.testing.assert_close(model(IDS).logits, expected)
    with pytest.raises(ValueError, match="alone can follow; got 'sdpa'"):
        model.set_attn_implementation("sdpa")


def test_loading_that_another_package_wraps(masked, monkeypatch):
    folder, expected = masked
    load = vars(PreTrainedModel)["from_pretrained"].__func__
    monkeypatch.setattr(
        PreTrainedModel, "from_pretrained", classmethod(lambda cls, *args, **kw: load(cls, *args, **kw))
    )
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(folder)(IDS).logits, expected)
    own = DynMaskConfig(**SIZES, **SETTINGS[DynMaskConfig])
    AutoModel.from_config(own).save_pretrained(folder / "own")
    assert type(AutoModel.from_pretrained(folder / "own")).__name__ == "DynMaskModel"


def test_other_attention_is_as_it_was():
    """For models without a mask of ours: what transformers' functions make."""
    for name, make_mask in AttentionMaskInterface._global_mapping.items():
        if name != "dynmask":
            assert make_mask.refuses_dynmask
            assert make_mask.__wrapped__ is not make_mask and not hasattr(make_mask.__wrapped__, "refuses_dynmask")
    before = dict(AttentionMaskInterface._global_mapping)
    register()
    assert AttentionMaskInterface._global_mapping == before
    padding = (IDS != 5).long()
    for implementation in ("sdpa", "eager"):
        model = llama(attn_implementation=implementation)
        assert model(IDS, attention_mask=padding).logits.isfinite().all()


IMPORTED_AGAIN = """
import importlib, sys, torch
import hf_dynmask
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

SIZES = dict(vocab_size=37, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
IDS = torch.arange(5, 14)[None]
TOLD = {"lengths": torch.tensor([4, 5])}, {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])}

def ready(model):
    model.eval().set_attn_implementation("dynmask")
    return model

def depth(function):
    return 0 if function is None else 1 + depth(getattr(function, "__wrapped__", None))

@torch.no_grad()
def check(model):
    right = torch.cat([model(part)[0] for part in IDS.split([4, 5], dim=1)], dim=1)
    for told in TOLD:
        torch.testing.assert_close(model(IDS, **told)[0], right)
    own = hf_dynmask.DynMaskModel(hf_dynmask.DynMaskConfig(**SIZES)).eval()
    right = torch.cat([own(part)[0] for part in IDS.split([4, 5], dim=1)], dim=1)
    for told in TOLD:
        torch.testing.assert_close(own(IDS, **told)[0], right, atol=1e-5, rtol=1e-4)

old = ready(BertModel(BertConfig(**SIZES)))
check(old)
settle, forward = PreTrainedModel.get_correct_attn_implementation, BertModel.forward
{again}
assert PreTrainedModel.get_correct_attn_implementation is settle and BertModel.forward is forward and depth(settle) == 2
models = old, ready(BertModel(BertConfig(**SIZES))), ready(LlamaForCausalLM(LlamaConfig(**SIZES)))
for model in models:
    check(model)
hf_dynmask.set_mask(models[2], "causal & window(1, 0)")
masked = models[2](IDS).logits
try:
    models[2].set_attn_implementation("sdpa")
except ValueError as error:
    assert "alone can follow" in str(error)
else:
    raise SystemExit("a mask was dropped")
"""
WAYS = {
    "the package is executed again": "importlib.reload(hf_dynmask)",
    "the package is imported again": (
        "for name in [name for name in sys.modules if name.split('.')[0] == 'hf_dynmask']: del sys.modules[name]\n"
        "import hf_dynmask"
    ),
    "what is for stock models is executed again": (
        "for name in ('batches', 'masks', 'attention', 'models'):\n"
        "    importlib.reload(sys.modules[f'hf_dynmask.stock.{name}'])\n"
        "importlib.reload(sys.modules['hf_dynmask.registration']).register()"
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_package_that_is_imported_again(way):
    """It wraps nothing twice, and models of before and of after are right."""
    code = IMPORTED_AGAIN.replace("{again}", WAYS[way])
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
