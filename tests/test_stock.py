"""`attn_implementation="dynmask"` on stock models with random tiny weights: padded, flat, without leaks."""

# pyright: reportOptionalMemberAccess=false, reportAttributeAccessIssue=false

from typing import Any

import pytest
import torch
from transformers import (
    AlbertConfig,
    AutoModel,
    BertConfig,
    CamembertConfig,
    CohereConfig,
    DistilBertConfig,
    ElectraConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    ModernBertConfig,
    Olmo2Config,
    OlmoConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
    XLMRobertaConfig,
)

import hf_dynmask

TOKENS: dict[str, Any] = {"vocab_size": 99, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES: dict[str, Any] = TOKENS | {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 37,
}
GROUPED: dict[str, Any] = SIZES | {"num_key_value_heads": 2}
GEMMA: dict[str, Any] = GROUPED | {
    "head_dim": 8,
    "layer_types": ["full_attention", "sliding_attention"],
    "sliding_window": 3,
}

FAMILIES = {
    "albert": AlbertConfig(**SIZES, embedding_size=16),
    "bert": BertConfig(**SIZES),
    "camembert": CamembertConfig(**SIZES),
    "cohere": CohereConfig(**GROUPED),
    "distilbert": DistilBertConfig(**TOKENS, dim=32, n_layers=2, n_heads=4, hidden_dim=37),
    "electra": ElectraConfig(**SIZES, embedding_size=16),
    "gemma2": Gemma2Config(**GEMMA),
    "gemma3": Gemma3TextConfig(**GEMMA),
    "gpt2": GPT2Config(**TOKENS, n_embd=32, n_layer=2, n_head=4),
    "gpt_neox": GPTNeoXConfig(**SIZES),
    "llama": LlamaConfig(**GROUPED),
    "mistral": MistralConfig(**GROUPED, sliding_window=3),
    "modernbert": ModernBertConfig(**SIZES, local_attention=4, cls_token_id=1, sep_token_id=2),
    "olmo": OlmoConfig(**GROUPED),
    "olmo2": Olmo2Config(**GROUPED),
    "opt": OPTConfig(
        **TOKENS, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=37, word_embed_proj_dim=32
    ),
    "phi": PhiConfig(**SIZES),
    "phi3": Phi3Config(**GROUPED),
    "qwen2": Qwen2Config(**GROUPED),
    "qwen3": Qwen3Config(**GROUPED, head_dim=8),
    "roberta": RobertaConfig(**SIZES),
    "xlm-roberta": XLMRobertaConfig(**SIZES),
}
OFFSET = {"roberta": 1, "camembert": 1, "xlm-roberta": 1}  # positions start behind the pad id
SIZES_OF_ROWS = [5, 6, 9]
HERE = torch.ones(3, 9, dtype=torch.long)
HERE[0, 5:] = HERE[1, :3] = 0


def model_of(family, implementation):
    torch.manual_seed(0)
    model = AutoModel.from_config(FAMILIES[family], attn_implementation=implementation).eval()
    for weight in model.parameters():  # larger than at the start of training, so that attention matters
        if weight.dim() == 2:
            torch.nn.init.normal_(weight, std=0.2)
    return model


def positions(family, here):
    return (here.cumsum(1) - 1).clamp(min=0) + (OFFSET.get(family, 0) + 1 if family in OFFSET else 0)


def states(model, **inputs):
    with torch.no_grad():
        return model(**inputs).last_hidden_state


def padded(model, family, tokens, here=HERE):
    extra = {} if family == "distilbert" else {"position_ids": positions(family, here)}
    if family == "distilbert":  # positions are places there: padding on the right alone
        here = here.sort(dim=1, descending=True).values
    return states(model, input_ids=tokens, attention_mask=here, **extra), here.bool()


def flat_inputs(family):
    start = OFFSET[family] + 1 if family in OFFSET else 0
    return {"position_ids": torch.cat([torch.arange(size) + start for size in SIZES_OF_ROWS])[None]}


def cumulative():
    ends = torch.tensor([0, *SIZES_OF_ROWS]).cumsum(0).int()
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 9, "max_length_k": 9}


@pytest.fixture
def tokens():
    torch.manual_seed(1)
    return torch.randint(5, 99, (3, 9))


@pytest.mark.parametrize("family", FAMILIES)
def test_padded_rows_equal_the_stock_ones(family, tokens):
    found, here = padded(model_of(family, "dynmask"), family, tokens)
    expected, _ = padded(model_of(family, "eager"), family, tokens)
    torch.testing.assert_close(found[here], expected[here], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("told_by", ["cu_seq_lens", "position_ids", "all-ones mask"])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "distilbert"])
def test_flat_sequences_equal_single_ones_and_do_not_leak(family, told_by, tokens):
    model = model_of(family, "dynmask")
    flat = tokens[HERE.bool()][None]
    extra = flat_inputs(family)
    if told_by == "cu_seq_lens":
        extra |= cumulative()
    elif told_by == "all-ones mask":
        extra["attention_mask"] = torch.ones_like(flat)
    found = states(model, input_ids=flat, **extra)
    single = [
        states(model, input_ids=part[None], position_ids=place[None])[0]
        for part, place in zip(flat[0].split(SIZES_OF_ROWS), extra["position_ids"][0].split(SIZES_OF_ROWS), strict=True)
    ]
    torch.testing.assert_close(found[0], torch.cat(single), atol=1e-5, rtol=1e-4)
    changed = flat.clone()
    changed[0, 5:11] = 7  # the second document
    again = states(model, input_ids=changed, **extra)
    assert torch.equal(again[0, :5], found[0, :5]) and torch.equal(again[0, 11:], found[0, 11:])
    assert not torch.equal(again[0, 5:11], found[0, 5:11])


def test_an_expression_on_a_stock_model(tokens):
    model = model_of("bert", "dynmask")
    hf_dynmask.set_mask(model, "causal & window(2, 0)")
    found = states(model, input_ids=tokens)
    explicit = hf_dynmask.masks.parse("causal & window(2, 0)").dense(torch.full((3,), 9))
    bias = torch.zeros(3, 1, 9, 9).masked_fill(~explicit, torch.finfo(torch.float32).min)
    expected = states(model_of("bert", "eager"), input_ids=tokens, attention_mask=bias)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    hf_dynmask.set_mask(model, None)
    torch.testing.assert_close(
        states(model, input_ids=tokens), states(model_of("bert", "eager"), input_ids=tokens), atol=1e-5, rtol=1e-4
    )
