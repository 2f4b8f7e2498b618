"""Opaque operators for graphs of `torch.compile` and `torch.export`.

An operator runs the same code as without a graph, and raises the same errors.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch

PACKAGE = re.sub(r"[^A-Za-z0-9_]", "_", __name__.rpartition(".")[0] or __name__)
# An operator is removed together with its library. The list survives a second execution of this file.
_libraries: list[torch.library.Library] = [*globals().get("_libraries", ())]


def operator(
    schema: str, run: Callable, shapes: Callable, gradients: tuple[Callable, Callable] | None = None
) -> Callable:
    """Registers an operator.

    Args:
        schema (`str`): Its name, arguments and results.
        run (`Callable`): Its implementation on all devices.
        shapes (`Callable`): Its fake implementation, whose results have the right shapes, dtypes and strides.
        gradients (`tuple[Callable, Callable]`, *optional*): Its backward pass, and the function that saves its inputs.
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
    """A namespace that does not yet have an operator of this name.

    The code of a checkpoint registers its own operators beside those of an installed package. So does a file that is
    executed again, while existing graphs continue to call the earlier operators.
    """
    namespace = PACKAGE
    while hasattr(getattr(torch.ops, namespace), operator_name):
        namespace += "_"
    return namespace
