"""Pictures of masks and of attention: that they show what the mask says. (How they look was judged by eye.)"""

import sys
from typing import Any

import matplotlib
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from test_imports import REPOSITORY, effects_of_import
from transformers import BertConfig, BertModel

from hf_dynmask import DynMaskConfig, DynMaskForSequenceClassification, masks
from hf_dynmask.tools.plotting import COLOURS, EMPTY, FULL, PARTIAL, mask_panels, plot_attention, plot_mask, plot_masks
from strategies import batches, examples

matplotlib.use("agg")

EXPRESSION = "causal & window(3, 0) | global_tokens(2)"
HEADS = "heads(causal, causal, full, window(1))"


@pytest.fixture(autouse=True)
def close_figures():
    yield
    pyplot.close("all")


def names_of(colours):
    """Which of `COLOURS` each pixel has; empty for any other."""
    names = {tuple(round(255 * part) for part in to_rgb(colour)): name for name, colour in COLOURS.items()}
    return [[names.get(tuple(round(255 * float(part)) for part in pixel), "") for pixel in row] for row in colours]


def drawn_cells(axis: Axes):
    return names_of(axis.images[0].get_array())


def expected_cells(panel, block_size):
    """The same from the panel's blocks and cells, sequences end to end."""
    total = sum(sequence.length for sequence in panel.sequences)
    expected, start = [[""] * total for _ in range(total)], 0
    for length, states, cells in panel.sequences:
        for i in range(length):
            for j in range(length):
                state = int(states[i // block_size, j // block_size])
                partial = "allowed" if cells[i, j] else "hidden"
                expected[start + i][start + j] = {EMPTY: "empty", PARTIAL: partial, FULL: "full"}[state]
        start += length
    return expected


def texts(axis: Axes):
    return [label.get_text() for label in axis.get_xticklabels()], [
        label.get_text() for label in axis.get_yticklabels()
    ]


# --- Blocks and cells ------------------------------------------------------------------------------------------------


@given(batches(cross=False), st.integers(1, 6))
@examples(200)
def test_panels_say_what_the_oracle_says(batch, block_size):
    dense = torch.from_numpy(batch.dense)
    panels = mask_panels(
        batch.text, batch.lengths, fields=batch.fields, heads=batch.heads, block_size=block_size, with_cells=True
    )
    assert [head for panel in panels for head in range(batch.heads)[panel.heads]] == list(range(batch.heads))
    for panel in panels:
        for row, (length, states, cells) in enumerate(panel.sequences):
            assert cells is not None
            assert length == batch.lengths[row]
            for head in range(batch.heads)[panel.heads]:
                assert torch.equal(cells, dense[row, head % dense.shape[1], :length, :length])
            assert tuple(states.shape) == (-(-length // block_size),) * 2
            for (q, k), state in zip(states.new_ones(states.shape).nonzero().tolist(), states.flatten(), strict=True):
                block = cells[q * block_size : (q + 1) * block_size, k * block_size : (k + 1) * block_size]
                assert state != EMPTY or not block.any()
                assert state != FULL or block.all()


def test_blocks_of_a_window():
    (panel,) = mask_panels("causal & window(4, 0)", [8, 3], block_size=2)
    wide, narrow = (sequence.states.tolist() for sequence in panel.sequences)
    e, p, f = EMPTY, PARTIAL, FULL
    assert wide == [[p, e, e, e], [f, p, e, e], [p, f, p, e], [e, p, f, p]]
    assert narrow == [[p, e], [f, f]]


# --- plot_mask -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [4, 128])
@pytest.mark.parametrize("lengths", [[12, 5], [1], [3, 0, 2], [90, 7]])
def test_cells_are_drawn_as_the_mask_says(lengths, block_size):
    figure = plot_mask(EXPRESSION, lengths, block_size=block_size)
    (panel,) = mask_panels(EXPRESSION, lengths, block_size=block_size)
    (axis,) = figure.axes
    assert drawn_cells(axis) == expected_cells(panel, block_size)
    assert axis.get_title(loc="left") == EXPRESSION
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == [
        "full block: all allowed",
        "partial block: allowed",
        "partial block: hidden",
        "empty block: skipped",
    ]


def test_axes_and_counts():
    (axis,) = plot_mask(EXPRESSION, torch.tensor([12, 5]), block_size=4).axes
    positions = [str(position) for length in (12, 5) for position in range(length)]
    assert texts(axis) == (positions, positions)
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("key position", "query position")
    written = [text.get_text() for text in axis.texts]
    assert written == ["sequence 0", "sequence 1", "100 of 169 pairs; blocks of 4: 1 full, 11 partial, 1 empty"]

    (axis,) = plot_mask(EXPRESSION, [1000]).axes
    hundreds = [str(position) for position in range(0, 1000, 100)]
    assert texts(axis) == (hundreds, hundreds)

    (axis,) = plot_mask(EXPRESSION, [30] * 30).axes
    every_third = [str(number) for number in range(0, 30, 3)]
    assert texts(axis) == (every_third, every_third)
    assert axis.get_xlabel() == "sequence of the key"


def test_many_tokens_are_drawn_as_blocks():
    figure = plot_mask("causal & window(300, 0)", [1500, 200, 0])
    (axis,) = figure.axes
    (panel,) = mask_panels("causal & window(300, 0)", [1500, 200, 0], with_cells=False)
    assert not axis.images
    names = {EMPTY: "empty", PARTIAL: "allowed", FULL: "full"}
    for mesh, sequence in zip(axis.collections, panel.sequences[:2], strict=False):
        expected = [[names[state] for state in row] for row in sequence.states.tolist()]
        assert names_of(mesh.get_array()) == expected
    mesh: Any = axis.collections[1]
    edges = mesh.get_coordinates()[0, :, 0].tolist()
    assert edges == [1500, 1628, 1700]
    assert figure.legends[0].get_texts()[1].get_text() == "partial block"


def test_heads_that_differ_get_panels():
    figure = plot_mask(HEADS, [6], heads=4)
    titles = [axis.get_title(loc="left") for axis in figure.axes]
    assert titles == ["heads 0 to 1: causal", "head 2: full", "head 3: window(1, 1)"]
    panels = mask_panels(HEADS, [6], heads=4)
    assert [drawn_cells(axis) for axis in figure.axes] == [expected_cells(panel, 128) for panel in panels]
    with pytest.raises(ValueError, match="`ax` must be left out for heads that differ, which need 3 panels"):
        plot_mask(HEADS, [6], heads=4, ax=pyplot.figure().add_subplot())


def test_fields_and_given_axes():
    axis = pyplot.figure().add_subplot()
    fields = {"segment_ids": torch.tensor([[0, 0, 1, 1], [0, 1, 0, 0]])}
    assert plot_mask("segments", [4, 2], fields=fields, ax=axis) is axis.figure
    (panel,) = mask_panels("segments", [4, 2], fields=fields)
    assert drawn_cells(axis) == expected_cells(panel, 128)
    assert axis.get_legend() is not None


def test_no_tokens():
    (axis,) = plot_mask("causal", [0]).axes
    assert not axis.images
    assert axis.texts[0].get_text() == "0 of 0 pairs; blocks of 128: 0 full, 0 partial, 0 empty"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(mask="causal &", lengths=[3]), "mask does not parse at column 9"),
        (dict(mask="causal", lengths=[-3]), "`lengths` must not be negative; got -3"),
        (dict(mask="causal", lengths=[3], block_size=0), "`block_size` must be at least 1; got 0"),
        (dict(mask="segments", lengths=[3]), "reads the field `segment_ids`, which the batch lacks"),
        (dict(mask=masks.parse(HEADS), lengths=[3], heads=2), "divides the 2 heads; got 4"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        plot_mask(**arguments)


# --- plot_masks ------------------------------------------------------------------------------------------------------


def test_masks_side_by_side():
    """Cells in two colours, whatever their blocks are."""
    expressions = ["full", "causal & window(2, 0)", masks.segments(), HEADS]
    fields = {"segment_ids": torch.tensor([[0, 0, 1, 1], [0, 1, 0, 0]])}
    figure = plot_masks(expressions, [4, 2], fields=fields, heads=4)
    titles = [axis.get_title() for axis in figure.axes]
    by_head = ["heads 0 to 1: causal", "head 2: full", "head 3: window(1, 1)"]
    assert titles == ["full", "causal & window(2, 0)", "segments", *by_head]
    panels = [panel for one in expressions for panel in mask_panels(one, [4, 2], fields=fields, heads=4)]
    for axis, panel in zip(figure.axes, panels, strict=True):
        expected, start = [[""] * 6 for _ in range(6)], 0
        for length, _, cells in panel.sequences:
            assert cells is not None
            for i, j in torch.ones(length, length).nonzero().tolist():
                expected[start + i][start + j] = "full" if cells[i, j] else "empty"
            start += length
        assert drawn_cells(axis) == expected
        assert texts(axis) == ([], [])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["allowed", "hidden"]


@pytest.mark.parametrize(
    "expressions, lengths, message",
    [
        ([], [3], "`masks` must hold at least one expression; got none"),
        (["full"], [1000, 25], "`lengths` must add up to at most 1,024 tokens, to be legible; got 1,025"),
        (["full", "causal &"], [3], "mask does not parse at column 9"),
        (["full", "segments"], [3], "reads the field `segment_ids`, which the batch lacks"),
    ],
)
def test_bad_masks(expressions, lengths, message):
    with pytest.raises(ValueError, match=message):
        plot_masks(expressions, lengths)


# --- plot_attention --------------------------------------------------------------------------------------------------


def make_model(mask=EXPRESSION, **settings):
    torch.manual_seed(0)
    config = DynMaskConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=40, mask=mask
    )
    config.update(settings)
    return DynMaskForSequenceClassification(config)


class Names:
    """As much of a tokenizer as the picture asks for."""

    def convert_ids_to_tokens(self, ids):
        return [f"${number}$" for number in ids]  # text for the eye, no formula


TOKENIZER: Any = Names()


def eager_weights(model, inputs, layer, head):
    model = model.eval()
    model.set_attn_implementation("eager")
    weights = model(**inputs, output_attentions=True).attentions[layer][0, head]
    model.set_attn_implementation("dynmask")
    return weights.detach()


IDS = torch.arange(20, 32)[None]
BATCHES = {
    "a row": ({"input_ids": IDS}, range(12)),
    "left padding": ({"input_ids": IDS, "attention_mask": torch.tensor([[0] * 3 + [1] * 9])}, range(3, 12)),
    "right padding": ({"input_ids": IDS, "lengths": torch.tensor([7])}, range(7)),
    "a missing token": ({"input_ids": IDS, "missing": IDS == 25}, [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11]),
    "flat": ({"input_ids": IDS, "lengths": torch.tensor([8, 4])}, range(12)),
}


@pytest.mark.parametrize("name", BATCHES)
def test_weights_and_labels(name):
    inputs, kept = BATCHES[name]
    model = make_model()
    figure = plot_attention(model, inputs, 1, 2, tokenizer=TOKENIZER)
    axis, bar = figure.axes
    kept = torch.tensor(list(kept))
    weights = eager_weights(model, inputs, 1, 2)[kept][:, kept]

    labels = [f"${number}$" for number in IDS[0][kept].tolist()]
    assert texts(axis) == (labels, labels)
    figure.canvas.draw()  # "$20$" is not taken for a formula
    assert bar.get_ylabel() == "attention weight"
    assert (axis.get_title(loc="left"), axis.texts[-1].get_text()) == ("layer 1, head 2", EXPRESSION)

    # Colours get darker with the weight; what the mask hides has the colour of hidden cells, other sequences none.
    pixels = torch.tensor(axis.images[0].get_array())
    names = names_of(pixels)
    allowed = torch.tensor([[name == "" for name in row] for row in names]) & (pixels.sum(-1) < 3)
    assert torch.equal(allowed, weights > 0)
    order = weights[allowed].argsort()
    brightness = pixels.sum(-1)[allowed][order]
    assert (brightness.diff() <= 1e-6).all()
    assert brightness[0] > brightness[-1] + 0.5


def test_positions_without_a_tokenizer():
    inputs, kept = BATCHES["a missing token"]
    axis, _ = plot_attention(make_model(), inputs, 1, 2).axes
    positions = [str(position) for position in kept]
    assert texts(axis) == (positions, positions)
    embeds = {"inputs_embeds": torch.randn(1, 3, 32)}
    axis, _ = plot_attention(make_model(), embeds, 1, 2, tokenizer=TOKENIZER).axes
    assert texts(axis) == (["0", "1", "2"], ["0", "1", "2"])


def test_the_model_is_as_before():
    model = make_model().train()
    torch.manual_seed(3)
    expected = model(input_ids=IDS).logits
    plot_attention(model, {"input_ids": IDS}, 0, 0)
    assert model.training
    assert model.config._attn_implementation == "dynmask"
    torch.manual_seed(3)
    assert torch.equal(model(input_ids=IDS).logits, expected)
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(ValueError, match="exactly one of"):
        plot_attention(model, {}, 0, 0)
    assert model.training
    assert model.config._attn_implementation == "dynmask"
    assert not any(module._forward_hooks for module in model.modules())


def test_long_sequences_have_positions_and_blocks():
    model = make_model("causal & window(20, 0)")
    axis, _ = plot_attention(model, {"input_ids": torch.arange(300)[None] % 50}, 0, 0, tokenizer=TOKENIZER).axes
    fifties = [str(position) for position in range(0, 300, 50)]
    assert texts(axis) == (fifties, fifties)
    names = names_of(axis.images[0].get_array())
    assert names[0][299] == names[299][0] == "empty"
    assert names[0][127] == names[150][100] == "hidden"
    assert names[150][140] == ""


def test_masks_by_head_and_chosen_keys():
    model = make_model("heads(causal, full)")
    hidden = [plot_attention(model, {"input_ids": IDS}, 0, head).axes[0] for head in (1, 2)]
    assert [names_of(axis.images[0].get_array())[0][5] for axis in hidden] == ["hidden", ""]
    assert [axis.texts[-1].get_text() for axis in hidden] == ["causal", "full"]

    axis, _ = plot_attention(make_model("causal & topk(2)"), {"input_ids": IDS}, 0, 0).axes
    names = names_of(axis.images[0].get_array())
    assert names == [["" if j <= i else "hidden" for j in range(12)] for i in range(12)]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(layer=3), "`layer` must be from 0 to 2; got 3"),
        (dict(head=-1), "`head` must be from 0 to 3; got -1"),
        (dict(inputs={"input_ids": IDS.expand(2, -1)}), "`inputs` must hold one row; got 2"),
        (dict(model=BertModel(BertConfig(num_hidden_layers=0))), "`model` must be a DynMask model, .*; got BertModel"),
    ],
)
def test_bad_requests(arguments, message):
    with pytest.raises(ValueError, match=message):
        plot_attention(**{"model": make_model(), "inputs": {"input_ids": IDS}, "layer": 0, "head": 0, **arguments})


# --- matplotlib ------------------------------------------------------------------------------------------------------


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    message = r"plots need matplotlib: pip install 'hf_dynmask\[plot\]'"
    with pytest.raises(ImportError, match=message):
        plot_mask("causal", [3])
    with pytest.raises(ImportError, match=message):
        plot_masks(["causal"], [3])
    with pytest.raises(ImportError, match=message):
        plot_attention(make_model(), {"input_ids": IDS}, 0, 0)


def test_importing_needs_no_matplotlib():
    assert effects_of_import("hf_dynmask.tools.plotting", REPOSITORY) == []
