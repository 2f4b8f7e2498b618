"""`attn_implementation="dynmask"` for stock models: transformers' masks as expressions, its batches as layouts.

A stock model that is to run with it is made ready by [`prepare`]: what its forward pass is given is then known to its
layers, as a [`Batch`]. Transformers calls two functions. [`dynmask_mask`], once a forward pass for each kind of mask,
only notes the call in a [`StockMask`]; [`dynmask_attention_forward`] is called in every layer with that note. The first
layer tells the batch's sequences apart and makes the plan, which the note keeps for the others.

Shape legend: B rows, T (Tq, Tk) columns of queries and keys, S sequences, N real tokens, H heads, D and Dv head sizes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property, reduce
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, masking_utils

from . import masks
from .attention import dynmask_attention
from .fields import Fields
from .layout import SequenceLayout, outside_graph
from .masks import Mask, allowed_by_head, parse
from .plan import MaskPlan

NAME = "dynmask"
CONFIG_ENTRY = "dynmask_mask"  # where `set_mask` keeps its text in a stock model's configuration
# Settings that let tokens of a row meet outside attention: of MobileBERT, ESM and Switch Transformers.
MEETINGS = ("trigram_input", "token_dropout", "expert_capacity")
# Kinds of layers, as configurations name them, in which tokens meet in attention alone.
ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
# Arguments of some models' attention that change what is seen, and that no expression stands for.
UNSERVED_ARGUMENTS = ("block_indices", "cache", "indices", "sinks")
INPUTS = ("input_ids", "inputs_embeds")
_FAR = 2**31  # beyond any position


# --- Choosing a mask -------------------------------------------------------------------------------------------------


def set_mask(model: PreTrainedModel, text: str | None) -> None:
    """Put a mask expression on a model, in place of the masks it has.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            A DynMask model, or a stock model that runs with `attn_implementation="dynmask"`. The text is kept in its
            configuration, and saved with it.
        text (`str`, *optional*):
            The expression, for every layer: `"causal & window(255, 0)"`. Fields that it reads are arguments of the
            model's forward pass. `None`: the masks of the model's own.

    Raises:
        ValueError: The text is no expression, or holds what a stock model cannot follow (`topk`, `dense`, `custom`);
            the model does not run with `"dynmask"`, has cross-attention, or parts with configurations of their own.
    """
    if hasattr(model, "set_mask"):
        model.set_mask(text)  # type: ignore[operator]
        return
    if text is not None:
        _check_expression(parse(text))
        _check_model(model)
    setattr(model.config, CONFIG_ENTRY, text)


def _check_expression(mask: Mask) -> None:
    for leaf, why in (
        (masks.TopK, "needs scores that a stock model does not learn"),
        (masks.Dense, "reads the `attention_mask` that a stock model keeps to itself"),
        (masks.Custom, "cannot be saved with a configuration"),
    ):
        if mask.holds(leaf):
            raise ValueError(f"the mask of a stock model must do without `{leaf.name}`, which {why}; got '{mask}'")


def _check_model(model: PreTrainedModel) -> None:
    config, name = model.config, type(model).__name__
    if config._attn_implementation != NAME:
        raise ValueError(
            f"`model` must run with attn_implementation='{NAME}'; {name} runs with '{config._attn_implementation}'"
        )
    if config.sub_configs:
        raise ValueError(f"`model` must be one part of a model; {name} has the parts {', '.join(config.sub_configs)}")
    if _has_cross_attention(config):
        raise ValueError(f"`model` must have self-attention alone; {name} has cross-attention")


def _has_cross_attention(config: PreTrainedConfig) -> bool:
    return getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False)


# --- Batches ---------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Batch:
    """What the forward pass of a model was given.

    Attributes:
        model ([`~transformers.PreTrainedModel`]): The model.
        given (`dict`): Arguments by name.
        takes_positions (`bool`): Whether `position_ids` are among the model's own arguments.
        is_heeded (`bool`): Whether some layer's attention has kept the sequences of the batch apart.
    """

    model: PreTrainedModel
    given: dict[str, Any]
    takes_positions: bool
    is_heeded: bool = False

    def tensor(self, name: str, device: torch.device | str) -> Tensor | None:
        """The argument of that name, if there is one."""
        value = self.given.get(name)
        return None if value is None else value.to(device)

    def cu_seq_lens(self, device: torch.device) -> Tensor | None:
        """`(S + 1,)`: 0, then the ends of the sequences, if they came as `cu_seq_lens_q` or `lengths` of one row."""
        lengths = self.tensor("lengths", device)
        if lengths is not None and lengths.numel() != self._rows:
            return nn.functional.pad(lengths.cumsum(0), (1, 0))
        return self.tensor("cu_seq_lens_q", device)

    def padding(self, width: int, device: torch.device | str) -> Tensor | None:
        """Bool `(B, width)`: where tokens are, if that came as `lengths` of the rows."""
        lengths = self.tensor("lengths", device)
        if lengths is None or lengths.numel() != self._rows:
            return None
        return torch.arange(width, device=device) < lengths[:, None]

    @property
    def _tokens(self) -> Tensor | None:
        return next((self.given[name] for name in INPUTS if self.given.get(name) is not None), None)

    @property
    def _rows(self) -> int | None:
        return None if self._tokens is None else self._tokens.shape[0]

    def position_ids(self) -> Tensor | None:
        """`(1, T)`: the positions in each sequence of one row, if `lengths` or `cu_seq_lens_q` came without any."""
        tokens = self._tokens
        if tokens is None or not self.takes_positions or self.given.get("position_ids") is not None:
            return None
        cu_seq_lens = self.cu_seq_lens(tokens.device)
        if cu_seq_lens is None or (1, int(cu_seq_lens[-1])) != tokens.shape[:2]:
            return None
        return SequenceLayout.from_cu_seq_lens(cu_seq_lens).positions[None] + _first_position(self.model)

    @property
    def has_explicit_mask(self) -> bool:
        """Whether the caller says himself which token may see which."""
        attention_mask = self.given.get("attention_mask")
        return isinstance(attention_mask, Tensor) and attention_mask.dim() > 2

    @property
    def is_flat(self) -> bool:
        """Whether a row holds several sequences."""
        position_ids = self.given.get("position_ids")
        cu_seq_lens = self.cu_seq_lens(torch.device("cpu"))
        if cu_seq_lens is not None:
            return cu_seq_lens.numel() > 2
        if position_ids is None or position_ids.dim() != 2:
            return False
        padding = self.given.get("attention_mask")
        if not isinstance(padding, Tensor) or padding.shape != position_ids.shape:
            padding = None
        return bool(_restarts(position_ids, None if padding is None else padding.bool())[:, 1:].any())


# Batches of the models whose forward passes we are in, the outermost first.
_batches: ContextVar[tuple[Batch, ...]] = ContextVar("batches", default=())


def prepare(model: PreTrainedModel) -> None:
    """Make a stock model ready to run with `attn_implementation="dynmask"`.

    Raises:
        ValueError: The model's class does not use transformers' attention interface.
    """
    if not type(model)._can_set_attn_implementation():
        raise ValueError(
            f"attn_implementation='{NAME}' needs a model that uses transformers' attention interface; "
            f"{type(model).__name__} computes attention by itself"
        )
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and _enter not in part._forward_pre_hooks.values():
            part.register_forward_pre_hook(_enter, with_kwargs=True)
            part.register_forward_hook(_leave, always_call=True)


@outside_graph
def _enter(model: PreTrainedModel, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    names = signature(model.forward).parameters
    given = dict(zip(names, args, strict=False)) | kwargs
    batch = Batch(model, given, "position_ids" in names)
    _batches.set((*_batches.get(), batch))
    position_ids = batch.position_ids()
    if position_ids is None or model.config._attn_implementation != NAME:
        return None
    given["position_ids"] = position_ids
    return (), given


@outside_graph
def _leave(model: PreTrainedModel, args: tuple, output: Any) -> None:
    *outer, batch = _batches.get() or (None,)
    if batch is None or batch.model is not model:  # the forward pass failed before it began
        return
    _batches.set(tuple(outer))
    failed = output is None
    if failed or batch.is_heeded or model.config._attn_implementation != NAME or batch.has_explicit_mask:
        return
    if batch.is_flat:
        raise ValueError(
            f"a flat batch needs a model whose tokens meet in attention; those of {type(model).__name__} do not"
        )


# --- Transformers' mask functions ------------------------------------------------------------------------------------


@dataclass
class MaskFunction:
    """A mask function of transformers, read.

    Attributes:
        expression (`Mask`, *optional*): The same as an expression; `None` where some part is not known.
        is_packed (`bool`): Whether it keeps the sequences of a row apart by itself.
        block_ids (`Tensor` of shape `(B, T)`, *optional*): Tokens with equal ids of 0 and above see each other.
    """

    expression: Mask | None = None
    is_packed: bool = False
    block_ids: Tensor | None = None

    @classmethod
    def read(cls, function: Callable) -> MaskFunction:
        """Mask functions are closures of `transformers.masking_utils`, known by the function that made them."""
        found = cls()
        expression = found._read(function)
        found.expression = None if expression is None else _simplified(expression)
        return found

    def _read(self, function: Callable) -> Mask | None:
        if getattr(function, "__module__", None) != masking_utils.__name__:
            return None
        maker, contents = function.__qualname__.partition(".")[0], _contents(function)
        if maker in _OPERATORS:
            parts = [self._read(part) for part in contents["mask_functions"]]
            return None if None in parts else reduce(_OPERATORS[maker], parts)
        if maker == "remap_positions_for_packed_sequence":
            return self._read(contents["mask_function"])
        if maker == "packed_sequence_mask_function":
            self.is_packed = True
        if maker == "blockwise_overlay":
            self.block_ids = contents["block_sequence_ids"]
        return _LEAVES[maker](contents) if maker in _LEAVES else None


_OPERATORS = {"and_masks": operator.and_, "or_masks": operator.or_}

_SIMPLEST = {(None, None): masks.full(), (None, 0): masks.causal()}


def _simplified(expression: Mask) -> Mask:
    """The same in fewer words, where it is a band."""
    band = expression.band()
    left, right = band or (None, None)
    if left is not None and right is not None:
        return masks.window(left, right)
    return _SIMPLEST.get(band, expression)


# Of a causal window transformers counts all keys, the query's own among them; of another the keys on each side.
# Its chunks begin at a row's first token, as positions do. Sequences never see each other anyway.
_LEAVES: dict[str, Callable[[dict[str, Any]], Mask]] = {
    "causal_mask_function": lambda contents: masks.causal(),
    "bidirectional_mask_function": lambda contents: masks.full(),
    "sliding_window_overlay": lambda contents: masks.window(contents["sliding_window"] - 1, _FAR),
    "sliding_window_bidirectional_overlay": lambda contents: masks.window(contents["sliding_window"]),
    "chunked_overlay": lambda contents: masks.chunk(contents["chunk_size"]),
    "blockwise_overlay": lambda contents: masks.segments(),
    "packed_sequence_mask_function": lambda contents: masks.full(),
}


def _contents(function: Callable) -> dict[str, Any]:
    """The variables that a closure holds."""
    cells = function.__closure__ or ()  # type: ignore[attr-defined]
    names = function.__code__.co_freevars  # type: ignore[attr-defined]
    return {name: cell.cell_contents for name, cell in zip(names, cells, strict=True)}


def _in_each_sequence(function: Callable, sequence_ids: Tensor, positions: Tensor) -> Callable:
    """A mask function that is asked about positions in a sequence in place of columns; ids and positions `(B, T)`."""

    def inner(batch_idx, head_idx, q_idx, kv_idx):
        same = sequence_ids[batch_idx, q_idx] == sequence_ids[batch_idx, kv_idx]
        return same & function(batch_idx, head_idx, positions[batch_idx, q_idx], positions[batch_idx, kv_idx])

    return inner


# --- Masks -----------------------------------------------------------------------------------------------------------


@outside_graph
def dynmask_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = masking_utils.causal_mask_function,
    attention_mask: Tensor | StockMask | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    config: PreTrainedConfig | None = None,
    **kwargs,
) -> StockMask:
    """What transformers' `AttentionMaskInterface` calls.

    Args:
        batch_size, q_length, kv_length (`int`): B, Tq and Tk.
        q_offset, kv_offset (`int`): Column of the first query and of the first key.
        mask_function (`Callable`): Whether a query may see a key, given their row, head and columns.
        attention_mask (bool `Tensor` of shape `(B, columns)`, *optional*): False where no token is.
        use_vmap (`bool`): Whether `mask_function` takes one cell at a time.
        config ([`~transformers.PreTrainedConfig`], *optional*): The model's.
    """
    if isinstance(attention_mask, StockMask):  # `generate` has made it ahead of the forward pass
        return attention_mask
    batches = _batches.get()
    if attention_mask is None and batches:
        attention_mask = batches[-1].padding(kv_length, device)
    padding = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
    text = getattr(config, CONFIG_ENTRY, None)
    return StockMask(
        shape=(batch_size, 1, q_length, kv_length),
        offsets=(int(q_offset), int(kv_offset)),
        function=mask_function,
        use_vmap=use_vmap,
        padding=None if padding is None or bool(padding.all()) else padding.expand(batch_size, -1),
        chosen=None if text is None else parse(text),
        device=torch.device(device),
        model_type=getattr(config, "model_type", "stock"),
    )


@dataclass(eq=False, kw_only=True)
class StockMask:
    """A mask that a stock model has asked for, and what became of it in its forward pass.

    It travels through the model where a mask tensor would, and refuses to be computed with.

    Attributes:
        shape (`tuple[int, int, int, int]`): `(B, 1, Tq, Tk)`.
        offsets (`tuple[int, int]`): Column of the first query and of the first key.
        function (`Callable`), use_vmap (`bool`): Transformers' mask function, and whether it takes one cell at a time.
        padding (bool `Tensor` of shape `(B, columns)`, *optional*): Where tokens are; `None`: everywhere.
        chosen (`Mask`, *optional*): What [`set_mask`] put in place of `function`.
        device (`torch.device`), model_type (`str`): The model's.
    """

    shape: tuple[int, int, int, int]
    offsets: tuple[int, int]
    function: Callable
    use_vmap: bool
    padding: Tensor | None
    chosen: Mask | None
    device: torch.device
    model_type: str
    _answers: dict[tuple[int, torch.device], MaskPlan | Tensor] = field(default_factory=dict)

    ndim = 4

    def contiguous(self) -> StockMask:
        """Itself: what `generate` asks of masks that it makes ahead."""
        return self

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        everything = [*args, *(kwargs or {}).values()]
        mask = next(value for value in everything if isinstance(value, StockMask))
        raise mask._refusal(getattr(function, "__name__", str(function)))

    def __getitem__(self, index):
        raise self._refusal("[]")

    def __getattr__(self, name: str):
        raise AttributeError(name) if name.startswith("_") else self._refusal(name)

    def _refusal(self, operation: str) -> Exception:
        return TypeError(
            f"attn_implementation='{NAME}' needs a model that leaves its masks to transformers' attention interface; "
            f"this {self.model_type} model computes with one (`{operation}`)"
        )

    def answer(self, query: Tensor, has_bias: bool = False) -> MaskPlan | Tensor:
        """A plan, where the mask has an expression and every key is a query too; else the mask cell by cell.

        Args:
            query (`Tensor` of shape `(B, H, Tq, D)`): The queries of the layer that asks.
            has_bias (`bool`, *optional*, defaults to `False`): Whether a bias of the scores stands for positions.

        Returns:
            [`MaskPlan`], or bool `Tensor` of shape `(B, 1 | H, Tq, Tk)`.

        Raises:
            ValueError: A flat batch that the model cannot take, or whose arguments contradict each other.
        """
        key = (query.shape[1], query.device)
        if key not in self._answers:
            starts = self._starts(_batches.get(), has_bias)
            if self._is_square and self._expression is not None:
                self._answers[key] = self._plan(self._expression, starts, query.device)
            else:
                self._answers[key] = self._cells(starts, query.shape[1]).to(query.device)
        return self._answers[key]

    @cached_property
    def _known(self) -> MaskFunction:
        return MaskFunction.read(self.function)

    @property
    def _expression(self) -> Mask | None:
        return self._known.expression if self.chosen is None else self.chosen

    @property
    def _is_square(self) -> bool:
        """Whether every key is a query too, as far as numbers tell."""
        return self.shape[2] == self.shape[3] and self.offsets == (0, 0)

    @property
    def _may_cross(self) -> bool:
        """Whether keys may be of another sequence than queries. `padding` is then that of the keys."""
        band = None if self._known.expression is None else self._known.expression.band()
        return self.chosen is None and band is not None and band[0] == band[1]

    def _present(self, side: int) -> Tensor | None:
        """Bool `(B, T)`: which columns of the queries (0) or the keys (1) hold a token; `None`: all."""
        first = self.offsets[side]
        return None if self.padding is None else self.padding[:, first : first + self.shape[2 + side]]

    # --- Sequences ---

    def _starts(self, batches: tuple[Batch, ...], has_bias: bool) -> Tensor | None:
        """Bool `(B, T)`: the columns at which sequences begin; `None`: each row is one sequence."""
        if not batches:
            raise ValueError(
                f"attn_implementation='{NAME}' must know what the {self.model_type} model is given: call the model, "
                "`model(...)`; got a call of a part of it, or of `model.forward`"
            )
        batch = batches[-1]
        crosses = any(_has_cross_attention(outer.model.config) for outer in batches)
        starts = None
        position_ids = batch.tensor("position_ids", self.device)
        if (
            position_ids is not None
            and position_ids.shape[1:] == (self.shape[2],)
            and not (crosses and self._may_cross)
        ):
            self._check_continued(position_ids)
            starts = _restarts(position_ids.expand(self.shape[0], -1), self._present(0))
        cu_seq_lens = batch.cu_seq_lens(self.device)
        if cu_seq_lens is not None:
            by_positions, starts = (
                starts,
                self._checked(cu_seq_lens, batch.tensor("cu_seq_lens_k", self.device), starts),
            )
        else:
            by_positions = starts
        if starts is None or not bool(starts[:, 1:].any()):
            return None
        self._check_flat(batch, crosses, counts_columns=by_positions is None and not has_bias)
        for heeded in batches:
            heeded.is_heeded = True
        return starts

    def _checked(self, cu_seq_lens: Tensor, of_keys: Tensor | None, by_positions: Tensor | None) -> Tensor:
        """Bool `(1, T)`: what `cu_seq_lens` say, if nothing contradicts them."""
        rows, _, width, _ = self.shape
        if rows != 1 or int(cu_seq_lens[-1]) != width:
            raise ValueError(
                f"`cu_seq_lens_q` must be of one row and end at its width; got an end of {int(cu_seq_lens[-1])} for "
                f"{rows} rows of width {width}"
            )
        if of_keys is not None and not torch.equal(of_keys, cu_seq_lens):
            raise ValueError(
                f"`cu_seq_lens_k` must equal `cu_seq_lens_q`, {cu_seq_lens.tolist()}; got {of_keys.tolist()}"
            )
        starts = torch.zeros(1, width + 1, dtype=torch.bool, device=self.device)
        starts = starts.index_fill(1, cu_seq_lens.long(), True)[:, :width]
        if by_positions is not None and not torch.equal(by_positions, starts):
            raise ValueError(
                f"`position_ids` must begin anew where `cu_seq_lens_q` does, {cu_seq_lens.tolist()}; they begin at "
                f"{by_positions[0].nonzero().flatten().tolist()}"
            )
        return starts

    def _check_flat(self, batch: Batch, crosses: bool, counts_columns: bool) -> None:
        model = f"this {self.model_type} model"
        if crosses:
            raise ValueError(f"a flat batch needs a model without cross-attention; {model} has it")
        if counts_columns:
            raise ValueError(f"a flat batch needs a model that takes `position_ids`; {model} counts columns")
        meeting = _meeting(batch.model)
        if meeting is not None:
            raise ValueError(f"a flat batch needs a model whose tokens meet in attention alone; {model} has {meeting}")
        if not self._is_square:
            raise ValueError(
                f"a flat batch must have as many keys as queries, {self.shape[2]}; got {self.shape[3]} (a static cache "
                "cannot take it, nor one that is in use)"
            )

    def _check_continued(self, position_ids: Tensor) -> None:
        """A flat batch leaves several sequences in a cache; the next token would see them all."""
        column = self.offsets[0]
        if column == 0:
            return
        position = position_ids[:, 0]
        before = torch.full_like(position, column) if self.padding is None else self.padding[:, :column].sum(1)
        behind = position < before
        if self.padding is not None:
            behind = behind & self.padding[:, column]
        if bool(behind.any()):
            raise ValueError(
                f"`position_ids` must go on from the {before.tolist()} tokens in the cache; got {position.tolist()} (a "
                "cache that a flat batch has filled cannot be gone on from)"
            )

    # --- Plans and cells ---

    def _plan(self, expression: Mask, starts: Tensor | None, device: torch.device) -> MaskPlan:
        fields = {name: value for name in expression.fields if (value := _field(name, device)) is not None}
        if self.chosen is None and self._known.block_ids is not None:
            fields["segment_ids"] = _unique_where_negative(self._known.block_ids).to(device)
        present = self._present(0)
        rows = _first_and(torch.zeros(self.shape[0], self.shape[2] - 1, dtype=torch.bool, device=self.device))
        if starts is None and present is not None and self._may_cross:
            layout, key_layout = _layout(rows, None), _layout(rows, present, by_column=True).to(device)
        else:
            layout, key_layout = _layout(rows if starts is None else starts, present), None
        return MaskPlan(expression, layout.to(device), key_layout, fields=fields)

    def _cells(self, starts: Tensor | None, heads: int) -> Tensor:
        if self.chosen is not None:
            return self._chosen_cells(self.chosen, heads)
        function = self.function
        if starts is not None and not self._known.is_packed:
            layout = _layout(starts, self._present(0))
            function = _in_each_sequence(function, starts.cumsum(1), layout.unflatten(layout.positions[None]))
        return masking_utils.sdpa_mask(  # type: ignore[return-value]
            *(self.shape[0], *self.shape[2:], *self.offsets),
            mask_function=function,
            attention_mask=self.padding,
            allow_is_causal_skip=False,
            use_vmap=self.use_vmap,
            device=self.device,
        )

    def _chosen_cells(self, mask: Mask, heads: int) -> Tensor:
        """The chosen expression where keys come out of a cache."""
        if mask.fields:
            raise ValueError(f"a mask that reads fields cannot look back into a cache; got '{mask}'")
        i, j = (
            torch.arange(first, first + size, device=self.device).view(1, 1, -1)
            for first, size in zip(self.offsets, self.shape[2:], strict=True)
        )
        real = j < self.offsets[0] + self.shape[2]  # a static cache has room beyond the queries
        if self.padding is not None:
            real = real & self._present(1)[:, None]  # type: ignore[index]
            left = self.padding.int().argmax(1)[:, None, None]
            i, j = i - left, j - left
        return allowed_by_head(mask, heads, i[..., None], j[:, :, None], Fields()) & real[:, :, None]


def _field(name: str, device: torch.device) -> Tensor | None:
    """A field for the chosen expression: an argument of the innermost model that has it."""
    found = (batch.tensor(name, device) for batch in reversed(_batches.get()))
    return next((value for value in found if value is not None), None)


def _first_position(model: PreTrainedModel) -> int:
    """The position of a sequence's first token: 0, or in RoBERTa's family the one behind the padding's."""
    for name, part in model.named_modules():
        if name.endswith("position_embeddings") and getattr(part, "padding_idx", None) is not None:
            return part.padding_idx + 1  # type: ignore[operator]
    return 0


def _meeting(model: PreTrainedModel) -> str | None:
    """What lets tokens of a row meet outside attention, if anything does."""
    others = sorted(set(getattr(model.config, "layer_types", None) or ()) - ATTENTION_LAYERS)
    if others:
        return f"layers of type {', '.join(others)}"
    setting = next((name for name in MEETINGS if getattr(model.config, name, None)), None)
    if setting is not None:
        return f"`{setting}`"
    parts = (name for name, part in model.named_modules() if isinstance(part, nn.modules.conv._ConvNd | nn.RNNBase))
    return next(parts, None)


def _first_and(later: Tensor) -> Tensor:
    """Bool `(B, T)`: True in the first column, and what `later (B, T - 1)` says in those after it."""
    return nn.functional.pad(later, (1, 0), value=True)


def _restarts(position_ids: Tensor, present: Tensor | None) -> Tensor:
    """Bool `(B, T)`: True in the first column, and at tokens whose position does not follow on the token before.

    A position follows that is the next one, or has gone up as the column has.
    """
    if present is None:
        return _first_and(position_ids.diff(dim=1) != 1)
    row, column = present.nonzero(as_tuple=True)
    step = position_ids[row, column].diff()
    new = (step != 1) & (step != column.diff()) & (row.diff() == 0)
    starts = torch.zeros_like(present).index_put((row[1:][new], column[1:][new]), torch.tensor(True, device=row.device))
    return _first_and(starts[:, 1:])


def _layout(starts: Tensor, present: Tensor | None, by_column: bool = False) -> SequenceLayout:
    """Layout of a batch whose sequences begin at `starts (B, T)` and hold the tokens at `present (B, T)`.

    Positions count from a sequence's first token, or `by_column` from where it begins; absent tokens count too, as they
    do in transformers' masks.
    """
    first = starts.flatten()
    if present is None:
        places = torch.arange(first.numel(), device=first.device)
    else:
        places = present.flatten().nonzero().squeeze(1)
    origins = first.nonzero().squeeze(1)
    sequence = (first.cumsum(0) - 1)[places]
    sizes = torch.zeros_like(origins).index_add_(0, sequence, torch.ones_like(sequence))
    if not by_column:
        origins = torch.full_like(origins, first.numel()).scatter_reduce(0, sequence, places, "amin")
    return SequenceLayout(
        shape=(starts.shape[0], starts.shape[1]),
        sizes=tuple(sizes.tolist()),
        rank=torch.arange(origins.numel(), device=first.device),
        indices=places,
        positions=places - origins[sequence],
    )


def _unique_where_negative(block_ids: Tensor) -> Tensor:
    """Ids of 0 and above as they are; below, an id of its own for each column: such tokens are in no block."""
    return torch.where(block_ids < 0, -1 - torch.arange(block_ids.shape[1], device=block_ids.device), block_ids)


# --- Attention -------------------------------------------------------------------------------------------------------


@outside_graph
def dynmask_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: StockMask | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    output_attentions: bool | None = None,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """What transformers' `AttentionInterface` calls.

    Args:
        module (`nn.Module`): The attention layer.
        query (`Tensor` of shape `(B, H, Tq, D)`): Queries.
        key (`Tensor` of shape `(B, Hk, Tk, D)`): Keys; Hk divides H.
        value (`Tensor` of shape `(B, Hk, Tk, Dv)`): Values.
        attention_mask ([`StockMask`] or `Tensor` of shape `(B, 1 | H, Tq, Tk)`, *optional*):
            A tensor is an explicit mask, bool or added to the scores. `None`: causal or full, as `is_causal` says.
        scaling (`float`, *optional*): Factor of the scores. `None`: `D ** -0.5`.
        dropout (`float`, *optional*, defaults to 0.0): Probability with which a weight is dropped.
        is_causal (`bool`, *optional*): Read where there is no mask. `None`: as the layer says.
        softcap (`float`, *optional*): Bound of the scores (Gemma 2, arXiv:2408.00118, section 2).
        s_aux (`Tensor` of shape `(H,)`, *optional*): Score of a key without value (attention sink, gpt-oss).
        position_bias (`Tensor` of shape `(B | 1, H, Tq, Tk)`, *optional*): Added to the scores (T5, arXiv:1910.10683).
        output_attentions (`bool`, *optional*): Whether to hand back the weights.

    Returns:
        `(output (B, Tq, H, Dv), weights (B, H, Tq, Tk) or None)`; exactly 0 for a query with no key to see.

    Raises:
        ValueError: An argument that is not served, or a flat batch that the model cannot take.
    """
    for name in UNSERVED_ARGUMENTS:
        if kwargs.get(name) is not None:
            raise ValueError(f"attn_implementation='{NAME}' does not serve the `{name}` of {type(module).__name__}")
    factor = query.shape[-1] ** -0.5 if scaling is None else scaling
    bias = position_bias
    if isinstance(attention_mask, StockMask):
        if attention_mask.shape[2:] != (query.shape[2], key.shape[2]):
            raise ValueError(
                f"{type(module).__name__} must have as many queries and keys as its mask was made for, "
                f"{attention_mask.shape[2:]}; got {(query.shape[2], key.shape[2])}"
            )
        answer = attention_mask.answer(query, has_bias=bias is not None)
    else:
        _check_unnoted(module, query, attention_mask)
        answer, added = _unnoted(module, query, key, attention_mask, is_causal)
        bias = added if bias is None or added is None else bias + added
    scored = softcap is not None or s_aux is not None or output_attentions
    if isinstance(answer, MaskPlan):
        if bias is None and not scored:
            return _by_plan(query, key, value, answer, factor, dropout).transpose(1, 2), None
        answer = answer.dense(query.shape[1])
    weights = None
    if scored:
        output, weights = _by_scores(query, key, value, answer, bias, factor, dropout, softcap, s_aux)
    else:
        output = nn.functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=answer if bias is None else torch.where(answer, bias, -torch.inf),
            dropout_p=dropout,
            scale=factor,
            enable_gqa=query.shape[1] != key.shape[1],
        )
    return output.transpose(1, 2).contiguous(), weights


def _check_unnoted(module: nn.Module, query: Tensor, mask: Tensor | None) -> None:
    """A mask that is none, or a tensor, knows nothing of expressions and of sequences."""
    given = "no mask" if mask is None else "an explicit `attention_mask`"
    if getattr(getattr(module, "config", None), CONFIG_ENTRY, None) is not None:
        raise ValueError(f"a mask by `set_mask` needs layers that are given the model's; got {given}")
    batches = _batches.get()
    if not batches:
        return
    batch = batches[-1]
    if batch.cu_seq_lens(query.device) is not None if batch.has_explicit_mask else batch.is_flat:
        raise ValueError(
            f"a flat batch needs layers that are given the model's mask; {type(module).__name__} got {given}"
        )


def _unnoted(
    module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool | None
) -> tuple[Tensor, Tensor | None]:
    """What such a mask allows, and what it adds to the scores."""
    if mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        every = query.new_ones(query.shape[2], key.shape[2], dtype=torch.bool)
        return every.tril() if causal and query.shape[2] > 1 else every, None
    if mask.is_floating_point():
        return mask > torch.finfo(mask.dtype).min, mask
    if mask.dtype != torch.bool:
        raise ValueError(f"an explicit `attention_mask` must be bool or floating point; got {mask.dtype}")
    return mask, None


def _by_plan(query: Tensor, key: Tensor, value: Tensor, plan: MaskPlan, scaling: float, dropout: float) -> Tensor:
    """Attention `(B, H, T, Dv)` of real tokens alone; 0 elsewhere."""
    layout, key_layout = plan.layout, plan.key_layout
    output = dynmask_attention(
        layout.flatten_heads(query),
        key_layout.flatten_heads(key),
        key_layout.flatten_heads(value),
        plan,
        layout,
        key_layout,
        scaling=scaling,
        dropout=dropout,
    )
    return layout.unflatten_heads(output)


def _by_scores(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    allowed: Tensor,
    bias: Tensor | None,
    scaling: float,
    dropout: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Attention `(B, H, Tq, Dv)` and its weights, score by score."""
    key, value = (states.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for states in (key, value))
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if bias is not None:
        scores = scores + bias
    scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    weights = weights[..., : key.shape[2]] * allowed.any(-1, keepdim=True)
    return torch.matmul(nn.functional.dropout(weights, dropout), value), weights
