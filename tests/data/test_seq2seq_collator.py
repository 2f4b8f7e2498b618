"""DataCollatorForSeq2SeqWithLengths: its two sides. (What each does with its columns is in the other files.)"""

import pickle
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    BartForConditionalGeneration,
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5ForConditionalGeneration,
)

from batches import assert_equal, assert_rows
from hf_dynmask import DynMaskForConditionalGeneration, DynMaskSeq2SeqConfig
from hf_dynmask.data import DataCollatorForSeq2SeqWithLengths, DataCollatorWithLengths

PAD, START = 3, 2
EXAMPLES = [{"input_ids": [5, 6, 7], "labels": [8, 9]}, {"input_ids": [9], "labels": [4, 5, 6, 7]}]
ROWS = {"input_ids": [[5, 6, 7], [9, PAD, PAD]], "lengths": [3, 1]}
TARGETS = {"labels": [[8, 9, -100, -100], [4, 5, 6, 7]], "decoder_lengths": [2, 4]}


@pytest.fixture(scope="module")
def tokenizer():
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0, "[PAD]": PAD})), pad_token="[PAD]")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 12,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
    }
    config = DynMaskSeq2SeqConfig(encoder=sizes, decoder=sizes, decoder_start_token_id=START, pad_token_id=PAD)
    return DynMaskForConditionalGeneration(config).eval()


@pytest.fixture
def collator(tokenizer):
    return DataCollatorForSeq2SeqWithLengths(tokenizer)


def test_rows(collator):
    assert_rows(collator(EXAMPLES), **ROWS, **TARGETS)


def test_flat(tokenizer, model):
    expected: dict[str, Any] = {"input_ids": [[5, 6, 7, 9]], "lengths": [3, 1]}
    expected |= {"labels": [[8, 9, 4, 5, 6, 7]], "decoder_lengths": [2, 4]}
    assert_equal(DataCollatorForSeq2SeqWithLengths(tokenizer, flat=True)(EXAMPLES), **expected)
    batch = DataCollatorForSeq2SeqWithLengths(tokenizer, model, flat=True)(EXAMPLES)
    assert_equal(batch, **expected, decoder_input_ids=[[START, 8, START, 4, 5, 6]])


def test_decoder_inputs_by_the_rule_of_the_model(tokenizer, model):
    batch = DataCollatorForSeq2SeqWithLengths(tokenizer, model)(EXAMPLES)
    assert_rows(batch, **ROWS, **TARGETS, decoder_input_ids=[[START, 8, PAD, PAD], [START, 4, 5, 6]])


@pytest.mark.parametrize("model_class", [BartForConditionalGeneration, T5ForConditionalGeneration])
def test_decoder_inputs_of_stock_models(model_class, tokenizer):
    """In flat batches, too, no target begins with the end of the one before."""
    sizes = {"d_model": 8, "d_ff": 8, "d_kv": 4, "num_layers": 1, "num_heads": 2, "encoder_layers": 1}
    sizes |= {"decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 12}
    config = model_class.config_class(**sizes, pad_token_id=PAD, decoder_start_token_id=START)
    features = [*EXAMPLES, {"input_ids": [4], "labels": []}]
    batch = DataCollatorForSeq2SeqWithLengths(tokenizer, model_class(config))(features)
    rows = [[START, 8, PAD, PAD], [START, 4, 5, 6], [PAD] * 4]
    assert batch["decoder_input_ids"].tolist() == rows
    batch = DataCollatorForSeq2SeqWithLengths(tokenizer, model_class(config), flat=True)(features)
    assert batch["decoder_input_ids"].tolist() == [[START, 8, START, 4, 5, 6]]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("flat", [False, True])
def test_losses_of_labels_taken_away_from_the_model(flat, smoothing, tokenizer, model, tmp_path):
    """With label smoothing, or a loss function of the user's, as on the stock collator's batches."""

    def loss_function(outputs, labels, num_items_in_batch=None):
        return torch.nn.functional.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten(), reduction="sum") / 6

    settings: dict[str, Any] = {} if smoothing else {"compute_loss_func": loss_function}
    arguments = Seq2SeqTrainingArguments(
        str(tmp_path), label_smoothing_factor=smoothing, use_cpu=True, report_to="none", disable_tqdm=True
    )
    trainer = Seq2SeqTrainer(model, arguments, **settings)
    expected = trainer.compute_loss(model, DataCollatorForSeq2Seq(tokenizer, model)(EXAMPLES))
    found = trainer.compute_loss(model, DataCollatorForSeq2SeqWithLengths(tokenizer, model, flat=flat)(EXAMPLES))
    torch.testing.assert_close(found, expected)


def test_labels_taken_away_from_a_model_without_decoder_inputs(collator, model, tmp_path):
    arguments = Seq2SeqTrainingArguments(str(tmp_path), label_smoothing_factor=0.1, use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match=r"got neither\. .* `DataCollatorForSeq2SeqWithLengths\(…, model=model\)`"):
        Seq2SeqTrainer(model, arguments).compute_loss(model, collator(EXAMPLES))


def test_decoder_inputs_of_the_examples_win(tokenizer, model):
    features = [{**example, "decoder_input_ids": [1] * len(example["labels"])} for example in EXAMPLES]
    batch = DataCollatorForSeq2SeqWithLengths(tokenizer, model)(features)
    assert_rows(batch, **ROWS, **TARGETS, decoder_input_ids=[[1, 1, PAD, PAD], [1, 1, 1, 1]])


def test_loss_is_that_of_padded_batches(tokenizer, model):
    """Rows, flat rows and the stock collator's attention mask say the same to a model."""
    stock = DataCollatorForSeq2Seq(tokenizer, model=None)
    expected = model(**stock(EXAMPLES)).loss
    for flat in (False, True):
        for given in (None, model):
            batch = DataCollatorForSeq2SeqWithLengths(tokenizer, given, flat=flat)(EXAMPLES)
            torch.testing.assert_close(model(**batch).loss, expected)


@pytest.mark.parametrize("flat", [False, True])
def test_source_is_that_of_the_collator_of_one_side(tokenizer, flat):
    columns = [
        {"token_type_ids": [0, 1, 1], "attention_mask": [1, 0, 1], "prefix_lengths": 2},
        {"token_type_ids": [1], "attention_mask": [1], "prefix_lengths": 0},
    ]
    sources = [{"input_ids": e["input_ids"], **column} for e, column in zip(EXAMPLES, columns, strict=True)]
    features = [{**source, "labels": e["labels"]} for source, e in zip(sources, EXAMPLES, strict=True)]
    batch = DataCollatorForSeq2SeqWithLengths(tokenizer, flat=flat)(features)
    expected = DataCollatorWithLengths(tokenizer, flat=flat)(sources)
    assert_equal({name: values for name, values in batch.items() if name in expected}, **expected)
    assert set(batch) == {*expected, "labels", "decoder_lengths"}


def test_columns_of_the_target(collator):
    features = [
        {**EXAMPLES[0], "decoder_segment_ids": [0, 1], "decoder_prefix_lengths": 1, "decoder_hidden_spans": [[0, 1]]},
        {**EXAMPLES[1], "decoder_segment_ids": [0, 0, 1, 1], "decoder_prefix_lengths": 2, "decoder_hidden_spans": []},
    ]
    assert_rows(
        collator(features),
        **ROWS,
        **TARGETS,
        decoder_segment_ids=[[0, 1, 0, 0], [0, 0, 1, 1]],
        decoder_prefix_lengths=[1, 2],
        decoder_hidden_spans=[[[0, 1]], [[0, 0]]],
    )


def test_absent_tokens_of_the_target(collator):
    padded = [
        {"input_ids": [5, 6, 7], "labels": [0, 8, 9], "decoder_attention_mask": [0, 1, 1]},
        {"input_ids": [9], "labels": [4, 5, 6, 7, 0], "decoder_attention_mask": [1, 1, 1, 1, 0]},
    ]
    assert_rows(collator(padded), **ROWS, **TARGETS)


def test_target_as_long_as_the_source_stays_whole(collator):
    """Labels are no column of the source's tokens, also where there are as many."""
    features = [{"input_ids": [5, 6, 7], "attention_mask": [1, 1, 0], "labels": [7, 8, 9]}]
    assert_rows(collator(features), input_ids=[[5, 6]], lengths=[2], labels=[[7, 8, 9]], decoder_lengths=[3])


def test_empty_target(collator):
    features = [{"input_ids": [5], "labels": []}, {"input_ids": [6], "labels": [7]}]
    assert_rows(collator(features), input_ids=[[5], [6]], lengths=[1, 1], labels=[[-100], [7]], decoder_lengths=[0, 1])


def test_without_target(tokenizer, model):
    features = [{"input_ids": example["input_ids"]} for example in EXAMPLES]
    assert_rows(DataCollatorForSeq2SeqWithLengths(tokenizer, model)(features), **ROWS)


@pytest.mark.parametrize("flat", [False, True])
def test_source_of_frames(tokenizer, flat):
    frames = [[[0.5], [1.0]], [[2.0]]]
    features = [{"input_features": f, "labels": e["labels"]} for f, e in zip(frames, EXAMPLES, strict=True)]
    batch = DataCollatorForSeq2SeqWithLengths(tokenizer, flat=flat)(features)
    rows = [[[0.5], [1.0]], [[2.0], [0.0]]]
    targets = {"labels": [[8, 9, 4, 5, 6, 7]], "decoder_lengths": [2, 4]} if flat else TARGETS
    compare = assert_equal if flat else assert_rows
    compare(batch, input_features=[[[0.5], [1.0], [2.0]]] if flat else rows, lengths=[2, 1], **targets)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_trainer(tokenizer, model, tmp_path, smoothing):
    """The stock trainer generates from batches as they come, and smooths labels, as with the stock collator's."""
    arguments = Seq2SeqTrainingArguments(
        str(tmp_path),
        predict_with_generate=True,
        generation_max_length=6,
        label_smoothing_factor=smoothing,
        per_device_eval_batch_size=2,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    collators = [DataCollatorForSeq2SeqWithLengths(tokenizer, model), DataCollatorForSeq2Seq(tokenizer, model)]
    found: Any
    expected: Any
    found, expected = (
        Seq2SeqTrainer(model, arguments, collator, processing_class=tokenizer).predict(EXAMPLES)  # pyright: ignore
        for collator in collators
    )
    assert found.predictions.tolist() == expected.predictions.tolist()
    assert found.label_ids.tolist() == expected.label_ids.tolist()
    assert found.metrics["test_loss"] == pytest.approx(expected.metrics["test_loss"])


def test_label_pad_token_id(tokenizer):
    batch = DataCollatorForSeq2SeqWithLengths(tokenizer, label_pad_token_id=-1)(EXAMPLES)
    assert batch["labels"].tolist() == [[8, 9, -1, -1], [4, 5, 6, 7]]


def test_pickle(collator):
    assert_rows(pickle.loads(pickle.dumps(collator))(EXAMPLES), **ROWS, **TARGETS)


@pytest.mark.parametrize(
    "features, message",
    [
        ([], "`features` must hold at least one example; got none"),
        ([{"labels": [1]}], "^examples must have a column `input_ids`; got no numbers"),
        ([{"input_ids": [1], "decoder_position_ids": [0]}], "of the target: .* a column `labels`; got position_ids"),
        (
            [{"input_ids": [1], "labels": 1}],
            r"of the target: `labels` .* list of integers, shape \(T,\); got shape \(\)",
        ),
        ([{"input_ids": [1], "labels": [0.5]}], r"`labels` .* list of integers.* got shape \(1,\) of torch.float32"),
        ([EXAMPLES[0], {"input_ids": [1]}], "of the target: column `labels` must be in every example; got none in"),
        (
            [{"input_ids": [1], "labels": [2], "decoder_lengths": 2}],
            "of the target: column `lengths` must hold what the collator counts, or be left out: 1 in example 0; got 2",
        ),
        (
            [{"input_ids": [1], "labels": [2], "decoder_attention_mask": [1, 0]}],
            r"of the target: `attention_mask` .* shape \(1,\); got shape \(2,\)",
        ),
        (
            [{"input_ids": [1], "lengths": 4, "labels": [2, 3]}],
            "^column `lengths` must hold what the collator counts, or be left out: 1 or 3 in example 0; got 4",
        ),
    ],
)
def test_bad_examples(collator, features, message):
    with pytest.raises(ValueError, match=message):
        collator(features)
