"""Operators that a graph of `torch.compile` or `torch.export` calls and does not look into.

Inside they are what runs without a graph, errors included.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch

PACKAGE = re.sub(r"[^A-Za-z0-9_]", "_", __name__.rpartition(".")[0] or __name__)
_libraries: list[torch.library.Library] = [*globals().get("_libraries", ())]  # operators go with theirs


def operator(
    schema: str, run: Callable, shapes: Callable, gradients: tuple[Callable, Callable] | None = None
) -> Callable:
    """An operator of the graph.

    Args:
        schema (`str`): Its name, arguments and results.
        run (`Callable`): What it does, on any device.
        shapes (`Callable`): Results of the same shapes, dtypes and strides, for tensors without values.
        gradients (`tuple[Callable, Callable]`, *optional*): Its backward pass, and what that is given.
    """
    name = schema.partition("(")[0]
    library = torch.library.Library(_free_namespace(name), "FRAGMENT")
    _libraries.append(library)
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe))
    library.impl(name, run, "CompositeExplicitAutograd")
    full_name = f"{library.ns}::{name}"
    torch.library.register_fake(full_name, shapes, lib=library)
    if gradients is not None:
        torch.library.register_autograd(full_name, gradients[0], setup_context=gradients[1], lib=library)
    return getattr(getattr(torch.ops, library.ns), name).default


def _free_namespace(operator_name: str) -> str:
    """Code that travels with a checkpoint has operators of its own, beside those of an installed package, and so has
    code that is executed again: graphs that were made before go on with theirs."""
    namespace = PACKAGE
    while hasattr(getattr(torch.ops, namespace), operator_name):
        namespace += "_"
    return namespace
