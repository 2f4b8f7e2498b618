"""Collators that describe a batch by the lengths of its sequences."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from ..modeling_dynmask import IGNORE_INDEX
from ..modeling_dynmask_seq2seq import DynMaskSeq2SeqPreTrainedModel

Columns = dict[str, list[Tensor]]  # one tensor an example
ANSWER = ("start_positions", "end_positions")
MAIN_COLUMNS = ("input_ids", "input_features")


class FlatBatch(dict[str, Any]):
    """A batch whose sequences stand end to end in one row, which cannot be split. Accelerate makes the parts of a batch
    anew, by their class, when one process collates for all."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        for name in MAIN_COLUMNS:
            rows = self[name].shape[0] if isinstance(self.get(name), Tensor) else 1
            if rows != 1:
                raise ValueError(
                    f"`{name}` of a flat batch must have 1 row, which cannot be split or joined; got {rows}. Collate "
                    "with `flat=False`, or let each process collate its own batches: `dispatch_batches=False` in "
                    "`accelerator_config`"
                )


class CollatorWithLengths(ABC):
    """What collators with `lengths` share. The column `main` says how many tokens or frames an example has."""

    main: ClassVar[str]
    flat: bool
    label_pad_token_id: int

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        columns = self._columns(features)
        per_token = _per_token(columns, self.main)
        if "attention_mask" in columns:
            columns = _without_absent(columns, per_token)
        lengths = torch.tensor([len(tokens) for tokens in columns[self.main]])
        batch = {self.main: self._join(self.main, columns.pop(self.main)), "lengths": lengths}
        for name, values in columns.items():
            batch[name] = self._join(name, values) if name in per_token else self._stack(name, values)
        return FlatBatch(batch) if self.flat else batch

    def _columns(self, features: Sequence[Mapping[str, Any]]) -> Columns:
        """The numbers in the examples, checked, under the names that models give them."""
        columns = _columns(features)
        if self.main not in columns:
            raise ValueError(f"examples must have a column `{self.main}`; got {', '.join(columns) or 'no numbers'}")
        self._check_main(columns[self.main])
        for mask, tokens in zip(columns.get("attention_mask", ()), columns[self.main], strict=False):
            if mask.shape != tokens.shape[:1]:
                raise ValueError(
                    f"`attention_mask` of an example must hold 0 or 1 a token, shape {tuple(tokens.shape[:1])}; "
                    f"got shape {tuple(mask.shape)}"
                )
        if "lengths" in columns:
            raise ValueError(f"`lengths` must be left to the collator, which counts `{self.main}`; got a column of it")
        return columns

    @abstractmethod
    def _check_main(self, values: list[Tensor]) -> None:
        """Raise a `ValueError` where the main column of an example has a wrong shape or dtype."""

    def _join(self, name: str, values: list[Tensor]) -> Tensor:
        """A column per token as `(B, T, …)`, or with `flat` as `(1, N, …)`."""
        if self.flat:
            return torch.cat(values)[None]
        if len({len(value) for value in values}) == 1:
            return torch.stack(values)
        return pad_sequence(values, batch_first=True, padding_value=self._padding(name))

    def _padding(self, name: str) -> int:
        return self.label_pad_token_id if name == "labels" else 0

    def _stack(self, name: str, values: list[Tensor]) -> Tensor:
        """A column per example as `(B, …)`."""
        if name == "hidden_spans":
            return pad_sequence([_spans(value) for value in values], batch_first=True)
        shapes = [tuple(value.shape) for value in values]
        if len(set(shapes)) > 1:
            raise ValueError(
                f"column `{name}` must have one entry a token, or the same shape in every example; got shapes {shapes}"
            )
        return torch.stack(values)


@dataclass
class DataCollatorWithLengths(CollatorWithLengths):
    """
    Collates tokenized examples into a batch that carries `lengths` in place of an attention mask.

    Each column of the examples finds its place by its shape:

    - **per token**: every example has one entry for each of its tokens (`token_type_ids`, `position_ids`,
      `segment_ids`, integer labels of tokens, …). These are padded, or flattened, along with `input_ids`.
    - **per example**: anything else (`label`, `start_positions`, `prefix_lengths`, …) is stacked, so it must have the
      same shape in all examples. `hidden_spans` is one of these: examples with fewer spans get spans of length 0. Float
      labels always are: targets of a regression, or of several labels.

    Integers, and booleans that are labels, become int64, floats float32; other booleans stay. `label` and `label_ids`
    become `labels`, and text is left out, as in [`~transformers.default_data_collator`].

    Examples that come padded (`attention_mask` with zeros) lose their absent tokens first, wherever these stand;
    `start_positions` and `end_positions` move along.

    Answers, as `start_positions` and `end_positions`, come with `labels` as well, if examples have none. A model for
    question answering does not read these; the [`~transformers.Trainer`] counts them, and would otherwise weigh
    batches alike that hold unlike numbers of answers.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Gives the id that rows are padded with.
        flat (`bool`, *optional*, defaults to `False`):
            Put all sequences end to end in one row, without padding. Such a batch is for one device: `dispatch_batches`
            of Accelerate and [`~torch.nn.DataParallel`] cannot split it.
        label_pad_token_id (`int`, *optional*, defaults to -100):
            Label of the absent tokens of a row; losses in PyTorch ignore -100.
        return_position_ids (`bool`, *optional*, defaults to `False`):
            Give `position_ids` too, from 0 on in each sequence. The models count for themselves; TRL's `SFTTrainer`
            wants to see them.

    Returns:
        `dict[str, Tensor]`:

        - `input_ids`, int64 `(B, T)`: from the left edge, whatever the tokenizer's `padding_side`; T is the longest
          sequence of the batch. With `flat`: `(1, N)`.
        - `lengths`, int64 `(B,)`: tokens of each sequence.
        - columns per token: `(B, T, …)`, 0 (labels: `label_pad_token_id`) where no token is. With `flat`: `(1, N, …)`.
        - columns per example: `(B, …)`.
        - `labels` of answers: int64 `(B,)`, `start_positions`, or -100 where the answer is not inside the sequence.

    Raises:
        ValueError: There are no examples; `input_ids` is missing or not a list of integers; a column is missing in some
            examples, is neither per token nor of one shape, or does not hold numbers or text; `lengths` is given; rows
            must be padded and the tokenizer has no pad token.

    Example:

    ```python
    >>> collator = DataCollatorWithLengths(tokenizer)
    >>> collator([{"input_ids": [5, 6, 7], "label": 1}, {"input_ids": [8], "label": 0}])
    {'input_ids': tensor([[5, 6, 7],
            [8, 0, 0]]), 'lengths': tensor([3, 1]), 'labels': tensor([1, 0])}
    ```
    """

    tokenizer: PreTrainedTokenizerBase
    flat: bool = False
    label_pad_token_id: int = -100
    return_position_ids: bool = False

    main: ClassVar[str] = "input_ids"

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        batch = super().__call__(features)
        if self.return_position_ids and "position_ids" not in batch:
            batch["position_ids"] = self._join("position_ids", [torch.arange(n) for n in batch["lengths"].tolist()])
        if "labels" not in batch and all(name in batch for name in ANSWER):
            batch["labels"] = _countable(batch)
        return batch

    def _check_main(self, values):
        for ids in values:
            if ids.ndim != 1 or ids.dtype != torch.int64:
                raise ValueError(
                    f"`{self.main}` of an example must be a list of integers, shape (T,); "
                    f"got shape {tuple(ids.shape)} of {ids.dtype}"
                )

    def _padding(self, name):
        if name != "input_ids":
            return super()._padding(name)
        pad_token_id = self.tokenizer.pad_token_id
        if not isinstance(pad_token_id, int):
            raise ValueError(
                f"`tokenizer.pad_token` must be set to pad rows of different lengths; got pad_token_id={pad_token_id}. "
                "Set it, for example to `tokenizer.eos_token`, or collate with `flat=True`"
            )
        return pad_token_id


@dataclass
class DataCollatorForFeatures(CollatorWithLengths):
    """
    Collates examples of frames (of speech, of an image's patches, of a time series) into a batch that carries
    `lengths`.

    Columns find their place as in [`DataCollatorWithLengths`], with frames for tokens. One more kind: integer labels
    of an example that are not one a frame are its target, as for [`DynMaskForCTC`], and are padded.

    Args:
        flat (`bool`, *optional*, defaults to `False`): Put all sequences end to end in one row, without padding.
        label_pad_token_id (`int`, *optional*, defaults to -100): Label behind a target, and of a row's absent frames.

    Returns:
        `dict[str, Tensor]`:

        - `input_features`, float32 `(B, T, F)`: from the left edge; T is the longest sequence of the batch, and 0
          stands where no frame is. With `flat`: `(1, N, F)`.
        - `lengths`, int64 `(B,)`: frames of each sequence.
        - `labels` of targets: int64 `(B, L)`, with `flat` as well.
        - other columns as there.

    Raises:
        ValueError: There are no examples; `input_features` is missing or not frames of numbers, as many in each; a
            column is missing in some examples, is neither per frame nor of one shape, or does not hold numbers or text;
            `lengths` is given.

    Example:

    ```python
    >>> collator = DataCollatorForFeatures()
    >>> collator([{"input_features": [[0.5], [1.0], [1.5]], "labels": [4]}, {"input_features": [[2.0]], "labels": []}])
    {'input_features': tensor([[[0.5000],
             [1.0000],
             [1.5000]],

            [[2.0000],
             [0.0000],
             [0.0000]]]), 'lengths': tensor([3, 1]), 'labels': tensor([[   4],
            [-100]])}
    ```
    """

    flat: bool = False
    label_pad_token_id: int = -100
    main: ClassVar[str] = "input_features"

    def _columns(self, features):
        columns = super()._columns(features)
        columns[self.main] = [frames.float() for frames in columns[self.main]]
        return columns

    def _check_main(self, values):
        shapes = [tuple(frames.shape) for frames in values]
        if any(len(shape) != 2 for shape in shapes) or len({features for _, features in shapes}) > 1:
            raise ValueError(
                "`input_features` of an example must have shape (frames, features), with as many features in all; "
                f"got shapes {shapes}"
            )

    def _stack(self, name, values):
        if name == "labels" and all(value.ndim == 1 and value.dtype == torch.int64 for value in values):
            return pad_sequence(values, batch_first=True, padding_value=self.label_pad_token_id)
        return super()._stack(name, values)


@dataclass
class DataCollatorForSeq2SeqWithLengths:
    """
    Collates pairs of a source and a target into a batch that carries the lengths of both.

    The target are the columns `labels` and those whose names begin with `decoder_`; all others are the source. Columns
    of a side find their place as in [`DataCollatorWithLengths`], the target's by the tokens of `labels`. A source of
    frames, `input_features`, is collated as by [`DataCollatorForFeatures`].

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Gives the id that rows are padded with.
        model ([`DynMaskForConditionalGeneration`], *optional*):
            Makes decoder inputs of the labels, by its `prepare_decoder_input_ids_from_labels`. Label smoothing in the
            [`~transformers.Trainer`] needs these. `None`: there are none, and a model makes its own.
        flat (`bool`, *optional*, defaults to `False`): Put all sequences of a side end to end, without padding.
        label_pad_token_id (`int`, *optional*, defaults to -100): Label of the absent tokens of a row.

    Returns:
        `dict[str, Tensor]`:

        - `input_ids (B, T)`, or `input_features (B, T, F)`, and `lengths (B,)`, with the source's other columns: as
          from the collator of that side alone. With `flat`: `(1, N, …)`.
        - `labels`, int64 `(B, U)`: `label_pad_token_id` behind each target. With `flat`: `(1, M)`.
        - `decoder_lengths`, int64 `(B,)`: tokens of each target.
        - `decoder_input_ids`, int64, with `model`: of the shape of `labels`.

        Examples without a target give the source alone.

    Raises:
        ValueError: A side is refused as there; a target has columns, but no `labels`, or these are not a list of
            integers.

    Example:

    ```python
    >>> collator = DataCollatorForSeq2SeqWithLengths(tokenizer)
    >>> collator([{"input_ids": [5, 6, 7], "labels": [8]}, {"input_ids": [9], "labels": [4, 5]}])
    {'input_ids': tensor([[5, 6, 7],
            [9, 0, 0]]), 'lengths': tensor([3, 1]), 'labels': tensor([[   8, -100],
            [   4,    5]]), 'decoder_lengths': tensor([1, 2])}
    ```
    """

    tokenizer: PreTrainedTokenizerBase
    model: DynMaskSeq2SeqPreTrainedModel | None = None
    flat: bool = False
    label_pad_token_id: int = -100

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        sources = [{name: feature[name] for name in feature if not _of_target(name)} for feature in features]
        targets = [
            {name.removeprefix("decoder_"): feature[name] for name in feature if _of_target(name)}
            for feature in features
        ]
        batch = self._source_collator(sources)(sources)
        if any(targets):
            batch.update(self._target(targets))
        return batch

    def _source_collator(self, sources: Sequence[Mapping[str, Any]]) -> CollatorWithLengths:
        if any("input_features" in source for source in sources):
            return DataCollatorForFeatures(flat=self.flat)
        return DataCollatorWithLengths(self.tokenizer, flat=self.flat)

    def _target(self, targets: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        try:
            batch = _DataCollatorForTargets(self.tokenizer, self.flat, self.label_pad_token_id)(targets)
        except ValueError as error:
            raise ValueError(f"of the target: {error}") from error
        batch = {name if name == "labels" else f"decoder_{name}": values for name, values in batch.items()}
        if self.model is not None and "decoder_input_ids" not in batch:
            shifted = self.model.prepare_decoder_input_ids_from_labels(batch["labels"], batch["decoder_lengths"])
            batch["decoder_input_ids"] = shifted
        return batch


class _DataCollatorForTargets(DataCollatorWithLengths):
    """A target alone, its columns without `decoder_`."""

    main: ClassVar[str] = "labels"


def _of_target(name: str) -> bool:
    return name in ("label", "label_ids", "labels") or name.startswith("decoder_")


def _columns(features: Sequence[Mapping[str, Any]]) -> Columns:
    """The numbers in the examples under the names that models give them."""
    if not features:
        raise ValueError("`features` must hold at least one example; got none")
    columns: Columns = {}
    for name in dict.fromkeys(name for feature in features for name in feature):
        values = [feature.get(name) for feature in features]
        if all(value is None for value in values):
            continue
        arrays = [_array(name, value, index) for index, value in enumerate(values)]
        if any(isinstance(array, np.ndarray) and array.dtype.kind in "US" for array in arrays):
            continue
        target = "labels" if name in ("label", "label_ids") else name
        if target in columns:
            raise ValueError(f"examples must have one column of labels; got `{name}` next to another")
        columns[target] = _alike([torch.as_tensor(array) for array in arrays], is_label=target == "labels")
    return columns


def _array(name: str, value: Any, index: int) -> Tensor | np.ndarray:
    if value is None:
        raise ValueError(f"column `{name}` must be in every example; got none in example {index}")
    if isinstance(value, Tensor):
        return value
    try:
        array = np.array(value)
        if array.dtype == object:  # data sets in NumPy format hand over lists of text as arrays of objects
            array = np.array(array.tolist())
    except ValueError:  # NumPy's word for a ragged list
        array = np.array(None)
    if array.dtype == object:
        raise ValueError(f"column `{name}` must hold numbers, even lists of numbers, or text; got {value!r}")
    return array


def _alike(tensors: list[Tensor], is_label: bool) -> list[Tensor]:
    """The tensors in one dtype. An empty list has none of its own, nor a shape beyond its length."""
    filled = [tensor for tensor in tensors if tensor.numel()]
    if any(tensor.is_floating_point() for tensor in filled):
        dtype = torch.float32
    elif filled and not is_label and all(tensor.dtype == torch.bool for tensor in filled):
        dtype = torch.bool
    else:
        dtype = torch.int64
    inner = filled[0].shape[1:] if filled else ()
    return [(tensor.reshape(0, *inner) if tensor.shape == (0,) else tensor).to(dtype) for tensor in tensors]


def _per_token(columns: Columns, main: str) -> set[str]:
    """Names of the columns that have an entry for each token."""
    sizes = [len(tokens) for tokens in columns[main]]
    return {
        name
        for name, values in columns.items()
        if name != "hidden_spans"
        and not (name == "labels" and values[0].is_floating_point())
        and all(value.ndim and len(value) == size for value, size in zip(values, sizes, strict=True))
        and len({value.shape[1:] for value in values}) == 1
    }


def _without_absent(columns: Columns, per_token: set[str]) -> Columns:
    """The columns without the tokens at 0 of `attention_mask`, and without `attention_mask`."""
    keep = [mask.bool() for mask in columns["attention_mask"]]
    names = [name for name in columns if name != "attention_mask"]
    if all(kept.all() for kept in keep):
        return {name: columns[name] for name in names}
    shortened = {}
    for name in names:
        values = zip(columns[name], keep, strict=True)
        if name in per_token:
            shortened[name] = [value[kept] for value, kept in values]
        elif name in ANSWER:
            shortened[name] = [_moved(position, kept) for position, kept in values]
        else:
            shortened[name] = columns[name]
    return shortened


def _moved(position: Tensor, kept: Tensor) -> Tensor:
    """Where a token stands once the absent ones are gone. Positions outside the example say "no answer" and stay."""
    inside = (position >= 0) & (position < len(kept))
    before = pad(kept.cumsum(0), (1, 0))
    return torch.where(inside, before[position.clamp(0, len(kept))], position)


def _countable(batch: dict[str, Tensor]) -> Tensor:
    """A label `(B,)` for each answer, -100 where it is not inside its sequence and so is no target."""
    start, end = (batch[name].flatten() for name in ANSWER)
    return start.where((start >= 0) & (end >= 0) & (torch.maximum(start, end) < batch["lengths"]), IGNORE_INDEX)


def _spans(value: Tensor) -> Tensor:
    if value.numel() and (value.ndim != 2 or value.shape[1] != 2):
        raise ValueError(f"`hidden_spans` of an example must have shape (K, 2); got {tuple(value.shape)}")
    return value.reshape(-1, 2)
