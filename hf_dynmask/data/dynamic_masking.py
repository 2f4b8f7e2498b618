"""Targets of masked language models that are drawn anew in every epoch."""

import copy
import hashlib
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .collators import DataCollatorWithLengths
from .columns import LABELS

STRATEGIES = ("token", "whole_word", "span")
COLUMNS = ("special_tokens_mask", "word_ids", "idx")  # what the collator reads besides what models read
SETTINGS_OF_TARGETS = ("mlm_probability", "strategy", "mask_replace_prob", "random_replace_prob", "at_least_one")
SETTINGS_OF_TARGETS += ("dynamic", "copies", "seed")

# In place of an epoch.
UNKNOWN = -2
EVALUATION = -1

# Lengths of spans in words, 1 to 10: the geometric distribution of SpanBERT (arXiv:1907.10529), whose mean is 3.8.
SPAN_LENGTHS = 0.2 * 0.8 ** np.arange(10)
SPAN_LENGTHS /= SPAN_LENGTHS.sum()
SPAN_MEAN = float(SPAN_LENGTHS @ np.arange(1, 11))
SPAN_SHARE = SPAN_MEAN / (SPAN_MEAN + 1)  # of spans with a word between each two
# What is left of a span at a word in its inside, which more often is that of a long span.
REST_LENGTHS = SPAN_LENGTHS[::-1].cumsum()[::-1] / SPAN_MEAN


@dataclass
class DataCollatorForDynamicMasking:
    """
    Collates tokenized examples for masked language modeling into a batch that carries `lengths`, with targets drawn
    anew in every epoch as in RoBERTa (arXiv:1907.11692), or once as in BERT (arXiv:1810.04805).

    The targets of an example follow from `seed`, the epoch and the example alone. They are the same for any number of
    workers and processes, any batch size, order and company, and in a run that resumes from a checkpoint. They are
    others in the next epoch.

    **Who tells the epoch.** A [`~transformers.Trainer`] with [`DynamicMaskingMixin`] does. In a loop of your own, call
    [`~DataCollatorForDynamicMasking.set_epoch`] before you iterate over the data loader; the workers that it has by
    then, persistent ones, hear of it too. A collator that nobody told the epoch refuses to work.

    **Evaluation** takes the collator that [`~DataCollatorForDynamicMasking.for_evaluation`] returns: its targets are
    always the same, and none of the training's.

    **What an example is.** Its `input_ids`, without absent tokens. Copies of one text in a data set thus have the same
    targets in an epoch, unless a column `idx` tells them apart.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Gives the mask token, the special tokens, which are never targets, the ordinary ones to replace targets by,
            and the id that rows are padded with.
        mlm_probability (`float` or `dict[int, float]`, *optional*, defaults to 0.15):
            The probability of each token to be a target, above 0 and at most 1 (`"span"`: below 0.79). Or such
            probabilities by the epoch from which they are in force, in rising order; the first is 0. Evaluation has
            the last one.
        strategy (`str`, *optional*, defaults to `"token"`):
            - `"token"`: each token is a target or not, whatever the others are.
            - `"whole_word"`: all tokens of a word are targets, or none.
            - `"span"`: runs of whole words, of 1 to 10 words, as long as in SpanBERT (geometric with 0.2; 3.8 in the
              mean). SpanBERT draws spans until a share of the example is reached; here each word has the probability
              to be in one. An end of the example may cut a span.
        mask_replace_prob (`float`, *optional*, defaults to 0.8): The share of targets that the mask token replaces.
        random_replace_prob (`float`, *optional*, defaults to 0.1):
            The share of targets that any ordinary token of the vocabulary replaces. The rest stays as it is. With
            `"span"`, all targets of a span share one fate, as in SpanBERT.
        at_least_one (`bool`, *optional*, defaults to `False`):
            Whether an example that got no target gets one after all: a token, word or span. With a probability of
            0.15, one example in 25 gets none if it has 20 tokens, or with `"span"` 64 words.
        dynamic (`bool`, *optional*, defaults to `True`): Whether each epoch has its own targets.
        copies (`int`, *optional*, defaults to 1):
            Without `dynamic`, how many times targets are drawn; the epochs take turns. BERT has 10.
        seed (`int`, *optional*, defaults to 0): What the targets are drawn with.
        flat (`bool`, *optional*, defaults to `False`): Put all sequences end to end in one row, without padding.
        column_roles (`Mapping[str, str]`, *optional*):
            Roles of columns whose names do not tell them, as in [`DataCollatorWithLengths`].
        max_tokens, max_sequences (`int`, *optional*): Give all flat batches one shape, as there.
        column_sizes (`Mapping[str, int]`, *optional*): As there.

    The examples may have these columns, which the batch has not:

    - `special_tokens_mask`, integers, per token: 1 where no target may be, besides the special tokens.
    - `word_ids`, integers, per token: its word, as from [`~transformers.BatchEncoding.word_ids`]; `None`, or NaN, as
      data sets in NumPy or PyTorch format have it for `None`, is in no word. Without it, words begin where the
      tokenizer's vocabulary marks it, by `"Ġ"` or `"▁"`, or by `"##"` where they go on.
    - `idx`, an integer or text, per example: see above.

    A stock Trainer drops them before the collator sees them; one with [`DynamicMaskingMixin`] does not.

    Returns:
        `dict[str, Tensor]`:

        - `input_ids`, int64 `(B, T)`, with `flat` `(1, N)`: most of the targets replaced.
        - `labels`, int64, same shape: the tokens that were at the targets, -100 elsewhere. They take the place of any
          labels that the examples have.
        - `lengths`, int64 `(B,)`, `attention_mask` and other columns: as from [`DataCollatorWithLengths`].

    Raises:
        ValueError: The tokenizer has no mask token; the strategy is unknown; a probability is out of range, or
            `mask_replace_prob` and `random_replace_prob` exceed 1 in sum; `mlm_probability` is no schedule of epochs,
            or is one without `dynamic`; `copies` is no count, or is given with `dynamic`; `seed` is no integer of at
            least 0; `column_roles` has an unknown role. When called: nobody told the epoch; a column has a wrong type
            or shape; nothing says where words begin; the examples are refused as there.

    Example:

    ```python
    >>> collator = DataCollatorForDynamicMasking(tokenizer, strategy="span")
    >>> for epoch in range(3):
    ...     collator.set_epoch(epoch)
    ...     for batch in DataLoader(dataset, batch_size=8, collate_fn=collator):
    ...         loss = model(**batch).loss
    ```
    """

    tokenizer: PreTrainedTokenizerBase
    mlm_probability: float | Mapping[int, float] = 0.15
    strategy: str = "token"
    mask_replace_prob: float = 0.8
    random_replace_prob: float = 0.1
    at_least_one: bool = False
    dynamic: bool = True
    copies: int = 1
    seed: int = 0
    flat: bool = False
    column_roles: Mapping[str, str] | None = None
    max_tokens: int | None = None
    max_sequences: int | None = None
    column_sizes: Mapping[str, int] | None = None

    uneven: ClassVar[tuple[str, ...]] = DataCollatorWithLengths.uneven
    _vocabulary: "_Vocabulary" = field(init=False, repr=False, compare=False)
    _epoch: Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        _check(self)
        self._vocabulary = _Vocabulary(self.tokenizer)
        self._epoch = _shared(UNKNOWN)

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._epoch.share_memory_()  # a copy has its own epoch, and may have its own workers

    def set_epoch(self, epoch: int) -> None:
        """
        Say which epoch comes. Worker processes hear of it too.

        Args:
            epoch (`int`): From 0.

        Raises:
            ValueError: `epoch` is no integer of at least 0; the collator is one for evaluation.
        """
        if not _is_int(epoch, 0):
            raise ValueError(f"`epoch` must be an integer of at least 0; got {epoch!r}")
        if self._epoch == EVALUATION:
            raise ValueError(
                "`set_epoch` must be called on the collator of the training; got the one for evaluation, whose targets "
                "never change"
            )
        self._epoch.fill_(epoch)

    def for_evaluation(self) -> "DataCollatorForDynamicMasking":
        """A collator of the same settings with targets that never change, whatever epoch the training is in."""
        collator = copy.copy(self)
        collator._epoch = _shared(EVALUATION)
        return collator

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        epoch = self._epoch_in_force()
        batch = self._collator()([_without_labels(each) for each in features])
        columns = _columns(batch, features[0])
        ids = batch["input_ids"]
        batch["labels"] = torch.full_like(ids, -100)
        may_be_target = ~self._vocabulary.is_special(ids)
        if "special_tokens_mask" in columns:
            may_be_target &= columns["special_tokens_mask"] == 0
        words = self._words(ids, columns)
        per_token = (ids, batch["labels"], may_be_target, words)
        sequences = zip(*(self._sequences(values, batch["lengths"]) for values in per_token), strict=True)
        names = columns.get("idx", torch.full_like(batch["lengths"], -1)).tolist()
        for name, sequence in zip(names, sequences, strict=True):
            self._mask(epoch, name, *sequence)
        return batch

    def _collator(self) -> DataCollatorWithLengths:
        """What makes a batch in which no target is drawn yet."""
        names = ("flat", "column_roles", "max_tokens", "max_sequences", "column_sizes")
        return DataCollatorWithLengths(self.tokenizer, **{name: getattr(self, name) for name in names})

    def _epoch_in_force(self) -> int:
        epoch = int(self._epoch)
        if epoch == EVALUATION:
            return epoch
        if not self.dynamic and self.copies == 1:
            return 0
        if epoch == UNKNOWN:
            raise ValueError(
                "the epoch must be known, for each has its own targets; got none. Train with a Trainer that has "
                "`DynamicMaskingMixin`, or call `set_epoch` before each epoch; for evaluation, collate with "
                "`for_evaluation()`"
            )
        return epoch if self.dynamic else epoch % self.copies

    def _probability(self, epoch: int) -> float:
        if not isinstance(self.mlm_probability, Mapping):
            return self.mlm_probability
        probabilities = list(self.mlm_probability.values())
        return probabilities[-1 if epoch == EVALUATION else bisect_right(list(self.mlm_probability), epoch) - 1]

    def _words(self, ids: Tensor, columns: Mapping[str, Tensor]) -> Tensor:
        """A number a token, which changes where a word begins. As words go, `"token"` has one a token."""
        if self.strategy == "token":
            return torch.arange(ids.shape[1]).expand_as(ids)
        if "word_ids" in columns:
            return columns["word_ids"]
        if not self._vocabulary.marks_words:
            raise ValueError(
                f"strategy {self.strategy!r} must know where words begin, from a tokenizer whose vocabulary marks it "
                f"by `##`, `Ġ` or `▁`, or from a column `word_ids`; got a {type(self.tokenizer).__name__} and none"
            )
        return self._vocabulary.begins_word(ids).cumsum(1)

    def _sequences(self, values: Tensor, lengths: Tensor) -> list[np.ndarray]:
        """Views of each sequence's entries."""
        if self.flat:
            return np.split(values[0].numpy(), lengths.cumsum(0).numpy())[:-1]  # without what stands behind the last
        return [row[:length] for row, length in zip(values.numpy(), lengths.tolist(), strict=True)]

    def _mask(self, epoch: int, name: int, ids, labels, may_be_target, words) -> None:
        """Draw the targets of one example; `ids` and `labels` change in place."""
        places = np.flatnonzero(may_be_target)
        if not len(places):
            return
        uniform = _uniform(4, len(places) + 1, self.seed, epoch, name, ids)
        begins = (np.diff(words[places]) != 0) | (np.diff(places) != 1)
        word = np.concatenate([[0], begins.cumsum()])
        span, chosen = self._choose(word[-1] + 1, self._probability(epoch), uniform[:2])
        targets = chosen[word]
        places = places[targets]
        labels[places] = ids[places]

        # A target shares the fate of its span. The others have one each.
        fate = uniform[2][span[word] if self.strategy == "span" else np.arange(len(word))][targets]
        other = self._vocabulary.ordinary(uniform[3][:-1][targets])
        other_or_kept = np.where(fate < self.mask_replace_prob + self.random_replace_prob, other, ids[places])
        ids[places] = np.where(fate < self.mask_replace_prob, self._vocabulary.mask_id, other_or_kept)

    def _choose(self, count: int, probability: float, uniform: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For each of the words, its span, or the one to come, and whether it is a target."""
        if self.strategy == "span":
            return _spans(count, probability, uniform, self.at_least_one)
        draws = uniform[0, :count]
        chosen = draws < probability
        if self.at_least_one:
            chosen |= draws == draws.min()
        return np.arange(count), chosen


class _Vocabulary:
    """What the tokens of a tokenizer are, in tables by their ids."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        ids = tokenizer.get_vocab()
        self.mask_id: Any = tokenizer.mask_token_id
        self._special = torch.tensor(tokenizer.all_special_ids)
        self._ordinary = np.array(sorted(set(ids.values()) - set(tokenizer.all_special_ids)))
        first = [ids[token] for token in ids if token.startswith(("Ġ", "▁"))]
        later = [ids[token] for token in ids if token.startswith("##")]
        self.marks_words = bool(first or later)
        # A vocabulary that marks the first token of a word may well have some of number signs, for headings.
        goes_on = len(later) > len(first)
        self._begins_word = torch.full((max(ids.values()) + 1,), goes_on)
        self._begins_word[later if goes_on else first] = not goes_on

    def is_special(self, ids: Tensor) -> Tensor:
        return torch.isin(ids, self._special)

    def begins_word(self, ids: Tensor) -> Tensor:
        size = len(self._begins_word)
        if ids.numel() and not 0 <= ids.min() <= ids.max() < size:
            raise ValueError(
                f"`input_ids` must be from 0 to {size - 1}, as the tokenizer's are; got {ids.min()} to {ids.max()}"
            )
        return self._begins_word[ids]

    def ordinary(self, uniform: np.ndarray) -> np.ndarray:
        """Ids of tokens that are not special, for numbers from 0 to below 1."""
        return self._ordinary[(uniform * len(self._ordinary)).astype(np.int64)]


def _shared(epoch: int) -> Tensor:
    """An epoch that worker processes see change."""
    return torch.tensor(epoch).share_memory_()


def _without_labels(feature: Mapping[str, Any]) -> dict[str, Any]:
    """An example without labels. An `idx` of text becomes a number."""
    kept = {name: value for name, value in feature.items() if name not in LABELS}
    if isinstance(kept.get("idx"), str):
        digest = hashlib.blake2b(kept["idx"].encode(), digest_size=8)
        kept["idx"] = int.from_bytes(digest.digest(), "little", signed=True)
    return kept


def _columns(batch: dict[str, Tensor], feature: Mapping[str, Any]) -> dict[str, Tensor]:
    """Take the collator's own columns out of the batch. `feature` is the first example."""
    columns = {}
    for name in COLUMNS:
        values = batch.pop(name, None)
        if feature.get(name) is None:
            continue
        each, like = ("example", batch["lengths"]) if name == "idx" else ("token", batch["input_ids"])
        if values is None or values.shape != like.shape or values.is_floating_point():
            raise ValueError(f"column `{name}` must hold an integer for each {each}; got {feature[name]!r}")
        columns[name] = values
    return columns


def _uniform(rows: int, columns: int, seed: int, epoch: int, name: int, ids: np.ndarray) -> np.ndarray:
    """Numbers from 0 to below 1 that follow from the arguments alone, on any machine and with any release of NumPy."""
    identity = np.concatenate([[seed, epoch, name], ids]).astype("<i8").tobytes()
    key = hashlib.blake2b(identity, digest_size=16)
    bits = np.random.Philox(key=int.from_bytes(key.digest(), "little")).random_raw(rows * columns)
    return ((bits >> np.uint64(11)) * 2.0**-53).reshape(rows, columns)


def _spans(count: int, probability: float, uniform: np.ndarray, at_least_one: bool) -> tuple[np.ndarray, np.ndarray]:
    """
    For each of `count` words the number of its span, or of the next one, and whether it is in it.

    Gaps and spans take turns. Gaps, of at least one word, are geometric, so that the share of spans is `probability`.
    What stands at the first word is drawn from what stands at any word of an endless text: each word of the example
    then has the same probability.

    Args:
        uniform (`np.ndarray` of shape `(2, n)`, n > count): Numbers from 0 to below 1.
    """
    for_gaps, for_lengths = uniform[0].copy(), uniform[1]
    begins_inside = for_gaps[0] < probability
    for_gaps[0] = 0 if begins_inside else (for_gaps[0] - probability) / (1 - probability)
    end_of_gap = probability / (1 - probability) / SPAN_MEAN
    gaps = 1 + np.minimum(np.log1p(-for_gaps) / np.log1p(-end_of_gap), count).astype(np.int64)
    lengths = 1 + np.searchsorted(SPAN_LENGTHS.cumsum()[:-1], for_lengths, side="right")
    if begins_inside:
        gaps[0] = 0
        lengths[0] = 1 + np.searchsorted(REST_LENGTHS.cumsum()[:-1], for_lengths[0], side="right")
    ends = np.cumsum(gaps + lengths)
    starts = ends - lengths
    if at_least_one and starts[0] >= count:
        starts[0] = int(for_gaps[-1] * count)
        ends[0] = min(starts[0] + lengths[0], count)
    words = np.arange(count)
    span = np.searchsorted(ends, words, side="right")
    return span, words >= starts[span]


def _check(collator: DataCollatorForDynamicMasking) -> None:
    collator._collator()  # which checks what is its own
    if collator.tokenizer.mask_token_id is None:
        raise ValueError(
            f"`tokenizer.mask_token` must be set, to stand for the targets; got a {type(collator.tokenizer).__name__} "
            "without one"
        )
    if collator.strategy not in STRATEGIES:
        raise ValueError(f"`strategy` must be one of {', '.join(map(repr, STRATEGIES))}; got {collator.strategy!r}")
    _check_probabilities(collator)
    for name in ("mask_replace_prob", "random_replace_prob"):
        if not _is_number(value := getattr(collator, name)) or not 0 <= value <= 1:
            raise ValueError(f"`{name}` must be a number from 0 to 1; got {value!r}")
    if collator.mask_replace_prob + collator.random_replace_prob > 1:
        raise ValueError(
            "`mask_replace_prob` and `random_replace_prob` must be at most 1 in sum; "
            f"got {collator.mask_replace_prob} and {collator.random_replace_prob}"
        )
    if not _is_int(collator.copies, 1):
        raise ValueError(f"`copies` must be an integer of at least 1; got {collator.copies!r}")
    if collator.dynamic and collator.copies > 1:
        raise ValueError(f"`copies` must be left at 1 unless `dynamic=False`; got {collator.copies}")
    if not _is_int(collator.seed, 0) or collator.seed >= 2**63:
        raise ValueError(f"`seed` must be an integer of at least 0, below 2**63; got {collator.seed!r}")


def _check_probabilities(collator: DataCollatorForDynamicMasking) -> None:
    given = collator.mlm_probability
    if isinstance(given, Mapping):
        epochs = list(given)
        if not (epochs and all(_is_int(epoch, 0) for epoch in epochs) and epochs[0] == 0):
            raise ValueError(
                f"a schedule of `mlm_probability` must have epochs for keys, the first of them 0; got {given}"
            )
        for before, after in pairwise(epochs):
            if after < before:
                raise ValueError(f"epochs of `mlm_probability` must rise; got {after} after {before}")
        if not collator.dynamic:
            raise ValueError(f"`mlm_probability` must be one number with `dynamic=False`; got {given}")
    span = collator.strategy == "span"
    for value in given.values() if isinstance(given, Mapping) else [given]:
        if not _is_number(value) or not 0 < value <= 1 or (span and value >= SPAN_SHARE):
            expected = f"above 0 and below {SPAN_SHARE:.3f} for spans" if span else "above 0 and at most 1"
            raise ValueError(f"`mlm_probability` must be a number {expected}; got {value!r}")


def _is_int(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
