"""Flash attention over packed sequences, for masks that are a band: `torch.nn.attention.varlen`, or flash-attn.

Both kernels take windows as places: the query at place i of m sees keys at places i + s - left to i + s + right of n,
where s = n - m ("bottom-right"), 0 where queries and keys are the same tokens; -1 is unbounded.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from .layout import eager_only
from .masks import Band
from .plan import MaskPlan

DTYPES = (torch.float16, torch.bfloat16)
LARGEST_HEAD = 256
LARGEST_TRAINED_HEAD = 192  # of the backward pass on every GPU
FIRST_CAPABILITY = (8, 0)
# torch 2.11 groups heads unasked.
GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}


@eager_only
def attend(
    query: Tensor, key: Tensor, value: Tensor, plan: MaskPlan, *, scaling: float, dropout: float = 0.0
) -> tuple[Tensor, None]:
    """Attention on flat `(1, H, N, D)` tensors; weights are not computed. See [`unsupported`]."""
    if not (plan.layout.num_tokens and plan.key_layout.num_tokens):  # which the kernels do not take
        return query @ key[:, :1].mT @ value[:, :1], None
    order, cu_seq_lens_k = plan.derived(_keys_by_query_sequence)
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
    if order is not None:
        k, v = k.index_select(0, order), v.index_select(0, order)
    longest = plan.layout.max_length, plan.key_layout.max_length
    packed = q, k, v, plan.layout.cu_seq_lens, cu_seq_lens_k, *longest
    window = _window(plan.mask.band(), longest[1])
    if _torch_serves(dropout):
        grouped = GROUPED if q.shape[1] != k.shape[1] else {}
        output = varlen_attn(*packed, scale=scaling, window_size=window, **grouped)
        assert isinstance(output, Tensor)  # not a pair: nothing else was asked for
    else:
        attend_packed = import_module("flash_attn").flash_attn_varlen_func
        output = attend_packed(*packed, dropout_p=dropout, softmax_scale=scaling, window_size=window)
    return output.transpose(0, 1).unsqueeze(0), None


def unsupported(plan: MaskPlan, query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0) -> str | None:
    """Why these kernels cannot serve, or `None`: they can."""
    return (
        _unsupported_mask(plan) or _unsupported_tensors(query, key, value) or _unsupported_here(query.device, dropout)
    )


def _unsupported_mask(plan: MaskPlan) -> str | None:
    band = plan.mask.band()
    if band is None:
        return f"it serves `full`, `causal` and windows; got '{plan.mask}'"
    if band == (None, None):
        return None
    if plan.layout is not plan.key_layout:
        return f"between queries and keys of different layouts it serves `full`; got '{plan.mask}'"
    if plan.layout.has_gaps and not set(band) <= {None, 0}:  # these say no more than before and after
        return f"its windows count tokens, not positions, and tokens are missing; got '{plan.mask}'"
    return None


def _unsupported_tensors(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    needs_grad = torch.is_grad_enabled() and any(states.requires_grad for states in (query, key, value))
    size, largest = query.shape[-1], LARGEST_TRAINED_HEAD if needs_grad else LARGEST_HEAD
    if query.device.type != "cuda":
        return f"it runs on CUDA devices; got '{query.device.type}'"
    if query.dtype not in DTYPES:
        return f"it takes {' and '.join(map(str, DTYPES))}; got {query.dtype}"
    if value.shape[-1] != size:
        return f"it takes values of the head size of queries, {size}; got {value.shape[-1]}"
    if size % 8 or size > largest:
        return f"it takes head sizes that are multiples of 8 up to {largest}; got {size}"
    return None


def _unsupported_here(device: torch.device, dropout: float) -> str | None:
    capability = torch.cuda.get_device_capability(device)
    if capability < FIRST_CAPABILITY:
        return f"it takes GPUs of compute capability {FIRST_CAPABILITY} and later; got {capability}"
    if not _torch_serves(dropout) and find_spec("flash_attn") is None:
        return (
            f"{'its dropout is' if dropout else 'without flash attention in PyTorch it is'} flash-attn's, not installed"
        )
    return None


def _torch_serves(dropout: float) -> bool:
    """Whether PyTorch's own kernel does, not flash-attn's."""
    return not dropout and torch.backends.cuda.is_flash_attention_available()


def _window(band: Band | None, longest: int) -> tuple[int, int]:
    """`(left, right)` as the kernels take them: 32-bit, -1 for unbounded."""
    assert band is not None
    left, right = (-1 if bound is None else min(bound, longest) for bound in band)
    return left, right


def _keys_by_query_sequence(plan: MaskPlan) -> tuple[Tensor | None, Tensor]:
    """Places that bring keys into the order of the queries' sequences (`None`: they have it), and where those end."""
    queries, keys = plan.layout, plan.key_layout
    if queries is keys:
        return None, keys.cu_seq_lens
    partners = keys.rank.argsort()[queries.rank].tolist()
    arranged = keys.reordered(partners)
    return None if arranged is keys else keys.token_order(partners), arranged.cu_seq_lens
