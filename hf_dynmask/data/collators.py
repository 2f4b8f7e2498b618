"""Collators whose batches carry the lengths of their sequences."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from ..modeling.layout import IGNORE_INDEX
from .columns import (
    ANSWER,
    EXAMPLE,
    LABELS,
    MAIN_COLUMNS,
    NEXT_TOKEN,
    ROLES,
    TOKEN,
    Columns,
    are_inputs,
    check_roles,
    check_sizes,
    model_name,
    presence,
    read_columns,
    unknown_role,
    without_absent,
)
from .flat import FlatBatch, check_count, check_fixed_sizes, filled


class CollatorWithLengths(ABC):
    """Base class of collators with `lengths`. The column `main` has one entry per token of an example."""

    main: ClassVar[str]
    flat: bool
    label_pad_token_id: int
    column_roles: Mapping[str, str] | None
    max_tokens: int | None
    max_sequences: int | None
    column_sizes: Mapping[str, int] | None

    name_of_max_tokens: ClassVar[str] = "max_tokens"  # the name under which the user sets it, for errors
    uneven: ClassVar[tuple[str, ...]] = ("hidden_spans",)  # columns per example whose lists may differ in length

    def __post_init__(self):
        check_roles(self.column_roles, [self.main])
        sizes = {self.name_of_max_tokens: self.max_tokens, "max_sequences": self.max_sequences}
        check_fixed_sizes(self.flat, sizes)
        self._check_column_sizes()

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        columns, roles = self._present(features)
        lengths = torch.tensor([len(tokens) for tokens in columns[self.main]])
        if "lengths" in columns:
            check_lengths(columns.pop("lengths"), lengths)
        self._check_room(lengths)
        tokens = self._join(self.main, columns.pop(self.main))
        if self.flat:  # `lengths` come first: Accelerate takes the number of examples from the first tensor
            batch = {"lengths": filled(lengths, self.max_sequences, 0), self.main: tokens}
        else:
            is_token = torch.arange(tokens.shape[1]) < lengths[:, None]
            batch = {self.main: tokens, "lengths": lengths, "attention_mask": is_token.long()}
        for name, values in columns.items():
            batch[name] = self._stack(name, values) if roles[name] == EXAMPLE else self._join(name, values)
        return FlatBatch(batch) if self.flat else batch

    def role(self, name: str, values: list[Tensor]) -> str:
        """
        The role of a column, `"token"` or `"example"`, from `column_roles` or else from the column's name.

        Args:
            name (`str`): The name of the model's argument.
            values (`list[Tensor]`): One tensor per example. Scalars are per example, and so are labels of floats.

        Raises:
            ValueError: The name is unknown.
        """
        given = check_roles(self.column_roles, [self.main])
        if name in given or name in ROLES:
            return given.get(name) or ROLES[name]
        if not any(value.ndim for value in values):
            return EXAMPLE
        if name != "labels":
            raise unknown_role(name)
        return EXAMPLE if values[0].is_floating_point() else self.role_of_labels

    role_of_labels: ClassVar[str] = TOKEN  # of lists of integers

    def _present(self, features: Sequence[Mapping[str, Any]]) -> tuple[Columns, dict[str, str]]:
        """The columns without absent tokens, and the role of each column."""
        columns = self._columns(features)
        roles = {name: self.role(name, values) for name, values in columns.items()}
        keep = presence(columns, self.main)
        check_sizes(columns, roles, self.main)
        self._set_label_role(columns, roles, keep)
        columns.pop("attention_mask", None)
        if keep is not None:
            columns = without_absent(columns, roles, keep)
        if self.flat and roles.get("labels") == NEXT_TOKEN:
            columns["labels"] = [_without_first(labels) for labels in columns["labels"]]
        return columns, roles

    def _set_label_role(self, columns: Columns, roles: dict[str, str], keep: list[Tensor] | None) -> None:
        """Set the role of labels that are next tokens. Raise a `ValueError` if labels at absent tokens contradict the
        role: labels per token must be -100 there, whereas a list per example has an entry at every place."""
        labels = columns.get("labels", [])
        if "labels" in check_roles(self.column_roles, [self.main]) or not any(label.ndim for label in labels):
            return
        if roles["labels"] == TOKEN and are_inputs(labels, columns[self.main]):
            roles["labels"] = NEXT_TOKEN
            return
        if labels[0].is_floating_point():
            return
        for label, kept in zip(labels, keep or (), strict=False):
            of_absent = label[~kept] if label.shape[:1] == kept.shape else label[:0]
            ignored = (IGNORE_INDEX, self.label_pad_token_id) if roles["labels"] == TOKEN else ()
            if any(number not in ignored for number in of_absent.flatten().tolist()):
                raise unknown_role("labels")

    def _columns(self, features: Sequence[Mapping[str, Any]]) -> Columns:
        """The numeric columns of the examples, checked, under the names of the model's arguments."""
        columns = read_columns(features)
        if self.main not in columns:
            raise ValueError(f"examples must have a column `{self.main}`; got {', '.join(columns) or 'no numbers'}")
        self._check_main(columns[self.main])
        return columns

    @abstractmethod
    def _check_main(self, values: list[Tensor]) -> None:
        """Raise a `ValueError` if the main column of an example has a wrong shape or dtype."""

    def _check_column_sizes(self) -> None:
        for name, size in (self.column_sizes or {}).items():
            if model_name(name) not in self.uneven:
                known = " and ".join(f"`{each}`" for each in self.uneven)
                raise ValueError(f"`column_sizes` must have keys among {known}; got {name!r}")
            check_count(f"column_sizes['{name}']", size, least=0)

    def _check_room(self, lengths: Tensor) -> None:
        """Raise a `ValueError` if the examples do not fit a row of fixed size."""
        if self.max_tokens is None or self.max_sequences is None:
            return
        limit = f"`{self.name_of_max_tokens}`={self.max_tokens}"
        remedy = "or make batches with `TokenBudgetBatchSampler`"
        if int(lengths.max()) > self.max_tokens:
            raise ValueError(
                f"an example must have at most {limit} tokens; got {lengths.max()} in example {lengths.argmax()}. "
                "Raise it, or truncate the example"
            )
        if len(lengths) > self.max_sequences:
            raise ValueError(
                f"a batch must have at most `max_sequences`={self.max_sequences} examples; got {len(lengths)}. "
                f"Raise it, {remedy}"
            )
        ends = lengths.cumsum(0)
        if int(ends[-1]) > self.max_tokens:
            raise ValueError(
                f"a batch must have at most {limit} tokens; got {ends[-1]} in {len(lengths)} examples, the first "
                f"{int((ends <= self.max_tokens).sum())} of which fit. Raise it, {remedy}"
            )

    def _join(self, name: str, values: list[Tensor]) -> Tensor:
        """A column per token as `(B, T, …)`, or with `flat` as `(1, N, …)`."""
        if self.flat:
            return filled(torch.cat(values), self.max_tokens, self._padding(name))[None]
        if len({len(value) for value in values}) == 1:
            return torch.stack(values)
        return pad_sequence(values, batch_first=True, padding_value=self._padding(name))

    def _padding(self, name: str) -> int:
        return self.label_pad_token_id if name in ("labels", "shift_labels", *ANSWER) else 0

    def _stack(self, name: str, values: list[Tensor]) -> Tensor:
        """A column per example as `(B, …)`, or with `max_sequences` as `(max_sequences, …)`."""
        if name == "hidden_spans":
            values = self._even(name, [_spans(value) for value in values])
        shapes = [tuple(value.shape) for value in values]
        if len(set(shapes)) > 1:
            raise ValueError(f"column `{name}` must have the same shape in every example; got shapes {shapes}")
        return filled(torch.stack(values), self.max_sequences, self._padding(name))

    def _even(self, name: str, values: list[Tensor]) -> list[Tensor]:
        """Pad the lists of a column per example to its size in `column_sizes`, or else to the longest list."""
        longest = max(map(len, values))
        sizes = {model_name(column): size for column, size in (self.column_sizes or {}).items()}
        size = sizes.get(name, longest if self.max_sequences is None else None)
        if size is None:
            raise ValueError(
                f"column `{name}` must have one size in all batches if `max_sequences` is set: give the collator the "
                f"maximum size, `column_sizes={{'{name}': …}}`; got up to {longest} in this batch"
            )
        if longest > size:
            place = max(range(len(values)), key=lambda index: len(values[index]))
            raise ValueError(
                f"column `{name}` must have at most `column_sizes['{name}']`={size} entries per example; got {longest} "
                f"in example {place}"
            )
        return [filled(value, size, self._padding(name)) for value in values]


@dataclass
class DataCollatorWithLengths(CollatorWithLengths):
    """
    Collates tokenized examples into a batch with `lengths`, which tell the model where the padding is.

    Each column of the examples has a role, which depends on its name:

    - **per token**, one entry for each token of the example: `token_type_ids`, `position_ids`,
      `special_tokens_mask`, `offset_mapping`, `word_ids`, `segment_ids`, `global_tokens`, `missing`, `inputs_embeds`,
      `shift_labels`, and `labels` that are lists of integers. These are padded, or flattened, along with `input_ids`.
    - **per example**: `start_positions`, `end_positions`, `prefix_lengths`, `mask_choice`, `hidden_spans`, `idx`,
      `labels` of floats (for regression or multi-label classification), and every column with a single number per
      example. These are stacked, so they must have the same shape in all examples. Only the number of `hidden_spans`
      may differ: examples with fewer spans get spans of length 0.

    A list under any other name needs a role in `column_roles`.

    Integers become int64 and floats float32. Booleans stay booleans, except in labels, where they become int64. `label`
    and `label_ids` are renamed to `labels`, and columns of text are left out, as in
    [`~transformers.default_data_collator`]. `None` in `word_ids`, for a token that is in no word, becomes -1.

    If the examples are padded (`attention_mask` with zeros), their absent tokens are removed first, wherever they are,
    and `start_positions` and `end_positions` are shifted accordingly. A column `lengths`, which a token budget may
    read, must hold the number of real tokens.

    **Flat batches for a causal model.** No token predicts the first token of a sequence, but in a row of several
    sequences the [`~transformers.Trainer`] would count it as a target. If `labels` are next tokens, the first label of
    each sequence is therefore set to -100. Labels are treated as next tokens if `column_roles` says so, or if it gives
    them no role and all labels other than -100 equal `input_ids`.

    **Flat batches of one shape.** With `max_tokens` and `max_sequences`, all flat batches have the same shape, whatever
    they hold, as a compiled model or a CUDA graph needs. The examples come first, the places after them are absent, and
    `lengths` ends in zeros. [`TokenBudgetBatchSampler`] makes batches that leave few places unused, and
    [`TokenBudgetMixin`] sets both numbers itself. Use such batches for training only: an evaluation would include the
    absent sequences in its metrics, so evaluate with `flat=False`.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its pad token fills the rows.
        flat (`bool`, *optional*, defaults to `False`):
            Put all sequences end to end in one row, without padding. Such a batch is for one device: Accelerate's
            `dispatch_batches` and [`~torch.nn.DataParallel`] cannot split it.
        label_pad_token_id (`int`, *optional*, defaults to -100):
            The label of padding: where there is no token or no sequence. Losses in PyTorch ignore -100.
        return_position_ids (`bool`, *optional*, defaults to `False`):
            Add `position_ids`, counted from 0 in each sequence. The models do not need them; TRL's `SFTTrainer` does.
        column_roles (`Mapping[str, str]`, *optional*):
            Roles of columns, `"token"` or `"example"`, in place of the roles that follow from their names. Labels can
            also be `"next_token"`: one per token, predicted from the tokens before it.
        count_answers (`bool`, *optional*, defaults to `False`):
            Add `labels` to batches that have answers (`start_positions`, `end_positions`) but no labels. A
            [`DynMaskForQuestionAnswering`] does not read them. The Trainer counts them, and so averages the loss over
            the answers of all batches of an optimizer step, even if their numbers of answers differ.
            [`TokenBudgetMixin`] does this itself. Do not combine it with `label_smoothing_factor`, which smooths all
            `labels`, or with stock models, whose loss does not use the count.
        max_tokens (`int`, *optional*): Size of a flat row. `None`: the number of its tokens.
        max_sequences (`int`, *optional*): Size of `lengths` with a flat row. `None`: the number of its sequences.
        column_sizes (`Mapping[str, int]`, *optional*):
            The maximum number of `hidden_spans` of an example, `{"hidden_spans": K}`. `None`: the maximum in the batch.
            Required with `max_sequences` if there are such columns, since all batches must have the same K.
        max_length (`int`, *optional*):
            With `flat`: the maximum length of an example. The batch carries it as `max_length_q`, so that kernels on a
            GPU are launched for sequences of that length, not of the whole row. [`TokenBudgetMixin`] sets it itself.

    Returns:
        `dict[str, Tensor]`: For B examples of N tokens in total, the longest of which has T:

        - `input_ids`, int64 `(B, T)`: padded on the right with the pad id, whatever the tokenizer's `padding_side`.
          With `flat`: `(1, N)`.
        - `lengths`, int64 `(B,)`: tokens of each sequence.
        - `attention_mask`, int64 `(B, T)`: 1 for tokens and 0 for padding, for code that reads it, such as the
          Trainer's `include_num_input_tokens_seen`. With `flat`, there is none.
        - columns per token: `(B, T, …)`, padded with 0 (labels: `label_pad_token_id`). With `flat`: `(1, N, …)`.
        - columns per example: `(B, …)`; `hidden_spans`: `(B, K, 2)`.
        - `labels`, with `count_answers`: int64 `(B,)`, the `start_positions`, or -100 if the answer is not inside the
          sequence.

        With `max_tokens` and `max_sequences`:

        - `input_ids`, int64 `(1, max_tokens)`: padded with the pad id (0 if the tokenizer has none).
        - `lengths`, int64 `(max_sequences,)`: tokens of each sequence, padded with 0.
        - columns per token: `(1, max_tokens, …)`, padded with 0 or `False` (labels: `label_pad_token_id`).
        - columns per example: `(max_sequences, …)`, padded with 0, or with `label_pad_token_id` in `labels` (also of
          floats), `start_positions` and `end_positions`; `hidden_spans`: `(max_sequences, K, 2)`.

    Raises:
        ValueError: `column_roles` has an unknown role, or one that does not fit the column. `max_tokens` and
            `max_sequences` come without `flat`, only one of them is given, or one is not a positive integer.
            `max_length` comes without `flat`, or is not a positive integer. `column_sizes` has an unknown column or a
            negative size. When called: there are no examples; `input_ids` is missing or not a list of integers; the
            role of a column is unknown; a column does not have the shape of its role, is missing in some examples, or
            does not hold numbers or text; labels are text; `lengths` is wrong; rows need padding and the tokenizer has
            no pad token; the examples do not fit `max_tokens`, `max_sequences`, `max_length` or `column_sizes`, or a
            size in `column_sizes` is missing.

    Example:

    ```python
    >>> collator = DataCollatorWithLengths(tokenizer)
    >>> collator([{"input_ids": [5, 6, 7], "label": 1}, {"input_ids": [8], "label": 0}])
    {'input_ids': tensor([[5, 6, 7],
            [8, 0, 0]]), 'lengths': tensor([3, 1]), 'attention_mask': tensor([[1, 1, 1],
            [1, 0, 0]]), 'labels': tensor([1, 0])}
    ```
    """

    tokenizer: PreTrainedTokenizerBase
    flat: bool = False
    label_pad_token_id: int = -100
    return_position_ids: bool = False
    column_roles: Mapping[str, str] | None = None
    count_answers: bool = False
    max_tokens: int | None = None
    max_sequences: int | None = None
    column_sizes: Mapping[str, int] | None = None
    max_length: int | None = None

    main: ClassVar[str] = "input_ids"

    def __post_init__(self):
        super().__post_init__()
        if self.max_length is not None:
            check_count("max_length", self.max_length, least=1)
            if not self.flat:
                raise ValueError(f"`max_length` must come with `flat=True`; got max_length={self.max_length}")

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = super().__call__(features)
        if self.max_length is not None:
            batch["max_length_q"] = self.max_length
        if self.return_position_ids and "position_ids" not in batch:
            batch["position_ids"] = self._join("position_ids", [torch.arange(n) for n in batch["lengths"].tolist()])
        if self.count_answers:
            batch.update(counted_answers(batch))
        return batch

    def _check_room(self, lengths: Tensor) -> None:
        super()._check_room(lengths)
        if self.max_length is not None and int(lengths.max()) > self.max_length:
            raise ValueError(
                f"an example must have at most `max_length`={self.max_length} tokens; got {lengths.max()} in example "
                f"{lengths.argmax()}. Raise it, or truncate the example"
            )

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
        pad_token_id = getattr(self.tokenizer, "pad_token_id", None)  # a flat collator needs no tokenizer
        if not isinstance(pad_token_id, int):
            if self.flat:
                return 0  # no model reads it, since `lengths` says where the last sequence ends
            raise ValueError(
                f"`tokenizer.pad_token` must be set to pad rows of different lengths; got pad_token_id={pad_token_id}. "
                "Set it, for example to `tokenizer.eos_token`, or collate with `flat=True`"
            )
        return pad_token_id


@dataclass
class DataCollatorForFeatures(CollatorWithLengths):
    """
    Collates examples of frames (speech, patches of an image, time series) into a batch that carries `lengths`.

    Columns have the same roles as in [`DataCollatorWithLengths`], with frames in place of tokens. There is one
    difference: `labels` that are lists of integers, such as the targets of a [`DynMaskForCTC`], are per example and are
    padded. Labels per frame need `column_roles={"labels": "token"}`.

    Args:
        flat (`bool`, *optional*, defaults to `False`): Put all sequences end to end in one row, without padding.
        label_pad_token_id (`int`, *optional*, defaults to -100):
            The label of padding: behind the labels of an example, and where there is no frame or no sequence.
        column_roles (`Mapping[str, str]`, *optional*): As in [`DataCollatorWithLengths`].
        max_tokens (`int`, *optional*): Size of a flat row, in frames. `None`: the number of its frames.
        max_sequences (`int`, *optional*): Size of `lengths` with a flat row. `None`: the number of its sequences.
        column_sizes (`Mapping[str, int]`, *optional*):
            The maximum numbers of labels and `hidden_spans` of an example, such as `{"labels": L}`. `None`: the maximum
            in the batch. Required with `max_sequences` if there are such columns, since all batches must have the same
            sizes.

    Returns:
        `dict[str, Tensor]`: For B examples of N frames in total, the longest of which has T:

        - `input_features`, float32 `(B, T, F)`: padded on the right with 0. With `flat`: `(1, N, F)`.
        - `lengths`, int64 `(B,)`: frames of each sequence.
        - `attention_mask`, int64 `(B, T)`: 1 for frames and 0 for padding. With `flat`, there is none.
        - `labels` that are lists of integers: int64 `(B, L)`, padded with `label_pad_token_id`.
        - other columns as in [`DataCollatorWithLengths`].

        With `max_tokens` and `max_sequences`:

        - `input_features`, float32 `(1, max_tokens, F)`: padded with 0.
        - `lengths`, int64 `(max_sequences,)`: frames of each sequence, padded with 0.
        - `labels` that are lists of integers: int64 `(max_sequences, L)`, padded with `label_pad_token_id`.

    Raises:
        ValueError: An argument is wrong as in [`DataCollatorWithLengths`]. When called: there are no examples;
            `input_features` is missing, not a list of frames, or has frames of different sizes; another column is wrong
            as in [`DataCollatorWithLengths`]; the examples do not fit `max_tokens`, `max_sequences` or `column_sizes`,
            or a size is missing.

    Example:

    ```python
    >>> collator = DataCollatorForFeatures()
    >>> batch = collator([{"input_features": [[0.5], [1.0]], "labels": [4]}, {"input_features": [[2.0]], "labels": []}])
    >>> batch["input_features"].squeeze(-1), batch["lengths"], batch["labels"]
    (tensor([[0.5000, 1.0000],
            [2.0000, 0.0000]]), tensor([2, 1]), tensor([[   4],
            [-100]]))
    ```
    """

    flat: bool = False
    label_pad_token_id: int = -100
    column_roles: Mapping[str, str] | None = None
    max_tokens: int | None = None
    max_sequences: int | None = None
    column_sizes: Mapping[str, int] | None = None

    main: ClassVar[str] = "input_features"
    role_of_labels: ClassVar[str] = EXAMPLE
    uneven: ClassVar[tuple[str, ...]] = ("hidden_spans", "labels")

    def _columns(self, features):
        columns = super()._columns(features)
        columns[self.main] = [frames.float() for frames in columns[self.main]]
        return columns

    def _check_main(self, values):
        shapes = [tuple(frames.shape) for frames in values]
        if any(len(shape) != 2 for shape in shapes) or len({features for _, features in shapes}) > 1:
            raise ValueError(
                "`input_features` of an example must have shape (frames, features), with the same number of features; "
                f"got shapes {shapes}"
            )

    def _stack(self, name, values):
        if name == "labels" and all(value.ndim == 1 and value.dtype == torch.int64 for value in values):
            values = self._even(name, values)
        return super()._stack(name, values)


class MakesDecoderInputs(Protocol):
    """An encoder-decoder of this package or of transformers."""

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor: ...


@dataclass
class DataCollatorForSeq2SeqWithLengths:
    """
    Collates pairs of a source and a target into a batch that carries the lengths of both.

    The columns `labels` and those whose names begin with `decoder_` are the target; all others are the source. Columns
    have the same roles as in [`DataCollatorWithLengths`], where the prefix `decoder_` does not count. `labels` are the
    tokens of the target. A source of frames (`input_features`) is collated as in [`DataCollatorForFeatures`]. A column
    `lengths` may count the tokens of the source, or of both sides together.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its pad token fills the rows.
        model ([`DynMaskForConditionalGeneration`] or a stock model, *optional*):
            Its `prepare_decoder_input_ids_from_labels` makes decoder inputs from the labels. They are needed if the
            [`~transformers.Trainer`] does not pass the labels to the model, that is, with `label_smoothing_factor` or
            `compute_loss_func`. `None`: the batch has no decoder inputs, and the model makes its own from the labels.
        flat (`bool`, *optional*, defaults to `False`): Put all sequences of a side end to end, without padding.
        label_pad_token_id (`int`, *optional*, defaults to -100): The label of padding.
        column_roles (`Mapping[str, str]`, *optional*): As in [`DataCollatorWithLengths`], with the columns' full names.
        max_tokens (`int`, *optional*): Size of the flat row of sources. `None`: the number of its tokens.
        max_target_tokens (`int`, *optional*): Size of the flat row of targets. Required with `max_tokens`.
        max_sequences (`int`, *optional*): Size of `lengths` and `decoder_lengths` with flat rows.
        column_sizes (`Mapping[str, int]`, *optional*):
            As in [`DataCollatorWithLengths`], for `hidden_spans` and `decoder_hidden_spans`.

    Returns:
        `dict[str, Tensor]`: For B pairs, whose longest target has U tokens and whose targets have M tokens in total:

        - `input_ids (B, T)` or `input_features (B, T, F)`, `lengths (B,)`, `attention_mask (B, T)` and the other
          columns of the source: as from [`DataCollatorWithLengths`] or [`DataCollatorForFeatures`].
        - `labels`, int64 `(B, U)`: the targets, padded with `label_pad_token_id`. With `flat`: `(1, M)`.
        - `decoder_lengths`, int64 `(B,)`: tokens of each target.
        - `decoder_input_ids`, int64, with `model`: of the same shape as `labels`.
        - the other columns of the target, named `decoder_…`.

        With `max_tokens`, `max_target_tokens` and `max_sequences`:

        - `input_ids (1, max_tokens)` or `input_features (1, max_tokens, F)`, and `lengths (max_sequences,)`: as from
          those collators.
        - `labels`, int64 `(1, max_target_tokens)`: the targets, padded with `label_pad_token_id`.
        - `decoder_lengths`, int64 `(max_sequences,)`: tokens of each target, padded with 0.
        - `decoder_input_ids`, int64 `(1, max_target_tokens)`, with `model`: padded with the pad id.

        If no example has a target, the batch has the columns of the source only.

    Raises:
        ValueError: An argument is wrong as in [`DataCollatorWithLengths`]. When called: one side is wrong as in that
            collator; there are columns of a target but no `labels`, or these are not a list of integers; `lengths`
            counts neither the source nor both sides.

    Example:

    ```python
    >>> collator = DataCollatorForSeq2SeqWithLengths(tokenizer)
    >>> collator([{"input_ids": [5, 6, 7], "labels": [8]}, {"input_ids": [9], "labels": [4, 5]}])
    {'input_ids': tensor([[5, 6, 7],
            [9, 0, 0]]), 'lengths': tensor([3, 1]), 'attention_mask': tensor([[1, 1, 1],
            [1, 0, 0]]), 'labels': tensor([[   8, -100],
            [   4,    5]]), 'decoder_lengths': tensor([1, 2])}
    ```
    """

    tokenizer: PreTrainedTokenizerBase
    model: MakesDecoderInputs | None = None
    flat: bool = False
    label_pad_token_id: int = -100
    column_roles: Mapping[str, str] | None = None
    max_tokens: int | None = None
    max_target_tokens: int | None = None
    max_sequences: int | None = None
    column_sizes: Mapping[str, int] | None = None

    uneven: ClassVar[tuple[str, ...]] = ("hidden_spans", "decoder_hidden_spans")

    def __post_init__(self):
        check_roles(self.column_roles, [*LABELS, *MAIN_COLUMNS])
        names = ("max_tokens", "max_target_tokens", "max_sequences")
        check_fixed_sizes(self.flat, {name: getattr(self, name) for name in names})
        self._source_collator(of_frames=False)
        self._target_collator()

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        sources = [_side_columns(feature, target=False) for feature in features]
        targets = [_side_columns(feature, target=True) for feature in features]
        given = read_columns([{"lengths": source.pop("lengths", None)} for source in sources]) if sources else {}
        batch = self._source_collator(any("input_features" in source for source in sources))(sources)
        counted = [batch["lengths"]]
        if any(targets):
            batch.update(self._target(targets))
            counted.append(batch["lengths"] + batch["decoder_lengths"])
        check_lengths(given.get("lengths", []), *counted)
        return batch

    def role(self, name: str, values: list[Tensor]) -> str:
        """The role of a column, as in [`DataCollatorWithLengths`], with respect to the tokens of the source. Columns of
        the target are therefore per example."""
        return EXAMPLE if _is_target(name) else self._source_collator(name == "input_features").role(name, values)

    def _source_collator(self, of_frames: bool) -> CollatorWithLengths:
        settings: dict[str, Any] = {
            "flat": self.flat,
            "column_roles": _side_columns(self.column_roles or {}, target=False),
            "max_tokens": self.max_tokens,
            "max_sequences": self.max_sequences,
            "column_sizes": _side_columns(self.column_sizes or {}, target=False),
        }
        if of_frames:
            return DataCollatorForFeatures(**settings)
        return DataCollatorWithLengths(self.tokenizer, **settings)

    def _target_collator(self) -> "_DataCollatorForTargets":
        return _DataCollatorForTargets(
            self.tokenizer,
            self.flat,
            self.label_pad_token_id,
            column_roles={**_side_columns(self.column_roles or {}, target=True), "labels": TOKEN},
            max_tokens=self.max_target_tokens,
            max_sequences=self.max_sequences,
            column_sizes=_side_columns(self.column_sizes or {}, target=True),
            model=self.model,
        )

    def _target(self, targets: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        try:
            batch = self._target_collator()(targets)
        except ValueError as error:
            raise ValueError(f"of the target: {error}") from error
        batch.pop("attention_mask", None)
        return {name if name == "labels" else f"decoder_{name}": values for name, values in batch.items()}


@dataclass
class _DataCollatorForTargets(DataCollatorWithLengths):
    """Collates targets. Their columns have no prefix `decoder_`."""

    model: MakesDecoderInputs | None = None

    main: ClassVar[str] = "labels"
    name_of_max_tokens: ClassVar[str] = "max_target_tokens"

    def _present(self, features):
        columns, roles = super()._present(features)
        if self.model is not None and "input_ids" not in columns:
            columns["input_ids"] = self._decoder_inputs(self.model, columns["labels"])
            roles["input_ids"] = TOKEN
        return columns, roles

    def _decoder_inputs(self, model: MakesDecoderInputs, targets: list[Tensor]) -> list[Tensor]:
        """Decoder inputs of each target. Labels are passed to the model in padded rows, which every model can read."""
        width = max(1, *map(len, targets))
        rows = torch.stack([pad(labels, (0, width - len(labels)), value=IGNORE_INDEX) for labels in targets])
        inputs = model.prepare_decoder_input_ids_from_labels(labels=rows)
        return [row[: len(labels)] for row, labels in zip(inputs, targets, strict=True)]


def _is_target(name: str) -> bool:
    return name in LABELS or name.startswith("decoder_")


def _side_columns(columns: Mapping[str, Any], target: bool) -> dict[str, Any]:
    """The columns of the target or of the source, without the prefix `decoder_`."""
    return {name.removeprefix("decoder_"): columns[name] for name in columns if _is_target(name) == target}


def check_lengths(given: list[Tensor], *counted: Tensor) -> None:
    """Raise a `ValueError` if an entry of the column `lengths` equals none of the counts of that example's tokens."""
    for index, length in enumerate(given):
        known = [int(count[index]) for count in counted]
        if length.ndim or length.is_floating_point() or length.dtype == torch.bool or int(length) not in known:
            raise ValueError(
                "column `lengths` must hold what the collator counts, or be left out: "
                f"{' or '.join(map(str, known))} in example {index}; got {length.tolist()}"
            )


def _without_first(labels: Tensor) -> Tensor:
    """The labels of a sequence, without the first one, which no token predicts."""
    labels = labels.clone()
    labels[:1] = IGNORE_INDEX
    return labels


def counted_answers(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`labels (B,)` for a batch with answers but without labels: the `start_positions`, or -100 if an answer is not
    inside its sequence. Empty for any other batch."""
    if "labels" in batch or not all(name in batch for name in ("lengths", *ANSWER)):
        return {}
    start, end = (batch[name].flatten() for name in ANSWER)
    is_inside = (start >= 0) & (end >= 0) & (torch.maximum(start, end) < batch["lengths"])
    return {"labels": start.where(is_inside, IGNORE_INDEX)}


def _spans(value: Tensor) -> Tensor:
    if value.numel() and (value.ndim != 2 or value.shape[1] != 2):
        raise ValueError(f"`hidden_spans` of an example must have shape (K, 2); got {tuple(value.shape)}")
    return value.reshape(-1, 2)
