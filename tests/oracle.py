"""What masks and attention must give, written from their definitions alone: no code of hf_dynmask is used here.

Speed is no aim: masks are worked out cell by cell in numpy, attention densely in float64, one sequence at a time.
"""

import ast

import numpy as np
import torch

# allowed(i, j) of each leaf; i and j are index arrays that broadcast, `row` holds the fields of one sequence.
LEAVES = {
    "full": lambda i, j, row: (i >= 0) & (j >= 0),
    "causal": lambda i, j, row: j <= i,
    "backward": lambda i, j, row: j >= i,
    "diagonal": lambda i, j, row: j == i,
    "window": lambda i, j, row, left, right=None: (i - left <= j) & (j <= i + (left if right is None else right)),
    "dilated": lambda i, j, row, width, step: (abs(i - j) <= width) & ((i - j) % step == 0),
    "chunk": lambda i, j, row, size: i // size == j // size,
    "chunk_causal": lambda i, j, row, size: j // size <= i // size,
    "prefix": lambda i, j, row, n=None: (i >= 0) & (j < (row["prefix_lengths"] if n is None else n)),
    "span": lambda i, j, row, start, length: (i >= 0) & (start <= j) & (j < start + length),
    "visible": lambda i, j, row: (i >= 0) & ~_hidden(j, row["hidden_spans"]),
    "segments": lambda i, j, row: row["segment_ids"][i] == row["segment_ids"][j],
}


def _hidden(j, spans):
    return np.any([np.zeros_like(j, dtype=bool)] + [(start <= j) & (j < start + length) for start, length in spans], 0)


def _evaluate(node, i, j, row):
    """Evaluate a mask text as Python's own grammar reads it, so that precedence is Python's by construction."""
    match node:
        case ast.BinOp(left=left, op=ast.BitAnd(), right=right):
            return _evaluate(left, i, j, row) & _evaluate(right, i, j, row)
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _evaluate(left, i, j, row) | _evaluate(right, i, j, row)
        case ast.UnaryOp(op=ast.Invert(), operand=operand):
            return ~_evaluate(operand, i, j, row)
        case ast.Call(func=ast.Name(id=name), args=arguments):
            return LEAVES[name](i, j, row, *map(ast.literal_eval, arguments))
        case ast.Name(id=name):
            return LEAVES[name](i, j, row)
    raise ValueError(f"the oracle knows no {ast.dump(node)}")


def sequence_mask(text, length, key_length=None, row=None):
    """What one sequence's queries may see: bool (length, key_length)."""
    i = np.arange(length)[:, None]
    j = np.arange(length if key_length is None else key_length)[None, :]
    return _evaluate(ast.parse(text, mode="eval").body, i, j, row)


def row_fields(fields, b):
    return {name: np.asarray(field)[b] for name, field in (fields or {}).items()}


def dense_mask(text, lengths, key_lengths=None, fields=None):
    """What a ragged batch's queries may see: bool (batch, max(lengths), max(key_lengths)), False beyond a length."""
    key_lengths = lengths if key_lengths is None else key_lengths
    dense = np.zeros((len(lengths), max(lengths, default=0), max(key_lengths, default=0)), dtype=bool)
    for b, (length, key_length) in enumerate(zip(lengths, key_lengths, strict=True)):
        dense[b, :length, :key_length] = sequence_mask(text, length, key_length, row_fields(fields, b))
    return dense


def sequence_attention(query, key, value, allowed, scaling=None):
    """Softmax attention of one sequence over its allowed keys; a query that may see no key gets 0.

    query (heads, query, D), key (kv_heads, key, D), value (kv_heads, key, Dv), allowed (query, key) of bool.
    """
    groups = query.shape[0] // key.shape[0]  # query head h reads key/value head h // groups
    key, value = key.repeat_interleave(groups, 0), value.repeat_interleave(groups, 0)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = torch.einsum("hid,hjd->hij", query, key) * scaling
    if scores.numel():  # any shift cancels in the ratio below; this one keeps exp() in range
        scores = scores - scores.detach().amax(-1, keepdim=True)
    weights = scores.exp() * torch.as_tensor(allowed)
    total = weights.sum(-1, keepdim=True)
    return torch.einsum("hij,hjd->hid", weights / torch.where(total > 0, total, 1), value)
