"""The key-value cache: which columns of a batch it holds, and the plans of masks over these columns.

Shape legend: B rows; T columns seen so far, the current ones included; Tq current columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from .field_shapes import TOKEN_FIELDS
from .fields import Fields, key_name
from .layout import SequenceLayout
from .masks import Mask
from .plan import MaskPlan

FAR = 2**40  # a position that no sequence reaches
CACHE_NAMES = ("cache", "past_key_values")
# What this release of transformers calls a cache in arguments and outputs: `past_key_values` before 5.24.
CACHE_NAME = next(name for name in CACHE_NAMES if name in CausalLMOutputWithPast.__dataclass_fields__)


def given_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """The cache, given under one of its two names.

    Raises:
        ValueError: It is given under both names.
    """
    if cache is not None and past_key_values is not None:
        raise ValueError("`cache` and `past_key_values` are two names of one argument; got both")
    return past_key_values if cache is None else cache


def renamed_cache(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments, with a cache under the name that this release of transformers uses."""
    others = {name: value for name, value in arguments.items() if name not in CACHE_NAMES}
    cache = given_cache(*(arguments.get(name) for name in CACHE_NAMES))
    return others if cache is None else others | {CACHE_NAME: cache}


def output_with_cache(output_class: type, cache: Cache | None, **fields) -> Any:
    """An output of transformers with the cache under both of its names."""
    output = output_class(**fields, **{CACHE_NAME: cache})
    if cache is not None and CACHE_NAME != "cache":
        output.cache = cache
    return output


def num_cached_tokens(cache: Cache | None) -> int:
    """The number of columns that the cache has seen, whether it still holds them or has dropped them."""
    return 0 if cache is None else int(cache.get_seq_length())


def last_columns(whole: SequenceLayout, width: int) -> SequenceLayout:
    """Layout of the last `width` columns of a batch; tokens keep their positions in the whole."""
    return whole.columns(whole.shape[1] - width, whole.shape[1])


def cached_plans(
    masks: Sequence[Mask],
    queries: SequenceLayout,
    whole: SequenceLayout,
    cache: Cache,
    fields: Mapping[str, Tensor],
) -> list[MaskPlan]:
    """Each layer's plan, for the current queries and the key columns that the layer's cache returns.

    Args:
        masks (`list[Mask]`): One mask per layer.
        queries (`SequenceLayout`): Layout of the current columns, `(B, Tq)`.
        whole (`SequenceLayout`): Layout of all columns seen so far, `(B, T)`.
        cache (`Cache`): Gives the key columns of each layer.
        fields (`dict[str, Tensor]`): Fields of all columns.

    Raises:
        ValueError: A mask lets a query see a token that comes later, or one that the cache has dropped.
    """
    width, total = queries.shape[1], whole.shape[1]
    plans: dict[tuple[Mask, int, int], MaskPlan] = {}
    chosen = []
    for layer, mask in enumerate(masks):
        length, start = cache.get_mask_sizes(width, layer)
        start, stop = int(start), min(int(start) + int(length), total)
        key = (mask, start, stop)
        if key not in plans:
            keys = whole.columns(start, stop)
            of_columns = {}
            for name, field in fields.items():
                if name in TOKEN_FIELDS:
                    of_columns |= {name: field[:, total - width :], key_name(name): field[:, start:stop]}
                else:
                    of_columns[name] = field
            plan = MaskPlan(mask, queries, keys, fields=of_columns)
            _check_keys_exist(plan, whole, start)
            plans[key] = plan
        chosen.append(plans[key])
    return chosen


def _check_keys_exist(plan: MaskPlan, whole: SequenceLayout, start: int) -> None:
    """Raises if a query may see a token that comes later, or one before column `start`."""
    if not plan.layout.num_tokens or "attention_mask" in plan.mask.fields:  # an explicit mask covers given tokens only
        return
    if start == 0 and plan.band is not None and plan.band[1] == 0:  # nothing later is seen, and nothing is dropped
        return
    first, last = (ends[:, None] for ends in _extreme_positions(plan.layout))
    ends = _extreme_positions(whole)[1][:, None]
    fields = _with_unknown_tokens(plan.fields, whole.num_positions)
    _, never = plan.mask.classify_checked(first, last, ends + 1, torch.full_like(ends, FAR), fields)
    real = (last >= 0).expand_as(never)
    if not never[real].all():
        raise ValueError(
            f"the mask '{plan.mask}' lets a token see later ones, which a cache does not hold yet. "
            "Join it with `causal`, make prefixes no longer than the prompt, or set use_cache=False"
        )
    if start == 0:
        return
    dropped = whole.columns(0, start)
    before = _extreme_positions(dropped)[1][:, None]
    _, never = plan.mask.classify_checked(first, last, torch.zeros_like(before), before.clamp(min=0), plan.fields)
    if not never[real & (before >= 0)].all():
        raise ValueError(
            f"the mask '{plan.mask}' lets a token see tokens that the cache has dropped; use a cache without a sliding "
            "window, or one with a wider window"
        )


def _extreme_positions(layout: SequenceLayout) -> tuple[Tensor, Tensor]:
    """Position of the first and of the last token of each sequence `(S,)`; -1 for an empty one."""
    ends = layout.cu_seq_lens.long()
    empty = layout.lengths == 0
    positions = torch.nn.functional.pad(layout.positions, (0, 1), value=-1)
    first, last = ends[:-1].clamp(max=layout.num_tokens), (ends[1:] - 1).clamp(min=0)
    return positions[first].masked_fill(empty, -1), positions[last].masked_fill(empty, -1)


def _with_unknown_tokens(fields: Fields, num_positions: int) -> Fields:
    """The fields with two more tokens, of the smallest and the largest int64: later tokens may have any value."""
    tables = dict(fields.tables)
    for name, table in tables.items():
        if name.removeprefix(key_name("")) in TOKEN_FIELDS:
            limits = torch.iinfo(torch.int64)
            known = torch.nn.functional.pad(table.long(), (0, num_positions - table.shape[1]))
            unknown = known.new_tensor([limits.min, limits.max]).expand(known.shape[0], 2)
            tables[name] = torch.cat([known, unknown], dim=1)
    return Fields(tables)
