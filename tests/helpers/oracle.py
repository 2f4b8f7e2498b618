"""Expected masks and attention, written from their definitions without any code of hf_dynmask.

Speed does not matter: masks are computed cell by cell in plain Python, attention densely, one sequence at a time.
"""

import ast
import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch

# Predicates for `custom`, for integers and integer tensors; the tests register these functions.
PREDICATES = {
    "every_third": lambda i, j: (i + 2 * j) % 3 == 0,
    "wedge": lambda i, j: j <= 2 * i + 1,
}


@dataclass
class Sequence:
    """One sequence as one head sees it: the positions of its keys, and its own entry of each field."""

    keys: list[int]
    fields: dict
    head: int
    heads: int

    def of_key(self, name, j):
        """A per-token field of a key: under its own name where queries and keys are different sequences."""
        return self.fields[f"key_{name}" if f"key_{name}" in self.fields else name][j]


# allowed(i, j) of each leaf that depends on one pair alone; `at` is the Sequence.
LEAVES = {
    "full": lambda at, i, j: True,
    "causal": lambda at, i, j: j <= i,
    "backward": lambda at, i, j: j >= i,
    "diagonal": lambda at, i, j: j == i,
    "window": lambda at, i, j, left, right=None: i - left <= j <= i + (left if right is None else right),
    "dilated": lambda at, i, j, width, step: abs(i - j) <= width and (i - j) % step == 0,
    "chunk": lambda at, i, j, size: i // size == j // size,
    "chunk_causal": lambda at, i, j, size: j // size <= i // size,
    "prefix": lambda at, i, j, n=None: j < (at.fields["prefix_lengths"] if n is None else n),
    "span": lambda at, i, j, start, length: start <= j < start + length,
    "visible": lambda at, i, j: not any(start <= j < start + length for start, length in at.fields["hidden_spans"]),
    "segments": lambda at, i, j: at.fields["segment_ids"][i] == at.of_key("segment_ids", j),
    "shared_question": lambda at, i, j: at.of_key("segment_ids", j) in (0, at.fields["segment_ids"][i]),
    "global_tokens": lambda at, i, j, n=None: (
        at.fields["global_tokens"][i] or at.of_key("global_tokens", j) if n is None else i < n or j < n
    ),
    "random": lambda at, i, j, keep, seed: mix(mix(mix(seed) ^ i) ^ j) < math.floor(keep * 2**32),
    "dense": lambda at, i, j: at.fields["attention_mask"][i][j],
    "custom": lambda at, i, j, name: PREDICATES[name](i, j),
}


def mix(x):
    """The finaliser of MurmurHash3 for 32 bits."""
    x ^= x >> 16
    x = x * 0x85EBCA6B % 2**32
    x ^= x >> 13
    x = x * 0xC2B2AE35 % 2**32
    return x ^ x >> 16


def rule(node, at, joined: tuple | None = ()) -> Callable[[int, int], bool]:
    """allowed(i, j) of a mask text as Python's own grammar reads it, so that precedence is Python's by construction.

    `joined` are the expressions that `&` joins to this one; `None` inside those themselves, where topk reads as full.
    """

    def beside(other):
        return None if joined is None else (*joined, other)

    match node:
        case ast.BinOp(left=left, op=ast.BitAnd(), right=right):
            one, other = rule(left, at, beside(right)), rule(right, at, beside(left))
            return lambda i, j: one(i, j) and other(i, j)
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            one, other = rule(left, at, joined), rule(right, at, joined)
            return lambda i, j: one(i, j) or other(i, j)
        case ast.UnaryOp(op=ast.Invert(), operand=operand):
            inner = rule(operand, at)
            return lambda i, j: not inner(i, j)
        case ast.Call(func=ast.Name(id="heads"), args=options):
            return rule(options[at.head // (at.heads // len(options))], at, joined)
        case ast.Call(func=ast.Name(id="select"), args=options):
            return rule(options[at.fields["mask_choice"]], at, joined)
        case ast.Call(func=ast.Name(id="topk"), args=[ast.Constant(value=n)]):
            if joined is None:
                return lambda i, j: True
            return topk_rule(at, n, [rule(other, at, joined=None) for other in joined])
        case ast.Call(func=ast.Name(id=name), args=arguments):
            values = [x.id if isinstance(x, ast.Name) else ast.literal_eval(x) for x in arguments]
            return lambda i, j: LEAVES[name](at, i, j, *values)
        case ast.Name(id=name):
            return lambda i, j: LEAVES[name](at, i, j)
    raise ValueError(f"the oracle knows no {ast.dump(node)}")


def topk_rule(at, n, others):
    """The n candidates with the highest score, the first of equal ones; `others` say what a candidate is."""

    @functools.cache
    def kept(i):
        candidates = [j for j in at.keys if all(other(i, j) for other in others)]
        return set(sorted(candidates, key=lambda j: (-at.fields["key_scores"][j], j))[:n])

    return lambda i, j: j in kept(i)


def sequence_mask(text, queries: Iterable[int], keys: Iterable[int] | None = None, fields=None, heads=1):
    """What one sequence's queries may see: bool (heads, queries, keys).

    `queries` and `keys` are the positions that are there, `fields` the sequence's own entry of each field.
    """
    queries = [int(i) for i in queries]
    keys = queries if keys is None else [int(j) for j in keys]
    mask = np.zeros((heads, len(queries), len(keys)), dtype=bool)
    for head in range(heads if differs_by_head(text) else 1):
        own = {name: field_of_head(name, field, head) for name, field in (fields or {}).items()}
        allowed = rule(ast.parse(text, mode="eval").body, Sequence(keys, own, head, heads))
        mask[head:] = np.reshape([allowed(i, j) for i in queries for j in keys], mask[head].shape)
    return mask


def differs_by_head(text):
    return any(name in text for name in ("heads", "dense", "topk"))


def field_of_head(name, field, head):
    """A field of one sequence as plain numbers, reduced to one head where it may differ between heads."""
    field = np.asarray(field)
    if (name, field.ndim) in [("attention_mask", 3), ("key_scores", 2)]:
        field = field[head if len(field) > 1 else 0]
    return field.tolist()


def dense_mask(text, lengths, key_lengths=None, fields=None, heads=1):
    """What a ragged batch's queries may see: bool (batch, heads, queries, keys), False beyond a length."""
    key_lengths = lengths if key_lengths is None else key_lengths
    dense = np.zeros((len(lengths), heads, max(lengths, default=0), max(key_lengths, default=0)), dtype=bool)
    for b, (length, key_length) in enumerate(zip(lengths, key_lengths, strict=True)):
        own = {name: field[b] for name, field in (fields or {}).items()}
        dense[b, :, :length, :key_length] = sequence_mask(text, range(length), range(key_length), own, heads)
    return dense


def sequence_attention(query, key, value, allowed, scaling=None, key_scores=None, apply_mask_to="scores"):
    """Softmax attention of one sequence over its allowed keys; a query that may see no key gets 0.

    query (heads, query, D), key (kv_heads, key, D), value (kv_heads, key, Dv), allowed (1 | heads, query, key) of bool,
    key_scores (1 | heads, key): added to what each query has for the key.
    """
    groups = query.shape[0] // key.shape[0]  # query head h reads key/value head h // groups
    key, value, allowed = key.repeat_interleave(groups, 0), value.repeat_interleave(groups, 0), torch.as_tensor(allowed)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = torch.einsum("hid,hjd->hij", query, key) * scaling
    if key_scores is not None:
        scores = scores + key_scores[:, None]
    if scores.numel():  # any shift cancels in the ratio below; this one keeps exp() in range
        scores = scores - scores.detach().amax(-1, keepdim=True)
    weights = scores.exp()
    if apply_mask_to == "scores":
        weights = weights * allowed
    total = weights.sum(-1, keepdim=True)
    weights = weights / torch.where(total > 0, total, 1)
    return torch.einsum("hij,hjd->hid", weights * allowed, value)
