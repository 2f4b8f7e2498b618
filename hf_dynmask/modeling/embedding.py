"""Token ids to embeddings.

Shape legend: N real tokens, E embedding size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .layout import Group, SequenceLayout, eager_only


def embed_tokens(table: nn.Module, input_ids: Tensor, layout: SequenceLayout) -> Tensor:
    """Embeddings `(1, N, E)` of token ids `(1, N)`.

    NEFTune (arXiv:2310.05914) is a hook on the table, which scales its noise by the shape of the table's output:
    `alpha / sqrt(length * E)`. With NEFTune, the table is therefore called on rows of one sequence each. Sequences of
    the same length share a call.
    """
    if table.training and hasattr(table, "neftune_noise_alpha"):
        return _embed_rows(table, input_ids, layout)
    return table(input_ids)


@eager_only
def _embed_rows(table: nn.Module, input_ids: Tensor, layout: SequenceLayout) -> Tensor:
    groups = [group for group in layout.groups if group.length]
    tail = layout.num_tokens - sum(layout.sizes)
    groups += [Group(tail, 1)] if tail else []
    if not groups:  # without rows, the hook would divide by 0
        return nn.functional.embedding(input_ids, table.get_parameter("weight"))
    pieces = input_ids[0].split([group.length * group.count for group in groups])
    rows = [table(ids.view(group.count, group.length)).flatten(0, 1) for ids, group in zip(pieces, groups, strict=True)]
    return torch.cat(rows)[None]
