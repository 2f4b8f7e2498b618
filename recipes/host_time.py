"""
Times what Python and the calls of operators cost, with a model so small that its arithmetic takes no time.

    python recipes/host_time.py

Small models and small batches wait for this, on a GPU most of all. One thread runs a BERT with 12 layers of width 16 on
sequences of 2 to 4 tokens, without dropout. The methods alternate, and times are medians over the repeats. Times and
numbers of operators are also given relative to those of the stock model on padded rows:

    padded            the stock model on padded rows with an attention mask
    unpadded          the stock model with `attn_implementation="dynmask"`, on the same batch
    flat              the same on one row of all tokens, from `DataCollatorWithFlattening`
    dynmask           the DynMask model on rows, with lengths
    dynmask, flat     the same on one row of all tokens
"""

import support.threads  # noqa: F401

import copy
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from support.cards import Results, describe_environment, table, write_json
from support.common import parse_arguments
from support.timing import Job, time_in_turns
from support.workloads import LENGTHS, PASSES, Batch, flatten, make_example, make_models, pad, run_model, with_lengths

CPU = torch.device("cpu")
SHAPE, EXAMPLES = "tiny", 4


@dataclass
class HostTimeArguments:
    repeats: int = field(default=100, metadata={"help": "Timed runs, after one warm-up run."})
    output: str = field(default="outputs/host_time.json", metadata={"help": "Where to write the results."})


def main(arguments: list[str] | None = None) -> None:
    (options,) = parse_arguments([HostTimeArguments], arguments)
    torch.set_num_threads(1)
    records = [measure(name, options.repeats) for name in PASSES]
    environment = describe_environment(CPU)
    write_json(Path(options.output), {"environment": environment, "options": asdict(options), "passes": records})
    print(report(records))


def measure(pass_name: str, repeats: int) -> Results:
    """Milliseconds and numbers of operators of each method."""
    jobs = {
        method: partial(run_model, model, batch, PASSES[pass_name]) for method, (model, batch) in make_methods().items()
    }
    seconds = time_in_turns({method: [job] for method, job in jobs.items()}, repeats, CPU)
    return {
        "pass": pass_name,
        "milliseconds": {method: 1e3 * seconds[method] for method in jobs},
        "operators": {method: count_operators(job) for method, job in jobs.items()},
    }


def make_methods() -> dict[str, tuple[PreTrainedModel, Batch]]:
    """The model and the batch of each method."""
    stock, ours = make_models(SHAPE, "float32", CPU)
    unpadded = copy.deepcopy(stock)
    unpadded.set_attn_implementation("dynmask")
    examples = [make_example(lengths, stock.config) for lengths in LENGTHS["tiny"](EXAMPLES)]
    rows, row = pad(examples), flatten(examples)
    own_rows = with_lengths(rows, stock.config)
    own_row = {"input_ids": row["input_ids"], "labels": row["labels"], "lengths": own_rows["lengths"]}
    return {
        "padded": (stock, rows),
        "unpadded": (unpadded, rows),
        "flat": (unpadded, row),
        "dynmask": (ours, own_rows),
        "dynmask, flat": (ours, own_row),
    }


class Operators(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += 1
        return func(*args, **(kwargs or {}))


def count_operators(job: Job) -> int:
    with Operators() as operators:
        job()
    return operators.number


def report(records: list[Results]) -> str:
    """A Markdown table."""
    rows = [
        [
            record["pass"],
            method,
            *_cells(record["milliseconds"], method, ".2f"),
            *_cells(record["operators"], method, "d"),
        ]
        for record in records
        for method in record["milliseconds"]
    ]
    header = ["pass", "method", "ms", "ms, relative", "operators", "operators, relative"]
    return table(header, rows, names=2)


def _cells(values: dict[str, float], method: str, spec: str) -> list[str]:
    return [f"{values[method]:{spec}}", f"{values[method] / values['padded']:.2f}"]


if __name__ == "__main__":
    main()
