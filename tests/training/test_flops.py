"""The work of models: by hand, as the benchmark counts it, and pair by pair."""

from typing import Any

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    ModernBertConfig,
    ModernBertModel,
    T5Config,
    T5ForConditionalGeneration,
)

from benchmark import flops
from hf_dynmask import (
    DynMaskConfig,
    DynMaskForMaskedLM,
    DynMaskModel,
    DynMaskRecurrentConfig,
    DynMaskRecurrentModel,
    SequenceLayout,
    from_transformers,
    masks,
    set_mask,
)
from hf_dynmask.modeling.plan import MaskPlan
from hf_dynmask.training.flops import AttentionFlops, allowed_pairs, config_work, model_flops, plan_pairs

SIZES: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4}
SIZES |= {"intermediate_size": 40, "vocab_size": 50}
BART: dict[str, Any] = {
    "d_model": 24,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 36,
}
BART |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "vocab_size": 50}
LENGTHS = [(5,), (1,), (64,), (5,)]


def bert():
    return BertForTokenClassification(BertConfig(**SIZES))


def llama():
    return LlamaForCausalLM(LlamaConfig(**SIZES, pad_token_id=0))


def bart():
    return BartForConditionalGeneration(BartConfig(**BART))


@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize("make, lengths", [(bert, LENGTHS), (llama, LENGTHS), (bart, [(5, 3), (1, 9), (64, 1)])])
def test_it_is_what_the_benchmark_counts(make, lengths, converted):
    """Of models that have nothing in their layers but what the benchmark knows of; converted, the work is the same."""
    stock = make()
    model = from_transformers(stock) if converted else stock
    assert model_flops(model).forward_flops(lengths) == flops(stock.config, lengths, training=False)


@pytest.mark.parametrize("make", [bert, llama, bart])
def test_of_a_configuration(make):
    """As of the model; the head of an encoder is left out."""
    model = make()
    model.config.architectures = [type(model).__name__]
    assert config_work(model.config) == model_flops(model)


def test_masked_language_model():
    work = config_work(DynMaskConfig(**SIZES)), model_flops(DynMaskForMaskedLM(DynMaskConfig(**SIZES)))
    assert work[0].weights == work[1].weights == (3 * (4 * 24**2 + 2 * 24 * 40),)
    assert [of.output_weights for of in work] == [0, 24 * 50]
    assert work[1].forward_flops([(7,)], targets=2) - work[0].forward_flops([(7,)]) == 2 * 2 * 24 * 50


def test_heads_of_other_sizes():
    config = DynMaskConfig(**SIZES, num_key_value_heads=2, head_dim=10, value_head_dim=6)
    work = model_flops(DynMaskModel(config))
    assert work.weights == (3 * (24 * (40 + 20 + 12) + 24 * 24 + 2 * 24 * 40),)
    assert work.attention == {AttentionFlops(masks.full()): 3 * 4 * 8}


def test_recurrent_models_have_no_pairs():
    model = DynMaskRecurrentModel(DynMaskRecurrentConfig(hidden_size=8, num_hidden_layers=2, vocab_size=50))
    assert model_flops(model).attention == {}
    assert model_flops(model).weights == (2 * 2 * (4 * 4 * 8 + 4 * 4 * 4),)


def attention(model):
    return {(str(work.mask), work.queries, work.keys): width for work, width in model_flops(model).attention.items()}


def dynmask(**settings):
    return DynMaskModel(DynMaskConfig(**SIZES, **settings))


def t5():
    sizes: dict[str, Any] = {
        "d_model": 24,
        "num_layers": 3,
        "num_decoder_layers": 2,
        "num_heads": 4,
        "d_kv": 5,
        "vocab_size": 50,
    }
    return T5ForConditionalGeneration(T5Config(**sizes))


MODELS = [
    (lambda: dynmask(mask="causal"), {("causal", 0, 0): 72}),
    (lambda: dynmask(layer_masks=["full", "window(3)", "full"]), {("full", 0, 0): 48, ("window(3, 3)", 0, 0): 24}),
    (lambda: dynmask(mask="heads(causal, full)"), {("causal", 0, 0): 36, ("full", 0, 0): 36}),
    (lambda: dynmask(mask="causal & topk(2)"), {("causal & full", 0, 0): 72}),
    (lambda: GPT2LMHeadModel(GPT2Config(n_embd=24, n_layer=2, n_head=4, vocab_size=50)), {("causal", 0, 0): 48}),
    (
        lambda: MistralForCausalLM(MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=4)),
        {("causal & window(3, 3)", 0, 0): 72},
    ),
    (
        lambda: ModernBertModel(ModernBertConfig(**SIZES, local_attention=8, pad_token_id=0)),
        {("full", 0, 0): 24, ("full & window(4, 4)", 0, 0): 48},
    ),
    (t5, {("full", 0, 0): 60, ("causal", 1, 1): 40, ("full", 1, 0): 40}),
    (bart, {("full", 0, 0): 72, ("causal", 1, 1): 48, ("full", 1, 0): 48}),
]


@pytest.mark.parametrize("make, expected", MODELS)
def test_masks_of_models(make, expected):
    assert attention(make()) == expected


def test_a_mask_that_was_set_on_a_stock_model():
    model = BertForTokenClassification._from_config(BertConfig(**SIZES), attn_implementation="dynmask")
    set_mask(model, "window(2)")
    assert attention(model) == {("window(2, 2)", 0, 0): 72}


def test_masks_that_read_fields():
    """All pairs, where nobody says how many."""
    work = model_flops(DynMaskModel(DynMaskConfig(**SIZES, mask="causal & visible")))
    (of_layers,) = work.attention
    full = model_flops(DynMaskModel(DynMaskConfig(**SIZES)))
    assert work.forward_flops([(5,), (3,)]) == full.forward_flops([(5,), (3,)])
    assert work.forward_flops([(5,), (3,)], pairs={of_layers: 34}) == full.forward_flops([(5,), (3,)])
    assert work.forward_flops([(5,)], pairs={of_layers: 9}) == full.forward_flops([(5,)]) - 4 * 72 * (25 - 9)


# --- Pairs -----------------------------------------------------------------------------------------------------------

EXPRESSIONS = ["full", "causal", "backward", "causal & window(3, 0)", "window(70)", "dilated(9, 3)", "~full"]
EXPRESSIONS += ["chunk_causal(100)", "causal | prefix(4)", "random(0.3, 1)", "global_tokens(2) | window(1)"]
EXPRESSIONS += ["~causal & ~window(130)"]


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_pairs_of_one_sequence(expression):
    mask = masks.parse(expression)
    for queries, keys in [(1, 1), (300, 300), (0, 0), (7, 140), (140, 7), (5, 0)]:
        dense = mask.dense(torch.tensor([queries]), key_lengths=torch.tensor([keys]))
        assert allowed_pairs(mask, queries, keys) == dense.sum()


@pytest.mark.parametrize("expression", [*EXPRESSIONS, "causal & visible", "segments"])
@pytest.mark.parametrize("lengths", [[12, 5], [140, 140, 3, 0, 140], [0]])
def test_pairs_of_a_plan(expression, lengths):
    lengths = torch.tensor(lengths)
    shape = (len(lengths), int(lengths.max()))
    generator = torch.Generator().manual_seed(0)
    fields = {
        "hidden_spans": torch.randint(0, 9, (len(lengths), 2, 2), generator=generator),
        "segment_ids": torch.randint(0, 3, shape, generator=generator).cumsum(1),
    }
    plan = MaskPlan(expression, SequenceLayout.from_lengths(lengths, shape), fields=fields)
    fields = {name: fields[name] for name in plan.mask.fields}
    assert plan_pairs(plan) == plan.mask.dense(lengths, fields=fields).sum()
