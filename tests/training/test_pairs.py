"""Pairs of a mask counted by blocks, against the oracle's and against the mask cell by cell."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given

from hf_dynmask import masks
from hf_dynmask.modeling.fields import Fields
from hf_dynmask.training import pairs
from hf_dynmask.training.flops import plan_pairs
from hf_dynmask.training.pairs import count_pairs
from strategies import FIELD_FREE, LEAVES, cases, examples, texts

WITHOUT_CHOICE = [leaf for leaf in LEAVES if "topk" not in leaf]
LONG = 32_768


def small_blocks():
    """Short sequences are divided, too."""
    return patch.multiple(pairs, SMALLEST=2, FEW_CELLS=0)


def count(text, *sizes, **options):
    return count_pairs(masks.parse(text), torch.tensor(sizes), **options)


@examples(600)
@given(cases(templates=WITHOUT_CHOICE))
def test_any_mask_in_any_batch(case):
    """With missing tokens, keys of other lengths and fields. Heads whose explicit masks differ count by their mean."""
    for run, plan in case.plan().by_heads(case.batch.heads):
        expected = sum(allowed[run].sum() for allowed in case.oracle_masks) / (run.stop - run.start)
        with small_blocks():
            assert plan_pairs(plan) == round(expected)


@examples(200)
@given(texts(templates=[*FIELD_FREE, "random(0.5, 3)", "custom(wedge)"]))
def test_sequences_of_several_blocks(text):
    """Those without fields, in blocks of the usual size; one of the sequences counts three times."""
    sizes, counts = torch.tensor([(200, 200), (37, 150), (0, 5)]), torch.tensor([1, 3, 2])
    mask = masks.parse(text)
    if "select" in text or "heads" in text:
        mask = mask.resolved()
    with patch.object(pairs, "FEW_CELLS", 0):
        found = count_pairs(mask, sizes, {"mask_choice": torch.zeros(3, dtype=torch.int64)}, counts=counts)
    dense = mask.dense(sizes[:, 0], key_lengths=sizes[:, 1], fields={"mask_choice": torch.zeros(3, dtype=torch.int64)})
    assert found == (dense.sum((1, 2, 3)) * counts).sum()


@pytest.mark.parametrize(
    "text, expected",
    [
        ("full & ~diagonal", LONG * (LONG - 1)),
        ("causal & ~diagonal", LONG * (LONG - 1) // 2),
        ("window(100)", LONG * 201 - 100 * 101),
        ("dilated(3000, 1000)", LONG + 2 * sum(LONG - distance for distance in (1000, 2000, 3000))),
        ("chunk(1000)", 32 * 1000**2 + 768**2),
        ("chunk(1000) & causal", 32 * 500 * 1001 + 384 * 769),
        ("causal & ~chunk(1000)", LONG * (LONG + 1) // 2 - 32 * 500 * 1001 - 384 * 769),
        ("causal | prefix(77)", LONG * (LONG + 1) // 2 + 77 * 76 // 2),
        ("causal & ~span(500, 33)", LONG * (LONG + 1) // 2 - sum(LONG - j for j in range(500, 533))),
        ("global_tokens(9) | diagonal", 2 * 9 * LONG - 81 + LONG - 9),
        ("chunk_causal(1024) & ~chunk(1024)", 1024**2 * 32 * 31 // 2),
        ("dilated(64, 2) & chunk(1024)", 32 * (1024 + 2 * sum(1024 - 2 * k for k in range(1, 33)))),
    ],
)
def test_long_sequences(text, expected):
    """By hand. No more than a small part of the pairs is looked at, and no block is drawn."""
    with patch.object(torch, "randperm", side_effect=AssertionError("blocks were drawn")):
        assert count(text, (LONG, LONG)) == expected


@pytest.mark.parametrize("text, share", [("random(0.3, 1)", 0.3), ("causal & random(0.9, 2)", 0.45)])
def test_where_every_block_depends(text, share):
    """Some of the blocks stand for all, the same ones each time."""
    found = count(text, (LONG, LONG))
    assert found == pytest.approx(share * LONG**2, rel=2e-3)
    assert count(text, (LONG, LONG)) == found


def test_the_cells_that_are_looked_at(monkeypatch):
    """Their number has a bound that does not follow that of the pairs, whatever the mask."""
    seen = []
    allowed = masks.Random.allowed

    def watched(self, i, j, fields):
        cells = allowed(self, i, j, fields)
        seen.append(cells.numel())
        return cells

    monkeypatch.setattr(masks.Random, "allowed", watched)
    for length in (4096, LONG, 8 * LONG):
        seen.clear()
        count("random(0.5, 1) | diagonal", (length, length))
        assert 0 < sum(seen) <= pairs.MOST_BLOCKS * pairs.SMALLEST**2


def test_a_choice_counts_what_it_chooses_from():
    assert count("causal & topk(2)", (10, 10)) == count("causal", (10, 10)) == 55


def test_heads_that_differ():
    with pytest.raises(ValueError, match="differs by head; resolve it for one head first"):
        count("heads(causal, full)", (9, 9))


def test_more_rules_than_are_told_apart():
    """Blocks are then divided until their pairs are known."""
    text = f"dilated(50, 2) & ({' | '.join(f'span({40 * k}, {k + 3})' for k in range(20))})"
    mask = masks.parse(text)
    with small_blocks():
        assert count(text, (900, 900)) == mask.dense(torch.tensor([900])).sum()


def test_no_sequences():
    assert count_pairs(masks.causal(), torch.empty(0, 2, dtype=torch.int64)) == 0
    assert count("full", (0, 7), (7, 0)) == 0


def test_fields_of_blocks():
    """Each block looks its own sequence up."""
    tables = {"segment_ids": torch.tensor([[1, 2, 3], [7, 8, 9]]), "prefix_lengths": torch.tensor([2, 3])}
    fields = Fields(tables).of_blocks(torch.tensor([1, 1, 0]))
    places = torch.tensor([0, 2, 1])
    assert fields.of_key("segment_ids", places).tolist() == [7, 9, 2]
    assert fields.of_sequence("prefix_lengths", places).tolist() == [3, 3, 2]
    least, most = fields.query_extremes("segment_ids", torch.zeros_like(places), places)
    assert (least.tolist(), most.tolist()) == ([7, 7, 1], [7, 9, 2])
