"""
Times a DynMask model and its stock equivalent on the same examples.

    python recipes/benchmark.py

measures MiniLM in float32 and bfloat16. For other models, or only a part of the table:

    python recipes/benchmark.py --shapes bert-base --dtypes float32 --lengths reviews --repeats 3
    python recipes/benchmark.py --shapes llama bart --dtypes float32 --batch_size 16

There are three measurements. The first times these methods for texts of different lengths, without dropout, forward
alone and forward plus backward:

    padded     the stock model on padded rows with an attention mask
    sorted     the same on examples sorted by length, so that the rows of a batch have similar lengths
    dynmask    the DynMask model with the same weights, on the batches of `padded`, with lengths
    unpadded   the stock model with `attn_implementation="dynmask"`, on the batches of `padded`
    flat       the same on one row of all tokens (not for an encoder-decoder)
    floor      the stock model without a mask on rows of equal length with the same total of tokens: no padding at all

The second times one attention layer with a window over 8,192 tokens, against `scaled_dot_product_attention` with a
dense mask. The third times training steps on heavy-tailed lengths: batches with a fixed number of examples, against
batches with a token budget. The budget is the number of tokens in the largest of the batches of fixed size.

The methods alternate, and the time of each is the median over the repeats. Work is counted in floating-point
operations: `2 * weights * tokens + 4 * layers * hidden_size * pairs` for forward, and three times that with backward.
Weights are those of the layers' matrices and of a language model's output. Pairs are a query and a key that it sees.
The ideal speed-up is the work on padded rows, divided by the work on real tokens.

On a CUDA device, the script times training steps of larger models in bfloat16 instead; see
`recipes/support/training_steps.py`. Each result is printed at once. The exit code is 1 if a method failed:

    python recipes/benchmark.py --quick --repeats 5 --output outputs/gpu.json  # the most important, in five minutes
"""

import support.threads  # noqa: F401

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from tqdm import tqdm
from transformers import PreTrainedConfig, PreTrainedModel

from hf_dynmask import SequenceLayout, TokenBudgetBatchSampler, dynmask_attention, masks
from support import training_steps
from support.cards import Results, describe_environment, table, write_json
from support.common import parse_arguments
from support.timing import Job, peak_memory, time_in_turns
from support.workloads import (
    LENGTHS,
    PASSES,
    SHAPES,
    Batch,
    Lengths,
    flatten,
    flops,
    make_example,
    make_groups,
    make_models,
    pad,
    run_model,
    to_device,
    with_lengths,
)

MASK = "causal & window(255, 0)"
MASK_HEADS, MASK_HEAD_DIM = 12, 32
MASK_TOKENS = 8192
MASK_MEMORY_TOKENS = (2048, 4096, 8192, 16384)
# Labels and colours of the methods in the figure. The colours can be told apart with any colour vision.
BARS = {
    "padded": ("stock, padded", "#B0B5BA"),
    "dynmask": ("hf_dynmask, lengths", "#0067A5"),
    "unpadded": ("stock, one argument", "#E08A00"),
    "floor": ("no padding at all", "#333333"),
}
BUDGET_LENGTHS = "heavy-tailed"
BUDGET_BATCHES = 8


@dataclass
class BenchmarkArguments:
    shapes: list[str] = field(
        default_factory=lambda: ["minilm"], metadata={"help": "Sizes of the models.", "choices": list(SHAPES)}
    )
    dtypes: list[str] = field(
        default_factory=lambda: ["float32", "bfloat16"],
        metadata={"help": "Dtypes of weights and activations.", "choices": ["float32", "bfloat16"]},
    )
    lengths: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Lengths: of the sample reviews, uniform from 8 to 256, heavy-tailed from 16 to 512, or all 64. "
            "For a language model: of sections of WikiText-2. For an encoder-decoder: of pairs of sentences. "
            "For the shape tiny: 2 to 4. None: all that fit the shape.",
            "choices": list(LENGTHS),
        },
    )
    batch_size: int = field(default=32, metadata={"help": "Sequences per batch."})
    batches: int = field(default=2, metadata={"help": "Batches per run."})
    repeats: int = field(default=3, metadata={"help": "Timed runs, after one warm-up run."})
    quick: bool = field(default=False, metadata={"help": "On CUDA: time only the most important, in five minutes."})
    output: str = field(
        default="outputs/benchmark.json", metadata={"help": "Where to write the results, and a figure next to them."}
    )


def main(arguments: list[str] | None = None) -> None:
    (options,) = parse_arguments([BenchmarkArguments], arguments)
    for shape in options.shapes:
        check_lengths(shape, options.lengths)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        time_training_steps(options, device)
    else:
        time_models(options, device)


def time_training_steps(options: BenchmarkArguments, device: torch.device) -> None:
    """The measurements on a GPU."""
    environment = describe_environment(device)
    print(environment, flush=True)
    records, all_well = training_steps.run(options.quick, options.repeats, device, options.batches)
    write_json(Path(options.output), {"environment": environment, "options": asdict(options), "steps": records})
    if not all_well:
        raise SystemExit(1)


def time_models(options: BenchmarkArguments, device: torch.device) -> None:
    """The measurements on a CPU."""
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
    draw(results["models"]).savefig(Path(options.output).with_suffix(".png"), dpi=100)
    print(report(results))


def check_lengths(shape: str, lengths: list[str]) -> None:
    known = SHAPES[shape].lengths
    if unknown := [name for name in lengths if name not in known]:
        raise ValueError(f"`lengths` of {shape!r} must be of {', '.join(known)}; got {', '.join(unknown)}")


# --- Models ----------------------------------------------------------------------------------------------------------


def benchmark_models(options: BenchmarkArguments, device: torch.device) -> Iterable[Results]:
    """Measurements for every shape, dtype, distribution of lengths and pass."""
    for shape in options.shapes:
        for dtype in options.dtypes:
            stock, ours = make_models(shape, dtype, device)
            models = {"padded": stock, "sorted": stock, "dynmask": ours, "floor": stock}
            models["unpadded"] = models["flat"] = copy.deepcopy(stock)
            models["unpadded"].set_attn_implementation("dynmask")
            for name in tqdm(options.lengths or SHAPES[shape].lengths, desc=f"{shape} {dtype}"):
                torch.manual_seed(0)
                lengths = LENGTHS[name](options.batch_size * options.batches)
                batches = make_batches(lengths, options.batch_size, stock.config, device)
                for pass_name in PASSES:
                    figures = benchmark_model(models, batches, PASSES[pass_name], options.repeats, device)
                    yield {"shape": shape, "dtype": dtype, "lengths": name, "pass": pass_name} | figures


def make_batches(
    lengths: Sequence[Lengths], batch_size: int, config: PreTrainedConfig, device: torch.device
) -> dict[str, list[Batch]]:
    """Batches for each method, of examples with these lengths."""
    examples = [make_example(sizes, config) for sizes in lengths]
    groups = make_groups(examples, batch_size)
    padded = [pad(group) for group in groups]
    by_length = sorted(examples, key=lambda example: len(example["input_ids"]))
    batches = {
        "padded": padded,
        "sorted": [pad(group) for group in make_groups(by_length, batch_size)],
        "dynmask": [with_lengths(batch, config) for batch in padded],
        "floor": [_equal_rows(group, config) for group in make_groups(lengths, batch_size)],
        "unpadded": padded,
    }
    if not config.is_encoder_decoder:
        batches["flat"] = [flatten(group) for group in make_groups(examples, batch_size)]
    return {method: [to_device(batch, device) for batch in batches[method]] for method in batches}


def _equal_rows(lengths: Sequence[Lengths], config: PreTrainedConfig) -> Batch:
    """The same number of rows, all of the mean length."""
    rows = len(lengths)
    mean = tuple(round(sum(side) / rows) for side in zip(*lengths, strict=True))
    batch = pad([make_example(mean, config) for _ in range(rows)])
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
    lengths["unpadded"] = lengths["dynmask"]
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
        "unpadded_over_dynmask": seconds["dynmask"] / seconds["unpadded"],
        "flat_over_dynmask": seconds["dynmask"] / seconds["flat"] if "flat" in seconds else None,
    }


def computed_lengths(batches: Iterable[Batch], config: PreTrainedConfig) -> list[Lengths]:
    """The number of tokens that are computed for each example: its own, or without lengths the width of its row."""
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


# --- One attention layer ---------------------------------------------------------------------------------------------


def benchmark_mask(dtype: str, pass_name: str, repeats: int, device: torch.device) -> Results:
    """Time and memory of attention with [`MASK`], and how the memory grows with the number of tokens.

    The time includes making the plan of the mask, but not the dense mask for `scaled_dot_product_attention`.
    """
    training = PASSES[pass_name]
    expression = masks.parse(MASK)
    allowed = expression.dense(torch.tensor([MASK_TOKENS], device=device))

    def dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
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

    jobs = {"matrix": [job(dense, MASK_TOKENS)], "dynmask": [job(dynmask, MASK_TOKENS)]}
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


# --- Batches with a token budget -------------------------------------------------------------------------------------


def benchmark_budget(shape: str, dtype: str, options: BenchmarkArguments, device: torch.device) -> Results:
    """Time and memory of an epoch of training steps, optimizer included, on both kinds of batches."""
    _, model = make_models(shape, dtype, device)
    lengths = LENGTHS[BUDGET_LENGTHS](options.batch_size * BUDGET_BATCHES)
    tokens = [sum(sizes) for sizes in lengths]
    fixed = make_groups(range(len(lengths)), options.batch_size)
    max_tokens = max(sum(tokens[k] for k in batch) for batch in fixed)
    methods = {"fixed": fixed, "budget": list(TokenBudgetBatchSampler(tokens, max_tokens))}
    examples = [make_example(sizes, model.config) for sizes in lengths]
    batches = {
        method: [
            to_device(with_lengths(pad([examples[k] for k in batch]), model.config), device)
            for batch in methods[method]
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


# --- The report ------------------------------------------------------------------------------------------------------


def report(results: Results) -> str:
    """A Markdown report: the environment and the tables."""
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
            f"{record['unpadded_over_dynmask']:.3f}",
            _cell(record["flat_over_dynmask"], ".3f"),
        ]
        for record in records
    ]
    speed_header = [f"{method} tokens/s" for method in methods] + [f"{method} MiB" for method in methods]
    ratio_header = ["padding", "speed-up", "ideal", "share of ideal", "share of floor's rate", "speed-up over sorted"]
    ratio_header += ["unpadded / dynmask", "flat / dynmask"]
    return [
        table(keys + header, [name + row for name, row in zip(names, rows, strict=True)], names=len(keys))
        for header, rows in ((speed_header, speeds), (ratio_header, ratios))
    ]


def draw(records: list[Results]) -> Figure:
    """Bars of real tokens per second: a panel for each shape, dtype and pass, a group for each kind of lengths."""
    panels: dict[tuple[str, ...], list[Results]] = {}
    for record in records:
        panels.setdefault(tuple(record[key] for key in ("shape", "dtype", "pass")), []).append(record)
    figure = Figure(figsize=(9, 2.6 * len(panels)), layout="constrained")
    for axes, (title, group) in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels.items(), strict=True):
        methods = [method for method in BARS if method in group[0]["real_tokens_per_second"]]
        for place, method in enumerate(methods):
            rates = [record["real_tokens_per_second"][method] for record in group]
            label, colour = BARS[method]
            places = [k + (place - (len(methods) - 1) / 2) * 0.8 / len(methods) for k in range(len(group))]
            bars = axes.bar(places, rates, 0.8 / len(methods), label=label, color=colour)
            axes.bar_label(bars, [f"{rate:,.0f}" for rate in rates], fontsize=7)
        axes.set_xticks(range(len(group)), [record["lengths"] for record in group])
        axes.set_title(", ".join(title), fontsize=10)
        axes.set_ylabel("real tokens per second")
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(BARS), frameon=False)
    return figure


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
