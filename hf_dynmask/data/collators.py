"""Collators that describe a batch by the lengths of its sequences."""

import copy
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


class FlatBatch(dict[str, Any]):
    """A batch whose sequences stand end to end in one row, which cannot be split. Accelerate makes parts of it, by its
    class, where one process collates for all."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        lengths = self.get("lengths")
        if isinstance(lengths, Tensor) and _is_cut(lengths):
            self._refuse(f"`lengths` of a flat batch must be whole; got {lengths.numel()} of them")
        for name in MAIN_COLUMNS:
            rows = self[name].shape[0] if isinstance(self.get(name), Tensor) else 1
            if rows != 1:
                self._refuse(f"`{name}` of a flat batch must have 1 row, which cannot be split or joined; got {rows}")

    @staticmethod
    def _refuse(message: str) -> None:
        raise ValueError(
            f"{message}. Collate with `flat=False`, or let each process collate its own batches: "
            "`dispatch_batches=False` in `accelerator_config`"
        )


def _is_cut(lengths: Tensor) -> bool:
    """Whether this process has got a part of them. (One process alone gets all; Accelerate takes a part beside.)"""
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    is_part = lengths.untyped_storage().nbytes() > lengths.nbytes
    return is_part and several and torch.distributed.get_world_size() > 1


class CollatorWithLengths(ABC):
    """What collators with `lengths` share. The column `main` says how many tokens or frames an example has."""

    main: ClassVar[str]
    flat: bool
    label_pad_token_id: int
    column_roles: Mapping[str, str] | None
    max_tokens: int | None
    max_sequences: int | None
    column_sizes: Mapping[str, int] | None

    name_of_max_tokens: ClassVar[str] = "max_tokens"  # the user's argument
    uneven: ClassVar[tuple[str, ...]] = ("hidden_spans",)  # columns of lists of an example that differ in length

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
        if self.flat:  # Accelerate takes the size of the first tensor for the number of examples
            batch = {"lengths": _filled(lengths, self.max_sequences, 0), self.main: tokens}
        else:
            is_there = torch.arange(tokens.shape[1]) < lengths[:, None]
            batch = {self.main: tokens, "lengths": lengths, "attention_mask": is_there.long()}
        for name, values in columns.items():
            batch[name] = self._stack(name, values) if roles[name] == EXAMPLE else self._join(name, values)
        return FlatBatch(batch) if self.flat else batch

    def role(self, name: str, values: list[Tensor]) -> str:
        """
        The role of a column, `"token"` or `"example"`: by `column_roles`, else by its name.

        Args:
            name (`str`): As models call it.
            values (`list[Tensor]`): Of each example. Numbers alone are of the example, and so are labels that are
                floats.

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

    role_of_labels: ClassVar[str] = TOKEN  # where they are lists of integers

    def _present(self, features: Sequence[Mapping[str, Any]]) -> tuple[Columns, dict[str, str]]:
        """The tokens that are there, in all columns, and the role of each column."""
        columns = self._columns(features)
        roles = {name: self.role(name, values) for name, values in columns.items()}
        keep = presence(columns, self.main)
        check_sizes(columns, roles, self.main)
        self._settle_labels(columns, roles, keep)
        columns.pop("attention_mask", None)
        if keep is not None:
            columns = without_absent(columns, roles, keep)
        if self.flat and roles.get("labels") == NEXT_TOKEN:
            columns["labels"] = [_without_first(labels) for labels in columns["labels"]]
        return columns, roles

    def _settle_labels(self, columns: Columns, roles: dict[str, str], keep: list[Tensor] | None) -> None:
        """Find labels that are the next tokens, and raise a `ValueError` where absent tokens leave open whose they are:
        a token that is not there has no label, and a list that goes with the whole example has one at every place."""
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
        """The numbers in the examples, checked, under the names that models give them."""
        columns = read_columns(features)
        if self.main not in columns:
            raise ValueError(f"examples must have a column `{self.main}`; got {', '.join(columns) or 'no numbers'}")
        self._check_main(columns[self.main])
        return columns

    @abstractmethod
    def _check_main(self, values: list[Tensor]) -> None:
        """Raise a `ValueError` where the main column of an example has a wrong shape or dtype."""

    def _check_column_sizes(self) -> None:
        for name, size in (self.column_sizes or {}).items():
            if model_name(name) not in self.uneven:
                known = " and ".join(f"`{each}`" for each in self.uneven)
                raise ValueError(f"`column_sizes` must be of {known}, whose lists differ in length; got {name!r}")
            check_count(f"column_sizes['{name}']", size, least=0)

    def _check_room(self, lengths: Tensor) -> None:
        """Raise a `ValueError` where the examples do not fit into a row of fixed size."""
        if self.max_tokens is None or self.max_sequences is None:
            return
        limit = f"`{self.name_of_max_tokens}`={self.max_tokens}"
        remedy = "or make batches by `TokenBudgetBatchSampler`"
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
            return _filled(torch.cat(values), self.max_tokens, self._padding(name))[None]
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
        return _filled(torch.stack(values), self.max_sequences, self._padding(name))

    def _even(self, name: str, values: list[Tensor]) -> list[Tensor]:
        """Lists of a column per example, filled up to one length: the longest one's, or its entry in `column_sizes`."""
        longest = max(map(len, values))
        sizes = {model_name(column): size for column, size in (self.column_sizes or {}).items()}
        size = sizes.get(name, longest if self.max_sequences is None else None)
        if size is None:
            raise ValueError(
                f"column `{name}` must have one size in all batches, where `max_sequences` is set: say on the collator "
                f"how many entries an example has at most, `column_sizes={{'{name}': …}}`; got up to {longest} in "
                "this batch"
            )
        if longest > size:
            place = max(range(len(values)), key=lambda index: len(values[index]))
            raise ValueError(
                f"column `{name}` must have at most `column_sizes['{name}']`={size} entries an example; got {longest} "
                f"in example {place}"
            )
        return [_filled(value, size, self._padding(name)) for value in values]


@dataclass
class DataCollatorWithLengths(CollatorWithLengths):
    """
    Collates tokenized examples into a batch that carries `lengths`, which is all that models need to know of padding.

    Each column of the examples has a role, by its name:

    - **per token**: an example has one entry for each of its tokens: `token_type_ids`, `position_ids`,
      `special_tokens_mask`, `offset_mapping`, `word_ids`, `segment_ids`, `global_tokens`, `missing`, `inputs_embeds`,
      `shift_labels`, and `labels` that are lists of integers. These are padded, or flattened, along with `input_ids`.
    - **per example**: `start_positions`, `end_positions`, `prefix_lengths`, `mask_choice`, `hidden_spans`, `idx`,
      `labels` that are floats (targets of a regression, or of several labels), and all columns of one number an
      example. These are stacked, so they must have the same shape in all examples; but examples with fewer
      `hidden_spans` get spans of length 0.

    A list under any other name needs its role in `column_roles`.

    Integers, and booleans that are labels, become int64, floats float32; other booleans stay. `label` and `label_ids`
    become `labels`, and text is left out, as in [`~transformers.default_data_collator`]. `None` in `word_ids`, for a
    token that is in no word, becomes -1.

    Examples that come padded (`attention_mask` with zeros) lose their absent tokens first, wherever these stand;
    `start_positions` and `end_positions` move along. A column `lengths`, as a budget of tokens may read it, must hold
    the number of tokens that are there.

    **Flat batches of a causal model.** Nothing predicts the first token of a sequence, but in a row of several the
    [`~transformers.Trainer`] would count it as a target. `labels` of which each is the next token's therefore become
    -100 there. Without a role in `column_roles` they are taken for such where all that are not -100 equal `input_ids`.

    **Flat batches of one shape.** With `max_tokens` and `max_sequences`, all flat batches have the same shape, whatever
    they hold, as a compiled model or a CUDA graph needs it. The examples stand at the front; the places behind them are
    absent, and `lengths` end in zeros. [`TokenBudgetBatchSampler`] makes batches that leave few places empty, and
    [`TokenBudgetMixin`] sets both numbers itself. Such batches are for training: metrics of an evaluation would count
    the absent sequences, so evaluate with `flat=False`.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Gives the id that rows are padded with.
        flat (`bool`, *optional*, defaults to `False`):
            Put all sequences end to end in one row, without padding. Such a batch is for one device: `dispatch_batches`
            of Accelerate and [`~torch.nn.DataParallel`] cannot split it.
        label_pad_token_id (`int`, *optional*, defaults to -100):
            Label where no token or no sequence is; losses in PyTorch ignore -100.
        return_position_ids (`bool`, *optional*, defaults to `False`):
            Give `position_ids` too, from 0 on in each sequence. The models count for themselves; TRL's `SFTTrainer`
            wants to see them.
        column_roles (`Mapping[str, str]`, *optional*):
            Roles of columns, in place of those by name: `"token"` or `"example"`; of labels also `"next_token"`, one a
            token, which is predicted from the tokens before it.
        count_answers (`bool`, *optional*, defaults to `False`):
            Give answers (`start_positions`, `end_positions`) `labels` too, if examples have none. A
            [`DynMaskForQuestionAnswering`] does not read these; the Trainer counts them, and so averages the loss over
            the answers of all batches of a step, of which some may have more than others. [`TokenBudgetMixin`] does so
            by itself. Not for `label_smoothing_factor`, which smooths all `labels`, nor for stock models, whose loss
            does not know the count.
        max_tokens (`int`, *optional*): Places of a flat row. `None`: as many as its tokens.
        max_sequences (`int`, *optional*): Entries of `lengths` with a flat row. `None`: as many as its sequences.
        column_sizes (`Mapping[str, int]`, *optional*):
            Most entries of an example in `hidden_spans`. `None`: as many as in the batch; with `max_sequences` they
            must be given, so that all batches have as many.

    Returns:
        `dict[str, Tensor]`: B examples of N tokens in all, T in the longest of them.

        - `input_ids`, int64 `(B, T)`: from the left edge, whatever the tokenizer's `padding_side`. With `flat`:
          `(1, N)`.
        - `lengths`, int64 `(B,)`: tokens of each sequence.
        - `attention_mask`, int64 `(B, T)`: 1 where a token is, for code that asks for it, such as the Trainer's
          `include_num_input_tokens_seen`. With `flat`: none.
        - columns per token: `(B, T, …)`, 0 (labels: `label_pad_token_id`) where no token is. With `flat`: `(1, N, …)`.
        - columns per example: `(B, …)`; `hidden_spans`: `(B, K, 2)`.
        - `labels`, with `count_answers`: int64 `(B,)`, `start_positions`, or -100 where the answer is not inside the
          sequence.

        With `max_tokens` and `max_sequences`:

        - `input_ids`, int64 `(1, max_tokens)`: the pad id behind the last token (0 if the tokenizer has none).
        - `lengths`, int64 `(max_sequences,)`: 0 behind the last sequence.
        - columns per token: `(1, max_tokens, …)`, 0 or `False` (labels: `label_pad_token_id`) behind the last token.
        - columns per example: `(max_sequences, …)`, behind the last sequence 0, and `label_pad_token_id` in `labels`
          (of floats, too), `start_positions` and `end_positions`; `hidden_spans`: `(max_sequences, K, 2)`, K from
          `column_sizes`.

    Raises:
        ValueError: `column_roles` has an unknown role, or one that does not fit the column; `max_tokens` and
            `max_sequences` come without `flat` or one without the other, or are not positive integers; `column_sizes`
            has another column, or not an integer of at least 0. When called: there are no
            examples; `input_ids` is missing or not a list of integers; the role of a column is not known; a column does
            not have the shape of its role, is missing in some examples, or does not hold numbers or text; labels are
            text; `lengths` is wrong; rows must be padded and the tokenizer has no pad token; there are more examples or
            tokens than `max_sequences` and `max_tokens`, or more spans than in `column_sizes`, or these are missing.

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

    main: ClassVar[str] = "input_ids"

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        batch = super().__call__(features)
        if self.return_position_ids and "position_ids" not in batch:
            batch["position_ids"] = self._join("position_ids", [torch.arange(n) for n in batch["lengths"].tolist()])
        if self.count_answers:
            batch.update(counted_answers(batch))
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
            if self.flat:
                return 0  # read by no one: what stands behind the last sequence is told by `lengths`
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

    Columns have their roles as in [`DataCollatorWithLengths`], with frames for tokens, but for one: `labels` that are
    lists of integers are targets of the examples, as for [`DynMaskForCTC`], and are padded. Labels of frames need
    `column_roles={"labels": "token"}`.

    Args:
        flat (`bool`, *optional*, defaults to `False`): Put all sequences end to end in one row, without padding.
        label_pad_token_id (`int`, *optional*, defaults to -100): Label behind a target, and where no frame is.
        column_roles (`Mapping[str, str]`, *optional*): As there.
        max_tokens, max_sequences (`int`, *optional*): As there, frames for tokens.
        column_sizes (`Mapping[str, int]`, *optional*): As there, and most `labels` of an example.

    Returns:
        `dict[str, Tensor]`: B examples of N frames in all, T in the longest of them.

        - `input_features`, float32 `(B, T, F)`: from the left edge, 0 where no frame is. With `flat`: `(1, N, F)`.
        - `lengths`, int64 `(B,)`: frames of each sequence.
        - `attention_mask`, int64 `(B, T)`: 1 where a frame is. With `flat`: none.
        - `labels` of targets: int64 `(B, L)`, with `flat` as well; `label_pad_token_id` behind each target.
        - other columns as there.

        With `max_tokens` and `max_sequences`: `input_features (1, max_tokens, F)`, 0 behind the last frame; `lengths
        (max_sequences,)`, 0 behind the last sequence; `labels (max_sequences, L)`, L from `column_sizes`.

    Raises:
        ValueError: An argument is wrong as there. When called: there are no examples; `input_features` is missing or
            not frames of numbers, as many in each; another column is wrong as there; examples do not fit the sizes.

    Example:

    ```python
    >>> collator = DataCollatorForFeatures()
    >>> collator([{"input_features": [[0.5], [1.0], [1.5]], "labels": [4]}, {"input_features": [[2.0]], "labels": []}])
    {'input_features': tensor([[[0.5000],
             [1.0000],
             [1.5000]],

            [[2.0000],
             [0.0000],
             [0.0000]]]), 'lengths': tensor([3, 1]), 'attention_mask': tensor([[1, 1, 1],
            [1, 0, 0]]), 'labels': tensor([[   4],
            [-100]])}
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
                "`input_features` of an example must have shape (frames, features), with as many features in all; "
                f"got shapes {shapes}"
            )

    def _stack(self, name, values):
        if name == "labels" and all(value.ndim == 1 and value.dtype == torch.int64 for value in values):
            values = self._even(name, values)
        return super()._stack(name, values)


class MakesDecoderInputs(Protocol):
    """An encoder-decoder, of this package or a stock one."""

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor: ...


@dataclass
class DataCollatorForSeq2SeqWithLengths:
    """
    Collates pairs of a source and a target into a batch that carries the lengths of both.

    The target are the columns `labels` and those whose names begin with `decoder_`; all others are the source. Columns
    of a side have their roles as in [`DataCollatorWithLengths`], under their names without `decoder_`; the target's
    tokens are `labels`. A source of frames, `input_features`, is collated as by [`DataCollatorForFeatures`]. A column
    `lengths` may count the tokens of the source, or of both sides.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Gives the id that rows are padded with.
        model ([`DynMaskForConditionalGeneration`] or a stock model, *optional*):
            Makes decoder inputs of the labels, by its `prepare_decoder_input_ids_from_labels`. They are needed where
            the [`~transformers.Trainer`] takes the labels away from the model: with `label_smoothing_factor` or
            `compute_loss_func`. `None`: there are none, and a model makes its own of the labels.
        flat (`bool`, *optional*, defaults to `False`): Put all sequences of a side end to end, without padding.
        label_pad_token_id (`int`, *optional*, defaults to -100): Label where no token is.
        column_roles (`Mapping[str, str]`, *optional*): As there, by full names.
        max_tokens, max_target_tokens (`int`, *optional*):
            Places of the flat row of sources, and of that of targets. They come together with `max_sequences`.
        max_sequences (`int`, *optional*): Entries of `lengths` and `decoder_lengths` with flat rows.
        column_sizes (`Mapping[str, int]`, *optional*): As there, of `hidden_spans` and `decoder_hidden_spans`.

    Returns:
        `dict[str, Tensor]`:

        - `input_ids (B, T)`, or `input_features (B, T, F)`, `lengths (B,)` and `attention_mask (B, T)`, with the
          source's other columns: as from the collator of that side alone. With `flat`: `(1, N, …)`, and no mask.
        - `labels`, int64 `(B, U)`: `label_pad_token_id` behind each target. With `flat`: `(1, M)`.
        - `decoder_lengths`, int64 `(B,)`: tokens of each target.
        - `decoder_input_ids`, int64, with `model`: of the shape of `labels`.

        With fixed sizes: `input_ids (1, max_tokens)` and `lengths (max_sequences,)`; `labels (1, max_target_tokens)`,
        `decoder_lengths (max_sequences,)` and `decoder_input_ids (1, max_target_tokens)`, filled as there.

        Examples without a target give the source alone.

    Raises:
        ValueError: An argument is wrong as there. When called: a side is wrong as there; a target has columns, but no
            `labels`, or these are not a list of integers; `lengths` counts neither the source nor both sides.

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
        sources = [_of_side(feature, target=False) for feature in features]
        targets = [_of_side(feature, target=True) for feature in features]
        given = read_columns([{"lengths": source.pop("lengths", None)} for source in sources]) if sources else {}
        batch = self._source_collator(any("input_features" in source for source in sources))(sources)
        counted = [batch["lengths"]]
        if any(targets):
            batch.update(self._target(targets))
            counted.append(batch["lengths"] + batch["decoder_lengths"])
        check_lengths(given.get("lengths", []), *counted)
        return batch

    def role(self, name: str, values: list[Tensor]) -> str:
        """The role of a column for the source's tokens, see [`DataCollatorWithLengths.role`]; a target's has none."""
        return EXAMPLE if _of_target(name) else self._source_collator(name == "input_features").role(name, values)

    def _source_collator(self, of_frames: bool) -> CollatorWithLengths:
        settings: dict[str, Any] = {
            "flat": self.flat,
            "column_roles": _of_side(self.column_roles or {}, target=False),
            "max_tokens": self.max_tokens,
            "max_sequences": self.max_sequences,
            "column_sizes": _of_side(self.column_sizes or {}, target=False),
        }
        if of_frames:
            return DataCollatorForFeatures(**settings)
        return DataCollatorWithLengths(self.tokenizer, **settings)

    def _target_collator(self) -> "_DataCollatorForTargets":
        return _DataCollatorForTargets(
            self.tokenizer,
            self.flat,
            self.label_pad_token_id,
            column_roles={**_of_side(self.column_roles or {}, target=True), "labels": TOKEN},
            max_tokens=self.max_target_tokens,
            max_sequences=self.max_sequences,
            column_sizes=_of_side(self.column_sizes or {}, target=True),
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
    """A target alone, its columns without `decoder_`."""

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
        """What a model makes of labels in rows, the one form that all models know."""
        width = max(1, *map(len, targets))
        rows = torch.stack([pad(labels, (0, width - len(labels)), value=IGNORE_INDEX) for labels in targets])
        inputs = model.prepare_decoder_input_ids_from_labels(labels=rows)
        return [row[: len(labels)] for row, labels in zip(inputs, targets, strict=True)]


def _of_target(name: str) -> bool:
    return name in LABELS or name.startswith("decoder_")


def _of_side(columns: Mapping[str, Any], target: bool) -> dict[str, Any]:
    """The columns of a side, without `decoder_`."""
    return {name.removeprefix("decoder_"): columns[name] for name in columns if _of_target(name) == target}


def is_flat(collator: Any) -> bool:
    """Whether a collator is one of ours that makes flat batches, and so can give them a fixed size."""
    return hasattr(collator, "max_sequences") and collator.flat


def with_settings(collator: Any, **settings: Any) -> Any:
    """A copy of a collator with other settings. One that draws targets hears of the same epochs."""
    collator = copy.copy(collator)
    for name, value in settings.items():
        setattr(collator, name, value)
    return collator


def in_rows(collator: Any) -> Any:
    """A collator that makes the batches of a flat one with a row for each example; any other as it is."""
    if not is_flat(collator):
        return collator
    sizes = {name: None for name in ("max_tokens", "max_target_tokens", "max_sequences") if hasattr(collator, name)}
    return with_settings(collator, flat=False, **sizes)


def check_fixed_sizes(flat: bool, sizes: Mapping[str, int | None]) -> None:
    """
    Check the numbers that give all flat batches one shape.

    Args:
        flat (`bool`): The collator's.
        sizes (`Mapping[str, int | None]`): The collator's numbers by their names.

    Raises:
        ValueError: They come without `flat`, only some of them are given, or one is not an integer of at least 1.
    """
    given = {name: size for name, size in sizes.items() if size is not None}
    *first, last = (f"`{name}`" for name in sizes)
    names = f"{', '.join(first)} and {last}"
    values = ", ".join(f"{name}={size!r}" for name, size in sizes.items())
    if given and not flat:
        raise ValueError(f"{names} must come with `flat=True`, whose row they give a fixed size; got {values}")
    if given and len(given) < len(sizes):
        raise ValueError(f"{names} must be given together; got {values}")
    for name, size in given.items():
        check_count(name, size, least=1)


def check_count(name: str, count: Any, least: int) -> None:
    """Raise a `ValueError` where a setting is not an integer of at least so much."""
    if not isinstance(count, int) or isinstance(count, bool) or count < least:
        raise ValueError(f"`{name}` must be an integer of at least {least}; got {count!r}")


def _filled(values: Tensor, size: int | None, filler: int) -> Tensor:
    """The values with as many behind them as make `size` of them; `None`: as they are."""
    if size is None or len(values) == size:
        return values
    return torch.cat([values, values.new_full((size - len(values), *values.shape[1:]), filler)])


def check_lengths(given: list[Tensor], *counted: Tensor) -> None:
    """Raise a `ValueError` where a column `lengths` says something else of an example than what is counted."""
    for index, length in enumerate(given):
        known = [int(count[index]) for count in counted]
        if length.ndim or length.is_floating_point() or length.dtype == torch.bool or int(length) not in known:
            raise ValueError(
                "column `lengths` must hold what the collator counts, or be left out: "
                f"{' or '.join(map(str, known))} in example {index}; got {length.tolist()}"
            )


def _without_first(labels: Tensor) -> Tensor:
    """Labels for a row of several sequences, in which nothing predicts the first token of one."""
    labels = labels.clone()
    labels[:1] = IGNORE_INDEX
    return labels


def counted_answers(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`labels (B,)` of a batch with answers and none of its own: -100 where an answer is not inside its sequence and so
    is no target."""
    if "labels" in batch or not all(name in batch for name in ("lengths", *ANSWER)):
        return {}
    start, end = (batch[name].flatten() for name in ANSWER)
    is_inside = (start >= 0) & (end >= 0) & (torch.maximum(start, end) < batch["lengths"])
    return {"labels": start.where(is_inside, IGNORE_INDEX)}


def _spans(value: Tensor) -> Tensor:
    if value.numel() and (value.ndim != 2 or value.shape[1] != 2):
        raise ValueError(f"`hidden_spans` of an example must have shape (K, 2); got {tuple(value.shape)}")
    return value.reshape(-1, 2)
