"""Targets of masked language models, drawn again in every epoch."""

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
COLUMNS = ("special_tokens_mask", "word_ids", "idx")  # read by the collator, not by models
SETTINGS_OF_TARGETS = ("mlm_probability", "strategy", "mask_replace_prob", "random_replace_prob", "at_least_one")
SETTINGS_OF_TARGETS += ("dynamic", "copies", "seed")

# Special values of the epoch.
UNKNOWN = -2
EVALUATION = -1

# Lengths of spans in words, 1 to 10: the geometric distribution of SpanBERT (arXiv:1907.10529) with a mean of 3.8.
SPAN_LENGTHS = 0.2 * 0.8 ** np.arange(10)
SPAN_LENGTHS /= SPAN_LENGTHS.sum()
SPAN_MEAN = float(SPAN_LENGTHS @ np.arange(1, 11))
SPAN_SHARE = SPAN_MEAN / (SPAN_MEAN + 1)  # the share of words in spans if all gaps are one word long
# How much of a span remains at a random word inside of it. Long spans count more, since they contain more words.
REST_LENGTHS = SPAN_LENGTHS[::-1].cumsum()[::-1] / SPAN_MEAN


@dataclass
class DataCollatorForDynamicMasking:
    """
    Collates tokenized examples for masked language modeling into a batch with `lengths`. Targets are drawn again in
    every epoch, as in RoBERTa (arXiv:1907.11692), or only once, as in BERT (arXiv:1810.04805).

    The targets of an example are a function of `seed`, the epoch and the example. They do not depend on the number of
    workers and processes, the batch size, the order of examples or the rest of the batch. A run that resumes from a
    checkpoint draws the same targets. The next epoch has different ones.

    **Setting the epoch.** A [`~transformers.Trainer`] with [`DynamicMaskingMixin`] sets it. In your own loop, call
    [`~DataCollatorForDynamicMasking.set_epoch`] before you iterate over the data loader; persistent workers see the new
    epoch too. The collator raises an error if the epoch was never set.

    **Evaluation.** Use the collator that [`~DataCollatorForDynamicMasking.for_evaluation`] returns: its targets are
    always the same, and differ from those of training.

    **Identity of an example.** An example is identified by its `input_ids` without absent tokens. Copies of one text in
    a dataset therefore have the same targets in an epoch, unless a column `idx` distinguishes them.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Provides the mask token, the special tokens (which are never targets), the ordinary tokens that replace some
            of the targets, and the pad token.
        mlm_probability (`float` or `dict[int, float]`, *optional*, defaults to 0.15):
            The probability that a token is a target, above 0 and at most 1 (`"span"`: below 0.79). A `dict` is a
            schedule: it maps the first epoch of each probability to it, in increasing order from 0. Evaluation uses the
            last probability.
        strategy (`str`, *optional*, defaults to `"token"`):
            - `"token"`: tokens are drawn independently.
            - `"whole_word"`: words are drawn independently; all tokens of a word are targets, or none.
            - `"span"`: spans of 1 to 10 whole words, whose length is distributed as in SpanBERT (geometric with 0.2,
              mean 3.8). SpanBERT draws spans until they cover a share of the example; here each word is in a span with
              the given probability. The start or end of the example may cut a span off.
        mask_replace_prob (`float`, *optional*, defaults to 0.8): The share of targets replaced with the mask token.
        random_replace_prob (`float`, *optional*, defaults to 0.1):
            The share of targets replaced with a random ordinary token of the vocabulary. The rest is left unchanged.
            With `"span"`, all targets of a span are treated the same way, as in SpanBERT.
        at_least_one (`bool`, *optional*, defaults to `False`):
            Whether every example gets at least one target: a token, word or span. Otherwise, at a probability of 0.15,
            about one in 25 examples of 20 tokens has no target; with `"span"`, one in 25 examples of 64 words.
        dynamic (`bool`, *optional*, defaults to `True`): Whether each epoch has its own targets.
        copies (`int`, *optional*, defaults to 1):
            With `dynamic=False`: the number of sets of targets, which the epochs use in turn. BERT uses 10.
        seed (`int`, *optional*, defaults to 0): The seed of the targets.
        flat (`bool`, *optional*, defaults to `False`): Put all sequences end to end in one row, without padding.
        column_roles (`Mapping[str, str]`, *optional*): As in [`DataCollatorWithLengths`].
        max_tokens, max_sequences (`int`, *optional*): Give all flat batches one shape, as in
            [`DataCollatorWithLengths`].
        column_sizes (`Mapping[str, int]`, *optional*), max_length (`int`, *optional*): As in
            [`DataCollatorWithLengths`].

    The collator reads these columns of the examples, if there are any, and leaves them out of the batch:

    - `special_tokens_mask`, integers, per token: 1 for tokens that must not be targets, besides the special tokens.
    - `word_ids`, integers, per token: the word of the token, as from [`~transformers.BatchEncoding.word_ids`]. `None`
      (in datasets in NumPy or PyTorch format: NaN) means no word. Without this column, the tokenizer's vocabulary must
      mark the beginnings of words with `"Ġ"` or `"▁"`, or their continuations with `"##"`.
    - `idx`, an integer or text, per example: see above.

    A stock Trainer removes them before the collator sees them; a Trainer with [`DynamicMaskingMixin`] does not.

    Returns:
        `dict[str, Tensor]`: For B examples of N tokens in total, the longest of which has T:

        - `input_ids`, int64 `(B, T)`: most of the targets are replaced. With `flat`: `(1, N)`.
        - `labels`, int64, of the same shape: the original tokens at the targets, -100 elsewhere. Labels of the examples
          are dropped.
        - `lengths`, int64 `(B,)`, `attention_mask` and other columns: as from [`DataCollatorWithLengths`].

        With `max_tokens` and `max_sequences`:

        - `input_ids`, int64 `(1, max_tokens)`: padded with the pad id.
        - `labels`, int64 `(1, max_tokens)`: padded with -100.
        - `lengths`, int64 `(max_sequences,)`: tokens of each sequence, padded with 0.

    Raises:
        ValueError: The tokenizer has no mask token; the strategy is unknown; a probability is out of range, or the sum
            of `mask_replace_prob` and `random_replace_prob` exceeds 1; `mlm_probability` is not a valid schedule, or is
            a schedule without `dynamic`; `copies` is not a positive integer, or is given with `dynamic`; `seed` is
            negative; an argument is wrong as in [`DataCollatorWithLengths`]. When called: the epoch was never set; a
            column has a wrong type or shape; the beginnings of words are unknown; the examples are wrong as in
            [`DataCollatorWithLengths`].

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
    max_length: int | None = None

    uneven: ClassVar[tuple[str, ...]] = DataCollatorWithLengths.uneven
    _vocabulary: "_Vocabulary" = field(init=False, repr=False, compare=False)
    _epoch: Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        _check(self)
        self._vocabulary = _Vocabulary(self.tokenizer)
        self._epoch = _shared(UNKNOWN)

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._epoch.share_memory_()  # an unpickled collator has its own epoch, which its workers must see

    def set_epoch(self, epoch: int) -> None:
        """
        Set the epoch, also for worker processes.

        Args:
            epoch (`int`): The epoch, counted from 0.

        Raises:
            ValueError: `epoch` is not an integer of at least 0; the collator is from
                [`~DataCollatorForDynamicMasking.for_evaluation`].
        """
        if not _is_int(epoch, 0):
            raise ValueError(f"`epoch` must be an integer of at least 0; got {epoch!r}")
        if self._epoch == EVALUATION:
            raise ValueError(
                "`set_epoch` must be called on the collator for training; got the one for evaluation, whose targets "
                "never change"
            )
        self._epoch.fill_(epoch)

    def for_evaluation(self) -> "DataCollatorForDynamicMasking":
        """A collator with the same settings whose targets never change, whatever the epoch."""
        collator = copy.copy(self)
        collator._epoch = _shared(EVALUATION)
        return collator

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        epoch = self._target_epoch()
        batch = self._collator()([_without_labels(each) for each in features])
        columns = _pop_columns(batch, features[0])
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
        """The collator that makes the batch, before targets are drawn in it."""
        names = ("flat", "column_roles", "max_tokens", "max_sequences", "column_sizes", "max_length")
        return DataCollatorWithLengths(self.tokenizer, **{name: getattr(self, name) for name in names})

    def _target_epoch(self) -> int:
        """The epoch, or the number of the copy, whose targets to draw."""
        epoch = int(self._epoch)
        if epoch == EVALUATION:
            return epoch
        if not self.dynamic and self.copies == 1:
            return 0
        if epoch == UNKNOWN:
            raise ValueError(
                "the epoch must be known, since each has its own targets; got none. Train with a Trainer that has "
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
        """The word number of each token. With `"token"`, each token is a word of its own."""
        if self.strategy == "token":
            return torch.arange(ids.shape[1]).expand_as(ids)
        if "word_ids" in columns:
            return columns["word_ids"]
        if not self._vocabulary.marks_words:
            raise ValueError(
                f"strategy {self.strategy!r} must know where words begin, from a tokenizer whose vocabulary marks it "
                f"by `##`, `Ġ` or `▁`, or from a column `word_ids`; got a {type(self.tokenizer).__name__} without marks"
            )
        return self._vocabulary.begins_word(ids).cumsum(1)

    def _sequences(self, values: Tensor, lengths: Tensor) -> list[np.ndarray]:
        """A view of the values of each sequence."""
        if self.flat:
            return np.split(values[0].numpy(), lengths.cumsum(0).numpy())[:-1]  # without the unused places at the end
        return [row[:length] for row, length in zip(values.numpy(), lengths.tolist(), strict=True)]

    def _mask(self, epoch: int, name: int, ids, labels, may_be_target, words) -> None:
        """Draw the targets of one example. Changes `ids` and `labels` in place."""
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

        # Whether a target is masked, replaced or kept is drawn per span, or else per target.
        draw = uniform[2][span[word] if self.strategy == "span" else np.arange(len(word))][targets]
        random = self._vocabulary.ordinary(uniform[3][:-1][targets])
        random_or_kept = np.where(draw < self.mask_replace_prob + self.random_replace_prob, random, ids[places])
        ids[places] = np.where(draw < self.mask_replace_prob, self._vocabulary.mask_id, random_or_kept)

    def _choose(self, count: int, probability: float, uniform: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For each word, the index of its span (in a gap: of the next span), and whether the word is a target."""
        if self.strategy == "span":
            return _spans(count, probability, uniform, self.at_least_one)
        draws = uniform[0, :count]
        chosen = draws < probability
        if self.at_least_one:
            chosen |= draws == draws.min()
        return np.arange(count), chosen


class _Vocabulary:
    """Lookup tables of a tokenizer's tokens, by id."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        ids = tokenizer.get_vocab()
        self.mask_id: Any = tokenizer.mask_token_id
        self._special = torch.tensor(tokenizer.all_special_ids)
        self._ordinary = np.array(sorted(set(ids.values()) - set(tokenizer.all_special_ids)))
        first = [ids[token] for token in ids if token.startswith(("Ġ", "▁"))]
        later = [ids[token] for token in ids if token.startswith("##")]
        self.marks_words = bool(first or later)
        # A vocabulary that marks the beginnings of words may also have some tokens that start with "##", for headings.
        marks_later = len(later) > len(first)
        self._begins_word = torch.full((max(ids.values()) + 1,), marks_later)
        self._begins_word[later if marks_later else first] = not marks_later

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
        """Ids of tokens that are not special, one for each uniform number in [0, 1)."""
        return self._ordinary[(uniform * len(self._ordinary)).astype(np.int64)]


def _shared(epoch: int) -> Tensor:
    """An epoch in shared memory, so that worker processes see it change."""
    return torch.tensor(epoch).share_memory_()


def _without_labels(feature: Mapping[str, Any]) -> dict[str, Any]:
    """The example without labels. An `idx` that is text becomes a number."""
    kept = {name: value for name, value in feature.items() if name not in LABELS}
    if isinstance(kept.get("idx"), str):
        digest = hashlib.blake2b(kept["idx"].encode(), digest_size=8)
        kept["idx"] = int.from_bytes(digest.digest(), "little", signed=True)
    return kept


def _pop_columns(batch: dict[str, Tensor], feature: Mapping[str, Any]) -> dict[str, Tensor]:
    """Remove and return the columns that only the collator reads. `feature` is the first example."""
    columns = {}
    for name in COLUMNS:
        values = batch.pop(name, None)
        if feature.get(name) is None:
            continue
        unit, like = ("example", batch["lengths"]) if name == "idx" else ("token", batch["input_ids"])
        if values is None or values.shape != like.shape or values.is_floating_point():
            raise ValueError(f"column `{name}` must hold an integer for each {unit}; got {feature[name]!r}")
        columns[name] = values
    return columns


def _uniform(rows: int, columns: int, seed: int, epoch: int, name: int, ids: np.ndarray) -> np.ndarray:
    """Uniform numbers in [0, 1), `(rows, columns)`. They depend only on the arguments, not on the machine or NumPy."""
    identity = np.concatenate([[seed, epoch, name], ids]).astype("<i8").tobytes()
    key = hashlib.blake2b(identity, digest_size=16)
    bits = np.random.Philox(key=int.from_bytes(key.digest(), "little")).random_raw(rows * columns)
    return ((bits >> np.uint64(11)) * 2.0**-53).reshape(rows, columns)


def _spans(count: int, probability: float, uniform: np.ndarray, at_least_one: bool) -> tuple[np.ndarray, np.ndarray]:
    """
    For each of `count` words: the index of its span (in a gap: of the next span), and whether it is in that span.

    Gaps and spans alternate. The length of a gap is geometric and at least one word, such that the share of words in
    spans is `probability`. The state at the first word (in a gap or in a span, and how much of it remains) is drawn as
    at a random word of an endless text, so that every word of the example has the same probability.

    Args:
        uniform (`np.ndarray` of shape `(2, n)`, n > count): Numbers in [0, 1).
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
    collator._collator()  # checks its own arguments
    if collator.tokenizer.mask_token_id is None:
        raise ValueError(
            f"`tokenizer.mask_token` must be set, since it replaces targets; got a {type(collator.tokenizer).__name__} "
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
            "the sum of `mask_replace_prob` and `random_replace_prob` must be at most 1; "
            f"got {collator.mask_replace_prob} and {collator.random_replace_prob}"
        )
    if not _is_int(collator.copies, 1):
        raise ValueError(f"`copies` must be an integer of at least 1; got {collator.copies!r}")
    if collator.dynamic and collator.copies > 1:
        raise ValueError(f"`copies` must be 1 unless `dynamic=False`; got {collator.copies}")
    if not _is_int(collator.seed, 0) or collator.seed >= 2**63:
        raise ValueError(f"`seed` must be an integer of at least 0, below 2**63; got {collator.seed!r}")


def _check_probabilities(collator: DataCollatorForDynamicMasking) -> None:
    given = collator.mlm_probability
    if isinstance(given, Mapping):
        epochs = list(given)
        if not (epochs and all(_is_int(epoch, 0) for epoch in epochs) and epochs[0] == 0):
            raise ValueError(
                f"a schedule of `mlm_probability` must have epochs as keys, the first of them 0; got {given}"
            )
        for before, after in pairwise(epochs):
            if after < before:
                raise ValueError(f"epochs of `mlm_probability` must be increasing; got {after} after {before}")
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
