"""Prepares stock models to run with `attn_implementation="dynmask"`, and checks the masks in their configurations.

A layer's attention must know the arguments of the model's forward pass, and the model does not pass all of them on. So
the `forward` of a model's class is wrapped when the first model of that class is prepared. A hook of the instance would
not run if `model.forward(...)` is called, nor for another model with the same configuration.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache, partial, wraps
from importlib import import_module
from inspect import Parameter, Signature, getsource, signature, unwrap
from textwrap import dedent
from types import MethodType
from typing import Any

import torch
from transformers import Cache, PreTrainedConfig, PreTrainedModel
from transformers.modeling_flash_attention_utils import FlashAttentionKwargs
from transformers.utils.generic import TransformersKwargs

from ..modeling import masks
from ..modeling.field_shapes import FIELD_SHAPES
from ..modeling.graph_attention import fields_of
from ..modeling.layout import check_not_scattered, eager_only
from ..modeling.masks import parse
from ..modeling.modeling_base import warn_of_unread_fields
from .batches import (
    CACHES,
    CONFIG_ENTRY,
    EXPANSION,
    IN_GRAPH,
    INPUTS,
    NAME,
    Batch,
    GraphBatch,
    batches,
    has_cross_attention,
    is_for_graph,
)
from .unpadding import Unpadded, pool_by_sequence

# Arguments that any model accepts: of the batch contract, of transformers, and of decorators of `forward`.
KNOWN = {
    *(*INPUTS, "lengths", "attention_mask", "position_ids", "token_type_ids", "labels"),
    *("return_dict", "use_cache", *CACHES, EXPANSION),
    *FIELD_SHAPES,
    *TransformersKwargs.__annotations__,
    *FlashAttentionKwargs.__annotations__,
}

# --- Which attention a model runs with -------------------------------------------------------------------------------


def settled(model: PreTrainedModel, requested: str | None) -> str | None:
    """The `attn_implementation` of a model: `requested`, or `"dynmask"` if its configuration has a mask.

    Raises:
        ValueError: Another one is requested although there is a mask, or the model cannot run with `"dynmask"`.
    """
    text = getattr(model.config, CONFIG_ENTRY, None)
    if text is not None:
        requested = NAME if requested is None else requested
        check_followed(model.config, requested, type(model).__name__)
        check_mask(model, text)
    if requested == NAME:
        install_hooks(model)
    _switch_layers(model, requested)
    return requested


def check_followed(config: PreTrainedConfig | None, implementation: str | None, owner: str = "a model") -> None:
    """Raises if a model's configuration has a mask that its attention would not follow."""
    text = getattr(config, CONFIG_ENTRY, None)
    if text is not None and implementation != NAME:
        raise ValueError(
            f"the configuration of {owner} has the mask '{text}', which attn_implementation='{NAME}' "
            f"alone can follow; got '{implementation}' (`set_mask(model, None)` takes the mask away)"
        )


def check_mask(model: PreTrainedModel, text: str) -> None:
    """Raises if the text is not an expression, or the model cannot follow it."""
    mask = parse(text)
    for leaf, why in (
        (masks.TopK, "needs scores that a stock model does not learn"),
        (masks.Dense, "reads the `attention_mask` that a stock model keeps to itself"),
        (masks.Custom, "cannot be saved with a configuration"),
    ):
        if mask.holds(leaf):
            raise ValueError(f"the mask of a stock model must do without `{leaf.name}`, which {why}; got '{mask}'")
    config, name = model.config, type(model).__name__
    if heads := getattr(config, "num_attention_heads", None):
        mask.head_borders(heads)
    if config.sub_configs:
        parts = ", ".join(sorted(config.sub_configs))
        raise ValueError(f"`model` must be one part of a model; {name} has the parts {parts}")
    if has_cross_attention(config):
        raise ValueError(f"`model` must have self-attention only; {name} has cross-attention")


# --- Forward passes --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ready:
    """Wraps the `forward` of a class, so that its layers can look up the arguments.

    Models hold an instance, so that unpickling a model in another process wraps its class there, too.
    """

    model_class: type[PreTrainedModel]

    def __post_init__(self):
        if not hasattr(self.model_class.forward, "announces"):
            announced = _announced(self.model_class.forward, self.model_class)
            self.model_class.forward = announced  # type: ignore[method-assign]

    def __reduce__(self):
        return Ready, (self.model_class,)


def install_hooks(model: PreTrainedModel) -> None:
    """Prepares a stock model to run with `attn_implementation="dynmask"`.

    Raises:
        ValueError: The model's class does not use transformers' attention interface.
    """
    check_uses_interface(model)
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            part._dynmask_ready = Ready(type(part))  # type: ignore[assignment]
            _rebind(part)


def check_uses_interface(model: PreTrainedModel) -> None:
    """Raises if a model's attention is code of its own, which would run instead of ours.

    Transformers looks into the code of its class; if that cannot be read, as in a notebook, we look into its parent's.
    """
    parents = [each for each in type(model).__mro__ if issubclass(each, PreTrainedModel)]
    readable = next(each for each in parents if getattr(sys.modules.get(each.__module__), "__file__", None))
    if readable is PreTrainedModel or readable._can_set_attn_implementation():
        type(model)._can_set_attn_implementation_cached_value = True
    else:
        raise ValueError(
            f"attn_implementation='{NAME}' needs a model that uses transformers' attention interface; "
            f"{type(model).__name__} computes attention by itself"
        )


def _switch_layers(model: PreTrainedModel, requested: str | None) -> None:
    """Switches the attention of layers that hold another configuration object than their model.

    Transformers only switches the configurations of models. If an encoder-decoder is made of two models, it replaces
    their configurations, but their layers keep the old ones.
    """
    own = model, model.base_model  # the base model may keep the old one, too
    others = [part for part in model.modules() if isinstance(part, PreTrainedModel) and part not in own]
    of_models = {id(part.config) for part in (model, *others)}
    configs: list[Any] = [vars(part).get("config") for part in model.modules()]
    for config in (each for each in configs if type(each) is type(model.config) and id(each) not in of_models):
        if NAME in (requested, config._attn_implementation):
            config._attn_implementation = requested


def _rebind(model: PreTrainedModel) -> None:
    """Makes an instance whose `forward` was hooked before, as by Accelerate, call the wrapped one of its class."""
    ours = type(model).forward
    for name in ("forward", "_old_forward"):
        own = vars(model).get(name)
        if getattr(own, "__func__", None) is getattr(ours, "announces", None):
            setattr(model, name, MethodType(ours, model))


def _announced(forward: Callable, model_class: type[PreTrainedModel]) -> Callable:
    """Wraps a `forward` so that the layers can look up its arguments if its model runs with `"dynmask"`."""
    own = _naming_expansion(_signature(forward, model_class))
    names = [name for name, one in own.parameters.items() if one.kind is Parameter.POSITIONAL_OR_KEYWORD][1:]
    takes_others = Parameter.VAR_KEYWORD in {parameter.kind for parameter in own.parameters.values()}

    @partial(eager_only, recursive=False)
    def announced(model: PreTrainedModel, args: tuple, kwargs: dict[str, Any]) -> Any:
        if len(args) > len(names) or not kwargs.keys().isdisjoint(names[: len(args)]):
            return forward(model, *args, **kwargs)  # which raises
        given = dict(zip(names, args, strict=False)) | kwargs
        newest = import_module(__name__)  # the module whose attention runs, in case the package was imported again
        return newest.run_announced(forward, model, names, given, takes_others)

    @wraps(forward)
    def wrapper(self, *args, **kwargs):
        if self.config._attn_implementation == NAME:
            if IN_GRAPH.batch is not None:  # of the model that runs this one
                output = forward(self, *args, **kwargs)
                pool_by_sequence(self, output, IN_GRAPH.batch.layout)
                return output
            if torch.compiler.is_compiling():
                given = dict(zip(names, args, strict=False)) | kwargs
                if not IN_GRAPH.has_outer and len(args) <= len(names) and _is_for_graph(self, names, given):
                    return run_in_graph(forward, self, names, given)
            return announced(self, args, kwargs)
        check_followed(self.config, self.config._attn_implementation, type(self).__name__)
        return forward(self, *args, **kwargs)

    del wrapper.__wrapped__  # Accelerate follows it when it removes its own wrapper
    wrapper.__signature__ = own  # type: ignore[attr-defined]
    wrapper.announces = forward  # type: ignore[attr-defined]
    return wrapper


def _signature(forward: Callable, model_class: type[PreTrainedModel]) -> Signature:
    """The signature of a `forward`, or that in the source if another package replaced it by `(*args, **kwargs)`."""
    found = signature(forward)
    if all(parameter.kind is not Parameter.VAR_POSITIONAL for parameter in found.parameters.values()):
        return found
    written = (_written(each) for each in model_class.__mro__ if "forward" in vars(each))
    return next((own for own in written if own is not None), found)


def _naming_expansion(own: Signature) -> Signature:
    """The signature with the argument that sentence-transformers passes to models that name it."""
    named = [each for each in own.parameters.values() if each.kind is not Parameter.VAR_KEYWORD]
    others = [each for each in own.parameters.values() if each.kind is Parameter.VAR_KEYWORD]
    return own.replace(parameters=[*named, Parameter(EXPANSION, Parameter.KEYWORD_ONLY, default=None), *others])


def _written(model_class: type) -> Signature | None:
    """The signature of the `forward` in a class's source; `None` if there is none or it names no arguments."""
    try:
        (body,) = ast.parse(dedent(getsource(model_class))).body
    except (OSError, TypeError):  # made at run time
        return None
    for node in body.body:  # type: ignore[attr-defined]
        if isinstance(node, ast.FunctionDef) and node.name == "forward" and node.args.vararg is None:
            kinds = {each.arg: Parameter.POSITIONAL_OR_KEYWORD for each in node.args.args}
            if node.args.kwarg is not None:
                kinds[node.args.kwarg.arg] = Parameter.VAR_KEYWORD
            return Signature([Parameter(name, kind) for name, kind in kinds.items()])
    return None


@partial(eager_only, recursive=False)
def run_announced(
    forward: Callable, model: PreTrainedModel, names: list[str], given: dict[str, Any], takes_others: bool
) -> Any:
    """Runs a model's forward pass; its recorded arguments are removed however it ends."""
    outer = batches.get()
    batch = _enter(model, names, given, takes_others, outer[-1] if outer else None)
    unpadded = Unpadded.of(batch, outer)
    batch = batch if unpadded is None else unpadded.batch
    try:
        batches.set((*outer, batch))
        IN_GRAPH.has_outer = True
        output = forward(model, **batch.given)
    finally:
        batches.set(outer)
        IN_GRAPH.has_outer = bool(outer)
    _leave(batch, output)
    return output if unpadded is None else unpadded.in_rows(output)


def _is_for_graph(model: PreTrainedModel, names: list[str], given: dict[str, Any]) -> bool:
    """As [`is_for_graph`]; in addition, all keywords must be known."""
    text = getattr(model.config, CONFIG_ENTRY, None)
    read = () if text is None else fields_of(text)
    known = given.keys() <= {*names, *KNOWN} and all(given.get(name) is not None for name in read)
    unread = [name for name in FIELD_SHAPES if given.get(name) is not None and name not in names and name not in read]
    return known and not unread and is_for_graph(model, names, given)


def run_in_graph(forward: Callable, model: PreTrainedModel, names: list[str], given: dict[str, Any]) -> Any:
    """As [`run_announced`], but traced into the graph. After a graph break, layers still find the batch."""
    batch = GraphBatch.read(model, names, given)
    try:
        IN_GRAPH.batch = batch
        output = forward(model, **batch.given)
    finally:
        IN_GRAPH.batch = None
    _check_separated(model, batch.sequences_separated)
    pool_by_sequence(model, output, batch.layout)
    _mark_caches(output)
    return output


@eager_only
def _enter(
    model: PreTrainedModel, names: list[str], given: dict[str, Any], takes_others: bool, outer: Batch | None
) -> Batch:
    if takes_others and outer is None:
        _check_keywords(model, given.keys() - set(names) - KNOWN)
        _warn_of_fields(model, [name for name in FIELD_SHAPES if name not in names and given.get(name) is not None])
    if getattr(model, "_is_replica", False) and given.get("input_ids") is not None:
        check_not_scattered(given["input_ids"], given.get("lengths"), getattr(model.config, "pad_token_id", None))
    return Batch.read(model, names, given, outer)


@eager_only
def _leave(batch: Batch, output: Any) -> None:
    if batch.unchecked:
        batch.read_along()
    if batch.pooled_by is not None:
        pool_by_sequence(batch.model, output, batch.pooled_by)
    if batch.sequences_separated:
        _mark_caches(output)
    elif not batch.has_explicit_mask and batch.is_flat:
        _check_separated(batch.model, batch.sequences_separated)


def _mark_caches(output: Any) -> None:
    for value in output.values() if isinstance(output, Mapping) else output:
        if isinstance(value, Cache):
            value.is_of_flat_batch = True  # type: ignore[attr-defined]


def _check_separated(model: PreTrainedModel, sequences_separated: bool) -> None:
    if not sequences_separated:
        raise ValueError(
            f"a flat batch needs a model whose tokens meet in attention; those of {type(model).__name__} do not"
        )


# --- Keywords --------------------------------------------------------------------------------------------------------


def _check_keywords(model: PreTrainedModel, unknown: set[str]) -> None:
    """Raises if no part of the model reads a keyword."""
    unknown = {name for name in unknown if not name.startswith("output_")}  # read by decorators of `forward`
    if not unknown:
        return
    named = KNOWN | signature(model.forward).parameters.keys()
    try:
        known = named.union(*map(_mentioned, set(_code_of(model))))
    except (OSError, TypeError):  # code that cannot be read, as that of a notebook, may know it
        return
    if getattr(model.config, "is_encoder_decoder", False):
        named, known = _of_sides(named), _of_sides(known)
    for name in sorted(unknown - known):
        near = get_close_matches(name, named, n=1)
        hint = f"; did you mean `{near[0]}`?" if near else ""
        raise TypeError(f"no part of {type(model).__name__} knows the keyword `{name}`{hint}")


def _warn_of_fields(model: PreTrainedModel, fields: list[str]) -> None:
    if fields:
        parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
        texts = {text for part in parts if (text := getattr(part.config, CONFIG_ENTRY, None)) is not None}
        warn_of_unread_fields(model, fields, {name for text in texts for name in parse(text).fields})


def _of_sides(names: set[str]) -> set[str]:
    """The names, and those with the prefixes under which an encoder-decoder passes them to one side."""
    return names | {f"{side}_{name}" for side in ("encoder", "decoder") for name in names}


def _code_of(model: PreTrainedModel) -> Iterator[str]:
    """The Python modules that define the forward passes of a model's parts and its loss."""
    if getattr(model, "loss_type", None) is not None or hasattr(model, "_loss_function"):
        yield unwrap(model.loss_function).__module__
    for part in model.modules():
        for each in type(part).__mro__:
            if "forward" in vars(each) and not each.__module__.startswith("torch."):
                yield each.__module__


@cache
def _mentioned(module: str) -> frozenset[str]:
    """The argument names and strings in a module's code, which include all keywords that it reads."""
    found = set()
    for node in ast.walk(ast.parse(getsource(sys.modules[module]))):
        if isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            found.add(node.value)
    return frozenset(found)
