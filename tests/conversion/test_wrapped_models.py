"""Models that are compiled, parallel or adapted: their own weights are converted, and no adapter is lost."""

import copy

import pytest
import torch

from hf_dynmask import set_mask
from hf_dynmask.conversion import from_transformers, to_transformers
from stock_models import random_stock

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # by PEFT
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),  # by torch
]


def compiled_part(model):
    model.bert.encoder = torch.compile(model.bert.encoder)
    return model


def compiled_layers(model):
    for k, layer in enumerate(model.bert.encoder.layer):
        model.bert.encoder.layer[k] = torch.compile(layer)
    return model


def compiled_in_place(model):
    model.compile()
    return model


WRAPPED = {
    "compiled": torch.compile,
    "a part compiled": compiled_part,
    "layers compiled": compiled_layers,
    "compiled in place": compiled_in_place,
    "for several devices": torch.nn.DataParallel,
    "compiled, for several devices": lambda model: torch.nn.DataParallel(torch.compile(model)),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_a_wrapped_model(wrap):
    stock = random_stock("bert", "masked-lm")
    expected = from_transformers(stock)
    model = from_transformers(wrap(copy.deepcopy(stock)))
    assert type(model) is type(expected) and set(model.state_dict()) == set(expected.state_dict())
    assert all(torch.equal(weight, expected.state_dict()[name]) for name, weight in model.state_dict().items())


def test_a_wrapped_model_of_ours():
    model = from_transformers(random_stock("bert", "masked-lm"))
    expected = to_transformers(model).state_dict()
    for wrap in (torch.compile, torch.nn.DataParallel):
        found = to_transformers(wrap(model)).state_dict()  # type: ignore[arg-type]
        assert set(found) == set(expected)
        assert all(torch.equal(weight, expected[name]) for name, weight in found.items())


def lora(model, **settings):
    peft = pytest.importorskip("peft")
    targets = ["query"] if hasattr(model, "bert") else ["q_proj"]
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False, **settings)
    return peft.get_peft_model(model, config)


ADAPTED = {
    "wrapped": lambda model: lora(model),
    "inside": lambda model: lora(model).base_model.model,
    "a head of its own": lambda model: lora(model, modules_to_save=["cls" if hasattr(model, "bert") else "classifier"]),
    "compiled": lambda model: torch.compile(lora(model)),
    "merged for the time being": lambda model: (wrapped := lora(model)).merge_adapter() or wrapped.base_model.model,
}


@pytest.mark.parametrize("adapt", ADAPTED.values(), ids=ADAPTED)
def test_adapters_are_not_lost(adapt):
    stock = random_stock("bert", "masked-lm")
    ours = from_transformers(stock)
    message = r"must be converted without adapters, which would be lost; got a \w+ with some\. .*`merge_and_unload\(\)`"
    for model, convert in (stock, from_transformers), (ours, to_transformers):
        with pytest.raises(ValueError, match=message):
            convert(adapt(model))


def test_virtual_tokens_are_not_lost():
    peft = pytest.importorskip("peft")
    settings = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(
        ValueError, match="must be converted without adapters, which would be lost; got a PeftModelForCa"
    ):
        from_transformers(peft.get_peft_model(random_stock("llama", "causal-lm"), settings))


@torch.no_grad()
def test_a_merged_adapter():
    stock = random_stock("bert", "masked-lm").eval()
    ids, base = torch.arange(5, 12)[None], copy.deepcopy(stock)(input_ids=torch.arange(5, 12)[None]).logits
    merged = lora(stock).merge_and_unload()
    expected = merged(input_ids=ids).logits
    assert not torch.allclose(expected, base, atol=1e-3)
    torch.testing.assert_close(from_transformers(merged)(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-4)


def test_a_folder_with_an_adapter_beside_the_weights(tmp_path):
    """transformers loads the adapter too."""
    stock = random_stock("bert", "masked-lm")
    stock.save_pretrained(tmp_path)
    lora(stock).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must be converted without adapters, which would be lost"):
        from_transformers(tmp_path)


def test_the_mask_of_a_stock_model_comes_along(tmp_path):
    stock = random_stock("llama", "causal-lm")
    stock.set_attn_implementation("dynmask")
    set_mask(stock, "causal & window(2, 0)")
    ids = torch.arange(5, 17)[None]
    stock.save_pretrained(tmp_path)
    for source in (stock, tmp_path):
        model = from_transformers(source)
        assert model.config.mask == "causal & window(2, 0)"
        torch.testing.assert_close(model(input_ids=ids).logits, stock(input_ids=ids).logits, atol=1e-5, rtol=1e-5)
    assert from_transformers(stock, mask="causal").config.mask == "causal"
