"""DataCollatorForDynamicMasking: what targets follow from, how they are distributed, words and spans, bad input."""

import copy
import pickle
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader

from hf_dynmask.data import DataCollatorForDynamicMasking, DataCollatorWithLengths
from masked_lm_examples import CLS, MASK, PAD, SEP, UNK, WORDS, collated, make, make_tokenizer, texts


def share_of_different(first, second):
    assert first.keys() == second.keys()
    return sum(first[ids] != second[ids] for ids in first) / len(first)


# --- What targets follow from ----------------------------------------------------------------------------------------

EXAMPLES = texts(24)


@pytest.fixture(scope="module", params=["token", "whole_word", "span"])
def strategy(request):
    return request.param


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")  # more than the cores, perhaps
@pytest.mark.parametrize("workers, persistent", [(0, False), (1, False), (1, True), (4, False), (4, True)])
def test_workers_batch_size_and_order_change_nothing(strategy, workers, persistent):
    collator = make(None, strategy=strategy)
    loader = DataLoader(
        EXAMPLES,  # type: ignore[arg-type]
        batch_size=5,
        shuffle=True,
        num_workers=workers,
        persistent_workers=persistent,
        collate_fn=collator,
    )
    for epoch in (0, 1, 0):
        collator.set_epoch(epoch)
        assert collated(loader) == collated([make(epoch, strategy=strategy)(EXAMPLES)])


def test_each_process_draws_the_same(strategy):
    together = collated([make(3, strategy=strategy)(EXAMPLES)])
    ranks = [[make(3, strategy=strategy)(EXAMPLES[rank::2])] for rank in (0, 1)]
    assert collated(ranks[0]) | collated(ranks[1]) == together


def test_targets_are_what_they_always_were():
    """On any machine, with any release of NumPy."""
    batch = make(2, seed=7)([{"input_ids": [CLS, *range(10, 40), SEP]}])
    assert {place: label for place, label in enumerate(batch["labels"][0].tolist()) if label != -100} == GOLDEN
    assert batch["input_ids"][0][list(GOLDEN)].tolist() == GOLDEN_IDS


GOLDEN = {1: 10, 4: 13, 8: 17, 9: 18, 13: 22, 30: 39}
GOLDEN_IDS = [161, 193, 4, 18, 4, 39]


def test_rows_and_flat_hold_the_same(strategy):
    rows, flat = make(strategy=strategy)(EXAMPLES), make(strategy=strategy, flat=True)(EXAMPLES)
    here = torch.arange(rows["input_ids"].shape[1]) < rows["lengths"][:, None]
    assert set(flat) == {"input_ids", "lengths", "labels"}
    assert set(rows) == {*flat, "attention_mask"} and torch.equal(rows["attention_mask"], here.long())
    assert torch.equal(rows["lengths"], flat["lengths"])
    for name, absent in (("input_ids", PAD), ("labels", -100)):
        assert torch.equal(rows[name][here], flat[name][0])
        assert (rows[name][~here] == absent).all()


def test_padding_in_the_examples_changes_nothing(strategy):
    padded = [
        {
            "input_ids": [PAD, *row["input_ids"], 9],
            "attention_mask": [0, *[1] * len(row["input_ids"]), 0],
            "word_ids": [None, *range(len(row["input_ids"])), 3],
            "special_tokens_mask": [1, *[0] * len(row["input_ids"]), 1],
        }
        for row in EXAMPLES
    ]
    plain = [{**row, "word_ids": list(range(len(row["input_ids"])))} for row in EXAMPLES]
    collator = make(strategy=strategy)
    assert collated([collator(padded)]) == collated([collator(plain)])


def test_epochs_and_seeds_differ(strategy):
    many = texts(1000)
    first, second, other = (
        collated([make(epoch, strategy=strategy, seed=seed, at_least_one=True)(many)])
        for epoch, seed in [(0, 0), (1, 0), (0, 1)]
    )
    assert share_of_different(first, second) > 0.99
    assert share_of_different(first, other) > 0.99


def test_evaluation_never_changes(strategy):
    collator = make(None, strategy=strategy)
    evaluation = collator.for_evaluation()
    before = collated([evaluation(EXAMPLES)])
    collator.set_epoch(0)
    assert collated([evaluation(EXAMPLES)]) == before == collated([collator.for_evaluation()(EXAMPLES)])
    assert share_of_different(before, collated([collator(EXAMPLES)])) > 0.9


def test_copies_of_a_text_share_targets_unless_idx_tells_them_apart():
    row = EXAMPLES[0]
    first, second = make()([row, row])["labels"]
    assert torch.equal(first, second)
    for names in ((0, 1), ("page 0", "page 1")):
        batch = make()([{**row, "idx": name} for name in names])
        assert not torch.equal(*batch["labels"])
        assert "idx" not in batch
        assert torch.equal(make()([{**row, "idx": names[1]}])["labels"][0], batch["labels"][1])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_a_copy_has_its_own_epoch_and_its_workers_hear_of_it(copied):
    original = make(0)
    collator = copied(original)
    loader = DataLoader(
        EXAMPLES,  # type: ignore[arg-type]
        batch_size=12,
        num_workers=1,
        persistent_workers=True,
        collate_fn=collator,
    )
    assert collated(loader) == collated([original(EXAMPLES)])
    collator.set_epoch(1)
    assert collated(loader) == collated([make(1)(EXAMPLES)])
    assert collated([original(EXAMPLES)]) == collated([make(0)(EXAMPLES)])


def test_what_a_spawned_worker_gets_hears_of_the_epoch():
    collator = make(0)
    theirs = pickle.loads(ForkingPickler.dumps(collator))
    collator.set_epoch(1)
    assert collated([theirs(EXAMPLES)]) == collated([make(1)(EXAMPLES)])


def test_nobody_told_the_epoch():
    message = "the epoch must be known, since each has its own targets; got none. Train with .*`DynamicMaskingMixin`"
    with pytest.raises(ValueError, match=message):
        make(None)(EXAMPLES)
    with pytest.raises(ValueError, match=message):
        make(None, dynamic=False, copies=2)(EXAMPLES)


def test_static():
    once = collated([make(None, dynamic=False)(EXAMPLES)])
    assert all(collated([make(epoch, dynamic=False)(EXAMPLES)]) == once for epoch in (0, 1, 7))
    ten = [collated([make(epoch, dynamic=False, copies=10)(EXAMPLES)]) for epoch in range(20)]
    assert ten[:10] == ten[10:]
    assert all(share_of_different(ten[i], ten[j]) > 0.9 for i in range(10) for j in range(i))
    assert ten[0] == once == collated([make(0)(EXAMPLES)])


def test_static_and_dynamic_are_evaluated_alike():
    forms = [make(), make(dynamic=False), make(dynamic=False, copies=10)]
    evaluations = [collated([form.for_evaluation()(EXAMPLES)]) for form in forms]
    assert evaluations[0] == evaluations[1] == evaluations[2]


# --- How targets are distributed -------------------------------------------------------------------------------------

MANY = texts(1000, 100, 100, seed=1)  # 100 000 tokens that may be targets


def share(batch):
    return (batch["labels"] != -100).sum().item() / (100 * len(batch["labels"]))


def chi_square(counts, probabilities):
    """Sum of squared deviations; for k cells, k - 1 in the mean, with a standard deviation of sqrt(2k - 2)."""
    expected = np.asarray(probabilities) * np.sum(counts)
    return ((counts - expected) ** 2 / expected).sum()


@pytest.mark.parametrize("probability", [0.05, 0.15, 0.4, 0.7])
def test_rate(strategy, probability):
    """Targets of a word or span come together, which widens the spread of their number by their mean length."""
    batch = make(strategy=strategy, mlm_probability=probability)(MANY)
    together = {"token": 1, "whole_word": 2, "span": 9}[strategy]
    deviation = (probability * (1 - probability) * together / 100_000) ** 0.5
    assert abs(share(batch) - probability) < 4 * deviation


def test_rate_is_the_same_at_every_place(strategy):
    """At the ends of an example too, where a word or span may be cut."""
    per_place = (make(strategy=strategy)(MANY)["labels"][:, 1:-1] != -100).float().mean(0)
    deviation = (0.15 * 0.85 / 1000) ** 0.5
    assert ((per_place - 0.15).abs() < 4 * deviation).all()
    assert abs(per_place[:3].mean() - 0.15) < 3 * deviation
    assert abs(per_place[-3:].mean() - 0.15) < 3 * deviation


def fates(batch):
    """How many targets are the mask token, an ordinary token, left as they are; and those ordinary tokens."""
    targets = batch["labels"] != -100
    ids, labels = batch["input_ids"][targets], batch["labels"][targets]
    other = ids[(ids != MASK) & (ids != labels)]
    return np.array([(ids == MASK).sum(), len(other), (ids == labels).sum()]), other


@pytest.mark.parametrize("mask, random", [(0.8, 0.1), (0.5, 0.4), (1.0, 0.0), (0.0, 1.0), (0.0, 0.0), (0.9, 0.1)])
def test_fates(mask, random):
    """One in 200 random tokens happens to be the one that was there."""
    counts, _ = fates(make(mask_replace_prob=mask, random_replace_prob=random)(MANY))
    expected = np.array([mask, random * 199 / 200, 1 - mask - random * 199 / 200])
    assert (counts[expected < 1e-9] == 0).all()
    assert chi_square(counts[expected > 1e-9], expected[expected > 1e-9]) < 15


def test_fates_do_not_depend_on_the_strategy(strategy):
    """Spans have one each, so the deviation of their number is larger."""
    counts, _ = fates(make(strategy=strategy)(MANY))
    np.testing.assert_allclose(counts / counts.sum(), [0.8, 0.0995, 0.1005], atol=0.015)


def test_random_tokens_are_ordinary_and_equally_frequent():
    _, other = fates(make(mask_replace_prob=0.0, random_replace_prob=1.0)(MANY))
    assert other.min() == 5
    counts = np.bincount(other, minlength=205)[5:]
    assert chi_square(counts, np.full(200, 1 / 200)) < 199 + 4 * (2 * 199) ** 0.5


def test_the_rest_stays(strategy):
    batch = make(strategy=strategy)(MANY)
    before = DataCollatorWithLengths(make_tokenizer())(MANY)["input_ids"]
    targets = batch["labels"] != -100
    assert torch.equal(batch["input_ids"][~targets], before[~targets])
    assert torch.equal(batch["labels"][targets], before[targets])


def test_special_tokens_are_never_targets(strategy):
    rows = [{"input_ids": [CLS, 5, UNK, MASK, 6, SEP, 7, 8], "special_tokens_mask": [0] * 7 + [1]}] * 50
    rows = [{**row, "idx": i} for i, row in enumerate(rows)]
    labels = make(strategy=strategy, mlm_probability=0.7)(rows)["labels"]
    assert (labels != -100).any(0).tolist() == [False, True, False, False, True, False, True, False]


def test_at_least_one(strategy):
    short = [{"input_ids": [CLS, *row["input_ids"][1:6], SEP]} for row in texts(500)]
    without, with_one = (
        make(strategy=strategy, at_least_one=asked)(short)["labels"] != -100 for asked in (False, True)
    )
    empty = ~without.any(1)
    assert 100 < empty.sum() < 400
    assert with_one.any(1).all()
    assert torch.equal(with_one[~empty], without[~empty])
    assert (with_one[empty, 1:-1].float().mean(0) > 0.1).all()  # any of the five may be the one


def test_nothing_to_choose_from(strategy):
    batch = make(strategy=strategy, at_least_one=True)([{"input_ids": []}, {"input_ids": [CLS, SEP]}])
    assert batch["input_ids"].tolist() == [[PAD, PAD], [CLS, SEP]]
    assert batch["labels"].tolist() == [[-100, -100]] * 2


def test_schedule():
    collator = make(mlm_probability={0: 0.3, 2: 0.2, 5: 0.1})
    for epoch, expected in enumerate([0.3, 0.3, 0.2, 0.2, 0.2, 0.1, 0.1]):
        collator.set_epoch(epoch)
        assert share(collator(MANY[:400])) == pytest.approx(expected, abs=0.01)
    assert share(collator.for_evaluation()(MANY[:400])) == pytest.approx(0.1, abs=0.01)


def test_the_least_and_the_most():
    assert share(make(mlm_probability=1.0)(MANY)) == 1
    assert share(make(mlm_probability=1e-300, strategy="span")(MANY)) == 0
    assert share(make(mlm_probability=0.79, strategy="span")(MANY)) == pytest.approx(0.79, abs=0.01)


# --- Words and spans -------------------------------------------------------------------------------------------------


def words_of(row):
    """Places of each word, in a row of `texts`."""
    words, ids = [], row["input_ids"]
    for place in range(1, len(ids) - 1):
        if place == 1 or ids[place] in WORDS:
            words.append([])
        words[-1].append(place)
    return words


def chosen_words(row, labels):
    """Whether each word is a target; none is in part."""
    chosen = []
    for word in words_of(row):
        parts = {labels[place].item() != -100 for place in word}
        assert len(parts) == 1
        chosen.append(parts.pop())
    return chosen


def test_whole_words():
    rows = MANY[:300]
    labels = make(strategy="whole_word")(rows)["labels"]
    chosen = sum((chosen_words(row, target) for row, target in zip(rows, labels, strict=True)), [])
    assert np.mean(chosen) == pytest.approx(0.15, abs=0.01)


@pytest.mark.parametrize(
    "word, piece",
    [("w{}", "##{}"), ("Ġ{}", "p{}"), ("▁{}", "p{}"), ("Ġ{}", "##{}")],  # the last has headings, as that of GPT-2
)
def test_marks_of_words(word, piece):
    collator = DataCollatorForDynamicMasking(make_tokenizer(word, piece), strategy="whole_word")
    collator.set_epoch(0)
    assert collated([collator(EXAMPLES)]) == collated([make(strategy="whole_word")(EXAMPLES)])


@pytest.mark.parametrize("container", [list, np.array, torch.tensor])
@pytest.mark.parametrize("strategy", ["whole_word", "span"])
def test_word_ids_win(strategy, container):
    """Two words of three tokens, whatever the vocabulary says; a special token in a word divides it."""
    ids = [CLS, 5, 6, 7, 150, 9, UNK, 10, SEP]
    words = container([-1, 0, 0, 0, 1, 1, 1, 1, -1])
    rows = [{"input_ids": ids, "word_ids": words, "idx": i} for i in range(200)]
    batch = make(strategy=strategy, mlm_probability=0.3)(rows)
    targets = batch["labels"] != -100
    assert set(batch) == {"input_ids", "lengths", "attention_mask", "labels"}
    assert (targets[:, 1:4].any(1) == targets[:, 1:4].all(1)).all()
    assert (targets[:, 4:6].any(1) == targets[:, 4:6].all(1)).all()
    assert (targets[:, 5] != targets[:, 7]).any()


def test_word_ids_of_a_tokenizer():
    """As a tokenizer gives them: `None` for special tokens, and anew from 0 in the second text."""
    ids, words = [CLS, 5, 6, SEP, 7, 8, SEP], [None, 0, 0, None, 0, 0, None]
    rows = [{"input_ids": ids, "word_ids": words, "idx": i} for i in range(100)]
    targets = make(strategy="whole_word", mlm_probability=0.5)(rows)["labels"] != -100
    assert torch.equal(targets[:, 1], targets[:, 2])
    assert torch.equal(targets[:, 4], targets[:, 5])
    assert not torch.equal(targets[:, 1], targets[:, 4])


@pytest.mark.parametrize("form", ["numpy", "torch"])
@pytest.mark.parametrize("strategy", ["whole_word", "span"])
def test_word_ids_in_formatted_data_sets(strategy, form):
    """There `None` is NaN."""
    ids, words = [CLS, 5, 6, SEP, 7, 8, SEP], [None, 0, 0, None, 0, 0, None]
    rows = [{"input_ids": ids, "word_ids": words, "idx": i} for i in range(20)]
    formatted: Any = Dataset.from_list(rows).with_format(form)
    expected = make(strategy=strategy, mlm_probability=0.5)(rows)
    found = make(strategy=strategy, mlm_probability=0.5)(list(formatted))
    assert torch.equal(found["labels"], expected["labels"]) and (found["labels"] != -100).any()


def runs(flags):
    """Of a list of flags, the stretches of true ones that neither end cuts: (first, last + 1)."""
    edges = np.flatnonzero(np.diff([False, *flags, False]))
    return [(lo, hi) for lo, hi in edges.reshape(-1, 2).tolist() if lo > 0 and hi < len(flags)]


def test_spans():
    """Whole words, 1 to 10 of them, geometric as in SpanBERT; one fate each."""
    rows = texts(150, 2000, 2000, seed=2)
    batch = make(strategy="span")(rows)
    lengths, of_spans = [], set()
    for row, ids, labels in zip(rows, batch["input_ids"], batch["labels"], strict=True):
        words = words_of(row)
        for first, last in runs(chosen_words(row, labels)):
            lengths.append(last - first)
            places = [place for word in words[first:last] for place in word]
            masked, kept = (ids[places] == MASK), (ids[places] == labels[places])
            of_spans.add((bool(masked.all()), bool(kept.all())))
            assert masked.all() or not masked.any()
    expected = 0.2 * 0.8 ** np.arange(10) / (1 - 0.8**10)
    counts = np.bincount(lengths, minlength=11)
    assert counts[0] == 0
    assert len(counts) == 11
    assert len(lengths) > 5000
    # A longer span is more likely to be cut by an end of the example; with 1400 words this is hardly seen.
    assert chi_square(counts[1:], expected) < 9 + 3 * 18**0.5
    assert np.mean(lengths) == pytest.approx(3.8, abs=0.1)
    assert of_spans == {(True, False), (False, True), (False, False)}


def test_a_tokenizer_that_does_not_mark_words():
    collator = DataCollatorForDynamicMasking(make_tokenizer("w{}", "p{}"), strategy="span")
    collator.set_epoch(0)
    message = "strategy 'span' must know where words begin, .* from a column `word_ids`; got a .* without marks"
    with pytest.raises(ValueError, match=message):
        collator(EXAMPLES)
    assert collator([{**EXAMPLES[0], "word_ids": range(len(EXAMPLES[0]["input_ids"]))}])


# --- The other columns -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["label", "labels", "label_ids"])
def test_labels_of_the_examples_have_no_part(name):
    row = EXAMPLES[0]
    batch = make()([{**row, name: 1, "token_type_ids": [0] * len(row["input_ids"]), "text": "a"}])
    assert set(batch) == {"input_ids", "lengths", "attention_mask", "labels", "token_type_ids"}
    assert torch.equal(batch["labels"], make()([row])["labels"])


def test_the_examples_stay_as_they_are():
    row = {"input_ids": torch.tensor(EXAMPLES[0]["input_ids"]), "labels": torch.tensor(1)}
    before = row["input_ids"].clone()
    make(mlm_probability=1.0, flat=True)([row])
    make(mlm_probability=1.0)([row])
    assert torch.equal(row["input_ids"], before)
    assert set(row) == {"input_ids", "labels"}


# --- Bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"strategy": "words"}, "`strategy` must be one of 'token', 'whole_word', 'span'; got 'words'"),
        ({"mlm_probability": 0}, "`mlm_probability` must be a number above 0 and at most 1; got 0"),
        ({"mlm_probability": 1.5}, "`mlm_probability` must be a number above 0 and at most 1; got 1.5"),
        ({"mlm_probability": "0.1"}, "`mlm_probability` must be a number above 0 .*; got '0.1'"),
        ({"mlm_probability": float("nan")}, "`mlm_probability` must be a number above 0 .*; got nan"),
        (
            {"mlm_probability": 0.8, "strategy": "span"},
            "`mlm_probability` must be a number above 0 and below 0.792 for spans; got 0.8",
        ),
        ({"mlm_probability": {0: 0.3, 2: 2}}, "`mlm_probability` must be a number above 0 and at most 1; got 2"),
        ({"mlm_probability": {}}, r"must have epochs as keys, the first of them 0; got \{\}"),
        ({"mlm_probability": {1: 0.3}}, r"must have epochs as keys, the first of them 0; got \{1: 0.3\}"),
        ({"mlm_probability": {0: 0.3, 0.5: 0.2}}, "must have epochs as keys, .* got .*0.5"),
        (
            {"mlm_probability": {0: 0.3, 5: 0.2, 2: 0.1}},
            "epochs of `mlm_probability` must be increasing; got 2 after 5",
        ),
        (
            {"mlm_probability": {0: 0.3}, "dynamic": False},
            r"`mlm_probability` must be one number with `dynamic=False`; got \{0: 0.3\}",
        ),
        ({"mask_replace_prob": -0.1}, "`mask_replace_prob` must be a number from 0 to 1; got -0.1"),
        ({"random_replace_prob": None}, "`random_replace_prob` must be a number from 0 to 1; got None"),
        (
            {"random_replace_prob": 0.3},
            "the sum of `mask_replace_prob` and `random_replace_prob` must be at most 1; got 0.8 and 0.3",
        ),
        ({"dynamic": False, "copies": 0}, "`copies` must be an integer of at least 1; got 0"),
        ({"copies": 10}, "`copies` must be 1 unless `dynamic=False`; got 10"),
        ({"seed": -1}, "`seed` must be an integer of at least 0, below .*; got -1"),
        ({"seed": None}, "`seed` must be an integer of at least 0, below .*; got None"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        make(None, **settings)


def test_a_tokenizer_without_a_mask_token():
    message = "`tokenizer.mask_token` must be set, since it replaces targets; got a .* without one"
    with pytest.raises(ValueError, match=message):
        DataCollatorForDynamicMasking(make_tokenizer(mask_token=None))


@pytest.mark.parametrize("epoch", [-1, 0.5, None, True])
def test_bad_epochs(epoch):
    with pytest.raises(ValueError, match=f"`epoch` must be an integer of at least 0; got {epoch}"):
        make().set_epoch(epoch)


def test_evaluation_has_no_epochs():
    with pytest.raises(ValueError, match="`set_epoch` must be called on the collator for training; got the one for"):
        make().for_evaluation().set_epoch(1)


@pytest.mark.parametrize(
    "row, message",
    [
        ({"labels": [1]}, "examples must have a column `input_ids`; got no numbers"),
        ({"input_ids": [0.5]}, "`input_ids` of an example must be a list of integers"),
        ({"input_ids": [5, 6], "word_ids": [0]}, r"column `word_ids` must have one entry for each of the 2 tokens"),
        ({"input_ids": [5, 6], "word_ids": [0.5, 1]}, "column `word_ids` must hold an integer for each token; got"),
        ({"input_ids": [5], "word_ids": ["a"]}, r"column `word_ids` must hold an integer for each token; got \['a'\]"),
        ({"input_ids": [5], "special_tokens_mask": [0.5]}, "`special_tokens_mask` must hold an integer for each token"),
        ({"input_ids": [5], "idx": 0.5}, "column `idx` must hold an integer for each example; got 0.5"),
        ({"input_ids": [5], "idx": ["a"]}, r"column `idx` must hold an integer for each example; got \['a'\]"),
        ({"input_ids": [5, 205]}, "`input_ids` must be from 0 to 204, as the tokenizer's are; got 5 to 205"),
    ],
)
def test_bad_examples(row, message):
    with pytest.raises(ValueError, match=message):
        make(strategy="span")([row])


def test_no_examples():
    with pytest.raises(ValueError, match="`features` must hold at least one example; got none"):
        make()([])
