"""What a batch says of its sequences to a stock model: obeyed, or refused."""

# pyright: reportArgumentType=false, reportCallIssue=false

from typing import Any

import pytest
import torch
from test_positions import BART
from test_stock_attention import new_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    CLIPTextConfig,
    CLIPTextModel,
    DataCollatorWithFlattening,
)

from hf_dynmask import DataCollatorWithLengths
from stock_models import random_stock

DOCUMENTS = [[5, 6, 7, 8], [9, 10, 11], [12, 13, 14, 15, 16]]
EXAMPLES = [{"input_ids": document} for document in DOCUMENTS]
FLAT = torch.tensor([sum(DOCUMENTS, [])])
POSITIONS = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3, 4]])
CU_SEQ_LENS = torch.tensor([0, 4, 7, 12])
SEQ_IDX = torch.tensor([[0] * 4 + [1] * 3 + [2] * 5])
ROWS = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 0, 0, 0], [12, 13, 14, 0, 0]])
PRESENT = (ROWS != 0).long()
LENGTHS = PRESENT.sum(1)


@pytest.fixture(scope="module", params=["bert", "llama"])
def stock(request):
    return random_stock(request.param, "masked-lm" if request.param == "bert" else "causal-lm")


@pytest.fixture
def model(stock):
    stock.set_attn_implementation("dynmask")
    return stock


def logits(model, **inputs):
    with torch.no_grad():
        return model(**inputs).logits


def singles(model):
    return torch.cat([logits(model, input_ids=torch.tensor([document]))[0] for document in DOCUMENTS])


# --- Flat batches ---


@pytest.mark.parametrize(
    "told",
    [
        {"lengths": [4, 3, 5]},
        {"lengths": (4, 3, 5)},
        {"lengths": torch.tensor([4, 3, 5], dtype=torch.int32)},
        {"lengths": [0, 4, 3, 0, 5, 0]},
        {"lengths": [4, 3, 5], "attention_mask": torch.ones(1, 12, dtype=torch.long)},
        {"cu_seq_lens_q": CU_SEQ_LENS.tolist()},
        {"cu_seq_lens_k": CU_SEQ_LENS},
        {"cu_seq_lens_q": [0, 4, 4, 7, 12, 12]},
        {"seq_idx": SEQ_IDX},
        {"seq_idx": SEQ_IDX.int(), "position_ids": POSITIONS},
        {"cu_seq_lens_q": CU_SEQ_LENS, "max_length_q": 5, "max_length_k": torch.tensor(500)},
        {"lengths": [4, 3, 5], "cu_seq_lens_q": CU_SEQ_LENS, "seq_idx": SEQ_IDX, "position_ids": POSITIONS},
    ],
    ids=lambda told: ", ".join(told),
)
def test_whatever_tells_where_sequences_begin(told, model):
    torch.testing.assert_close(logits(model, input_ids=FLAT, **told)[0], singles(model))


@pytest.mark.parametrize(
    "settings",
    [{}, {"return_seq_idx": True}, {"return_flash_attn_kwargs": True}]
    + [
        {"return_seq_idx": True, "return_flash_attn_kwargs": True, "return_position_ids": told}
        for told in (True, False)
    ],
    ids=str,
)
def test_what_the_collator_of_transformers_sends(settings, model):
    batch = DataCollatorWithFlattening(**settings)([dict(example) for example in EXAMPLES])
    del batch["labels"]
    torch.testing.assert_close(logits(model, **batch)[0], singles(model))


@pytest.mark.parametrize(
    "told, message",
    [
        (
            {"cu_seq_lens_q": [0, 4, 7]},
            r"from 0 to the width of the row, 12; got \[0, 4, 7\]",
        ),
        ({"cu_seq_lens_q": [4, 7, 12]}, r"from 0 to the width of the row, 12; got \[4, 7, 12\]"),
        (
            {"cu_seq_lens_q": CU_SEQ_LENS, "cu_seq_lens_k": [0, 5, 12]},
            r"`cu_seq_lens_k` must equal `cu_seq_lens_q`, \[0, 4, 7, 12\]; got \[0, 5, 12\]",
        ),
        (
            {"cu_seq_lens_q": CU_SEQ_LENS, "lengths": [4, 4, 4]},
            "`cu_seq_lens_q` must be the running sums of `lengths`",
        ),
        ({"seq_idx": SEQ_IDX, "lengths": [4, 4, 4]}, "`seq_idx` must change only where a sequence of `lengths`"),
        *(
            (
                {name: value, "position_ids": torch.arange(12)[None]},
                "`position_ids` must restart where sequences begin and only there",
            )
            for name, value in {"lengths": [4, 3, 5], "cu_seq_lens_q": CU_SEQ_LENS, "seq_idx": SEQ_IDX}.items()
        ),
        ({"seq_idx": SEQ_IDX[0]}, r"`seq_idx` must have the input's shape \(1, 12\); got \(12,\)"),
        ({"lengths": [4, 3, 6]}, "`lengths` of a flat batch must add up to at most its width 12; got a sum of 13"),
        ({"lengths": [4.0, 3.0, 5.0]}, "`lengths` must be integers; got dtype torch.float32"),
        ({"lengths": [[4, 3, 5]]}, r"`lengths` must be a vector; got shape \(1, 3\)"),
        ({"lengths": [-1, 13]}, "`lengths` must not be negative; got -1"),
        ({"lengths": [13]}, "`lengths` must not be beyond the row width 12; got 13"),
        (
            {"lengths": [4, 3, 5], "max_length_q": 4},
            "`max_length_q` must be at least the longest sequence's length, 5; got 4",
        ),
        (
            {"lengths": [4, 3, 5], "attention_mask": (FLAT < 10).long()},
            "`lengths` and `attention_mask` must name the same",
        ),
        (
            {"lengths": [4, 3, 5], "attention_mask": torch.ones(1, 1, 12, 12, dtype=torch.bool)},
            r"`lengths` must come without an explicit mask, .* got a mask of shape \(1, 1, 12, 12\)",
        ),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else None,
)
def test_contradictions(told, message, model):
    with pytest.raises(ValueError, match=message):
        logits(model, input_ids=FLAT, **told)


def test_lengths_without_tokens(model):
    with pytest.raises(ValueError, match="`lengths` must come with `input_ids` or `inputs_embeds`; got none"):
        logits(model, lengths=[4, 3, 5])


@pytest.mark.parametrize("told", [{"lengths": [4, 3, 5]}, {"position_ids": POSITIONS}])
def test_neftune_must_have_rows(told, model):
    embeddings = model.get_input_embeddings()
    embeddings.neftune_noise_alpha = 5.0  # as the Trainer sets it
    try:
        model.train()
        with pytest.raises(ValueError, match="NEFTune must have rows: .*; got a flat batch"):
            logits(model, input_ids=FLAT, **told)
        logits(model, input_ids=ROWS, lengths=LENGTHS)
        model.eval()
        logits(model, input_ids=FLAT, **told)
    finally:
        del embeddings.neftune_noise_alpha
        model.eval()


@pytest.mark.parametrize("told", [{"lengths": [4, 3, 5, 0]}, {"position_ids": POSITIONS}], ids=["lengths", "positions"])
def test_each_sequence_is_pooled(told):
    for family, task in {"bert": "base", "albert": "base", "bert classes": "sequence-classification"}.items():
        model = random_stock("bert", task) if family.split()[0] == "bert" else new_model("albert", "eager")
        model.set_attn_implementation("dynmask")
        name = "pooler_output" if task == "base" else "logits"
        with torch.no_grad():
            found = model(input_ids=FLAT, **told)[name]
            single = [model(input_ids=torch.tensor([document]))[name] for document in DOCUMENTS]
        torch.testing.assert_close(found[:3], torch.cat(single))
        assert len(found) == len(told.get("lengths", DOCUMENTS))


@pytest.mark.parametrize("told", [{"lengths": [4, 3, 5]}, {"position_ids": POSITIONS}], ids=["lengths", "positions"])
@pytest.mark.parametrize("family", ["llama", "roberta", "distilbert"])
def test_heads_that_read_one_token_of_each_row(family, told):
    model = random_stock(family, "sequence-classification", pad_token_id=0)
    model.set_attn_implementation("dynmask")
    with pytest.raises(ValueError, match=r"a head that reads all tokens.*; \w+ForSequenceClassification reads one"):
        model(input_ids=FLAT, **told)


def test_a_tuple_of_a_model_that_pools():
    model = random_stock("bert", "base")
    model.set_attn_implementation("dynmask")
    with pytest.raises(ValueError, match="`return_dict` must be True for a flat batch of BertModel, .*; got False"):
        model(input_ids=FLAT, lengths=[4, 3, 5], return_dict=False)


def test_a_model_that_pools_by_itself():
    sizes = {"vocab_size": 99, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = CLIPTextModel(CLIPTextConfig(**sizes, intermediate_size=16, attn_implementation="dynmask"))
    with pytest.raises(ValueError, match="needs a model that pools states by a known part; CLIPText.*pools by itself"):
        model(input_ids=FLAT, lengths=[4, 3, 5])


def test_positions_that_a_model_does_not_take():
    """BART's decoder counts columns, whatever `position_ids` say."""
    config = AutoConfig.for_model("bart", **BART)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="dynmask").eval()
    with pytest.raises(ValueError, match="needs a model that takes `position_ids`; this bart model counts columns"):
        model(input_ids=FLAT, position_ids=POSITIONS)


# --- Rows ---


@pytest.mark.parametrize("mask", [PRESENT[:, None] * PRESENT[:, :, None], torch.ones(3, dtype=torch.long)])
def test_masks_of_other_dimensions(mask, model):
    with pytest.raises(ValueError, match=r"`attention_mask` must have a row for each row of tokens, .*; got shape \(3"):
        logits(model, input_ids=ROWS, attention_mask=mask)


def test_whether_a_mask_is_causal():
    """Other attention obeys `is_causal` where it is given no mask."""
    bert = random_stock("bert", "masked-lm")
    bert.set_attn_implementation("dynmask")
    for told in ({}, {"attention_mask": PRESENT}, {"lengths": LENGTHS}):
        assert torch.equal(logits(bert, input_ids=ROWS, is_causal=False, **told), logits(bert, input_ids=ROWS, **told))
        with pytest.raises(ValueError, match="must be what the mask of this bert model is, 'full'; got True"):
            logits(bert, input_ids=ROWS, is_causal=True, **told)


@pytest.mark.parametrize(
    "told",
    [
        {"lengths": LENGTHS},
        {"lengths": LENGTHS.tolist(), "attention_mask": PRESENT},
        {"lengths": LENGTHS, "attention_mask": PRESENT.bool()},
        {"lengths": LENGTHS, "position_ids": (PRESENT.cumsum(1) - 1) * PRESENT},
        {"attention_mask": PRESENT, "position_ids": (PRESENT.cumsum(1) - 1) * PRESENT},
        {"attention_mask": PRESENT, "position_ids": torch.arange(5)[None]},
        {"lengths": LENGTHS, "position_ids": torch.arange(5)[None]},
        {"attention_mask": PRESENT, "position_ids": (PRESENT.cumsum(1) - 1).masked_fill(PRESENT == 0, 1)},
    ],
    ids=lambda told: ", ".join(told),
)
def test_rows(told, model):
    found = logits(model, input_ids=ROWS, **told)
    for row, length in enumerate(LENGTHS.tolist()):
        torch.testing.assert_close(found[row, :length], logits(model, input_ids=ROWS[row : row + 1, :length])[0])


def test_rows_of_the_collator_with_positions(model):
    class Tokenizer:
        pad_token_id = 0

    batch = DataCollatorWithLengths(Tokenizer(), return_position_ids=True)(EXAMPLES)
    found = logits(model, **batch)
    assert found.shape[:2] == (3, 5)
    rows = [states[:length] for states, length in zip(found, batch["lengths"].tolist(), strict=True)]
    torch.testing.assert_close(torch.cat(rows), singles(model))


@pytest.mark.parametrize("by", ["position_ids", "seq_idx"])
def test_rows_of_several_sequences_with_padding(by, model):
    tokens, value = torch.cat([FLAT, FLAT]), {"position_ids": POSITIONS, "seq_idx": SEQ_IDX}[by].repeat(2, 1)
    tokens[1, 7:] = value[1, 7:] = 0
    told = {"input_ids": tokens, by: value}
    found, expected = logits(model, **told, attention_mask=(tokens != 0).long()), singles(model)
    torch.testing.assert_close(found[0], expected)
    torch.testing.assert_close(found[1, :7], expected[:7])
    with pytest.raises(ValueError, match="must restart where sequences begin|must change only where a sequence"):
        logits(model, **told, lengths=[12, 7])  # which say that each row is one sequence


PAIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("sequence-classification", {}),
    "distilbert": ("question-answering", {}),
    "gpt2": ("sequence-classification", {}),
    "llama": ("sequence-classification", {}),
    "modernbert": ("sequence-classification", {"classifier_pooling": "mean"}),
    "roberta": ("token-classification", {"pad_token_id": 0}),
}


@pytest.mark.parametrize("family", PAIRS)
def test_heads_see_lengths_as_they_see_a_mask(family):
    task, settings = PAIRS[family]
    model = random_stock(family, task, **settings)
    model.set_attn_implementation("dynmask")
    found, expected = (model(input_ids=ROWS, **told) for told in ({"lengths": LENGTHS}, {"attention_mask": PRESENT}))
    for name in expected:
        if "logits" in name:
            assert torch.equal(found[name], expected[name])


def test_lengths_of_choices():
    model = random_stock("electra", "multiple-choice")
    model.set_attn_implementation("dynmask")
    choices, present = (torch.stack([each, each.flip(0)]) for each in (ROWS, PRESENT))
    expected = model(input_ids=choices, attention_mask=present).logits
    assert torch.equal(model(input_ids=choices, lengths=present.sum(-1)).logits, expected)
    with pytest.raises(ValueError, match=r"`lengths` must have one entry a row, shape \(6,\)"):
        model(input_ids=choices, lengths=[5, 2, 3])


def test_embeddings_with_lengths_alone_must_reach_the_width(model):
    """Lengthened in front by other code, they would look like this."""
    embeddings = model.get_input_embeddings()(ROWS)
    longer = torch.cat([embeddings[:, :1], embeddings], dim=1)
    expected = logits(model, inputs_embeds=embeddings, attention_mask=PRESENT)
    assert torch.equal(logits(model, inputs_embeds=embeddings, lengths=LENGTHS), expected)
    with pytest.raises(ValueError, match="`lengths` with `inputs_embeds` must reach the width 6 .* got at most 5"):
        logits(model, inputs_embeds=longer, lengths=LENGTHS)
    mask = torch.cat([PRESENT[:, :1], PRESENT], dim=1)
    with pytest.raises(ValueError, match="must name the same tokens.*PEFT's prompt methods.*`DataCollatorWithPadding`"):
        logits(model, inputs_embeds=longer, lengths=LENGTHS, attention_mask=mask)


def test_lengths_of_both_sides():
    model = random_stock("bart", "seq2seq-lm")
    model.set_attn_implementation("dynmask")
    labels = torch.tensor([[5, 6, 7, 8], [9, 10, -100, -100], [11, 12, 13, -100]])
    inputs = {"input_ids": ROWS, "labels": labels}
    mask = (labels != -100).long()
    expected = model(**inputs, attention_mask=PRESENT, decoder_attention_mask=mask)
    found = model(**inputs, lengths=LENGTHS, decoder_lengths=[4, 2, 3])
    assert torch.equal(found.logits, expected.logits) and torch.equal(found.loss, expected.loss)
    with pytest.raises(ValueError, match="must name the same tokens; got lengths .4, 2, 3. and a mask with .4, 4, 4."):
        model(**inputs, decoder_lengths=[4, 2, 3], decoder_attention_mask=torch.ones_like(mask))
    with pytest.raises(ValueError, match="`decoder_lengths` must be of rows, one entry each; got 2 for 1"):
        model(input_ids=ROWS[:1], decoder_input_ids=FLAT, decoder_lengths=[4, 8])
    with pytest.raises(ValueError, match="a flat batch needs a model without cross-attention"):
        model(input_ids=FLAT, lengths=[4, 8], decoder_input_ids=FLAT)


# --- Caches ---


@pytest.fixture
def causal():
    model = random_stock("llama", "causal-lm")
    model.set_attn_implementation("dynmask")
    return model


def cache_of(output):
    name = "cache" if "cache" in output else "past_key_values"  # before transformers 5.2x
    return {name: output[name]}


def test_a_cache_of_a_flat_batch_is_not_gone_on_from(causal):
    cache = cache_of(causal(input_ids=FLAT, lengths=[4, 3, 5], use_cache=True))
    with pytest.raises(ValueError, match="a cache must hold one sequence a row; got one that a flat batch has filled"):
        causal(input_ids=FLAT[:, :1], **cache)


def test_a_flat_batch_behind_a_cache(causal):
    cache = cache_of(causal(input_ids=FLAT, use_cache=True))
    with pytest.raises(ValueError, match=r"`position_ids` must go on from the \[12\] tokens in the cache; got \[0\]"):
        causal(input_ids=FLAT, lengths=[4, 3, 5], **cache)


def test_lengths_behind_a_cache(causal):
    cache = cache_of(causal(input_ids=ROWS, use_cache=True))
    with pytest.raises(ValueError, match="`lengths` with a cache in use must come with the `attention_mask` of all"):
        causal(input_ids=ROWS, lengths=LENGTHS, **cache)


# --- Masks that number documents ---

NUMBERED = [
    [[1, 1, 2, 2, 0]],
    [[1, 1, 2, 2, 3]],
    [[0, 0, 2, 2, 2]],
    [[1, 2, 2, 2, 2]],
    [[2, 2, 2, 2, 2]],
    [[1, 1, 1, 1, -1]],
    [[1, 1, 255, 0, 0]],
]
NOT_BINARY = [
    *NUMBERED,
    [[1.0, 0.5, 0.0, 0.0, 0.0]],
    [[0.0, 0.0, -torch.inf, 0.0, 0.0]],
    [[1.0, torch.nan, 0.0, 0.0, 0.0]],
]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mask", NUMBERED)
def test_masks_that_number_documents(mask, dtype, model):
    tokens, mask = ROWS[:1], torch.tensor(mask).to(dtype)
    match = r"`attention_mask` must hold only 0 and 1; got .*`position_ids` that restart, or by `segment_ids`"
    for told in ({}, {"use_cache": True}, {"position_ids": torch.tensor([[0, 1, 0, 1, 2]])}):
        with pytest.raises(ValueError, match=match):
            logits(model, input_ids=tokens, attention_mask=mask, **told)
    logits(model, input_ids=tokens, attention_mask=mask > 0)


@pytest.mark.parametrize("mask", NOT_BINARY[-3:])
def test_masks_that_are_no_zeros_and_ones(mask, model):
    with pytest.raises(ValueError, match="`attention_mask` must hold only 0 and 1; got "):
        logits(model, input_ids=ROWS[:1], attention_mask=torch.tensor(mask))


@pytest.mark.parametrize("name", ["attention_mask", "decoder_attention_mask"])
def test_masks_of_both_sides(name):
    model = random_stock("bart", "base")
    model.set_attn_implementation("dynmask")
    with pytest.raises(ValueError, match=f"`{name}` must hold only 0 and 1; got 2"):
        model(input_ids=ROWS, decoder_input_ids=ROWS, **{name: 2 * PRESENT})
    model(input_ids=ROWS, decoder_input_ids=ROWS, **{name: PRESENT.float()})


def test_a_mask_that_a_model_reads_itself():
    """Its layers get an explicit mask, made of numbers that nobody looked at."""
    sizes = {"vocab_size": 99, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model("layoutlm", **sizes, intermediate_size=16)
    model = AutoModel.from_config(config, attn_implementation="dynmask")
    model(input_ids=ROWS, attention_mask=PRESENT)
    with pytest.raises(ValueError, match="`attention_mask` must hold only 0 and 1; got 2"):
        model(input_ids=ROWS, attention_mask=2 * PRESENT)


def test_a_mask_is_looked_at_where_a_device_is_waited_for_anyway(model):
    """Whether all tokens are there, and whether the mask says so in 0 and 1, is read at once."""
    reads = []

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func in (torch.ops.aten._local_scalar_dense.default,):
                reads.append(func)
            return func(*args, **kwargs or {})

    counts = []
    for mask in (PRESENT.bool(), PRESENT):
        reads.clear()
        with Counter():
            logits(model, input_ids=ROWS, attention_mask=mask)
        counts.append(len(reads))
    assert counts[0] == counts[1]


def test_generation_refuses_them():
    model = random_stock("llama", "causal-lm")
    model.set_attn_implementation("dynmask")
    with pytest.raises(ValueError, match="`attention_mask` must hold only 0 and 1; got 2"):
        model.generate(ROWS, attention_mask=2 * PRESENT, max_new_tokens=2)


# --- Rows of fixed width, whose last places are of no sequence ---


def with_unused_places(token=0):
    tokens = torch.cat([FLAT, torch.full((1, 5), token)], dim=1)
    return {"input_ids": tokens, "lengths": torch.tensor([4, 3, 5, 0, 0])}


@pytest.mark.parametrize("positions", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_unused_places_are_of_no_sequence(positions, masked, model):
    batch = with_unused_places()
    if positions:
        batch["position_ids"] = torch.nn.functional.pad(POSITIONS, (0, 5))
    if masked:
        batch["attention_mask"] = (batch["input_ids"] != 0).long()
    torch.testing.assert_close(logits(model, **batch)[0, :12], singles(model))


def test_unused_places_reach_nothing(model):
    expected = model(**with_unused_places()).logits[:, :12]
    batch = with_unused_places(token=7)
    embeddings = model.get_input_embeddings()(batch.pop("input_ids")).detach()
    embeddings[:, 12:] = torch.nan
    torch.testing.assert_close(model(inputs_embeds=embeddings, **batch).logits[:, :12], expected)


def test_gradients_with_unused_places(stock):
    """Of a loss without labels there."""
    gradients = []
    stock.set_attn_implementation("dynmask")
    for batch in ({"input_ids": FLAT, "lengths": torch.tensor([4, 3, 5])}, with_unused_places()):
        labels = batch["input_ids"].masked_fill(batch["input_ids"] == 0, -100)
        stock.zero_grad()
        loss = stock(**batch, labels=labels).loss
        loss.backward()
        grads = {name: weight.grad.clone() for name, weight in stock.named_parameters() if weight.grad is not None}
        gradients.append({"loss": loss.detach(), **grads})
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("family", ["modernbert", "mistral", "qwen2", "roberta"])
def test_unused_places_in_other_families(family):
    model = random_stock(family, "causal-lm" if family in ("mistral", "qwen2") else "masked-lm")
    model.set_attn_implementation("dynmask")
    torch.testing.assert_close(logits(model, **with_unused_places())[0, :12], singles(model))
