"""Attention in a graph of `torch.compile` or `torch.export`: an operator, forward and backward.

Shape legend: B rows of width T, S sequences, N real tokens in M = B * T places; H heads, D and Dv head sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from .attention import IMPLEMENTATIONS, autocast
from .attention import attend as attend_outside
from .compile_ops import operator
from .graph_layout import known
from .layout import SequenceLayout
from .masks import Band, parse
from .plan import MaskPlan


class GraphPlan(NamedTuple):
    """The counterpart of [`MaskPlan`] in a graph, from which the attention operator makes a [`MaskPlan`]."""

    mask: str
    layout: SequenceLayout
    key_layout: SequenceLayout
    fields: dict[str, Tensor]

    def outside(self) -> MaskPlan:
        """The [`MaskPlan`] for attention that runs outside the graph, after a graph break."""
        described = self.layout.described, self.key_layout.described
        return _plan(*described, list(self.fields.values()), self.mask, " ".join(self.fields))  # type: ignore[arg-type]

    @property
    def band(self) -> Band | None:
        """As [`MaskPlan.band`]."""
        return band_of(self.mask)

    def derived(self, make: Callable[..., Any]) -> Any:
        """As [`MaskPlan.derived`], but without a cache: the compiler itself merges what layers compute in common."""
        return make(self)

    @property
    def reads_scores(self) -> bool:
        """As [`MaskPlan.reads_scores`]."""
        return "key_scores" in fields_of(self.mask)


@torch.compiler.assume_constant_result
def fields_of(mask: str) -> tuple[str, ...]:
    """Names of the fields that an expression reads; a graph treats them as constants."""
    return tuple(sorted(parse(mask).fields))


@torch.compiler.assume_constant_result
def band_of(mask: str) -> Band | None:
    """The band of an expression, if it is one."""
    return parse(mask).band()


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
    """[`attention.attend`] with either kind of plan. With a [`GraphPlan`] it returns no weights.

    On a CPU, and if no implementation that can be traced supports the arguments, a graph calls attention as an
    operator.
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
    query, key, value = autocast(query, key, value)  # inside an operator, autocast is off
    if query.device.type != "cpu" and key_scores is None and apply_mask_to == "scores":
        for name, chosen in IMPLEMENTATIONS.items():
            if not chosen.is_traced or implementation not in ("auto", name):
                continue
            traced = cast(MaskPlan, plan)  # these implementations only use attributes that a `GraphPlan` has, too
            if chosen.unsupported(traced, query, key, value, dropout) is None:
                return chosen.attend(query, key, value, traced, scaling=scaling, dropout=dropout)
    seed = torch.randint(2**62, (), device="cpu") if dropout > 0 else None
    layouts = plan.layout.described, plan.key_layout.described
    tensors = query, key, value, key_scores, seed, *layouts, list(plan.fields.values())
    settings = plan.mask, " ".join(plan.fields), scaling, dropout, apply_mask_to, implementation
    return ATTENTION(*tensors, *settings), None


def _plan(layout: Tensor, key_layout: Tensor, fields: list[Tensor], mask: str, names: str) -> MaskPlan:
    of_queries = known(layout)
    is_self = key_layout is layout
    sources = tuple(fields) if is_self else (key_layout, *fields)  # the tensors that a cached plan must be made of
    cached, plan = of_queries.plans.get((mask, names), (None, None))
    if plan is None or cached is None or any(one is not other for one, other in zip(cached, sources, strict=True)):
        of_keys = None if is_self else known(key_layout).layout
        plan = MaskPlan(mask, of_queries.layout, of_keys, fields=dict(zip(names.split(), fields, strict=True)))
        of_queries.plans[mask, names] = sources, plan
    return plan


@contextmanager
def _random_from(seed: Tensor | None, device: torch.device) -> Iterator[None]:
    """Seeds the device's generator, so that forward and backward draw the same numbers, and restores it afterwards."""
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
    """The arguments of the attention operator. Tensors are packed, `(N, H, D)`; `key_scores (1, 1 | Hk, N)`."""

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
        """The tensors that have gradients: query, key, value and, if given, scores."""
        return [self.query, self.key, self.value, *([] if self.key_scores is None else [self.key_scores])]

    @property
    def plan(self) -> MaskPlan:
        return _plan(self.layout, self.key_layout, self.fields, self.mask, self.names)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, key_scores: Tensor | None = None) -> Tensor:
        plan = self.plan
        tokens, keys = plan.layout.num_tokens, plan.key_layout.num_tokens  # the states of a graph also have the tails
        with _random_from(self.seed, query.device):
            output, _ = attend_outside(
                query[:tokens],
                key[:keys],
                value[:keys],
                plan,
                scaling=self.scaling,
                dropout=self.dropout,
                apply_mask_to=self.apply_mask_to,
                key_scores=None if key_scores is None else key_scores[..., :keys],
                implementation=self.implementation,
            )
        return torch.nn.functional.pad(output, (0, 0, 0, 0, 0, query.shape[0] - tokens))


ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? key_scores, Tensor? seed, Tensor layout, Tensor key_layout, "
    "Tensor[] fields, str mask, str names, float scaling, float dropout, str apply_mask_to, str implementation"
)


def _without_values(states: Tensor, size: int) -> Tensor:
    """An uninitialised tensor like `states (N, H, D)`, with another head size."""
    return states.new_empty(states.shape[0], states.shape[1], size)


def _attention(*arguments) -> Tensor:
    call = Call(*arguments)
    return call.attend(*call.states).contiguous()


def _attention_shapes(*arguments) -> Tensor:
    call = Call(*arguments)
    return _without_values(call.query, call.value.shape[2])


def _backward(grad_output: Tensor, *arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and scores (empty without scores); attention is computed again."""
    call = Call(*arguments)
    with torch.enable_grad():
        states = [x.detach().requires_grad_() for x in call.states]
        output = call.attend(*states)
    query, key, value, *scores = torch.autograd.grad(output, states, grad_output, materialize_grads=True)
    of_scores = scores[0].contiguous() if scores else grad_output.new_empty(0)
    return query.contiguous(), key.contiguous(), value.contiguous(), of_scores


def _backward_shapes(grad_output: Tensor, *arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call = Call(*arguments)
    query, key, value = (_without_values(x, x.shape[2]) for x in (call.query, call.key, call.value))
    scores = call.key_scores
    return query, key, value, grad_output.new_empty(0) if scores is None else scores.new_empty(scores.shape)


# It runs autograd inside, and has no gradient itself.
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


ATTENTION = operator(
    f"attention({ARGUMENTS}) -> Tensor", _attention, _attention_shapes, gradients=(_gradients, _remember)
)
