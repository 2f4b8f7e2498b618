"""Encoders of stock encoder-decoders compute real tokens alone, although they take no `position_ids`."""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false

import copy
import pickle
from typing import Any

import pytest
import torch
from test_stock_attention import CLOSE
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, T5Config, T5EncoderModel

from hf_dynmask.stock.positions import takes_positions
from hf_dynmask.stock.unpadding import why_rows

SPECIAL: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
BART: dict[str, Any] = {
    "vocab_size": 50,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 20,
    "decoder_ffn_dim": 20,
    "max_position_embeddings": 12,  # fewer than tokens of the batch
    "forced_eos_token_id": None,
    **SPECIAL,
}
T5: dict[str, Any] = {
    "vocab_size": 50,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 20,
    "num_layers": 2,
    "num_heads": 2,
    **SPECIAL,
}
TABLES = ["bart", "mbart", "plbart", "pegasus", "marian", "blenderbot", "blenderbot-small"]
BIASES = ["t5", "mt5"]
LENGTHS = [5, 9, 3, 7]
WIDTH = max(LENGTHS)


def stock(family, implementation):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(BART if family in {*TABLES, "m2m_100"} else T5))
    model = AutoModelForSeq2SeqLM.from_config(config, attn_implementation=implementation).eval()
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data.add_(torch.randn_like(weight), alpha=0.2)
    return model


def batch_of(side):
    generator = torch.Generator().manual_seed(0)
    here = torch.stack([torch.arange(WIDTH) < length for length in LENGTHS])
    here = here if side == "right" else here.flip(1)
    ids = torch.randint(4, 50, here.shape, generator=generator)
    return {
        "input_ids": ids.where(here, 0),
        "attention_mask": here.long(),
        "labels": torch.randint(4, 50, (len(LENGTHS), 6), generator=generator),
    }


def count_tokens(side):
    """What the linear layers of an encoder or a decoder compute, in every run from now on."""
    counts = set()
    for part in side.modules():
        if isinstance(part, nn.Linear):
            part.register_forward_pre_hook(lambda part, args: counts.add(args[0].shape[:-1].numel()))
    return counts


def step(model, **batch):
    output = model(**batch)
    output.loss.backward()
    return output, {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def assert_equal(ours, theirs, **batch):
    (found, grads), (expected, expected_grads) = step(ours, **batch), step(theirs, **batch)
    torch.testing.assert_close(found.loss, expected.loss, **CLOSE)
    scale = float(expected.logits.detach().abs().max())
    torch.testing.assert_close(found.logits / scale, expected.logits / scale, **CLOSE)
    here = batch["attention_mask"].bool()
    states, expected_states = found.encoder_last_hidden_state, expected.encoder_last_hidden_state
    torch.testing.assert_close(states[here], expected_states[here], **CLOSE)
    assert grads.keys() == expected_grads.keys()
    most = max(float(grad.abs().max()) for grad in expected_grads.values())
    for name, grad in grads.items():
        assert float((grad - expected_grads[name]).abs().max()) <= 1e-4 * most, name


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", TABLES + BIASES)
def test_encoders_compute_real_tokens_alone(family, side):
    ours = stock(family, "dynmask")
    counts = count_tokens(ours.get_encoder())
    assert_equal(ours, stock(family, "eager"), **batch_of(side))
    assert counts == {sum(LENGTHS)}


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_a_row_changes_no_other_by_one_bit(family):
    encoder, batch = stock(family, "dynmask").get_encoder(), batch_of("right")
    batch.pop("labels")
    before = encoder(**batch).last_hidden_state
    batch["input_ids"][1] += 1
    batch["input_ids"][0, 5:] = 7  # padding
    after = encoder(**batch).last_hidden_state
    assert not torch.equal(before[1], after[1])
    assert torch.equal(before[[0, 2, 3]], after[[0, 2, 3]])


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
@pytest.mark.parametrize("family", ["bart", "t5"])
@pytest.mark.parametrize("is_reentrant", [False, True])
def test_checkpointed_layers(family, is_reentrant):
    models = [stock(family, implementation).train() for implementation in ("dynmask", "eager")]
    for model in models:
        model.gradient_checkpointing_enable({"use_reentrant": is_reentrant})
        for part in model.modules():  # whose dropout would differ
            part.p = 0.0 if isinstance(part, nn.Dropout) else getattr(part, "p", None)
            for name in ("dropout", "attention_dropout", "activation_dropout"):
                if isinstance(getattr(part, name, None), float):
                    setattr(part, name, 0.0)
    assert_equal(*models, **batch_of("right"))


@pytest.mark.parametrize("family", ["bart", "t5"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generate(family, beams):
    batch, found = batch_of("left"), []
    batch.pop("labels")
    for implementation in ("dynmask", "eager"):
        model = stock(family, implementation)
        found.append(model.generate(**batch, max_new_tokens=8, num_beams=beams, do_sample=False))
    assert torch.equal(*found)


@pytest.mark.parametrize("family", TABLES)
def test_decoders_alone(family):
    """Language models made of them pass the columns to their table."""
    batch = batch_of("right")
    here, found = batch["attention_mask"].bool(), []
    batch["labels"] = batch["input_ids"].where(here, -100)
    for implementation in ("dynmask", "eager"):
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, **BART)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()
        counts = count_tokens(model.base_model.decoder)
        output, _ = step(model, **batch)
        found.append((output.logits[here], output.loss, model.get_input_embeddings().weight.grad))
        assert counts == {sum(LENGTHS) if implementation == "dynmask" else here.numel()}
    torch.testing.assert_close(*found, **CLOSE)


def test_an_encoder_alone():
    """T5's is a model of its own, which runs another one."""
    batch, found = batch_of("right"), []
    batch.pop("labels")
    for implementation in ("dynmask", "eager"):
        torch.manual_seed(0)
        model = T5EncoderModel(T5Config(**T5, attn_implementation=implementation)).eval()
        found.append(model(**batch).last_hidden_state)
    here = batch["attention_mask"].bool()
    torch.testing.assert_close(found[0][here], found[1][here], **CLOSE)


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_no_bias_or_table_of_all_columns(family, monkeypatch):
    """Both grow with the longest row; a bias of all pairs of tokens would take memory by the square of the batch."""
    model, sizes = stock(family, "dynmask"), []
    name = "relative_attention_bias" if family == "t5" else "embed_positions"
    for part_name, part in model.get_encoder().named_modules():
        if part_name.endswith(name):
            part.register_forward_hook(lambda part, args, output: sizes.append(tuple(output.shape)))
    step(model, **batch_of("right"))
    assert sizes == [(WIDTH, WIDTH, 2) if family == "t5" else (1, sum(LENGTHS), 16)]


@pytest.mark.parametrize("family", ["bart", "t5"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(family, copied):
    model, batch = stock(family, "dynmask"), batch_of("right")
    step(model, **batch)
    again = copied(model)
    counts = count_tokens(again.get_encoder())
    again.zero_grad()
    assert_equal(again, stock(family, "eager"), **batch)
    assert counts == {sum(LENGTHS)}
    hooks = [hook for part in again.get_encoder().modules() for hook in part._forward_pre_hooks.values()]
    ours = [hook for hook in hooks if hook.__module__ == takes_positions.__module__]
    assert len(ours) == (2 if family == "t5" else 1)


def test_why_encoders_keep_rows():
    assert why_rows(stock("bart", "dynmask").get_encoder()) is None
    assert why_rows(stock("bart", "dynmask").base_model) == "it has a decoder"
    for family in ("m2m_100", "umt5", "longt5"):
        assert why_rows(stock(family, "dynmask").get_encoder()) == "it takes no `position_ids`"


@pytest.mark.parametrize("family", ["bart", "t5", "m2m_100", "umt5"])
def test_rows_as_they_are(family):
    ours = stock(family, "dynmask")
    counts = count_tokens(ours.get_encoder())
    for part in ours.modules():
        if hasattr(part, "config"):
            part.config.dynmask_unpad = False
    assert_equal(ours, stock(family, "eager"), **batch_of("right"))
    assert counts == {WIDTH * len(LENGTHS)}
