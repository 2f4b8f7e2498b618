"""What `Trainer.predict` sees of batches with lengths: a row an example, in order, as in the padded stock run."""

from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from seqeval.metrics import f1_score
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from hf_dynmask import DataCollatorWithLengths, from_transformers

TAGS = ["O", "B-PER", "I-PER"]
IGNORED = -100
VOCABULARY = 20
LENGTHS = [3, 9, 1, 6, 2, 12, 4, 7, 5, 8, 11]  # the last batch of four is of three
TOKENIZER = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"[PAD]": 0, "a": 1})), pad_token="[PAD]")
SIZES: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "num_hidden_layers": 2}


def rows(**columns):
    """Examples, each column made from the tokens of one and its number."""
    examples = [[1 + (7 * k + 3 * n) % (VOCABULARY - 1) for n in range(length)] for k, length in enumerate(LENGTHS)]
    return [{"input_ids": ids} | {name: of(ids, k) for name, of in columns.items()} for k, ids in enumerate(examples)]


def predicted(model, collator, examples, folder, label_names=None, **settings) -> Any:
    names = {"label_names": label_names, "per_device_eval_batch_size": 4}
    arguments = TrainingArguments(str(folder), use_cpu=True, report_to="none", **names)
    trainer = Trainer(model, arguments, data_collator=collator, **settings)
    return trainer.predict(Dataset.from_list(examples))  # pyright: ignore[reportArgumentType]


def both(stock_class, padded, examples, folder, flat=False, **settings):
    """What the stock model on padded rows predicts, and what ours with the same weights."""
    torch.manual_seed(0)
    labels = {} if stock_class is BertForQuestionAnswering else {"num_labels": len(TAGS)}
    stock = stock_class(BertConfig(vocab_size=VOCABULARY, **labels, **SIZES))
    collators = (padded, DataCollatorWithLengths(TOKENIZER, flat=flat))
    models = (stock, from_transformers(stock))
    return [predicted(*each, examples, folder, **settings) for each in zip(models, collators, strict=True)]


def of_tokens(values):
    return [row[:length] for row, length in zip(values, LENGTHS, strict=True)]


def assert_same_on_tokens(ours, stock):
    assert len(ours) == len(stock) == len(LENGTHS)
    for one, other in zip(of_tokens(ours), of_tokens(stock), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def nothing_beyond(values):
    beyond = [row[length:] for row, length in zip(values, LENGTHS, strict=True)]
    return all(np.isin(each, (0, IGNORED)).all() for each in beyond)


def entities(prediction):
    found = prediction.predictions.argmax(-1)
    kept = [labels != IGNORED for labels in prediction.label_ids]
    tags = [
        [[TAGS[each] for each in row[keep]] for row, keep in zip(values, kept, strict=True)]
        for values in (prediction.label_ids, found)
    ]
    return {"f1": f1_score(*tags)}


def test_token_classification(tmp_path):
    examples = rows(labels=lambda ids, k: [IGNORED, *(each % 3 for each in ids[1:])])
    padded = DataCollatorForTokenClassification(TOKENIZER)
    stock, ours = both(BertForTokenClassification, padded, examples, tmp_path, compute_metrics=entities)
    assert_same_on_tokens(ours.predictions, stock.predictions)
    assert nothing_beyond(ours.predictions) and ours.predictions.shape == stock.predictions.shape
    np.testing.assert_array_equal(ours.label_ids, stock.label_ids)
    for row, example in zip(of_tokens(ours.label_ids), examples, strict=True):
        assert row.tolist() == example["labels"]
    assert ours.metrics["test_f1"] == stock.metrics["test_f1"] > 0
    assert ours.metrics["test_loss"] == pytest.approx(stock.metrics["test_loss"], abs=1e-5)


@pytest.mark.parametrize("flat", [False, True], ids=["rows", "flat"])
def test_sequence_classification(flat, tmp_path):
    examples = rows(label=lambda ids, k: k % 3)
    stock, ours = both(BertForSequenceClassification, DataCollatorWithPadding(TOKENIZER), examples, tmp_path, flat)
    np.testing.assert_allclose(ours.predictions, stock.predictions, atol=1e-5)
    assert ours.label_ids.tolist() == stock.label_ids.tolist() == [each["label"] for each in examples]
    assert ours.metrics["test_loss"] == pytest.approx(stock.metrics["test_loss"], abs=1e-5)


def spans(prediction):
    """Share of the answers found, the best place of each side being sought in the tokens of the example."""
    found = np.stack([[row.argmax() for row in of_tokens(side)] for side in prediction.predictions])
    return {"exact_match": float((found == np.stack(prediction.label_ids)).all(0).mean())}


def test_question_answering(tmp_path):
    answers = {"start_positions": lambda ids, k: k % len(ids), "end_positions": lambda ids, k: len(ids) - 1}
    padded = DataCollatorWithPadding(TOKENIZER)
    settings = {"compute_metrics": spans, "label_names": list(answers)}
    stock, ours = both(BertForQuestionAnswering, padded, rows(**answers), tmp_path, **settings)
    for one, other in zip(ours.predictions, stock.predictions, strict=True):
        assert_same_on_tokens(one, other)
        assert nothing_beyond(one)
    for one, other in zip(ours.label_ids, stock.label_ids, strict=True):
        assert one.tolist() == other.tolist()
    assert ours.metrics["test_exact_match"] == stock.metrics["test_exact_match"]


def test_masked_language_modeling_keeps_no_logits(tmp_path):
    examples = rows(labels=lambda ids, k: [each if (each + k) % 2 else IGNORED for each in ids])
    seen = []

    def most_likely(logits, labels):
        seen.append(logits.shape)
        return logits.argmax(-1)

    padded = DataCollatorForTokenClassification(TOKENIZER)
    stock, ours = both(BertForMaskedLM, padded, examples, tmp_path, preprocess_logits_for_metrics=most_likely)
    assert ours.predictions.shape == stock.predictions.shape == (len(LENGTHS), max(LENGTHS))
    assert_same_on_tokens(ours.predictions, stock.predictions)
    np.testing.assert_array_equal(ours.label_ids, stock.label_ids)
    assert ours.metrics["test_loss"] == pytest.approx(stock.metrics["test_loss"], abs=1e-5)
    half = len(seen) // 2
    assert seen[:half] == seen[half:]
