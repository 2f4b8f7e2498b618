"""Keywords that a forward pass knows, and those that it refuses."""

from typing import Any

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache

from hf_dynmask import (
    DynMaskConfig,
    DynMaskForCausalLM,
    DynMaskForConditionalGeneration,
    DynMaskForMaskedLM,
    DynMaskForMultipleChoice,
    DynMaskForQuestionAnswering,
    DynMaskForSequenceClassification,
    DynMaskForTokenClassification,
    DynMaskModel,
    DynMaskRecurrentConfig,
    DynMaskRecurrentForSequenceClassification,
    DynMaskRecurrentModel,
    DynMaskSeq2SeqConfig,
    DynMaskSeq2SeqForSequenceClassification,
    DynMaskSeq2SeqModel,
)
from hf_dynmask.modeling.kv_cache import CACHE_NAMES

SIZES: dict[str, Any] = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1}
ATTENTION: dict[str, Any] = {"num_attention_heads": 2, "intermediate_size": 8}
ENCODERS = (
    DynMaskModel,
    DynMaskForCausalLM,
    DynMaskForMaskedLM,
    DynMaskForQuestionAnswering,
    DynMaskForSequenceClassification,
    DynMaskForTokenClassification,
    DynMaskForMultipleChoice,
)
ENCODER_DECODERS = (DynMaskSeq2SeqModel, DynMaskForConditionalGeneration, DynMaskSeq2SeqForSequenceClassification)
RECURRENT = (DynMaskRecurrentModel, DynMaskRecurrentForSequenceClassification)
IDS = torch.tensor([[5, 6, 7]])


@pytest.fixture(params=[*ENCODERS, *ENCODER_DECODERS, *RECURRENT], ids=lambda kind: kind.__name__)
def model(request):
    if request.param in RECURRENT:
        return request.param(DynMaskRecurrentConfig(**SIZES)).eval()
    if request.param in ENCODER_DECODERS:
        return request.param(DynMaskSeq2SeqConfig(**SIZES, **ATTENTION, decoder_start_token_id=1)).eval()
    return request.param(DynMaskConfig(**SIZES, **ATTENTION)).eval()


def inputs(model) -> dict[str, Any]:
    ids = IDS[None] if isinstance(model, DynMaskForMultipleChoice) else IDS
    return {"input_ids": ids} | ({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})


@pytest.mark.parametrize(
    ("unknown", "nearest"),
    [("legnths", "lengths"), ("cu_seqlens", "cu_seq_lens_q"), ("attn_mask", "attention_mask"), ("length", "lengths")],
)
def test_an_unknown_keyword_is_named_with_the_nearest_known_one(model, unknown, nearest):
    message = (
        rf"{type(model).__name__}.forward\(\) got an unexpected keyword argument `{unknown}`; did you mean `{nearest}`"
    )
    with pytest.raises(TypeError, match=message):
        model(**inputs(model), **{unknown: torch.tensor([3])})


def test_without_a_near_one_all_are_named(model):
    with pytest.raises(TypeError, match="argument `zzz`; it knows .*attention_mask.*, lengths"):
        model(**inputs(model), zzz=None)


def test_what_transformers_hands_to_every_model_is_known(model):
    model(
        **inputs(model),
        num_items_in_batch=torch.tensor(3),
        output_hidden_states=False,
        output_attentions=False,
        output_router_logits=False,
        return_dict=True,
        use_cache=False,
    )


@pytest.mark.parametrize("is_causal", [True, False])
def test_causality_is_the_masks_affair(model, is_causal):
    with pytest.raises(
        TypeError, match="`is_causal` must be left out: the masks of a .* are those of its configuration"
    ):
        model(**inputs(model), is_causal=is_causal)


@pytest.mark.parametrize("head", [DynMaskForCausalLM, DynMaskForConditionalGeneration])
def test_a_cache_goes_by_both_names(head):
    torch.manual_seed(0)
    is_pair = head is DynMaskForConditionalGeneration
    config = DynMaskSeq2SeqConfig(**SIZES, **ATTENTION) if is_pair else DynMaskConfig(**SIZES, **ATTENTION)
    model = head(config).eval()
    first = model(**inputs(model), use_cache=True)
    assert first.cache is not None and first.cache is first["past_key_values"]
    name = "decoder_input_ids" if is_pair else "input_ids"
    source = {"input_ids": IDS} if is_pair else {}
    right = model(**source, **{name: torch.cat([IDS, torch.tensor([[8]])], 1)}).logits[:, -1:]
    for each in CACHE_NAMES:
        cache = model(**inputs(model), use_cache=True).cache
        step = model(**source, **{name: torch.tensor([[8]]), each: cache})
        torch.testing.assert_close(step.logits, right, atol=1e-6, rtol=1e-5)
    empty = EncoderDecoderCache(DynamicCache(), DynamicCache()) if is_pair else DynamicCache()
    with pytest.raises(ValueError, match="`cache` and `past_key_values` are two names of one argument; got both"):
        model(**inputs(model), cache=empty, past_key_values=empty)


def test_weights_that_are_shared_out_are_not_saved(model, tmp_path):
    weight = next(model.parameters())
    weight.ds_numel = 2 * weight.numel()  # as of a parameter of ZeRO-3 that is not gathered
    with pytest.raises(ValueError, match="weights must be whole to be saved; got the parts that ZeRO-3 leaves"):
        model.save_pretrained(tmp_path / "parts")
    assert not (tmp_path / "parts").exists()
    model.save_pretrained(tmp_path / "whole", state_dict=model.state_dict())
