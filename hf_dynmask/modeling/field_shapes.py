"""The one table of fields, the tensors that come with a batch and that masks read; and how a `forward` takes them.

Shape legend: B sequences, T positions (Tq of queries, Tk of keys), H heads, K spans.
"""

from collections.abc import Callable
from inspect import Parameter, signature
from typing import Any, TypeVar

from torch import Tensor

Forward = TypeVar("Forward", bound=Callable[..., Any])

# The fields that a batch may have, each with its shape. Fields of one value a token may come apart for the keys, as
# `key_<name>`, and for the decoder, as `decoder_<name>`.
BATCH_FIELDS = {
    "segment_ids": ("B", "T"),
    "prefix_lengths": ("B",),
    "hidden_spans": ("B", "K", 2),
    "global_tokens": ("B", "T"),
    "mask_choice": ("B",),
}
FIELD_SHAPES = BATCH_FIELDS | {
    "attention_mask": ("B", "1 | H", "Tq", "Tk"),  # an explicit one
    "key_scores": ("B", "1 | H", "Tk"),  # which layers compute
}
BOOL_FIELDS = ("attention_mask", "global_tokens")
TOKEN_FIELDS = tuple(name for name, shape in FIELD_SHAPES.items() if shape == ("B", "T"))


def takes_fields(*prefixes: str) -> Callable[[Forward], Forward]:
    """Put the fields of a batch, under names with these prefixes, into the signature of a `forward`.

    It gets them among its `**kwargs`. In the signature the Trainer finds the columns that it must not remove.
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
