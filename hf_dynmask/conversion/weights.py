"""Weights of a stock model under our names and back: the same numbers, split, joined or transposed where need be."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class Link(NamedTuple):
    """Where the weights of one stock module, or one stock tensor, stand in our model.

    Args:
        ours (`tuple[str, ...]`): Names of ours; of several each holds an equal part of the outputs, in this order.
        transposed (`bool`): Whether the stock weight is `(inputs, outputs)`, as that of transformers' `Conv1D` is.
    """

    ours: tuple[str, ...]
    transposed: bool = False

    def split(self, theirs: Tensor) -> list[Tensor]:
        """The tensors of ours that one of theirs is; itself, without a copy, where it is one of ours."""
        if self.transposed:
            theirs = theirs.t()
        parts = theirs.chunk(len(self.ours))
        if len(parts) == 1:
            return [theirs.contiguous()]
        return [part.clone(memory_format=torch.contiguous_format) for part in parts]

    def join(self, ours: list[Tensor]) -> Tensor:
        """Undoes [`split`]."""
        joined = torch.cat(ours) if len(ours) > 1 else ours[0]
        return joined.t().contiguous() if self.transposed else joined


Links = Mapping[str, Link]


def to_ours(theirs: Mapping[str, Tensor], links: Links) -> dict[str, Tensor]:
    """The weights of a stock model under our names; an unknown one keeps its name."""
    ours = {}
    for name, weight in theirs.items():
        link = _link_of(name, links)
        ours |= zip(link.ours, link.split(weight), strict=False)  # what is left without a part is missed later on
    return ours


def to_theirs(ours: Mapping[str, Tensor], links: Links, names: Iterable[str]) -> dict[str, Tensor]:
    """Our weights under the stock `names`; one that belongs to none of them keeps its name."""
    left, theirs = dict(ours), {}
    for name in names:
        link = _link_of(name, links)
        if parts := [left.pop(part) for part in link.ours if part in left]:
            theirs[name] = link.join(parts)
    return left | theirs


def _link_of(name: str, links: Links) -> Link:
    """The link of a stock tensor, which may be known by the name of its module."""
    module, _, tensor = name.rpartition(".")
    if name in links or module not in links:
        return links.get(name, Link((name,)))
    link = links[module]
    return link._replace(ours=tuple(f"{ours}.{tensor}" for ours in link.ours))
