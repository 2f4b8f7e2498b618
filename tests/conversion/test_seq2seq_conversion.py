"""BART and Marian and their conversions: outputs, losses, gradients, generated tokens, weights, settings."""

# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false, reportCallIssue=false

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForQuestionAnswering, PreTrainedModel, set_seed

from hf_dynmask import (
    DynMaskConfig,
    DynMaskForConditionalGeneration,
    DynMaskModel,
    DynMaskSeq2SeqConfig,
    DynMaskSeq2SeqModel,
)
from hf_dynmask.conversion import from_transformers, to_transformers
from hf_dynmask.conversion.engine import FAMILIES
from hf_dynmask.conversion.weights import to_ours
from stock_models import AUTO_CLASSES, VOCABULARY, random_stock

OF_TWO_SIDES = {name: family for name, family in FAMILIES.items() if family.config_class is DynMaskSeq2SeqConfig}
NO_DROPOUT = {"dropout": 0.0, "attention_dropout": 0.0}
UNSHARED = {"share_encoder_decoder_embeddings": False, "decoder_vocab_size": 31}
UNTIED = {"share_encoder_decoder_embeddings": False, "tie_word_embeddings": False}
EOS = 3
SOURCES, TARGETS = torch.tensor([7, 2, 11, 4]), torch.tensor([3, 8, 1, 6])

all_types = pytest.mark.parametrize("model_type", OF_TWO_SIDES)
all_models = pytest.mark.parametrize(
    ("model_type", "task", "settings"),
    [
        *((model_type, task, {}) for model_type, family in OF_TWO_SIDES.items() for task in family.heads),
        ("bart", "seq2seq-lm", {"scale_embedding": False}),
        ("marian", "base", UNSHARED),
        ("marian", "seq2seq-lm", UNSHARED),
        ("marian", "seq2seq-lm", UNTIED),
    ],
)


def stock_model(model_type: str, task: str, settings: dict[str, Any]) -> PreTrainedModel:
    return random_stock(model_type, task, **{"eos_token_id": EOS, **NO_DROPOUT, **settings})


def test_embeddings_are_scaled_by_their_table():
    stock, ids = stock_model("bart", "base", {}), torch.arange(5)[None]
    assert torch.equal(from_transformers(stock).get_input_embeddings()(ids), stock.get_input_embeddings()(ids))


def random_batch(task: str) -> dict[str, Tensor]:
    """Inputs of the stock model, padded on the right."""
    torch.manual_seed(1)
    source, target = (torch.arange(int(lengths.max())) < lengths[:, None] for lengths in (SOURCES, TARGETS))
    ids = torch.randint(5, 31, source.shape).masked_fill(torch.arange(11) == SOURCES[:, None] - 1, EOS)
    targets = torch.randint(5, 31, target.shape)
    batch = {"input_ids": torch.where(source, ids, 1), "attention_mask": source.long()}
    if task == "base":
        batch |= {"decoder_input_ids": targets.where(target, 1), "decoder_attention_mask": target.long()}
    elif task == "seq2seq-lm":
        batch |= {"labels": targets.where(target, -100)}
    else:
        batch |= {"labels": torch.arange(4) % 2}
    return batch


def in_lengths(batch: dict[str, Tensor], task: str) -> dict[str, Tensor]:
    """The same batch as our models take it."""
    rest = {name: value for name, value in batch.items() if not name.endswith("attention_mask")}
    rest |= {"lengths": SOURCES}
    return rest if task == "sequence-classification" else rest | {"decoder_lengths": TARGETS}


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    found = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
    assert all(gradient is not None for gradient in found.values())
    return found  # pyright: ignore[reportReturnType]


def assert_same_weights(found: PreTrainedModel, expected: PreTrainedModel) -> None:
    assert type(found) is type(expected)
    weights = expected.state_dict()
    assert found.state_dict().keys() == weights.keys()
    for name, weight in found.state_dict().items():
        assert weight.dtype == weights[name].dtype and torch.equal(weight, weights[name]), name


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@all_models
def test_outputs_equal_those_of_the_stock_model(model_type, task, settings):
    stock = stock_model(model_type, task, settings)
    batch = random_batch(task)
    with torch.no_grad():
        expected = stock(**batch, output_hidden_states=True)
        found = from_transformers(stock)(**in_lengths(batch, task), output_hidden_states=True)
    source, target = batch["attention_mask"].bool(), torch.arange(8) < TARGETS[:, None]
    if task == "sequence-classification":
        target = source
    for side, real in {"encoder": source, "decoder": target}.items():
        states = found[f"{side}_hidden_states"], expected[f"{side}_hidden_states"]
        for ours, theirs in zip(*states, strict=True):
            assert_close(ours[real], theirs[real])
    assert_close(found.encoder_last_hidden_state[source], expected.encoder_last_hidden_state[source])
    if task == "base":
        assert_close(found.last_hidden_state[target], expected.last_hidden_state[target])
    else:
        rows = target if task == "seq2seq-lm" else slice(None)
        assert_close(found.logits[rows], expected.logits[rows])
        assert_close(found.loss, expected.loss)


@all_models
def test_losses_and_all_gradients_equal_those_of_the_stock_model(model_type, task, settings):
    stock = stock_model(model_type, task, settings).train()
    model = from_transformers(stock)
    assert model.training
    batch = random_batch(task)
    outputs = stock(**batch), model(**in_lengths(batch, task))
    if task == "base":
        real = batch["decoder_attention_mask"].bool()
        weight = torch.randn(int(real.sum()), 16)
        expected, found = ((output.last_hidden_state[real] * weight).sum() for output in outputs)
    else:
        expected, found = (output.loss for output in outputs)
    assert_close(found, expected, 1e-4)
    expected.backward()
    found.backward()
    prefixes = model.base_model_prefix, stock.base_model_prefix
    links = FAMILIES[model_type].links(task, *prefixes, 3)
    theirs = to_ours(gradients(stock), links)
    ours = gradients(model)
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        assert_close(gradient, theirs[name], 1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"use_cache": False},
        {"cache_implementation": "static", "disable_compile": True},
        {"do_sample": True, "temperature": 0.8},
    ],
)
@pytest.mark.parametrize(("model_type", "settings"), [("bart", {}), ("marian", {}), ("marian", UNSHARED)])
def test_generated_tokens_equal_those_of_the_stock_model(model_type, settings, options):
    stock = stock_model(model_type, "seq2seq-lm", settings)
    model = from_transformers(stock)
    batch = random_batch("seq2seq-lm")
    options = {"max_new_tokens": 12, "do_sample": False, "no_repeat_ngram_size": 1, **options}
    set_seed(1)
    expected = stock.generate(batch["input_ids"], attention_mask=batch["attention_mask"], **options)
    for given in ({"attention_mask": batch["attention_mask"]}, {"lengths": SOURCES}):
        set_seed(1)
        assert torch.equal(model.generate(batch["input_ids"], **given, **options), expected)
    moved = {
        name: torch.stack([row.roll(11 - int(n)) for row, n in zip(batch[name], SOURCES, strict=True)])
        for name in ("input_ids", "attention_mask")
    }  # padding on the left
    set_seed(1)
    assert torch.equal(model.generate(moved["input_ids"], attention_mask=moved["attention_mask"], **options), expected)


@pytest.mark.parametrize(("model_type", "settings"), [("bart", {}), ("marian", {})])
def test_an_assistant_changes_no_token(model_type, settings):
    stock = stock_model(model_type, "seq2seq-lm", settings)
    model, assistant = from_transformers(stock), from_transformers(stock)
    with torch.no_grad():
        for parameter in assistant.parameters():  # often, not always, of the same opinion
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    batch = random_batch("seq2seq-lm")
    for ids, length in zip(batch["input_ids"], SOURCES, strict=True):
        source, options = ids[None, : int(length)], {"max_new_tokens": 8, "do_sample": False}
        expected = stock.generate(source, **options)
        for each in (model, stock):
            assert torch.equal(each.generate(source, **options, assistant_model=assistant), expected)


@all_models
def test_there_and_back_is_the_same_model(model_type, task, settings, tmp_path):
    stock = stock_model(model_type, task, {**settings, "num_labels": 4, "bos_token_id": 4, "dropout": 0.2})
    assert to_transformers(from_transformers(stock)).config.to_dict() == stock.config.to_dict()
    stock.save_pretrained(tmp_path / "stock")
    model = from_transformers(tmp_path / "stock")  # the task is the one that the checkpoint names
    assert_same_weights(model, from_transformers(stock))
    restored = to_transformers(model)
    assert_same_weights(restored, stock)
    assert not restored.training
    model.save_pretrained(tmp_path / "ours")
    loaded = AUTO_CLASSES[task].from_pretrained(tmp_path / "ours")
    assert_same_weights(loaded, model)
    assert_same_weights(to_transformers(loaded), stock)
    inputs = in_lengths(random_batch(task), task)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs)[0], model(**inputs)[0])


def test_shared_embeddings_are_one_tensor():
    model = from_transformers(stock_model("bart", "seq2seq-lm", {}))
    assert isinstance(model, DynMaskForConditionalGeneration)
    tables = [side.embeddings.word_embeddings.weight for side in (model.model.encoder, model.model.decoder)]
    assert tables[0] is tables[1] is model.lm_head.weight
    apart = from_transformers(stock_model("marian", "seq2seq-lm", UNSHARED))
    assert isinstance(apart, DynMaskForConditionalGeneration)
    assert apart.lm_head.weight is apart.model.decoder.embeddings.word_embeddings.weight
    assert apart.model.encoder.embeddings.word_embeddings.weight.shape == (VOCABULARY, 16)
    assert apart.lm_head.weight.shape == (31, 16)


@all_types
def test_dtype_is_kept(model_type):
    stock = stock_model(model_type, "seq2seq-lm", {}).bfloat16()
    model = from_transformers(stock)
    assert {weight.dtype for weight in model.state_dict().values()} == {torch.bfloat16}
    restored = to_transformers(model)
    assert_same_weights(restored, stock)
    batch = random_batch("seq2seq-lm")
    with torch.no_grad():
        losses = [each(**batch).loss.float() for each in (stock, restored)]
        loss = model(**in_lengths(batch, "seq2seq-lm")).loss
    assert torch.equal(losses[1], losses[0])
    assert_close(loss, losses[0], 3e-2)


def test_settings_of_generation_carry_over():
    stock = stock_model("marian", "seq2seq-lm", {})
    stock.generation_config.update(num_beams=4, forced_eos_token_id=EOS, bad_words_ids=[[1]])
    model = from_transformers(stock)
    assert model.generation_config.num_beams == 4 and model.generation_config.bad_words_ids == [[1]]
    assert to_transformers(model).generation_config.to_dict() == stock.generation_config.to_dict()


def test_special_tokens_that_a_trainer_writes_into_a_side_do_not_matter():
    model = from_transformers(stock_model("bart", "seq2seq-lm", {}))
    model.config.decoder.bos_token_id, model.config.decoder.eos_token_id = 5, EOS
    assert to_transformers(model).config.eos_token_id == EOS


def test_masks_and_settings_can_be_given(tmp_path):
    stock = stock_model("bart", "seq2seq-lm", {})
    stock.save_pretrained(tmp_path)
    settings: dict[str, Any] = {
        "mask": "window(3)",
        "decoder": {"layer_masks": ["causal", "causal & window(2, 0)", "causal"]},
        "cross_mask": "window(5)",
        "hidden_dropout_prob": 0.3,
        "attn_implementation": "eager",
    }
    for source in (stock, tmp_path):
        model = from_transformers(source, **copy.deepcopy(settings))
        assert [str(mask) for mask in model.config.encoder.masks()] == ["window(3, 3)"] * 2
        assert model.config.decoder.layer_masks == settings["decoder"]["layer_masks"]
        assert model.config.decoder.num_attention_heads == 2
        assert model.config.decoder.cross_mask == "window(5)"
        assert model.config.encoder.hidden_dropout_prob == 0.3
        assert {side.config._attn_implementation for side in (model.model.encoder, model.model.decoder)} == {"eager"}
        assert_same_weights(from_transformers(stock), model)


def test_the_dropout_of_a_classifier_carries_over():
    model = from_transformers(random_stock("bart", "sequence-classification", classifier_dropout=0.4))
    assert model.config.decoder.classifier_dropout == model.config.decoder.pooler_dropout == 0.4
    assert to_transformers(model).config.classifier_dropout == 0.4


# --- errors


@pytest.mark.parametrize(
    ("model_type", "settings", "message"),
    [
        ("bart", {"activation_dropout": 0.1}, "'bart' model: `activation_dropout` must be 0.0; got 0.1"),
        ("bart", {"encoder_layerdrop": 0.1}, "`encoder_layerdrop` must be 0.0; got 0.1"),
        ("marian", {"decoder_layerdrop": 0.1}, "'marian' model: `decoder_layerdrop` must be 0.0; got 0.1"),
        ("bart", {"tie_word_embeddings": False}, "`tie_word_embeddings` must be True; got False"),
        ("marian", {"tie_word_embeddings": False}, "`tie_word_embeddings` must be True; got False"),
    ],
)
def test_a_stock_feature_without_counterpart_is_named(model_type, settings, message):
    with pytest.raises(ValueError, match=message):
        from_transformers(stock_model(model_type, "seq2seq-lm", settings))


def test_other_positions_than_the_computed_are_refused():
    stock = stock_model("marian", "seq2seq-lm", {})
    stock.get_parameter("model.decoder.embed_positions.weight").data.add_(1)
    with pytest.raises(ValueError, match="`model.decoder.embed_positions` must hold what a 'marian' model computes"):
        from_transformers(stock)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask": "window(3)"}, r"'marian' cannot .*: `encoder.mask` must be 'full'; got 'window\(3, 3\)'$"),
        (
            {"cross_mask": "window(3)"},
            r"'marian' cannot .*: `decoder.cross_mask` must be 'full'; got 'window\(3, 3\)'$",
        ),
        ({"decoder": {"mask": "full"}}, "`decoder.mask` must be 'causal'; got 'full'"),
        ({"encoder": {"hidden_act": "relu"}}, "`encoder.hidden_act` must be 'gelu'; got 'relu'"),
        ({"norm_placement": "pre"}, "`encoder.norm_placement` must be 'post'; got 'pre'"),
        ({"embedding_scale": 3.0}, "`encoder.embedding_scale` must be 4.0; got 3.0"),
    ],
)
def test_a_config_that_the_family_cannot_represent_names_the_field(settings, message):
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "intermediate_size": 7,
        "position_type": "sinusoidal",
        "sinusoidal_in_halves": True,
        "embedding_norm": False,
        "decoder_start_token_id": 2,
    }
    plain = DynMaskForConditionalGeneration(DynMaskSeq2SeqConfig(**sizes))
    with pytest.raises(ValueError, match="types that can represent it: 'marian'$"):
        to_transformers(plain)
    assert to_transformers(plain, "marian").config.model_type == "marian"
    with pytest.raises(ValueError, match=message):
        to_transformers(DynMaskSeq2SeqModel(DynMaskSeq2SeqConfig(**sizes | settings)), "marian")


def test_one_side_is_not_two():
    with pytest.raises(
        ValueError, match="'bart' cannot .* configuration is a DynMaskSeq2SeqConfig, and the model's a DynMaskConfig"
    ):
        to_transformers(DynMaskModel(DynMaskConfig(hidden_size=16, num_hidden_layers=1)), "bart")


def test_unknown_tasks_and_classes_name_the_known():
    stock = AutoModelForQuestionAnswering.from_config(random_stock("bart", "base").config)
    with pytest.raises(ValueError, match="`source` must be one of BartModel, BartForCond.*; got BartForQuestionAnsw"):
        from_transformers(stock)
    with pytest.raises(ValueError, match="`task` must be 'base' for a loaded BartModel; got 'seq2seq-lm'"):
        from_transformers(random_stock("bart", "base"), "seq2seq-lm")
    with pytest.raises(ValueError, match="`activation_dropout` must be a field of DynMaskSeq2SeqConfig with a loaded"):
        from_transformers(random_stock("bart", "base"), activation_dropout=0.0)
