"""Libraries that pad rows by themselves, with stock models that run with `attn_implementation="dynmask"`."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false

import copy
from typing import Any

import pytest
import torch
from datasets import Dataset
from test_libraries import SIZES, arguments, tokenizer  # noqa: F401
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from hf_dynmask.stock import unpadding

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

TEXTS = ["the film was good", "bad", "a very very good plot is not a bad plot", "the plot was not bad", "good"]
PAIRS = [(TEXTS[k], TEXTS[(2 * k + 1) % 5]) for k in range(5)]
LLAMA: dict[str, Any] = SIZES | {"num_key_value_heads": 1, "pad_token_id": 0, "eos_token_id": 2, "bos_token_id": 1}
BERT: dict[str, Any] = SIZES | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
CLOSE: dict[str, Any] = {"atol": 1e-4, "rtol": 1e-4}


@pytest.fixture
def unpadded(monkeypatch):
    """Numbers of tokens of the flat rows that were computed."""
    tokens = []
    own = unpadding.Unpadded.in_rows

    def in_rows(self, output):
        tokens.append(self.rows.num_tokens)
        return own(self, output)

    monkeypatch.setattr(unpadding.Unpadded, "in_rows", in_rows)
    return tokens


def saved(folder, model_class, config, tokenizer, **settings):  # noqa: F811
    torch.manual_seed(0)
    model_class(config(**settings)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def on_both(make, use, unpadded):
    """What is the same of a model with stock attention and with ours; the latter computed no padding."""
    expected = use(make("sdpa"))
    assert not unpadded
    found = use(make("dynmask"))
    assert unpadded
    torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(expected), **CLOSE)


def losses(trainer):
    trainer.train()
    found = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(found) == 3
    return found


# --- sentence-transformers -------------------------------------------------------------------------------------------


def test_sentence_transformer(tokenizer, tmp_path, unpadded):  # noqa: F811
    library = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    folder = saved(tmp_path, BertModel, BertConfig, tokenizer, **BERT)

    def make(implementation):
        transformer = Transformer(folder, model_kwargs={"attn_implementation": implementation})
        pooling = Pooling(transformer.get_embedding_dimension(), "mean")
        return library.SentenceTransformer(modules=[transformer, pooling], device="cpu")

    on_both(make, lambda model: model.encode(TEXTS), unpadded)
    unpadded.clear()
    data = Dataset.from_dict({"anchor": TEXTS, "positive": TEXTS[1:] + TEXTS[:1]})

    def train(model):
        settings = library.SentenceTransformerTrainingArguments(**arguments(tmp_path / "run", logging_steps=1))
        loss = MultipleNegativesRankingLoss(model)
        return losses(library.SentenceTransformerTrainer(model, settings, data, loss=loss))

    on_both(make, train, unpadded)


def test_cross_encoder(tokenizer, tmp_path, unpadded):  # noqa: F811
    library = pytest.importorskip("sentence_transformers")
    folder = saved(tmp_path, BertForSequenceClassification, BertConfig, tokenizer, **BERT, num_labels=1)

    def make(implementation):
        return library.CrossEncoder(folder, device="cpu", model_kwargs={"attn_implementation": implementation})

    on_both(make, lambda model: model.predict(PAIRS), unpadded)
    unpadded.clear()
    data = Dataset.from_dict({"query": TEXTS, "text": TEXTS[1:] + TEXTS[:1], "label": [0.0, 1.0, 0.0, 1.0, 1.0]})

    def train(model):
        settings = library.CrossEncoderTrainingArguments(**arguments(tmp_path / "run", logging_steps=1))
        return losses(library.CrossEncoderTrainer(model, settings, data))

    on_both(make, train, unpadded)


def test_sparse_encoder(tokenizer, tmp_path, unpadded):  # noqa: F811
    library = pytest.importorskip("sentence_transformers")
    folder = saved(tmp_path, BertForMaskedLM, BertConfig, tokenizer, **BERT)

    def make(implementation):
        return library.SparseEncoder(folder, device="cpu", model_kwargs={"attn_implementation": implementation})

    on_both(make, lambda model: model.encode(TEXTS, convert_to_sparse_tensor=False), unpadded)


# --- TRL, PEFT -------------------------------------------------------------------------------------------------------


def llama(model_class, implementation, **settings):
    torch.manual_seed(0)
    return model_class(LlamaConfig(**LLAMA, attn_implementation=implementation, **settings))


def preferences():
    chosen, rejected = [f"{text} good" for text in TEXTS], [f"{text} is bad" for text in TEXTS]
    return Dataset.from_dict({"prompt": TEXTS, "chosen": chosen, "rejected": rejected})


def test_rewards(tokenizer, tmp_path, unpadded):  # noqa: F811
    trl = pytest.importorskip("trl")

    def train(model):
        settings = trl.RewardConfig(**arguments(tmp_path, logging_steps=1, bf16=False, gradient_checkpointing=False))
        return losses(trl.RewardTrainer(model, args=settings, train_dataset=preferences(), processing_class=tokenizer))

    on_both(lambda name: llama(LlamaForSequenceClassification, name, num_labels=1), train, unpadded)


def test_preferences(tokenizer, tmp_path, unpadded):  # noqa: F811
    trl = pytest.importorskip("trl")

    def train(model):
        settings = trl.DPOConfig(**arguments(tmp_path, logging_steps=1, bf16=False, gradient_checkpointing=False))
        reference = copy.deepcopy(model)
        data = {"train_dataset": preferences(), "processing_class": tokenizer}
        return losses(trl.DPOTrainer(model, reference, args=settings, **data))

    on_both(lambda name: llama(LlamaForCausalLM, name), train, unpadded)


@pytest.mark.parametrize("method", ["lora", "prompt"])
def test_adapters(method, tokenizer, unpadded):  # noqa: F811
    peft = pytest.importorskip("peft")
    settings = {
        "lora": lambda: peft.LoraConfig(
            task_type="SEQ_CLS", target_modules=["q_proj", "v_proj"], init_lora_weights=False
        ),
        "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    }
    model_class = LlamaForSequenceClassification if method == "lora" else LlamaForCausalLM
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    batch = {name: batch[name] for name in ("input_ids", "attention_mask")}
    here = batch["attention_mask"].bool()
    is_class = method == "lora"
    batch["labels"] = torch.tensor([0, 1, 0, 1, 1]) if is_class else batch["input_ids"].where(here, -100)
    found = []
    for name in ("sdpa", "dynmask"):
        model = llama(model_class, name)
        torch.manual_seed(1)
        model = peft.get_peft_model(model, settings[method]())
        output = model(**batch)
        output.loss.backward()
        grads = [weight.grad.flatten() for weight in model.parameters() if weight.grad is not None]
        logits = output.logits.detach() if is_class else output.logits.detach()[:, 3:][here]
        found.append((logits, torch.cat(grads)))
    assert unpadded
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)


@pytest.mark.parametrize("kind", ["adapter_names", "task_ids", "alora"])
def test_adapters_that_are_told_of_each_row(kind, tokenizer):  # noqa: F811
    """PEFT tells its layers by hooks, past the model, which keeps rows then."""
    peft = pytest.importorskip("peft")
    batch = dict(tokenizer(TEXTS, padding=True, return_tensors="pt"))
    batch.pop("token_type_ids", None)
    here, told, found = batch["attention_mask"].bool(), {}, []
    settings: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    if kind == "adapter_names":
        told = {kind: ["one", "__base__", "one", "one", "__base__"]}
    elif kind == "task_ids":
        told = {kind: torch.tensor([0, 1, 0, 1, 1])}
    else:
        batch["input_ids"][:, 0] = 3
        settings["alora_invocation_tokens"] = [3]
    for name in ("sdpa", "dynmask"):
        torch.manual_seed(1)
        if kind == "task_ids":
            config = peft.PolyConfig(**settings, r=2, n_tasks=2, n_skills=2, init_weights=False)
        else:
            config = peft.LoraConfig(**settings, init_lora_weights=False)
        model = peft.get_peft_model(llama(LlamaForCausalLM, name), config, adapter_name="one").eval()
        with torch.no_grad():
            found.append(model(**batch, **told, use_cache=False).logits[here])
    torch.testing.assert_close(*found, **CLOSE)


@pytest.mark.parametrize("attend", [False, True])
def test_query_expansion(attend, tokenizer, tmp_path):  # noqa: F811
    """Tokens that see others and that none sees, as in ColBERT: absent ones, whose outputs count all the same."""
    library = pytest.importorskip("sentence_transformers")
    if not hasattr(library, "MultiVectorEncoder"):
        pytest.skip("an earlier release")
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask

    folder, found = saved(tmp_path, BertModel, BertConfig, tokenizer, **BERT), []
    expansion = {"strategy": "fixed", "attend": attend, "length": 12, "token": "film"}
    for name in ("sdpa", "dynmask"):
        transformer = Transformer(folder, model_kwargs={"attn_implementation": name}, query_expansion=expansion)
        model = library.MultiVectorEncoder(modules=[transformer, MultiVectorMask()], device="cpu")
        found.append(torch.stack([torch.as_tensor(query) for query in model.encode_query(TEXTS)]))
    assert found[0].shape[1] == 12
    torch.testing.assert_close(*found, **CLOSE)
