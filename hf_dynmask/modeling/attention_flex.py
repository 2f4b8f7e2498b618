"""FlexAttention (arXiv:2412.05496) with a `BlockMask` that is made from the plan without evaluating single cells.

Blocks of flat tokens do not end where sequences end: their borders cut the sequences into fragments. Whether a pair of
blocks is empty, partial or full follows from its pairs of fragments of the same sequence. All sizes follow from the
numbers of tokens and of sequences, so nothing is read from a device.

Shape legend: S sequences, N tokens, H heads, F fragments, R and C blocks of queries and keys.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from .fields import Fields
from .layout import SequenceLayout, eager_only, in_heads, packed
from .masks import TopK
from .plan import MaskPlan
from .softmax import without_keys, without_poison

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SMALLEST_HEAD = 16  # the smallest head size that the matrix units of a GPU support
BLOCK_MULTIPLE = 128  # a multiple of the kernels' own tile sizes
FIRST_CAPABILITY = (7, 0)  # the lowest that Triton supports
# Each expression is compiled once per dtype, with or without gradients, for one length or for any length. Floats are
# constants of a kernel (the scaling, the `keep` of `random`). Lengths and the integers of an expression may change.
COMPILING = {"recompile_limit": 256, "accumulated_recompile_limit": 4096, "specialize_float": True}


class Fragments(NamedTuple):
    """The pieces into which block borders cut the sequences of a layout, in flat order. Some may be empty.

    Attributes:
        sequences (`Tensor` of shape `(F,)`): The sequence of each fragment; S if it has none.
        blocks (`Tensor` of shape `(F,)`): The block of each fragment.
        lows, highs (`Tensor` of shape `(F,)`): The first and the last position in each fragment.
        are_whole (bool `Tensor` of shape `(F,)`): Whether a fragment fills its block.
    """

    sequences: Tensor
    blocks: Tensor
    lows: Tensor
    highs: Tensor
    are_whole: Tensor


class _Pair(Fields):
    """The fields of a single pair of tokens, for [`Mask.allowed`] with scalar indices."""

    def __init__(self, tables: dict[str, Tensor], sequence: Tensor, head: Tensor):
        super().__init__(tables)
        self.sequence = sequence
        self.head = head

    def of_sequence(self, name, like, *place):
        return self.tables[name][(self.sequence, *place)]

    def of_query(self, name, i):
        return self.tables[name][self.sequence, i]

    def of_key(self, name, j):
        return self.tables[self._of_keys(name)][self.sequence, j]

    def of_pairs(self, name, i, j):
        table = self.tables[name]
        return table[self.sequence, self.head if table.shape[1] > 1 else 0, i, j]


@eager_only
def attend(
    query: Tensor, key: Tensor, value: Tensor, plan: MaskPlan, *, scaling: float, dropout: float = 0.0
) -> tuple[Tensor, None]:
    """Attention on packed `(N, H, D)` tensors; weights are not computed. See [`unsupported`]."""
    if not (plan.layout.num_tokens and plan.key_layout.num_tokens):  # the kernels do not accept empty tensors
        return without_keys(query, key, value), None
    if query.device.type == "meta":  # no kernel runs; the block mask is made as on CUDA
        block_mask(plan, query.shape[1])
        return without_keys(query, key, value), None
    poisoned = None
    if query.device.type == "cpu":
        query, key, value, poisoned = without_poison(query, key, value, plan.layout, plan.key_layout)
    with torch._dynamo.config.patch(COMPILING):
        output = _compiled("eager" if query.device.type == "cpu" else "inductor")(
            *map(in_heads, (query, key, value)),
            block_mask=block_mask(plan, query.shape[1]),
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
    output = packed(output)
    return output if poisoned is None else output.masked_fill(poisoned, torch.nan), None


def unsupported(plan: MaskPlan, query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0) -> str | None:
    """The reason why FlexAttention cannot be used; `None` if it can. On a CPU it runs unfused, to check results."""
    if plan.mask.holds(TopK):
        return "`topk` looks at all keys of a query at once"
    if dropout:
        return "it has no dropout"
    if query.device.type == "cpu":
        needs_grad = torch.is_grad_enabled() and any(states.requires_grad for states in (query, key, value))
        return "it has no backward pass on CPU" if needs_grad else None
    if query.device.type not in ("cuda", "meta"):
        return f"it runs on CUDA devices and, without gradients, on CPU; got '{query.device.type}'"
    return _unsupported_tensors(plan, query, value) or _unsupported_here(query.device)


def _unsupported_tensors(plan: MaskPlan, query: Tensor, value: Tensor) -> str | None:
    if query.dtype not in DTYPES:
        return f"it supports {', '.join(map(str, DTYPES))}; got {query.dtype}"
    if min(query.shape[-1], value.shape[-1]) < SMALLEST_HEAD:
        return f"it supports head sizes of at least {SMALLEST_HEAD}; got {query.shape[-1]} and {value.shape[-1]}"
    if plan.block_size % BLOCK_MULTIPLE:
        return f"it supports block sizes that are multiples of {BLOCK_MULTIPLE}; got {plan.block_size}"
    return None


def _unsupported_here(device: torch.device) -> str | None:
    if device.type == "meta":
        return None
    if find_spec("triton") is None:
        return "it needs Triton, which is not installed"
    capability = torch.cuda.get_device_capability(device)
    if capability < FIRST_CAPABILITY:
        return f"it supports GPUs of compute capability {FIRST_CAPABILITY} and later; got {capability}"
    return None


@lru_cache
def _compiled(backend: str) -> Callable[..., Tensor]:
    """`flex_attention` compiled; with the backend `"eager"` it runs unfused."""
    return torch.compile(flex_attention, backend=backend, fullgraph=True)  # type: ignore[return-value]


def block_mask(plan: MaskPlan, heads: int) -> BlockMask:
    """The plan's mask for this number of heads over flat tokens, of shape `(1, 1 | H, N, Nk)`; the plan caches it."""
    return plan.derived(_block_mask, heads)


def _block_mask(plan: MaskPlan, heads: int) -> BlockMask:
    kept, full = (torch.stack(blocks)[None] for blocks in zip(*_blocks_by_head(plan, heads), strict=True))
    kv_num_blocks, kv_indices = _listed(kept & ~full)
    full_kv_num_blocks, full_kv_indices = _listed(full)
    q_num_blocks, q_indices = _listed((kept & ~full).mT)
    full_q_num_blocks, full_q_indices = _listed(full.mT)
    return BlockMask(
        seq_lengths=(plan.layout.num_tokens, plan.key_layout.num_tokens),
        kv_num_blocks=kv_num_blocks,
        kv_indices=kv_indices,
        full_kv_num_blocks=full_kv_num_blocks,
        full_kv_indices=full_kv_indices,
        q_num_blocks=q_num_blocks,
        q_indices=q_indices,
        full_q_num_blocks=full_q_num_blocks,
        full_q_indices=full_q_indices,
        BLOCK_SIZE=(plan.block_size, plan.block_size),
        mask_mod=_mask_mod(plan, heads),
    )


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """The number of blocks in each row, `(..., R)`, and their columns, `(..., R, C)`, as a `BlockMask` stores them."""
    width = blocks.shape[-1]
    counts = blocks.cumsum(-1, dtype=torch.int32)
    target = (counts - 1).where(blocks, width).long()
    columns = torch.arange(width, dtype=torch.int32, device=blocks.device).expand(blocks.shape)
    listed = torch.zeros(*blocks.shape[:-1], width + 1, dtype=torch.int32, device=blocks.device)
    return counts[..., -1:].sum(-1, dtype=torch.int32), listed.scatter(-1, target, columns)[..., :width]


def _mask_mod(plan: MaskPlan, heads: int) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """FlexAttention's `mask_mod`: whether a flat query token may see a flat key token."""
    runs = [(run.start, part.mask) for run, part in plan.by_heads(heads)]
    (q_sequence, q_position), (k_sequence, k_position) = (
        (layout.sequence_ids.detach(), layout.positions.detach())  # the compiler needs distinct tensors for both sides
        for layout in (plan.layout, plan.key_layout)
    )
    tables, last = plan.fields.tables, plan.layout.num_sequences - 1

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        sequence = q_sequence[query]
        i, j, fields = q_position[query], k_position[key], _Pair(tables, sequence.clamp(max=last), head)
        allowed = runs[0][1].allowed(i, j, fields)
        for start, mask in runs[1:]:
            allowed = torch.where(head < start, allowed, mask.allowed(i, j, fields))
        return allowed & (sequence == k_sequence[key]) & (sequence <= last)

    return mask_mod


def _blocks_by_head(plan: MaskPlan, heads: int) -> list[tuple[Tensor, Tensor]]:
    """[`_blocks`] of each head, or of only one head if all have the same mask."""
    runs = plan.by_heads(heads)
    if len(runs) == 1 and not _differs_by_head(plan.fields):
        return [_blocks(runs[0][1])]
    found = []
    for run, part in runs:
        each = range(run.stop - run.start)
        if _differs_by_head(part.fields):
            found += [_blocks(part, part.fields.heads(slice(head, head + 1))) for head in each]
        else:
            found += [_blocks(part)] * len(each)
    return found


def _differs_by_head(fields: Fields) -> bool:
    return "attention_mask" in fields.tables and fields.tables["attention_mask"].shape[1] > 1


def _blocks(plan: MaskPlan, fields: Fields | None = None) -> tuple[Tensor, Tensor]:
    """Two bool tensors `(R, C)`: whether some query of a block may see some key, and whether all queries see all keys.

    The first may be True for too many pairs of blocks, the second for too few.
    """
    queries, fields = _fragments(plan.layout, plan.block_size), fields or plan.fields
    keys = queries if plan.key_layout is plan.layout else _fragments(plan.key_layout, plan.block_size)
    last = plan.layout.num_sequences - 1
    if fields:
        fields = fields.of_blocks(queries.sequences.clamp(max=last))
    rows = (len(queries.sequences), 1)  # fields are looked up by the query's sequence, in the first dimension
    lows, highs = (ends.expand(*rows[:1], -1) for ends in (keys.lows, keys.highs))
    always, never = plan.mask.classify_checked(queries.lows.view(rows), queries.highs.view(rows), lows, highs, fields)
    is_same = (queries.sequences.view(rows) == keys.sequences) & (queries.sequences.view(rows) <= last)
    are_whole = queries.are_whole.view(rows) & keys.are_whole
    shape = [-(-layout.num_tokens // plan.block_size) for layout in (plan.layout, plan.key_layout)]

    def of_blocks(pairs: Tensor) -> Tensor:
        """Whether any pair of fragments in a pair of blocks has its flag set: `(F, F)` to `(R, C)`."""
        by_row = pairs.new_zeros(shape[0], pairs.shape[1], dtype=torch.int32).index_add(0, queries.blocks, pairs.int())
        return by_row.new_zeros(shape).index_add(1, keys.blocks, by_row) > 0

    return of_blocks(is_same & ~never), of_blocks(is_same & always & are_whole)


def _fragments(layout: SequenceLayout, block: int) -> Fragments:
    tokens, device = layout.num_tokens, layout.device
    borders = torch.arange(0, tokens, block, device=device)
    ends = layout.lengths.cumsum(0)
    starts = torch.cat([borders, torch.zeros_like(ends[:1]), ends]).sort().values  # the last of `ends` starts the tail
    stops = nn.functional.pad(starts[1:], (0, 1), value=tokens)
    sizes = stops - starts
    first, last = starts.clamp(max=tokens - 1), (stops - 1).clamp(min=0)
    return Fragments(
        sequences=layout.sequence_ids[first].where(sizes > 0, layout.num_sequences),
        blocks=first // block,
        lows=layout.positions[first],
        highs=layout.positions[last],
        are_whole=sizes == block,
    )
