"""What the forward pass of a stock model is given, made known to its layers, and the sequences that stand in it.

Shape legend: B rows, T columns, S sequences.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from .layout import SequenceLayout, check_not_scattered, outside_graph

NAME = "dynmask"
# Settings that let tokens of a row meet outside attention: of MobileBERT, ESM and Switch Transformers.
MEETINGS = ("trigram_input", "token_dropout", "expert_capacity")
# Kinds of layers, as configurations name them, in which tokens meet in attention alone.
ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
INPUTS = ("input_ids", "inputs_embeds")


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
        return bool(restarts(position_ids, None if padding is None else padding.bool())[:, 1:].any())


_batches: ContextVar[tuple[Batch, ...]] = ContextVar("batches", default=())


def current_batches() -> tuple[Batch, ...]:
    """What the models whose forward passes we are in were given, the outermost first."""
    return _batches.get()


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
    if getattr(model, "_is_replica", False) and "input_ids" in given:
        check_not_scattered(given["input_ids"], given.get("lengths"), getattr(model.config, "pad_token_id", None))
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


# --- What models are like --------------------------------------------------------------------------------------------


def has_cross_attention(config: PreTrainedConfig) -> bool:
    return getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False)


def _first_position(model: PreTrainedModel) -> int:
    """The position of a sequence's first token: 0, or in RoBERTa's family the one behind the padding's."""
    for name, part in model.named_modules():
        if name.endswith("position_embeddings") and getattr(part, "padding_idx", None) is not None:
            return part.padding_idx + 1  # type: ignore[operator]
    return 0


def meeting(model: PreTrainedModel) -> str | None:
    """What lets tokens of a row meet outside attention, if anything does."""
    others = sorted(set(getattr(model.config, "layer_types", None) or ()) - ATTENTION_LAYERS)
    if others:
        return f"layers of type {', '.join(others)}"
    setting = next((name for name in MEETINGS if getattr(model.config, name, None)), None)
    if setting is not None:
        return f"`{setting}`"
    parts = (name for name, part in model.named_modules() if isinstance(part, nn.modules.conv._ConvNd | nn.RNNBase))
    return next(parts, None)


# --- Sequences -------------------------------------------------------------------------------------------------------


def first_and(later: Tensor) -> Tensor:
    """Bool `(B, T)`: True in the first column, and what `later (B, T - 1)` says in those after it."""
    return nn.functional.pad(later, (1, 0), value=True)


def restarts(position_ids: Tensor, present: Tensor | None) -> Tensor:
    """Bool `(B, T)`: True in the first column, and at tokens whose position does not follow on the token before.

    A position follows that is the next one, or has gone up as the column has.
    """
    if present is None:
        return first_and(position_ids.diff(dim=1) != 1)
    row, column = present.nonzero(as_tuple=True)
    step = position_ids[row, column].diff()
    new = (step != 1) & (step != column.diff()) & (row.diff() == 0)
    starts = torch.zeros_like(present).index_put((row[1:][new], column[1:][new]), torch.tensor(True, device=row.device))
    return first_and(starts[:, 1:])


def layout_of(starts: Tensor, present: Tensor | None, by_column: bool = False) -> SequenceLayout:
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
