"""
Times training steps on a GPU: different ways to compute batches of texts of different lengths, each against the stock
model on padded rows.

Each way alternates with the stock model. A run is a forward and backward pass over several batches, whose gradients are
discarded. The time of a way is the median over its runs. Then some of the ways are timed again as steps of a Trainer
with fused AdamW. Batches come from a pool of texts that is large enough to group by length. Rates count real tokens and
the work that they need (see `recipes/benchmark.py`), so that ways with different batches can be compared.
"""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    BertConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_pt_utils import get_length_grouped_indices

from hf_dynmask import CapturedStepMixin, TokenBudgetBatchSampler, from_transformers
from hf_dynmask.training import CapturedStep
from support.cards import Results
from support.workloads import Batch, flatten, flops, make_example, make_groups, pad, to_device, with_lengths

POOL = 200  # batches in the pool of texts, so that `group_by_length` sorts 50 batches together
STARTED = time.monotonic()
QUICK_SECONDS = 240  # with `--quick`, no way begins after this time, so that a run takes about five minutes

# --- What is measured ------------------------------------------------------------------------------------------------


class Workload(NamedTuple):
    """A model, and batches of texts for it.

    Attributes:
        config (`PreTrainedConfig`): Configuration of the stock model.
        batch_size (`int`): Texts per batch.
        longest (`int`): Tokens of the longest text: the width of rows of a fixed size.
        draw (`Callable`): Takes a number of texts, and returns their lengths.
    """

    config: PreTrainedConfig
    batch_size: int
    longest: int
    draw: Callable[[int], Tensor]


def review_like(count: int) -> Tensor:
    """Lengths like those of the sentences of film reviews: 27 tokens on average."""
    return (torch.randn(count) * 0.55 + 3.15).exp().long().clamp(4, 120)


def up_to_512(count: int) -> Tensor:
    return torch.randint(8, 513, (count,))


def heavy_tailed(count: int) -> Tensor:
    """Lengths from a Pareto distribution with minimum 16 and index 1, at most 2,048."""
    return (16 / torch.rand(count)).clamp(max=2048).long()


LARGE: dict[str, Any] = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
LARGE |= {"intermediate_size": 4096}
LLAMA: dict[str, Any] = {"hidden_size": 1024, "num_hidden_layers": 16, "num_attention_heads": 16}
LLAMA |= {"num_key_value_heads": 4, "intermediate_size": 2816, "vocab_size": 32000, "pad_token_id": 0}
WORKLOADS = {
    "BERT-base, 32 short reviews": Workload(BertConfig(), 32, 120, review_like),
    "BERT-base, 32 texts of 8-512": Workload(BertConfig(), 32, 512, up_to_512),
    "BERT-large, 64 texts of 8-512": Workload(BertConfig(**LARGE), 64, 512, up_to_512),
    "Llama 16x1024, 16 texts up to 2,048": Workload(LlamaConfig(**LLAMA), 16, 2048, heavy_tailed),
}


class Way(NamedTuple):
    """A way to compute batches.

    Attributes:
        model (`str`): `"stock"`, `"our attention"` (a stock model with it) or `"ours"`.
        batches (`str`): The kind of batches, a key of [`make_batches`].
        compiled (`dict[str, Any]`, *optional*): Arguments of `torch.compile`. `None`: the model is not compiled.
        whole (`bool`): Whether the whole model is compiled instead of each layer.
        captured (`bool`): Whether the step is one CUDA graph.
    """

    model: str
    batches: str
    compiled: dict[str, Any] | None = None
    whole: bool = False
    captured: bool = False


STATIC: dict[str, Any] = {"dynamic": False}
BASELINE = "stock, padded"
WHOLE = "ours, fixed flat, compiled whole, captured"
WAYS = {
    BASELINE: Way("stock", "padded"),
    "stock, one width, compiled, captured": Way("stock", "one width", STATIC, captured=True),
    "ours, fixed flat": Way("ours", "fixed flat"),
    "ours, fixed flat, captured": Way("ours", "fixed flat", captured=True),
    "ours, fixed flat, compiled, captured": Way("ours", "fixed flat", STATIC, captured=True),
    "ours, rows": Way("ours", "rows"),
    "stock, our attention": Way("our attention", "padded"),
    "stock, our attention, flat": Way("our attention", "flat"),
    "stock, group_by_length": Way("stock", "group_by_length"),
    "stock, batch_rebalance": Way("stock", "batch_rebalance"),
    "floor: no padding": Way("stock", "equal rows"),
    "stock, padded, compiled": Way("stock", "padded", {"dynamic": True}),
    "stock, one width, captured": Way("stock", "one width", captured=True),
    WHOLE: Way("ours", "fixed flat", STATIC, whole=True, captured=True),
    "ours, fixed flat, reduce-overhead": Way("ours", "fixed flat", {"mode": "reduce-overhead", **STATIC}, whole=True),
}
SHORT = [BASELINE, "stock, one width, compiled, captured", "ours, fixed flat", "ours, fixed flat, captured"]
SHORT += ["ours, fixed flat, compiled, captured"]
IN_TRAINER = [BASELINE, "stock, one width, compiled, captured", "ours, fixed flat"]
IN_TRAINER += ["ours, fixed flat, captured", "ours, fixed flat, compiled, captured"]
SLOW = ["stock, padded, compiled", WHOLE, "ours, fixed flat, reduce-overhead"]  # ways that take long to compile


class Section(NamedTuple):
    """The ways that are timed on one workload: as forward and backward passes, or as steps of a Trainer."""

    workload: str
    dropout: float
    ways: list[str]
    in_trainer: bool = False


def sections(quick: bool) -> list[Section]:
    """All measurements, the most important first."""
    names = list(WORKLOADS)
    if not quick:
        in_turns = [Section(name, dropout, list(WAYS)) for dropout in (0.1, 0.0) for name in names]
        return in_turns + [Section(name, 0.1, IN_TRAINER, in_trainer=True) for name in names]
    *base, large = names[:3]
    most = [name for name in WAYS if name not in (*SLOW, "stock, one width, captured")]
    return [
        *(Section(name, 0.1, most) for name in (*base, large)),
        *(Section(name, 0.1, IN_TRAINER, in_trainer=True) for name in base),
        *(Section(name, 0.0, SHORT) for name in (*base, large)),
        Section(large, 0.1, IN_TRAINER, in_trainer=True),
        *(Section(name, 0.1, [BASELINE, *SLOW]) for name in base),
    ]


# --- Batches ---------------------------------------------------------------------------------------------------------


Batches = dict[str, Callable[[], tuple[list[Batch], list[int]]]]  # by kind; makes batches and their texts' lengths


def make_batches(workload: Workload, number: int) -> Batches:
    """For each kind of batches, a function that makes `number` of them, and the lengths of their texts. All kinds draw
    from the same pool of texts."""
    size, config = workload.batch_size, workload.config
    torch.manual_seed(0)
    pool: list[int] = workload.draw(POOL * size).tolist()
    drawn = make_groups(range(number * size), size)

    def of(groups: Sequence[Sequence[int]], collate: Callable[[list[Batch]], Batch]) -> tuple[list[Batch], list[int]]:
        torch.manual_seed(1)
        batches = [collate([make_example((pool[k],), config) for k in group]) for group in groups]
        return batches, [pool[k] for group in groups for k in group]

    def grouped() -> list[Sequence[int]]:
        order = get_length_grouped_indices(pool, size, generator=torch.Generator().manual_seed(0))
        groups = make_groups(order[: 50 * size], size)  # the first 50 batches, which are sorted together
        return [groups[(2 * k + 1) * len(groups) // (2 * number)] for k in range(number)]

    def rebalanced() -> list[list[int]]:
        from transformers.trainer_pt_utils import BatchRebalanceSampler  # missing in some releases

        return list(BatchRebalanceSampler(pool[: number * size], number * size, dp_size=1, grad_accum=number))

    def fixed_flat() -> tuple[list[Batch], list[int]]:
        places = -(-round(sum(pool) / len(pool) * size) // 64) * 64
        groups = list(TokenBudgetBatchSampler(pool, max(places, workload.longest)))[:number]
        sequences = max(map(len, groups))
        sizes = max(places, workload.longest), sequences, workload.longest
        return of(groups, lambda examples: _fixed(flat_row(examples, config), *sizes))

    def equal_rows() -> tuple[list[Batch], list[int]]:
        means = [round(sum(pool[k] for k in group) / size) for group in drawn]
        torch.manual_seed(1)
        batches = [pad([make_example((mean,), config) for _ in range(size)]) for mean in means]
        for batch in batches:
            del batch["attention_mask"]
        return batches, [mean for mean in means for _ in range(size)]

    return {
        "padded": lambda: of(drawn, pad),
        "one width": lambda: of(drawn, lambda examples: _wide(pad(examples), workload.longest)),
        "group_by_length": lambda: of(grouped(), pad),
        "batch_rebalance": lambda: of(rebalanced(), pad),
        "rows": lambda: of(drawn, lambda examples: with_lengths(pad(examples), config)),
        "flat": lambda: of(drawn, flatten),
        "fixed flat": fixed_flat,
        "equal rows": equal_rows,
    }


def flat_row(examples: Sequence[Batch], config: PreTrainedConfig) -> Batch:
    """The sequences end to end, with lengths. In a causal language model, the first token of each is not a target."""
    is_causal = isinstance(config, LlamaConfig)
    labels = [nn.functional.pad(each["labels"][is_causal:], (int(is_causal), 0), value=-100) for each in examples]
    return {
        "input_ids": torch.cat([each["input_ids"] for each in examples])[None],
        "lengths": torch.tensor([len(each["input_ids"]) for each in examples]),
        "labels": torch.cat(labels)[None],
    }


def _fixed(batch: Batch, places: int, sequences: int, longest: int) -> Batch:
    """Pads a flat row to a fixed number of places and sequences. The added ones are absent."""
    fixed: Batch = {
        name: nn.functional.pad(
            values,
            (0, (sequences if name == "lengths" else places) - values.shape[-1]),
            value=-100 if name == "labels" else 0,
        )
        for name, values in batch.items()
    }
    return fixed | {"max_length_q": longest}


def _wide(batch: Batch, width: int) -> Batch:
    rows = {name: (0, width - values.shape[-1]) for name, values in batch.items()}
    return {
        name: nn.functional.pad(values, rows[name], value=-100 if name == "labels" else 0)
        for name, values in batch.items()
    }


# --- Models and steps ------------------------------------------------------------------------------------------------


class Models:
    """Makes the models of one workload. All have the same weights, in bfloat16."""

    def __init__(self, config: PreTrainedConfig, dropout: float, device: torch.device):
        torch.manual_seed(0)
        config = copy.deepcopy(config)
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout"):
            if hasattr(config, name):
                setattr(config, name, dropout)
        auto_class = AutoModelForCausalLM if isinstance(config, LlamaConfig) else AutoModelForTokenClassification
        with device:
            self.stock = auto_class.from_config(config, dtype=torch.bfloat16).train()

    def make(self, way: Way) -> PreTrainedModel:
        """A new model for a way, with compiled layers if the way asks for it."""
        model = from_transformers(self.stock) if way.model == "ours" else copy.deepcopy(self.stock)
        if way.model == "our attention":
            model.set_attn_implementation("dynmask")
        if way.compiled is not None and not way.whole:
            for module in model.modules():
                for layer in module if isinstance(module, nn.ModuleList) else ():
                    layer.compile(**way.compiled)
        return model.train()


def make_pass(model: nn.Module, way: Way, batches: Sequence[Batch]) -> Callable[[], None]:
    """A function that runs a forward and backward pass over each batch."""
    runs = torch.compile(model, **(way.compiled or {})) if way.whole else model

    def step(batch: Batch) -> Tensor:
        loss = runs(**batch).loss
        loss.backward()
        return loss.detach()

    compute = CapturedStep(step, model.parameters()) if way.captured else step

    def run() -> None:
        for batch in batches:
            if way.whole and (way.compiled or {}).get("mode") == "reduce-overhead":
                torch.compiler.cudagraph_mark_step_begin()
            compute(batch)
            model.zero_grad()

    return run


# --- Measuring -------------------------------------------------------------------------------------------------------


@dataclass
class Measured:
    """The measurements of one way.

    Attributes:
        seconds (`float`): Time for all batches.
        tokens (`int`): Real tokens in the batches.
        work (`int`): Floating-point operations that these tokens need.
        peak_mib (`float`, *optional*): Peak memory, without the model's weights.
        baseline (`float`, *optional*): Real tokens per second of the baseline that the way alternated with.
    """

    seconds: float
    tokens: int
    work: int
    peak_mib: float | None
    baseline: float | None = None

    @property
    def rate(self) -> float:
        """Real tokens per second."""
        return self.tokens / self.seconds


class Clock:
    """Measures time and memory on a device."""

    def __init__(self, device: torch.device):
        self.device, self.is_cuda = device, device.type == "cuda"

    def seconds(self, job: Callable[[], object]) -> float:
        self.synchronize()
        start = time.perf_counter()
        job()
        self.synchronize()
        return time.perf_counter() - start

    def synchronize(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def peak_mib(self, job: Callable[[], object]) -> float | None:
        if not self.is_cuda:
            job()
            return None
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        job()
        return (torch.cuda.max_memory_allocated(self.device) - before) / 2**20

    def matrix_rate(self) -> float:
        """Floating-point operations per second of large matrix products in bfloat16."""
        size = 8192 if self.is_cuda else 256
        a, b = (torch.randn(size, size, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        return 2 * size**3 / median([self.seconds(lambda: a @ b) for _ in range(13)][3:])


def measure_in_turns(way: Way, models: Models, batches: Batches, repeats: int, clock: Clock) -> Measured:
    padded, lengths_of_padded = batches["padded"]()
    baseline = make_pass(models.stock, WAYS[BASELINE], [to_device(batch, clock.device) for batch in padded])
    given, lengths = batches[way.batches]()
    model = models.make(way)
    run = make_pass(model, way, [to_device(batch, clock.device) for batch in given])
    peak = clock.peak_mib(lambda: [run() for _ in range(3)])  # also compiles and captures
    turn = clock.seconds(baseline) + clock.seconds(run)
    times = [(clock.seconds(baseline), clock.seconds(run)) for _ in range(max(repeats, min(20, int(0.5 / turn))))]
    theirs, ours = (median(each) for each in zip(*times, strict=True))
    work = flops(models.stock.config, [(length,) for length in lengths], training=True)
    return Measured(ours, sum(lengths), work, peak, sum(lengths_of_padded) / theirs)


class _Timer(TrainerCallback):
    """Times all steps after the first ones."""

    def __init__(self, first: int, clock: Clock):
        self.first, self.clock, self.start, self.seconds = first, clock, 0.0, 0.0

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.first:
            self.clock.synchronize()
            self.start = time.perf_counter()

    def on_train_end(self, args, state, control, **kwargs):
        self.clock.synchronize()
        self.seconds = time.perf_counter() - self.start


class _Captured(CapturedStepMixin, Trainer):
    pass


def _only(batches: list[Batch]) -> Batch:
    (batch,) = batches
    return batch


def measure_in_trainer(way: Way, models: Models, batches: Batches, repeats: int, clock: Clock) -> Measured:
    """Times steps of a Trainer with its default settings, except that it does not synchronize on each loss."""
    given, lengths = batches[way.batches]()
    first, rounds = 3 * len(given), max(repeats, 10)
    dataset: Any = given * (3 + rounds)
    timer = _Timer(first, clock)
    with TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=first + rounds * len(given),
            per_device_train_batch_size=1,
            train_sampling_strategy="sequential",
            learning_rate=1e-5,
            optim="adamw_torch_fused",
            logging_nan_inf_filter=False,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            use_cpu=not clock.is_cuda,
            dataloader_pin_memory=clock.is_cuda,
        )
        trainer = (_Captured if way.captured else Trainer)(
            models.make(way), arguments, _only, train_dataset=dataset, callbacks=[timer]
        )
        trainer.remove_callback(PrinterCallback)
        peak = clock.peak_mib(trainer.train)
    work = flops(models.stock.config, [(length,) for length in lengths], training=True)
    return Measured(timer.seconds / rounds, sum(lengths), work, peak)


# --- The run ---------------------------------------------------------------------------------------------------------


def run(quick: bool, repeats: int, device: torch.device, number: int) -> tuple[list[Results], bool]:
    """
    Times everything and prints each result at once.

    Args:
        quick (`bool`): Whether to time only the most important ways, in five minutes.
        repeats (`int`): Timed runs; short runs are repeated more often.
        device (`torch.device`): A CUDA device. On a CPU, captured ways are skipped.
        number (`int`): Batches per run.

    Returns:
        `tuple[list[dict[str, Any]], bool]`: One record per way, and whether all ways succeeded.
    """
    clock = Clock(device)
    peak = clock.matrix_rate()
    print(f"matrix products in bfloat16: {peak / 1e12:,.1f} TFLOP/s", flush=True)
    records: list[Results] = []
    for section in sections(quick):
        where = "in a Trainer, fused AdamW" if section.in_trainer else "forward and backward"
        print(f"\n{section.workload}, dropout {section.dropout}, {where}", flush=True)
        baseline = None
        for name, found in _measure(section, repeats, number, clock, quick):
            record = {"workload": section.workload, "dropout": section.dropout, "where": where, "way": name}
            if isinstance(found, str):
                line, record["error"] = found, found
            else:
                baseline = found.rate if name == BASELINE else baseline
                figures = _figures(found, found.baseline or baseline, peak)
                line = _line(figures)
                record |= figures
            print(f"  {name:43} {line}", flush=True)
            records.append(record)
    return records, not any(record.get("error", "").startswith("FAILED") for record in records)


def _figures(found: Measured, baseline: float | None, peak: float) -> Results:
    return {
        "seconds": found.seconds,
        "real_tokens_per_second": found.rate,
        "speedup": found.rate / baseline if baseline else None,
        "flops_per_second": found.work / found.seconds,
        "share_of_matrix_rate": found.work / found.seconds / peak,
        "peak_mib": found.peak_mib,
    }


def _line(figures: Results) -> str:
    forms = {
        "real_tokens_per_second": "{:12,.0f} tokens/s",
        "speedup": "{:6.2f}x",
        "flops_per_second": "{:10.3g} FLOP/s",
        "share_of_matrix_rate": "{:6.1%}",
        "peak_mib": "{:9,.0f} MiB",
    }
    return " ".join(form.format(figures[name]) for name, form in forms.items() if figures[name] is not None)


def _measure(
    section: Section, repeats: int, number: int, clock: Clock, quick: bool
) -> Iterator[tuple[str, Measured | str]]:
    """The measurements of each way in a section, or the reason why there are none."""
    workload = WORKLOADS[section.workload]
    models = Models(workload.config, section.dropout, clock.device)
    batches = make_batches(workload, number)
    for name in section.ways:
        way = WAYS[name]
        if way.captured and not clock.is_cuda:
            yield name, f"skipped: a step is captured on CUDA, not on {clock.device.type!r}"
            continue
        if quick and time.monotonic() - STARTED > QUICK_SECONDS:  # the last way may take a minute
            yield name, f"skipped: {QUICK_SECONDS} seconds are over"
            continue
        try:
            measure = measure_in_trainer if section.in_trainer else measure_in_turns
            yield name, measure(way, models, batches, repeats, clock)
        except Exception as error:  # if one way fails, the others are still timed
            message = " ".join(str(error).split())
            yield name, f"FAILED: {type(error).__name__}: {message[:300]}"
            if clock.is_cuda:  # a failed capture leaves the random number generator in a capturing state
                fresh = torch.Generator(clock.device).graphsafe_get_state()
                torch.cuda.default_generators[torch.cuda.current_device()].graphsafe_set_state(fresh)
        gc.collect()
        if clock.is_cuda:
            torch.cuda.empty_cache()
        torch.compiler.reset()
