"""SequenceLayout: from lengths, attention masks and cumulative lengths to flat tensors and back."""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_dynmask.modeling.layout import SequenceLayout
from strategies import examples, lengths


@st.composite
def attention_masks(draw):
    """0/1 masks (B, T) with tokens at the left, at the right or anywhere."""
    sizes = draw(lengths(max_length=9))
    width = max(sizes) + draw(st.integers(0, 3))
    place = draw(st.sampled_from(["left", "right", "anywhere"]))
    rows = []
    for size in sizes:
        row = [1] * size + [0] * (width - size)
        rows.append({"left": row, "right": row[::-1], "anywhere": draw(st.permutations(row))}[place])
    return torch.tensor(rows, dtype=draw(st.sampled_from([torch.long, torch.bool, torch.float32])))


def numbered(shape, features=2):
    """A float64 batch (B, T, features) in which every number occurs once."""
    return torch.arange(1.0, shape[0] * shape[1] * features + 1, dtype=torch.float64).view(*shape, features)


def check(layout, present):
    """Everything a layout says follows from `present (B, T)`, the tokens that are there."""
    x = numbered(present.shape)
    sizes = present.sum(1).tolist()
    assert layout.shape == tuple(present.shape)
    assert layout.num_tokens == sum(sizes)
    assert layout.max_length == max(sizes, default=0)
    assert layout.lengths.tolist() == sizes
    assert layout.cu_seq_lens.tolist() == [sum(sizes[:b]) for b in range(len(sizes) + 1)]
    assert layout.positions.tolist() == [position for size in sizes for position in range(size)]
    assert layout.sequence_ids.tolist() == [b for b, size in enumerate(sizes) for _ in range(size)]
    assert torch.equal(layout.flatten(x), x[present][None])
    assert torch.equal(layout.unflatten(layout.flatten(x)), x * present[..., None])
    assert torch.equal(layout.unflatten(layout.flatten(x), fill=-1), torch.where(present[..., None], x, -1))


@examples(300)
@given(attention_masks())
def test_layout_from_an_attention_mask(mask):
    check(SequenceLayout.from_attention_mask(mask), mask.bool())


@examples(300)
@given(lengths(), st.integers(0, 3))
def test_layout_from_lengths_is_that_of_the_mask_they_stand_for(sizes, padding):
    width = max(sizes) + padding
    layout = SequenceLayout.from_lengths(torch.tensor(sizes), (len(sizes), width))
    check(layout, torch.arange(width) < torch.tensor(sizes)[:, None])


@examples(300)
@given(lengths())
def test_flat_layouts_from_lengths_and_from_cu_seq_lens_agree(sizes):
    sizes = torch.tensor(sizes)
    total = int(sizes.sum())
    cu_seq_lens = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
    made = [SequenceLayout.from_lengths(sizes), SequenceLayout.from_lengths(sizes, (1, total))]
    for layout in [*made, SequenceLayout.from_cu_seq_lens(cu_seq_lens)]:
        assert layout.shape == (1, total)
        assert layout.lengths.tolist() == sizes.tolist()
        assert layout.cu_seq_lens.tolist() == cu_seq_lens.tolist()
        assert layout.positions.tolist() == [position for size in sizes for position in range(size)]
        x = numbered((1, total))
        assert torch.equal(layout.flatten(x), x)
        assert torch.equal(layout.unflatten(x), x)


@examples(300)
@given(attention_masks(), st.integers(0, 2**32 - 1))
def test_missing_tokens_leave_and_the_others_keep_their_positions(mask, seed):
    missing = torch.rand(mask.shape, generator=torch.Generator().manual_seed(seed)) < 0.4
    whole = SequenceLayout.from_attention_mask(mask)
    layout = whole.without(missing)
    kept = mask.bool() & ~missing
    rows = range(len(mask))
    x = numbered(mask.shape)
    assert layout.shape == tuple(mask.shape)
    assert layout.lengths.tolist() == [int(kept[b].sum()) for b in rows]
    assert layout.cu_seq_lens.tolist() == [int(kept[:s].sum()) for s in range(len(rows) + 1)]
    assert torch.equal(layout.flatten(x)[0], torch.cat([x[b][kept[b]] for b in rows]))
    assert torch.equal(layout.unflatten(layout.flatten(x)), x * kept[..., None])
    positions = mask.bool().cumsum(1) - 1
    assert torch.equal(layout.positions, torch.cat([positions[b][kept[b]] for b in rows]))
    assert layout.num_positions == max((int(place) + 1 for place in layout.positions), default=0)
    assert layout.has_gaps == any(
        layout.positions[start:stop].tolist() != list(range(stop - start))
        for start, stop in itertools.pairwise(layout.cu_seq_lens.tolist())
    )
    table = layout.by_position(layout.flatten(x), fill=-1)
    for sequence, b in enumerate(rows):
        expected = torch.full((layout.num_positions, 2), -1.0, dtype=torch.float64)
        expected[positions[b][kept[b]]] = x[b][kept[b]]
        assert torch.equal(table[sequence], expected)


def test_missing_tokens_of_a_flat_batch():
    layout = SequenceLayout.from_lengths(torch.tensor([3, 1, 2]))
    left = layout.without(torch.tensor([[False, True, False, True, True, False]]))
    assert left.lengths.tolist() == [2, 0, 1]
    assert left.positions.tolist() == [0, 2, 1]
    assert left.flatten(torch.arange(6)[None]).tolist() == [[0, 2, 5]]


def test_nan_of_missing_tokens_reaches_neither_values_nor_gradients():
    x = torch.tensor([[1.0, float("nan"), 3.0]], requires_grad=True)
    layout = SequenceLayout.from_lengths(torch.tensor([3]), (1, 3)).without(torch.tensor([[False, True, False]]))
    flat = layout.flatten(x)
    (grad,) = torch.autograd.grad(flat.square().sum(), x)
    assert layout.unflatten(flat).tolist() == [[1.0, 0.0, 3.0]]
    assert grad.tolist() == [[2.0, 0.0, 6.0]]


@examples(300)
@given(lengths())
def test_groups_are_the_longest_runs_of_equal_lengths(sizes):
    layout = SequenceLayout.from_lengths(torch.tensor(sizes), (len(sizes), max(sizes)))
    assert [group.length for group in layout.groups for _ in range(group.count)] == sizes
    assert all(one.length != next_.length for one, next_ in itertools.pairwise(layout.groups))


@examples(100)
@given(attention_masks())
def test_gradients_pass_to_real_tokens_alone(mask):
    layout = SequenceLayout.from_attention_mask(mask)
    x = numbered(mask.shape).requires_grad_()
    weight = numbered(mask.shape).flip(0)
    (grad,) = torch.autograd.grad(layout.unflatten(layout.flatten(x)), x, weight)
    assert torch.equal(grad, weight * mask.bool()[..., None])


def test_first_tokens_are_those_at_position_0_and_0_for_an_empty_row():
    mask = torch.tensor([[0, 1, 1], [0, 0, 0], [1, 0, 1]])
    layout = SequenceLayout.from_attention_mask(mask)
    flat = layout.flatten(torch.arange(9.0).view(3, 3))
    assert layout.first_tokens(flat).tolist() == [1.0, 0.0, 6.0]


def test_last_tokens_that_count():
    layout = SequenceLayout.from_lengths(torch.tensor([3, 0, 2, 1]), (4, 4))
    flat = torch.arange(1.0, 7.0)[None]
    assert layout.last_tokens(flat).tolist() == [3.0, 0.0, 5.0, 6.0]
    counted = torch.tensor([1, 1, 0, 0, 0, 1]).bool()
    assert layout.last_tokens(flat, counted).tolist() == [2.0, 0.0, 4.0, 6.0]


def test_mean_tokens():
    layout = SequenceLayout.from_lengths(torch.tensor([3, 0, 2, 1]), (4, 4))
    flat = torch.arange(1.0, 7.0)[None, :, None].repeat(1, 1, 2)
    assert layout.mean_tokens(flat).tolist() == [[2.0, 2.0], [0.0, 0.0], [4.5, 4.5], [6.0, 6.0]]
    assert layout.mean_tokens(flat[..., 0].half()).tolist() == [2.0, 0.0, 4.5, 6.0]
    many = torch.full((1, 5000), 0.1, dtype=torch.bfloat16)  # a sum in bfloat16 stops at 32
    assert SequenceLayout.from_lengths(torch.tensor([5000])).mean_tokens(many)[0] == many[0, 0]


def test_last_and_mean_tokens_leave_unused_places_out():
    layout = SequenceLayout(
        shape=(1, 6),
        num_tokens=6,
        lengths=torch.tensor([2, 1, 0]),
        sequence_ids=torch.tensor([0, 0, 1, 3, 3, 3]),
        positions=torch.tensor([0, 1, 0, 0, 0, 0]),
        has_tail=True,
        longest=6,
    )
    flat = torch.arange(1.0, 7.0)[None]
    assert layout.last_tokens(flat, torch.ones(6).bool()).tolist() == [2.0, 3.0, 0.0]
    assert layout.mean_tokens(flat).tolist() == [1.5, 3.0, 0.0]


def test_values_by_position_leave_absent_tokens_out():
    layout = SequenceLayout.from_attention_mask(torch.tensor([[0, 1, 1, 0], [1, 0, 1, 1]]))
    flat = layout.flatten(torch.arange(8).view(2, 4))
    assert layout.by_position(flat, fill=-1).tolist() == [[1, 2, -1], [4, 6, 7]]


def test_absent_values_do_not_reach_the_flat_tensor_or_its_gradient():
    x = torch.full((2, 3), float("nan"))
    x[0, :2] = 1.0
    x.requires_grad_()
    flat = SequenceLayout.from_lengths(torch.tensor([2, 0]), (2, 3)).flatten(x)
    (grad,) = torch.autograd.grad(flat.square().sum(), x)
    assert flat.tolist() == [[1.0, 1.0]]
    assert grad.tolist() == [[2.0, 2.0, 0.0], [0.0, 0.0, 0.0]]


def test_a_batch_without_padding_is_flattened_as_a_view():
    x = torch.zeros(3, 5, 2)
    layout = SequenceLayout.from_lengths(torch.tensor([5, 5, 5]), (3, 5))
    assert layout.flatten(x).data_ptr() == x.data_ptr()
    assert layout.groups == ((5, 3),)


@pytest.mark.parametrize("rows, width", [(0, 0), (0, 4), (2, 0), (3, 4), (1, 4)])
def test_batches_without_a_token(rows, width):
    empty = torch.zeros(rows, width, dtype=torch.long)
    check(SequenceLayout.from_attention_mask(empty), empty.bool())
    check(SequenceLayout.from_lengths(empty.new_zeros(rows), (rows, width)), empty.bool())


def test_one_row_reads_one_length_as_a_row_and_more_as_a_flat_batch():
    assert SequenceLayout.from_lengths(torch.tensor([3]), (1, 5)).num_tokens == 3
    assert SequenceLayout.from_lengths(torch.tensor([3, 0, 2]), (1, 5)).lengths.tolist() == [3, 0, 2]
    assert SequenceLayout.from_cu_seq_lens(torch.tensor([0], dtype=torch.int32)).shape == (1, 0)


def test_lengths_may_be_lists():
    assert torch.equal(SequenceLayout.from_lengths([2, 0], (2, 3)).lengths, torch.tensor([2, 0]))
    assert SequenceLayout.from_lengths([]).num_tokens == 0
    assert torch.equal(SequenceLayout.from_cu_seq_lens([0, 2, 5]).lengths, torch.tensor([2, 3]))


def test_layouts_are_immutable():
    layout = SequenceLayout.from_lengths(torch.tensor([2, 1]), (2, 2))
    with pytest.raises(dataclasses.FrozenInstanceError):
        layout.shape = (1, 3)  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    "sizes, shape, message",
    [
        ([1, 2, 3], (2, 4), r"`lengths` must have one entry a row, shape \(2,\).* got shape \(3,\)"),
        ([1], (2, 4), r"`lengths` must have one entry a row, shape \(2,\).* got shape \(1,\)"),
        ([[1, 2]], (2, 4), r"`lengths` must be a vector; got shape \(1, 2\)"),
        ([2, -1], (2, 4), r"`lengths` must not be negative; got -1"),
        ([2, -1], None, r"`lengths` must not be negative; got -1"),
        ([2, 5], (2, 4), r"`lengths` must not be beyond the row width 4; got 5"),
        ([5], (1, 4), r"`lengths` must not be beyond the row width 4; got 5"),
        ([2, 3], (1, 4), r"`lengths` of a flat batch must add up to at most its width 4; got a sum of 5"),
        ([1.0, 2.0], (2, 4), r"`lengths` must be integers; got dtype torch.float32"),
        ([True, False], (2, 4), r"`lengths` must be integers; got dtype torch.bool"),
    ],
)
def test_bad_lengths(sizes, shape, message):
    with pytest.raises(ValueError, match=message):
        SequenceLayout.from_lengths(torch.tensor(sizes), shape)


@pytest.mark.parametrize(
    "mask, message",
    [
        ([[1, 2]], r"`attention_mask` must hold only 0 and 1; got 2"),
        ([[0, -1]], r"`attention_mask` must hold only 0 and 1; got -1"),
        ([[1.0, 0.5]], r"`attention_mask` must hold only 0 and 1; got 0.5"),
        ([[1.0, float("nan")]], r"`attention_mask` must hold only 0 and 1; got nan"),
        ([1, 0], r"`attention_mask` must have shape \(batch, width\); got \(2,\)"),
    ],
)
def test_bad_attention_masks(mask, message):
    with pytest.raises(ValueError, match=message):
        SequenceLayout.from_attention_mask(torch.tensor(mask))


@pytest.mark.parametrize(
    "cu_seq_lens, message",
    [
        ([1, 2], r"`cu_seq_lens` must start at 0 and be non-decreasing; got \[1, 2\]"),
        ([0, 3, 2], r"`cu_seq_lens` must start at 0 and be non-decreasing; got \[0, 3, 2\]"),
        ([[0, 3]], r"`cu_seq_lens` must be a vector; got shape \(1, 2\)"),
        ([0.0, 3.0], r"`cu_seq_lens` must be integers; got dtype torch.float32"),
    ],
)
def test_bad_cu_seq_lens(cu_seq_lens, message):
    with pytest.raises(ValueError, match=message):
        SequenceLayout.from_cu_seq_lens(torch.tensor(cu_seq_lens))


def test_bad_tensors():
    layout = SequenceLayout.from_lengths(torch.tensor([2, 1]), (2, 2))
    with pytest.raises(ValueError, match=r"`padded` must have shape \(2, 2, '...'\); got \(2, 3, 8\)"):
        layout.flatten(torch.zeros(2, 3, 8))
    with pytest.raises(ValueError, match=r"`flat` must have shape \(1, 3, '...'\); got \(1, 4, 8\)"):
        layout.unflatten(torch.zeros(1, 4, 8))


@pytest.mark.parametrize(
    "missing, message",
    [
        (torch.zeros(2, 2), r"`missing` must be bool of shape \(2, 2\); got torch.float32 \(2, 2\)"),
        (torch.zeros(2, 3).bool(), r"`missing` must be bool of shape \(2, 2\); got torch.bool \(2, 3\)"),
    ],
)
def test_bad_missing(missing, message):
    with pytest.raises(ValueError, match=message):
        SequenceLayout.from_lengths(torch.tensor([2, 1]), (2, 2)).without(missing)


SMALL = [torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint32]


@pytest.mark.parametrize("dtype", SMALL, ids=str)
def test_integers_of_any_size(dtype):
    """Sums of lengths do not fit in the smallest."""
    lengths = torch.tensor([100, 0, 100, 127])
    for shape in (None, (4, 127)):
        found, right = (SequenceLayout.from_lengths(sizes, shape) for sizes in (lengths.to(dtype), lengths))
        assert found.sizes == right.sizes
        assert torch.equal(found.places, right.places) and torch.equal(found.positions, right.positions)
    cu_seq_lens = torch.tensor([0, 100, 100, 120])
    assert SequenceLayout.from_cu_seq_lens(cu_seq_lens.to(dtype)).sizes == (100, 0, 20)
    with pytest.raises(ValueError, match=r"`cu_seq_lens` must start at 0 and be non-decreasing; got \[0, 120, 20\]"):
        SequenceLayout.from_cu_seq_lens(torch.tensor([0, 120, 20], dtype=dtype))
    mask = torch.tensor([[1, 0, 1], [0, 0, 0]])
    assert SequenceLayout.from_attention_mask(mask.to(dtype)).sizes == (2, 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bool, torch.complex64, torch.uint64], ids=str)
def test_what_are_no_integers(dtype):
    with pytest.raises(ValueError, match=f"`lengths` must be integers; got dtype {dtype}"):
        SequenceLayout.from_lengths(torch.ones(1).to(dtype))
    with pytest.raises(ValueError, match=f"`cu_seq_lens` must be integers; got dtype {dtype}"):
        SequenceLayout.from_cu_seq_lens(torch.ones(1).to(dtype))
