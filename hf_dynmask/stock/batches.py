"""Makes the arguments of a stock model's forward pass known to its layers, and finds the sequences in them.

Shape legend: B rows, T columns, S sequences.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..modeling.batch import PACKING, frames_of_batch, layout_of_batch
from ..modeling.graph_layout import known
from ..modeling.layout import SequenceLayout, integers, may_have_gaps, not_binary

NAME = "dynmask"
CONFIG_ENTRY = "dynmask_mask"  # where `set_mask` stores its text in a stock model's configuration
# Settings that mix tokens of a row outside attention (MobileBERT, ESM, Switch Transformers).
SETTINGS_THAT_MIX_TOKENS = ("trigram_input", "token_dropout", "expert_capacity")
# Layer types, as configurations name them, that mix tokens in attention only.
ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
INPUTS = ("input_ids", "inputs_embeds")
TARGETS = ("decoder_input_ids", "decoder_inputs_embeds", "labels")
CACHES = ("cache", "past_key_values")
MASKS = ("attention_mask", "decoder_attention_mask", "encoder_attention_mask")
SPEAKING = (*INPUTS, *CACHES, *MASKS, *PACKING, "lengths", "decoder_lengths", "position_ids")
EXPANSION = "query_expansion_positions"  # sentence-transformers' name for tokens that see others, though absent
BOUNDS = ("max_length_q", "max_length_k")  # a graph that read these numbers would be compiled for each batch
FLAT_ARGUMENTS = ("lengths", "cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")  # arguments that say where sequences begin


@dataclass(eq=False)
class Batch:
    """The arguments of a model's forward pass.

    Attributes:
        model ([`~transformers.PreTrainedModel`]): The model.
        names (`Collection[str]`): Names of the model's own arguments.
        given (`dict`): Arguments by name.
        is_inner (`bool`): Whether another prepared model runs this one.
        layout ([`SequenceLayout`], *optional*):
            Where the sequences are, if `lengths` of one row, `cu_seq_lens_q` or `seq_idx` state it.
        stated_by (`str`): Which of these arguments states it.
        sequences_separated (`bool`): Whether some layer's attention has separated the sequences of the batch.
        pooled_by ([`SequenceLayout`], *optional*): These sequences, if this model's layers did and may pool each.
        positions (`Tensor` of shape `(N,)`, *optional*):
            Positions of the tokens in their original rows, if the batch was unpadded.
        absent_see (`bool`):
            Whether absent tokens see the others, as in ColBERT's query expansion (arXiv:2004.12832, section 3.2).
        unchecked (`dict[str, Tensor]`):
            For each mask, a flag on the device: whether it holds only 0 and 1. [`read_along`] reads the flags.
    """

    model: PreTrainedModel
    names: Collection[str]
    given: dict[str, Any]
    is_inner: bool = False
    layout: SequenceLayout | None = None
    stated_by: str = ""
    sequences_separated: bool = False
    pooled_by: SequenceLayout | None = None
    positions: Tensor | None = None
    absent_see: bool = False
    unchecked: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def read(
        cls, model: PreTrainedModel, names: Collection[str], given: dict[str, Any], outer: Batch | None = None
    ) -> Batch:
        """Finds the sequences of a batch, and passes them to the model in arguments that it reads.

        Lengths of rows become an attention mask, and a flat batch gets its `position_ids`. If the model gets the same
        arguments as an `outer` model, the sequences are taken over from there.

        Raises:
            ValueError: Arguments contradict each other, or cannot be followed.
        """
        batch = cls(model, names, dict(given), is_inner=outer is not None)
        expansion = batch.given.pop(EXPANSION, None)
        batch.absent_see = expansion is not None or outer is not None and outer.absent_see
        if outer is not None and outer.layout is not None and batch._says_the_same(outer):
            batch.layout, batch.stated_by, batch.positions = outer.layout, outer.stated_by, outer.positions
            return batch
        if getattr(batch._first_of(CACHES), "is_of_flat_batch", False):
            raise ValueError("a cache must hold one sequence a row; got one that a flat batch has filled")
        batch._read_sequences()
        batch._read_targets()
        if outer is None:
            batch.unchecked = {name: ((mask == 0) | (mask == 1)).all() for name, mask in batch._masks_of_tokens()}
        return batch

    def _says_the_same(self, outer: Batch) -> bool:
        """Whether all arguments that describe tokens and sequences are the same objects as those of an outer model."""
        return all(self.given.get(name) is outer.given.get(name) for name in SPEAKING)

    def _masks_of_tokens(self) -> Iterator[tuple[str, Tensor]]:
        """The masks of real tokens that may hold numbers other than 0 and 1."""
        tokens = self._first_of(INPUTS)
        dimensions = 2 if tokens is None else len(places_of(tokens))
        for name in MASKS:
            mask = self.given.get(name)
            if isinstance(mask, Tensor) and mask.dtype != torch.bool and mask.dim() <= dimensions:
                yield name, mask

    def read_along(self, *flags: Tensor) -> list[bool]:
        """Reads boolean scalars from the device and, in the same read, whether masks hold only 0 and 1.

        Raises:
            ValueError: A mask holds another number, which models of transformers would take for a real token.
        """
        names, unread = list(self.unchecked), list(self.unchecked.values())
        self.unchecked = {}
        device = (*flags, *unread)[0].device
        values = torch.stack([flag.to(device) for flag in (*flags, *unread)]).tolist()
        for name, is_binary in zip(names, values[len(flags) :], strict=True):
            if not is_binary:
                raise not_binary(name, self.given[name])
        return values[: len(flags)]

    def _read_sequences(self) -> None:
        stated = [name for name in FLAT_ARGUMENTS if self.given.get(name) is not None]
        layout = self._layout(stated, "attention_mask", INPUTS)
        if layout is None:
            return
        if stated[0] == "lengths" and self.given["lengths"].numel() == layout.shape[0]:
            self._put_padding(stated.pop(0), "attention_mask", INPUTS, layout)
        if not stated:
            return
        self.layout, self.stated_by = layout, stated[0]
        if "position_ids" in self.names and self.given.get("position_ids") is None:
            positions = layout.unflatten(layout.positions[None])
            self.given["position_ids"] = positions + first_position(self.model)

    def _read_targets(self) -> None:
        name = "decoder_lengths"
        layout = self._layout([name] if self.given.get(name) is not None else [], "decoder_attention_mask", TARGETS)
        if layout is None:
            return
        if layout.num_sequences != layout.shape[0]:
            raise ValueError(
                f"`{name}` must be of rows, one entry each; got {layout.num_sequences} for {layout.shape[0]}"
            )
        self._put_padding(name, "decoder_attention_mask", TARGETS, layout)

    def _layout(self, stated: list[str], mask_name: str, inputs: Collection[str]) -> SequenceLayout | None:
        """The layout of `inputs` from the arguments `stated`, with which a mask must agree; `None` without any."""
        if not stated:
            return None
        tokens = self._first_of(inputs)
        if tokens is None:
            if self.is_inner:
                return None
            raise ValueError(f"`{stated[0]}` must come with {' or '.join(f'`{each}`' for each in inputs)}; got none")
        places = places_of(tokens)
        mask = self.given.get(mask_name)
        mask = mask if isinstance(mask, Tensor) else None  # the model that runs this one has made a `DeferredMask`
        if mask is not None and mask.dim() > len(places):
            raise ValueError(
                f"`{stated[0]}` must come without an explicit mask, which itself says which query may see which key; "
                f"got a mask of shape {tuple(mask.shape)}"
            )
        lengths = None
        if stated[0] in ("lengths", "decoder_lengths"):
            lengths = torch.as_tensor(self.given[stated[0]], device=tokens.device)
            if lengths.shape == places[:-1]:  # the choices of a question are rows, too
                lengths = lengths.flatten()
            self.given[stated[0]] = lengths
        elif mask is not None and mask.shape != places:
            mask = None
        further = {} if inputs is TARGETS else self._further_arguments(places)
        try:
            return frames_of_batch(
                (places[:-1].numel(), places[-1]),
                tokens.device,
                lengths,
                None if mask is None else mask.to(tokens.device).reshape(-1, mask.shape[-1]),
                None,
                **further,
            ).whole
        except ValueError as error:
            if mask is None or lengths is None:
                raise
            raise ValueError(f"{error} {_IN_FRONT}") from error

    def _further_arguments(self, places: torch.Size) -> dict[str, Any]:
        """The other arguments that describe sequences, besides lengths and masks."""
        position_ids = self.given.get("position_ids")
        if position_ids is not None and (position_ids.dim() != 2 or position_ids.shape[1] != places[-1]):
            position_ids = None  # positions in several dimensions, or of choices
        return {"position_ids": position_ids, "packing": {name: self.given.get(name) for name in PACKING}}

    def _put_padding(self, name: str, mask_name: str, inputs: Collection[str], layout: SequenceLayout) -> None:
        """Replaces lengths of rows by a mask, since a model's heads and inner models read masks, too."""
        if name in self.names:
            return
        if self.given.get(mask_name) is None:
            tokens = self._first_of(inputs)
            self._check_alone(name, tokens, layout)
            if mask_name in self.names:
                present = torch.zeros(places_of(tokens), dtype=torch.long, device=tokens.device)
                self.given[mask_name] = present.view(-1).index_fill_(0, layout.places, 1).view(present.shape)
            elif layout.num_tokens < layout.shape[0] * layout.shape[1]:
                raise ValueError(
                    f"`{name}` with padding need a model that takes `{mask_name}`; {type(self.model).__name__} does not"
                )
        del self.given[name]

    def _check_alone(self, name: str, tokens: Tensor, layout: SequenceLayout) -> None:
        """Raises if other code may have put tokens in front of the batch, which lengths without a mask do not cover."""
        cache = self._first_of(CACHES)
        if cache is not None and int(cache.get_seq_length()):
            raise ValueError(
                f"`{name}` with a cache in use must come with the `attention_mask` of all columns, those in the cache "
                f"too; got a cache of {int(cache.get_seq_length())} columns and no mask"
            )
        if tokens.is_floating_point() and layout.max_length < layout.shape[1]:
            raise ValueError(
                f"`{name}` with `inputs_embeds` must reach the width {layout.shape[1]} in the longest row, or come "
                f"with an `attention_mask`; got at most {layout.max_length} {_IN_FRONT}"
            )

    def _first_of(self, names: Collection[str]) -> Any:
        return next((self.given[name] for name in names if self.given.get(name) is not None), None)

    # --- Whether a row holds several sequences ---

    @property
    def has_explicit_mask(self) -> bool:
        """Whether the caller passes an explicit mask of which query may see which key."""
        attention_mask = self.given.get("attention_mask")
        return isinstance(attention_mask, Tensor) and attention_mask.dim() > 2

    @property
    def has_flat_layout(self) -> bool:
        """Whether arguments other than `position_ids` state several sequences, empty ones included, for a row."""
        return self.layout is not None and self.layout.num_sequences != self.layout.shape[0]

    @property
    def is_flat(self) -> bool:
        """Whether a row holds several sequences."""
        position_ids = self.given.get("position_ids")
        if self.layout is not None or position_ids is None or position_ids.dim() != 2:
            return self.has_flat_layout
        present = self._present(position_ids.shape[1])
        if present is not None:
            position_ids = position_ids.expand(present.shape[0], -1)
        return bool(restarts(position_ids, present)[:, 1:].any())

    def _present(self, width: int) -> Tensor | None:
        """Bool `(B, width)`: which tokens are real; `None`: all."""
        mask = self.given.get("attention_mask")
        if isinstance(mask, dict):  # one for each layer type
            mask = next(iter(mask.values()), None)
        if mask is None:
            return None
        if not isinstance(mask, Tensor):
            return mask.present(0)  # a `DeferredMask` that was made in advance
        return mask[:, -width:].bool() if mask.dim() == 2 and mask.shape[1] >= width else None


_IN_FRONT = (
    "(code that puts tokens in front of a batch, as PEFT's prompt methods do, lengthens attention masks alone: collate "
    "with `DataCollatorWithPadding`, without lengths)"
)


def places_of(tokens: Tensor) -> torch.Size:
    """`(..., T)` of ids or embeddings."""
    return tokens.shape[:-1] if tokens.is_floating_point() else tokens.shape


# Kept if this file is executed again, since models that were prepared before still write to it.
batches: ContextVar[tuple[Batch, ...]] = globals().get("batches") or ContextVar("batches", default=())


def current_batches() -> tuple[Batch, ...]:
    """The arguments of all forward passes that are running, the outermost first."""
    return batches.get() if IN_GRAPH.batch is None else (IN_GRAPH.batch.outside(),)


# --- In a graph ---


@dataclass(eq=False)
class GraphBatch:
    """A flat batch as layers in a graph of `torch.compile` or `torch.export` look it up.

    Attributes:
        layout ([`SequenceLayout`]): Where the sequences are.
        model, names, given: As in [`Batch`].
        sequences_separated (`bool`): Whether some layer's attention has separated the sequences of the batch.
    """

    layout: SequenceLayout
    model: PreTrainedModel
    names: Collection[str]
    given: dict[str, Any]
    sequences_separated: bool = False

    @classmethod
    def read(cls, model: PreTrainedModel, names: Collection[str], given: dict[str, Any]) -> GraphBatch:
        """As [`Batch.read`], for arguments that pass [`is_for_graph`]."""
        tokens = next(given[name] for name in INPUTS if given.get(name) is not None)
        position_ids = given.get("position_ids")
        layout = layout_of_batch(
            tuple(tokens.shape[:2]),
            tokens.device,
            given.get("lengths"),
            None,
            position_ids=position_ids,
            packing={name: given.get(name) for name in PACKING[:2]},
        )
        given = {name: value for name, value in given.items() if name not in PACKING}
        if position_ids is None:
            given["position_ids"] = layout.unflatten(layout.positions[None]) + first_position(model)
        return cls(layout, model, names, given)

    def outside(self) -> Batch:
        """The batch for a layer that runs outside the graph, after a graph break."""
        layout = known(self.layout.described).layout  # type: ignore[arg-type]
        return Batch(self.model, self.names, self.given, layout=layout, stated_by="lengths", sequences_separated=True)


class InGraph(threading.local):
    """The state that code in a graph looks up, since graphs do not support context variables.

    Attributes:
        batch ([`GraphBatch`], *optional*): The batch while a forward pass is traced, also after a graph break.
        has_outer (`bool`): Whether a model is running outside of a graph, with its batch in [`current_batches`].
    """

    def __init__(self):
        self.batch: GraphBatch | None = None
        self.has_outer = False


IN_GRAPH = InGraph()


def is_for_graph(model: PreTrainedModel, names: Collection[str], given: dict[str, Any]) -> bool:
    """Whether a batch can run in a graph: it is flat, states its sequences and needs nothing that only runs outside."""
    own = {name for name, value in given.items() if name not in BOUNDS and value is not None}
    tokens = next((given[name] for name in INPUTS if name in own), None)
    sizes = next((given[name] for name in FLAT_ARGUMENTS if name in own), None)
    if tokens is None or tokens.shape[0] != 1 or not isinstance(sizes, Tensor) or sizes.dim() != 1:
        return False
    if sizes.shape[0] == (1 if "lengths" in own else 2):  # a single sequence
        return False
    position_ids = given.get("position_ids")
    if "position_ids" not in names or position_ids is not None and position_ids.shape != places_of(tokens):
        return False
    more = (*MASKS, *CACHES, *TARGETS[:2], "decoder_lengths", "seq_idx", "output_attentions", "is_causal", EXPANSION)
    needs_more = not own.isdisjoint(more)
    is_other = has_cross_attention(model.config) or model.config.output_attentions or model.config.sub_configs
    of_rows = reads_tokens_of_rows(model)
    return not (needs_more or is_other or of_rows or has_neftune(model) or token_mixing_outside_attention(model))


# --- What models are like --------------------------------------------------------------------------------------------


T = TypeVar("T")


def kept(find: Callable[[PreTrainedModel], T]) -> Callable[[PreTrainedModel], T]:
    """Decorator that caches what a function finds in a model's modules, which would slow down every forward pass."""
    found: WeakKeyDictionary[PreTrainedModel, T] = WeakKeyDictionary()

    @wraps(find)
    def looked_up(model: PreTrainedModel) -> T:
        if torch.compiler.is_compiling():  # a graph that read the cache would be compiled again when the cache changes
            return find(model)
        if model not in found:
            found[model] = find(model)
        return found[model]

    return looked_up


def has_cross_attention(config: PreTrainedConfig) -> bool:
    return getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False)


def reads_tokens_of_rows(model: PreTrainedModel) -> bool:
    """Whether a head reads one token of each row, rather than what its base model pools."""
    name = type(model).__name__
    is_of_sequences = name.endswith("ForSequenceClassification") and getattr(model.base_model, "pooler", None) is None
    return is_of_sequences or name.endswith(("ForMultipleChoice", "DoubleHeadsModel"))


@kept
def first_position(model: PreTrainedModel) -> int:
    """The position of a sequence's first token: 0 or, in RoBERTa's family, one more than the position of padding."""
    for name, part in model.named_modules():
        if name.endswith("position_embeddings") and getattr(part, "padding_idx", None) is not None:
            return part.padding_idx + 1  # type: ignore[operator]
    return 0


@kept
def token_mixing_outside_attention(model: PreTrainedModel) -> str | None:
    """What mixes tokens of a row outside attention, if anything."""
    others = sorted(set(getattr(model.config, "layer_types", None) or ()) - ATTENTION_LAYERS)
    if others:
        return f"layers of type {', '.join(others)}"
    setting = next((name for name in SETTINGS_THAT_MIX_TOKENS if getattr(model.config, name, None)), None)
    if setting is not None:
        return f"`{setting}`"
    parts = (name for name, part in model.named_modules() if isinstance(part, nn.modules.conv._ConvNd | nn.RNNBase))
    return next(parts, None)


def has_neftune(model: PreTrainedModel) -> bool:
    """Whether the Trainer adds noise to the embeddings (NEFTune, arXiv:2310.05914)."""
    try:
        embeddings = model.get_input_embeddings()
    except NotImplementedError:  # the Trainer cannot find them either
        return False
    return embeddings is not None and embeddings.training and bool(getattr(embeddings, "neftune_noise_alpha", None))


# --- Sequences -------------------------------------------------------------------------------------------------------


def first_and(later: Tensor) -> Tensor:
    """Bool `(B, T)`: True in the first column, then `later (B, T - 1)`."""
    return nn.functional.pad(later, (1, 0), value=True)


def restarts(position_ids: Tensor, present: Tensor | None) -> Tensor:
    """Bool `(B, T)`: True in the first column, and where a position does not continue that of the token before.

    A position continues if it is the next one, or if it has increased by as much as the column.
    """
    if not position_ids.is_floating_point():
        position_ids = integers("position_ids", position_ids)
    if present is None:
        return first_and(position_ids.diff(dim=1) != 1)
    row, column = present.nonzero(as_tuple=True)
    step = position_ids[row, column].diff()
    new = (step != 1) & (step != column.diff()) & (row.diff() == 0)
    starts = torch.zeros_like(present).index_put((row[1:][new], column[1:][new]), torch.tensor(True, device=row.device))
    return first_and(starts[:, 1:])


def layout_of(starts: Tensor, present: Tensor | None, by_column: bool = False) -> SequenceLayout:
    """Layout of a batch whose sequences begin at `starts (B, T)` and hold the tokens at `present (B, T)`.

    Positions count from a sequence's first token or, if `by_column`, from the column where it begins, counting absent
    tokens as transformers' masks do.
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
    positions = places - origins[sequence]
    return SequenceLayout(
        shape=(starts.shape[0], starts.shape[1]),
        num_tokens=places.numel(),
        lengths=sizes,
        sequence_ids=sequence,
        positions=positions,
        indices=None if present is None else places,
        has_gaps=present is not None and may_have_gaps(sizes, sequence, positions),
        longest=starts.shape[1],
    )
