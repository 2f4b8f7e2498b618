"""The `hf-dynmask` command."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from torch import Tensor
from transformers import AutoModel
from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled
from typer.core import TyperGroup

from .conversion import from_transformers, to_transformers
from .modeling.attention import auto_choice
from .modeling.configuration_base import DynMaskBaseConfig
from .modeling.field_shapes import FIELD_SHAPES
from .modeling.layout import SequenceLayout
from .modeling.masks import Mask, parse
from .modeling.plan import BLOCK_SIZE, MaskPlan
from .registration import AUTO_CLASSES
from .stock.unpadding import why_rows
from .tools.audit import audit_dataset, histogram
from .tools.check import Finding, Speed, check_model, compare, load_stock
from .tools.dataset_files import read_dataset, text_column
from .tools.plotting import (
    EMPTY,
    FULL,
    PARTIAL,
    MaskPanel,
    SequenceBlocks,
    mask_panels,
    over_cells,
    panel_counts,
    panel_title,
    plot_lengths,
    plot_mask,
    plot_masks,
)
from .tools.reading import EXPECTED, read_config, reading
from .tools.shared_code import verify_code
from .tools.sharing import export as export_model
from .tools.sharing import load, load_tokenizer, replacing, write

MARGIN = 8  # terminal columns for the positions of queries
CELL = 2  # terminal columns of a cell or a block
EVERY = 5  # cells between two labelled key positions
MOST_TOKENS = 2**20  # in a drawing
MOST_HEADS = 2**10
MOST_BLOCKS = 2**12  # side by side in an image
GLYPHS = {"full": "█", "allowed": "■", "hidden": "·", "partial": "▒", "empty": " "}
STYLES = {"full": "dodger_blue2", "allowed": "orange3", "hidden": "dim", "partial": "orange3", "empty": ""}
CELLS_LEGEND = {"full": "allowed, in a full block", "allowed": "allowed", "hidden": "hidden", "empty": "empty block"}
BLOCKS_LEGEND = {"full": "full block", "partial": "partial block", "empty": "empty block"}


LONGEST_ERROR = 400  # characters of a message


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Prints any error as one line and exits with code 2."""
    try:
        yield
    except (typer.Exit, typer.Abort, BrokenPipeError):
        raise
    except Exception as error:
        typer.echo(f"error: {_one_line(error)}", err=True)
        raise typer.Exit(2) from None  # with a StopIteration as its cause, the Exit would be lost


def _one_line(error: Exception) -> str:
    format_usage_error = getattr(error, "format_message", None)  # of errors such as an unknown option
    text = " ".join((str(error) if format_usage_error is None else format_usage_error()).split())
    if format_usage_error is None and not (isinstance(error, EXPECTED) and text):
        text = f"{type(error).__name__}: {text}".removesuffix(": ")
    return text if len(text) <= LONGEST_ERROR else f"{text[:LONGEST_ERROR]} …"


@contextmanager
def _silent_libraries() -> Iterator[None]:
    """Switches off logs and progress bars of libraries."""
    loggers = [logging.getLogger(name) for name in ("transformers", "datasets")]
    levels, had_bars = [logger.level for logger in loggers], is_progress_bar_enabled()
    disable_progress_bar()
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if had_bars:
            enable_progress_bar()


@contextmanager
def _progress(what: str) -> Iterator[None]:
    """Shows on a terminal what the command is doing, and for how long."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield  # earlier releases of rich write an empty line even where a bar is disabled
        return
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as bar:
        bar.add_task(what, total=None)
        yield


class _Commands(TyperGroup):
    """Commands whose errors are one line each."""

    def parse_args(self, ctx, args):
        with _one_line_errors() if args else nullcontext():  # without arguments, the help is shown
            return super().parse_args(ctx, args)

    def invoke(self, ctx):
        with _one_line_errors(), _silent_libraries():
            return super().invoke(ctx)


app = typer.Typer(name="hf-dynmask", cls=_Commands, no_args_is_help=True, add_completion=False)


@app.callback()
def main() -> None:
    """Dynamic attention masks for Hugging Face Transformers."""


# --- show ------------------------------------------------------------------------------------------------------------


@app.command(epilog="Example: hf-dynmask show 'causal & window(3, 0)' --lengths 12,5")
def show(
    expressions: Annotated[list[str], typer.Argument(metavar="EXPR", help="Masks, such as 'causal & window(3, 0)'.")],
    lengths: Annotated[str, typer.Option(help="Tokens of each sequence, such as 12,5.")],
    block_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MOST_TOKENS,
            help="Queries and keys per block.",
            show_default="128, or more if the terminal is too narrow",
        ),
    ] = None,
    heads: Annotated[
        int, typer.Option(min=1, max=MOST_HEADS, help="Number of attention heads, for masks that differ by head.")
    ] = 1,
    field: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=JSON", help="A field that the mask reads, as it would be in a batch."),
    ] = None,
    png: Annotated[Path | None, typer.Option(help="Write an image to this file instead of the terminal.")] = None,
) -> None:
    """
    Draw which query may see which key, and which blocks attention skips, computes without a mask, or masks.

    An image of several masks shows them side by side, without blocks.
    """
    masks, sizes = [parse(expression) for expression in expressions], _lengths(lengths)
    fields = _fields(masks, field or [], sizes)
    if png is not None:
        blocks = -(-max(sizes) // (block_size or BLOCK_SIZE))
        if blocks > MOST_BLOCKS:
            raise ValueError(
                f"--block-size {block_size or BLOCK_SIZE} makes {blocks:,} blocks, and an image has room for "
                f"{MOST_BLOCKS:,}: use larger blocks"
            )
        shared = {"fields": fields, "heads": heads}
        if len(masks) == 1:
            figure = plot_mask(masks[0], sizes, block_size=block_size or BLOCK_SIZE, **shared)
        elif block_size is None:
            figure = plot_masks(masks, sizes, **shared)
        else:
            raise ValueError("--block-size must be left out for an image of several masks, which shows no blocks")
        figure.savefig(png, format="png", dpi=160)
        typer.echo(f"wrote {png}")
        return
    console = Console(highlight=False)
    room = console.width - MARGIN
    with_cells = _width_of_cells(max(sizes), block_size or BLOCK_SIZE) <= room
    if not with_cells:
        block_size = _block_size(block_size, max(sizes), room)
    shown = block_size or BLOCK_SIZE
    for mask in masks:
        panels = mask_panels(mask, sizes, fields=fields, heads=heads, block_size=shown, with_cells=with_cells)
        for panel in panels:
            _print_panel(console, panel, heads, shown)
    _print_legend(console, CELLS_LEGEND if with_cells else BLOCKS_LEGEND)


def _lengths(text: str) -> list[int]:
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--lengths must be numbers separated by commas, such as 12,5; got {text!r}") from None
    if sum(sizes) > MOST_TOKENS:
        raise ValueError(f"--lengths must add up to at most {MOST_TOKENS:,} tokens; got {sum(sizes):,}")
    return sizes


def _fields(masks: Sequence[Mask], texts: Sequence[str], sizes: list[int]) -> dict[str, Tensor]:
    """Parses fields given as NAME=JSON. They must be exactly the fields that the masks read."""
    fields = dict(_field(text) for text in texts)
    read = frozenset().union(*(mask.fields for mask in masks))
    for name in sorted(read - set(fields)):
        sizes_of = {"B": len(sizes), "T": max(sizes), "Tq": max(sizes), "Tk": max(sizes), "1 | H": 1}
        shape = ", ".join(str(sizes_of.get(str(size), size)) for size in FIELD_SHAPES[name])
        raise ValueError(f"the mask reads the field `{name}`: give it as --field '{name}=JSON', of shape ({shape})")
    for name in sorted(set(fields) - read):
        reads = ", ".join(sorted(read)) or "none"
        raise ValueError(f"--field {name}: the mask does not read it; the fields it reads: {reads}")
    return fields


def _field(text: str) -> tuple[str, Tensor]:
    name, _, value = text.partition("=")
    try:
        return name, torch.tensor(json.loads(value))
    except (ValueError, TypeError, RuntimeError) as error:  # RuntimeError: null, or nested too deeply
        raise ValueError(f"--field must be NAME=JSON with lists of equal lengths; got {text!r} ({error})") from None


def _width_of_cells(length: int, block_size: int) -> int:
    return CELL * (length + max(length - 1, 0) // block_size)  # a border between blocks is as wide as a cell


def _block_size(given: int | None, length: int, room: int) -> int:
    """The given block size if its blocks fit into `room` columns; without one, the first multiple of 128 that fits."""
    most = max(room // CELL, 1)
    if given is None:
        return BLOCK_SIZE * -(-length // (BLOCK_SIZE * most))
    count = -(-length // given)
    if count > most:
        raise ValueError(
            f"--block-size {given} makes {count} blocks, and the terminal has room for {most}: "
            "use larger blocks, or draw an image with --png FILE"
        )
    return given


def _print_panel(console: Console, panel: MaskPanel, heads: int, block_size: int) -> None:
    console.print(Text(panel_title(panel, heads), style="bold"))
    console.print(Text(panel_counts(panel, block_size)))
    for number, sequence in enumerate(panel.sequences):
        console.print(Text(f"\nsequence {number}: {sequence.length:,} tokens"))
        if sequence.cells is None:
            lines = _draw_square(_block_kinds(sequence), block_size, border=None)
        else:
            lines = _draw_square(_cell_kinds(sequence, block_size), 1, border=block_size)
        for line in lines:
            console.print(line, no_wrap=True, overflow="ignore", crop=False)
    console.print()


def _block_kinds(sequence: SequenceBlocks) -> list[list[str]]:
    names = {EMPTY: "empty", PARTIAL: "partial", FULL: "full"}
    return [[names[state] for state in row] for row in sequence.states.tolist()]


def _cell_kinds(sequence: SequenceBlocks, block_size: int) -> list[list[str]]:
    assert sequence.cells is not None
    kinds = {EMPTY: ("empty", "empty"), PARTIAL: ("hidden", "allowed"), FULL: ("full", "full")}
    states = over_cells(sequence.states, sequence.length, block_size).tolist()
    return [
        [kinds[state][allowed] for state, allowed in zip(*row, strict=True)]
        for row in zip(states, sequence.cells.tolist(), strict=True)
    ]


def _draw_square(kinds: list[list[str]], step: int, border: int | None) -> Iterator[Text]:
    """Lines of a square. Each entry of `kinds` covers `step` tokens; a border follows every `border` entries."""
    size = len(kinds)
    bordered = [bool(border and k and k % border == 0) for k in range(size)]
    header = ""
    for k in range(0, size, EVERY):
        header = header.ljust(CELL * (k + sum(bordered[: k + 1]))) + str(k * step)
    yield Text(" " * MARGIN + header, style="dim")
    between = "".join(("┼─" if here else "") + "─" * CELL for here in bordered)
    for k, row in enumerate(kinds):
        if bordered[k]:
            yield Text(" " * MARGIN + between, style="dim")
        line = Text(f"{k * step:>{MARGIN - 2}}  ", style="dim")
        for here, kind in zip(bordered, row, strict=True):
            line.append("│ " if here else "", style="dim")
            line.append(GLYPHS[kind].ljust(CELL), style=STYLES[kind])
        yield line


def _print_legend(console: Console, entries: Mapping[str, str]) -> None:
    line = Text()
    for kind, text in entries.items():
        line.append(GLYPHS[kind] if kind != "empty" else "blank", style=STYLES[kind])
        line.append(f" {text}   ")
    console.print(line)


# --- env -------------------------------------------------------------------------------------------------------------

KINDS_OF_MASKS = ["full", "causal", "causal & window(255, 0)", "causal | prefix(16)", "causal & topk(16)"]
HEAD_SIZE = 64
CASES = {
    "bfloat16": (torch.bfloat16, 0.0),
    "bfloat16, dropout": (torch.bfloat16, 0.1),
    "float32": (torch.float32, 0.0),
    "float32, dropout": (torch.float32, 0.1),
}


@app.command(epilog="Example: hf-dynmask env --model answerdotai/ModernBERT-base")
def env(
    model: Annotated[
        str | None, typer.Option(help="Say instead whether this stock checkpoint, a folder or Hub id, drops padding.")
    ] = None,
) -> None:
    """Show which attention implementation runs on this machine for which mask, and why not another.

    On a CPU, also show how waiting threads behave.
    """
    if model is not None:
        typer.echo(_describe_padding(model))
        return
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    name = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    typer.echo(f"torch {torch.__version__}, transformers {transformers.__version__}; device: {device.type}{name}")
    if device.type == "cpu":
        typer.echo(f"{torch.get_num_threads()} threads; {_wait_policy()}")
    typer.echo(f"What runs with attn_implementation='dynmask', for heads of size {HEAD_SIZE}:")
    table = Table("mask", "for", "runs", "why not another")
    for text in KINDS_OF_MASKS:
        cases_by_choice: dict[tuple[str, str], list[str]] = {}
        for case, (dtype, dropout) in CASES.items():
            cases_by_choice.setdefault(_choice(text, device, dtype, dropout), []).append(case)
        for (runs, why), cases in cases_by_choice.items():
            table.add_row(text, "all" if len(cases) == len(CASES) else "\n".join(cases), runs, why)
        table.add_section()
    Console(highlight=False).print(table)


def _describe_padding(source: str) -> str:
    """Says whether a checkpoint computes the padding of rows, and why."""
    config = read_config(source)
    if isinstance(config, DynMaskBaseConfig):
        return f"This {config.model_type} model computes real tokens alone."
    with torch.device("meta"):
        model = AutoModel.from_config(config, attn_implementation="dynmask")
    part, end = f"this {config.model_type} model", ""
    if config.is_encoder_decoder:
        model, part, end = model.get_encoder(), f"the encoder of {part}", "; its decoder computes padded rows"
    why = why_rows(model)
    tokens = "real tokens alone" if why is None else f"padded rows as they are, since {why}"
    return f"With attn_implementation='dynmask' {part} computes {tokens}{end}."


def _wait_policy() -> str:
    """The value of `OMP_WAIT_POLICY`, and its effect."""
    policy = os.environ.get("OMP_WAIT_POLICY")
    if (policy or "").strip().lower() == "passive":
        return "OMP_WAIT_POLICY=passive: waiting threads leave their cores to others"
    return (
        f"OMP_WAIT_POLICY={policy or 'unset'}: waiting threads keep their cores busy. If other processes run, such "
        "as the workers of a data loader, a step can take two to three times as long as with OMP_WAIT_POLICY=passive, "
        "which must be in the environment when Python starts"
    )


def _choice(text: str, device: torch.device, dtype: torch.dtype, dropout: float) -> tuple[str, str]:
    """The implementation that [`auto_choice`] picks for a mask over one short sequence, and why not another."""
    plan = MaskPlan(text, SequenceLayout.from_lengths(torch.tensor([2])))
    states = torch.empty(2, 1, HEAD_SIZE, device=device, dtype=dtype)
    runs, passed_over = auto_choice(plan, states, states, states, dropout)
    return runs, "\n".join(f"{other}: {reason}" for other, reason in passed_over.items())


# --- audit -----------------------------------------------------------------------------------------------------------

LONGEST_BAR = 50  # terminal columns of a histogram's longest bar
SIDES = ("tokens", "tokens of the target")


@app.command(epilog="Example: hf-dynmask audit reviews.csv --model bert-base-uncased --batch-size 32 --time")
def audit(
    dataset: Annotated[
        str,
        typer.Argument(help="A csv, json, parquet or text file, a folder of these or from save_to_disk, or a Hub id."),
    ],
    model: Annotated[str, typer.Option(help="The model whose tokenizer and sizes are used: a folder or Hub id.")],
    batch_size: Annotated[int, typer.Option(min=1, max=MOST_TOKENS, help="Examples per batch.")],
    column: Annotated[
        list[str] | None,
        typer.Option(
            help="The column of texts; give two for pairs of texts.", show_default="text, or the first with text"
        ),
    ] = None,
    target: Annotated[str | None, typer.Option(help="The column of targets, for an encoder-decoder.")] = None,
    split: Annotated[str, typer.Option(help="The split of the data.")] = "train",
    max_length: Annotated[
        int | None,
        typer.Option(min=1, help="Truncate texts to this many tokens.", show_default="the model's maximum"),
    ] = None,
    time: Annotated[bool, typer.Option("--time", help="Also time training steps on this machine.")] = False,
    output: Annotated[Path | None, typer.Option(help="Also write the histogram to this PNG file.")] = None,
) -> None:
    """Show the lengths of a data set, the padding of its batches, and how much faster lengths are than padded rows."""
    rows = read_dataset(dataset, split)
    with _progress("counting tokens and timing steps" if time else "counting tokens"):
        found = audit_dataset(rows, model, batch_size, column or (), target, max_length, with_times=time)
    console = Console(highlight=False)
    for name, lengths in zip(SIDES, zip(*found.sizes, strict=True), strict=False):
        _print_histogram(console, name, lengths)
    if found.truncated:
        console.print(f"Truncated examples: {found.truncated:,}\n")
    table = Table("batches", "steps", "tokens, mean", "tokens, most", "padding", "speed-up, at best")
    if time:
        table.add_column("speed-up, timed")
    for batching, *timed in zip(found.batchings, *[found.timed] * time, strict=True):
        name, steps, mean, most, padding, speedup = batching
        cells = [f"{steps:,}", f"{mean:,.0f}", f"{most:,}", f"{padding:.1%}", f"{speedup:.2f}"]
        table.add_row(name, *cells, *(f"{ratio:.2f}" for ratio in timed))
    console.print(table)
    if output is not None:
        plot_lengths(dict(zip(SIDES, zip(*found.sizes, strict=True), strict=False))).savefig(output, dpi=160)
        typer.echo(f"wrote {output}")


def _print_histogram(console: Console, name: str, lengths: Sequence[int]) -> None:
    ordered = sorted(lengths)
    quantiles = {"median": 0.5, "90%": 0.9, "99%": 0.99}
    parts = [f"{label} {ordered[int(share * (len(ordered) - 1))]:,}" for label, share in quantiles.items()]
    console.print(f"{len(ordered):,} examples, {sum(ordered):,} {name}: {', '.join(parts)}, most {ordered[-1]:,}")
    bins = histogram(ordered)
    most = max(found.count for found in bins)
    for first, last, count in bins:
        bar = "█" * -(-count * LONGEST_BAR // most)
        console.print(
            Text(f"{f'{first:,}-{last:,}':>15}  {bar} {count:,}"), no_wrap=True, overflow="ignore", crop=False
        )
    console.print()


# --- check -----------------------------------------------------------------------------------------------------------


class Precision(str, Enum):
    """The dtypes that `check` can run in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@app.command(epilog="Example: hf-dynmask check bert-base-uncased --data reviews.csv")
def check(
    model: Annotated[str, typer.Argument(help="A checkpoint: a folder or Hub id of a DynMask or a stock model.")],
    data: Annotated[
        str | None,
        typer.Option(help="Texts: a csv, json, parquet or text file, or a Hub id. Random tokens by default."),
    ] = None,
    column: Annotated[
        str | None, typer.Option(help="The column of texts.", show_default="text, or the first with text")
    ] = None,
    split: Annotated[str, typer.Option(help="The split of the data.")] = "train",
    dtype: Annotated[
        list[Precision] | None, typer.Option(help="The dtype to run in.", show_default="float32, bfloat16")
    ] = None,
) -> None:
    """Check that a checkpoint gives the same outputs without padding as on padded rows, and that no sequence leaks.

    The first line says whether it is exact, whether sequences leak, and how much faster it is here. A stock checkpoint
    runs with attn_implementation='dynmask' and, if possible, also converted.

    The exit code is 1 if anything is wrong. Code that comes with a checkpoint does not run. It is compared with the
    installed package if the versions match, and otherwise with the hashes in the checkpoint.
    """
    compared = verify_code(model)
    texts = None if data is None else text_column(read_dataset(data, split), column)
    dtypes = [getattr(torch, name.value) for name in dtype or (Precision.float32, Precision.bfloat16)]
    with _progress("comparing with padded rows"):
        results = list(check_model(model, texts, dtypes))
    findings = [result for result in results if isinstance(result, Finding)]
    _print_summary(findings, [result for result in results if isinstance(result, Speed)])
    if compared:
        typer.echo(f"code: no difference from {compared}")
    typer.echo(_describe_padding(model))
    table = Table("what", "dtype", "found", "allowed", "")
    for finding in findings:
        verdict = "right" if finding.is_right else Text("WRONG", style="bold red")
        numbers = (f"{finding.found:.3g}", f"{finding.allowed:.3g}")
        table.add_row(finding.what, str(finding.dtype).removeprefix("torch."), *numbers, verdict)
    Console(highlight=False).print(table)
    if not all(finding.is_right for finding in findings):
        raise typer.Exit(1)


def _print_summary(findings: Sequence[Finding], speeds: Sequence[Speed]) -> None:
    leaks, others = ([each for each in findings if each.is_of_leaks is is_leak] for is_leak in (True, False))
    exact = "exact" if all(each.is_right for each in others) else "NOT EXACT"
    apart = "no leak" if all(each.is_right for each in leaks) else "SEQUENCES LEAK"
    fastest = max(speeds, key=lambda speed: speed.speedup)
    typer.echo(f"{exact}, {apart}, {fastest.speedup:.2f} times as fast as padded rows here ({fastest.what})")
    ways = ", ".join(f"{speed.what} {speed.speedup:.2f}" for speed in speeds)
    dtype = str(fastest.dtype).removeprefix("torch.")
    typer.echo(f"forward passes on {fastest.device}, {dtype}, {fastest.padding:.0%} padding: {ways}")


# --- export, convert -------------------------------------------------------------------------------------------------

Source = Annotated[str, typer.Argument(metavar="IN", help="A checkpoint: a folder or Hub id.")]
Output = Annotated[Path, typer.Argument(metavar="OUT", help="A folder: new, empty, or written by an earlier export.")]


@app.command(epilog="Example: hf-dynmask export outputs/model to_share")
def export(source: Source, output: Output) -> None:
    """Write a DynMask checkpoint with its code, so that it can be loaded without this package."""
    with _progress("exporting"):
        export_model(load(source), output, load_tokenizer(source))
    typer.echo(f"wrote {output}")


@app.command(epilog="Example: hf-dynmask convert bert-base-uncased converted")
def convert(
    source: Source,
    output: Output,
    to: Annotated[
        str | None,
        typer.Option(help="Type of the stock model.", show_default="the type it was converted from"),
    ] = None,
) -> None:
    """Convert a stock checkpoint to a DynMask checkpoint with its code, or a DynMask checkpoint to a stock one.

    The result is loaded again and compared with the original before the folder is written.
    """
    with _progress("converting, and comparing with the original"), replacing(output) as new:
        tokenizer, config = load_tokenizer(source), read_config(source)
        if type(config) in AUTO_CLASSES:
            ours = load(source)
            stock = to_transformers(ours, to)
            stock.save_pretrained(new)
            stock = type(stock).from_pretrained(new)
        elif to is not None:
            raise ValueError(f"--to must be left out unless the checkpoint is a DynMask one; {source} is a stock one")
        else:
            with reading(source):
                ours = from_transformers(source)
            stock = load_stock(source, ours)
            write(ours, new)
            ours = type(ours).from_pretrained(new)
        if tokenizer is not None:
            tokenizer.save_pretrained(new)
        wrong = [finding for finding in compare(ours, stock) if not finding.is_right]
        if wrong:
            raise ValueError(f"{output} was not written: the outputs differ; {wrong[0].what} by {wrong[0].found:.3g}")
    typer.echo(f"wrote {output}")


if __name__ == "__main__":
    app(prog_name="hf-dynmask")
