"""Attention over packed sequences with PyTorch's fused kernels, for masks that are a band.

Two operators are used: flash attention in half precision, and memory-efficient attention, which also supports float32.
Both have dropout and gradients, and take cumulative lengths as tensors on the device. They are not public API, so each
is tried once before it is used.

The kernels count windows in places, not in positions. With m queries and n keys in a sequence, the query at place i
sees the keys at places i + s - left to i + s + right, where s = n - m ("bottom-right" alignment). s is 0 if queries and
keys are the same tokens. A bound of -1 means unbounded.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .layout import SequenceLayout
from .masks import Band
from .plan import MaskPlan
from .softmax import without_keys

HALF = (torch.float16, torch.bfloat16)
LARGEST_HEAD = 256
LARGEST_TRAINED_HEAD = 192  # the largest with a backward pass on every GPU
FIRST_CAPABILITY = (8, 0)  # the lowest with flash attention and bfloat16
TAIL_PIECES = (128, 512)  # bounds of the sequences that a tail is cut into: at least a kernel's block, never much work
ON_META = (8, 0)  # the compute capability that is assumed for `meta` tensors


class Packed(NamedTuple):
    """Arguments of both operators.

    Attributes:
        query, key, value (`Tensor` of shape `(N, H, D)`): Packed states.
        ends, key_ends (`Tensor` of shape `(S + 1,)`, int32): 0, then the end of each sequence (`cu_seq_lens`).
        longest, key_longest (`int`): Upper bounds of the sequence lengths.
        band (`tuple`): `(left, right)` of the mask.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    ends: Tensor
    key_ends: Tensor
    longest: int
    key_longest: int
    band: Band
    scaling: float
    dropout: float


def _flash(packed: Packed) -> Tensor:
    """Flash attention, `(N, H, D)`."""
    left, right = packed.band
    return torch.ops.aten._flash_attention_forward(
        *packed[:7],
        packed.dropout,
        (left, right) == (None, 0),
        False,
        scale=packed.scaling,
        window_size_left=_window(left, packed.key_longest),
        window_size_right=_window(right, packed.key_longest),
    )[0]


def _efficient(packed: Packed) -> Tensor:
    """Memory-efficient attention, `(N, H, Dv)`."""
    query, key, value, ends, key_ends, longest, key_longest, band, scaling, dropout = packed
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = (states.repeat_interleave(repeats, dim=1) for states in (key, value))
    natural = query.shape[-1] ** -0.5
    if scaling != natural:  # not as an argument, which the backward pass on `meta` lacks in some releases
        query = query * (scaling / natural)
    mask_type = 0 if band == (None, None) else 1
    needs_grad = torch.is_grad_enabled() and any(states.requires_grad for states in (query, key, value))
    output = torch.ops.aten._efficient_attention_forward(
        query.unsqueeze(0),
        key.unsqueeze(0),
        value.unsqueeze(0),
        None,
        ends,
        key_ends,
        longest,
        key_longest,
        dropout,
        mask_type,
        needs_grad,
    )[0]
    return output.squeeze(0)


def _window(bound: int | None, longest: int) -> int:
    """A bound as the kernel expects it: it fits in 32 bits, and is -1 if unbounded."""
    return -1 if bound is None else min(bound, longest)


def attend(
    query: Tensor, key: Tensor, value: Tensor, plan: MaskPlan, *, scaling: float, dropout: float = 0.0
) -> tuple[Tensor, None]:
    """Attention on packed `(N, H, D)` tensors; weights are not computed. See [`unsupported`]."""
    if _is_empty(query) or _is_empty(key):  # the kernels do not accept empty tensors
        return without_keys(query, key, value), None
    of_queries, of_keys = plan.layout, plan.key_layout
    ends, key_ends = plan.derived(_ends)
    longest, key_longest = (_longest(plan, layout) for layout in (of_queries, of_keys))
    band = plan.band or (None, None)
    kernel, _ = _kernel(plan, query, key, value)
    assert kernel is not None
    sees = None
    if kernel is _efficient and of_queries is not of_keys:
        # It leaves outputs and gradients unwritten for sequences without tokens on the other side.
        sees, seen = _has_other_side(of_queries, of_keys), _has_other_side(of_keys, of_queries)
        query, key, value = query.where(sees, 0), key.where(seen, 0), value.where(seen, 0)
    output = kernel(Packed(query, key, value, ends, key_ends, longest, key_longest, band, scaling, dropout))
    return output if sees is None else output.where(sees, 0), None


def _has_other_side(layout: SequenceLayout, other: SequenceLayout) -> Tensor:
    """Bool `(N, 1, 1)`: whether a token's sequence also has tokens in the other layout; False in the tail."""
    return nn.functional.pad(other.lengths > 0, (0, 1))[layout.sequence_ids, None, None]


def _is_empty(states: Tensor) -> bool:
    """Whether the number of tokens is known to be 0. In a graph it may be unknown."""
    return isinstance(states.shape[0], int) and not states.shape[0]


def unsupported(plan: MaskPlan, query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0) -> str | None:
    """The reason why these kernels cannot be used; `None` if they can."""
    return _unsupported_mask(plan) or _kernel(plan, query, key, value)[1]


def _unsupported_mask(plan: MaskPlan) -> str | None:
    band = plan.band
    if band is None:
        return f"it supports `full`, `causal` and windows; got '{plan.mask}'"
    if band == (None, None):
        return None
    if plan.layout is not plan.key_layout:
        return f"between queries and keys of different layouts it supports `full`; got '{plan.mask}'"
    if plan.layout.has_gaps and not set(band) <= {None, 0}:  # gaps do not change which token comes first
        return f"its windows count tokens, not positions, and tokens are missing; got '{plan.mask}'"
    return None


def _kernel(
    plan: MaskPlan, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Callable[[Packed], Tensor] | None, str | None]:
    """The operator to use, or the reason why there is none."""
    if query.device.type not in ("cuda", "meta"):
        return None, f"it runs on CUDA devices; got '{query.device.type}'"
    without_flash = _unsupported_by_flash(query, key, value)
    if without_flash is None:
        return _flash, None
    without_efficient = _unsupported_by_efficient(plan.band, query, value)
    if without_efficient is None:
        return _efficient, None
    return None, f"flash attention: {without_flash}; memory-efficient attention: {without_efficient}"


def _unsupported_by_flash(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    needs_grad = torch.is_grad_enabled() and any(states.requires_grad for states in (query, key, value))
    size, largest = query.shape[-1], LARGEST_TRAINED_HEAD if needs_grad else LARGEST_HEAD
    if query.dtype not in HALF:
        return f"it supports {' and '.join(map(str, HALF))}; got {query.dtype}"
    if value.shape[-1] != size:
        return f"it supports values with the head size of queries, {size}; got {value.shape[-1]}"
    if size % 8 or size > largest:
        return f"it supports head sizes that are multiples of 8 up to {largest}; got {size}"
    if (capability := _capability(query.device.type, query.device.index)) < FIRST_CAPABILITY:
        return f"it supports GPUs of compute capability {FIRST_CAPABILITY} and later; got {capability}"
    return _refusal("_flash", query.device.type, query.device.index, query.dtype)


def _unsupported_by_efficient(band: Band | None, query: Tensor, value: Tensor) -> str | None:
    if band not in ((None, None), (None, 0)):
        return f"it supports `full` and `causal`; got the window {band}"
    if query.dtype not in (*HALF, torch.float32):
        return f"it supports {', '.join(map(str, (*HALF, torch.float32)))}; got {query.dtype}"
    multiple = 4 if query.dtype == torch.float32 else 8
    if query.shape[-1] % multiple or value.shape[-1] % multiple:
        return f"it supports head sizes that are multiples of {multiple}; got {query.shape[-1]} and {value.shape[-1]}"
    if query.dtype == torch.bfloat16 and _capability(query.device.type, query.device.index) < FIRST_CAPABILITY:
        return f"it supports {query.dtype} on GPUs of compute capability {FIRST_CAPABILITY} and later"
    return _refusal("_efficient", query.device.type, query.device.index, query.dtype)


@torch.compiler.assume_constant_result
def _capability(device_type: str, index: int | None) -> tuple[int, int]:
    return ON_META if device_type == "meta" else torch.cuda.get_device_capability(index)


@torch.compiler.assume_constant_result
def _refusal(name: str, device_type: str, index: int | None, dtype: torch.dtype) -> str | None:
    """The reason why an operator does not work here; `None` if it works. It is not public API and may change."""
    return _tried(name, device_type, index, dtype)


@lru_cache
def _tried(name: str, device_type: str, index: int | None, dtype: torch.dtype) -> str | None:
    """Tries an operator on two causal sequences with equal scores, whose outputs are running means of the values."""
    device = torch.device(device_type, index) if index is not None else torch.device(device_type)
    with torch.inference_mode(False), torch.enable_grad():
        query = torch.ones(8, 1, 16, device=device, dtype=dtype)
        value = torch.arange(8, device=device, dtype=dtype)[:, None, None].repeat(1, 1, 16).requires_grad_()
        ends = torch.tensor([0, 3, 8], dtype=torch.int32, device=device)
        try:
            output = globals()[name](Packed(query, query, value, ends, ends, 8, 8, (None, 0), 0.25, 0.0))
            (grad,) = torch.autograd.grad(output.float().sum(), value)
        except torch.OutOfMemoryError:
            raise  # this does not show that the operator fails
        except (AttributeError, NotImplementedError, RuntimeError, TypeError) as error:
            return f"PyTorch's operator does not work here: {error}"
    means = torch.tensor([0, 0.5, 1, 3, 3.5, 4, 4.5, 5], device=device)[:, None, None]
    is_right = device_type == "meta" or bool(((output - means).abs() < 0.05).all() & grad.isfinite().all())
    return None if is_right else "PyTorch's operator gives wrong values here"


def _ends(plan: MaskPlan) -> tuple[Tensor, Tensor]:
    """`cu_seq_lens` of queries and of keys, with tails cut into further sequences."""
    layouts, piece = (plan.layout, plan.key_layout), _tail_piece(plan)
    pieces = max([0, *(-(-layout.num_tokens // piece) for layout in layouts if layout.has_tail)])
    ends = _ends_of(plan.layout, pieces, piece)
    return ends, ends if plan.key_layout is plan.layout else _ends_of(plan.key_layout, pieces, piece)


def _tail_piece(plan: MaskPlan) -> int:
    smallest, largest = TAIL_PIECES
    return max(smallest, min(largest, plan.layout.longest, plan.key_layout.longest))


def _longest(plan: MaskPlan, layout: SequenceLayout) -> int:
    """A bound of the longest sequence and of the pieces of a tail. Kernels accept no bound above the token count."""
    bound = max(layout.longest, _tail_piece(plan)) if layout.has_tail else layout.longest
    return min(bound, layout.num_tokens)


def _ends_of(layout: SequenceLayout, pieces: int, piece: int) -> Tensor:
    """`cu_seq_lens (S + 1 + pieces,)`, int32, with the tail cut into pieces; pieces that are not needed are empty."""
    ends = layout.cu_seq_lens
    if not pieces:
        return ends
    offsets = torch.arange(1, pieces + 1, dtype=torch.int32, device=ends.device) * piece
    return torch.cat([ends, (ends[-1:] + offsets).clamp(max=layout.num_tokens)])
