"""`attn_implementation="dynmask"` on stock models with random tiny weights: padded, flat, without leaks."""

# pyright: reportOptionalMemberAccess=false, reportAttributeAccessIssue=false

import sys
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForTextEncoding,
    BertConfig,
    DataCollatorWithFlattening,
    PreTrainedModel,
    masking_utils,
)

import hf_dynmask
from hf_dynmask.data import DataCollatorWithLengths
from hf_dynmask.modeling import batch as batch_module
from hf_dynmask.modeling import layout as layout_module

# Of the models themselves, in transformers before 5.18.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

TOKENS: dict[str, Any] = {"vocab_size": 99, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LAYERS: dict[str, Any] = TOKENS | {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES: dict[str, Any] = LAYERS | {"intermediate_size": 40}
GROUPED: dict[str, Any] = SIZES | {"num_key_value_heads": 2}
SLIDING: dict[str, Any] = GROUPED | {
    "head_dim": 8,
    "layer_types": ["full_attention", "sliding_attention"],
    "sliding_window": 3,
}
LATENT: dict[str, Any] = SIZES | {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 4,
}
GPT: dict[str, Any] = TOKENS | {"n_embd": 32, "n_layer": 2, "n_head": 4}
ENCODER_DECODER: dict[str, Any] = TOKENS | {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 40,
}
T5: dict[str, Any] = TOKENS | {"d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 4}

# Served on padded batches and on flat ones.
FAMILIES: dict[str, dict[str, Any]] = {
    "albert": SIZES | {"embedding_size": 16},
    "apertus": GROUPED,
    "arcee": GROUPED,
    "bert": SIZES,
    "bert-generation": SIZES,
    "biogpt": SIZES,
    "bitnet": GROUPED,
    "camembert": SIZES,
    "cohere": GROUPED,
    "cohere2": SLIDING,
    "ctrl": GPT | {"dff": 40},
    "data2vec-text": SIZES,
    "deepseek_v3": LATENT | {"first_k_dense_replace": 2},
    "diffllama": GROUPED,
    "distilbert": TOKENS | {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 40},
    "electra": SIZES | {"embedding_size": 16},
    "ernie": SIZES,
    "ernie4_5": GROUPED,
    "esm": SIZES,
    "eurobert": GROUPED,
    "exaone4": SLIDING,
    "gemma": GROUPED | {"head_dim": 8},
    "gemma2": SLIDING,
    "gemma3_text": SLIDING,
    "glm": GROUPED | {"head_dim": 8},
    "glm4": GROUPED | {"head_dim": 8},
    "gpt2": GPT,
    "gpt_bigcode": GPT,
    "gpt_neox": SIZES,
    "gpt_oss": SLIDING | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "granite": GROUPED,
    "gte": SIZES,
    "helium": GROUPED | {"head_dim": 8},
    "jina_embeddings_v3": SIZES,
    "llama": GROUPED,
    "llama4_text": GROUPED | {"head_dim": 8, "attention_chunk_size": 4, "moe_layers": [], "intermediate_size_mlp": 40},
    "ministral": SLIDING,
    "mistral": GROUPED | {"sliding_window": 3},
    "mixtral": GROUPED | {"sliding_window": 3, "num_local_experts": 4},
    "modernbert": SIZES | {"local_attention": 4, "cls_token_id": 1, "sep_token_id": 2},
    "modernbert-decoder": SIZES | {"local_attention": 4, "cls_token_id": 1, "sep_token_id": 2},
    "nemotron": GROUPED,
    "nomic_bert": SIZES,
    "olmo": GROUPED,
    "olmo2": GROUPED,
    "olmo3": SLIDING,
    "opt": LAYERS | {"ffn_dim": 40, "word_embed_proj_dim": 32},
    "persimmon": SIZES,
    "phi": SIZES,
    "phi3": GROUPED,
    "qwen2": GROUPED | {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
    "qwen3": GROUPED | {"head_dim": 8},
    "qwen3_moe": GROUPED | {"head_dim": 8, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2},
    "roberta": SIZES,
    "roberta-prelayernorm": SIZES,
    "seed_oss": GROUPED | {"head_dim": 8},
    "smollm3": GROUPED | {"no_rope_layers": [1, 0]},
    "stablelm": GROUPED,
    "starcoder2": GROUPED | {"sliding_window": 3},
    "t5": T5,
    "vaultgemma": SLIDING,
    "xlm-roberta": SIZES,
    "xlm-roberta-xl": SIZES,
}
# Served where they use the attention interface: since transformers 5.2x.
MOVED: dict[str, dict[str, Any]] = {
    name: GPT | {"n_inner": 40, "rotary_dim": 4}
    for name in ("codegen", "gptj")
    if AutoModel._model_mapping[CONFIG_MAPPING[name]]._can_set_attn_implementation()  # pyright: ignore[reportIndexIssue]
}
FAMILIES = {name: sizes for name, sizes in (FAMILIES | MOVED).items() if name in CONFIG_MAPPING}  # of this transformers
ENCODERS = {"t5", "umt5"}  # of an encoder-decoder, alone
ROUNDED_BY_OTHERS = {"gpt_oss"}  # its experts compute the tokens of all documents in one product

# Served on padded batches alone: what a flat one meets.
WITHOUT_FLAT: dict[str, tuple[dict[str, Any], str]] = {
    "bart": (ENCODER_DECODER, "without cross-attention; this bart model has it"),
    "esm with dropout": (
        SIZES | {"token_dropout": True, "mask_token_id": 4},
        "attention only; this esm model has `token_dropout`",
    ),
    "fnet": (SIZES, "those of FNetModel do not"),
    "layoutlm": (SIZES, "LayoutLMSelfAttention got an explicit `attention_mask`"),
    "lfm2": (GROUPED | {"layer_types": ["conv", "full_attention"]}, "this lfm2 model has layers of type conv"),
    "mobilebert": (
        LAYERS | {"embedding_size": 32, "intra_bottleneck_size": 32},
        "this mobilebert model has `trigram_input`",
    ),
    "umt5": (T5, "without cross-attention; this umt5 model has it"),  # its encoder alone says so too
}
# Not served: attention code of their own.
OWN_ATTENTION = [
    *("big_bird", "bloom", "canine", "codegen", "convbert", "deberta", "deberta-v2", "falcon", "flaubert", "gpt_neo"),
    *("gptj", "ibert", "longformer", "luke", "megatron-bert", "mpnet", "mpt", "nystromformer", "openai-gpt"),
    *("rembert", "roformer", "squeezebert", "xglm", "xlm", "xlnet"),
]
OWN_ATTENTION = [name for name in OWN_ATTENTION if name not in MOVED]


SIZES_OF_DOCUMENTS = [5, 6, 9]
TOKENS_OF_DOCUMENTS = torch.randint(5, 99, (20,), generator=torch.Generator().manual_seed(1))
DOCUMENTS = list(TOKENS_OF_DOCUMENTS.split(SIZES_OF_DOCUMENTS))
CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-4}


@cache
def model_of(family, implementation):
    return new_model(family, implementation)


def new_model(family, implementation):
    torch.manual_seed(0)
    settings = FAMILIES[family] if family in FAMILIES else WITHOUT_FLAT[family][0]
    auto_class = AutoModelForTextEncoding if family in ENCODERS else AutoModel
    config = AutoConfig.for_model(family.split()[0], **settings)
    model = auto_class.from_config(config, attn_implementation=implementation).eval()
    for weight in model.parameters():  # larger than at the start of training, so that attention matters
        if weight.dim() == 2 and family != "mobilebert":  # which has no norms to keep them in bounds
            torch.nn.init.normal_(weight, std=0.2)
    return model


def states(model, **inputs):
    with torch.no_grad():
        return model(**inputs).last_hidden_state


def padded_batch(side):
    pad = partial(pad_sequence, batch_first=True, padding_side=side)
    return {"input_ids": pad(DOCUMENTS), "attention_mask": pad([torch.ones_like(document) for document in DOCUMENTS])}


def first_position(family):
    """RoBERTa's family counts from behind the pad id."""
    embeddings = getattr(model_of(family, "dynmask"), "embeddings", None)
    padding_idx = getattr(getattr(embeddings, "position_embeddings", None), "padding_idx", None)
    return 0 if padding_idx is None else padding_idx + 1


def collated(family, **settings):
    collator = DataCollatorWithFlattening(return_tensors="pt", position_ids_start=first_position(family), **settings)
    batch = collator([{"input_ids": document.tolist()} for document in DOCUMENTS])
    return {name: value for name, value in batch.items() if name != "labels"}


flat_collator = DataCollatorWithLengths(None, flat=True)  # pyright: ignore[reportArgumentType]

TOLD_BY = {
    "lengths": lambda family: flat_collator([{"input_ids": document} for document in DOCUMENTS]),
    "cu_seq_lens": partial(collated, return_position_ids=False, return_flash_attn_kwargs=True),
    "cu_seq_lens and position_ids": partial(collated, return_flash_attn_kwargs=True),
    "position_ids": collated,
    "position_ids, for all that a mask and a cache say": lambda family: (
        collated(family) | {"attention_mask": torch.ones(1, 20, dtype=torch.long), "use_cache": True}
    ),
}


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", [*FAMILIES, *WITHOUT_FLAT])
def test_padded_rows_equal_the_stock_ones(family, side):
    batch = padded_batch(side)
    here = batch["attention_mask"].bool()
    found, expected = (states(model_of(family, implementation), **batch) for implementation in ("dynmask", "eager"))
    torch.testing.assert_close(found[here], expected[here], **CLOSE)


@pytest.mark.parametrize(
    "family, told_by",
    # T5 takes no `position_ids`, and needs none
    [(family, told_by) for family in FAMILIES for told_by in TOLD_BY if family != "t5" or "position" not in told_by],
)
def test_flat_documents_equal_single_ones_and_do_not_leak(family, told_by):
    model, batch = model_of(family, "dynmask"), TOLD_BY[told_by](family)
    found = states(model, **batch)
    single = [states(model, input_ids=document[None])[0] for document in DOCUMENTS]
    torch.testing.assert_close(found[0], torch.cat(single), **CLOSE)
    changed = batch["input_ids"].clone()
    changed[0, 5:11] = 7  # the second document
    again = states(model, **batch | {"input_ids": changed})
    assert not torch.equal(again[0, 5:11], found[0, 5:11])
    first, last = [slice(0, 5), slice(11, 20)]
    same = torch.allclose if family in ROUNDED_BY_OTHERS else torch.equal
    assert same(again[0, first], found[0, first]) and same(again[0, last], found[0, last])


@pytest.mark.parametrize("is_read", [True, False], ids=["read", "not read, as on a GPU"])
@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ROUNDED_BY_OTHERS])
def test_documents_in_front_of_unused_places(family, is_read, monkeypatch):
    if not is_read:
        for module in (layout_module, batch_module):
            monkeypatch.setattr(module, "reads_are_free", lambda device: False)
    batch = TOLD_BY["lengths"](family)
    used = batch["input_ids"].shape[1]
    batch = {name: nn.functional.pad(values, (0, 4)) for name, values in batch.items()}
    found = states(model_of(family, "dynmask"), **batch)[0, :used]
    single = [states(model_of(family, "dynmask"), input_ids=document[None])[0] for document in DOCUMENTS]
    torch.testing.assert_close(found, torch.cat(single), **CLOSE)


@pytest.mark.parametrize("told_by", ["lengths", "cu_seq_lens"])
@pytest.mark.parametrize("family", WITHOUT_FLAT)
def test_families_without_flat_batches(family, told_by):
    with pytest.raises(ValueError, match=f"a flat batch needs .*{WITHOUT_FLAT[family][1]}"):
        states(model_of(family, "dynmask"), **TOLD_BY[told_by](family))


@pytest.mark.parametrize("family", OWN_ATTENTION)
def test_families_with_attention_code_of_their_own(family):
    error = r"needs a model that uses transformers' attention interface; \w+ computes attention by itself"
    with torch.device("meta"), pytest.raises(ValueError, match=error):
        AutoModel.from_config(AutoConfig.for_model(family), attn_implementation="dynmask")


def test_a_family_that_computes_with_its_mask():
    config = AutoConfig.for_model("doge", **GROUPED)
    model = AutoModel.from_config(config, attn_implementation="dynmask")
    with pytest.raises(TypeError, match=r"leaves its masks to .*; this doge model computes with one \(`dtype`\)"):
        states(model, **padded_batch("right"))


def test_a_family_that_adds_to_its_mask():
    """Where a tensor is on the left, torch would put another error in place of ours."""
    mask: Any = masking_utils.create_bidirectional_mask(
        config=AutoConfig.for_model("bert", attn_implementation="dynmask"),
        inputs_embeds=torch.ones(1, 2, 4),
        attention_mask=None,
    )
    for compute in (lambda: torch.ones(2) + mask, lambda: 1.0 - mask, lambda: mask * 2):
        with pytest.raises(TypeError, match=r"this bert model computes with one \(`an operator`\)"):
            compute()


def test_images():
    config = AutoConfig.for_model("vit", **LAYERS, intermediate_size=40, image_size=8, patch_size=4)
    model = AutoModel.from_config(config, attn_implementation="dynmask").eval()
    images = torch.randn(2, 3, 8, 8)
    found = states(model, pixel_values=images)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(found, states(model, pixel_values=images), **CLOSE)


def test_an_expression_on_a_stock_model():
    model, stock = new_model("bert", "dynmask"), model_of("bert", "eager")
    tokens = TOKENS_OF_DOCUMENTS[:18].view(2, 9)
    hf_dynmask.set_mask(model, "causal & window(2, 0)")
    found = states(model, input_ids=tokens)
    explicit = hf_dynmask.modeling.masks.parse("causal & window(2, 0)").dense(torch.full((2,), 9))
    bias = torch.zeros(2, 1, 9, 9).masked_fill(~explicit, torch.finfo(torch.float32).min)
    torch.testing.assert_close(found, states(stock, input_ids=tokens, attention_mask=bias), **CLOSE)
    hf_dynmask.set_mask(model, None)
    torch.testing.assert_close(states(model, input_ids=tokens), states(stock, input_ids=tokens), **CLOSE)


@pytest.mark.parametrize("family, auto_class", [("bert", AutoModelForMaskedLM), ("llama", AutoModelForCausalLM)])
@pytest.mark.parametrize("told_by", TOLD_BY)
def test_heads_hand_on_what_a_flat_batch_says(family, auto_class, told_by):
    config = AutoConfig.for_model(family, **FAMILIES[family])
    model = auto_class.from_config(config, attn_implementation="dynmask").eval()
    with torch.no_grad():
        found = model(**TOLD_BY[told_by](family)).logits[0]
        single = [model(input_ids=document[None]).logits[0] for document in DOCUMENTS]
    torch.testing.assert_close(found, torch.cat(single), **CLOSE)


class Wrapper(PreTrainedModel):
    config_class = BertConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = AutoModel.from_config(config)
        self.post_init()

    def forward(self, input_ids, lengths=None):
        return self.model(input_ids)


def test_a_head_that_keeps_it_to_itself():
    model = Wrapper._from_config(BertConfig(**SIZES), attn_implementation="dynmask")
    with pytest.raises(ValueError, match="a flat batch needs a model whose tokens meet in attention; those of Wrapper"):
        model(TOKENS_OF_DOCUMENTS[None], lengths=torch.tensor(SIZES_OF_DOCUMENTS))
    model(TOKENS_OF_DOCUMENTS[None], lengths=torch.tensor([20]))


# --- NaN -------------------------------------------------------------------------------------------------------------

# Attention with a plan, with cells, with scores that are bounded, with a bias, and with sinks.
OF_EACH_KIND = ["bert", "llama", "mistral", "llama4_text", "gemma2", "t5", "modernbert", "gpt2"]


def embedded(family, tokens):
    return model_of(family, "dynmask").get_input_embeddings()(tokens).detach()


@pytest.mark.parametrize("settings", [{}, {"output_attentions": True}], ids=str)
@pytest.mark.parametrize("family", OF_EACH_KIND)
def test_nan_stays_in_its_document(family, settings):
    model = model_of(family, "dynmask")
    batch = TOLD_BY["lengths"](family) | settings
    embeds = embedded(family, batch.pop("input_ids")).requires_grad_()
    others = torch.tensor([True] * 5 + [False] * 6 + [True] * 9)
    poisoned = embeds.detach().clone()
    poisoned[0, 7, 3] = torch.nan
    results = []
    for inputs in (embeds, poisoned.requires_grad_()):
        output = model(inputs_embeds=inputs, **batch).last_hidden_state[0]
        (grad,) = torch.autograd.grad(output[others].square().sum(), inputs)
        results.append((output[others], grad[0, others]))
        assert output[~others].isfinite().all() == (inputs is embeds)
    for found, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("family", OF_EACH_KIND)
@pytest.mark.parametrize("side", ["right", "left"])
def test_nan_stays_in_its_row_and_reaches_nothing_from_padding(family, side):
    model, batch = model_of(family, "dynmask"), padded_batch(side)
    here = batch["attention_mask"].bool()
    embeds = embedded(family, batch.pop("input_ids"))
    expected = states(model, inputs_embeds=embeds, **batch)
    poisoned = embeds.masked_fill(~here[..., None], torch.nan)
    torch.testing.assert_close(states(model, inputs_embeds=poisoned, **batch)[here], expected[here], **CLOSE)
    poisoned[1, 4] = torch.nan
    found, others = states(model, inputs_embeds=poisoned, **batch), here.clone()
    others[1] = False
    torch.testing.assert_close(found[others], expected[others], **CLOSE)


def test_documents_under_a_mask_function_that_is_not_known():
    """Cell by cell, and yet NaN of one document does not reach another."""
    batch = TOLD_BY["lengths"]("llama")
    model = new_model("llama", "dynmask")
    expected = states(model, **batch)[0]
    own = masking_utils.causal_mask_function
    of_another = masking_utils.and_masks(own, lambda batch, head, query, key: query >= key)
    with pytest.MonkeyPatch.context() as patch:
        create = masking_utils.create_causal_mask
        make = partial(create, and_mask_function=of_another)
        patch.setattr(sys.modules[type(model).__module__], "create_causal_mask", make)
        torch.testing.assert_close(states(model, **batch)[0], expected, **CLOSE)
        embeds = embedded("llama", batch.pop("input_ids"))
        embeds[0, 7] = torch.nan
        found = states(model, inputs_embeds=embeds, **batch)[0]
        torch.testing.assert_close(found[[*range(5), *range(11, 20)]], expected[[*range(5), *range(11, 20)]], **CLOSE)
