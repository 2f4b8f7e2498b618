"""Other libraries of the ecosystem, each used as its users do. Without a library its tests are skipped."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from hf_dynmask import (
    DataCollatorWithLengths,
    DynMaskConfig,
    DynMaskForCausalLM,
    DynMaskForSequenceClassification,
    from_transformers,
    set_mask,
    to_transformers,
)

WORDS = ["[PAD]", "[UNK]", "a", "the", "film", "plot", "was", "is", "not", "very", "good", "bad"]
LENGTHS = torch.tensor([5, 2, 7, 1])
SIZES: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 2}
SIZES |= {"vocab_size": len(WORDS)}


@pytest.fixture(scope="module")
def tokenizer():
    words = Tokenizer(WordLevel({word: k for k, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", eos_token="a", model_max_length=64
    )


LIKE_LLAMA: dict[str, Any] = {"position_type": "rotary", "norm_type": "rms_norm", "norm_placement": "pre"}
LIKE_LLAMA |= {"embedding_norm": False, "gated_feed_forward": True, "hidden_act": "silu", "attention_bias": False}
LIKE_LLAMA |= {"mlp_bias": False, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
LIKE_LLAMA |= {"use_pooler": False}


def batch():
    input_ids = torch.arange(4 * 7).reshape(4, 7) % (len(WORDS) - 2) + 2
    return {"input_ids": input_ids, "lengths": LENGTHS}


def classifier(**settings):
    torch.manual_seed(0)
    return DynMaskForSequenceClassification(DynMaskConfig(**SIZES, **settings)).eval()


def writer(**settings):
    torch.manual_seed(0)
    config = DynMaskConfig(**SIZES, mask="causal", pad_token_id=0, eos_token_id=2, **settings)
    return DynMaskForCausalLM(config).eval()


def examples(causal=False):
    rows = [batch()["input_ids"][k, : LENGTHS[k]].tolist() for k in range(4)]
    return Dataset.from_list([{"input_ids": ids, "labels": ids if causal else k % 2} for k, ids in enumerate(rows)] * 2)


def arguments(folder, **settings) -> dict[str, Any]:
    defaults = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "use_cpu": True}
    return {"output_dir": str(folder), "report_to": "none", "disable_tqdm": True, **defaults, **settings}


@torch.no_grad()
def logits_of(model):
    return model(**batch()).logits


# --- PEFT ------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("make, task", [(classifier, "SEQ_CLS"), (writer, "CAUSAL_LM")])
def test_lora(make, task, tokenizer, tmp_path):
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(task_type=task, r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(make(), settings)
    frozen = {name: weight.clone() for name, weight in model.named_parameters() if not weight.requires_grad}
    collator = DataCollatorWithLengths(tokenizer)
    trainer = Trainer(
        model,
        TrainingArguments(**arguments(tmp_path, label_names=["labels"])),
        data_collator=collator,
        train_dataset=examples(causal=task == "CAUSAL_LM"),
    )
    assert trainer.train().training_loss > 0
    weights = dict(model.named_parameters())
    assert all(torch.equal(weight, weights[name]) for name, weight in frozen.items())
    trained = logits_of(model.eval())
    assert not torch.allclose(trained, logits_of(make()), atol=1e-3)

    model.save_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(logits_of(peft.PeftModel.from_pretrained(make(), tmp_path / "adapter").eval()), trained)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits_of(merged), trained)
    merged.save_pretrained(tmp_path / "merged")
    auto_class = AutoModelForCausalLM if task == "CAUSAL_LM" else AutoModelForSequenceClassification
    torch.testing.assert_close(logits_of(auto_class.from_pretrained(tmp_path / "merged")), trained)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # of PEFT
def test_an_adapter_without_the_mask_that_its_model_was_given(tmp_path):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(writer(), peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    set_mask(adapted, "causal & window(2, 0)")
    with pytest.warns(UserWarning, match="an adapter is saved without the mask of its model, 'causal & window"):
        adapted.save_pretrained(str(tmp_path))
    merged = adapted.merge_and_unload()
    assert merged.config.mask == "causal & window(2, 0)"


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # of PEFT
@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")  # of PEFT
@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PromptEncoderConfig", "PrefixTuningConfig"])
def test_tokens_that_peft_puts_in_front(kind, tokenizer):
    """With an attention mask, as with a stock model; lengths, which PEFT leaves as they were, are refused."""
    peft = pytest.importorskip("peft")
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3)
    rows = DataCollatorWithLengths(tokenizer)([{"input_ids": [2, 3, 4, 5]}, {"input_ids": [6, 7]}])
    losses = []
    for model in (writer(**LIKE_LLAMA), to_transformers(writer(**LIKE_LLAMA), "llama").eval()):
        torch.manual_seed(0)
        adapted = peft.get_peft_model(model, copy.deepcopy(config)).eval()
        told = {"input_ids": rows["input_ids"], "attention_mask": rows["attention_mask"]}
        losses.append(adapted(**told, labels=rows["input_ids"].masked_fill(rows["attention_mask"] == 0, -100)).loss)
        if len(losses) == 1:
            with pytest.raises(ValueError, match="`lengths` (and|must come with)"):
                adapted(**rows, labels=rows["input_ids"])
    torch.testing.assert_close(losses[0], losses[1], atol=1e-5, rtol=1e-5)


# --- sentence-transformers -------------------------------------------------------------------------------------------


def embedder(folder: Path, model, tokenizer):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    transformer = Transformer(str(folder))
    pooling = Pooling(transformer.get_embedding_dimension(), "mean")
    return SentenceTransformer(modules=[transformer, pooling, Normalize()], device="cpu")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_sentence_embeddings(tokenizer, tmp_path):
    pytest.importorskip("sentence_transformers")
    torch.manual_seed(0)
    stock = BertModel(BertConfig(**SIZES))
    texts = ["the film was good", "bad", "a very very good plot is not a bad plot", "the plot was not bad", "good"]
    expected = embedder(tmp_path / "stock", stock, tokenizer).encode(texts)
    ours = embedder(tmp_path / "ours", from_transformers(stock), tokenizer)
    torch.testing.assert_close(ours.encode(texts), expected, atol=1e-5, rtol=0)
    ours.save_pretrained(str(tmp_path / "saved"))
    again = type(ours)(str(tmp_path / "saved"), device="cpu")
    torch.testing.assert_close(again.encode(texts), expected, atol=1e-5, rtol=0)


# --- TRL -------------------------------------------------------------------------------------------------------------


def test_supervised_fine_tuning(tokenizer, tmp_path):
    """With TRL's trainer the same losses as with the Trainer."""
    trl = pytest.importorskip("trl")
    settings = {"logging_steps": 1, "lr_scheduler_type": "constant"}
    collator = DataCollatorWithLengths(tokenizer, return_position_ids=True)
    losses = []
    for trainer_class, settings_class, names in (
        (trl.SFTTrainer, trl.SFTConfig, {"bf16": False, "gradient_checkpointing": None}),
        (Trainer, TrainingArguments, {}),
    ):
        trainer = trainer_class(
            model=writer(),
            args=settings_class(**arguments(tmp_path, **settings, **names)),
            data_collator=collator,
            train_dataset=examples(causal=True),
            processing_class=tokenizer,
        )
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4) and losses[0][-1] < losses[0][0]


@pytest.mark.parametrize("strategy", ["bfd", "wrapped"])
def test_packed_fine_tuning(strategy, tokenizer, tmp_path):
    """TRL packs without padding; the losses are those of the stock model, for which it keeps documents apart itself."""
    trl = pytest.importorskip("trl")
    documents = [{"input_ids": [2 + (3 * k + place) % 9 for place in range(3 + k % 7)]} for k in range(24)]
    settings = {"packing": True, "packing_strategy": strategy, "max_length": 16, "bf16": False, "logging_steps": 1}
    settings |= {"gradient_checkpointing": None}
    losses = []
    for model in (writer(**LIKE_LLAMA), to_transformers(writer(**LIKE_LLAMA), "llama")):
        trainer = trl.SFTTrainer(
            model=model.train(),
            args=trl.SFTConfig(**arguments(tmp_path, **settings)),
            train_dataset=Dataset.from_list(documents),
            processing_class=tokenizer,
        )
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4) and losses[0][-1] < losses[0][0]


# --- torchao ---------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_dynamic_int8_quantization():
    quantization = pytest.importorskip("torchao.quantization")
    model = classifier()
    expected = logits_of(model)
    quantization.quantize_(model, quantization.Int8DynamicActivationInt8WeightConfig(version=2))
    found = logits_of(model)
    assert not torch.equal(found, expected)
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0)


# --- accelerate ------------------------------------------------------------------------------------------------------


def test_device_map(tmp_path):
    """Each layer is a part that may go to a device of its own."""
    classifier().save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, device_map="auto", max_memory={"cpu": 10**9})
    torch.testing.assert_close(logits_of(model), logits_of(classifier()))
    parts = set(classifier()._no_split_modules or ())
    assert parts and parts <= {type(module).__name__ for module in model.modules()}


def test_offload():
    torch.testing.assert_close(logits_of(cpu_offload(classifier())), logits_of(classifier()))


def test_offload_to_disk(tmp_path):
    model = classifier()
    device_map: dict[str, Any] = {"model": "disk", "classifier": "cpu"}
    dispatched = dispatch_model(model, device_map, main_device=torch.device("cpu"), offload_dir=str(tmp_path))
    torch.testing.assert_close(logits_of(dispatched), logits_of(classifier()))


# --- Trackers --------------------------------------------------------------------------------------------------------


def test_tensorboard(tokenizer, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from hf_dynmask import ThroughputCallback

    settings = arguments(tmp_path, report_to="tensorboard", logging_steps=1, include_num_input_tokens_seen="all")
    trainer = Trainer(
        classifier(),
        TrainingArguments(**settings),
        data_collator=DataCollatorWithLengths(tokenizer),
        train_dataset=examples(),
        callbacks=[ThroughputCallback()],
    )
    trainer.train()
    runs = [path.parent for path in tmp_path.rglob("events.out.tfevents.*")]
    events = EventAccumulator(str(runs[0])).Reload()
    assert "train/loss" in events.Tags()["scalars"]
    assert any("tokens_per_second" in name for name in events.Tags()["scalars"])
