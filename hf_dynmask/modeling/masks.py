"""The mask language: small expressions for which query may see which key.

`parse("causal & window(255, 0)")` and `causal() & window(255, 0)` make the same mask. Masks also classify ranges of
indices, which gives the block structure of any expression without evaluating single cells.
"""

from .mask_expressions import MAX_DEPTH, And, Band, Mask, Not, Or, allowed_by_head, head_runs
from .mask_leaves import (
    Backward,
    Causal,
    Chunk,
    ChunkCausal,
    Custom,
    Dense,
    Diagonal,
    Dilated,
    Full,
    GlobalTokens,
    Heads,
    Leaf,
    Prefix,
    Random,
    Segments,
    Select,
    SharedQuestion,
    Span,
    TopK,
    Visible,
    Window,
    register,
)
from .mask_text import parse

full = Full
causal = Causal
backward = Backward
diagonal = Diagonal
window = Window
dilated = Dilated
chunk = Chunk
chunk_causal = ChunkCausal
prefix = Prefix
span = Span
visible = Visible
segments = Segments
shared_question = SharedQuestion
global_tokens = GlobalTokens
random = Random
dense = Dense
heads = Heads
select = Select
topk = TopK
custom = Custom

__all__ = [
    "And",
    "Backward",
    "Band",
    "Causal",
    "Chunk",
    "ChunkCausal",
    "Custom",
    "Dense",
    "Diagonal",
    "Dilated",
    "Full",
    "GlobalTokens",
    "Heads",
    "Leaf",
    "MAX_DEPTH",
    "Mask",
    "Not",
    "Or",
    "Prefix",
    "Random",
    "Segments",
    "Select",
    "SharedQuestion",
    "Span",
    "TopK",
    "Visible",
    "Window",
    "allowed_by_head",
    "backward",
    "causal",
    "chunk",
    "chunk_causal",
    "custom",
    "dense",
    "diagonal",
    "dilated",
    "full",
    "global_tokens",
    "head_runs",
    "heads",
    "parse",
    "prefix",
    "random",
    "register",
    "segments",
    "select",
    "shared_question",
    "span",
    "topk",
    "visible",
    "window",
]
