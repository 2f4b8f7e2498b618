"""Inserts pictures of masks, and tables of the README, into the pages."""

import re
from html import escape
from pathlib import Path

import torch
from mkdocs.exceptions import PluginError
from torch import Tensor

from hf_dynmask import masks

README = Path(__file__).parents[2] / "README.md"
TABLE = re.compile(r"<!-- README: the table with (.+?) -->")
LENGTHS = torch.tensor([9, 6])
FIELDS = {
    "prefix_lengths": torch.tensor([3, 2]),
    "hidden_spans": torch.tensor([[[2, 2]], [[4, 1]]]),
    "segment_ids": torch.tensor([[0, 0, 0, 1, 1, 1, 2, 2, 2], [0, 0, 1, 1, 2, 2, 0, 0, 0]]),
    "global_tokens": torch.tensor([[0, 0, 0, 0, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0, 0]]).bool(),
    "mask_choice": torch.tensor([0, 1]),
}
CELL = 8  # pixels


def on_config(config):
    fence = {"name": "gallery", "class": "gallery", "format": gallery}
    config.mdx_configs.setdefault("pymdownx.superfences", {})["custom_fences"] = [fence]


def on_page_markdown(markdown: str, **kwargs) -> str:
    return TABLE.sub(lambda match: table_of_readme(match[1]), markdown)


def table_of_readme(head: str) -> str:
    """The table of the README whose first row contains this text."""
    tables = re.findall(r"(?:^\|.*\n)+", README.read_text(encoding="utf-8"), flags=re.MULTILINE)
    found = [table for table in tables if head in table.partition("\n")[0]]
    if len(found) != 1:
        raise PluginError(f"the README must have one table with {head!r} in its first row; got {len(found)}")
    return found[0]


def gallery(source: str, *args, **kwargs) -> str:
    """Renders a fenced block of lines `MASK: what it is for` as cards with pictures."""
    return f'<div class="gallery">{"".join(map(card, source.splitlines()))}</div>'


def card(line: str) -> str:
    text, _, remark = line.partition(": ")
    return f"<figure>{picture(text)}<figcaption><code>{escape(text)}</code><br>{escape(remark)}</figcaption></figure>"


def picture(text: str) -> str:
    """The cells of a mask over two sequences, as SVG. Heads that differ are side by side."""
    mask = masks.parse(text)
    heads = 2 if text.startswith("heads") else 1
    fields = {name: FIELDS[name] for name in mask.fields}
    allowed = mask.dense(LENGTHS, fields=fields, heads=heads)  # (batch, heads, query, key)
    size = int(LENGTHS.sum()) * CELL
    panels = [panel(allowed[:, head], head * (size + CELL)) for head in range(allowed.shape[1])]
    width = len(panels) * (size + CELL) - CELL
    label = f'role="img" aria-label="{escape(text, quote=True)} over sequences of 9 and 6 tokens"'
    return f'<svg {label} width="{width}" height="{size}" viewBox="0 0 {width} {size}">{"".join(panels)}</svg>'


def panel(allowed: Tensor, left: int) -> str:
    """The picture of one head. `allowed` has shape (batch, query, key)."""
    shapes, start = [], 0
    for cells, length in zip(allowed, LENGTHS.tolist(), strict=True):
        corner = f'x="{left + start * CELL}" y="{start * CELL}"'
        shapes.append(f'<rect class="sequence" {corner} width="{length * CELL}" height="{length * CELL}"/>')
        for i, j in cells[:length, :length].nonzero().tolist():
            x, y = left + (start + j) * CELL, (start + i) * CELL
            shapes.append(f'<rect x="{x + 0.5}" y="{y + 0.5}" width="{CELL - 1}" height="{CELL - 1}"/>')
        start += length
    return "".join(shapes)
