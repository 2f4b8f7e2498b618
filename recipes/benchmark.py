"""
Times a DynMask model and the stock model that it equals, on the same examples.

    python recipes/benchmark.py

measures MiniLM in float32 and bfloat16. A larger model, or a part of the table:

    python recipes/benchmark.py --shapes bert-base --dtypes float32 --lengths reviews --repeats 3

Four methods to compute texts of different lengths, without dropout, forward and forward with backward:

    padded     the stock model on padded rows with an attention mask
    sorted     the same, after the examples were sorted by length, so that rows of a batch are alike
    dynmask    the DynMask model with the same weights, on the batches of `padded`, with lengths
    floor      the stock model without a mask on rows of one length, as many tokens in all: nothing is wasted here

and one attention layer with a window at 8,192 tokens, against `scaled_dot_product_attention` with the mask as a matrix.

The runs take turns, and a time is the median over the repeats. Work is counted in floating-point operations:
`2 * weights * tokens + 4 * layers * hidden_size * pairs` forward, three times that with backward (weights: of the
layers' matrices; pairs: of a token and one that it sees). The ideal speed-up is the ratio of the work on padded rows to
the work on real tokens.
"""

import ctypes
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from common import Results, describe_environment, parse_arguments, table, write_json
from hf_dynmask import SequenceLayout, dynmask_attention, from_transformers, masks
from samples import resolve_dataset, resolve_model

Job = Callable[[], object]  # does some work; what it returns is freed after the clock has stopped
Batch = dict[str, Tensor]

SHAPES: dict[str, dict[str, Any]] = {
    "minilm": {"num_hidden_layers": 6, "hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536},
    "bert-base": {"num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072},
}
PASSES = {"forward": False, "forward+backward": True}
MASK = "causal & window(255, 0)"
MASK_HEADS, MASK_HEAD_DIM = 12, 32
MASK_TOKENS = 8192
MASK_MEMORY_TOKENS = (2048, 4096, 8192, 16384)


# --- Lengths ---------------------------------------------------------------------------------------------------------


def review_lengths(count: int) -> list[int]:
    """Of the first sample reviews, which stand in random order already."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("sample:minilm"))
    texts = resolve_dataset("sample:reviews")["train"]["text"][:count]
    return [len(input_ids) for input_ids in tokenizer(texts)["input_ids"]]


def uniform_lengths(count: int) -> list[int]:
    return torch.randint(8, 257, (count,)).tolist()


def heavy_tailed_lengths(count: int) -> list[int]:
    """A Pareto distribution from 16 on, of index 1, cut off at 512."""
    return (16 / torch.rand(count)).clamp(max=512).long().tolist()


def equal_lengths(count: int) -> list[int]:
    return [64] * count


LENGTHS = {
    "reviews": review_lengths,
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
        default_factory=lambda: list(LENGTHS),
        metadata={
            "help": "Of the sample reviews, uniform from 8 to 256, heavy-tailed from 16 to 512, all 64.",
            "choices": list(LENGTHS),
        },
    )
    batch_size: int = field(default=32, metadata={"help": "Sequences in a batch."})
    batches: int = field(default=2, metadata={"help": "Batches in a run."})
    repeats: int = field(default=3, metadata={"help": "Timed runs, after one that warms up."})
    output: str = field(default="outputs/benchmark.json", metadata={"help": "Where to write the results."})


def main(arguments: list[str] | None = None) -> None:
    (options,) = parse_arguments([BenchmarkArguments], arguments)
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
    }
    write_json(Path(options.output), results)
    print(report(results))


# --- Models ----------------------------------------------------------------------------------------------------------


def benchmark_models(options: BenchmarkArguments, device: torch.device) -> Iterable[Results]:
    """The figures of every shape, dtype, distribution of lengths and pass."""
    for shape in options.shapes:
        for dtype in options.dtypes:
            stock, ours = make_models(shape, dtype, device)
            models = {"padded": stock, "sorted": stock, "dynmask": ours, "floor": stock}
            for name in tqdm(options.lengths, desc=f"{shape} {dtype}"):
                torch.manual_seed(0)
                lengths = LENGTHS[name](options.batch_size * options.batches)
                batches = make_batches(lengths, options.batch_size, stock.config.vocab_size, device)
                for pass_name in PASSES:
                    figures = benchmark_model(models, batches, PASSES[pass_name], options.repeats, device)
                    yield {"shape": shape, "dtype": dtype, "lengths": name, "pass": pass_name} | figures


def make_models(shape: str, dtype: str, device: torch.device) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The stock model with random weights, and the DynMask model with the same."""
    torch.manual_seed(0)
    config = BertConfig(**SHAPES[shape], hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    with device:
        stock = AutoModelForSequenceClassification.from_config(config, dtype=getattr(torch, dtype))
    return stock, from_transformers(stock)


def make_batches(
    lengths: Sequence[int], batch_size: int, vocab_size: int, device: torch.device
) -> dict[str, list[Batch]]:
    """Batches of examples with these lengths for each method."""
    examples = [torch.randint(1, vocab_size, (length,)) for length in lengths]
    groups = _groups(examples, batch_size)
    padded = [_padded(group) for group in groups]
    batches = {
        "padded": padded,
        "sorted": [_padded(group) for group in _groups(sorted(examples, key=len), batch_size)],
        "dynmask": [_with_lengths(batch) for batch in padded],
        "floor": [_equal_rows(group, vocab_size) for group in groups],
    }
    return {
        method: [{name: values.to(device) for name, values in batch.items()} for batch in batches[method]]
        for method in batches
    }


def _groups(examples: list[Tensor], size: int) -> list[list[Tensor]]:
    return [examples[start : start + size] for start in range(0, len(examples), size)]


def _padded(examples: list[Tensor]) -> Batch:
    mask = pad_sequence([torch.ones_like(example) for example in examples], batch_first=True)
    return {
        "input_ids": pad_sequence(examples, batch_first=True),
        "attention_mask": mask,
        "labels": torch.zeros(len(examples), dtype=torch.long),
    }


def _with_lengths(batch: Batch) -> Batch:
    return {"input_ids": batch["input_ids"], "lengths": batch["attention_mask"].sum(-1), "labels": batch["labels"]}


def _equal_rows(examples: list[Tensor], vocab_size: int) -> Batch:
    """As many rows, all of the examples' mean length."""
    rows, tokens = len(examples), sum(map(len, examples))
    input_ids = torch.randint(1, vocab_size, (rows, round(tokens / rows)))
    return {"input_ids": input_ids, "labels": torch.zeros(rows, dtype=torch.long)}


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
    lengths = {method: computed_lengths(batches[method]) for method in batches}
    work = {method: flops(models["padded"].config, lengths[method], training) for method in lengths}
    tokens = {method: sum(lengths["floor" if method == "floor" else "dynmask"]) for method in lengths}
    speedup, ideal = seconds["padded"] / seconds["dynmask"], work["padded"] / work["dynmask"]
    return {
        "padding_share": 1 - tokens["dynmask"] / sum(lengths["padded"]),
        "seconds": seconds,
        "real_tokens_per_second": {method: tokens[method] / seconds[method] for method in seconds},
        "peak_mib": {method: peak_memory(jobs[method], device) for method in jobs},
        "speedup": speedup,
        "ideal_speedup": ideal,
        "share_of_ideal": speedup / ideal,
        "share_of_floor_rate": work["dynmask"] / seconds["dynmask"] / (work["floor"] / seconds["floor"]),
        "speedup_over_sorted": seconds["sorted"] / seconds["dynmask"],
    }


def run_model(model: PreTrainedModel, batch: Batch, training: bool) -> Any:
    """The outputs of a forward pass, or the gradients of a forward and backward pass."""
    model.train(training)
    with torch.set_grad_enabled(training):
        outputs = model(**batch)
    return torch.autograd.grad(outputs.loss, list(model.parameters())) if training else outputs


def computed_lengths(batches: Iterable[Batch]) -> list[int]:
    """Tokens that are computed for each example: its own, or the width of its row where there are no `lengths`."""
    lengths = []
    for batch in batches:
        rows, width = batch["input_ids"].shape
        lengths += batch["lengths"].tolist() if "lengths" in batch else [width] * rows
    return lengths


def flops(config: PreTrainedConfig, lengths: Sequence[int], training: bool) -> int:
    """Floating-point operations on sequences of these lengths, as the head of this file counts them."""
    layers, width = config.num_hidden_layers, config.hidden_size
    weights = layers * (4 * width**2 + 2 * width * config.intermediate_size)
    pairs = sum(length**2 for length in lengths)
    forward = 2 * weights * sum(lengths) + 4 * layers * width * pairs
    return 3 * forward if training else forward


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
    return "\n\n".join([environment, *_model_tables(results["models"]), _mask_table(results["mask"])])


def _model_tables(records: list[Results]) -> list[str]:
    keys = ["shape", "dtype", "lengths", "pass"]
    names = [[record[key] for key in keys] for record in records]
    methods = list(records[0]["seconds"])
    speeds = [
        [f"{record['real_tokens_per_second'][method]:,.0f}" for method in methods]
        + [_mib(record["peak_mib"][method]) for method in methods]
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
        ]
        for record in records
    ]
    speed_header = [f"{method} tokens/s" for method in methods] + [f"{method} MiB" for method in methods]
    ratio_header = ["padding", "speed-up", "ideal", "share of ideal", "share of floor's rate", "speed-up over sorted"]
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
            _mib(record["matrix_mib"]),
            *(_mib(record["dynmask_mib"][count]) for count in tokens),
        ]
        for record in records
    ]
    return table(["mask", "dtype", "pass", *times, *(f"dynmask MiB at {count}" for count in tokens)], rows, names=3)


def _mib(value: float | None) -> str:
    return "unknown" if value is None else f"{value:,.0f}"


if __name__ == "__main__":
    main()
