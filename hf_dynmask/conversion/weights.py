"""Renames the weights of a stock model to ours and back, and splits, joins or transposes them where needed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class Link(NamedTuple):
    """Our names for the weights of one stock module, or for one stock tensor.

    Args:
        ours (`tuple[str, ...]`): Our names. If there are several, they hold equal parts of the outputs, in this order.
        transposed (`bool`): Whether the stock weight is `(inputs, outputs)`, as in transformers' `Conv1D`.
    """

    ours: tuple[str, ...]
    transposed: bool = False

    def split(self, theirs: Tensor) -> list[Tensor]:
        """Splits a stock tensor into ours. If there is only one part, it is returned without a copy."""
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
    """The weights of a stock model under our names. Unknown weights keep their names."""
    ours = {}
    for name, weight in theirs.items():
        link = _link_of(name, links)
        ours |= zip(link.ours, link.split(weight), strict=False)  # missing parts are reported later
    return ours


def to_theirs(ours: Mapping[str, Tensor], links: Links, names: Iterable[str]) -> dict[str, Tensor]:
    """Our weights under the stock `names`. Weights that belong to none of them keep their names."""
    left, theirs = dict(ours), {}
    for name in names:
        link = _link_of(name, links)
        if parts := [left.pop(part) for part in link.ours if part in left]:
            theirs[name] = link.join(parts)
    return left | theirs


def _link_of(name: str, links: Links) -> Link:
    """The link of a stock tensor, found by its own name or by the name of its module."""
    module, _, tensor = name.rpartition(".")
    if name in links or module not in links:
        return links.get(name, Link((name,)))
    link = links[module]
    return link._replace(ours=tuple(f"{ours}.{tensor}" for ours in link.ours))
