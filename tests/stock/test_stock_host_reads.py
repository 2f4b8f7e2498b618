"""Stock models on flat batches, on the device `meta`, where every look at a value raises: a step reads none."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForTokenClassification

from hf_dynmask import set_mask

TOKENS, SEQUENCES = 48, 6
SIZES = {"vocab_size": 37, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "num_hidden_layers": 3}
SIZES |= {"max_position_embeddings": 64, "pad_token_id": 0}
MODELS = {
    "bert": (AutoModelForTokenClassification, ("hidden_dropout_prob", "attention_probs_dropout_prob"), {}),
    "modernbert": (AutoModelForMaskedLM, ("attention_dropout", "mlp_dropout", "embedding_dropout"), {}),
    "llama": (AutoModelForCausalLM, ("attention_dropout",), {"num_key_value_heads": 1}),
}


def make(family, share, dtype=torch.bfloat16, **settings):
    auto_class, dropouts, more = MODELS[family]
    config = AutoConfig.for_model(family, **SIZES, **more, **dict.fromkeys(dropouts, share), **settings)
    with torch.device("meta"):
        model = auto_class.from_config(config, attn_implementation="dynmask", dtype=dtype)
    return model.train()


def zeros(*shape, dtype=torch.long):
    return torch.zeros(*shape, dtype=dtype, device="meta")


def of_transformers_collator():
    ends = {name: zeros(SEQUENCES + 1, dtype=torch.int32) for name in ("cu_seq_lens_q", "cu_seq_lens_k")}
    return {"position_ids": zeros(1, TOKENS), **ends, "max_length_q": 9, "max_length_k": 9}


TOLD = {
    "cu_seq_lens_q": of_transformers_collator,
    "lengths": lambda: {"lengths": zeros(SEQUENCES)},
    "lengths and positions": lambda: {"lengths": zeros(SEQUENCES), "position_ids": zeros(1, TOKENS)},
}


def step(model, **told):
    model(input_ids=zeros(1, TOKENS), labels=zeros(1, TOKENS), **told).loss.backward()
    grads = [weight.grad for weight in model.base_model.parameters() if weight.requires_grad]
    assert sum(grad is not None for grad in grads) >= len(grads) - 2  # all but a pooler's


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("share", [0.0, 0.1])
@pytest.mark.parametrize("told", TOLD)
@pytest.mark.parametrize("family", MODELS)
def test_a_training_step_on_a_flat_batch_reads_nothing(family, told, share, dtype):
    step(make(family, share, dtype), **TOLD[told]())


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_cache_is_not_read(use_cache):
    step(make("llama", 0.0, use_cache=use_cache), **of_transformers_collator())


@pytest.mark.parametrize("mask", ["full", "causal", "causal & window(5, 0)"])
def test_a_mask_by_set_mask(mask):
    model = make("bert", 0.1)
    set_mask(model, mask)
    step(model, **of_transformers_collator())
