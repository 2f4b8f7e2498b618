"""Token ids to embeddings.

Shape legend: N real tokens, E embedding size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .layout import Group, SequenceLayout, eager_only, out_of_range


def looked_up(name: str, table: nn.Module, ids: Tensor) -> Tensor:
    """Rows of a table by ids, which come as `name`.

    Raises:
        ValueError: On a CPU: the table has no such row. Other devices are not read.
    """
    try:
        return table(ids)
    except IndexError as error:
        weight: Any = table.weight  # PEFT's tables have it as a property
        raise out_of_range(name, ids, weight.shape[0]) from error


def flat_embeds(inputs_embeds: Tensor, size: int, layout: SequenceLayout) -> Tensor:
    """Embeddings in the batch's layout as `(1, N, E)`, where E must be `size`."""
    if inputs_embeds.shape[-1] != size:
        raise ValueError(
            f"`inputs_embeds` must have shape (B, T, embedding_size={size}); got {tuple(inputs_embeds.shape)}"
        )
    return layout.flatten_values(inputs_embeds)


def embed_tokens(table: nn.Module, input_ids: Tensor, layout: SequenceLayout) -> Tensor:
    """Embeddings `(1, N, E)` of token ids `(1, N)`.

    NEFTune (arXiv:2310.05914) is a hook on the table, which scales its noise by the shape of the table's output:
    `alpha / sqrt(length * E)`. With NEFTune, the table is therefore called on rows of one sequence each. Sequences of
    the same length share a call.
    """
    if table.training and hasattr(table, "neftune_noise_alpha"):
        return _embed_rows(table, input_ids, layout)
    return looked_up("input_ids", table, input_ids)


@eager_only
def _embed_rows(table: nn.Module, input_ids: Tensor, layout: SequenceLayout) -> Tensor:
    groups = [group for group in layout.groups if group.length]
    tail = layout.num_tokens - sum(layout.sizes)
    groups += [Group(tail, 1)] if tail else []
    if not groups:  # without rows, the hook would divide by 0
        return nn.functional.embedding(input_ids, table.get_parameter("weight"))
    pieces = input_ids[0].split([group.length * group.count for group in groups])
    rows = (ids.view(group.count, group.length) for ids, group in zip(pieces, groups, strict=True))
    return torch.cat([looked_up("input_ids", table, ids).flatten(0, 1) for ids in rows])[None]
