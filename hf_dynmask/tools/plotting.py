"""Plots of masks and their blocks, of attention weights, and of lengths.

Shape legend: S sequences of T tokens each, N tokens in total, H heads, Bq and Bk blocks of queries and keys.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..modeling.field_shapes import FIELD_SHAPES
from ..modeling.fields import Fields
from ..modeling.layout import SequenceLayout
from ..modeling.masks import Mask, head_runs, parse
from ..modeling.modeling_dynmask import DynMaskPreTrainedModel
from ..modeling.plan import BLOCK_SIZE, MaskPlan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

EMPTY, PARTIAL, FULL = range(3)  # states of a block
Line = list[tuple[int, int]]

# Blue and orange can be told apart with any colour vision, and by their lightness in print. After Okabe and Ito,
# "Color Universal Design" (2008).
COLOURS = {"empty": "#ECEEF0", "hidden": "#FBE7BD", "allowed": "#E08A00", "full": "#0067A5"}
INK = "#333333"
# Single cells are drawn for up to MOST_CELLS tokens, a label for each of up to MOST_LABELS tokens, and borders between
# up to MOST_LINES blocks per side.
MOST_CELLS = 1024
MOST_LABELS = 64
MOST_LINES = 128
MOST_TICKS = 12  # along an axis
MOST_BARS = 50  # in a histogram


class SequenceBlocks(NamedTuple):
    """The mask of one head in one sequence.

    Attributes:
        length (`int`): T.
        states (integer `Tensor` of shape `(Bq, Bk)`): `EMPTY`, `PARTIAL` or `FULL`.
        cells (bool `Tensor` of shape `(T, T)`, *optional*): Which query may see which key.
    """

    length: int
    states: Tensor
    cells: Tensor | None


class MaskPanel(NamedTuple):
    """The mask of neighbouring heads with the same expression."""

    heads: slice
    mask: Mask
    sequences: list[SequenceBlocks]


def mask_panels(
    mask: Mask | str,
    lengths: Tensor | Sequence[int],
    *,
    fields: Mapping[str, Tensor] | None = None,
    heads: int = 1,
    block_size: int = BLOCK_SIZE,
    with_cells: bool = True,
) -> list[MaskPanel]:
    """Computes what [`plot_mask`] draws. The arguments are the same.

    Returns:
        `list[MaskPanel]`: One panel for each group of heads with the same mask.
    """
    if block_size < 1:
        raise ValueError(f"`block_size` must be at least 1; got {block_size}")
    mask = parse(mask) if isinstance(mask, str) else mask
    lengths = torch.as_tensor(lengths)
    sizes = SequenceLayout.from_lengths(lengths).lengths.tolist()
    checked = mask.checked(fields, rows=len(sizes))
    cells = mask.dense(lengths, fields=fields, heads=heads) if with_cells else None
    panels = []
    for run, run_mask in _runs(mask, heads, checked):
        head_fields = checked.heads(slice(run.start, run.start + 1))
        sequences = []
        for row, size in enumerate(sizes):
            states = block_states(run_mask, size, head_fields.rows(torch.tensor([row])), block_size)
            head = run.start if cells is not None and cells.shape[1] > 1 else 0
            sequences.append(SequenceBlocks(size, states, None if cells is None else cells[row, head, :size, :size]))
        panels.append(MaskPanel(run, run_mask, sequences))
    return panels


def _runs(mask: Mask, heads: int, fields: Fields) -> list[tuple[slice, Mask]]:
    """Runs of neighbouring heads with the same mask. If a field has values per head, every head is its own run."""
    runs = head_runs(mask, heads)
    if not any("1 | H" in FIELD_SHAPES.get(name, ()) and table.shape[1] > 1 for name, table in fields.tables.items()):
        return runs
    return [(slice(head, head + 1), run_mask) for run, run_mask in runs for head in range(run.start, run.stop)]


def block_states(mask: Mask, length: int, fields: Fields, block_size: int) -> Tensor:
    """`EMPTY`, `PARTIAL` or `FULL` for each pair of blocks `(Bq, Bk)` of one sequence, from the mask's range rules."""
    first = torch.arange(0, length, block_size)
    last = (first + block_size - 1).clamp(max=length - 1)
    q_lo, q_hi, k_lo, k_hi = first[None, :, None], last[None, :, None], first[None, None], last[None, None]
    always, never = mask.classify_checked(q_lo, q_hi, k_lo, k_hi, fields)
    return PARTIAL + always[0].long() - never[0].long()


def panel_title(panel: MaskPanel, heads: int) -> str:
    """The expression, and the heads that have it unless all `heads` do."""
    first, last = panel.heads.start, panel.heads.stop - 1
    if (first, last) == (0, heads - 1):
        return str(panel.mask)
    return f"head {first}: {panel.mask}" if first == last else f"heads {first} to {last}: {panel.mask}"


def panel_counts(panel: MaskPanel, block_size: int) -> str:
    """How many pairs are allowed, and how many blocks are full, partial and empty."""
    states = torch.cat([sequence.states.flatten() for sequence in panel.sequences])
    full, partial, empty = (int((states == state).sum()) for state in (FULL, PARTIAL, EMPTY))
    text = f"blocks of {block_size:,}: {full:,} full, {partial:,} partial, {empty:,} empty"
    cells = [sequence.cells for sequence in panel.sequences if sequence.cells is not None]
    if len(cells) < len(panel.sequences):
        return text
    allowed = sum(int(each.sum()) for each in cells)
    pairs = sum(sequence.length**2 for sequence in panel.sequences)
    return f"{allowed:,} of {pairs:,} pairs; {text}"


def plot_mask(
    mask: Mask | str,
    lengths: Tensor | Sequence[int],
    *,
    fields: Mapping[str, Tensor] | None = None,
    heads: int = 1,
    block_size: int = BLOCK_SIZE,
    ax: Axes | None = None,
) -> Figure:
    """
    Plots which query may see which key, and which blocks attention skips, computes without a mask, or masks.

    The sequences are concatenated, as in a flat batch, and never see each other. Single cells are drawn for up to 1,024
    tokens in total, and only blocks for more.

    Args:
        mask (`Mask` or `str`): The expression.
        lengths (`Tensor` of shape `(S,)` or list of `int`): Tokens of each sequence.
        fields (`dict[str, Tensor]`, *optional*): The fields that the mask reads, by sequence and position.
        heads (`int`, *optional*, defaults to 1): Attention heads. Heads that differ get separate panels.
        block_size (`int`, *optional*, defaults to 128): Queries and keys per block, from the start of each sequence.
        ax (`matplotlib.axes.Axes`, *optional*): Where to draw. `None`: a new figure.

    Returns:
        `matplotlib.figure.Figure`: To show with `matplotlib.pyplot.show()` or save with its `savefig`.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: The mask does not parse; lengths, block size or fields do not fit; `ax` is given for heads that
            differ.
    """
    pyplot = _pyplot()
    with_cells = int(torch.as_tensor(lengths).sum()) <= MOST_CELLS
    panels = mask_panels(mask, lengths, fields=fields, heads=heads, block_size=block_size, with_cells=with_cells)
    if ax is not None and len(panels) > 1:
        raise ValueError(f"`ax` must be left out for heads that differ, which need {len(panels)} panels")
    axes = [ax] if ax is not None else _new_axes(pyplot, len(panels))
    for axis, panel in zip(axes, panels, strict=True):
        _draw_panel(axis, panel, block_size)
        sizes = [sequence.length for sequence in panel.sequences]
        _mark_positions(axis, sizes, [position for size in sizes for position in range(size)])
        _title(axis, panel_title(panel, heads), panel_counts(panel, block_size))
    if len(panels) > 1:
        axes[0].figure.suptitle(_wrapped(str(mask), 100))
    _legend(axes[0], _CELLS_LEGEND if with_cells else _BLOCKS_LEGEND, outside=ax is None)
    return cast("Figure", axes[0].figure)


def plot_masks(
    masks: Sequence[Mask | str],
    lengths: Tensor | Sequence[int],
    *,
    fields: Mapping[str, Tensor] | None = None,
    heads: int = 1,
) -> Figure:
    """
    Plots masks side by side over the same few tokens: which query may see which key.

    Queries are rows and keys are columns; the sequences are concatenated, as in a flat batch.

    Args:
        masks (list of `Mask` or `str`): The expressions. Heads that differ get separate panels.
        lengths (`Tensor` of shape `(S,)` or list of `int`): Tokens of each sequence, up to 1,024 in total.
        fields (`dict[str, Tensor]`, *optional*): The fields that the masks read, by sequence and position.
        heads (`int`, *optional*, defaults to 1): Attention heads.

    Returns:
        `matplotlib.figure.Figure`: To show with `matplotlib.pyplot.show()` or save with its `savefig`.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: There are no masks, or too many tokens; a mask does not parse; lengths or fields do not fit.
    """
    pyplot = _pyplot()
    if not masks:
        raise ValueError("`masks` must hold at least one expression; got none")
    if (total := int(torch.as_tensor(lengths).sum())) > MOST_CELLS:
        raise ValueError(f"`lengths` must add up to at most {MOST_CELLS:,} tokens, to be legible; got {total:,}")
    panels = [panel for mask in masks for panel in mask_panels(mask, lengths, fields=fields, heads=heads)]
    axes = _new_axes(pyplot, len(panels), size=2.3)
    for axis, panel in zip(axes, panels, strict=True):
        _draw_panel(axis, _by_cell(panel), 1)
        axis.set(xticks=[], yticks=[], xlabel="", ylabel="")
        axis.set_title(_wrapped(panel_title(panel, heads), 30), fontsize=9, color=INK)
    _legend(axes[0], {"full": "allowed", "empty": "hidden"}, outside=True)
    return cast("Figure", axes[0].figure)


def _by_cell(panel: MaskPanel) -> MaskPanel:
    """The panel with each cell as a block of its own."""
    cells = [cast(Tensor, sequence.cells) for sequence in panel.sequences]
    return panel._replace(sequences=[SequenceBlocks(len(one), torch.where(one, FULL, EMPTY), one) for one in cells])


def plot_attention(
    model: DynMaskPreTrainedModel,
    inputs: Mapping[str, Tensor],
    layer: int,
    head: int,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Figure:
    """
    Plots the attention weights of one head, the cells that its mask hides, and the borders of blocks.

    The weights come from one forward pass with `attn_implementation="eager"` and without dropout; the model is left
    unchanged. Absent and missing tokens are not shown.

    Args:
        model ([`DynMaskPreTrainedModel`]): The model.
        inputs (`dict[str, Tensor]`): A batch of one row, `(1, T)` or flat `(1, N)`, as the model takes it.
        layer (`int`): Index of the layer, from 0.
        head (`int`): Index of the query head, from 0.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): Labels the axes with tokens, if there are at
            most 64. `None`: the axes show positions.

    Returns:
        `matplotlib.figure.Figure`: To show with `matplotlib.pyplot.show()` or save with its `savefig`.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: The model is not a DynMask model; there is no such layer or head; there is more than one row.
    """
    if not isinstance(model, DynMaskPreTrainedModel):
        raise ValueError(
            f"`model` must be a DynMask model, such as `from_transformers` returns; got {type(model).__name__}"
        )
    _check_index("layer", layer, model.config.num_hidden_layers)
    _check_index("head", head, model.config.num_attention_heads)
    pyplot = _pyplot()
    plan, weights = _eager(model, inputs, layer)
    if plan.layout.shape[0] != 1:
        raise ValueError(f"`inputs` must hold one row; got {plan.layout.shape[0]}")

    places = plan.layout.places
    sizes = plan.layout.sequence_ids.unique_consecutive(return_counts=True)[1].tolist()
    # The mask before `topk` chooses among the keys. Keys that it does not choose have weight 0.
    allowed = MaskPlan(plan.mask.without_choice(), plan.layout, fields=inputs).dense(model.config.num_attention_heads)
    allowed, weights = (cells[0, head % cells.shape[1]][places][:, places].cpu() for cells in (allowed, weights))

    (axis,) = _new_axes(pyplot, 1)
    _draw_weights(axis, weights.float(), allowed, sizes)
    labels = None
    if tokenizer is not None and "input_ids" in inputs and len(places) <= MOST_LABELS:
        labels = tokenizer.convert_ids_to_tokens(inputs["input_ids"][0][places].tolist())
    _mark_positions(axis, sizes, plan.layout.positions.tolist(), labels)
    _title(axis, f"layer {layer}, head {head}", str(plan.mask.resolved(head, model.config.num_attention_heads)))
    _legend(axis, _WEIGHTS_LEGEND, outside=True)
    return cast("Figure", axis.figure)


def _check_index(name: str, value: int, count: int) -> None:
    if not 0 <= value < count:
        raise ValueError(f"`{name}` must be from 0 to {count - 1}; got {value}")


def _eager(model: DynMaskPreTrainedModel, inputs: Mapping[str, Tensor], layer: int) -> tuple[MaskPlan, Tensor]:
    """The plan and the attention weights `(B, H, T, T)` of a layer in an eager forward pass."""
    seen = []
    attention: nn.Module = model.base_model.layers[layer].attention  # type: ignore[assignment, index, union-attr]
    hook = attention.register_forward_hook(lambda module, inputs, output: seen.append((inputs[1], output[1])))
    was_training, implementation = model.training, model.config._attn_implementation or "dynmask"
    try:
        model.eval().set_attn_implementation("eager")
        with torch.no_grad():
            model(**inputs)
    finally:
        hook.remove()
        model.train(was_training).set_attn_implementation(implementation)
    return seen[0]


# --- Lengths ---------------------------------------------------------------------------------------------------------


def plot_lengths(lengths: Mapping[str, Sequence[int]]) -> Figure:
    """
    Plots histograms of lengths.

    Args:
        lengths (`dict[str, Sequence[int]]`): The length of each example, by name, such as "tokens". Each name gets a
            panel.

    Returns:
        `matplotlib.figure.Figure`: To show with `matplotlib.pyplot.show()` or save with its `savefig`.

    Raises:
        ImportError: matplotlib is not installed.
    """
    axes = _new_axes(_pyplot(), len(lengths), size=7, height=3.94)  # 16:9
    for axis, (name, numbers) in zip(axes, lengths.items(), strict=True):
        least, most, mean = min(numbers), max(numbers), sum(numbers) / len(numbers)
        width = -(-(most - least + 1) // MOST_BARS)  # lengths per bar
        axis.hist(numbers, bins=range(least, most + width + 1, width), align="left", color=COLOURS["full"])
        axis.axvline(mean, color=COLOURS["allowed"], linewidth=2, label=f"mean {mean:,.0f}")
        axis.axvline(most, color=INK, linestyle=":", label=f"longest {most:,}")
        axis.set_title(f"{len(numbers):,} examples, {sum(numbers):,} {name}", loc="left", color=INK)
        axis.set_xlabel(name, color=INK)
        axis.set_ylabel("examples", color=INK)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
    return cast("Figure", axis.figure)


# --- Drawing ---------------------------------------------------------------------------------------------------------

_WEIGHTS_LEGEND = {"hidden": "partial block: hidden", "empty": "empty block: skipped"}
_CELLS_LEGEND = {"full": "full block: all allowed", "allowed": "partial block: allowed", **_WEIGHTS_LEGEND}
_BLOCKS_LEGEND = {"full": _CELLS_LEGEND["full"], "allowed": "partial block", "empty": _CELLS_LEGEND["empty"]}


def _pyplot():
    try:
        import matplotlib.pyplot as pyplot
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'hf_dynmask[plot]'") from error
    return pyplot


def _new_axes(pyplot, count: int, size: float | None = None, height: float | None = None) -> list[Axes]:
    """New axes, up to four in a row. Each is `size` inches wide and, unless `height` is given, as high."""
    columns = min(count, 4)
    rows = -(-count // columns)
    size = size or (6.4 if count == 1 else 4.4)
    figure = pyplot.figure(figsize=(size * columns, (height or size) * rows), layout="constrained")
    return [figure.add_subplot(rows, columns, k + 1) for k in range(count)]


def _colours(states: Tensor, cells: Tensor | None) -> Tensor:
    """RGB values from 0 to 1: of blocks `(Bq, Bk, 3)`, or of cells `(T, T, 3)` if `states` has one entry per cell."""
    names = list(COLOURS)
    colours = torch.tensor([names.index("empty"), names.index("allowed"), names.index("full")])[states]
    if cells is not None:
        colours[(states == PARTIAL) & ~cells] = names.index("hidden")
    table = torch.tensor([[int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)] for colour in COLOURS.values()])
    return table[colours]


def over_cells(states: Tensor, length: int, block_size: int) -> Tensor:
    """The state of the block of each cell, `(T, T)`, from the states of blocks `(Bq, Bk)`."""
    block = torch.arange(length) // block_size
    return states[block][:, block]


def _draw_panel(axis: Axes, panel: MaskPanel, block_size: int) -> None:
    sizes = [sequence.length for sequence in panel.sequences]
    total, starts = sum(sizes), _starts(sizes)
    canvas = torch.ones(total, total, 3) if all(one.cells is not None for one in panel.sequences) else None
    for start, (length, states, cells) in zip(starts, panel.sequences, strict=True):
        here = slice(start, start + length)
        if canvas is not None:
            canvas[here, here] = _colours(over_cells(states, length, block_size), cells)
        elif length:
            edges = [start + edge for edge in [*range(0, length, block_size), length]]
            axis.pcolormesh(edges, edges, _colours(states, None).numpy())
    if canvas is not None and total:
        axis.imshow(canvas.numpy(), extent=(0, total, total, 0))
    _frame(axis, sizes, block_size)


def _draw_weights(axis: Axes, weights: Tensor, allowed: Tensor, sizes: list[int]) -> None:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import PowerNorm

    highest = float(weights.max()) if weights.numel() else 1.0
    scale = ScalarMappable(PowerNorm(0.5, 0, highest), colormaps["Blues"])  # square root: most weights are small
    canvas = torch.ones(*weights.shape, 3)
    for start, length in zip(_starts(sizes), sizes, strict=True):
        here = slice(start, start + length)
        cells = allowed[here, here]
        any_allowed = nn.functional.max_pool2d(cells[None].float(), BLOCK_SIZE, ceil_mode=True)[0] > 0
        states = over_cells(torch.where(any_allowed, PARTIAL, EMPTY), length, BLOCK_SIZE)
        shades = torch.as_tensor(scale.to_rgba(weights[here, here].numpy())[..., :3], dtype=torch.float32)
        canvas[here, here] = torch.where(cells[..., None], shades, _colours(states, cells))
    if canvas.numel():
        axis.imshow(canvas.numpy(), extent=(0, len(weights), len(weights), 0))
    _frame(axis, sizes, BLOCK_SIZE)
    axis.figure.colorbar(scale, ax=axis, label="attention weight", shrink=0.75)


def _frame(axis: Axes, sizes: list[int], block_size: int) -> None:
    """Sets the limits, and draws the borders of sequences and blocks."""
    from matplotlib.collections import LineCollection

    total = sum(sizes)
    axis.set(xlim=(0, total or 1), ylim=(total or 1, 0), aspect="equal", xlabel="key position", ylabel="query position")
    for spine in axis.spines.values():
        spine.set_visible(False)
    spans = list(zip(_starts(sizes), sizes, strict=True))
    for step, most, width in ((1, MOST_LABELS, 0.3), (block_size, MOST_LINES, 1.2)):
        if total <= most * step:
            lines = [line for span in spans for line in _grid(*span, step)]
            axis.add_collection(LineCollection(lines, colors="white", linewidths=width))
    outlines = [_outline(*span) for span in spans]
    axis.add_collection(LineCollection(outlines, colors=INK, linewidths=0.8, clip_on=False))


def _grid(start: int, length: int, step: int) -> list[Line]:
    """Lines across a sequence's square every `step` tokens."""
    stop = start + length
    edges = range(start + step, stop, step)
    return [line for edge in edges for line in ([(start, edge), (stop, edge)], [(edge, start), (edge, stop)])]


def _outline(start: int, length: int) -> Line:
    stop = start + length
    return [(start, start), (stop, start), (stop, stop), (start, stop), (start, start)]


def _mark_positions(
    axis: Axes, sizes: list[int], positions: Sequence[int], labels: Sequence[str] | None = None
) -> None:
    """Sets ticks: a label for every token, sequence numbers if there are many sequences, or some of the positions."""
    total, spans = sum(sizes), list(zip(_starts(sizes), sizes, strict=True))
    if labels is not None:
        axis.set(xlabel="key", ylabel="query")
        ticks = list(enumerate(labels))
    elif len(sizes) > MOST_TICKS:
        axis.set(xlabel="sequence of the key", ylabel="sequence of the query")
        ticks = [(start, str(number)) for number, (start, _) in enumerate(spans)]
        ticks = ticks[:: -(-len(ticks) // MOST_TICKS)]
    else:
        step = 1 if total <= MOST_LABELS // 2 else _round_step(total / MOST_TICKS)
        ticks = [
            (start + place, str(positions[start + place]))
            for start, length in spans
            for place in range(0, length, step)
            if place == 0 or step == 1 or length - place > step / 2
        ]
    places, texts = [place + 0.5 for place, _ in ticks], [text for _, text in ticks]
    small = {"fontsize": 7 if total <= MOST_LABELS else 8, "parse_math": False}
    axis.set_xticks(places, texts, rotation=0 if labels is None else 90, **small)
    axis.set_yticks(places, texts, **small)
    axis.tick_params(length=2, color=INK)
    if 1 < len(sizes) <= MOST_TICKS:
        _name_sequences(axis, spans)


def _name_sequences(axis: Axes, spans: list[tuple[int, int]]) -> None:
    total = sum(length for _, length in spans)
    for number, (start, length) in enumerate(spans):
        if length >= total / 30:
            place = (start + length + total / 80, start + length / 2)
            axis.text(*place, f"sequence {number}", fontsize=8, va="center", color=INK)


def _starts(sizes: list[int]) -> list[int]:
    return [0, *accumulate(sizes)][: len(sizes)]


def _round_step(least: float) -> int:
    """The smallest of 1, 2, 5, 10, 20, 50, … that is at least the given number."""
    power = 1
    while True:
        for step in (power, 2 * power, 5 * power):
            if step >= least:
                return step
        power *= 10


def _wrapped(text: str, width: int) -> str:
    return "\n".join(textwrap.wrap(text, width))


def _title(axis: Axes, title: str, remark: str) -> None:
    remark = _wrapped(remark, 88)
    axis.set_title(_wrapped(title, 60), loc="left", fontsize=10, color=INK, pad=8 + 11 * (1 + remark.count("\n")))
    axis.annotate(remark, (0, 1), (0, 5), "axes fraction", "offset points", fontsize=8, color=INK)


def _legend(axis: Axes, entries: Mapping[str, str], outside: bool) -> None:
    from matplotlib.patches import Patch

    handles = [
        Patch(facecolor=COLOURS[name], edgecolor=INK, linewidth=0.4, label=text) for name, text in entries.items()
    ]
    style: dict[str, Any] = {"handles": handles, "ncols": 2, "fontsize": 8, "frameon": False}
    if outside:
        axis.figure.legend(loc="outside lower center", **style)
    else:
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), **style)
