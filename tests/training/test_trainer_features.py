"""Features of the Trainer that look at the shape of a batch, or at the name of a model."""

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.integrations.neftune import activate_neftune, deactivate_neftune
from transformers.trainer_pt_utils import LabelSmoother

from hf_dynmask import (
    DynMaskConfig,
    DynMaskForCausalLM,
    DynMaskForConditionalGeneration,
    DynMaskForMaskedLM,
    DynMaskRecurrentConfig,
    DynMaskRecurrentForTokenClassification,
    DynMaskSeq2SeqConfig,
    to_transformers,
)

SIZES: dict[str, Any] = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1}
ATTENTION: dict[str, Any] = {"num_attention_heads": 2, "intermediate_size": 16}
LENGTHS = torch.tensor([9, 4, 16, 4, 0, 1])
ALPHA = 5.0


def rows() -> dict[str, torch.Tensor]:
    ids = torch.arange(len(LENGTHS) * 16).view(-1, 16) % 40 + 5
    return {"input_ids": ids, "lengths": LENGTHS}


def flat() -> dict[str, torch.Tensor]:
    ids = torch.cat([row[:length] for row, length in zip(rows()["input_ids"], LENGTHS, strict=True)])
    return {"input_ids": ids[None], "lengths": LENGTHS}


NOISY = {
    "masked LM": lambda: DynMaskForMaskedLM(DynMaskConfig(**SIZES, **ATTENTION)),
    "causal LM": lambda: DynMaskForCausalLM(DynMaskConfig(**SIZES, **ATTENTION)),
    "recurrent": lambda: DynMaskRecurrentForTokenClassification(DynMaskRecurrentConfig(**SIZES)),
}


@pytest.mark.parametrize("batch", [rows, flat])
@pytest.mark.parametrize("name", NOISY)
def test_the_noise_of_neftune_goes_by_the_length_of_each_sequence(name, batch):
    """`alpha / sqrt(length * width)`, whatever else is in the batch (arXiv:2310.05914, algorithm 1)."""
    torch.manual_seed(0)
    model = NOISY[name]().train()
    table, noise = model.get_input_embeddings(), {}
    handle = activate_neftune(model, ALPHA)

    def see(module, inputs, output):
        clean = torch.nn.functional.embedding(inputs[0], module.weight)
        noise[output.shape[1]] = max(noise.get(output.shape[1], 0), (output - clean).abs().max().item())

    table.register_forward_hook(see)
    for _ in range(3):  # the largest of many numbers is near the bound
        model(**batch())
    assert sorted(noise) == sorted({*LENGTHS.tolist()} - {0})
    for length, largest in noise.items():
        bound = ALPHA / (length * SIZES["hidden_size"]) ** 0.5
        assert 0.8 * bound < largest <= bound * (1 + 1e-6)
    deactivate_neftune(model, handle)
    torch.testing.assert_close(model.eval()(**rows()).logits[0, :9], model(**flat()).logits[0, :9])


def test_noise_in_a_batch_without_tokens():
    model = NOISY["masked LM"]().train()
    activate_neftune(model, ALPHA)
    assert model(input_ids=torch.zeros(2, 3, dtype=torch.long), lengths=torch.tensor([0, 0])).logits.shape == (2, 3, 50)


def smoothed(model: PreTrainedModel, batch: dict[str, Any], labels: torch.Tensor, tmp_path) -> float:
    args = TrainingArguments(str(tmp_path), label_smoothing_factor=0.2, report_to=[], use_cpu=True)
    return Trainer(model.eval(), args).compute_loss(model, {**batch, "labels": labels}).item()  # type: ignore[union-attr]


class OfAUser(DynMaskForCausalLM):
    pass


@pytest.mark.parametrize("kind", [DynMaskForCausalLM, OfAUser])
def test_label_smoothing_of_a_causal_model_shifts_labels(kind, tmp_path):
    torch.manual_seed(0)
    model = kind(
        DynMaskConfig(
            **SIZES,
            **ATTENTION,
            position_type="rotary",
            norm_type="rms_norm",
            norm_placement="pre",
            embedding_norm=False,
            gated_feed_forward=True,
            hidden_act="silu",
            attention_bias=False,
            mlp_bias=False,
            hidden_dropout_prob=0.0,
            use_pooler=False,
        )
    )
    batch = rows()
    present = torch.arange(16) < LENGTHS[:, None]
    labels = batch["input_ids"].where(present, -100)
    stock = to_transformers(model, "llama").eval()
    masked = {"input_ids": batch["input_ids"], "attention_mask": present.long()}
    right = smoothed(stock, masked, labels, tmp_path)
    assert smoothed(model, batch, labels, tmp_path) == pytest.approx(right, abs=1e-5)
    firsts = torch.cat([torch.zeros(1, dtype=torch.long), LENGTHS.cumsum(0)[:-1]])[LENGTHS > 0]
    of_flat = flat()["input_ids"].index_fill(1, firsts, -100)
    assert smoothed(model, flat(), of_flat, tmp_path) == pytest.approx(right, abs=1e-5)


def test_label_smoothing_of_a_masked_model_and_of_an_encoder_decoder_does_not(tmp_path):
    torch.manual_seed(0)
    batch = rows()
    labels = batch["input_ids"].where(torch.arange(16) < LENGTHS[:, None], -100)
    model = NOISY["masked LM"]()
    right = LabelSmoother(0.2)(model.eval()(**batch), labels).item()
    assert smoothed(model, batch, labels, tmp_path) == pytest.approx(right, abs=1e-6)
    pairs = DynMaskForConditionalGeneration(DynMaskSeq2SeqConfig(**SIZES, **ATTENTION, decoder_start_token_id=1)).eval()
    batch |= {"decoder_input_ids": pairs.prepare_decoder_input_ids_from_labels(labels, LENGTHS)}
    batch |= {"decoder_lengths": LENGTHS}
    right = LabelSmoother(0.2)(pairs(**batch), labels).item()
    assert smoothed(pairs, batch, labels, tmp_path) == pytest.approx(right, abs=1e-6)
