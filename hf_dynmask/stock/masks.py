"""Transformers' masks as expressions and plans.

Transformers calls [`dynmask_mask`] once per forward pass for each kind of mask, which only records the call in a
[`DeferredMask`]. When the first layer asks for it, the batch's sequences are found and the plan is made, which the
other layers reuse.

Shape legend: B rows, T (Tq, Tk) columns of queries and keys, H heads, D head size.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, reduce
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import PreTrainedConfig, masking_utils

from ..modeling import masks
from ..modeling.fields import Fields
from ..modeling.graph_attention import GraphPlan, fields_of
from ..modeling.layout import SequenceLayout, eager_only
from ..modeling.masks import Mask, allowed_by_head, parse
from ..modeling.plan import MaskPlan
from .batches import (
    CONFIG_ENTRY,
    FLAT_ARGUMENTS,
    IN_GRAPH,
    NAME,
    Batch,
    current_batches,
    first_and,
    has_cross_attention,
    has_neftune,
    layout_of,
    reads_tokens_of_rows,
    restarts,
    token_mixing_outside_attention,
)

_FAR = 2**31  # larger than any position


# --- Transformers' mask functions ------------------------------------------------------------------------------------


@dataclass
class MaskFunction:
    """What is known about a mask function of transformers.

    Attributes:
        expression (`Mask`, *optional*): An equal expression; `None` if some part is not known.
        is_packed (`bool`): Whether it separates the sequences of a row itself.
        block_ids (`Tensor` of shape `(B, T)`, *optional*): Tokens with equal ids of 0 and above see each other.
    """

    expression: Mask | None = None
    is_packed: bool = False
    block_ids: Tensor | None = None

    @classmethod
    def read(cls, function: Callable) -> MaskFunction:
        """Reads a mask function: a closure of `transformers.masking_utils`, recognised by the function that made it."""
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
    """The same mask, simplified if it is a band."""
    band = expression.band()
    left, right = band or (None, None)
    if left is not None and right is not None:
        return masks.window(left, right)
    return _SIMPLEST.get(band, expression)


# In a causal window, transformers counts all keys, including the query's own; otherwise the keys on each side.
# Its chunks begin at a row's first token, as positions do. Sequences never see each other in any case.
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
    """The variables that a closure captures."""
    cells = function.__closure__ or ()  # type: ignore[attr-defined]
    names = function.__code__.co_freevars  # type: ignore[attr-defined]
    return {name: cell.cell_contents for name, cell in zip(names, cells, strict=True)}


def _in_each_sequence(function: Callable, sequence_ids: Tensor, positions: Tensor) -> Callable:
    """Makes a mask function take positions in a sequence instead of columns; ids and positions are `(B, T)`."""

    def inner(batch_idx, head_idx, q_idx, kv_idx):
        same = sequence_ids[batch_idx, q_idx] == sequence_ids[batch_idx, kv_idx]
        return same & function(batch_idx, head_idx, positions[batch_idx, q_idx], positions[batch_idx, kv_idx])

    return inner


@torch.compiler.assume_constant_result
def _text_of(function: Callable) -> str | None:
    """The text of a mask function's expression; `None` if it has none, or one that reads fields."""
    found = MaskFunction.read(function)
    return None if found.expression is None or found.expression.fields else str(found.expression)


# --- Masks -----------------------------------------------------------------------------------------------------------


def dynmask_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = masking_utils.causal_mask_function,
    attention_mask: Tensor | DeferredMask | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    config: PreTrainedConfig | None = None,
    **kwargs,
) -> DeferredMask | GraphPlan:
    """The mask function that transformers' `AttentionMaskInterface` calls.

    Args:
        batch_size, q_length, kv_length (`int`): B, Tq and Tk.
        q_offset, kv_offset (`int`): Column of the first query and of the first key.
        mask_function (`Callable`): Returns whether a query may see a key, given row, head and columns.
        attention_mask (bool `Tensor` of shape `(B, columns)`, *optional*): False for absent tokens.
        use_vmap (`bool`): Whether `mask_function` takes one cell at a time.
        config ([`~transformers.PreTrainedConfig`], *optional*): The model's.

    Returns:
        [`DeferredMask`]; in the graph of a flat batch the plan itself.
    """
    batch = IN_GRAPH.batch
    if batch is not None:
        batch.sequences_separated = True
        text = getattr(config, CONFIG_ENTRY, None) or _text_of(mask_function)
        is_of_batch = (batch_size, q_length) == batch.layout.shape and q_length == kv_length
        if text is not None and attention_mask is None and is_of_batch:
            fields = {name: batch.given[name] for name in fields_of(text)}
            return GraphPlan(text, batch.layout, batch.layout, fields)
    return _deferred(
        (batch_size, 1, q_length, kv_length),
        (q_offset, kv_offset),
        mask_function,
        attention_mask,
        use_vmap,
        device,
        config,
    )


@eager_only
def _deferred(
    shape: tuple[int, int, int, int],
    offsets: tuple[int | Tensor, int],
    mask_function: Callable,
    attention_mask: Tensor | DeferredMask | None,
    use_vmap: bool,
    device: torch.device | str,
    config: PreTrainedConfig | None,
) -> DeferredMask:
    if isinstance(attention_mask, DeferredMask):  # `generate` has made it before the forward pass
        return attention_mask
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(
            "`attention_mask` must have a row for each row of tokens, (B, T), or be an explicit mask of four "
            f"dimensions, (B, H, T, T); got shape {tuple(attention_mask.shape)}"
        )
    padding = masking_utils.prepare_padding_mask(attention_mask, shape[3], offsets[1])
    text = getattr(config, CONFIG_ENTRY, None)
    return DeferredMask(
        shape=shape,
        offsets=(int(offsets[0]), int(offsets[1])),
        function=mask_function,
        use_vmap=use_vmap,
        padding=None if padding is None or _all(padding) else padding.expand(shape[0], -1),
        chosen=None if text is None else parse(text),
        device=torch.device(device),
        model_type=getattr(config, "model_type", "stock"),
        unpadded=_unpadded(),
        absent_see=any(batch.absent_see for batch in current_batches()),
    )


def states_sequences(config: PreTrainedConfig) -> bool:
    """Whether a model runs with this attention on a batch that states where its sequences are."""
    if config._attn_implementation != NAME:
        return False
    if torch.compiler.is_compiling() or IN_GRAPH.batch is not None:
        return IN_GRAPH.batch is not None
    batches = current_batches()
    return bool(batches) and batches[-1].layout is not None


def _check_given(mask: Mask, fields: Mapping[str, Tensor]) -> None:
    for name in sorted(set(mask.fields) - fields.keys()):
        raise ValueError(
            f"the mask '{mask}' reads the field `{name}`, which the batch lacks (the Trainer drops columns that a "
            "stock model's `forward` does not name, unless `TrainingArguments(remove_unused_columns=False)` is set)"
        )


def _unpadded() -> SequenceLayout | None:
    """The layout of the running model's batch, if that was unpadded."""
    batches = current_batches()
    return batches[-1].layout if batches and batches[-1].positions is not None else None


def _all(padding: Tensor) -> bool:
    """Whether all tokens are real; raises if the mask holds other numbers than 0 and 1."""
    batches = current_batches()
    return batches[0].read_along(padding.all())[0] if batches else bool(padding.all())


@dataclass(eq=False, kw_only=True)
class DeferredMask:
    """A mask that a stock model has asked for, made when the first layer needs it.

    It is passed through the model in place of a mask tensor, and raises if the model computes with it.

    Attributes:
        shape (`tuple[int, int, int, int]`): `(B, 1, Tq, Tk)`.
        offsets (`tuple[int, int]`): Column of the first query and of the first key.
        function (`Callable`), use_vmap (`bool`): Transformers' mask function, and whether it takes one cell at a time.
        padding (bool `Tensor` of shape `(B, columns)`, *optional*): Which tokens are real; `None`: all.
        chosen (`Mask`, *optional*): The mask that [`set_mask`] put in place of `function`.
        device (`torch.device`), model_type (`str`): The model's.
        unpadded ([`SequenceLayout`], *optional*): The layout of the flat batch, if padded rows were unpadded.
        absent_see (`bool`): Whether absent tokens see the others.
    """

    shape: tuple[int, int, int, int]
    offsets: tuple[int, int]
    function: Callable
    use_vmap: bool
    padding: Tensor | None
    chosen: Mask | None
    device: torch.device
    model_type: str
    unpadded: SequenceLayout | None = None
    absent_see: bool = False
    _answers: dict[tuple[int, torch.device], MaskPlan | Tensor] = field(default_factory=dict)

    ndim = 4

    def contiguous(self) -> DeferredMask:
        """Returns itself; `generate` calls it on masks that it makes in advance."""
        return self

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        everything = [*args, *(kwargs or {}).values()]
        mask = next(value for value in everything if isinstance(value, DeferredMask))
        raise mask._refusal(getattr(function, "__name__", str(function)))

    def __getitem__(self, index):
        raise self._refusal("[]")

    def __getattr__(self, name: str):
        raise AttributeError(name) if name.startswith("_") else self._refusal(name)

    def _compute(self, *others) -> NoReturn:
        raise self._refusal("an operator")

    # Where one is a tensor's, the error of `__torch_function__` is lost.
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __and__ = __rand__ = _compute
    __or__ = __ror__ = __lt__ = __le__ = __gt__ = __ge__ = __neg__ = __invert__ = _compute

    def _refusal(self, operation: str) -> Exception:
        return TypeError(
            f"attn_implementation='{NAME}' needs a model that leaves its masks to transformers' attention interface; "
            f"this {self.model_type} model computes with one (`{operation}`)"
        )

    def answer(self, query: Tensor, passed: Mapping[str, Any], has_bias: bool = False) -> MaskPlan | Tensor:
        """What a layer's attention needs: a plan, or the mask cell by cell.

        It is a plan if keys and queries are the same tokens and the mask has an expression, or if rows hold several
        sequences.

        Args:
            query (`Tensor` of shape `(B, H, Tq, D)`): The queries of the layer that asks.
            passed (`Mapping[str, Any]`): The arguments that the model passes to its layers' attention.
            has_bias (`bool`, *optional*, defaults to `False`): Whether a bias of the scores encodes positions.

        Returns:
            [`MaskPlan`], or bool `Tensor` of shape `(B, 1 | H, Tq, Tk)`.

        Raises:
            ValueError: A flat batch that the model cannot take, or whose arguments contradict each other.
        """
        key = (query.shape[1], query.device)
        if key not in self._answers:
            batches = current_batches()
            self._check_causality(batches)
            layout = self._sequences(batches, has_bias) if batches else self._check_rows(passed)
            if self._is_square and self._expression is not None:
                self._answers[key] = self._plan(self._expression, layout, passed, query.device)
            else:
                cells = self._cells(layout, query.shape[1]).to(query.device)
                self._answers[key] = cells if layout is None else _plan_of_cells(cells, layout)
        return self._answers[key]

    def _check_causality(self, batches: tuple[Batch, ...]) -> None:
        """Raises if the caller's `is_causal`, which other attention may obey, is not what the mask is."""
        band = None if self._expression is None else self._expression.band()
        if band is None:
            return
        for given in (batch.given.get("is_causal") for batch in batches):
            if given is not None and given != (band[1] == 0):
                raise ValueError(
                    f"`is_causal` must be what the mask of this {self.model_type} model is, '{self._expression}'; got "
                    f"{given} (`model.config.is_causal = False` makes a decoder bidirectional)"
                )

    @cached_property
    def _known(self) -> MaskFunction:
        return MaskFunction.read(self.function)

    @property
    def _expression(self) -> Mask | None:
        return self._known.expression if self.chosen is None else self.chosen

    @property
    def _is_square(self) -> bool:
        """Whether there are as many keys as queries, at the same columns."""
        return self.shape[2] == self.shape[3] and self.offsets == (0, 0)

    @property
    def _may_cross(self) -> bool:
        """Whether keys may be other tokens than queries, as in cross-attention. `padding` is then that of the keys."""
        band = None if self._known.expression is None else self._known.expression.band()
        return self.chosen is None and band is not None and band[0] == band[1]

    def present(self, side: int) -> Tensor | None:
        """Bool `(B, T)`: which columns of the queries (0) or keys (1) hold a real token; `None`: all."""
        first = self.offsets[side]
        return None if self.padding is None else self.padding[:, first : first + self.shape[2 + side]]

    # --- Sequences ---

    def _sequences(self, batches: tuple[Batch, ...], has_bias: bool) -> SequenceLayout | None:
        """The layout of the queries of a flat batch; `None`: each row is one sequence."""
        batch = batches[-1]
        is_unpadded = batch.positions is not None  # never true for a model that reads the states of another one
        crosses = not is_unpadded and any(has_cross_attention(outer.model.config) for outer in batches)
        position_ids = None if crosses and self._may_cross else self._own(batch.given.get("position_ids"))
        if batch.layout is None:
            layout = None if position_ids is None else self._divided_by(position_ids)
        else:
            layout = self._stated(batch)
        if layout is None:
            return None
        takes_positions = position_ids is not None and "position_ids" in batch.names
        self._check_flat(batch, crosses, counts_columns=not (takes_positions or has_bias or is_unpadded))
        if not is_unpadded and reads_tokens_of_rows(batches[0].model):
            raise ValueError(
                f"a flat batch needs a head that reads all tokens, or what its base model pools; "
                f"{type(batches[0].model).__name__} reads one token of each row (give it rows)"
            )
        batch.pooled_by = None if is_unpadded else layout
        for outer in batches:
            outer.sequences_separated = True
        return layout

    def _check_rows(self, passed: Mapping[str, Any]) -> None:
        """Raises if a model whose forward arguments are not known gets more than plain rows."""
        names = [name for name in FLAT_ARGUMENTS if passed.get(name) is not None]
        position_ids = self._own(passed.get("position_ids"))
        if self._known.is_packed or position_ids is not None and self._divided_by(position_ids) is not None:
            names.append("position_ids")
        if names:
            raise ValueError(
                f"`{names[0]}` must be given to a model that is made ready for attn_implementation='{NAME}'; this "
                f"{self.model_type} model is not, or its `forward` was replaced "
                f"(`model.set_attn_implementation('{NAME}')` makes it ready)"
            )

    def _own(self, position_ids: Tensor | None) -> Tensor | None:
        """`position_ids (B, T)` if they are those of the queries."""
        if position_ids is None or position_ids.shape[1:] != (self.shape[2],):
            return None
        position_ids = position_ids.to(self.device)
        self._check_continued(position_ids)
        return position_ids.expand(self.shape[0], -1)

    def _divided_by(self, position_ids: Tensor) -> SequenceLayout | None:
        """The layout of rows divided where positions restart; `None` if they never do."""
        present = self.present(0)
        starts = restarts(position_ids, present)
        return layout_of(starts, present) if bool(starts[:, 1:].any()) else None

    def _stated(self, batch: Batch) -> SequenceLayout | None:
        """The layout that a batch states, which must be that of the queries; `None` if each row is one sequence."""
        layout: SequenceLayout = batch.layout  # type: ignore[assignment]
        if layout.shape != (self.shape[0], self.shape[2]):
            raise ValueError(
                f"`{batch.stated_by}` must be of the mask's queries, of shape {(self.shape[0], self.shape[2])}; got "
                f"{layout.shape}"
            )
        if not batch.has_flat_layout:
            return None
        if self.padding is None:
            return layout
        starts = layout.unflatten(layout.begins[None]).to(self.device)  # positions count absent tokens, too
        return layout_of(first_and(starts[:, 1:]), self.present(0))

    def _check_flat(self, batch: Batch, crosses: bool, counts_columns: bool) -> None:
        """Raises if the model cannot take a flat batch."""
        model = f"this {self.model_type} model"
        if has_neftune(batch.model):
            raise ValueError(
                "NEFTune must have rows: its noise depends on the width of a row, and a flat batch is as wide as all "
                "its sequences together; got a flat batch"
            )
        if crosses:
            raise ValueError(f"a flat batch needs a model without cross-attention; {model} has it")
        if counts_columns:
            raise ValueError(f"a flat batch needs a model that takes `position_ids`; {model} counts columns")
        outside = token_mixing_outside_attention(batch.model)
        if outside is not None:
            raise ValueError(f"a flat batch needs a model whose tokens meet in attention only; {model} has {outside}")
        if not self._is_square:
            raise ValueError(
                f"a flat batch must have as many keys as queries, {self.shape[2]}; got {self.shape[3]} (it cannot be "
                "used with a static cache, or with a cache that holds tokens)"
            )

    def _check_continued(self, position_ids: Tensor) -> None:
        """Raises if a flat batch has filled the cache, as the next token would see all its sequences."""
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
                "cache that a flat batch has filled cannot be continued)"
            )

    # --- Plans and cells ---

    def _plan(
        self, expression: Mask, layout: SequenceLayout | None, passed: Mapping[str, Any], device: torch.device
    ) -> MaskPlan:
        given = [passed, *(batch.given for batch in current_batches())]
        fields = {name: each[name].to(device) for name in expression.fields for each in given if _has(each, name)}
        if self.chosen is not None:
            _check_given(self.chosen, fields)
        elif self._known.block_ids is not None:
            fields["segment_ids"] = _unique_where_negative(self._known.block_ids).to(device)
        present, key_layout = self.present(0), None
        if layout is None:
            rows = SequenceLayout.full((self.shape[0], self.shape[2]), self.device)
            layout = rows if present is None else layout_of(rows.begins.view(rows.shape), present)
            if present is not None and (self._may_cross or self.absent_see):
                key_layout = layout_of(rows.begins.view(rows.shape), present, by_column=True).to(device)
                layout = rows
        return MaskPlan(expression, layout.to(device), key_layout, fields=fields)

    def _cells(self, layout: SequenceLayout | None, heads: int) -> Tensor:
        if self.chosen is not None:
            return self._chosen_cells(self.chosen, heads)
        function = self.function
        if layout is not None and not self._known.is_packed:
            of_places = (layout.unflatten(values[None]) for values in (layout.sequence_ids, layout.positions))
            function = _in_each_sequence(function, *of_places)
        return masking_utils.sdpa_mask(  # type: ignore[return-value]
            *(self.shape[0], *self.shape[2:], *self.offsets),
            mask_function=function,
            attention_mask=self.padding,
            allow_is_causal_skip=False,
            use_vmap=self.use_vmap,
            device=self.device,
        )

    def _chosen_cells(self, mask: Mask, heads: int) -> Tensor:
        """Evaluates the chosen expression on keys from a cache."""
        if mask.fields:
            raise ValueError(f"a mask that reads fields cannot be used with a cache; got '{mask}'")
        i, j = (
            torch.arange(first, first + size, device=self.device).view(1, 1, -1)
            for first, size in zip(self.offsets, self.shape[2:], strict=True)
        )
        real = j < self.offsets[0] + self.shape[2]  # a static cache has room beyond the queries
        if self.padding is not None:
            real = real & self.present(1)[:, None]  # type: ignore[index]
            left = self.padding.int().argmax(1)[:, None, None]
            i, j = i - left, j - left
        return allowed_by_head(mask, heads, i[..., None], j[:, :, None], Fields()) & real[:, :, None]


def _plan_of_cells(cells: Tensor, layout: SequenceLayout) -> MaskPlan:
    """A plan for the cells of rows with several sequences, which it separates."""
    return MaskPlan(masks.dense(), layout.to(cells.device), fields={"attention_mask": cells})


def _unique_where_negative(block_ids: Tensor) -> Tensor:
    """Block ids `(B, T)` in which each negative id is unique, since tokens with negative ids are in no block."""
    return torch.where(block_ids < 0, -1 - torch.arange(block_ids.shape[1], device=block_ids.device), block_ids)


def _has(given: Mapping[str, Any], name: str) -> bool:
    return given.get(name) is not None
