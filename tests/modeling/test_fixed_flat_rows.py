"""Flat rows of a fixed size: places behind the last sequence change nothing, whatever stands there, in any head; and
neither does a device whose values the host does not look at."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportOptionalMemberAccess=false

import sys

import pytest
import torch

import hf_dynmask
from graphs import CLOSE, SIZES, ids
from hf_dynmask import DynMaskConfig, DynMaskSeq2SeqConfig

LENGTHS = torch.tensor([5, 1, 9, 0, 3])
TARGETS = torch.tensor([2, 4, 1, 1, 3])
ROWS, SLOTS = len(LENGTHS), 8
TAIL = 7


@pytest.fixture(params=[False, True], ids=["read", "unread"], autouse=True)
def reads(request, monkeypatch):
    """Whether the host looks at values; without, layouts are those of other devices."""
    torch.manual_seed(0)
    if request.param:
        modules = [module for name, module in sys.modules.items() if name.startswith("hf_dynmask.modeling.")]
        for module in modules:
            if hasattr(module, "reads_are_free"):
                monkeypatch.setattr(module, "reads_are_free", lambda device: False)
    return not request.param


def flat(rows, lengths, fill, tail=TAIL):
    """The tokens of `rows (B, T, ...)` in one row, with places behind them."""
    present = torch.arange(rows.shape[1]) < lengths[:, None]
    behind = rows.new_full((tail, *rows.shape[2:]), fill)
    return torch.cat([rows[present], behind])[None]


def slots(values, fill):
    """Values of sequences `(S, ...)`, with slots behind them."""
    return torch.cat([values, values.new_full((SLOTS - len(values), *values.shape[1:]), fill)])


def heads():
    """Name of a class, its configuration, and labels of rows and of flat rows."""
    width = int(LENGTHS.max())
    tokens, classes = ids(ROWS, width), torch.randint(0, 3, (ROWS,))
    of_tokens = {"labels": tokens}, {"labels": flat(tokens, LENGTHS, -100)}
    yield "DynMaskForMaskedLM", {}, *of_tokens
    yield "DynMaskForCausalLM", {}, *of_tokens
    labels = tokens % 3
    yield "DynMaskForTokenClassification", {"num_labels": 3}, {"labels": labels}, {"labels": flat(labels, LENGTHS, 1)}
    yield "DynMaskForSequenceClassification", {"num_labels": 3}, {"labels": classes}, {"labels": slots(classes, -100)}
    values = torch.randn(ROWS)
    yield "DynMaskForSequenceClassification", {"num_labels": 1}, {"labels": values}, {"labels": slots(values, -100.0)}
    several = torch.randint(0, 2, (ROWS, 3)).float()
    yield "DynMaskForSequenceClassification", {"num_labels": 3}, {"labels": several}, {"labels": slots(several, -100.0)}
    ends = {"start_positions": torch.tensor([0, 0, 3, 0, 7]), "end_positions": torch.tensor([4, 0, 8, 0, 2])}
    yield "DynMaskForQuestionAnswering", {}, ends, {name: slots(places, 0) for name, places in ends.items()}


def gradients(model, **inputs):
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    return output.loss, {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def assert_equal(model, rows, fixed):
    loss, expected = gradients(model, **rows)
    found_loss, found = gradients(model, **fixed)
    torch.testing.assert_close(found_loss, loss, **CLOSE)
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("mask", ["full", "causal & window(2, 0)", "segments | diagonal"])
@pytest.mark.parametrize("case", range(7))
def test_losses_and_gradients_are_those_of_rows(case, mask):
    name, settings, of_rows, of_flat = list(heads())[case]
    model = getattr(hf_dynmask, name)(DynMaskConfig(**SIZES | settings, mask=mask)).train()
    tokens, segments = ids(ROWS, int(LENGTHS.max())), torch.randint(0, 2, (ROWS, int(LENGTHS.max())))
    rows = {"input_ids": tokens, "lengths": LENGTHS, "segment_ids": segments} | of_rows
    fixed = {"input_ids": flat(tokens, LENGTHS, 5), "segment_ids": flat(segments, LENGTHS, 1)}
    assert_equal(model, rows, fixed | {"lengths": slots(LENGTHS, 0)} | of_flat)


def test_both_sides_of_an_encoder_decoder():
    sides = {name: SIZES | {"mask": mask} for name, mask in (("encoder", "full"), ("decoder", "causal"))}
    config = DynMaskSeq2SeqConfig(**sides, decoder_start_token_id=1, pad_token_id=0)
    model = hf_dynmask.DynMaskForConditionalGeneration(config).train()
    tokens, targets = ids(ROWS, 9), ids(ROWS, 4)
    rows = {"input_ids": tokens, "lengths": LENGTHS, "labels": targets, "decoder_lengths": TARGETS}
    fixed = {"input_ids": flat(tokens, LENGTHS, 0), "lengths": slots(LENGTHS, 0)}
    fixed |= {"labels": flat(targets, TARGETS, -100, tail=3), "decoder_lengths": slots(TARGETS, 0)}
    assert_equal(model, rows, fixed)


@pytest.mark.parametrize("strides", [[1, 1], [1, 2], [3, 1]])
def test_frames(strides):
    settings = {"num_features": 4, "conv_kernel": [3, 5], "conv_stride": strides, "num_labels": 3}
    model = hf_dynmask.DynMaskForSequenceClassification(DynMaskConfig(**SIZES | settings)).train()
    frames, labels = torch.randn(ROWS, 9, 4), torch.randint(0, 3, (ROWS,))
    missing = torch.rand(ROWS, 9) < 0.3
    rows = {"input_features": frames, "lengths": LENGTHS, "labels": labels}
    fixed = {"input_features": flat(frames, LENGTHS, torch.nan), "lengths": slots(LENGTHS, 0)}
    fixed |= {"labels": slots(labels, -100)}
    assert_equal(model, rows, fixed)
    assert_equal(model, rows | {"missing": missing}, fixed | {"missing": flat(missing, LENGTHS, True)})


def test_ctc():
    settings = {"num_features": 4, "conv_kernel": [3], "conv_stride": [1], "pad_token_id": 0, "ctc_zero_infinity": True}
    model = hf_dynmask.DynMaskForCTC(DynMaskConfig(**SIZES | settings)).train()
    frames, labels = torch.randn(ROWS, 9, 4), ids(ROWS, 2)
    rows = {"input_features": frames[LENGTHS > 0], "lengths": LENGTHS[LENGTHS > 0], "labels": labels[LENGTHS > 0]}
    fixed = {"input_features": flat(frames, LENGTHS, torch.nan), "lengths": slots(LENGTHS[LENGTHS > 0], 0)}
    assert_equal(model, rows, fixed | {"labels": slots(labels[LENGTHS > 0], -100)})


def test_missing_tokens():
    model = hf_dynmask.DynMaskForTokenClassification(DynMaskConfig(**SIZES, mask="causal & window(3, 0)")).train()
    tokens, missing = ids(ROWS, 9), torch.rand(ROWS, 9) < 0.4
    labels = tokens % 2
    rows = {"input_ids": tokens, "lengths": LENGTHS, "missing": missing, "labels": labels}
    fixed = {"input_ids": flat(tokens, LENGTHS, 0), "lengths": slots(LENGTHS, 0)}
    fixed |= {"missing": flat(missing, LENGTHS, False), "labels": flat(labels, LENGTHS, -100)}
    assert_equal(model, rows, fixed)


def test_outputs_are_0_behind_the_last_sequence_and_nothing_there_is_read():
    model = hf_dynmask.DynMaskModel(DynMaskConfig(**SIZES, mask="causal")).train()
    embeds = torch.randn(1, int(LENGTHS.sum()) + TAIL, 16)
    outputs = []
    for value in (torch.nan, torch.inf, 3.0):
        embeds = embeds.detach().clone()
        embeds[:, -TAIL:] = value
        output = model(inputs_embeds=embeds.requires_grad_(), lengths=slots(LENGTHS, 0)).last_hidden_state
        weights = [*model.layers.parameters()]
        grads = torch.autograd.grad(output.square().sum(), [embeds, *weights])
        assert (output[:, -TAIL:] == 0).all() and (grads[0][:, -TAIL:] == 0).all()
        assert all(grad.isfinite().all() for grad in grads)
        outputs.append((output, *grads))
    for others in outputs[1:]:
        assert all(torch.equal(one, other) for one, other in zip(outputs[0], others, strict=True))


def test_more_tokens_than_places(reads):
    if not reads:
        pytest.skip("values are not looked at")
    model = hf_dynmask.DynMaskModel(DynMaskConfig(**SIZES))
    with pytest.raises(ValueError, match="`lengths` of a flat batch must add up to at most its width 17; got a sum of"):
        model(ids(1, 17), lengths=slots(LENGTHS, 0))
