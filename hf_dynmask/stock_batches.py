"""What the forward pass of a stock model is given, made known to its layers, and the sequences that stand in it.

Shape legend: B rows, T columns, S sequences.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from .layout import SequenceLayout

NAME = "dynmask"
CONFIG_ENTRY = "dynmask_mask"  # where `set_mask` keeps its text in a stock model's configuration
# Settings that let tokens of a row meet outside attention: of MobileBERT, ESM and Switch Transformers.
MEETINGS = ("trigram_input", "token_dropout", "expert_capacity")
# Kinds of layers, as configurations name them, in which tokens meet in attention alone.
ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
INPUTS = ("input_ids", "inputs_embeds")
TARGETS = ("decoder_input_ids", "decoder_inputs_embeds", "labels")
CACHES = ("cache", "past_key_values")
# Arguments that say where sequences begin, besides `lengths` and `position_ids`, and that bound how long they are.
CUMULATIVE = ("cu_seq_lens_q", "cu_seq_lens_k")
BOUNDS = ("max_length_q", "max_length_k")
FLAT_ARGUMENTS = ("lengths", *CUMULATIVE, "seq_idx")


@dataclass(eq=False)
class Batch:
    """What the forward pass of a model was given.

    Attributes:
        model ([`~transformers.PreTrainedModel`]): The model.
        names (`Collection[str]`): The model's own arguments.
        given (`dict`): Arguments by name.
        is_inner (`bool`): Whether another model that is made ready runs this one.
        starts (bool `Tensor` of shape `(B, T)`, *optional*):
            Where sequences begin, if `lengths` of one row, `cu_seq_lens_q` or `seq_idx` say so.
        told_by (`str`): Which of these does.
        is_heeded (`bool`): Whether some layer's attention has kept the sequences of the batch apart.
    """

    model: PreTrainedModel
    names: Collection[str]
    given: dict[str, Any]
    is_inner: bool = False
    starts: Tensor | None = None
    told_by: str = ""
    is_heeded: bool = False

    @classmethod
    def read(
        cls, model: PreTrainedModel, names: Collection[str], given: dict[str, Any], is_inner: bool = False
    ) -> Batch:
        """The batch, with what it says of its sequences put where the model reads it.

        Lengths of rows become an attention mask, and a flat batch gets its `position_ids`.

        Raises:
            ValueError: Arguments contradict each other, or cannot be obeyed.
        """
        batch = cls(model, names, dict(given), is_inner)
        if getattr(batch._first_of(CACHES), "is_of_flat_batch", False):
            raise ValueError("a cache must hold one sequence a row; got one that a flat batch has filled")
        batch._put_padding("lengths", "attention_mask", INPUTS)
        batch._put_padding("decoder_lengths", "decoder_attention_mask", TARGETS)
        batch._read_starts()
        batch._put_positions()
        return batch

    # --- Padding ---

    def _put_padding(self, name: str, mask_name: str, inputs: Collection[str]) -> None:
        """Lengths of rows become a mask: a model's heads read it too, and whoever it hands its arguments on to."""
        if self.given.get(name) is None:
            return
        tokens = self._first_of(inputs)
        if tokens is None:
            if self.is_inner:
                return
            raise ValueError(f"`{name}` must come with {' or '.join(f'`{each}`' for each in inputs)}; got neither")
        lengths = self.given[name] = torch.as_tensor(self.given[name], device=tokens.device)
        mask = self.given.get(mask_name)
        places = tokens.shape[:-1] if tokens.is_floating_point() else tokens.shape
        layout = _agreed(name, places, lengths, mask if isinstance(mask, Tensor) else None)
        rows, width = layout.shape
        if name in self.names:
            return
        if layout.num_sequences != rows:
            if mask_name != "attention_mask":
                raise ValueError(f"`{name}` must be of rows, one entry each; got {layout.num_sequences} for {rows}")
            return
        if mask is None:
            self._check_alone(name, layout, is_embedded=tokens.is_floating_point())
            is_there = torch.zeros(rows * width, dtype=torch.long, device=tokens.device)
            mask = is_there.index_fill(0, layout.indices, 1).view(places)
        if mask_name in self.names:
            self.given[mask_name] = mask
        elif layout.num_tokens < rows * width:
            raise ValueError(
                f"`{name}` with padding need a model that takes `{mask_name}`; {type(self.model).__name__} does not"
            )
        del self.given[name]

    def _check_alone(self, name: str, layout: SequenceLayout, is_embedded: bool) -> None:
        """Lengths without a mask say nothing of tokens that other code has put in front of them."""
        cache = self._first_of(CACHES)
        if cache is not None and int(cache.get_seq_length()):
            raise ValueError(
                f"`{name}` with a cache in use must come with the `attention_mask` of all columns, those in the cache "
                f"too; got a cache of {int(cache.get_seq_length())} columns and no mask"
            )
        if is_embedded and layout.max_length < layout.shape[1]:
            raise ValueError(
                f"`{name}` with `inputs_embeds` must reach the width {layout.shape[1]} in the longest row, or come "
                f"with an `attention_mask`; got at most {layout.max_length} {_IN_FRONT}"
            )

    def _first_of(self, names: Collection[str]) -> Any:
        return next((self.given[name] for name in names if self.given.get(name) is not None), None)

    # --- Sequences ---

    def _read_starts(self) -> None:
        """Where the batch says that sequences begin, `position_ids` aside."""
        tokens = self._first_of(INPUTS)
        for name, starts in () if tokens is None else self._starts_by_name(tokens):
            if self.starts is None:
                self.starts, self.told_by = starts, name
            check_same(self.told_by, self.starts, name, starts)
        if self.starts is None:
            return
        longest = max(layout_of(self.starts, None).sizes, default=0)
        for bound in BOUNDS:
            if self.given.get(bound) is not None and int(self.given[bound]) < longest:
                raise ValueError(
                    f"`{bound}` must not be below the longest sequence, {longest}; got {int(self.given[bound])}"
                )

    def _starts_by_name(self, tokens: Tensor) -> Iterator[tuple[str, Tensor]]:
        rows, width = tokens.shape[:2]
        lengths = self.given.get("lengths")
        if lengths is not None and lengths.numel() != rows:
            yield "lengths", _starts_at(lengths.cumsum(0) - lengths, width)
        for name in CUMULATIVE:
            if self.given.get(name) is not None:
                cu_seq_lens = torch.as_tensor(self.given[name], device=tokens.device)
                lengths = SequenceLayout.from_cu_seq_lens(cu_seq_lens).lengths
                if rows != 1 or int(cu_seq_lens[-1]) != width:
                    raise ValueError(
                        f"`{name}` must be of one row and end at its width; got an end of {int(cu_seq_lens[-1])} for "
                        f"{rows} rows of width {width}"
                    )
                yield name, _starts_at(lengths.cumsum(0) - lengths, width)
        seq_idx = self.given.get("seq_idx")
        if seq_idx is not None:
            if seq_idx.shape != (rows, width):
                raise ValueError(f"`seq_idx` must have shape {(rows, width)}; got {tuple(seq_idx.shape)}")
            yield "seq_idx", first_and(seq_idx.diff(dim=1) != 0).to(tokens.device)

    def _put_positions(self) -> None:
        if self.starts is None or "position_ids" not in self.names or self.given.get("position_ids") is not None:
            return
        positions = layout_of(self.starts, None).positions.view(self.starts.shape)
        self.given["position_ids"] = positions + _first_position(self.model)

    @property
    def has_explicit_mask(self) -> bool:
        """Whether the caller says himself which token may see which."""
        attention_mask = self.given.get("attention_mask")
        return isinstance(attention_mask, Tensor) and attention_mask.dim() > 2

    @property
    def is_told_flat(self) -> bool:
        """Whether a row holds several sequences, `position_ids` aside."""
        return self.starts is not None and bool(self.starts[:, 1:].any())

    @property
    def is_flat(self) -> bool:
        """Whether a row holds several sequences."""
        position_ids = self.given.get("position_ids")
        if self.starts is not None or position_ids is None or position_ids.dim() != 2:
            return self.is_told_flat
        present = self._present(position_ids.shape[1])
        if present is not None:
            position_ids = position_ids.expand(present.shape[0], -1)
        return bool(restarts(position_ids, present)[:, 1:].any())

    def _present(self, width: int) -> Tensor | None:
        """Bool `(B, width)`: where tokens are; `None`: everywhere."""
        mask = self.given.get("attention_mask")
        if isinstance(mask, dict):  # one for each kind of layers
            mask = next(iter(mask.values()), None)
        if isinstance(mask, Tensor) or mask is None:
            return None if mask is None or mask.dim() != 2 or mask.shape[1] < width else mask[:, -width:].bool()
        return mask.present(0)  # of a `StockMask` that was made ahead


_IN_FRONT = (
    "(code that puts tokens in front of a batch, as PEFT's prompt methods do, lengthens attention masks alone: collate "
    "with `DataCollatorWithPadding`, without lengths)"
)


def _agreed(name: str, places: torch.Size, lengths: Tensor, mask: Tensor | None) -> SequenceLayout:
    """Layout of what `lengths` say of rows of `places (..., T)`, if a mask says the same."""
    shape = (places[:-1].numel(), places[-1])
    if lengths.shape == places[:-1]:  # choices of a question are rows too
        lengths = lengths.flatten()
    if mask is None:
        return SequenceLayout.of_batch(shape, lengths.device, lengths)
    if mask.dim() > len(places):
        raise ValueError(
            f"`{name}` must come without an explicit mask, which says itself who may see whom; got a mask of shape "
            f"{tuple(mask.shape)}"
        )
    try:
        mask = mask.to(lengths.device).reshape(-1, mask.shape[-1])
        return SequenceLayout.of_batch(shape, lengths.device, lengths, mask)
    except ValueError as error:
        raise ValueError(f"{error} {_IN_FRONT}") from error


def check_same(name: str, starts: Tensor, other: str, theirs: Tensor) -> None:
    """Raises if two arguments have sequences begin at different columns, `starts` and `theirs (B, T)`."""
    if not torch.equal(starts, theirs):
        expected, found = ([row.nonzero().flatten().tolist() for row in each] for each in (starts, theirs))
        raise ValueError(f"`{other}` must begin sequences where `{name}` does, at {expected}; got {found}")


batches: ContextVar[tuple[Batch, ...]] = ContextVar("batches", default=())


def current_batches() -> tuple[Batch, ...]:
    """What the models whose forward passes we are in were given, the outermost first."""
    return batches.get()


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


def has_neftune(model: PreTrainedModel) -> bool:
    """Whether noise is added to the embeddings, in training: NEFTune, arXiv:2310.05914, of transformers' Trainer."""
    return any(part.training and getattr(part, "neftune_noise_alpha", None) for part in model.modules())


# --- Sequences -------------------------------------------------------------------------------------------------------


def _starts_at(columns: Tensor, width: int) -> Tensor:
    """Bool `(1, width)`: True at some columns; empty sequences at the end begin nowhere."""
    starts = torch.zeros(1, width + 1, dtype=torch.bool, device=columns.device)
    return starts.index_fill(1, columns.long(), True)[:, :width]


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
