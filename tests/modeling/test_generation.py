"""`DynMaskForCausalLM`: generation from prompts in any form, and losses of flat batches."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, set_seed
from transformers.generation.streamers import BaseStreamer

from hf_dynmask import DynMaskConfig, DynMaskForCausalLM, from_transformers
from stock_models import VOCABULARY, random_stock

NEW, PAD, END = 7, 0, 2
LENGTHS = torch.tensor([3, 8, 1, 5])
WIDTH = 9  # a column wider than the longest prompt
HOW: dict[str, dict[str, Any]] = {
    "greedy": {},
    "greedy to the end": {"min_new_tokens": NEW},
    "without a cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "beams, static cache": {"num_beams": 2, "cache_implementation": "static"},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
}
SAMPLING: dict[str, dict[str, Any]] = {
    "sampling": {"do_sample": True, "top_k": 0},
    "sampling from a few": {"do_sample": True, "top_k": 5, "temperature": 0.7, "num_return_sequences": 3},
    "sampling beams": {"do_sample": True, "num_beams": 2},
}
OF_OUR_OWN = [
    "causal & window(3, 0)",
    "causal & chunk(4)",
    "causal & random(0.6, 3)",
    "causal & (segments | prefix(1))",
]


@pytest.fixture(scope="module", params=["llama", "gpt2", "mistral", "qwen3", "gemma3_text"])
def stock(request) -> PreTrainedModel:
    return random_stock(request.param, "causal-lm")


@pytest.fixture(scope="module")
def model(stock) -> DynMaskForCausalLM:
    return of_stock(stock)


def of_stock(stock: PreTrainedModel, **settings: Any) -> DynMaskForCausalLM:
    converted = from_transformers(stock, **settings)
    assert isinstance(converted, DynMaskForCausalLM)
    return converted


@pytest.fixture(scope="module")
def prompts() -> list[Tensor]:
    torch.manual_seed(3)
    return [torch.randint(3, VOCABULARY, (length,)) for length in LENGTHS.tolist()]


def padded(prompts: list[Tensor], side: str, width: int = WIDTH) -> dict[str, Tensor]:
    """Prompts in rows; padding on a side, or spread within them."""
    ids, mask = torch.full((len(prompts), width), PAD), torch.zeros(len(prompts), width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        columns = {"left": torch.arange(width - len(prompt), width), "right": torch.arange(len(prompt))}
        columns["inside"] = torch.randperm(width)[: len(prompt)].sort().values
        ids[row, columns[side]], mask[row, columns[side]] = prompt, 1
    return {"input_ids": ids, "attention_mask": mask}


def forms(prompts: list[Tensor]) -> dict[str, dict[str, Tensor]]:
    right = padded(prompts, "right")
    return {
        "left": padded(prompts, "left"),
        "right": right,
        "inside": padded(prompts, "inside"),
        "lengths": {"input_ids": right["input_ids"], "lengths": LENGTHS},
        "both": {**right, "lengths": LENGTHS},
    }


def new_tokens(model: PreTrainedModel, inputs: dict[str, Any], **how: Any) -> list[list[int]]:
    """The generated tokens of each sequence, up to its end; prompts come back as they came."""
    set_seed(5)
    sequences = model.generate(**inputs, **{"max_new_tokens": NEW, "pad_token_id": PAD, **how})  # pyright: ignore
    prompts = inputs["input_ids"]
    copies = len(sequences) // len(prompts)
    assert torch.equal(sequences[:, : prompts.shape[1]], prompts.repeat_interleave(copies, dim=0))
    rows = sequences[:, prompts.shape[1] :].tolist()
    return [row[: row.index(END) + 1] if END in row else row for row in rows]


@pytest.mark.parametrize("how", HOW)
def test_the_tokens_are_those_of_the_stock_model_whatever_the_form(stock, model, prompts, how):
    expected = new_tokens(stock, padded(prompts, "left"), **HOW[how])
    for form, inputs in forms(prompts).items():
        assert new_tokens(model, inputs, **HOW[how]) == expected, form
    for prompt in prompts:  # alone: in earlier releases, penalties count padding as tokens of the prompt
        alone = {"input_ids": prompt[None]}
        assert new_tokens(model, alone, **HOW[how]) == new_tokens(stock, alone, **HOW[how])


@pytest.mark.parametrize("how", SAMPLING)
def test_samples_of_one_seed_are_those_of_the_stock_model(stock, model, prompts, how):
    expected = new_tokens(stock, padded(prompts, "left"), **SAMPLING[how])
    assert len({tuple(row) for row in expected}) > 1
    for form, inputs in forms(prompts).items():
        assert new_tokens(model, inputs, **SAMPLING[how]) == expected, form


def test_an_assistant_changes_no_token(stock, model, prompts):
    assistant = of_stock(stock)
    with torch.no_grad():
        for parameter in assistant.parameters():  # often, not always, of the same opinion
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    for prompt in prompts:
        inputs = {"input_ids": prompt[None]}
        expected = new_tokens(model, inputs, min_new_tokens=NEW)
        assert new_tokens(model, inputs, min_new_tokens=NEW, assistant_model=assistant) == expected
        assert new_tokens(model, inputs, min_new_tokens=NEW, prompt_lookup_num_tokens=2) == expected
        assert new_tokens(stock, inputs, min_new_tokens=NEW, assistant_model=assistant) == expected


class Collected(BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


def test_tokens_are_streamed_as_they_come(model, prompts):
    streamer, inputs = Collected(), {"input_ids": prompts[0][None]}
    tokens = new_tokens(model, inputs, streamer=streamer)
    assert streamer.tokens == [*prompts[0].tolist(), *tokens[0]] and streamer.ended


def test_scores_and_sequences_in_one_output(stock, model, prompts):
    how = {"max_new_tokens": NEW, "pad_token_id": PAD, "return_dict_in_generate": True, "output_scores": True}
    expected = stock.generate(**padded(prompts, "left"), **how)
    inputs = padded(prompts, "right")
    found = model.generate(**inputs, **how)
    assert torch.equal(found.sequences[:, :WIDTH], inputs["input_ids"])
    assert torch.equal(found.sequences[:, WIDTH:], expected.sequences[:, WIDTH:])
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-4, atol=1e-4)


def test_a_conversation_goes_on_with_the_cache_of_the_turn_before(model, prompts):
    how = {"min_new_tokens": NEW, "max_new_tokens": NEW, "pad_token_id": PAD}
    first = padded(prompts, "right")
    before = model.generate(**first, **how, return_dict_in_generate=True)
    turn = torch.randint(3, VOCABULARY, (len(prompts), 3))
    ids = torch.cat([before.sequences, turn], dim=1)
    mask = torch.cat([first["attention_mask"], torch.ones(len(prompts), NEW + 3, dtype=torch.long)], dim=1)
    expected = model.generate(ids, attention_mask=mask, **how)
    # The cache holds the columns in the order in which the first call arranged them: padding on the left.
    left = padded(prompts, "left")
    arranged = {
        "inputs": torch.cat([left["input_ids"], ids[:, WIDTH:]], dim=1),
        "attention_mask": torch.cat([left["attention_mask"], mask[:, WIDTH:]], dim=1),
    }
    found = model.generate(**arranged, **how, past_key_values=before.past_key_values)
    assert torch.equal(found[:, WIDTH:], expected[:, WIDTH:])


@pytest.mark.parametrize("mask", OF_OUR_OWN)
def test_masks_of_our_own_hold_in_every_form_and_with_every_cache(prompts, mask):
    model = of_stock(random_stock("llama", "causal-lm"), mask=mask)
    inputs = padded(prompts, "right")
    if "segments" in mask:
        inputs["segment_ids"] = torch.arange(WIDTH).expand(len(prompts), -1) // 2
    expected = new_tokens(model, inputs, min_new_tokens=NEW)
    alone = []
    for row, length in enumerate(LENGTHS):
        own = {name: value[row : row + 1, :length] for name, value in inputs.items()}
        alone += new_tokens(model, own, min_new_tokens=NEW)
    assert alone == expected
    for how in ({"use_cache": False}, {"cache_implementation": "static"}):
        assert new_tokens(model, inputs, min_new_tokens=NEW, **how) == expected
    plain = of_stock(random_stock("llama", "causal-lm"))
    assert new_tokens(plain, padded(prompts, "right"), min_new_tokens=NEW) != expected


def test_layer_types_select_rotary_positions_and_no_cache_drops_tokens(prompts):
    types = ["full_attention", "sliding_attention", "chunked_attention"]
    bases = zip(types, [1e4, 10.0, 100.0], strict=True)
    config = DynMaskConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=16,
        initializer_range=0.5,
        position_type="rotary",
        rope_parameters={kind: {"rope_theta": base} for kind, base in bases},
        layer_types=types,
        layer_masks=["causal", "causal & window(3, 0)", "causal & prefix(2)"],
    )
    torch.manual_seed(0)
    model = DynMaskForCausalLM(config).eval()
    inputs = padded(prompts, "right")
    expected = new_tokens(model, inputs, min_new_tokens=NEW, use_cache=False)
    for how in ({}, {"cache_implementation": "static"}):
        assert new_tokens(model, inputs, min_new_tokens=NEW, **how) == expected


def test_each_new_token_is_the_best_of_a_full_forward_pass(model, prompts):
    for tokens, prompt in zip(new_tokens(model, padded(prompts, "right"), min_new_tokens=NEW), prompts, strict=True):
        logits = model(torch.cat([prompt, torch.tensor(tokens)])[None], use_cache=False).logits[0]
        logits[:, END] = -torch.inf  # as `min_new_tokens` has it
        assert logits[len(prompt) - 1 : -1].argmax(1).tolist() == tokens


def test_prompts_as_embeddings(model, prompts):
    inputs = padded(prompts, "right")
    expected = model.generate(**inputs, max_new_tokens=NEW, pad_token_id=PAD)[:, WIDTH:]
    embeddings = model.get_input_embeddings()(inputs["input_ids"]).detach()
    found = model.generate(inputs_embeds=embeddings, lengths=LENGTHS, max_new_tokens=NEW, pad_token_id=PAD)
    assert torch.equal(found, expected)


def test_what_generation_refuses():
    model = of_stock(random_stock("llama", "causal-lm"))
    ids = torch.randint(3, VOCABULARY, (3, 4))
    with pytest.raises(ValueError, match=r"prompts must have at least one token each; got lengths \[4, 0, 2\]"):
        model.generate(ids, lengths=torch.tensor([4, 0, 2]))
    with pytest.raises(ValueError, match="prompts must have a row each; got 2 in 1 rows"):
        model.generate(ids[:1], lengths=torch.tensor([3, 1]))
    with pytest.raises(ValueError, match="`lengths` and `attention_mask` must name the same tokens"):
        model.generate(ids, lengths=torch.tensor([4, 3, 2]), attention_mask=torch.ones(3, 4))
    with pytest.raises(ValueError, match="`lengths` must not be beyond the row width 4; got 5"):
        model.generate(ids, lengths=torch.tensor([4, 5, 2]))
    cache = model(ids).past_key_values
    late = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]])
    with pytest.raises(ValueError, match="`attention_mask` must be 1 after the 4 columns that the cache holds"):
        model.generate(torch.cat([ids, ids[:, :2]], dim=1), attention_mask=late, past_key_values=cache)


def test_generation_without_the_ids_it_needs_names_them():
    model = DynMaskForCausalLM(DynMaskConfig(vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2))
    for num_beams in (1, 2):
        with pytest.raises(ValueError, match="`bos_token_id` has to be defined when no `input_ids` are provided"):
            model.generate(max_new_tokens=2, num_beams=num_beams)


# --- losses and logits


def documents(batch: Tensor, lengths: list[int]) -> list[Tensor]:
    return list(batch[0].split(lengths))


def flat_batch(lengths: list[int]) -> dict[str, Tensor]:
    torch.manual_seed(2)
    ids = torch.randint(3, VOCABULARY, (1, sum(lengths)))
    return {"input_ids": ids, "labels": ids.where(torch.rand(ids.shape) < 0.8, -100), "lengths": torch.tensor(lengths)}


def test_the_loss_of_a_flat_batch_is_that_of_its_documents(stock, model):
    lengths = [6, 1, 4, 9]
    batch = flat_batch(lengths)
    found = model(**batch)
    expected = []
    for ids, labels in zip(*(documents(batch[name], lengths) for name in ("input_ids", "labels")), strict=True):
        logits = stock(ids[None]).logits[0]
        expected.append(
            torch.nn.functional.cross_entropy(logits[:-1], labels[1:], reduction="none")[labels[1:] != -100]
        )
    torch.testing.assert_close(found.loss, torch.cat(expected).mean(), rtol=1e-5, atol=1e-5)
    in_rows = {
        name: torch.nn.utils.rnn.pad_sequence(documents(batch[name], lengths), batch_first=True, padding_value=-100)
        for name in ("input_ids", "labels")
    }
    rows = model(in_rows["input_ids"].clamp(min=0), labels=in_rows["labels"], lengths=batch["lengths"])
    torch.testing.assert_close(found.loss, rows.loss, rtol=1e-5, atol=1e-5)
    half = model(**batch, num_items_in_batch=torch.tensor(2 * len(torch.cat(expected))))
    torch.testing.assert_close(half.loss, found.loss / 2)


@pytest.mark.parametrize("changed", range(4))
def test_a_document_reaches_no_other(model, changed):
    lengths = [6, 1, 4, 9]
    batch = flat_batch(lengths)
    other = batch["input_ids"].clone()
    documents(other, lengths)[changed][:] = 3 + torch.randint(VOCABULARY - 3, (lengths[changed],))
    logits, others = (model(ids, lengths=batch["lengths"]).logits for ids in (batch["input_ids"], other))
    for place, (one, two) in enumerate(zip(documents(logits, lengths), documents(others, lengths), strict=True)):
        assert torch.equal(one, two) == (place != changed)


def test_the_first_token_of_a_document_is_no_target(model):
    lengths = [6, 1, 4, 9]
    batch = flat_batch(lengths)
    starts = torch.tensor(lengths).cumsum(0) - torch.tensor(lengths)
    labels = batch["labels"].clone()
    labels[0, starts] = 5
    alone = torch.full_like(labels, -100)
    alone[0, starts] = 5
    torch.testing.assert_close(model(**batch | {"labels": labels}).loss, model(**batch).loss, rtol=0, atol=0)
    assert model(**batch | {"labels": alone}).loss == 0


def test_labels_that_are_aligned_already_are_taken_as_they_are(model):
    batch = flat_batch([6, 1, 4, 9])
    labels = batch.pop("labels")
    aligned = labels.roll(-1, dims=1)
    aligned[0, batch["lengths"].cumsum(0) - 1] = -100
    expected = model(**batch, labels=labels).loss
    torch.testing.assert_close(model(**batch, shift_labels=aligned).loss, expected, rtol=0, atol=0)
    torch.testing.assert_close(model(**batch, shift_labels=aligned, labels=aligned).loss, expected, rtol=0, atol=0)


@pytest.mark.parametrize("training", [True, False])
def test_without_a_target_the_loss_is_zero(training):
    model = of_stock(random_stock("llama", "causal-lm")).train(training)
    batch = flat_batch([3, 4])
    loss = model(**batch | {"labels": torch.full_like(batch["labels"], -100)}).loss
    loss.backward()
    assert loss == 0 and all(weight.grad is None or not weight.grad.any() for weight in model.parameters())
    assert model(torch.randint(3, VOCABULARY, (3, 1)), labels=torch.full((3, 1), 4)).loss == 0


def test_while_training_logits_are_computed_for_targets_alone():
    model, batch = of_stock(random_stock("llama", "causal-lm")), flat_batch([3, 4, 5])
    rows = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: rows.append(output.numel() // VOCABULARY))
    expected = model(**batch)
    found = model.train()(**batch)
    torch.testing.assert_close(found.loss, expected.loss)
    starts = torch.tensor([0, 3, 7])
    targets = int((batch["labels"] != -100).sum() - (batch["labels"][0, starts] != -100).sum())
    assert found.logits is None and rows == [12, targets]


@pytest.mark.parametrize("kept", [1, 3, WIDTH, WIDTH + 4, torch.tensor([0, 7, 4])])
@pytest.mark.parametrize("side", ["left", "right", "inside"])
def test_logits_of_some_columns(model, prompts, kept, side):
    inputs = padded(prompts, side)
    whole = model(**inputs).logits
    found = model(**inputs, logits_to_keep=kept).logits
    expected = whole[:, -kept:] if isinstance(kept, int) else whole[:, kept]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
