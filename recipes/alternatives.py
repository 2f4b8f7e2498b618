"""
Compares different ways to handle padding, in one run, with the same weights and examples.

    python recipes/alternatives.py

measures a MiniLM-sized BERT on the lengths of film reviews and on heavy-tailed lengths. For a causal model and one kind
of lengths:

    python recipes/alternatives.py --shapes llama --lengths heavy-tailed --repeats 5

These methods run without dropout, in float32, on the CPU. Flash attention is missing, since it needs a GPU.

    padded                     the stock model on padded rows, as in a Trainer by default
    length-grouped             the stock model on batches of similar lengths, from
                               `train_sampling_strategy="group_by_length"`
    batch-rebalanced           the stock model on batches of similar lengths within an optimizer step (here: all
                               batches), from `train_sampling_strategy="batch_rebalance"`
    flattened                  the stock model on one row of all tokens, from `DataCollatorWithFlattening`
    flattened, mask by hand    the same with a mask `(1, 1, N, N)` that keeps sequences apart; only for BERT, which does
                               not derive such a mask from positions that restart, as Llama does
    nested tensors             `torch.nn.TransformerEncoder`, which drops padding only in inference; only for BERT
    packed, FlexAttention      the stock model, compiled, on rows of one size that a token budget fills, with a
                               `BlockMask`; needs a C++ compiler, takes some 10 seconds to compile for each row size,
                               and has no backward pass on CPUs
    hf_dynmask                 the DynMask model on the batches of `padded`, with lengths
    hf_dynmask, one argument   the stock model with `attn_implementation="dynmask"` on the batches of `padded`
    hf_dynmask, flattened      the stock model with `attn_implementation="dynmask"` on the rows of `flattened`
    hf_dynmask, token budget   the DynMask model on batches with a token budget, from `TokenBudgetBatchSampler`

Before timing, the logits of all real tokens are compared with those of `padded`, so that the table shows which methods
are exact. The methods alternate, and the time of each is the median over the repeats. It includes making masks, but not
making batches.
"""

import support.threads  # noqa: F401

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from tqdm import tqdm
from transformers import PreTrainedConfig
from transformers.modeling_outputs import TokenClassifierOutput
from transformers.trainer_pt_utils import BatchRebalanceSampler, LengthGroupedSampler

from hf_dynmask import TokenBudgetBatchSampler
from support.cards import Results, describe_environment, table, write_json
from support.common import IGNORED, parse_arguments
from support.timing import time_in_turns
from support.workloads import (
    LENGTHS,
    PASSES,
    Batch,
    flatten,
    make_example,
    make_groups,
    make_models,
    pad,
    run_model,
    with_lengths,
)

CPU = torch.device("cpu")
MEGABATCH = 50  # batches that `LengthGroupedSampler` sorts together if there are at least four times as many


@dataclass
class AlternativesArguments:
    shapes: list[str] = field(
        default_factory=lambda: ["minilm"],
        metadata={"help": "Sizes of the models.", "choices": ["minilm", "bert-base", "llama"]},
    )
    lengths: list[str] = field(
        default_factory=lambda: ["reviews", "heavy-tailed"],
        metadata={
            "help": "Lengths: of the sample reviews, or heavy-tailed from 16 to 512.",
            "choices": ["reviews", "heavy-tailed"],
        },
    )
    passes: list[str] = field(
        default_factory=lambda: list(PASSES), metadata={"help": "What is timed.", "choices": list(PASSES)}
    )
    batch_size: int = field(default=8, metadata={"help": "Sequences per batch; 8 is the Trainer's default."})
    batches: int = field(default=16, metadata={"help": f"Batches per run, at most {MEGABATCH}."})
    repeats: int = field(default=3, metadata={"help": "Timed runs, after one warm-up run."})
    output: str = field(default="outputs/alternatives.json", metadata={"help": "Where to write the results."})


class Contender(NamedTuple):
    """A method: a model, its batches, and the indices of the examples in each batch."""

    model: Any
    batches: list[Batch]
    groups: list[Sequence[int]]
    trains: bool


def main(arguments: list[str] | None = None) -> None:
    (options,) = parse_arguments([AlternativesArguments], arguments)
    if not 1 <= options.batches <= MEGABATCH:
        raise ValueError(f"`batches` must be from 1 to {MEGABATCH}; got {options.batches}")
    results = {
        "environment": describe_environment(CPU),
        "options": asdict(options),
        "comparisons": [compare(shape, name, options) for shape in options.shapes for name in tqdm(options.lengths)],
    }
    write_json(Path(options.output), results)
    print(report(results))


def compare(shape: str, name: str, options: AlternativesArguments) -> Results:
    """Exactness and speed of all contenders on examples of these lengths."""
    # Without a reset, FlexAttention would now compile for rows of any size, which fails on CPUs with torch 2.13.
    torch.compiler.reset()
    torch.manual_seed(0)
    lengths = typical_lengths(name, options.batch_size, options.batches)
    contenders = make_contenders(shape, lengths, options.batch_size)
    expected = logits_by_example(contenders["padded"], lengths)
    differences = {
        method: largest_difference(logits_by_example(contender, lengths), expected)
        for method, contender in contenders.items()
    }
    seconds = {
        pass_name: time_in_turns(
            {
                method: [partial(run_batches, contender, PASSES[pass_name])]
                for method, contender in contenders.items()
                if contender.trains or not PASSES[pass_name]
            },
            options.repeats,
            CPU,
        )
        for pass_name in options.passes
    }
    tokens = sum(lengths)
    return {
        "shape": shape,
        "lengths": name,
        "examples": len(lengths),
        "tokens": tokens,
        "logits_std": torch.cat(expected).std().item(),
        "padding_share": {method: padding_share(each.batches, tokens) for method, each in contenders.items()},
        "largest_difference": differences,
        "seconds": seconds,
        "real_tokens_per_second": {
            pass_name: {method: tokens / time for method, time in times.items()} for pass_name, times in seconds.items()
        },
    }


# --- Examples and batches --------------------------------------------------------------------------------------------


def typical_lengths(name: str, batch_size: int, batches: int) -> list[int]:
    """
    Lengths of examples that are typical of an epoch grouped by length.

    `LengthGroupedSampler` sorts 50 batches together. From these, `batches` are taken at regular intervals, and their
    lengths are returned batch by batch. With 16 batches, the padding is about that of the whole epoch, grouped as well
    as shuffled. The first 16 batches of a data set would be misleading, since so few examples cannot be grouped well.
    """
    lengths = [length for (length,) in LENGTHS[name](4 * MEGABATCH * batch_size)]
    order = list(LengthGroupedSampler(batch_size, lengths=lengths))
    megabatch = make_groups([lengths[k] for k in order], batch_size)[:MEGABATCH]
    step = MEGABATCH / batches
    return [length for k in range(batches) for length in megabatch[int((k + 0.5) * step)]]


def make_contenders(shape: str, lengths: Sequence[int], batch_size: int) -> dict[str, Contender]:
    """The contenders by name, on examples of these lengths. The lengths are grouped by batches of similar ones."""
    stock, ours = make_models(shape, "float32", CPU)
    # As the Trainer sets it. With a cache, sequences in a flat row of Llama see each other.
    stock.config.use_cache = ours.config.use_cache = False
    attention, flex = copy.deepcopy(stock), copy.deepcopy(stock)
    attention.set_attn_implementation("dynmask")
    flex.set_attn_implementation("flex_attention")
    examples = [make_example((length,), stock.config) for length in lengths]
    grouped = make_groups(range(len(lengths)), batch_size)
    shuffled = make_groups(torch.randperm(len(lengths)).tolist(), batch_size)
    max_tokens = max(sum(lengths[k] for k in group) for group in shuffled)
    budget = list(TokenBudgetBatchSampler(lengths, max_tokens))
    rebalanced = BatchRebalanceSampler(list(lengths), len(lengths), dp_size=1, grad_accum=len(shuffled))
    rows = partial(pad_with_lengths, config=stock.config)
    packed = partial(pack, size=max_tokens)

    def contender(model: Any, collate: Callable[..., Batch], groups: list[Any], trains: bool = True) -> Contender:
        return Contender(model, [collate([examples[k] for k in group]) for group in groups], groups, trains)

    contenders = {
        "padded": contender(stock, pad, shuffled),
        "length-grouped": contender(stock, pad, grouped),
        "batch-rebalanced": contender(stock, pad, list(rebalanced)),
        "flattened": contender(stock, flatten, shuffled),
    }
    if stock.config.model_type == "bert":
        contenders["flattened, mask by hand"] = contender(WithMask(stock, dense_mask), flatten, shuffled)
        contenders["nested tensors"] = contender(NestedBert(stock), pad, shuffled, trains=False)
        flex = WithMask(flex, block_mask)
    return contenders | {
        "packed, FlexAttention": contender(flex, packed, budget, trains=False),
        "hf_dynmask": contender(ours, rows, shuffled),
        "hf_dynmask, one argument": contender(attention, pad, shuffled),
        "hf_dynmask, flattened": contender(attention, flatten, shuffled),
        "hf_dynmask, token budget": contender(ours, rows, budget),
    }


def pad_with_lengths(examples: Sequence[Batch], config: PreTrainedConfig) -> Batch:
    return with_lengths(pad(examples), config)


def pack(examples: Sequence[Batch], size: int) -> Batch:
    """One row of this size. The unused places at its end become one more sequence."""
    left = size - sum(len(example["input_ids"]) for example in examples)
    filler = {"input_ids": torch.ones(left, dtype=torch.long), "labels": torch.full((left,), IGNORED)}
    return flatten([*examples, filler] if left else examples)


def padding_share(batches: Sequence[Batch], tokens: int) -> float:
    """Share of the places in the batches that hold no token of an example."""
    return 1 - tokens / sum(batch["input_ids"].numel() for batch in batches)


# --- Models ----------------------------------------------------------------------------------------------------------


class WithMask(nn.Module):
    """A model that gets, with each flat batch, a mask that keeps sequences apart, made from positions that restart."""

    def __init__(self, model: nn.Module, make_mask: Callable[[Tensor], Tensor | BlockMask]):
        super().__init__()
        self.model = model
        self.make_mask = make_mask

    def forward(self, position_ids: Tensor, **batch: Any) -> Any:
        return self.model(position_ids=position_ids, attention_mask=self.make_mask(position_ids), **batch)


def dense_mask(position_ids: Tensor) -> Tensor:
    """Whether two tokens belong to the same sequence, `(1, 1, N, N)`."""
    sequences = (position_ids == 0).cumsum(-1)
    return sequences[:, None, :, None] == sequences[:, None, None, :]


def block_mask(position_ids: Tensor) -> BlockMask:
    """The same mask in the form that FlexAttention takes."""
    sequences = (position_ids[0] == 0).cumsum(-1)

    def same_sequence(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return sequences[query] == sequences[key]

    return create_block_mask(same_sequence, None, None, len(sequences), len(sequences), device=str(sequences.device))


class NestedBert(nn.Module):
    """A [`~transformers.BertForTokenClassification`] whose layers run in [`torch.nn.TransformerEncoder`]. Without
    gradients, it converts padded tensors to nested ones."""

    def __init__(self, stock: Any):
        super().__init__()
        config = stock.config
        layer = nn.TransformerEncoderLayer(
            config.hidden_size,
            config.num_attention_heads,
            config.intermediate_size,
            dropout=0.0,
            activation=config.hidden_act,
            layer_norm_eps=config.layer_norm_eps,
            batch_first=True,
        )
        self.embeddings = stock.bert.embeddings
        self.encoder = nn.TransformerEncoder(layer, config.num_hidden_layers, enable_nested_tensor=True)
        self.classifier = stock.classifier
        for ours, theirs in zip(self.encoder.layers, stock.bert.encoder.layer, strict=True):
            ours.load_state_dict(_layer_weights(theirs))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> TokenClassifierOutput:
        states = self.encoder(self.embeddings(input_ids), src_key_padding_mask=attention_mask == 0)
        return TokenClassifierOutput(logits=self.classifier(states))


def _layer_weights(layer: Any) -> dict[str, Tensor]:
    """The weights of a BERT layer under the names of [`torch.nn.TransformerEncoderLayer`]."""
    attention = layer.attention
    projections = [attention.self.query, attention.self.key, attention.self.value]
    parts = {
        "self_attn.out_proj": attention.output.dense,
        "norm1": attention.output.LayerNorm,
        "linear1": layer.intermediate.dense,
        "linear2": layer.output.dense,
        "norm2": layer.output.LayerNorm,
    }
    return {f"{name}.{kind}": getattr(part, kind) for name, part in parts.items() for kind in ("weight", "bias")} | {
        f"self_attn.in_proj_{kind}": torch.cat([getattr(each, kind) for each in projections])
        for kind in ("weight", "bias")
    }


# --- Measuring -------------------------------------------------------------------------------------------------------


def run_batches(contender: Contender, training: bool) -> None:
    for batch in contender.batches:
        run_model(contender.model, batch, training)


def logits_by_example(contender: Contender, lengths: Sequence[int]) -> list[Tensor]:
    """Logits `(length, classes)` of the real tokens of each example."""
    found = {}
    for batch, group in zip(contender.batches, contender.groups, strict=True):
        logits = run_model(contender.model, batch, training=False).logits
        sizes = [lengths[k] for k in group]
        flat = len(logits) == 1
        rows = logits[0, : sum(sizes)].split(sizes) if flat else [row[:n] for row, n in zip(logits, sizes, strict=True)]
        found |= zip(group, rows, strict=True)
    return [found[k] for k in range(len(lengths))]


def largest_difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    return (torch.cat(list(found)) - torch.cat(list(expected))).abs().max().item()


# --- The report ------------------------------------------------------------------------------------------------------


def report(results: Results) -> str:
    """A Markdown report: the environment, and a table for each model and distribution of lengths."""
    environment = ", ".join(f"{name} {value}" for name, value in results["environment"].items())
    return "\n\n".join([environment, *(part for each in results["comparisons"] for part in _comparison(each))])


def _comparison(record: Results) -> list[str]:
    title = (
        f"{record['shape']}, {record['lengths']}: {record['examples']} examples, {record['tokens']:,} tokens; "
        f"standard deviation of the logits {record['logits_std']:.2f}"
    )
    rates = record["real_tokens_per_second"]
    rows = [
        [method, f"{record['padding_share'][method]:.0%}", f"{difference:.0e}"]
        + [cell for of_pass in rates.values() for cell in _speed(of_pass, method)]
        for method, difference in record["largest_difference"].items()
    ]
    speeds = [f"{pass_name}{what}" for pass_name in rates for what in (", tokens/s", ", speed-up")]
    return [title, table(["method", "padding in batches", "largest difference", *speeds], rows)]


def _speed(rates: dict[str, float], method: str) -> list[str]:
    return [f"{rates[method]:,.0f}", f"{rates[method] / rates['padded']:.2f}"] if method in rates else ["", ""]


if __name__ == "__main__":
    main()
