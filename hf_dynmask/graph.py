"""Batches in the graphs of `torch.compile` and `torch.export`, which know tensors by their sizes alone.

One size of a graph is a value of the batch: how many tokens are real. The layout of a batch and attention are operators
that a graph calls and does not look into; inside they are what runs without a graph, errors included.

Shape legend: B rows of width T, S sequences, N real tokens in M = B * T places; H heads, D and Dv head sizes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .attention import attend as attend_outside
from .layout import IGNORE_INDEX, SequenceLayout, begins
from .masks import parse
from .plan import MaskPlan


def _free_namespace(package: str) -> str:
    """Code that travels with a checkpoint has operators of its own, beside those of an installed package, and so has
    code that is executed anew: graphs that were made before go on with theirs."""
    name = re.sub(r"[^A-Za-z0-9_]", "_", package)
    while hasattr(getattr(torch.ops, name), "layout"):
        name += "_"
    return name


NAMESPACE = _free_namespace(__name__.rpartition(".")[0] or __name__)
LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
_libraries: list[torch.library.Library] = [*globals().get("_libraries", ()), LIBRARY]  # operators go with theirs


def operator(schema: str, run: Callable, shapes: Callable) -> Callable:
    """An operator that a graph does not look into.

    Args:
        schema (`str`): Its name, arguments and results.
        run (`Callable`): What it does, on any device.
        shapes (`Callable`): Results of the same shapes, dtypes and strides, for tensors without values.
    """
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe))
    name = schema.partition("(")[0]
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", shapes, lib=LIBRARY)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


# --- Layouts ---------------------------------------------------------------------------------------------------------


@dataclass
class Known:
    """What was made of a layout's tensor: found here by the other layers, and gone with it."""

    layout: SequenceLayout
    plans: dict[tuple[str, str], tuple[tuple[Tensor, ...], MaskPlan]] = field(default_factory=dict)


# By the tensor itself, which every forward pass makes anew. Another one of the same values is as good, but slower.
_known: Any = WeakTensorKeyDictionary()


def _describe(
    shape: list[int],
    lengths: Tensor | None,
    attention_mask: Tensor | None,
    missing: Tensor | None,
    position_ids: Tensor | None,
    is_stated: bool,
) -> Tensor:
    """A layout as one tensor `(2 * M + 2 * S + 3,)` int64: `indices` and `positions` of the tokens, each with zeros
    behind them; `rank` and `lengths` of the sequences; B, T and N."""
    device = _given(lengths, attention_mask).device
    rows, width = shape
    layout = SequenceLayout.of_batch((rows, width), device, lengths, attention_mask)
    if position_ids is not None and layout.divided_by_positions(position_ids, is_stated) is not layout:
        raise ValueError(
            "`position_ids` that restart must come with `lengths` or `cu_seq_lens_q` in a graph, whose number of "
            f"sequences has to be known; got {position_ids.tolist()} alone"
        )
    layout = (layout if missing is None else layout.without(missing)).by_length()
    absent = layout.positions.new_zeros(rows * width - layout.num_tokens)
    sizes = torch.tensor([rows, width, layout.num_tokens], device=device)
    of_tokens = [layout.indices, absent, layout.positions, absent]
    described = torch.cat([*of_tokens, layout.rank, layout.lengths, sizes])
    _known[described] = Known(layout)
    return described


def _description(
    shape: list[int], lengths: Tensor | None, attention_mask: Tensor | None, *_: Tensor | bool | None
) -> Tensor:
    sequences = shape[0] if lengths is None else lengths.shape[0]
    given = _given(lengths, attention_mask)
    return given.new_empty(2 * shape[0] * shape[1] + 2 * sequences + 3, dtype=torch.long)


def _given(lengths: Tensor | None, attention_mask: Tensor | None) -> Tensor:
    given = attention_mask if lengths is None else lengths
    assert given is not None
    return given


LAYOUT = operator(
    "layout(SymInt[] shape, Tensor? lengths, Tensor? attention_mask, Tensor? missing, Tensor? position_ids, "
    "bool is_stated) -> Tensor",
    _describe,
    _description,
)


def known(described: Tensor) -> Known:
    """What there is of a layout that [`_describe`] gave, read anew from its tensor where nothing is."""
    if described not in _known:
        rows, width, tokens = described[-3:].tolist()
        places, sequences = rows * width, (described.numel() - 3) // 2 - rows * width
        indices, positions, rank, lengths = described[:-3].clone().split([places, places, sequences, sequences])
        layout = SequenceLayout((rows, width), tuple(lengths.tolist()), rank, indices[:tokens], positions[:tokens])
        _known[described] = Known(layout)
    return _known[described]


class GraphLayout:
    """What a [`SequenceLayout`] is in a graph: the same attributes and methods, as far as a graph needs them.

    Attributes:
        described (`Tensor`): The layout, as operators take it.
        num_tokens (`int`): N; no graph knows its value, unless it follows from the shape.
    """

    def __init__(self, shape: tuple[int, int], described: Tensor, num_sequences: int, num_tokens: int | None = None):
        self.shape = shape
        self.described = described
        self.num_sequences = num_sequences
        places = shape[0] * shape[1]
        indices, positions, self.rank, self.lengths, sizes = described.split(
            [places, places, num_sequences, num_sequences, 3]
        )
        self.num_tokens = _size(sizes[2], places) if num_tokens is None else num_tokens
        self.indices, self.positions = (values.narrow(0, 0, self.num_tokens) for values in (indices, positions))

    @classmethod
    def of_batch(
        cls,
        shape: tuple[int, int],
        device: torch.device,
        lengths: Tensor | None = None,
        attention_mask: Tensor | None = None,
        missing: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> GraphLayout:
        """As [`SequenceLayout.of_batch`], which the operator calls; tokens that are `missing` are left out.

        Raises:
            ValueError: As there, when the graph runs; or `position_ids` contradict `lengths`, or restart without them.
        """
        is_stated = lengths is not None
        is_full = attention_mask is None and missing is None and (lengths is None or lengths.shape[0] != shape[0])
        if lengths is None and attention_mask is None:
            lengths = torch.full((shape[0],), shape[1], dtype=torch.long, device=device)
        described = LAYOUT(list(shape), lengths, attention_mask, missing, position_ids, is_stated)
        sequences = shape[0] if lengths is None else lengths.shape[0]
        return cls(shape, described, sequences, shape[0] * shape[1] if is_full else None)

    @property
    def sequence_ids(self) -> Tensor:
        """`(N,)` int64: place in the flat order of the sequence that each token belongs to."""
        places = torch.arange(self.num_tokens, device=self.rank.device)
        return torch.searchsorted(self.lengths.cumsum(0), places, right=True)

    @property
    def begins(self) -> Tensor:
        """Bool `(N,)`: which tokens are the first of their sequence."""
        return begins(self.sequence_ids)

    def flatten(self, padded: Tensor) -> Tensor:
        """`(B, T, ...)` as `(1, N, ...)`."""
        if tuple(padded.shape[:2]) != tuple(self.shape):
            raise ValueError(f"`padded` must have shape {(*self.shape, '...')}; got {tuple(padded.shape)}")
        return padded.flatten(0, 1).index_select(0, self.indices).unsqueeze(0)

    def unflatten(self, flat: Tensor, fill: float | int | bool = 0) -> Tensor:
        """`(1, N, ...)` as `(B, T, ...)`, `fill` where no token is."""
        rows, width = self.shape
        padded = flat.new_full((rows * width, *flat.shape[2:]), fill)
        return padded.index_copy(0, self.indices, flat[0]).unflatten(0, (rows, width))

    def first_tokens(self, flat: Tensor) -> Tensor:
        """`(S, ...)`: first token of each sequence, in the batch's order of sequences; 0 for an empty one."""
        return self._tokens_at(self.lengths.cumsum(0) - self.lengths, flat)

    def last_tokens(self, flat: Tensor) -> Tensor:
        """Last token of each sequence; see [`first_tokens`]."""
        return self._tokens_at(self.lengths.cumsum(0) - 1, flat)

    def _tokens_at(self, places: Tensor, flat: Tensor) -> Tensor:
        with_none = torch.cat([flat[0], flat.new_zeros(1, *flat.shape[2:])])
        tokens = with_none.index_select(0, places.where(self.lengths > 0, self.num_tokens))
        return torch.zeros_like(tokens).index_copy(0, self.rank, tokens)

    def by_position(self, flat: Tensor, fill: float | int | bool = 0) -> Tensor:
        """`(1, N, ...)` as `(S, T, ...)`: sequences in flat order, `fill` where they have no token."""
        width = self.shape[1]
        table = flat.new_full((self.num_sequences * width, *flat.shape[2:]), fill)
        table = table.index_copy(0, self.sequence_ids * width + self.positions, flat[0])
        return table.unflatten(0, (self.num_sequences, width))

    def targets_alone(self, states: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """As [`SequenceLayout.targets_alone`]."""
        real = labels.flatten() != IGNORE_INDEX
        places = (~real).to(torch.uint8).argsort(stable=True).narrow(0, 0, _size(real.sum(), real.shape[0]))
        return states.flatten(0, labels.dim() - 1).index_select(0, places), labels.flatten().index_select(0, places)

    def settled(self) -> SequenceLayout:
        """Outside a graph: the [`SequenceLayout`]."""
        return known(self.described).layout


def _size(value: Tensor, most: int) -> int:
    """A value as a size of the graph."""
    size = cast(int, value.item())  # a symbol: no `int(...)` of it
    torch._check(size >= 0)
    torch._check(size <= most)
    return size


# --- Attention -------------------------------------------------------------------------------------------------------


class GraphPlan(NamedTuple):
    """What a [`MaskPlan`] is in a graph: what the operator makes one of."""

    mask: str
    layout: GraphLayout
    key_layout: GraphLayout
    fields: dict[str, Tensor]

    @property
    def reads_scores(self) -> bool:
        """As [`MaskPlan.reads_scores`]."""
        return "key_scores" in fields_of(self.mask)


@torch.compiler.assume_constant_result
def fields_of(mask: str) -> tuple[str, ...]:
    """Names of the fields that an expression reads; a graph takes them for constant."""
    return tuple(sorted(parse(mask).fields))


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: MaskPlan | GraphPlan,
    *,
    scaling: float,
    dropout: float = 0.0,
    apply_mask_to: str = "scores",
    key_scores: Tensor | None = None,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Attention with either kind of plan, and weights, which there are none of in a graph.

    See [`attend`] of `attention`, which both come to.
    """
    if isinstance(plan, MaskPlan):
        return attend_outside(
            query,
            key,
            value,
            plan,
            scaling=scaling,
            dropout=dropout,
            apply_mask_to=apply_mask_to,
            key_scores=key_scores,
            implementation=implementation,
        )
    device = query.device.type
    if torch.is_autocast_enabled(device):  # the operator runs where autocast is over
        query, key, value = (states.to(torch.get_autocast_dtype(device)) for states in (query, key, value))
    seed = torch.randint(2**62, (), device="cpu") if dropout > 0 else None
    layouts = plan.layout.described, plan.key_layout.described
    tensors = query, key, value, key_scores, seed, *layouts, list(plan.fields.values())
    settings = plan.mask, " ".join(plan.fields), scaling, dropout, apply_mask_to, implementation
    return ATTENTION(*tensors, *settings), None


def _plan(layout: Tensor, key_layout: Tensor, fields: list[Tensor], mask: str, names: str) -> MaskPlan:
    of_queries = known(layout)
    is_self = key_layout is layout
    needed = tuple(fields) if is_self else (key_layout, *fields)  # what the plan was made of, beside its layout
    given, plan = of_queries.plans.get((mask, names), (None, None))
    if plan is None or given is None or any(one is not other for one, other in zip(given, needed, strict=True)):
        of_keys = None if is_self else known(key_layout).layout
        plan = MaskPlan(mask, of_queries.layout, of_keys, fields=dict(zip(names.split(), fields, strict=True)))
        of_queries.plans[mask, names] = needed, plan
    return plan


@contextmanager
def _random_from(seed: Tensor | None, device: torch.device) -> Iterator[None]:
    """Random numbers of a seed, the same in forward and backward; those of the program go on as if there were none."""
    if seed is None:
        yield
        return
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"dropout in a graph must be on a CPU or a CUDA device; got '{device.type}'")
    generator = torch.cuda.default_generators[device.index] if device.type == "cuda" else torch.default_generator
    state = generator.get_state()
    try:
        generator.manual_seed(int(seed))
        yield
    finally:
        generator.set_state(state)


class Call(NamedTuple):
    """The arguments of the attention operator. Tensors are flat, `(1, H, N, D)`; `key_scores (1, 1 | Hk, N)`."""

    query: Tensor
    key: Tensor
    value: Tensor
    key_scores: Tensor | None
    seed: Tensor | None
    layout: Tensor
    key_layout: Tensor
    fields: list[Tensor]
    mask: str
    names: str
    scaling: float
    dropout: float
    apply_mask_to: str
    implementation: str

    @property
    def states(self) -> list[Tensor]:
        """Query, key, value and, where there are any, scores: what has a gradient."""
        return [self.query, self.key, self.value, *([] if self.key_scores is None else [self.key_scores])]

    @property
    def plan(self) -> MaskPlan:
        return _plan(self.layout, self.key_layout, self.fields, self.mask, self.names)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, key_scores: Tensor | None = None) -> Tensor:
        with _random_from(self.seed, query.device):
            output, _ = attend_outside(
                query,
                key,
                value,
                self.plan,
                scaling=self.scaling,
                dropout=self.dropout,
                apply_mask_to=self.apply_mask_to,
                key_scores=key_scores,
                implementation=self.implementation,
            )
        return output


ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? key_scores, Tensor? seed, Tensor layout, Tensor key_layout, "
    "Tensor[] fields, str mask, str names, float scaling, float dropout, str apply_mask_to, str implementation"
)


def _in_memory(heads: Tensor) -> Tensor:
    """`(1, H, N, D)` such that the heads of a token are neighbours in memory: what a graph is told."""
    return heads.transpose(1, 2).contiguous().transpose(1, 2)


def _unknown(heads: Tensor, size: int) -> Tensor:
    """A tensor like that, of a head size, without values."""
    return heads.new_empty(1, heads.shape[2], heads.shape[1], size).transpose(1, 2)


def _attention(*arguments) -> Tensor:
    call = Call(*arguments)
    return _in_memory(call.attend(*call.states))


def _attention_shapes(*arguments) -> Tensor:
    call = Call(*arguments)
    return _unknown(call.query, call.value.shape[3])


def _backward(grad_output: Tensor, *arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and scores (empty without scores); attention is computed anew."""
    call = Call(*arguments)
    with torch.enable_grad():
        states = [x.detach().requires_grad_() for x in call.states]
        output = call.attend(*states)
    query, key, value, *scores = torch.autograd.grad(output, states, grad_output, materialize_grads=True)
    of_scores = scores[0].contiguous() if scores else grad_output.new_empty(0)
    return _in_memory(query), _in_memory(key), _in_memory(value), of_scores


def _backward_shapes(grad_output: Tensor, *arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call = Call(*arguments)
    query, key, value = (_unknown(x, x.shape[3]) for x in (call.query, call.key, call.value))
    scores = call.key_scores
    return query, key, value, grad_output.new_empty(0) if scores is None else scores.new_empty(scores.shape)


ATTENTION = operator(f"attention({ARGUMENTS}) -> Tensor", _attention, _attention_shapes)
# An operator that computes gradients inside, and so has no autograd of its own.
BACKWARD = operator(
    f"attention_backward(Tensor grad_output, {ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_shapes,
)


def _remember(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, fields = inputs[:8]
    ctx.save_for_backward(*tensors, *fields)
    ctx.settings = inputs[8:]


def _gradients(ctx: Any, grad_output: Tensor) -> tuple:
    tensors = ctx.saved_tensors
    fields = list(tensors[7:])
    *grads, of_scores = BACKWARD(grad_output, *tensors[:7], fields, *ctx.settings)
    of_scores = None if tensors[3] is None else of_scores
    return *grads, of_scores, None, None, None, [None] * len(fields), *(None,) * len(ctx.settings)


torch.library.register_autograd(f"{NAMESPACE}::attention", _gradients, setup_context=_remember, lib=LIBRARY)
