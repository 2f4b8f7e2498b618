"""Decoding with a cache, column by column, against one forward pass of the whole."""

# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false

from dataclasses import dataclass, field
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, MistralConfig, StaticCache

from hf_dynmask import DynMaskConfig, DynMaskForCausalLM, DynMaskModel, SequenceLayout
from hf_dynmask.modeling import attention
from hf_dynmask.modeling.modules import DynMaskKeyScores
from strategies import LEAVES, examples, texts

HEADS, CHOICES, VOCABULARY = 4, 2, 29
SEEN_AHEAD = [leaf for leaf in LEAVES if leaf != "dense"]  # an explicit mask is of the columns of now: see below
OF_TOKENS = ("segment_ids", "global_tokens", "missing")


def causal_lm(mask: str | None) -> DynMaskForCausalLM:
    """A tiny model in eval mode; what it learns to choose keys by is random, too."""
    torch.manual_seed(0)
    config = DynMaskConfig(
        mask=mask,
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        intermediate_size=11,
        position_type="rotary",
        initializer_range=0.2,
    )
    model = DynMaskForCausalLM(config).eval()
    for module in model.modules():
        if isinstance(module, DynMaskKeyScores):
            torch.nn.init.normal_(module.scale)
    return model


def cache_of(model: DynMaskForCausalLM, kind: str, columns: int):
    if kind == "dynamic":
        return DynamicCache(config=model.config)
    return StaticCache(config=model.config, max_cache_len=columns)


def sliding_cache(window: int) -> DynamicCache:
    """A cache that drops what a causal window of so many keys does not see."""
    return DynamicCache(config=MistralConfig(num_hidden_layers=2, sliding_window=window))


def decode(model: DynMaskForCausalLM, cuts: list[int], cache, **inputs: Tensor) -> Tensor:
    """Logits `(B, T, V)` of columns that come in several calls; `cuts` are the ends of all but the last."""
    ids = inputs.pop("input_ids")
    logits = []
    for start, stop in zip([0, *cuts], [*cuts, ids.shape[1]], strict=True):
        of_columns = {
            name: value[:, :stop] if name in (*OF_TOKENS, "attention_mask") else value for name, value in inputs.items()
        }
        outputs = model(ids[:, start:stop], past_key_values=cache, **of_columns)
        assert outputs.past_key_values is cache
        logits.append(outputs.logits)
    return torch.cat(logits, dim=1)


def assert_same_logits(model: DynMaskForCausalLM, cuts: list[int], cache, **inputs: Tensor) -> None:
    with torch.no_grad():
        expected = model(**inputs, use_cache=False).logits
        found = decode(model, cuts, cache, **inputs)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@dataclass(frozen=True)
class Decoding:
    """A batch with tokens anywhere in its rows, a mask that sees nothing to come, where the calls are cut, and up to
    how many queries keys stay where they are in the cache."""

    mask: str
    cuts: list[int]
    cache: str
    few_queries: int
    inputs: dict[str, Tensor] = field(repr=False)


def place(rows: int, columns: int, padding: str, random: np.random.Generator) -> Tensor:
    """Which tokens are there `(B, T)`."""
    lengths = random.integers(0, columns + 1, (rows, 1))
    if padding == "holes":
        return torch.from_numpy(random.random((rows, columns)) < 0.7)
    column = np.arange(columns)
    return torch.from_numpy(column < lengths if padding == "right" else column >= columns - lengths)


@st.composite
def decodings(draw):
    rows, columns = draw(st.integers(1, 3)), draw(st.integers(2, 12))
    cuts = sorted(draw(st.sets(st.integers(1, columns - 1), min_size=1)))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    present = place(rows, columns, draw(st.sampled_from(["left", "right", "holes"])), random)
    expression = draw(texts(depth=3, templates=SEEN_AHEAD, heads=HEADS, choices=CHOICES))
    missing = torch.from_numpy(random.random((rows, columns)) < 0.2)
    of_prompt = (present & ~missing)[:, : cuts[0]]
    longest = int((present[:, : cuts[0]].cumsum(1) * of_prompt).amax(1).min())  # prefix that every prompt has
    mask = draw(
        st.sampled_from(
            [
                f"causal & ({expression})",
                f"({expression}) & causal",
                f"causal | prefix({longest})",
                f"causal & ({expression}) | prefix({longest})",
                f"heads(causal & ({expression}), causal | prefix({longest}))",
            ]
        )
    )
    fields = {
        "input_ids": random.integers(0, VOCABULARY, (rows, columns)),
        "attention_mask": present.numpy().astype(int),
        "segment_ids": random.integers(0, 3, (rows, columns)),
        "global_tokens": random.random((rows, columns)) < 0.2,
        "prefix_lengths": random.integers(0, columns + 2, rows),
        "hidden_spans": random.integers(0, columns + 2, (rows, 2, 2)),
        "mask_choice": random.integers(0, CHOICES, rows),
    }
    inputs = {name: torch.from_numpy(value) for name, value in fields.items()} | {"missing": missing}
    kind, few_queries = draw(st.sampled_from(["dynamic", "static"])), draw(st.sampled_from([0, attention.FEW_QUERIES]))
    return Decoding(mask, cuts, kind, few_queries, inputs)


@examples(200)
@given(decodings())
def test_decoding_with_a_cache_equals_one_forward_pass(case):
    model = causal_lm(case.mask)
    cache = cache_of(model, case.cache, case.inputs["input_ids"].shape[1])
    with mock.patch.object(attention, "FEW_QUERIES", case.few_queries):
        assert_same_logits(model, case.cuts, cache, **case.inputs)


@pytest.mark.parametrize("window", [2, 3, 4, 12, 20])
@pytest.mark.parametrize("cuts", [[5], [1, 2, 3, 9], [7, 8]])
def test_a_sliding_cache_drops_only_what_the_window_does_not_see(window, cuts):
    model = causal_lm(f"causal & window({window - 1}, 0)")
    present = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1], [1] * 12])
    inputs = {"input_ids": torch.randint(VOCABULARY, present.shape), "attention_mask": present}
    cache = sliding_cache(window)
    assert_same_logits(model, cuts, cache, **inputs)
    kept = cache.layers[0].keys.shape[2]  # pyright: ignore[reportAttributeAccessIssue]
    assert kept == min(window - 1, 12)


def test_a_window_wider_than_that_of_the_cache_is_refused():
    model = causal_lm("causal & window(4, 0)")
    ids = torch.randint(VOCABULARY, (2, 9))
    with pytest.raises(ValueError, match=r"'causal & window\(4, 0\)' lets a token see .* the cache has dropped"):
        decode(model, [6, 7], sliding_cache(4), input_ids=ids)


def test_explicit_masks_are_of_the_columns_of_now():
    model = causal_lm("causal")
    ids, allowed = torch.randint(VOCABULARY, (2, 9)), torch.rand(2, 9, 9) < 0.6
    with torch.no_grad():
        expected = model(ids, attention_mask=allowed).logits
        cache, found = DynamicCache(config=model.config), []
        for start, stop in [(0, 4), (4, 5), (5, 9)]:
            now = allowed[:, start:stop, :stop]
            found.append(model(ids[:, start:stop], attention_mask=now, past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(found, dim=1), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "mask", ["full", "backward", "window(2)", "chunk(4)", "causal | prefix(6)", "segments", "~causal | causal"]
)
def test_a_mask_that_sees_the_future_is_refused(mask):
    model = causal_lm(mask)
    inputs = {"input_ids": torch.randint(VOCABULARY, (2, 5)), "segment_ids": torch.zeros(2, 5, dtype=torch.long)}
    with pytest.raises(ValueError, match="lets a token see later ones, which a cache does not hold yet"):
        model(**inputs, use_cache=True)
    assert model(**inputs, use_cache=False).past_key_values is None
    with pytest.raises(ValueError, match="Join it with `causal`, make prefixes no longer than the prompt, or set use_"):
        model.generate(inputs["input_ids"], segment_ids=inputs["segment_ids"], max_new_tokens=2, pad_token_id=0)


def test_a_prefix_may_be_as_long_as_the_shortest_prompt():
    model, ids = causal_lm("causal | prefix"), torch.randint(VOCABULARY, (2, 8))
    of_tokens = {"attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1] * 8])}
    assert_same_logits(
        model,
        [5],
        DynamicCache(config=model.config),
        input_ids=ids,
        prefix_lengths=torch.tensor([3, 5]),
        **of_tokens,
    )
    with pytest.raises(ValueError, match="lets a token see later ones"):
        model(ids[:, :5], attention_mask=of_tokens["attention_mask"][:, :5], prefix_lengths=torch.tensor([4, 5]))


def test_a_decoder_whose_encoder_had_one_row():
    """Its cross-attention has keys of several sequences in a row, which dense attention would mix."""
    config = DynMaskConfig(
        mask="causal",
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        intermediate_size=11,
        add_cross_attention=True,
        initializer_range=0.3,
    )
    model, ids = DynMaskModel(config).eval(), torch.randint(VOCABULARY, (2, 5))
    encoded = {"encoder_layout": SequenceLayout.from_lengths(torch.tensor([4, 5]), (1, 9))}
    encoded |= {"encoder_hidden_states": torch.randn(1, 9, 16)}
    cache = EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))
    with torch.no_grad():
        expected = model(ids, **encoded, use_cache=False).last_hidden_state
        found = [model(ids[:, start : start + 1], **encoded, past_key_values=cache) for start in range(5)]
    torch.testing.assert_close(torch.cat([output.last_hidden_state for output in found], dim=1), expected)


def test_what_a_cache_does_not_go_with_is_named():
    model = causal_lm("causal")
    cache = model(torch.randint(VOCABULARY, (2, 5)), lengths=torch.tensor([5, 3])).past_key_values
    with pytest.raises(ValueError, match="`lengths` must come with the first columns"):
        model(torch.tensor([[7], [7]]), lengths=torch.tensor([1, 1]), past_key_values=cache)
    with pytest.raises(ValueError, match=r"`attention_mask` must have the input's shape \(2, 6\); got \(2, 1\)"):
        model(torch.tensor([[7], [7]]), attention_mask=torch.ones(2, 1), past_key_values=cache)
    flat = torch.randint(VOCABULARY, (1, 7))
    assert model(flat, lengths=torch.tensor([4, 3]), use_cache=True).past_key_values is None
    with pytest.raises(ValueError, match="a cache needs a batch of one sequence a row; got 2 in 1 rows"):
        model(flat, lengths=torch.tensor([4, 3]), past_key_values=DynamicCache(config=model.config))


def test_a_cache_is_handed_back_unless_the_model_trains():
    model, ids = causal_lm(None), torch.randint(VOCABULARY, (2, 5))
    assert model.config.mask == "causal"
    assert model(ids).past_key_values.get_seq_length() == 5
    assert model(ids, use_cache=False).past_key_values is None
    assert model.train()(ids).past_key_values is None
    model.config.use_cache = False
    assert model.eval()(ids).past_key_values is None
