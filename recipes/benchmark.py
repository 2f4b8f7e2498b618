"""
Times a DynMask model and the stock model that it equals, on the same examples.

    python recipes/benchmark.py

measures MiniLM in float32 and bfloat16. Other models, or a part of the table:

    python recipes/benchmark.py --shapes bert-base --dtypes float32 --lengths reviews --repeats 3
    python recipes/benchmark.py --shapes llama bart --dtypes float32 --batch_size 16

Methods to compute texts of different lengths, without dropout, forward and forward with backward:

    padded     the stock model on padded rows with an attention mask
    sorted     the same, after the examples were sorted by length, so that rows of a batch are alike
    dynmask    the DynMask model with the same weights, on the batches of `padded`, with lengths
    flat       the stock model with `attn_implementation="dynmask"`, on one row of all the tokens (not of an
               encoder-decoder)
    floor      the stock model without a mask on rows of one length, as many tokens in all: nothing is wasted here

one attention layer with a window at 8,192 tokens, against `scaled_dot_product_attention` with the mask as a matrix; and
steps of training on heavy-tailed lengths, in batches of a fixed number of examples against batches with a budget of
tokens, as many as the largest of the others holds.

The runs take turns, and a time is the median over the repeats. Work is counted in floating-point operations:
`2 * weights * tokens + 4 * layers * hidden_size * pairs` forward, three times that with backward (weights: of the
layers' matrices, and of a language model's output; pairs: of a token and one that it sees). The ideal speed-up is the
ratio of the work on padded rows to the work on real tokens.
"""

import copy
import ctypes
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
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

from cards import Results, describe_environment, table, write_json
from common import parse_arguments
from hf_dynmask import SequenceLayout, TokenBudgetBatchSampler, dynmask_attention, from_transformers, masks
from samples import resolve_dataset, resolve_model

Job = Callable[[], object]  # does some work; what it returns is freed after the clock has stopped
Batch = dict[str, Any]  # tensors, and the lengths of the longest sequences
Lengths = tuple[int, ...]  # of one example: its tokens, and of an encoder-decoder those of its target


class Shape(NamedTuple):
    """A stock model of a certain size, and the distributions of lengths that it is measured on."""

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
MASK = "causal & window(255, 0)"
MASK_HEADS, MASK_HEAD_DIM = 12, 32
MASK_TOKENS = 8192
MASK_MEMORY_TOKENS = (2048, 4096, 8192, 16384)
BUDGET_LENGTHS = "heavy-tailed"
BUDGET_BATCHES = 8


# --- Lengths ---------------------------------------------------------------------------------------------------------


def token_counts(texts: list[str]) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("sample:minilm"))
    return [len(input_ids) for input_ids in tokenizer(texts)["input_ids"]]


def review_lengths(count: int) -> list[Lengths]:
    """Of the first sample reviews, which stand in random order already."""
    return [(length,) for length in token_counts(resolve_dataset("sample:reviews")["train"]["text"][:count])]


def section_lengths(count: int) -> list[Lengths]:
    """Of random sections of WikiText-2, cut off at 512."""
    texts = resolve_dataset("sample:wikitext")["train"].shuffle(seed=0)["text"][:count]
    return [(min(length, 512),) for length in token_counts(texts)]


def pair_lengths(count: int) -> list[Lengths]:
    """Of random English sentences and their translations into Spanish."""
    pairs = resolve_dataset("sample:sentences")["train"].shuffle(seed=0)[:count]
    return list(zip(token_counts(pairs["source"]), token_counts(pairs["target"]), strict=True))


def uniform_lengths(count: int) -> list[Lengths]:
    return [(length,) for length in torch.randint(8, 257, (count,)).tolist()]


def heavy_tailed_lengths(count: int) -> list[Lengths]:
    """A Pareto distribution from 16 on, of index 1, cut off at 512."""
    return [(length,) for length in (16 / torch.rand(count)).clamp(max=512).long().tolist()]


def equal_lengths(count: int) -> list[Lengths]:
    return [(64,)] * count


LENGTHS = {
    "reviews": review_lengths,
    "sections": section_lengths,
    "pairs": pair_lengths,
    "uniform": uniform_lengths,
    "heavy-tailed": heavy_tailed_lengths,
    "equal": equal_lengths,
}


@dataclass
class BenchmarkArguments:
    shapes: list[str] = field(
        default_factory=lambda: ["minilm"], metadata={"help": "Sizes of the models.", "choices": list(SHAPES)}
    )
    dtypes: list[str] = field(
        default_factory=lambda: ["float32", "bfloat16"],
        metadata={"help": "Of weights and activations.", "choices": ["float32", "bfloat16"]},
    )
    lengths: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Of the sample reviews, uniform from 8 to 256, heavy-tailed from 16 to 512, all 64; of a language "
            "model sections of WikiText-2; of an encoder-decoder pairs of sentences. None: all that fit the shape.",
            "choices": list(LENGTHS),
        },
    )
    batch_size: int = field(default=32, metadata={"help": "Sequences in a batch."})
    batches: int = field(default=2, metadata={"help": "Batches in a run."})
    repeats: int = field(default=3, metadata={"help": "Timed runs, after one that warms up."})
    output: str = field(default="outputs/benchmark.json", metadata={"help": "Where to write the results."})


def main(arguments: list[str] | None = None) -> None:
    (options,) = parse_arguments([BenchmarkArguments], arguments)
    for shape in options.shapes:
        check_lengths(shape, options.lengths)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results = {
        "environment": describe_environment(device),
        "options": asdict(options),
        "models": list(benchmark_models(options, device)),
        "mask": [
            benchmark_mask(dtype, name, options.repeats, device)
            for dtype in tqdm(options.dtypes, desc=MASK)
            for name in PASSES
        ],
        "budget": [
            benchmark_budget(shape, dtype, options, device)
            for shape in options.shapes
            if BUDGET_LENGTHS in (options.lengths or SHAPES[shape].lengths)
            for dtype in tqdm(options.dtypes, desc="token budget")
        ],
    }
    write_json(Path(options.output), results)
    print(report(results))


def check_lengths(shape: str, lengths: list[str]) -> None:
    known = SHAPES[shape].lengths
    if unknown := [name for name in lengths if name not in known]:
        raise ValueError(f"`lengths` of {shape!r} must be of {', '.join(known)}; got {', '.join(unknown)}")


# --- Models ----------------------------------------------------------------------------------------------------------


def benchmark_models(options: BenchmarkArguments, device: torch.device) -> Iterable[Results]:
    """The figures of every shape, dtype, distribution of lengths and pass."""
    for shape in options.shapes:
        for dtype in options.dtypes:
            stock, ours = make_models(shape, dtype, device)
            models = {"padded": stock, "sorted": stock, "dynmask": ours, "floor": stock}
            if not stock.config.is_encoder_decoder:
                models["flat"] = copy.deepcopy(stock)
                models["flat"].set_attn_implementation("dynmask")
            for name in tqdm(options.lengths or SHAPES[shape].lengths, desc=f"{shape} {dtype}"):
                torch.manual_seed(0)
                lengths = LENGTHS[name](options.batch_size * options.batches)
                batches = make_batches(lengths, options.batch_size, stock.config, device)
                for pass_name in PASSES:
                    figures = benchmark_model(models, batches, PASSES[pass_name], options.repeats, device)
                    yield {"shape": shape, "dtype": dtype, "lengths": name, "pass": pass_name} | figures


def make_models(shape: str, dtype: str, device: torch.device) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The stock model with random weights, and the DynMask model with the same."""
    torch.manual_seed(0)
    config = SHAPES[shape].config(**SHAPES[shape].sizes)
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    with device:
        stock = SHAPES[shape].auto_class.from_config(config, dtype=getattr(torch, dtype))
    return stock, from_transformers(stock)


def make_batches(
    lengths: Sequence[Lengths], batch_size: int, config: PreTrainedConfig, device: torch.device
) -> dict[str, list[Batch]]:
    """Batches of examples with these lengths for each method."""
    examples = [_example(of_one, config) for of_one in lengths]
    groups = _groups(examples, batch_size)
    padded = [_padded(group) for group in groups]
    by_length = sorted(examples, key=lambda example: len(example["input_ids"]))
    batches = {
        "padded": padded,
        "sorted": [_padded(group) for group in _groups(by_length, batch_size)],
        "dynmask": [_with_lengths(batch, config) for batch in padded],
        "floor": [_equal_rows(group, config) for group in _groups(lengths, batch_size)],
    }
    if not config.is_encoder_decoder:
        batches["flat"] = [_flat(group) for group in _groups(examples, batch_size)]
    return {method: [_on(batch, device) for batch in batches[method]] for method in batches}


def _on(batch: Batch, device: torch.device) -> Batch:
    return {name: values.to(device) if isinstance(values, Tensor) else values for name, values in batch.items()}


def _example(lengths: Lengths, config: PreTrainedConfig) -> Batch:
    """Random tokens, and labels: the target, the tokens themselves, or one of two classes for each."""
    input_ids, *target = (torch.randint(1, config.vocab_size, (length,)) for length in lengths)
    if not target:
        target = [input_ids if isinstance(config, LlamaConfig) else input_ids % 2]
    return {"input_ids": input_ids, "labels": target[0]}


def _groups(examples: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [examples[start : start + size] for start in range(0, len(examples), size)]


def _padded(examples: Sequence[Batch]) -> Batch:
    input_ids, labels = ([example[name] for example in examples] for name in ("input_ids", "labels"))
    return {
        "input_ids": pad_sequence(input_ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(ids) for ids in input_ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
    }


def _flat(examples: Sequence[Batch]) -> Batch:
    """The batch that [`~transformers.DataCollatorWithFlattening`] makes."""
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    return collate([{name: values.tolist() for name, values in example.items()} for example in examples])


def _with_lengths(batch: Batch, config: PreTrainedConfig) -> Batch:
    """The same with lengths in place of the mask."""
    with_lengths = {name: values for name, values in batch.items() if name != "attention_mask"}
    with_lengths["lengths"] = batch["attention_mask"].sum(-1)
    if config.is_encoder_decoder:
        with_lengths["decoder_lengths"] = (batch["labels"] != -100).sum(-1)
    return with_lengths


def _equal_rows(lengths: Sequence[Lengths], config: PreTrainedConfig) -> Batch:
    """As many rows, all of the mean lengths."""
    rows = len(lengths)
    mean = tuple(round(sum(side) / rows) for side in zip(*lengths, strict=True))
    batch = _padded([_example(mean, config) for _ in range(rows)])
    return {name: values for name, values in batch.items() if name != "attention_mask"}


def benchmark_model(
    models: Mapping[str, PreTrainedModel],
    batches: Mapping[str, list[Batch]],
    training: bool,
    repeats: int,
    device: torch.device,
) -> Results:
    """Time and memory of each method, and the ratios between them."""
    jobs = {
        method: [partial(run_model, models[method], batch, training) for batch in batches[method]] for method in batches
    }
    seconds = time_in_turns(jobs, repeats, device)
    config = models["padded"].config
    lengths = {method: computed_lengths(batches[method], config) for method in batches}
    work = {method: flops(config, lengths[method], training) for method in lengths}
    computed = {method: sum(map(sum, lengths[method])) for method in lengths}
    tokens = {method: computed["floor" if method == "floor" else "dynmask"] for method in lengths}
    speedup, ideal = seconds["padded"] / seconds["dynmask"], work["padded"] / work["dynmask"]
    return {
        "padding_share": 1 - computed["dynmask"] / computed["padded"],
        "seconds": seconds,
        "real_tokens_per_second": {method: tokens[method] / seconds[method] for method in seconds},
        "peak_mib": {method: peak_memory(jobs[method], device) for method in jobs},
        "speedup": speedup,
        "ideal_speedup": ideal,
        "share_of_ideal": speedup / ideal,
        "share_of_floor_rate": work["dynmask"] / seconds["dynmask"] / (work["floor"] / seconds["floor"]),
        "speedup_over_sorted": seconds["sorted"] / seconds["dynmask"],
        "flat_over_dynmask": seconds["dynmask"] / seconds["flat"] if "flat" in seconds else None,
    }


def run_model(model: PreTrainedModel, batch: Batch, training: bool) -> Any:
    """The outputs of a forward pass, or the gradients of a forward and backward pass."""
    model.train(training)
    with torch.set_grad_enabled(training):
        outputs = model(**batch)
    return torch.autograd.grad(outputs.loss, list(model.parameters())) if training else outputs


def computed_lengths(batches: Iterable[Batch], config: PreTrainedConfig) -> list[Lengths]:
    """Tokens that are computed for each example: its own, or the width of its row where there are no lengths."""
    lengths: list[Lengths] = []
    for batch in batches:
        sides = [_side(batch, "input_ids", "lengths")]
        if config.is_encoder_decoder:
            sides.append(_side(batch, "labels", "decoder_lengths"))
        lengths += zip(*sides, strict=True)
    return lengths


def _side(batch: Batch, tokens: str, lengths: str) -> list[int]:
    rows, width = batch[tokens].shape
    if "cu_seq_lens_q" in batch:
        return batch["cu_seq_lens_q"].diff().tolist()
    return batch[lengths].tolist() if lengths in batch else [width] * rows


def flops(config: PreTrainedConfig, lengths: Sequence[Lengths], training: bool) -> int:
    """Floating-point operations on examples of these lengths, as the head of this file counts them."""
    forward = sum(WORK[type(config)](config, *of_one) for of_one in lengths)
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
    """The keys and values of cross-attention are work on tokens of the source, by weights of the decoder."""
    width, encoders, decoders = config.d_model, config.encoder_layers, config.decoder_layers
    of_source = encoders * (4 * width**2 + 2 * width * config.encoder_ffn_dim) + decoders * 2 * width**2
    of_target = decoders * (6 * width**2 + 2 * width * config.decoder_ffn_dim) + width * config.vocab_size
    pairs = encoders * source**2 + decoders * (target * (target + 1) // 2 + source * target)
    return 2 * (of_source * source + of_target * target) + 4 * width * pairs


WORK: dict[type, Callable[..., int]] = {BertConfig: bert_work, LlamaConfig: llama_work, BartConfig: bart_work}


# --- One attention layer ---------------------------------------------------------------------------------------------


def benchmark_mask(dtype: str, pass_name: str, repeats: int, device: torch.device) -> Results:
    """Time and memory of attention with [`MASK`], and how the memory grows with the number of tokens.

    The plan of the mask is made anew in each run; the matrix for `scaled_dot_product_attention` is there beforehand.
    """
    training = PASSES[pass_name]
    expression = masks.parse(MASK)
    allowed = expression.dense(torch.tensor([MASK_TOKENS], device=device))

    def matrix(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return scaled_dot_product_attention(query, key, value, attn_mask=allowed)

    def dynmask(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        layout = SequenceLayout.from_lengths(torch.tensor([query.shape[2]], device=device))
        return dynmask_attention(query, key, value, expression, layout)

    def job(attend: Callable[..., Tensor], tokens: int) -> Job:
        generator = torch.Generator(device).manual_seed(0)
        shape = (1, MASK_HEADS, tokens, MASK_HEAD_DIM)
        states = [
            torch.randn(shape, generator=generator, dtype=getattr(torch, dtype), device=device, requires_grad=training)
            for _ in range(3)
        ]
        return partial(run_attention, attend, states)

    jobs = {"matrix": [job(matrix, MASK_TOKENS)], "dynmask": [job(dynmask, MASK_TOKENS)]}
    seconds = time_in_turns(jobs, repeats, device)
    return {
        "dtype": dtype,
        "pass": pass_name,
        "seconds": seconds,
        "speedup": seconds["matrix"] / seconds["dynmask"],
        "matrix_mib": peak_memory(jobs["matrix"], device),
        "dynmask_mib": {str(tokens): peak_memory([job(dynmask, tokens)], device) for tokens in MASK_MEMORY_TOKENS},
    }


def run_attention(attend: Callable[..., Tensor], states: Sequence[Tensor]) -> object:
    output = attend(*states)
    return torch.autograd.grad(output, states, torch.ones_like(output)) if output.requires_grad else output


# --- Batches by a budget of tokens -----------------------------------------------------------------------------------


def benchmark_budget(shape: str, dtype: str, options: BenchmarkArguments, device: torch.device) -> Results:
    """Time and memory of an epoch of training steps, the optimizer's among them, on both kinds of batches."""
    _, model = make_models(shape, dtype, device)
    lengths = LENGTHS[BUDGET_LENGTHS](options.batch_size * BUDGET_BATCHES)
    tokens = [sum(of_one) for of_one in lengths]
    fixed = _groups(range(len(lengths)), options.batch_size)
    max_tokens = max(sum(tokens[k] for k in batch) for batch in fixed)
    methods = {"fixed": fixed, "budget": list(TokenBudgetBatchSampler(tokens, max_tokens))}
    examples = [_example(of_one, model.config) for of_one in lengths]
    batches = {
        method: [
            _on(_with_lengths(_padded([examples[k] for k in batch]), model.config), device) for batch in methods[method]
        ]
        for method in methods
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    jobs = {method: [partial(train_epoch, model, optimizer, batches[method])] for method in methods}
    seconds = time_in_turns(jobs, options.repeats, device)
    return {
        "shape": shape,
        "dtype": dtype,
        "examples": len(lengths),
        "max_tokens": max_tokens,
        "steps": {method: len(batches[method]) for method in methods},
        "seconds": seconds,
        "real_tokens_per_second": {method: sum(tokens) / seconds[method] for method in methods},
        "peak_mib": {method: peak_memory(jobs[method], device) for method in methods},
        "speedup": seconds["fixed"] / seconds["budget"],
    }


def train_epoch(model: PreTrainedModel, optimizer: torch.optim.Optimizer, batches: Iterable[Batch]) -> None:
    model.train()
    for batch in batches:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


# --- Measuring -------------------------------------------------------------------------------------------------------


def time_in_turns(jobs: Mapping[str, Sequence[Job]], repeats: int, device: torch.device) -> dict[str, float]:
    """Seconds of each method for all its jobs: the sum of each job's median over the repeats.

    The methods take turns job by job, so that whatever else slows the machine down meets all of them.
    """
    timed = {method: [(job, []) for job in jobs[method]] for method in jobs}
    for _ in range(1 + repeats):  # the first round warms up
        for turn in zip(*timed.values(), strict=True):
            for job, times in turn:
                times.append(_seconds(job, device))
    return {method: sum(median(times[1:]) for _, times in timed[method]) for method in timed}


def _seconds(job: Job, device: torch.device) -> float:
    _synchronize(device)
    start = time.perf_counter()
    result = job()
    _synchronize(device)
    stop = time.perf_counter()
    del result
    return stop - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(jobs: Iterable[Job], device: torch.device) -> float | None:
    """MiB that jobs need at their peak beyond what is in use before them; `None` where the system does not tell."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before, peak = torch.cuda.memory_allocated(device), partial(torch.cuda.max_memory_allocated, device)
    elif sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # hands freed memory back, so that it counts again
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak to what is resident now
        before, peak = _peak_resident(), _peak_resident
    else:
        return None
    for job in jobs:
        job()
    return (peak() - before) / 2**20


def _peak_resident() -> int:
    """Bytes of the largest resident set of this process, `VmHWM` in proc(5), which gives KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


# --- The report ------------------------------------------------------------------------------------------------------


def report(results: Results) -> str:
    """The figures as tables in Markdown, headed by what they were measured on."""
    environment = ", ".join(f"{name} {value}" for name, value in results["environment"].items())
    tables = [*_model_tables(results["models"]), _mask_table(results["mask"])]
    if results["budget"]:
        tables.append(_budget_table(results["budget"]))
    return "\n\n".join([environment, *tables])


def _model_tables(records: list[Results]) -> list[str]:
    keys = ["shape", "dtype", "lengths", "pass"]
    names = [[record[key] for key in keys] for record in records]
    methods = max((list(record["seconds"]) for record in records), key=len)
    speeds = [
        [_cell(record["real_tokens_per_second"].get(method), ",.0f") for method in methods]
        + [_cell(record["peak_mib"].get(method), ",.0f") for method in methods]
        for record in records
    ]
    ratios = [
        [
            f"{record['padding_share']:.1%}",
            f"{record['speedup']:.2f}",
            f"{record['ideal_speedup']:.2f}",
            f"{record['share_of_ideal']:.3f}",
            f"{record['share_of_floor_rate']:.3f}",
            f"{record['speedup_over_sorted']:.2f}",
            _cell(record["flat_over_dynmask"], ".3f"),
        ]
        for record in records
    ]
    speed_header = [f"{method} tokens/s" for method in methods] + [f"{method} MiB" for method in methods]
    ratio_header = ["padding", "speed-up", "ideal", "share of ideal", "share of floor's rate", "speed-up over sorted"]
    ratio_header.append("flat / dynmask")
    return [
        table(keys + header, [name + row for name, row in zip(names, rows, strict=True)], names=len(keys))
        for header, rows in ((speed_header, speeds), (ratio_header, ratios))
    ]


def _mask_table(records: list[Results]) -> str:
    tokens = list(records[0]["dynmask_mib"])
    times = [f"matrix ms at {MASK_TOKENS}", f"dynmask ms at {MASK_TOKENS}", "speed-up", f"matrix MiB at {MASK_TOKENS}"]
    rows = [
        [
            MASK,
            record["dtype"],
            record["pass"],
            f"{1000 * record['seconds']['matrix']:,.1f}",
            f"{1000 * record['seconds']['dynmask']:,.1f}",
            f"{record['speedup']:.1f}",
            _cell(record["matrix_mib"], ",.0f"),
            *(_cell(record["dynmask_mib"][count], ",.0f") for count in tokens),
        ]
        for record in records
    ]
    return table(["mask", "dtype", "pass", *times, *(f"dynmask MiB at {count}" for count in tokens)], rows, names=3)


def _budget_table(records: list[Results]) -> str:
    rows = [
        [record["shape"], record["dtype"], f"{record['max_tokens']:,}"]
        + [f"{record['steps'][method]}" for method in ("fixed", "budget")]
        + [f"{record['real_tokens_per_second'][method]:,.0f}" for method in ("fixed", "budget")]
        + [_cell(record["peak_mib"][method], ",.0f") for method in ("fixed", "budget")]
        + [f"{record['speedup']:.2f}"]
        for record in records
    ]
    header = [f"{method} {what}" for what in ("steps", "tokens/s", "MiB") for method in ("fixed", "budget")]
    return table(["shape", "dtype", "largest batch", *header, "speed-up"], rows, names=2)


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


if __name__ == "__main__":
    main()
