"""Masks on whole models: missing values, explicit masks, masks by head, row and learned score, changes, sharing."""

# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportArgumentType=false

import pytest
import torch
from test_modeling import LENGTHS, batch, config, present
from transformers import BertConfig, BertModel

from hf_dynmask import (
    DynMaskForCausalLM,
    DynMaskForMaskedLM,
    DynMaskForMultipleChoice,
    DynMaskForQuestionAnswering,
    DynMaskForSequenceClassification,
    DynMaskForTokenClassification,
    DynMaskModel,
    from_transformers,
    masks,
    set_mask,
)

WIDTH = 9
MISSING = torch.zeros(len(LENGTHS), WIDTH, dtype=torch.bool)
MISSING[0, [0, 3]] = MISSING[1, 2] = MISSING[3, 0] = MISSING[5, [1, 2, 3]] = True


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def outputs_and_gradients(model, loss_of, **inputs):
    model.zero_grad()
    outputs = model(**inputs)
    loss_of(outputs).backward()
    return outputs, {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("mask", ["full", "causal & window(2, 0)", "segments", "chunk(3) | diagonal", "random(0.5, 1)"])
@pytest.mark.parametrize("implementation", ["dynmask", "sdpa", "eager"])
def test_a_missing_value_is_a_key_of_none_and_keeps_its_position(mask, implementation):
    model = DynMaskModel(config(mask=mask)).eval()
    model.set_attn_implementation(implementation)
    inputs = batch()
    found = model(**inputs, missing=MISSING).last_hidden_state
    kept = present() & ~MISSING
    assert (found[~kept] == 0).all()
    explicit = DynMaskModel(config(mask="dense")).eval()
    explicit.load_state_dict(model.state_dict())
    allowed = masks.parse(mask).dense(torch.full_like(LENGTHS, WIDTH), fields={"segment_ids": inputs["segment_ids"]})
    expected = explicit(inputs["input_ids"], attention_mask=allowed & kept[:, None, None]).last_hidden_state
    torch.testing.assert_close(found[kept], expected[kept], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("flat", [False, True])
def test_expanded_queries_as_colbert_has_them(flat):
    """`[MASK]` tokens behind a query see it and are seen by none (arXiv:2004.12832, section 3.2)."""
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 40, "max_position_embeddings": 16}
    stock = BertModel(BertConfig(**sizes, attn_implementation="eager")).eval()
    ours = from_transformers(stock, mask="visible").eval()
    mask_id, tokens, width = 4, torch.tensor([5, 3, 8]), 8
    is_query = torch.arange(width) < tokens[:, None]
    input_ids = torch.randint(5, 50, (3, width)).where(is_query, mask_id)
    spans = torch.stack([tokens, width - tokens], -1)[:, None]
    expected = stock(input_ids, attention_mask=is_query.long()).last_hidden_state
    inputs = {"input_ids": input_ids.reshape(1, -1) if flat else input_ids, "lengths": torch.tensor([width] * 3)}
    found = ours(**inputs, hidden_spans=spans).last_hidden_state
    torch.testing.assert_close(found.view(3, width, -1), expected, atol=1e-5, rtol=1e-5)


HEADS = {
    DynMaskForMaskedLM: {"labels": torch.randint(5, 99, (len(LENGTHS), WIDTH))},
    DynMaskForTokenClassification: {"labels": torch.randint(0, 2, (len(LENGTHS), WIDTH))},
    DynMaskForSequenceClassification: {"labels": torch.randint(0, 2, (len(LENGTHS),))},
    DynMaskForQuestionAnswering: {
        "start_positions": torch.tensor([1, 0, 0, 0, 2, 0]),
        "end_positions": torch.tensor([2, 1, 0, 0, 6, 4]),
    },
}


@pytest.mark.parametrize("head", HEADS, ids=lambda head: head.__name__)
@pytest.mark.parametrize("implementation", ["dynmask", "eager"])
def test_nan_in_a_missing_value_reaches_nothing(head, implementation):
    """Float inputs with NaN where the value is missing, in every head: no output and no gradient changes by one bit."""
    model = head(config(mask="causal | prefix(2)", position_type="sinusoidal"))
    model.set_attn_implementation(implementation)
    values = torch.randn(len(LENGTHS), WIDTH, 32)
    results = []
    for fill in (0.0, torch.nan):
        poisoned = values.masked_fill((MISSING | ~present())[..., None], fill).requires_grad_()
        results.append(
            (
                poisoned,
                *outputs_and_gradients(
                    model, lambda out: out.loss, inputs_embeds=poisoned, lengths=LENGTHS, missing=MISSING, **HEADS[head]
                ),
            )
        )
    (clean, expected, gradients), (poisoned, found, found_gradients) = results
    assert expected.loss.isfinite() and torch.equal(expected.loss, found.loss)
    assert gradients and all(torch.equal(gradients[name], found_gradients[name]) for name in gradients)
    assert torch.equal(clean.grad, poisoned.grad)
    assert (clean.grad[MISSING | ~present()] == 0).all()


def test_missing_in_multiple_choice():
    model = DynMaskForMultipleChoice(config()).eval()
    tokens = torch.randint(5, 99, (2, 3, WIDTH))
    lengths = torch.tensor([[9, 4, 5], [3, 3, 8]])
    missing = torch.zeros(2, 3, WIDTH, dtype=torch.bool)
    missing[0, 1, 2] = missing[1, 2, 1] = True
    expected = model(tokens, lengths=lengths, missing=missing).logits
    changed = torch.where(missing, 7, tokens)
    assert torch.equal(model(changed, lengths=lengths, missing=missing).logits, expected)
    assert not torch.equal(model(changed, lengths=lengths).logits, expected)


def test_missing_in_a_flat_batch_and_on_the_left():
    model = DynMaskModel(config(mask="window(2)")).eval()
    inputs = batch()
    expected = model(inputs["input_ids"], lengths=LENGTHS, missing=MISSING).last_hidden_state
    flat = model(inputs["input_ids"][present()][None], lengths=LENGTHS, missing=MISSING[present()][None])
    torch.testing.assert_close(flat.last_hidden_state[0], expected[present()], atol=1e-5, rtol=1e-5)
    turned = model(
        inputs["input_ids"].roll(2, 1), attention_mask=present().roll(2, 1).long(), missing=MISSING.roll(2, 1)
    )
    torch.testing.assert_close(turned.last_hidden_state.roll(-2, 1), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("missing", [torch.zeros(6, 9), torch.zeros(6, 8, dtype=torch.bool)], ids=["float", "narrow"])
def test_missing_of_wrong_kind(missing):
    with pytest.raises(ValueError, match=r"`missing` must be bool of shape \(6, 9\); got torch"):
        DynMaskModel(config())(**batch(), missing=missing)


@pytest.mark.parametrize("implementation", ["dynmask", "sdpa", "eager"])
def test_an_explicit_mask_is_joined_to_the_configured_one(implementation):
    """Rows of any padding: the explicit mask speaks of places in the row."""
    model = DynMaskModel(config(mask="causal")).eval()
    model.set_attn_implementation(implementation)
    inputs = batch()
    lower = torch.ones(WIDTH, WIDTH, dtype=torch.bool).tril()
    explicit = torch.rand(len(LENGTHS), WIDTH, WIDTH) < 0.6
    by_head = torch.rand(len(LENGTHS), 4, WIDTH, WIDTH) < 0.6
    for mask in (explicit, by_head):
        found = model(inputs["input_ids"], lengths=LENGTHS, attention_mask=mask).last_hidden_state
        bidirectional = DynMaskModel(config(mask="dense")).eval()
        bidirectional.load_state_dict(model.state_dict())
        expected = bidirectional(inputs["input_ids"], lengths=LENGTHS, attention_mask=mask & lower).last_hidden_state
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_an_explicit_mask_hides_keys_of_one_example_alone():
    model = DynMaskModel(config()).eval()
    tokens = torch.randint(5, 99, (2, 5))
    mask = torch.ones(2, 5, 5, dtype=torch.bool)
    mask[0, :, 2:] = False
    plain = model(tokens).last_hidden_state
    masked = model(tokens, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(masked[1], plain[1], atol=1e-6, rtol=1e-6)
    changed = tokens.clone()
    changed[0, 2:] = 7
    again = model(changed, attention_mask=mask).last_hidden_state
    assert torch.equal(again[0, :2], masked[0, :2]) and not torch.equal(again[0, 2:], masked[0, 2:])


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(6, 9, 8, dtype=torch.bool), r"must have shape \(6, 9, 9\) or \(6, heads, 9, 9\); got \(6, 9, 8\)"),
        (torch.zeros(6, 1, 9, 9), r"the field `attention_mask` must be bool; got torch.float32"),
    ],
    ids=["shape", "dtype"],
)
def test_an_explicit_mask_of_wrong_kind(mask, message):
    with pytest.raises(ValueError, match=message):
        DynMaskModel(config())(**batch(), attention_mask=mask)


def test_rows_choose_their_mask():
    model = DynMaskModel(config(mask="select(full, causal, window(1))")).eval()
    inputs = batch()
    choice = torch.tensor([0, 1, 2, 0, 2, 1])
    found = model(**inputs, mask_choice=choice).last_hidden_state
    for k, mask in enumerate(["full", "causal", "window(1)"]):
        model.set_mask(mask)
        torch.testing.assert_close(found[choice == k], model(**inputs).last_hidden_state[choice == k])
        model.set_mask("select(full, causal, window(1))")
    with pytest.raises(ValueError, match=r"`mask_choice` must hold 0 to 2 .* got 3"):
        model(**inputs, mask_choice=choice + 1)


def test_masks_of_heads_must_divide_them():
    with pytest.raises(Exception, match=r"`heads` must be given a number of masks that divides the 4 heads; got 3"):
        config(mask="heads(full, causal, window(1))")


class TestLearnedChoice:
    def test_gradients_reach_the_scores(self):
        model = DynMaskForMaskedLM(config(mask="causal & topk(2)"))
        inputs = batch()
        model(inputs["input_ids"], lengths=LENGTHS, labels=inputs["input_ids"]).loss.backward()
        assert all(layer.attention.key_scores.scale.grad.abs().sum() > 0 for layer in model.model.layers)

    def test_every_implementation_gives_the_same(self):
        model = DynMaskModel(config(mask="heads(causal & topk(2), window(2) | topk(1))", num_key_value_heads=2)).eval()
        for layer in model.layers:
            torch.nn.init.normal_(layer.attention.key_scores.scale)
        inputs = batch()
        expected = model(**inputs).last_hidden_state
        for implementation in ("sdpa", "eager"):
            model.set_attn_implementation(implementation)
            torch.testing.assert_close(model(**inputs).last_hidden_state, expected, atol=1e-5, rtol=1e-5)

    def test_a_model_without_scores_says_so(self):
        model = DynMaskModel(config())
        with pytest.raises(ValueError, match=r"'topk\(3\)' needs weights that score keys"):
            model.set_mask("topk(3)")
        assert model.config.mask is None


class TestSetMask:
    def test_it_takes_hold_and_is_saved(self, tmp_path):
        model = DynMaskModel(config()).eval()
        inputs = batch()
        model.set_mask("window(1)")
        model.save_pretrained(tmp_path)
        expected = DynMaskModel.from_pretrained(tmp_path).eval()
        assert expected.config.mask == "window(1)"
        torch.testing.assert_close(model(**inputs).last_hidden_state, expected(**inputs).last_hidden_state)
        model.set_mask(["full", "causal"])
        assert model.config.layer_masks == ["full", "causal"]
        model.set_mask("full")
        assert model.config.layer_masks is None

    @pytest.mark.parametrize("set_none", [lambda model: set_mask(model, None), lambda model: model.set_mask(None)])
    def test_none_is_the_mask_of_a_model_without_one(self, set_none):
        for model_class, own in ((DynMaskModel, "full"), (DynMaskForCausalLM, "causal")):
            model, fresh = (model_class(config(mask=mask)).eval() for mask in ("window(1)", None))
            fresh.load_state_dict(model.state_dict())
            set_none(model)
            assert (model.config.mask, model.config.layer_masks) == (own, None)
            inputs = batch()
            torch.testing.assert_close(model(**inputs)[0], fresh(**inputs)[0])

    @pytest.mark.parametrize(
        ("mask", "message"),
        [("fulll", "did you mean `full`"), (["full"], "one entry a layer, num_hidden_layers=2; got 1")],
        ids=["unknown", "too few"],
    )
    def test_a_wrong_mask_changes_nothing(self, mask, message):
        model = DynMaskModel(config(mask="causal"))
        with pytest.raises(ValueError, match=message):
            model.set_mask(mask)
        assert (model.config.mask, model.config.layer_masks) == ("causal", None)


def test_a_custom_mask_is_not_saved(tmp_path):
    masks.register("even", lambda i, j: j % 2 == 0)
    model = DynMaskModel(config(mask="custom(even)"))
    model(**batch())
    for what in (model, model.config):
        with pytest.raises(ValueError, match=r"`custom\(...\)` mask cannot be saved.* got 'custom\(even\)'"):
            what.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


class TestMaskOnWeights:
    def test_weights_of_hidden_keys_are_0_and_the_others_stay(self):
        torch.manual_seed(0)
        model = DynMaskModel(config(mask="causal", apply_mask_to="weights", num_hidden_layers=1)).eval()
        model.set_attn_implementation("eager")
        inputs = batch()
        found = model(**inputs, output_attentions=True).attentions[0]
        model.set_mask("full")
        full = model(**inputs, output_attentions=True).attentions[0]
        torch.testing.assert_close(found, full.tril())
        assert (found.sum(-1) < 0.99).any()

    def test_only_the_reference_serves_it(self):
        model = DynMaskModel(config(apply_mask_to="weights"))
        model(**batch())
        model.set_attn_implementation("sdpa")
        with pytest.raises(
            ValueError, match=r"`apply_mask_to='weights'` needs the implementation 'reference'; got 'sdpa'"
        ):
            model(**batch())
