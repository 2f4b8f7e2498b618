"""The leaves of the mask language. Each defines its rule twice, side by side: for indices (`allowed`), and for ranges
of indices (`classify`), where the answer is *always*, *never* or *depends*.

Shape legend: B sequences, `i` query position, `j` key position. Index tensors have the sequence (or 1) as their first
dimension wherever a field is read.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from dataclasses import fields as dataclass_fields
from functools import reduce
from typing import ClassVar

import torch
from torch import Tensor

from .fields import Fields
from .layout import reads_are_free
from .mask_expressions import NO_FIELDS, Band, Compound, Mask
from .messages import shown

LEAVES: dict[str, type[Leaf]] = {}
_LARGEST = 2**62  # the largest argument; its difference to any position fits in 64 bits


class Leaf(Mask):
    """A mask with a name and arguments, which are numbers in text. Subclasses join the language under their `name`."""

    name: ClassVar[str]

    def __init_subclass__(cls):
        super().__init_subclass__()
        if "name" in vars(cls):
            LEAVES[cls.name] = cls

    def __str__(self):
        values = [getattr(self, entry.name) for entry in dataclass_fields(self)]  # type: ignore[arg-type]
        arguments = ", ".join(str(value) for value in values if value is not None)
        return f"{self.name}({arguments})" if arguments else self.name


def _check_int(leaf: Leaf, argument: str, minimum: int, maximum: int = _LARGEST) -> None:
    value = getattr(leaf, argument)
    got = shown(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"`{argument}` of `{leaf.name}` must be an integer of at least {minimum}; got {got}")
    if value > maximum:
        raise ValueError(f"`{argument}` of `{leaf.name}` must be at most {maximum}; got {got}")


class _BandLeaf(Leaf):
    """A leaf that is defined by its band, `i - left <= j <= i + right` (`None`: unbounded)."""

    def band(self) -> Band:
        raise NotImplementedError

    @property
    def is_relative(self):
        return True

    def allowed(self, i, j, fields):
        left, right = self.band()
        seen = _everywhere(i, j)
        if left is not None:
            seen = seen & (j >= i - left)
        if right is not None:
            seen = seen & (j - right <= i)  # `i + right` might not fit in 64 bits
        return seen

    def _classify(self, q_lo, q_hi, k_lo, k_hi, fields):
        return _band_ranges(*self.band(), q_lo, q_hi, k_lo, k_hi)


@dataclass(frozen=True)
class Full(_BandLeaf):
    """`full`: every pair (bidirectional)."""

    name = "full"

    def band(self):
        return None, None


@dataclass(frozen=True)
class Causal(_BandLeaf):
    """`causal`: `j <= i` (forward mask)."""

    name = "causal"

    def band(self):
        return None, 0


@dataclass(frozen=True)
class Backward(_BandLeaf):
    """`backward`: `j >= i` (backward mask)."""

    name = "backward"

    def band(self):
        return 0, None


@dataclass(frozen=True)
class Diagonal(_BandLeaf):
    """`diagonal`: `j == i`."""

    name = "diagonal"

    def band(self):
        return 0, 0


@dataclass(frozen=True)
class Window(_BandLeaf):
    """`window(left, right)`: `i - left <= j <= i + right`, both ends included; `window(w)` is `window(w, w)`."""

    name = "window"
    left: int
    right: int | None = None

    def __post_init__(self):
        if self.right is None:
            object.__setattr__(self, "right", self.left)
        _check_int(self, "left", 0)
        _check_int(self, "right", 0)

    def band(self):
        return self.left, self.right


@dataclass(frozen=True)
class Dilated(Leaf):
    """`dilated(width, step)`: `abs(i - j) <= width` and `(i - j) % step == 0`."""

    name = "dilated"
    width: int
    step: int

    def __post_init__(self):
        _check_int(self, "width", 0)
        _check_int(self, "step", 1)

    @property
    def is_relative(self):
        return True

    def allowed(self, i, j, fields):
        distance = i - j
        return (distance.abs() <= self.width) & (distance % self.step == 0)

    def _classify(self, q_lo, q_hi, k_lo, k_hi, fields):
        inside, _ = _band_ranges(self.width, self.width, q_lo, q_hi, k_lo, k_hi)
        lowest = (q_lo - k_hi).clamp(min=-self.width)
        highest = (q_hi - k_lo).clamp(max=self.width)
        multiples = highest.div(self.step, rounding_mode="floor") - (lowest - 1).div(self.step, rounding_mode="floor")
        every = (multiples == highest - lowest + 1) & inside
        return every, multiples <= 0


@dataclass(frozen=True)
class Chunk(Leaf):
    """`chunk(size)`: `i // size == j // size`."""

    name = "chunk"
    size: int

    def __post_init__(self):
        _check_int(self, "size", 1)

    def allowed(self, i, j, fields):
        return i // self.size == j // self.size

    def _classify(self, q_lo, q_hi, k_lo, k_hi, fields):
        return _equal_ranges(*(bound // self.size for bound in (q_lo, q_hi, k_lo, k_hi)))


@dataclass(frozen=True)
class ChunkCausal(Leaf):
    """`chunk_causal(size)`: `j // size <= i // size`."""

    name = "chunk_causal"
    size: int

    def __post_init__(self):
        _check_int(self, "size", 1)

    def allowed(self, i, j, fields):
        return j // self.size <= i // self.size

    def _classify(self, q_lo, q_hi, k_lo, k_hi, fields):
        return _band_ranges(None, 0, *(bound // self.size for bound in (q_lo, q_hi, k_lo, k_hi)))


@dataclass(frozen=True)
class Prefix(Leaf):
    """`prefix(n)`: `j < n`; `prefix`: `j < prefix_lengths[b]`. `causal | prefix` is a prefix LM."""

    name = "prefix"
    n: int | None = None

    def __post_init__(self):
        if self.n is not None:
            _check_int(self, "n", 0)

    def _own_fields(self):
        return NO_FIELDS if self.n is not None else frozenset({"prefix_lengths"})

    def _end(self, like: Tensor, fields: Fields) -> int | Tensor:
        return self.n if self.n is not None else fields.of_sequence("prefix_lengths", like)

    def allowed(self, i, j, fields):
        everywhere = _everywhere(i, j)
        return (j < self._end(everywhere, fields)) & everywhere

    def _classify(self, q_lo, q_hi, k_lo, k_hi, fields):
        everywhere = _everywhere(q_lo, k_lo)
        end = self._end(everywhere, fields)
        return (k_hi < end) & everywhere, (k_lo >= end) & everywhere


@dataclass(frozen=True)
class Span(Leaf):
    """`span(start, length)`: `start <= j < start + length`; `~span(3, 5)` hides the five keys from position 3."""

    name = "span"
    start: int
    length: int

    def __post_init__(self):
        _check_int(self, "start", 0)
        _check_int(self, "length", 0)

    def allowed(self, i, j, fields):
        return _in_span(j, j, self.start, self.length) & _everywhere(i, j)

    def _classify(self, q_lo, q_hi, k_lo, k_hi, fields):
        everywhere = _everywhere(q_lo, k_lo)
        outside = _outside_span(k_lo, k_hi, self.start, self.length) | (self.length == 0)
        return _in_span(k_lo, k_hi, self.start, self.length) & everywhere, outside & everywhere


@dataclass(frozen=True)
class Visible(Leaf):
    """`visible`: `j` lies in none of `hidden_spans[b]`, pairs (start, length) as in `span`. A length of 0 or less hides
    nothing."""

    name = "visible"

    def _own_fields(self):
        return frozenset({"hidden_spans"})

    def _spans(self, like: Tensor, fields: Fields) -> list[tuple[Tensor, Tensor]]:
        # Scalars, because FlexAttention's kernels give wrong results with a tensor of spans.
        spans = range(fields.tables["hidden_spans"].shape[1])
        start, length = ([fields.of_sequence("hidden_spans", like, k, end) for k in spans] for end in (0, 1))
        return list(zip(start, length, strict=True))

    def allowed(self, i, j, fields):
        seen = _everywhere(i, j)
        for start, length in self._spans(seen, fields):
            seen = seen & _outside_span(j, j, start, length)
        return seen

    def _classify(self, q_lo, q_hi, k_lo, k_hi, fields):
        always = _everywhere(q_lo, k_lo)
        never = ~always
        for start, length in self._spans(always, fields):
            always = always & ((length <= 0) | _outside_span(k_lo, k_hi, start, length))
            never = never | _in_span(k_lo, k_hi, start, length)
        return always, never


@dataclass(frozen=True)
class Segments(Leaf):
    """`segments`: `segment_ids[i] == segment_ids[j]` (documents inside a row)."""

    name = "segments"

    def _own_fields(self):
        return frozenset({"segment_ids"})

    def allowed(self, i, j, fields):
        return fields.of_query("segment_ids", i) == fields.of_key("segment_ids", j)

    def _classify(self, q_lo, q_hi, k_lo, k_hi, fields):
        queries = fields.query_extremes("segment_ids", q_lo, q_hi)
        return _equal_ranges(*queries, *fields.key_extremes("segment_ids", k_lo, k_hi))


@dataclass(frozen=True)
class SharedQuestion(Leaf):
    """`shared_question`: `segment_ids[j] == 0 or segment_ids[i] == segment_ids[j]` (one question, several answers)."""

    name = "shared_question"

    def _own_fields(self):
        return frozenset({"segment_ids"})

    def allowed(self, i, j, fields):
        of_key = fields.of_key("segment_ids", j)
        return (of_key == 0) | (fields.of_query("segment_ids", i) == of_key)

    def _classify(self, q_lo, q_hi, k_lo, k_hi, fields):
        q_least, q_most = fields.query_extremes("segment_ids", q_lo, q_hi)
        k_least, k_most = fields.key_extremes("segment_ids", k_lo, k_hi)
        always, never = _equal_ranges(q_least, q_most, k_least, k_most)
        return always | ((k_least == 0) & (k_most == 0)), never & ((k_least > 0) | (k_most < 0))


@dataclass(frozen=True)
class GlobalTokens(Leaf):
    """`global_tokens(n)`: `i < n or j < n`; `global_tokens`: `global_tokens[b, i] or global_tokens[b, j]`."""

    name = "global_tokens"
    n: int | None = None

    def __post_init__(self):
        if self.n is not None:
            _check_int(self, "n", 0)

    def _own_fields(self):
        return NO_FIELDS if self.n is not None else frozenset({"global_tokens"})

    def allowed(self, i, j, fields):
        if self.n is not None:
            return (i < self.n) | (j < self.n)
        return fields.of_query("global_tokens", i) | fields.of_key("global_tokens", j)

    def _classify(self, q_lo, q_hi, k_lo, k_hi, fields):
        if self.n is not None:
            return (q_hi < self.n) | (k_hi < self.n), (q_lo >= self.n) & (k_lo >= self.n)
        q_least, q_most = fields.query_extremes("global_tokens", q_lo, q_hi)
        k_least, k_most = fields.key_extremes("global_tokens", k_lo, k_hi)
        return (q_least > 0) | (k_least > 0), (q_most == 0) & (k_most == 0)


@dataclass(frozen=True)
class Random(Leaf):
    """`random(keep, seed)`: `hash(seed, i, j) < keep` (counter-based: the same on every device and in every layout)."""

    name = "random"
    keep: float
    seed: int

    def __post_init__(self):
        if isinstance(self.keep, bool) or not isinstance(self.keep, int | float) or not 0 <= self.keep <= 1:
            raise ValueError(f"`keep` of `random` must be a number from 0 to 1; got {self.keep!r}")
        _check_int(self, "seed", 0, maximum=2**32 - 1)

    def allowed(self, i, j, fields):
        return _mixed(_mixed(_mixed(self.seed) ^ i) ^ j) < int(self.keep * 2**32)

    def _classify(self, q_lo, q_hi, k_lo, k_hi, fields):
        everywhere = _everywhere(q_lo, k_lo)
        return everywhere & (self.keep == 1), everywhere & (self.keep == 0)


@dataclass(frozen=True)
class Dense(Leaf):
    """`dense`: the explicit `attention_mask`, cell by cell."""

    name = "dense"

    def _own_fields(self):
        return frozenset({"attention_mask"})

    def allowed(self, i, j, fields):
        return fields.of_pairs("attention_mask", i, j)

    def _classify(self, q_lo, q_hi, k_lo, k_hi, fields):
        return fields.pair_ranges("attention_mask", q_lo, q_hi, k_lo, k_hi)


@dataclass(frozen=True)
class TopK(Leaf):
    """`topk(n)`: the n keys with the highest scores among those that the expressions joined to it by `&` allow.

    The scores, `key_scores`, are learned, per head ("Trainable Dynamic Mask Sparse Attention", arXiv:2508.02124). Ties
    go to the lowest position; a score of -inf is never chosen.

    Attributes:
        candidates (`Mask`, *optional*): The keys to choose from, set by [`Mask.resolved`]. `None`: all keys.
    """

    name = "topk"
    chooses_keys = True
    n: int
    candidates: Mask | None = field(default=None, kw_only=True)

    def __post_init__(self):
        _check_int(self, "n", 1)

    def _own_fields(self):
        return frozenset({"key_scores"}) | (self.candidates.fields if self.candidates is not None else NO_FIELDS)

    def _within(self, candidates):
        return replace(self, candidates=candidates)

    def without_choice(self):
        return Full()

    def allowed(self, i, j, fields):
        scores = fields.of_key_heads("key_scores", j)
        found = _everywhere(i, j) if self.candidates is None else self.candidates.allowed(i, j, fields)
        scores = torch.where(found, scores, -torch.inf)
        seen = scores > -torch.inf
        if scores.shape[-1] <= self.n:
            return seen
        least = scores.topk(self.n, dim=-1).values[..., -1:]
        above, equal = scores > least, (scores == least) & seen
        return above | (equal & (equal.cumsum(-1) <= self.n - above.sum(-1, keepdim=True)))

    def _classify(self, q_lo, q_hi, k_lo, k_hi, fields):
        depends = ~_everywhere(q_lo, k_lo)
        return depends, depends

    def __str__(self):
        return f"topk({self.n})"


_PREDICATES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {}


def register(name: str, predicate: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Registers a Python predicate as the mask `custom(name)`.

    Args:
        name (`str`): An identifier of ASCII characters. Registering it again replaces the predicate.
        predicate (`Callable`): `predicate(i, j)` takes two integer tensors of positions that broadcast, and returns a
            bool tensor: which pairs are allowed. It is evaluated cell by cell.

    Raises:
        ValueError: `name` is not such an identifier.
    """
    if not (name.isidentifier() and name.isascii()):
        raise ValueError(f"`name` of a custom mask must be an identifier of ASCII characters; got {name!r}")
    _PREDICATES[name] = predicate


@dataclass(frozen=True)
class Custom(Leaf):
    """`custom(name)`: the predicate that [`register`] stored under the name."""

    name = "custom"
    predicate: str

    def __post_init__(self):
        if self.predicate not in _PREDICATES:
            known = ", ".join(sorted(_PREDICATES)) or "none"
            raise ValueError(f"no custom mask `{self.predicate}` is registered (`masks.register`); known are {known}")

    def allowed(self, i, j, fields):
        return _everywhere(i, j) & _PREDICATES[self.predicate](i, j)

    def _classify(self, q_lo, q_hi, k_lo, k_hi, fields):
        depends = ~_everywhere(q_lo, k_lo)
        return depends, depends


class Choice(Compound, Leaf):
    """A leaf with several masks, one of which applies."""

    def __init__(self, *masks: Mask):
        if not masks or not all(isinstance(mask, Mask) for mask in masks):
            raise ValueError(f"`{self.name}` must be given masks; got {', '.join(map(repr, masks)) or 'none'}")
        super().__init__(*masks)

    @property
    def is_relative(self):
        return False

    def __str__(self):
        return f"{self.name}({', '.join(map(str, self.masks))})"


class Heads(Choice):
    """`heads(m0, m1, …)`: one mask per head, or per run of heads if there are fewer masks; their number must divide
    the number of heads."""

    name = "heads"

    def head_borders(self, heads):
        run = self._run(heads)
        return super().head_borders(heads).union(run * mask for mask in range(len(self.masks)))

    def _run(self, heads: int) -> int:
        """How many heads follow each mask."""
        run, left = divmod(heads, len(self.masks))
        if left:
            raise ValueError(
                f"`heads` must be given a number of masks that divides the {heads} heads; got {len(self.masks)}"
            )
        return run

    def _of_head(self, head, heads):
        return self.masks[head // self._run(heads)]._of_head(head, heads)

    def allowed(self, i, j, fields):
        raise ValueError(f"'{self}' differs by head; resolve it for one head first")

    def _classify(self, q_lo, q_hi, k_lo, k_hi, fields):
        answers = [mask._classify(q_lo, q_hi, k_lo, k_hi, fields) for mask in self.masks]
        always, never = zip(*answers, strict=True)
        return reduce(operator.and_, always), reduce(operator.and_, never)


class Select(Choice):
    """`select(m0, m1, …)`: row b follows mask `mask_choice[b]`, for example by task or language."""

    name = "select"

    def _own_fields(self):
        return frozenset({"mask_choice"})

    def _check_values(self, fields):
        super()._check_values(fields)
        choice = fields.tables["mask_choice"]
        if not reads_are_free(choice.device):
            return
        wrong = choice[(choice < 0) | (choice >= len(self.masks))]
        if wrong.numel():
            raise ValueError(
                f"the field `mask_choice` must hold 0 to {len(self.masks) - 1} for '{self}'; got {wrong[0].item()}"
            )

    def _chosen(self, answers: list[Tensor], like: Tensor, fields: Fields) -> Tensor:
        choice = fields.of_sequence("mask_choice", like)
        return reduce(operator.or_, (answer & (choice == k) for k, answer in enumerate(answers)))

    def allowed(self, i, j, fields):
        cells = [mask.allowed(i, j, fields) for mask in self.masks]
        return self._chosen(cells, cells[0], fields)

    def _classify(self, q_lo, q_hi, k_lo, k_hi, fields):
        answers = [mask._classify(q_lo, q_hi, k_lo, k_hi, fields) for mask in self.masks]
        everywhere = _everywhere(q_lo, k_lo)
        return tuple(self._chosen(list(kind), everywhere, fields) for kind in zip(*answers, strict=True))


# --- Rules on ranges -------------------------------------------------------------------------------------------------


def _everywhere(i: Tensor, j: Tensor) -> Tensor:
    """True in the broadcast shape of `i` and `j`, computed for each pair, as kernels require."""
    return (i == i) & (j == j)


def _band_ranges(
    left: int | None, right: int | None, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor
) -> tuple[Tensor, Tensor]:
    """(always, never) of `i - left <= j <= i + right`; `None` is unbounded."""
    always = _everywhere(q_lo, k_lo)
    never = ~always
    if left is not None:
        always, never = always & (k_lo >= q_hi - left), never | (k_hi < q_lo - left)
    if right is not None:
        always, never = always & (k_hi - right <= q_lo), never | (k_lo - right > q_hi)
    return always, never


def _in_span(lo: Tensor, hi: Tensor, start: int | Tensor, length: int | Tensor) -> Tensor:
    """Whether a whole range lies in `start <= j < start + length`, without that sum, which might not fit in 64 bits."""
    return (lo >= start) & (hi - start < length)


def _outside_span(lo: Tensor, hi: Tensor, start: int | Tensor, length: int | Tensor) -> Tensor:
    """Whether a whole range lies outside of `start <= j < start + length`."""
    return (hi < start) | (lo - start >= length)


def _mixed(x):
    """A one-to-one hash of integers below 2**32: the finaliser of MurmurHash3 (Austin Appleby, public domain)."""
    x = x ^ (x >> 16)
    x = (x * 0x85EBCA6B) & 0xFFFFFFFF
    x = x ^ (x >> 13)
    x = (x * 0xC2B2AE35) & 0xFFFFFFFF
    return x ^ (x >> 16)


def _equal_ranges(q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> tuple[Tensor, Tensor]:
    """(always, never) of equality between a query's and a key's value, each from a range."""
    always = (q_lo == q_hi) & (k_lo == k_hi) & (q_lo == k_lo)
    return always, (q_hi < k_lo) | (k_hi < q_lo)
