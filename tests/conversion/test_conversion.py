"""Stock models and their conversions: outputs, losses, gradients, weights and configs agree, there and back."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForPreTraining,
    BertModel,
    GPT2DoubleHeadsModel,
    PreTrainedModel,
)

from hf_dynmask.conversion import from_transformers, to_transformers
from hf_dynmask.conversion.engine import FAMILIES
from hf_dynmask.conversion.weights import to_ours
from hf_dynmask.modeling.configuration_dynmask import DynMaskConfig
from hf_dynmask.modeling.modeling_dynmask import (
    DynMaskForCausalLM,
    DynMaskForMaskedLM,
    DynMaskForSequenceClassification,
    DynMaskForTokenClassification,
    DynMaskModel,
)
from stock_models import AUTO_CLASSES, BERT_SIZES, VOCABULARY, random_stock
from support.samples import resolve_model

NO_DROPOUT = {
    name: 0.0
    for name in (
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
        "summary_last_dropout",
        "dropout",
        "attention_dropout",
        "qa_dropout",
        "seq_classif_dropout",
        "classifier_dropout",
        "resid_pdrop",
        "embd_pdrop",
        "attn_pdrop",
    )
}
LONGEST = 13
BERT_LIKE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 7,
    "type_vocab_size": 2,
}
LENGTHS = torch.tensor([7, 1, LONGEST, 4, 11, 7])

# Encoder-decoders are in test_seq2seq_conversion.py.
OF_ONE_SIDE = {model_type: family for model_type, family in FAMILIES.items() if family.config_class is DynMaskConfig}
all_types = pytest.mark.parametrize("model_type", OF_ONE_SIDE)
all_models = pytest.mark.parametrize(
    ("model_type", "task"), [(model_type, task) for model_type, family in OF_ONE_SIDE.items() for task in family.heads]
)


def random_batch(stock: PreTrainedModel, task: str, lengths: Tensor = LENGTHS) -> dict[str, Tensor]:
    """Inputs in rows, padded on the right; several choices where the task has them."""
    torch.manual_seed(1)
    mask = (torch.arange(int(lengths.max()))[None] < lengths[:, None]).long()
    ids = torch.randint(5, VOCABULARY, mask.shape)
    batch = {"input_ids": torch.where(mask == 1, ids, stock.config.pad_token_id), "attention_mask": mask}
    if getattr(stock.config, "type_vocab_size", 1) > 1:
        batch["token_type_ids"] = torch.randint(stock.config.type_vocab_size, mask.shape)
    return {name: value.unflatten(0, (3, 2)) if task == "multiple-choice" else value for name, value in batch.items()}


def with_labels(batch: dict[str, Tensor], task: str) -> dict[str, Tensor]:
    rows, mask = batch["input_ids"].shape[0], batch["attention_mask"]
    last = mask.sum(-1) - 1
    labels = {
        "causal-lm": {"labels": torch.where((mask == 1) & (torch.rand(mask.shape) < 0.8), batch["input_ids"], -100)},
        "masked-lm": {"labels": torch.where((mask == 1) & (torch.rand(mask.shape) < 0.5), batch["input_ids"], -100)},
        "sequence-classification": {"labels": torch.arange(rows) % 2},
        "token-classification": {"labels": torch.where(mask == 1, batch["input_ids"] % 2, -100)},
        "question-answering": {"start_positions": last // 2, "end_positions": last},
        "multiple-choice": {"labels": torch.arange(rows) % 2},
    }
    return {**batch, **labels[task]}


def in_lengths(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same batch as our models take it."""
    others = {name: value for name, value in batch.items() if name != "attention_mask"}
    return {**others, "lengths": batch["attention_mask"].sum(-1)}


def under_our_names(model: PreTrainedModel, stock: PreTrainedModel, task: str) -> dict[str, Tensor]:
    """The stock model's gradients as gradients of ours."""
    prefixes = model.base_model_prefix, stock.base_model_prefix
    links = FAMILIES[stock.config.model_type].links(task, *prefixes, stock.config.num_hidden_layers)
    return to_ours(gradients(stock), links)


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    """Of all parameters; of tied ones once, under the name of that to which the others are tied."""
    found = {name: weight.grad for name, weight in model.named_parameters(remove_duplicate=False)}
    assert all(gradient is not None for gradient in found.values())
    return {name: grad for name, grad in found.items() if grad is not None and name not in model.all_tied_weights_keys}


def assert_same_gradients(model: PreTrainedModel, stock: PreTrainedModel, task: str) -> None:
    found, expected = gradients(model), under_our_names(model, stock, task)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert_close(gradient, expected[name], 1e-4)


def assert_same_weights(found: PreTrainedModel, expected: PreTrainedModel) -> None:
    assert type(found) is type(expected)
    weights = expected.state_dict()
    assert found.state_dict().keys() == weights.keys()
    for name, weight in found.state_dict().items():
        assert weight.dtype == weights[name].dtype and torch.equal(weight, weights[name]), name


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@all_models
def test_outputs_equal_those_of_the_stock_model(model_type, task):
    stock = random_stock(model_type, task)
    batch = random_batch(stock, task)
    with torch.no_grad():
        expected = stock(**batch, output_hidden_states=True)
        found = from_transformers(stock)(**in_lengths(batch), output_hidden_states=True)
    real = batch["attention_mask"].flatten(0, -2).bool()
    for ours, theirs in zip(found.hidden_states, expected.hidden_states, strict=True):
        assert_close(ours[real], theirs[real])
    for name in ("last_hidden_state", "start_logits", "end_logits"):
        if name in expected:
            assert_close(found[name][real], expected[name][real])
    if "pooler_output" in expected:
        assert_close(found.pooler_output, expected.pooler_output)
    if "logits" in expected:
        a_row_each = expected.logits.shape[:2] != batch["input_ids"].shape[:2] or task == "multiple-choice"
        rows = slice(None) if a_row_each else real
        assert_close(found.logits[rows], expected.logits[rows])


@all_models
def test_losses_and_all_gradients_equal_those_of_the_stock_model(model_type, task):
    stock = random_stock(model_type, task, **NO_DROPOUT).train()
    model = from_transformers(stock)
    assert model.training
    # The stock loss of question answering depends on the logits of padding.
    batch = random_batch(stock, task, torch.full((6,), LONGEST) if task == "question-answering" else LENGTHS)
    if task == "base":
        real = batch["attention_mask"].bool()
        outputs = [stock(**batch), model(**in_lengths(batch))]
        weight = torch.randn(int(real.sum()), model.config.hidden_size)
        expected, found = ((output.last_hidden_state[real] * weight).sum() for output in outputs)
        if model.config.use_pooler:
            expected, found = expected + outputs[0].pooler_output.sum(), found + outputs[1].pooler_output.sum()
    else:
        batch = with_labels(batch, task)
        expected, found = stock(**batch).loss, model(**in_lengths(batch)).loss
    assert_close(found, expected, 1e-4)

    expected.backward()
    found.backward()
    assert_same_gradients(model, stock, task)


@all_models
def test_there_and_back_is_the_same_model(model_type, task):
    stock = random_stock(model_type, task, num_labels=2, bos_token_id=3)
    restored = to_transformers(from_transformers(stock))
    assert_same_weights(restored, stock)
    assert restored.config.to_dict() == stock.config.to_dict()
    assert not restored.training


@all_models
def test_a_converted_model_is_saved_and_loaded(model_type, task, tmp_path):
    stock = random_stock(model_type, task)
    stock.save_pretrained(tmp_path / "stock")
    model = from_transformers(tmp_path / "stock")  # the task is the one that the checkpoint names
    assert_same_weights(model, from_transformers(stock))
    model.save_pretrained(tmp_path / "ours")
    loaded = AUTO_CLASSES[task].from_pretrained(tmp_path / "ours")
    assert_same_weights(loaded, model)
    assert_same_weights(to_transformers(loaded), stock)
    inputs = in_lengths(random_batch(stock, task))
    with torch.no_grad():  # to the last bits: which kernel multiplies a matrix depends on where it lies in memory
        for found, expected in zip(loaded(**inputs).to_tuple(), model(**inputs).to_tuple(), strict=True):
            assert not isinstance(expected, Tensor) or torch.allclose(found, expected, rtol=0, atol=1e-6)


# --- what the outputs do not depend on


def _shifted(batch, by, fill):
    """Padding on the left: each row's tokens end at the right edge of a row `by` wider."""
    mask = batch["attention_mask"]
    room = mask.shape[1] + by - mask.sum(1)

    def shift(value, fill):
        wide = torch.nn.functional.pad(value, (0, by), value=fill)
        return torch.stack([row.roll(int(offset)) for row, offset in zip(wide, room, strict=True)])

    return {name: shift(value, 0 if name == "attention_mask" else fill) for name, value in batch.items()}


def _variants(batch, pad_id):
    """Forms of one batch: name -> (inputs, and for each row in turn its tokens' place in the output)."""
    mask, width = batch["attention_mask"].bool(), batch["input_ids"].shape[1]
    lengths = mask.sum(1)
    others = {name: value for name, value in batch.items() if name != "attention_mask"}
    wider = {name: torch.nn.functional.pad(value, (0, 9), value=pad_id) for name, value in others.items()}
    left = _shifted(batch, 5, pad_id)
    order = torch.randperm(len(lengths))
    spread = torch.stack(
        [torch.randperm(2 * width)[:width].sort().values for _ in lengths]
    )  # tokens with holes between
    holed = {
        name: torch.full((len(lengths), 2 * width), pad_id).scatter(1, spread, value) for name, value in others.items()
    }
    holes = torch.zeros(len(lengths), 2 * width, dtype=torch.long).scatter(1, spread, mask.long())
    starts = lengths.cumsum(0) - lengths
    rows = range(len(lengths))
    right = [(row, slice(0, int(lengths[row]))) for row in rows]
    return {
        "lengths": ({**others, "lengths": lengths}, right),
        "attention mask": (batch, right),
        "both": ({**batch, "lengths": lengths}, right),
        "other pad id": ({**others, "input_ids": others["input_ids"].where(mask, 17), "lengths": lengths}, right),
        "more padding": ({**wider, "lengths": lengths}, right),
        "padding left": (left, [(row, slice(width + 5 - int(lengths[row]), width + 5)) for row in rows]),
        "holes": ({**holed, "attention_mask": holes}, [(row, holes[row].bool()) for row in rows]),
        "row order": (
            {**{name: value[order] for name, value in others.items()}, "lengths": lengths[order]},
            [(int((order == row).nonzero()), slice(0, int(lengths[row]))) for row in rows],
        ),
        "flat": (
            {**{name: value[mask][None] for name, value in others.items()}, "lengths": lengths},
            [(0, slice(int(starts[row]), int(starts[row] + lengths[row]))) for row in rows],
        ),
    }


@all_types
def test_the_form_of_a_batch_does_not_matter(model_type):
    stock = random_stock(model_type, "base")
    model = from_transformers(stock)
    batch = random_batch(stock, "base")
    with torch.no_grad():
        alone = [
            stock(**{name: value[row : row + 1, :length] for name, value in batch.items()}).last_hidden_state[0]
            for row, length in enumerate(LENGTHS.tolist())
        ]
        for name, (inputs, places) in _variants(batch, stock.config.pad_token_id).items():
            found = model(**inputs).last_hidden_state
            for expected, (row, tokens) in zip(alone, places, strict=True):
                assert torch.allclose(found[row, tokens], expected, rtol=1e-5, atol=1e-5), name


OTHER_SETTINGS: list[tuple[str, str, dict[str, Any]]] = [
    ("modernbert", "sequence-classification", {"classifier_pooling": "mean"}),
    ("modernbert", "multiple-choice", {"classifier_pooling": "mean"}),
    ("modernbert", "sequence-classification", {"classifier_bias": True, "norm_bias": True}),
    ("modernbert", "question-answering", {"classifier_bias": True, "classifier_activation": "relu"}),
    ("modernbert", "token-classification", {"classifier_activation": "silu", "classifier_dropout": 0.3}),
    ("modernbert", "masked-lm", {"decoder_bias": False, "classifier_bias": True}),
    ("modernbert", "masked-lm", {"tie_word_embeddings": False}),
    ("modernbert", "sequence-classification", {"problem_type": "regression", "num_labels": 1}),
    ("eurobert", "sequence-classification", {"classifier_pooling": "bos"}),
    ("eurobert", "sequence-classification", {"classifier_pooling": "mean"}),
    ("eurobert", "sequence-classification", {"classifier_pooling": "late", "num_labels": 5}),
    ("eurobert", "masked-lm", {"mlp_bias": False}),
    ("eurobert", "masked-lm", {"tie_word_embeddings": True}),
    ("eurobert", "token-classification", {"num_key_value_heads": None, "head_dim": None}),
    ("gemma3_text", "base", {"use_bidirectional_attention": True}),
    ("gemma3_text", "sequence-classification", {"use_bidirectional_attention": True, "sliding_window": 5}),
    ("gemma3_text", "causal-lm", {"sliding_window": 1, "tie_word_embeddings": False}),
    ("gemma3_text", "causal-lm", {"query_pre_attn_scalar": 256, "attention_bias": True, "rms_norm_eps": 0.1}),
    ("gemma3_text", "base", {"layer_types": ["full_attention"] * 3, "sliding_window": 4096}),
    ("gemma3_text", "base", {"layer_types": ["sliding_attention"] * 3, "hidden_activation": "silu"}),
    (
        "gemma3_text",
        "base",
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            }
        },
    ),
    ("llama", "sequence-classification", {"num_labels": 1}),
    ("mistral", "sequence-classification", {"sliding_window": None, "num_labels": 5}),
    ("qwen2", "sequence-classification", {"problem_type": "multi_label_classification", "num_labels": 3}),
    ("qwen3", "sequence-classification", {"tie_word_embeddings": False}),
    ("gpt2", "sequence-classification", {"resid_pdrop": 0.3, "embd_pdrop": 0.3}),
]


@pytest.mark.parametrize(("model_type", "task", "settings"), OTHER_SETTINGS)
def test_other_settings(model_type, task, settings):
    stock = random_stock(model_type, task, **settings)
    model = from_transformers(stock)
    batch = random_batch(stock, task)
    real = batch["attention_mask"].flatten(0, -2).bool()
    with torch.no_grad():
        expected, found = stock(**batch), model(**in_lengths(batch))
    of_tokens = task not in ("sequence-classification", "multiple-choice")
    for name in expected.keys() & {"last_hidden_state", "logits", "start_logits", "end_logits"}:
        theirs, ours = expected[name], found[name]
        assert_close(*((ours[real], theirs[real]) if of_tokens else (ours, theirs)))
    restored = to_transformers(model)
    assert_same_weights(restored, stock)
    assert restored.config.to_dict() == stock.config.to_dict()


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("modernbert", {}),
        ("modernbert", {"classifier_pooling": "mean"}),
        ("eurobert", {"classifier_pooling": "bos"}),
        ("eurobert", {"classifier_pooling": "mean"}),
        ("eurobert", {"classifier_pooling": "late"}),
        ("gemma3_text", {"use_bidirectional_attention": True}),
        *((name, {}) for name in ("gemma3_text", "gpt2", "llama", "mistral", "qwen2", "qwen3", "bert", "distilbert")),
    ],
)
def test_the_form_of_a_batch_does_not_matter_to_a_class(model_type, settings):
    stock = random_stock(model_type, "sequence-classification", **settings)
    model = from_transformers(stock)
    batch = random_batch(stock, "sequence-classification")
    with torch.no_grad():
        expected = stock(**batch).logits
        for name, (inputs, places) in _variants(batch, stock.config.pad_token_id).items():
            found = model(**inputs).logits
            if name == "row order":
                found = found[[row for row, _ in places]]
            assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5), name


@pytest.mark.parametrize("model_type", ["gemma3_text", "gpt2", "llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_class_is_read_off_the_last_token_that_is_not_the_pad_id(model_type, side):
    """Texts often end with the id of padding, where a tokenizer pads with the end of a text."""
    stock = random_stock(model_type, "sequence-classification", pad_token_id=2)
    batch = random_batch(stock, "sequence-classification")
    if side == "left":
        batch = _shifted(batch, 3, 2)
    ids, real = batch["input_ids"], batch["attention_mask"].bool()
    longest = LENGTHS.argmax()
    ids[longest, -3 if side == "left" else LONGEST - 3 :] = 2
    ids[longest, 4] = 2  # and may stand inside
    model = from_transformers(stock)
    with torch.no_grad():  # the stock GPT-2 counts positions from the first column unless they are given
        expected = stock(**batch, position_ids=(real.cumsum(1) - 1).clamp(min=0)).logits
        assert_close(model(**batch).logits, expected)
        flat = model(input_ids=ids[real][None], lengths=LENGTHS).logits
        assert_close(flat, expected)
        last = model(inputs_embeds=model.get_input_embeddings()(ids), attention_mask=batch["attention_mask"]).logits
    assert_close(last[LENGTHS != LONGEST], expected[LENGTHS != LONGEST])
    assert not torch.allclose(last[longest], expected[longest])  # no ids: the last token


@pytest.mark.parametrize("task", ["base", "causal-lm"])
def test_embeddings_are_scaled_by_their_table(task):
    """What libraries give as `inputs_embeds`, or add noise to, comes from there."""
    stock = random_stock("gemma3_text", task)
    model = from_transformers(stock)
    ids = torch.randint(5, VOCABULARY, (2, 9))
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(embeds, stock.get_input_embeddings()(ids))
    with torch.no_grad():
        assert_close(model(inputs_embeds=embeds)[0], model(ids)[0])
    model.resize_token_embeddings(VOCABULARY + 4)
    assert torch.equal(model.get_input_embeddings()(ids), embeds)


def test_a_class_without_a_pad_id_is_read_off_the_last_token():
    stock = random_stock("llama", "sequence-classification", pad_token_id=None)
    model = from_transformers(stock)
    ids = torch.randint(5, VOCABULARY, (2, 9))
    with pytest.raises(ValueError, match="batch sizes > 1"):
        stock(ids)
    with torch.no_grad():
        found = model(ids, lengths=torch.tensor([9, 4])).logits
        for row, length in enumerate((9, 4)):
            assert_close(found[row], stock(ids[row : row + 1, :length]).logits[0])


def test_a_causal_model_of_ours_reads_the_class_off_the_last_token_after_conversion(tmp_path):
    """The bare stock model has no head; one that is put on the converted model is the stock one."""
    from_transformers(random_stock("llama", "base")).save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(to_transformers(model)).__name__ == "LlamaForSequenceClassification"


@all_types
def test_nan_at_padded_positions_changes_nothing(model_type):
    stock = random_stock(model_type, "base")
    model = from_transformers(stock)
    batch = random_batch(stock, "base")
    padded = batch["attention_mask"] == 0
    embeddings = model.get_input_embeddings()(batch["input_ids"]).detach()
    outputs, gradients = [], []
    for poison in (0.0, torch.nan):
        inputs = embeddings.masked_fill(padded[..., None], poison).requires_grad_()
        outputs.append(model(inputs_embeds=inputs, lengths=LENGTHS).last_hidden_state)
        outputs[-1].sum().backward()
        gradients.append(inputs.grad)
    assert torch.equal(*outputs) and torch.equal(*gradients)
    assert not gradients[0][padded].any()


# --- real weights


@pytest.fixture(scope="module")
def minilm() -> str:
    return resolve_model("sample:minilm")


@pytest.fixture(scope="module")
def sentences(minilm):
    texts = [
        "A moving, funny and sad little film.",
        "Dull.",
        "The plot is thin, the cast is tired, and yet there is a scene near the end, with a boat and a letter, that I "
        "would not have missed for anything.",
        "Go and see it, twice if you can!",
    ]
    return AutoTokenizer.from_pretrained(minilm)(texts, padding=True, return_tensors="pt")


def test_minilm_keeps_its_outputs_and_weights(minilm, sentences):
    stock = AutoModel.from_pretrained(minilm)
    model = from_transformers(minilm)
    with torch.no_grad():
        expected, found = stock(**sentences), model(**in_lengths(sentences))
    real = sentences["attention_mask"].bool()
    assert_close(found.last_hidden_state[real], expected.last_hidden_state[real])
    assert_close(found.pooler_output, expected.pooler_output)
    assert_same_weights(to_transformers(model), stock)


def test_minilm_keeps_its_losses_and_gradients(minilm, sentences):
    torch.manual_seed(0)
    stock = AutoModelForSequenceClassification.from_pretrained(minilm, num_labels=3)
    with torch.no_grad():  # a fresh classifier is so small that hardly a gradient reaches the encoder
        stock.classifier.weight.normal_()
    model = from_transformers(stock)
    labels = torch.tensor([2, 0, 1, 2])
    losses = stock(**sentences, labels=labels).loss, model(**in_lengths(sentences), labels=labels).loss
    assert_close(losses[1], losses[0], 1e-4)
    for loss in losses:
        loss.backward()
    assert_same_gradients(model, stock, "sequence-classification")


# --- memory, dtype, mode, config


def test_a_loaded_model_is_copied_and_left_as_it_is():
    stock = random_stock("bert", "masked-lm").train()
    before, config = copy.deepcopy(stock.state_dict()), stock.config.to_dict()
    model = from_transformers(stock, hidden_dropout_prob=0.5, mask="causal")
    restored = to_transformers(from_transformers(stock))
    with torch.no_grad():
        for parameter in (*model.parameters(), *restored.parameters()):
            parameter.zero_()
    (model.config.label2id or {}).clear()
    assert all(torch.equal(weight, before[name]) for name, weight in stock.state_dict().items())
    assert stock.config.to_dict() == config
    assert model.training and restored.training


def test_weights_of_a_checkpoint_are_not_copied(tmp_path, monkeypatch):
    random_stock("bert", "base").save_pretrained(tmp_path)
    load, loaded = BertModel.from_pretrained, []

    def remember(*arguments, **keywords):
        loaded.append(load(*arguments, **keywords))
        return loaded[-1]

    monkeypatch.setattr(BertModel, "from_pretrained", remember)
    model = from_transformers(tmp_path)
    places = {weight.data_ptr() for weight in loaded[0].parameters()}
    assert {weight.data_ptr() for weight in model.parameters()} == places


def test_tied_weights_stay_one_tensor():
    model = from_transformers(random_stock("xlm-roberta", "masked-lm"))
    assert model.lm_head.decoder.weight is model.model.embeddings.word_embeddings.weight
    untied = from_transformers(random_stock("electra", "masked-lm", tie_word_embeddings=False))
    assert not torch.equal(untied.lm_head.decoder.weight, untied.model.embeddings.word_embeddings.weight)
    assert_same_weights(to_transformers(untied), random_stock("electra", "masked-lm", tie_word_embeddings=False))


def test_dtype_is_kept(tmp_path):
    stock = random_stock("electra", "sequence-classification").bfloat16()
    model = from_transformers(stock)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert_same_weights(to_transformers(model), stock)
    stock.save_pretrained(tmp_path)
    assert from_transformers(tmp_path).dtype == torch.bfloat16
    assert from_transformers(tmp_path, dtype=torch.float32).dtype == torch.float32


def test_trained_weights_come_back():
    """What training changed is in the stock model, and its outputs are ours."""
    model = from_transformers(random_stock("distilbert", "sequence-classification"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    batch = random_batch(model, "sequence-classification")
    with torch.no_grad():
        assert_close(to_transformers(model)(**batch).logits, model(**in_lengths(batch)).logits)


@pytest.mark.parametrize(
    ("model_type", "task", "settings", "expected"),
    [
        ("bert", "sequence-classification", {}, {"classifier_dropout": None, "pooler_dropout": 0.0}),
        ("bert", "question-answering", {"classifier_dropout": 0.4}, {"classifier_dropout": 0.0}),
        ("bert", "masked-lm", {"hidden_act": "relu"}, {"hidden_act": "relu", "lm_head_act": "relu"}),
        ("roberta", "sequence-classification", {"hidden_dropout_prob": 0.3}, {"pooler_dropout": 0.3}),
        ("roberta", "sequence-classification", {"classifier_dropout": 0.4}, {"pooler_dropout": 0.4}),
        ("roberta", "multiple-choice", {"classifier_dropout": 0.4}, {"classifier_dropout": None}),
        ("roberta", "base", {"pad_token_id": 4}, {"position_offset": 5}),
        ("roberta", "masked-lm", {"hidden_act": "relu"}, {"hidden_act": "relu", "lm_head_act": "gelu"}),
        ("distilbert", "sequence-classification", {"seq_classif_dropout": 0.4}, {"classifier_dropout": 0.4}),
        (
            "distilbert",
            "token-classification",
            {"dropout": 0.3},
            {"classifier_dropout": None, "hidden_dropout_prob": 0.3},
        ),
        ("distilbert", "question-answering", {"qa_dropout": 0.4}, {"classifier_dropout": 0.4}),
        ("llama", "token-classification", {}, {"classifier_dropout": 0.1, "hidden_dropout_prob": 0.0}),
        ("gpt2", "token-classification", {"classifier_dropout": 0.4}, {"classifier_dropout": 0.4}),
        ("gpt2", "question-answering", {"resid_pdrop": 0.3, "embd_pdrop": 0.3}, {"classifier_dropout": 0.0}),
        ("gpt2", "base", {"n_inner": None}, {"intermediate_size": 60}),
        (
            "electra",
            "sequence-classification",
            {"classifier_dropout": 0.4},
            {"pooler_dropout": 0.4, "pooler_act": "gelu"},
        ),
        (
            "electra",
            "multiple-choice",
            {"summary_activation": "relu", "summary_last_dropout": 0.4},
            {"pooler_act": "relu", "classifier_dropout": 0.4, "pooler_dropout": 0.0},
        ),
    ],
)
def test_settings_of_a_head_carry_over(model_type, task, settings, expected):
    stock = random_stock(model_type, task, **settings)
    model = from_transformers(stock)
    assert {name: getattr(model.config, name) for name in expected} == expected
    restored = to_transformers(model).config
    unread = {"roberta": "multiple-choice", "bert": "question-answering"}.get(model_type) == task
    assert unread or all(getattr(restored, name) == value for name, value in settings.items())


def test_overrides_reach_the_config_that_has_them(tmp_path):
    random_stock("roberta", "base").save_pretrained(tmp_path)
    model = from_transformers(
        tmp_path,
        "sequence-classification",
        id2label={0: "no", 1: "maybe", 2: "yes"},
        label2id={"no": 0, "maybe": 1, "yes": 2},
        hidden_dropout_prob=0.0,
        layer_masks=["full", "window(2)", "causal"],
        attn_implementation="eager",
    )
    assert isinstance(model, DynMaskForSequenceClassification)
    assert model.classifier.out_features == 3
    assert model.config.id2label == {0: "no", 1: "maybe", 2: "yes"}
    assert model.config.hidden_dropout_prob == model.config.pooler_dropout == 0.0
    assert model.config.layer_masks == ["full", "window(2)", "causal"]
    assert model.config._attn_implementation == "eager"
    assert model.config.name_or_path == str(tmp_path)


def test_without_a_task_a_checkpoint_of_another_head_is_a_base_model(tmp_path):
    config = BertConfig(vocab_size=VOCABULARY, **BERT_SIZES)
    BertForPreTraining(config).save_pretrained(tmp_path)
    assert type(from_transformers(tmp_path)) is DynMaskModel
    assert type(from_transformers(tmp_path, "masked-lm")) is DynMaskForMaskedLM


def test_a_model_without_pooler_is_converted_by_name():
    stock = BertModel(BertConfig(vocab_size=VOCABULARY, **BERT_SIZES), add_pooling_layer=False)
    with pytest.raises(
        ValueError, match=r"weights do not fit: `pooler.dense.weight` must be \(15, 15\); got 'nothing'"
    ):
        from_transformers(stock)
    assert from_transformers(stock, use_pooler=False).pooler is None


# --- errors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"is_decoder": True}, "cannot convert a 'bert' model: `is_decoder` must be False; got True"),
        (
            {"is_decoder": True, "add_cross_attention": True},
            "`is_decoder` must be False; got True; `add_cross_attention` must be False; got True",
        ),
        ({"chunk_size_feed_forward": 2}, "`chunk_size_feed_forward` must be 0; got 2"),
        (
            {"position_embedding_type": "relative_key"},
            "`position_embedding_type` must be 'absolute'; got 'relative_key'",
        ),
    ],
)
def test_a_stock_feature_without_counterpart_is_named(settings, message, tmp_path):
    config = BertConfig(vocab_size=VOCABULARY, **BERT_SIZES, **settings)
    with pytest.raises(ValueError, match=message):
        from_transformers(BertModel(config))
    config.save_pretrained(tmp_path)  # no weights: they are not read first
    with pytest.raises(ValueError, match=message):
        from_transformers(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"embd_pdrop": 0.3}, "`embd_pdrop` must be 0.1; got 0.3"),
        ({"scale_attn_weights": False}, "`scale_attn_weights` must be True; got False"),
        ({"scale_attn_by_inverse_layer_idx": True}, "`scale_attn_by_inverse_layer_idx` must be False; got True"),
        ({"add_cross_attention": True}, "`add_cross_attention` must be False; got True"),
    ],
)
def test_settings_of_gpt2_without_counterpart_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        from_transformers(random_stock("gpt2", "base", **settings))


def test_a_setting_that_our_config_refuses_is_named():
    half = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    with pytest.raises(ValueError, match="'llama' model: `partial_rotary_factor` must be 1.0: .*; got 0.5"):
        from_transformers(random_stock("llama", "base", rope_parameters=half))
    with pytest.raises(ValueError, match=r"'bert' model: `mask`: mask does not parse .* got 'windo\(3\)'"):
        from_transformers(random_stock("bert", "base"), mask="windo(3)")


def test_a_family_without_the_task_says_so():
    model = DynMaskForMaskedLM(DynMaskConfig(**BERT_LIKE))
    with pytest.raises(ValueError, match="'llama' cannot represent the model: it has no model for 'masked-lm'"):
        to_transformers(model, "llama")
    config: Any = random_stock("gpt2", "base").config
    with pytest.raises(ValueError, match="`source` must be one of GPT2Model, GPT2LMHeadModel, .*; got GPT2DoubleHeads"):
        from_transformers(GPT2DoubleHeadsModel(config))


def test_an_unused_bias_is_not_lost_silently():
    with pytest.raises(ValueError, match="`tie_word_embeddings` must be True; got False"):
        from_transformers(random_stock("bert", "masked-lm", tie_word_embeddings=False))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"summary_type": "mean"}, "`summary_type` must be 'first'; got 'mean'"),
        ({"summary_use_proj": False}, "`summary_use_proj` must be True; got False"),
        ({"summary_first_dropout": 0.1}, "`summary_first_dropout` must be 0.0; got 0.1"),
    ],
)
def test_other_summaries_of_electra_are_refused_where_they_matter(settings, message):
    with pytest.raises(ValueError, match=message):
        from_transformers(random_stock("electra", "multiple-choice", **settings))
    from_transformers(random_stock("electra", "sequence-classification", **settings))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # of old releases
def test_unknown_model_types_tasks_and_classes_name_the_known():
    known = ", ".join(map(repr, FAMILIES))
    opt = AutoConfig.for_model("opt", hidden_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=VOCABULARY)
    instead = "It needs no conversion to run with attn_implementation='dynmask'"
    with pytest.raises(ValueError, match=f"`model_type` must be one of {known}; got 'opt'. {instead}"):
        from_transformers(AutoModel.from_config(opt))
    deberta = AutoModel.from_config(AutoConfig.for_model("deberta", **BERT_SIZES, vocab_size=VOCABULARY))
    with pytest.raises(ValueError, match=f"`model_type` must be one of {known}; got 'deberta'$"):
        from_transformers(deberta)
    stock = random_stock("bert", "base")
    with pytest.raises(ValueError, match=f"`model_type` must be one of {known}; got 'opt'"):
        to_transformers(from_transformers(stock), "opt")
    with pytest.raises(ValueError, match="`task` must be 'base' for a loaded BertModel; got 'masked-lm'"):
        from_transformers(stock, "masked-lm")
    pretraining = BertForPreTraining(BertConfig(vocab_size=VOCABULARY, **BERT_SIZES))
    with pytest.raises(ValueError, match="`source` must be one of BertModel, .*; got BertForPreTraining"):
        from_transformers(pretraining)
    with pytest.raises(ValueError, match="`model` must be one of DynMaskModel, .*; got BertModel"):
        to_transformers(stock)  # pyright: ignore[reportArgumentType]


def test_an_unknown_task_names_the_known(tmp_path):
    random_stock("bert", "base").save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="`task` of a 'bert' model must be one of 'base', 'masked-lm', .*; got 'summari"
    ):
        from_transformers(tmp_path, "summarization")


def test_overrides_that_cannot_be_applied_are_named():
    stock = random_stock("bert", "sequence-classification")
    with pytest.raises(
        ValueError, match="`num_labels` must be a field of DynMaskConfig with a loaded model; got num_labels=3"
    ):
        from_transformers(stock, num_labels=3)
    with pytest.raises(
        ValueError, match=r"`model.embeddings.word_embeddings.weight` must be \(39, 15\); got \(37, 15\)"
    ):
        from_transformers(stock, vocab_size=39)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask": "window(3)"}, r"'bert' cannot represent the model: `mask` must be 'full'; got 'window\(3, 3\)'"),
        ({"layer_masks": ["full", "causal"]}, r"`mask` must be 'full'; got \['full', 'causal'\]"),
        ({"position_type": "rotary"}, "`position_type` must be 'learned'; got 'rotary'"),
        ({"position_type": "none"}, "`position_type` must be 'learned'; got 'none'"),
        ({"num_key_value_heads": 1}, "`num_key_value_heads` must be 2; got 1"),
        ({"head_dim": 4}, "`head_dim` must be 8; got 4"),
        ({"value_head_dim": 4}, "`value_head_dim` must be 8; got 4"),
        ({"embedding_size": 12}, "`embedding_size` must be 16; got 12"),
        ({"norm_placement": "pre"}, "`norm_placement` must be 'post'; got 'pre'"),
        ({"norm_type": "rms_norm"}, "`norm_type` must be 'layer_norm'; got 'rms_norm'"),
        ({"embedding_norm": False}, "`embedding_norm` must be True; got False"),
        ({"gated_feed_forward": True}, "`gated_feed_forward` must be False; got True"),
        ({"attention_bias": False}, "`attention_bias` must be True; got False"),
        ({"mlp_bias": False}, "`mlp_bias` must be True; got False"),
        ({"position_offset": 2}, "`position_offset` must be 0; got 2"),
        ({"type_vocab_size": 0}, "`type_vocab_size` must be 1; got 0"),
        ({"pooler_act": "gelu"}, "`pooler_act` must be 'tanh'; got 'gelu'"),
        ({"pooler_dropout": 0.1}, "`pooler_dropout` must be 0.0; got 0.1"),
        ({"lm_head_act": "relu"}, "`lm_head_act` must be 'gelu'; got 'relu'"),
        ({"lm_head_transform": False}, "`lm_head_transform` must be True; got False"),
        ({"decoder_bias": False}, "`decoder_bias` must be True; got False"),
        ({"classifier_pooling": "mean"}, "`classifier_pooling` must be 'first'; got 'mean'"),
        ({"classifier_transform": "none"}, "`classifier_transform` must be 'pooler'; got 'none'"),
        ({"classifier_bias": False}, "`classifier_bias` must be True; got False"),
    ],
)
def test_a_config_that_the_family_cannot_represent_names_the_field(settings, message):
    config = DynMaskConfig(**(BERT_LIKE | settings))
    with pytest.raises(ValueError, match=message):
        to_transformers(DynMaskModel(config), "bert")


@pytest.mark.parametrize(
    ("head", "model_type", "settings", "message"),
    [
        (DynMaskForTokenClassification, "bert", {"classifier_transform": "lm_head"}, "must be 'none'; got 'lm_head'"),
        (DynMaskForSequenceClassification, "bert", {"classifier_pooling": "late"}, "must be 'first'; got 'late'"),
        (DynMaskForTokenClassification, "bert", {"classifier_transform": "none", "classifier_pooling": "mean"}, None),
        (DynMaskForMaskedLM, "bert", {"classifier_transform": "none", "classifier_bias": False}, None),
    ],
)
def test_settings_of_classifiers_matter_where_a_head_reads_them(head, model_type, settings, message):
    model = head(DynMaskConfig(**(BERT_LIKE | settings)))
    if message is None:
        assert to_transformers(model, model_type).config.model_type == model_type
        return
    with pytest.raises(ValueError, match=f"`{next(iter(settings))}` {message}"):
        to_transformers(model, model_type)


def test_masks_are_compared_not_their_texts():
    spelled = DynMaskModel(DynMaskConfig(**BERT_LIKE, layer_masks=["full", "(full)"]))
    assert to_transformers(spelled, "bert").config.model_type == "bert"


@pytest.mark.parametrize("width", [1, 3, LONGEST, 50])
def test_a_sliding_window_becomes_a_mask_of_as_many_keys(width):
    stock = random_stock("mistral", "base", sliding_window=width)
    model = from_transformers(stock)
    assert model.config.mask == f"causal & window({width - 1}, 0)"
    batch = random_batch(stock, "base")
    with torch.no_grad():
        expected, found = stock(**batch).last_hidden_state, model(**in_lengths(batch)).last_hidden_state
    real = batch["attention_mask"].bool()
    assert_close(found[real], expected[real])


@pytest.mark.parametrize("width", [1, 2, 6, 7, 50])
@pytest.mark.parametrize("bases", [(160000.0, 10000.0), (500.0, 500.0)])
@pytest.mark.parametrize("scaling", [{"rope_type": "default"}, {"rope_type": "linear", "factor": 2.0}])
def test_local_layers_of_modernbert_see_as_far_to_both_sides(width, bases, scaling):
    rotary = {"full_attention": scaling, "sliding_attention": {"rope_type": "default"}}
    rotary = {
        kind: {**parameters, "rope_theta": base} for (kind, parameters), base in zip(rotary.items(), bases, strict=True)
    }
    stock = random_stock("modernbert", "base", local_attention=width, rope_parameters=rotary)
    model = from_transformers(stock)
    half = width // 2
    assert model.config.layer_masks == ["full", f"window({half})", f"window({half})"]
    thetas = [(parameters or {})["rope_theta"] for parameters in model.config.rope_by_layer()]
    assert thetas == [bases[0], bases[1], bases[1]]
    batch = random_batch(stock, "base")
    with torch.no_grad():
        expected, found = stock(**batch).last_hidden_state, model(**in_lengths(batch)).last_hidden_state
    real = batch["attention_mask"].bool()
    assert_close(found[real], expected[real])
    assert to_transformers(model).config.rope_parameters == rotary


@pytest.mark.parametrize("kind", ["full_attention", "sliding_attention"])
def test_modernbert_with_layers_of_one_kind(kind):
    stock = random_stock("modernbert", "base", layer_types=[kind] * 3, local_attention=128)
    restored = to_transformers(from_transformers(stock))
    assert_same_weights(restored, stock)
    assert restored.config.to_dict() == stock.config.to_dict()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"embedding_dropout": 0.1}, "`embedding_dropout` must be 0.0; got 0.1"),
        ({"attention_dropout": 0.1}, "`attention_dropout` must be 0.0; got 0.1"),
        ({"mlp_dropout": 0.1}, "`mlp_dropout` must be 0.0; got 0.1"),
        ({"sparse_prediction": True}, "`sparse_prediction` must be False; got True"),
    ],
)
def test_settings_of_modernbert_without_counterpart_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        from_transformers(random_stock("modernbert", "masked-lm", **settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attn_logit_softcapping": 50.0}, "`attn_logit_softcapping` must be None; got 50.0"),
        ({"final_logit_softcapping": 30.0}, "`final_logit_softcapping` must be None; got 30.0"),
    ],
)
def test_settings_of_gemma_without_counterpart_are_named(settings, message):
    with pytest.raises(ValueError, match=f"'gemma3_text' model: {message}"):
        from_transformers(random_stock("gemma3_text", "causal-lm", **settings))


def test_gemma_slides_to_one_side_or_both(tmp_path):
    assert from_transformers(random_stock("gemma3_text", "base")).config.layer_masks == [
        "causal & window(3, 0)",
        "causal",
        "causal & window(3, 0)",
    ]
    stock = random_stock("gemma3_text", "base", use_bidirectional_attention=True, sliding_window=6)
    model = from_transformers(stock)
    assert model.config.layer_masks == ["window(3)", "full", "window(3)"]
    to_transformers(model).save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert_same_weights(loaded, stock)
    assert loaded.config.sliding_window == stock.config.sliding_window == 4
    assert from_transformers(tmp_path).config.layer_masks == model.config.layer_masks


def test_layers_slide_or_not():
    model = from_transformers(random_stock("qwen2", "base"))
    assert model.config.layer_masks == ["causal", "causal & window(2, 0)", "causal & window(2, 0)"]
    unused = from_transformers(random_stock("qwen3", "base", use_sliding_window=False, layer_types=None))
    assert (unused.config.mask, unused.config.layer_masks) == ("causal", None)
    assert to_transformers(unused).config.sliding_window is None


def test_a_mask_of_the_user_wins_over_those_of_the_layers():
    model = from_transformers(random_stock("qwen2", "base"), mask="causal & chunk(4)")
    assert [str(mask) for mask in model.config.masks()] == ["causal & chunk(4)"] * 3


@pytest.mark.parametrize("model_type, task", [("llama", "causal-lm"), ("bert", "masked-lm"), ("bart", "seq2seq-lm")])
def test_whether_a_model_caches_is_no_obstacle(model_type, task):
    """A Trainer sets it."""
    model: Any = from_transformers(random_stock(model_type, task))
    model.config.use_cache = not model.config.use_cache
    stock = to_transformers(model)
    for name, weight in from_transformers(stock).state_dict().items():
        assert torch.equal(weight, model.state_dict()[name])


def test_settings_of_generation_carry_over(tmp_path):
    stock = random_stock("llama", "causal-lm")
    stock.generation_config.update(temperature=0.3, do_sample=True, eos_token_id=[7, 8])
    stock.save_pretrained(tmp_path)
    for source in (stock, tmp_path):
        model = from_transformers(source)
        assert model.generation_config.eos_token_id == [7, 8] and model.generation_config.temperature == 0.3
        assert to_transformers(model).generation_config.to_dict() == stock.generation_config.to_dict()
        model.generation_config.temperature = 0.9
    assert stock.generation_config.temperature == 0.3


def test_a_decoder_of_our_own_becomes_a_stock_one():
    llama_like: dict[str, Any] = {
        "norm_placement": "pre",
        "norm_type": "rms_norm",
        "embedding_norm": False,
        "position_type": "rotary",
        "gated_feed_forward": True,
        "hidden_dropout_prob": 0.0,
        "attention_bias": False,
        "mlp_bias": False,
        "type_vocab_size": 0,
        "mask": "causal & window(3, 0)",
    }
    config = DynMaskConfig(**BERT_LIKE | llama_like)
    model = DynMaskForCausalLM(config).eval()
    with pytest.raises(ValueError, match=r"types that can represent it: 'mistral'$"):
        to_transformers(model)
    stock = to_transformers(model, "mistral")
    assert stock.config.sliding_window == 4
    ids = torch.randint(5, VOCABULARY, (2, 9))
    with torch.no_grad():
        assert_close(stock(ids).logits, model(ids).logits)


def test_a_model_without_source_needs_a_type():
    config = DynMaskConfig(**BERT_LIKE)
    model = DynMaskModel(config).eval()
    with pytest.raises(ValueError, match="`model_type` must be given .*; types that can represent it: 'bert'$"):
        to_transformers(model)
    ids = torch.randint(5, VOCABULARY, (2, 9))
    with torch.no_grad():
        stock = to_transformers(model, "bert")
        assert_close(stock(ids).last_hidden_state, model(ids).last_hidden_state)
    config.mask = "causal"
    with pytest.raises(ValueError, match="types that can represent it: none"):
        to_transformers(DynMaskModel(config))
