"""What a forward pass's arguments say of the sequences of a batch: those of our own, and those of other collators."""

from typing import Any

import pytest
import torch
from transformers import DataCollatorWithFlattening

from hf_dynmask import (
    DynMaskConfig,
    DynMaskForCausalLM,
    DynMaskForMaskedLM,
    DynMaskForQuestionAnswering,
    DynMaskForSequenceClassification,
    DynMaskForTokenClassification,
    DynMaskModel,
    DynMaskRecurrentConfig,
    DynMaskRecurrentForSequenceClassification,
    DynMaskRecurrentForTokenClassification,
    DynMaskSeq2SeqConfig,
    DynMaskSeq2SeqModel,
)
from hf_dynmask.modeling.batch import layout_of_batch

SIZES: dict[str, Any] = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "hidden_dropout_prob": 0.0}
ATTENTION: dict[str, Any] = {"num_attention_heads": 2, "intermediate_size": 24, "attention_probs_dropout_prob": 0.0}
CLOSE: dict[str, Any] = {"atol": 1e-6, "rtol": 1e-5}
IDS = [[5, 6, 7, 8], [9], [10, 11, 12, 13, 14], [15, 16]]
SIZE = sum(map(len, IDS))
OF_TOKENS = ("last_hidden_state", "logits", "start_logits", "end_logits")


def attention(head, **settings):
    torch.manual_seed(0)
    return head(DynMaskConfig(**SIZES, **ATTENTION, **settings)).eval()


def recurrent(head, **settings):
    torch.manual_seed(0)
    return head(DynMaskRecurrentConfig(**SIZES, bidirectional=True, **settings)).eval()


MODELS = {
    "bare": lambda: attention(DynMaskModel),
    "masked LM": lambda: attention(DynMaskForMaskedLM, mask="window(2)"),
    "causal LM": lambda: attention(DynMaskForCausalLM),
    "token classes": lambda: attention(DynMaskForTokenClassification, position_type="rotary"),
    "a class": lambda: attention(DynMaskForSequenceClassification),
    "answers": lambda: attention(DynMaskForQuestionAnswering, attn_implementation="sdpa"),
    "positions from 2 on": lambda: attention(DynMaskForMaskedLM, position_offset=2),
    "recurrent, token classes": lambda: recurrent(DynMaskRecurrentForTokenClassification),
    "recurrent, a class": lambda: recurrent(DynMaskRecurrentForSequenceClassification),
}


def flattened(**settings) -> dict[str, Any]:
    batch = DataCollatorWithFlattening(**settings)([{"input_ids": list(ids)} for ids in IDS])
    batch.pop("labels")
    return batch


CU_SEQ_LENS = torch.tensor([0, 4, 5, 10, 12])
OTHERS = {
    "position_ids": flattened(),
    "cu_seq_lens": flattened(return_position_ids=False, return_flash_attn_kwargs=True),
    "both": flattened(return_flash_attn_kwargs=True),
    "seq_idx": flattened(return_position_ids=False, return_seq_idx=True),
    "all": flattened(return_flash_attn_kwargs=True, return_seq_idx=True),
    "positions from 2 on": flattened(position_ids_start=2),
    "positions, and a mask of ones": flattened() | {"attention_mask": torch.ones(1, SIZE, dtype=torch.long)},
    "cu_seq_lens of the keys alone": {"input_ids": flattened()["input_ids"], "cu_seq_lens_k": CU_SEQ_LENS},
    "cu_seq_lens as a list": {"input_ids": flattened()["input_ids"], "cu_seq_lens_q": CU_SEQ_LENS.tolist()},
    "lengths as a list": {"input_ids": flattened()["input_ids"], "lengths": [4, 1, 5, 2]},
}


@pytest.mark.parametrize("others", OTHERS)
@pytest.mark.parametrize("name", MODELS)
def test_flat_batches_of_others_are_what_one_sequence_at_a_time_gives(name, others):
    model, batch = MODELS[name](), OTHERS[others]
    if others == "positions from 2 on" and model.config.to_dict().get("position_type") == "learned":
        model.config.position_offset = 2  # otherwise 2 is another place in the table
    output = model(**batch)
    alone = [model(input_ids=torch.tensor([ids])) for ids in IDS]
    for key in OF_TOKENS:
        if key in output:
            by_sequence = output[key].shape[0] == len(IDS)
            right = torch.cat([each[key] for each in alone], dim=0 if by_sequence else 1)
            torch.testing.assert_close(output[key], right, **CLOSE)


def test_rows_may_hold_several_sequences():
    """As in packed rows: positions restart in a row, and padding stands behind."""
    model = attention(DynMaskForTokenClassification)
    ids = torch.tensor([[5, 6, 7, 8, 9, 0], [10, 11, 12, 13, 14, 15]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]])
    logits = model(input_ids=ids, position_ids=positions, attention_mask=(ids > 0).long()).logits
    for row, first, last in ((0, 0, 3), (0, 3, 5), (1, 0, 6)):
        alone = model(input_ids=ids[row : row + 1, first:last]).logits[0]
        torch.testing.assert_close(logits[row, first:last], alone, **CLOSE)
    assert not logits[0, 5].any()


@pytest.mark.parametrize(
    ("positions", "sizes"),
    [
        ([[0, 1, 2, 3, 4, 5]], (6,)),
        ([[7, 8, 9, 10, 11, 12]], (6,)),
        ([[0, 1, 2, 10, 11, 12]], (6,)),  # positions with a gap: patches of a picture, skipped positions
        ([[5, 4, 3, 2, 1, 0]], (6,)),  # never back to the first
        ([[0, 1, 2, 3, 1, 2]], (6,)),
        ([[0, 1, 0, 1, 2, 0]], (2, 3, 1)),
        ([[2, 3, 2, 3, 4, 2]], (2, 3, 1)),
        ([[0, 0, 0, 1, 0, 0]], (1, 1, 2, 1, 1)),
    ],
)
def test_which_positions_restart(positions, sizes):
    layout = layout_of_batch((1, 6), torch.device("cpu"), None, None, position_ids=torch.tensor(positions))
    assert sorted(layout.sizes) == sorted(sizes)
    assert layout.positions.tolist() == [place for size in layout.sizes for place in range(size)]


def test_an_empty_row_stays_a_sequence():
    mask = torch.tensor([[1, 1, 1], [0, 0, 0], [1, 1, 0]])
    positions = torch.tensor([[0, 1, 0], [0, 0, 0], [0, 1, 2]])
    layout = layout_of_batch((3, 3), torch.device("cpu"), None, mask, position_ids=positions)
    assert layout.lengths.tolist() == [2, 1, 0, 2]


def test_an_explicit_mask_leaves_positions_alone():
    """Branches of a tree restart from a shared place; who sees whom is the mask's affair."""
    model, ids = attention(DynMaskForTokenClassification, position_type="rotary"), torch.arange(5, 11)[None]
    mask = torch.ones(1, 6, 6, dtype=torch.bool).tril()
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    assert not torch.equal(
        model(input_ids=ids, position_ids=positions, attention_mask=mask).logits[:, 3:],
        model(input_ids=ids[:, 3:], attention_mask=mask[:, :3, :3]).logits,
    )


# --- Contradictions ---------------------------------------------------------------------------------------------------

INPUT = {"input_ids": torch.arange(5, 17)[None]}
RESTARTING = torch.tensor([[0, 1, 2, 3, 0, 0, 1, 2, 3, 4, 0, 1]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cu_seq_lens_q": torch.tensor([0, 4, 10])}, "`cu_seq_lens_q` must be .* from 0 to the width of the row, 12"),
        ({"cu_seq_lens_q": torch.tensor([0, 9, 4, 12])}, "`cu_seq_lens_q` must be .* non-decreasing"),
        ({"cu_seq_lens_q": torch.tensor([1, 4, 12])}, r"`cu_seq_lens_q` must be .*got \[1, 4, 12\]"),
        (
            {"cu_seq_lens_q": torch.tensor([0, 4, 12]), "lengths": torch.tensor([5, 7])},
            r"`cu_seq_lens_q` must be the running sums of `lengths`, \[5, 7\]; got \[0, 4, 12\]",
        ),
        (
            {"cu_seq_lens_q": torch.tensor([0, 4, 12]), "cu_seq_lens_k": torch.tensor([0, 5, 12])},
            "`cu_seq_lens_k` must equal `cu_seq_lens_q`",
        ),
        ({"cu_seq_lens_q": torch.tensor([0, 4, 12]), "position_ids": RESTARTING}, "`position_ids` must restart where"),
        ({"cu_seq_lens_q": CU_SEQ_LENS, "position_ids": torch.arange(12)[None]}, "`position_ids` must restart where"),
        ({"lengths": torch.tensor([12]), "position_ids": RESTARTING}, "`position_ids` must restart where"),
        ({"lengths": torch.tensor([6, 6]), "position_ids": RESTARTING}, "`position_ids` must restart where"),
        ({"cu_seq_lens_q": CU_SEQ_LENS, "max_length_q": 4}, "`max_length_q` must be at least .* 5; got 4"),
        ({"seq_idx": torch.zeros(12)}, r"`seq_idx` must have the input's shape \(1, 12\)"),
        (
            {"seq_idx": torch.tensor([[0] * 6 + [1] * 6]), "lengths": torch.tensor([4, 8])},
            "`seq_idx` must change only where a sequence of `lengths`",
        ),
        ({"position_ids": torch.arange(5)[None]}, r"`position_ids` must have the input's shape \(1, 12\)"),
    ],
)
@pytest.mark.parametrize("name", ["causal LM", "a class", "recurrent, token classes"])
def test_contradictions(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        MODELS[name]()(**INPUT, **arguments)


def test_cumulative_lengths_are_of_one_row():
    with pytest.raises(ValueError, match="`cu_seq_lens_q` must come with one row that holds all sequences; got 2"):
        attention(DynMaskModel)(input_ids=torch.ones(2, 3, dtype=torch.long), cu_seq_lens_q=torch.tensor([0, 3, 6]))


def test_positions_of_frames_that_restart_need_lengths():
    model = attention(DynMaskModel, num_features=3)
    frames, positions = torch.randn(1, 5, 3), torch.tensor([[0, 1, 2, 0, 1]])
    with pytest.raises(ValueError, match="`position_ids` must restart where sequences begin and only there"):
        model(input_features=frames, position_ids=positions)
    flat = model(input_features=frames, position_ids=positions, lengths=torch.tensor([3, 2])).last_hidden_state
    told = model(input_features=frames, cu_seq_lens_q=torch.tensor([0, 3, 5])).last_hidden_state
    alone = torch.cat([model(input_features=part).last_hidden_state for part in frames.split([3, 2], dim=1)], dim=1)
    torch.testing.assert_close(flat, alone, **CLOSE)
    torch.testing.assert_close(told, alone, **CLOSE)


def test_an_encoder_decoder_takes_lengths_alone():
    model = DynMaskSeq2SeqModel(DynMaskSeq2SeqConfig(**SIZES, **ATTENTION, decoder_start_token_id=1))
    with pytest.raises(ValueError, match="`cu_seq_lens_q` must be None in an encoder-decoder, which has two sides"):
        model(**INPUT, decoder_input_ids=INPUT["input_ids"], cu_seq_lens_q=CU_SEQ_LENS)


@pytest.mark.parametrize("others", ["cu_seq_lens", "both", "lengths as a list"])
def test_flat_batches_of_others_in_a_graph(others):
    model = attention(DynMaskForTokenClassification)
    batch = {name: value for name, value in OTHERS[others].items() if not name.startswith("max_length")}
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(**batch).logits, model(**batch).logits, **CLOSE)


def test_positions_that_restart_are_refused_in_a_graph():
    """The number of sequences is a size, which a graph would have to read from their values."""
    compiled = torch.compile(attention(DynMaskForTokenClassification), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="must come with `lengths` or `cu_seq_lens_q` in a graph"):
        compiled(**OTHERS["position_ids"])
    rows = {"input_ids": INPUT["input_ids"], "position_ids": torch.arange(12)[None]}
    torch.testing.assert_close(compiled(**rows).logits, compiled(input_ids=INPUT["input_ids"]).logits, **CLOSE)


# --- Integers of any size --------------------------------------------------------------------------------------------

SMALL = [torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint32]
READING = "(causal | prefix) & visible & segments & select(full, window(2))"
OF_SEQUENCES: dict[str, Any] = {
    "prefix_lengths": torch.tensor([2, 0, 100, 1]),
    "hidden_spans": torch.tensor([[[2, 127]], [[0, 0]], [[3, 1]], [[127, 127]]]),
    "mask_choice": torch.tensor([0, 1, 1, 0]),
}
FIELDS: dict[str, Any] = OF_SEQUENCES | {"segment_ids": torch.tensor([[5, 5, 5, 6, 7, 1, 1, 1, 2, 2, 127, 127]])}
TOLD: dict[str, dict[str, Any]] = {
    "lengths": {"lengths": torch.tensor([4, 1, 5, 2])},
    "cu_seq_lens": {"cu_seq_lens_q": CU_SEQ_LENS, "cu_seq_lens_k": CU_SEQ_LENS},
    "position_ids": {"position_ids": RESTARTING},
    "seq_idx": {"seq_idx": torch.tensor([[0] * 4 + [1] + [2] * 5 + [0] * 2])},
}


def in_dtype(arguments, dtype):
    return {name: value.to(dtype) for name, value in arguments.items()}


@pytest.mark.parametrize("dtype", SMALL, ids=str)
@pytest.mark.parametrize("told", TOLD)
def test_integers_of_any_size(told, dtype):
    model = attention(DynMaskForTokenClassification, mask=READING, type_vocab_size=2)
    batch = (
        INPUT | TOLD[told] | FIELDS | {"token_type_ids": torch.arange(12)[None] % 2, "labels": INPUT["input_ids"] % 2}
    )
    expected, found = model(**batch), model(**in_dtype(batch, dtype))
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.loss, expected.loss)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32], ids=str)
def test_integers_of_any_size_in_a_graph(dtype):
    torch.compiler.reset()
    model = attention(DynMaskForMaskedLM, mask=READING)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for told in ("lengths", "cu_seq_lens"):
        batch = INPUT | TOLD[told] | FIELDS | {"labels": INPUT["input_ids"]}
        expected, found = model(**batch), compiled(**in_dtype(batch, dtype))
        torch.testing.assert_close(found.logits, expected.logits, **CLOSE)
        torch.testing.assert_close(found.loss, expected.loss, **CLOSE)


def test_positions_of_any_size_behind_an_offset():
    model = attention(DynMaskModel, position_offset=100, max_position_embeddings=300)
    positions = torch.arange(100, 112)[None] + 20
    expected = model(**INPUT, position_ids=positions).last_hidden_state
    for dtype in (torch.uint8, torch.int16):
        assert torch.equal(model(**INPUT, position_ids=positions.to(dtype)).last_hidden_state, expected)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32], ids=str)
@pytest.mark.parametrize("name", ["causal LM", "masked LM", "answers"])
def test_labels_of_any_size(name, dtype):
    model = MODELS[name]().train()
    model.config.attention_probs_dropout_prob = 0.0
    labels = torch.where(torch.arange(12) % 3 == 0, -100, INPUT["input_ids"])
    targets = (
        {"labels": labels}
        if name != "answers"
        else {"start_positions": CU_SEQ_LENS[1:], "end_positions": CU_SEQ_LENS[1:]}
    )
    expected = model(**INPUT, **TOLD["lengths"], **targets).loss
    assert torch.equal(model(**INPUT, **TOLD["lengths"], **in_dtype(targets, dtype)).loss, expected)


NOT_INTEGERS = {
    "lengths": torch.ones(4),
    "cu_seq_lens_q": CU_SEQ_LENS.double(),
    "position_ids": RESTARTING.float(),
    "seq_idx": torch.zeros(1, 12),
    "token_type_ids": torch.zeros(1, 12, dtype=torch.bool),
    "prefix_lengths": torch.ones(1),
    "hidden_spans": torch.ones(1, 1, 2),
    "segment_ids": torch.ones(1, 12),
    "mask_choice": torch.ones(1, dtype=torch.bool),
}


@pytest.mark.parametrize("name", NOT_INTEGERS)
def test_arguments_that_are_no_integers(name):
    model = attention(DynMaskForTokenClassification, mask=READING, type_vocab_size=2)
    batch = INPUT | {name: field[:1] for name, field in FIELDS.items()} | {name: NOT_INTEGERS[name]}
    with pytest.raises(ValueError, match=f"`{name}` must be integers; got dtype {NOT_INTEGERS[name].dtype}"):
        model(**batch)


def test_tokens_and_labels_that_are_no_integers():
    model = attention(DynMaskForMaskedLM)
    with pytest.raises(ValueError, match="`input_ids` must be integers; got dtype torch.float32"):
        model(input_ids=INPUT["input_ids"].float())
    with pytest.raises(ValueError, match="`labels` must be integers; got dtype torch.float32"):
        model(**INPUT, labels=INPUT["input_ids"].float())


# --- Masks that number documents --------------------------------------------------------------------------------------

NUMBERED = [[1, 1, 2, 2, 0], [1, 1, 2, 2, 3], [0, 0, 2, 2, 2], [2, 2, 2, 2, 2], [1, 1, 1, 1, -1], [1, 255, 0, 0, 0]]
NUMBERED += [[1.0, 0.5, 0.0, 0.0, 0.0], [0.0, 0.0, -torch.inf, 0.0, 0.0], [1.0, torch.nan, 0.0, 0.0, 0.0]]
ROW = {"input_ids": torch.arange(5, 10)[None]}


@pytest.mark.parametrize("mask", NUMBERED, ids=str)
@pytest.mark.parametrize("name", ["bare", "causal LM", "a class", "answers", "recurrent, token classes"])
def test_masks_that_number_documents(name, mask):
    match = r"`attention_mask` must hold only 0 and 1; got .*`position_ids` that restart, or by `segment_ids`"
    with pytest.raises(ValueError, match=match):
        MODELS[name]()(**ROW, attention_mask=torch.tensor([mask]))


def test_documents_of_one_row():
    """What the message says to give."""
    model = attention(DynMaskForTokenClassification, mask="segments", position_type="none")
    numbers = torch.tensor([[1, 1, 2, 2, 2]])
    by_field = model(**ROW, segment_ids=numbers).logits
    by_positions = model(**ROW, position_ids=torch.tensor([[0, 1, 0, 1, 2]]), segment_ids=0 * numbers).logits
    torch.testing.assert_close(by_field, by_positions, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float32], ids=str)
def test_masks_that_number_documents_in_a_graph(dtype):
    torch.compiler.reset()
    compiled = torch.compile(attention(DynMaskForTokenClassification), backend="eager", fullgraph=True)
    with pytest.raises(ValueError, match="`attention_mask` must hold only 0 and 1; got 2"):
        compiled(**ROW, attention_mask=torch.tensor([[1, 1, 2, 2, 0]], dtype=dtype))


@pytest.mark.parametrize("side", ["attention_mask", "decoder_attention_mask"])
def test_masks_of_both_sides(side):
    model = DynMaskSeq2SeqModel(DynMaskSeq2SeqConfig(**SIZES, **ATTENTION, decoder_start_token_id=1))
    with pytest.raises(ValueError, match="`attention_mask` must hold only 0 and 1; got 2"):
        model(**ROW, decoder_input_ids=ROW["input_ids"], **{side: torch.tensor([[1, 1, 2, 2, 0]])})


def test_generation_refuses_masks_that_number_documents():
    with pytest.raises(ValueError, match="`attention_mask` must hold only 0 and 1; got 2"):
        MODELS["causal LM"]().generate(**ROW, attention_mask=torch.tensor([[1, 1, 2, 2, 2]]), max_new_tokens=2)


@pytest.mark.parametrize("shape", [(1, 5, 5), (1, 1, 5, 5), (1, 2, 5, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.uint8], ids=str)
def test_explicit_masks_are_bool(shape, dtype):
    """A mask that is added to the scores is not taken for one of zeros and ones."""
    with pytest.raises(ValueError, match=f"the field `attention_mask` must be bool; got {dtype}"):
        attention(DynMaskModel)(**ROW, attention_mask=torch.zeros(shape, dtype=dtype))
