"""The table of fields, which are tensors of a batch that masks read, and a decorator for a `forward` that takes them.

Shape legend: B sequences, T positions (Tq of queries, Tk of keys), H heads, K spans.
"""

from collections.abc import Callable
from inspect import Parameter, signature
from typing import Any, TypeVar

from torch import Tensor

Forward = TypeVar("Forward", bound=Callable[..., Any])

# The fields that a batch may have, with their shapes. A field with one value per token may have other values for the
# keys, as `key_<name>`. Fields of a decoder are called `decoder_<name>`.
BATCH_FIELDS = {
    "segment_ids": ("B", "T"),
    "prefix_lengths": ("B",),
    "hidden_spans": ("B", "K", 2),
    "global_tokens": ("B", "T"),
    "mask_choice": ("B",),
}
FIELD_SHAPES = BATCH_FIELDS | {
    "attention_mask": ("B", "1 | H", "Tq", "Tk"),  # an explicit mask
    "key_scores": ("B", "1 | H", "Tk"),  # computed by the layers
}
BOOL_FIELDS = ("attention_mask", "global_tokens")
TOKEN_FIELDS = tuple(name for name, shape in FIELD_SHAPES.items() if shape == ("B", "T"))


def takes_fields(*prefixes: str) -> Callable[[Forward], Forward]:
    """Adds the fields of a batch, with each of these prefixes, to the signature of a `forward`.

    The `forward` receives them in its `**kwargs`. The Trainer removes columns that it does not find in the signature.
    """

    def decorate(forward: Forward) -> Forward:
        own = signature(forward)
        fields = [
            Parameter(prefix + name, Parameter.KEYWORD_ONLY, default=None, annotation=Tensor | None)
            for prefix in prefixes
            for name in BATCH_FIELDS
        ]
        *named, keywords = own.parameters.values()
        forward.__signature__ = own.replace(parameters=[*named, *fields, keywords])  # type: ignore[attr-defined]
        return forward

    return decorate
