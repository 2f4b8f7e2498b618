"""Workloads of the speed measurements: models, lengths of examples, batches, and forward and backward passes."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BartConfig,
    BertConfig,
    DataCollatorWithFlattening,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from hf_dynmask import from_transformers
from support.samples import resolve_dataset, resolve_model

Batch = dict[str, Any]  # tensors, and `max_length_q` and the like
Lengths = tuple[int, ...]  # tokens of one example, and for an encoder-decoder of its target


class Shape(NamedTuple):
    """A stock model, and the distributions of lengths that it is measured on."""

    config: type[PreTrainedConfig]
    auto_class: Any
    sizes: dict[str, Any]
    lengths: tuple[str, ...]


TEXTS = ("reviews", "uniform", "heavy-tailed", "equal")
SHAPES = {
    "minilm": Shape(
        BertConfig,
        AutoModelForTokenClassification,
        {"num_hidden_layers": 6, "hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536},
        TEXTS,
    ),
    "bert-base": Shape(
        BertConfig,
        AutoModelForTokenClassification,
        {"num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072},
        TEXTS,
    ),
    "llama": Shape(
        LlamaConfig,
        AutoModelForCausalLM,
        {"num_hidden_layers": 6, "hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1024}
        | {"vocab_size": 8192, "pad_token_id": 0},
        ("sections", "uniform"),
    ),
    "tiny": Shape(
        BertConfig,
        AutoModelForTokenClassification,
        {"num_hidden_layers": 12, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
        | {"vocab_size": 32},
        ("tiny",),
    ),
    "bart": Shape(
        BartConfig,
        AutoModelForSeq2SeqLM,
        {"encoder_layers": 3, "decoder_layers": 3, "d_model": 384, "vocab_size": 8192}
        | {"encoder_attention_heads": 6, "decoder_attention_heads": 6}
        | {"encoder_ffn_dim": 1536, "decoder_ffn_dim": 1536},
        ("pairs",),
    ),
}
PASSES = {"forward": False, "forward+backward": True}


# --- Lengths ---------------------------------------------------------------------------------------------------------


def token_counts(texts: list[str]) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("sample:minilm"))
    return [len(input_ids) for input_ids in tokenizer(texts)["input_ids"]]


def review_lengths(count: int) -> list[Lengths]:
    """Lengths of the first sample reviews, which are already in random order."""
    return [(length,) for length in token_counts(resolve_dataset("sample:reviews")["train"]["text"][:count])]


def section_lengths(count: int) -> list[Lengths]:
    """Lengths of random sections of WikiText-2, at most 512."""
    texts = resolve_dataset("sample:wikitext")["train"].shuffle(seed=0)["text"][:count]
    return [(min(length, 512),) for length in token_counts(texts)]


def pair_lengths(count: int) -> list[Lengths]:
    """Lengths of random English sentences and their Spanish translations."""
    pairs = resolve_dataset("sample:sentences")["train"].shuffle(seed=0)[:count]
    return list(zip(token_counts(pairs["source"]), token_counts(pairs["target"]), strict=True))


def uniform_lengths(count: int) -> list[Lengths]:
    return [(length,) for length in torch.randint(8, 257, (count,)).tolist()]


def heavy_tailed_lengths(count: int) -> list[Lengths]:
    """Lengths from a Pareto distribution with minimum 16 and index 1, at most 512."""
    return [(length,) for length in (16 / torch.rand(count)).clamp(max=512).long().tolist()]


def tiny_lengths(count: int) -> list[Lengths]:
    """2, 4, 3, 2, 4, 3 and so on."""
    return [(2 + k * 2 % 3,) for k in range(count)]


def equal_lengths(count: int) -> list[Lengths]:
    return [(64,)] * count


LENGTHS = {
    "reviews": review_lengths,
    "sections": section_lengths,
    "pairs": pair_lengths,
    "uniform": uniform_lengths,
    "heavy-tailed": heavy_tailed_lengths,
    "tiny": tiny_lengths,
    "equal": equal_lengths,
}


# --- Models and passes -----------------------------------------------------------------------------------------------


def make_models(shape: str, dtype: str, device: torch.device) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The stock model with random weights, and the DynMask model with the same weights."""
    torch.manual_seed(0)
    config = SHAPES[shape].config(**SHAPES[shape].sizes)
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    with device:
        stock = SHAPES[shape].auto_class.from_config(config, dtype=getattr(torch, dtype))
    return stock, from_transformers(stock)


def run_model(model: PreTrainedModel, batch: Batch, training: bool) -> Any:
    """The outputs of a forward pass, or the gradients of a forward and backward pass."""
    model.train(training)
    with torch.set_grad_enabled(training):
        outputs = model(**batch)
    return torch.autograd.grad(outputs.loss, list(model.parameters())) if training else outputs


# --- Batches ---------------------------------------------------------------------------------------------------------


def to_device(batch: Batch, device: torch.device) -> Batch:
    return {name: values.to(device) if isinstance(values, Tensor) else values for name, values in batch.items()}


def make_example(lengths: Lengths, config: PreTrainedConfig) -> Batch:
    """Random tokens, and labels: the target, the tokens themselves, or one of two classes for each token."""
    input_ids, *target = (torch.randint(1, config.vocab_size, (length,)) for length in lengths)
    if not target:
        target = [input_ids if isinstance(config, LlamaConfig) else input_ids % 2]
    return {"input_ids": input_ids, "labels": target[0]}


def make_groups(examples: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [examples[start : start + size] for start in range(0, len(examples), size)]


def pad(examples: Sequence[Batch]) -> Batch:
    input_ids, labels = ([example[name] for example in examples] for name in ("input_ids", "labels"))
    return {
        "input_ids": pad_sequence(input_ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(ids) for ids in input_ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
    }


def flatten(examples: Sequence[Batch]) -> Batch:
    """The batch that [`~transformers.DataCollatorWithFlattening`] makes."""
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    return collate([{name: values.tolist() for name, values in example.items()} for example in examples])


def with_lengths(batch: Batch, config: PreTrainedConfig) -> Batch:
    """The batch with lengths in place of the attention mask."""
    changed = {name: values for name, values in batch.items() if name != "attention_mask"}
    changed["lengths"] = batch["attention_mask"].sum(-1)
    if config.is_encoder_decoder:
        changed["decoder_lengths"] = (batch["labels"] != -100).sum(-1)
    return changed


# --- Work ------------------------------------------------------------------------------------------------------------


def flops(config: PreTrainedConfig, lengths: Sequence[Lengths], training: bool) -> int:
    """Floating-point operations on examples of these lengths; `recipes/benchmark.py` describes how they are counted."""
    forward = sum(WORK[type(config)](config, *sizes) for sizes in lengths)
    return 3 * forward if training else forward


def bert_work(config: Any, tokens: int) -> int:
    layers, width = config.num_hidden_layers, config.hidden_size
    weights = layers * (4 * width**2 + 2 * width * config.intermediate_size)
    return 2 * weights * tokens + 4 * layers * width * tokens**2


def llama_work(config: Any, tokens: int) -> int:
    layers, width = config.num_hidden_layers, config.hidden_size
    weights = layers * (4 * width**2 + 3 * width * config.intermediate_size) + width * config.vocab_size
    return 2 * weights * tokens + 4 * layers * width * tokens * (tokens + 1) // 2


def bart_work(config: Any, source: int, target: int) -> int:
    """The key and value weights of cross-attention, in the decoder, multiply tokens of the source."""
    width, encoders, decoders = config.d_model, config.encoder_layers, config.decoder_layers
    source_weights = encoders * (4 * width**2 + 2 * width * config.encoder_ffn_dim) + decoders * 2 * width**2
    target_weights = decoders * (6 * width**2 + 2 * width * config.decoder_ffn_dim) + width * config.vocab_size
    pairs = encoders * source**2 + decoders * (target * (target + 1) // 2 + source * target)
    return 2 * (source_weights * source + target_weights * target) + 4 * width * pairs


WORK: dict[type, Callable[..., int]] = {BertConfig: bert_work, LlamaConfig: llama_work, BartConfig: bart_work}
