"""Renames weights of a stock model to ours and back, splitting, joining or transposing them where needed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class Link(NamedTuple):
    """The names in our model of the weights of one stock module, or of one stock tensor.

    Args:
        ours (`tuple[str, ...]`): Our names; several hold equal parts of the outputs, in this order.
        transposed (`bool`): Whether the stock weight is `(inputs, outputs)`, as in transformers' `Conv1D`.
    """

    ours: tuple[str, ...]
    transposed: bool = False

    def split(self, theirs: Tensor) -> list[Tensor]:
        """Our tensors that make up one of theirs; the tensor itself, without a copy, if it is a single one."""
        if self.transposed:
            theirs = theirs.t()
        parts = theirs.chunk(len(self.ours))
        if len(parts) == 1:
            return [theirs.contiguous()]
        return [part.clone(memory_format=torch.contiguous_format) for part in parts]

    def join(self, ours: list[Tensor]) -> Tensor:
        """The inverse of [`split`]."""
        joined = torch.cat(ours) if len(ours) > 1 else ours[0]
        return joined.t().contiguous() if self.transposed else joined


Links = Mapping[str, Link]


def to_ours(theirs: Mapping[str, Tensor], links: Links) -> dict[str, Tensor]:
    """The weights of a stock model under our names; an unknown one keeps its name."""
    ours = {}
    for name, weight in theirs.items():
        link = _link_of(name, links)
        ours |= zip(link.ours, link.split(weight), strict=False)  # an incomplete one is reported as missing later
    return ours


def to_theirs(ours: Mapping[str, Tensor], links: Links, names: Iterable[str]) -> dict[str, Tensor]:
    """Our weights under the stock `names`; a weight that belongs to none of them keeps its name."""
    left, theirs = dict(ours), {}
    for name in names:
        link = _link_of(name, links)
        if parts := [left.pop(part) for part in link.ours if part in left]:
            theirs[name] = link.join(parts)
    return left | theirs


def _link_of(name: str, links: Links) -> Link:
    """The link of a stock tensor, under its own name or that of its module."""
    module, _, tensor = name.rpartition(".")
    if name in links or module not in links:
        return links.get(name, Link((name,)))
    link = links[module]
    return link._replace(ours=tuple(f"{ours}.{tensor}" for ours in link.ours))
