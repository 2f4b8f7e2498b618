"""Pairs of models for each head for a Trainer: the stock model on padded rows, and ours on batches with lengths."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import (
    BertForQuestionAnswering,
    DataCollatorForMultipleChoice,
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
)

from hf_dynmask import (
    DataCollatorForFeatures,
    DataCollatorForSeq2SeqWithLengths,
    DataCollatorWithLengths,
    DynMaskConfig,
    DynMaskForCTC,
    DynMaskRecurrentConfig,
    DynMaskRecurrentForSequenceClassification,
    from_transformers,
    to_transformers,
)
from stock_models import VOCABULARY, random_stock

KINDS = ("rows", "flat")  # of our batches
LENGTHS = [4, 7, 2, 5, 6, 3, 7, 4]
IGNORED = -100
SPECIAL = {"pad_token": "[PAD]", "bos_token": "[BOS]", "eos_token": "[EOS]"}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TOKENIZER = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(WordLevel({token: i for i, token in enumerate(SPECIAL.values())})), **SPECIAL
)
BERT: dict[str, Any] = {"num_hidden_layers": 1, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, **IDS}
BART: dict[str, Any] = {"encoder_layers": 1, "decoder_layers": 1, "dropout": 0.0, "decoder_start_token_id": 2, **IDS}
BART |= {"forced_eos_token_id": None}
OURS: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 1, "hidden_dropout_prob": 0.0, **IDS}
OURS |= {"vocab_size": VOCABULARY}

# --- Examples, each made of a number and a length ---------------------------------------------------------------------


def ids(k: int, length: int) -> list[int]:
    return [3 + (5 * k + 3 * place) % (VOCABULARY - 3) for place in range(length)]


def some_tokens(k, length):
    """Some tokens are targets, of the first example none."""
    labels = [token % 3 if k and place % 2 else IGNORED for place, token in enumerate(ids(k, length))]
    return {"input_ids": ids(k, length), "labels": labels}


def a_text(k, length):
    return {"input_ids": ids(k, length), "labels": ids(k, length)}


def a_class(k, length):
    return {"input_ids": ids(k, length), "label": k % 3}


def several_classes(k, length):
    return {"input_ids": ids(k, length), "label": [float(k % 2), float(k % 3 == 0), 1.0]}


def a_number(k, length):
    return {"input_ids": ids(k, length), "label": k / 4}


def an_answer(k, length):
    return {"input_ids": ids(k, length), "start_positions": k % length, "end_positions": length - 1}


def choices(k, length):
    return {"input_ids": [ids(k, length), ids(k + 1, 9 - length)], "label": k % 2}


def a_pair(k, length):
    return {"input_ids": ids(k, length), "labels": [*ids(k + 1, 1 + k % 4), 2]}


def a_text_with_an_end(k, length):
    """BART reads a class off the last `[EOS]`."""
    return {"input_ids": [*ids(k, length - 1), 2], "label": k % 3}


def frames(k, length):
    steps = torch.arange(2.0 * length)[:, None]
    features = torch.cat([(steps + k).sin(), (steps * k).cos()], 1)
    return {"input_features": features.tolist(), "labels": ids(k, 1 + k % 2)}


# --- What the stock library lacks -------------------------------------------------------------------------------------


class DataCollatorForChoices:
    """Choices `(B, choices, T)` with lengths `(B, choices)`."""

    def __init__(self):
        self.rows = DataCollatorWithLengths(TOKENIZER)

    def __call__(self, features):
        batch = self.rows([{"input_ids": choice} for feature in features for choice in feature["input_ids"]])
        batch = {name: value.unflatten(0, (len(features), -1)) for name, value in batch.items()}
        return batch | {"labels": torch.tensor([feature["label"] for feature in features])}


class DataCollatorForPaddedFeatures(DataCollatorForFeatures):
    """Frames with an attention mask alone."""

    def __call__(self, features):
        batch = super().__call__(features)
        del batch["lengths"]
        return batch


class BertForQuestionAnsweringInTokens(BertForQuestionAnswering):
    """Without padding: the stock model looks for answers there, too, and its loss depends on the width of the batch."""

    def forward(self, input_ids=None, attention_mask: Any = None, start_positions=None, end_positions=None, **kwargs):
        outputs: Any = super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        absent = attention_mask == 0
        ends: Any = zip((outputs.start_logits, outputs.end_logits), (start_positions, end_positions), strict=True)
        losses = [nn.functional.cross_entropy(each.masked_fill(absent, -torch.inf), place) for each, place in ends]
        logits = {name: each.masked_fill(absent, 0) for name, each in outputs.items()}
        return type(outputs)(loss=(losses[0] + losses[1]) / 2, **logits)


# --- Heads ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Head:
    """
    Args:
        reference: Makes the model to compare with, which sees padded rows.
        example: Makes an example of a number and a length.
        padded, rows, flat: Make the collator of a model, for the reference and for each kind of our batches.
        score: A number that predictions and labels give, whatever the layout of the batch.
        ours: Makes our model of the reference.
    """

    reference: Callable[[], Any]
    example: Callable[[int, int], dict[str, Any]]
    padded: Callable[[Any], Callable[..., Any]]
    rows: Callable[[Any], Callable[..., Any]]
    flat: Callable[[Any], Callable[..., Any]] | None
    score: Callable[[Any, Any], Tensor]
    ours: Callable[[Any], Any] = from_transformers

    @property
    def kinds(self) -> list[str]:
        return [kind for kind in KINDS if getattr(self, kind) is not None]

    def examples(self) -> Dataset:
        return Dataset.from_list([self.example(k, length) for k, length in enumerate(LENGTHS)])

    def model(self, kind: str) -> Any:
        model = self.reference()
        return model if kind == "padded" else self.ours(model)


def likelihood(logits: Tensor, labels: Tensor) -> Tensor:
    """Of the targets, in logarithms."""
    logits, labels = logits[labels != IGNORED], labels[labels != IGNORED]
    return torch.log_softmax(logits.float(), -1).gather(-1, labels[:, None]).sum()


def next_likelihood(logits: Tensor, labels: Tensor) -> Tensor:
    return likelihood(logits[:, :-1], labels[:, 1:])


def difference(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.float().squeeze(-1) - labels).square().sum()


def everything(logits: Any, labels: Any) -> Tensor:
    """Which is 0 where nothing is, and -100 where the Trainer pads."""
    return torch.stack([each[each != IGNORED].float().square().sum() for each in logits]).sum()


def bert(task: str, num_labels: int = 3):
    return lambda: random_stock("bert", task, num_labels=num_labels, **BERT)


def llama():
    return random_stock("llama", "causal-lm", num_hidden_layers=1)


def bart(task: str):
    return lambda: random_stock("bart", task, num_labels=3, **BART)


def answering():
    model: Any = bert("question-answering", num_labels=2)()
    model.__class__ = BertForQuestionAnsweringInTokens
    return model


def recognizing():
    torch.manual_seed(0)
    config = DynMaskConfig(**OURS, num_features=2, num_attention_heads=2, intermediate_size=12)
    return DynMaskForCTC(config)


def recurrent():
    torch.manual_seed(0)
    return DynMaskRecurrentForSequenceClassification(DynMaskRecurrentConfig(**{**OURS, "num_labels": 3}))


def with_our_attention(model):
    model.set_attn_implementation("dynmask")
    return model


def unchanged(model):
    return model


def of_texts(reference, example, score, padded: Any = DataCollatorWithPadding, ours=from_transformers) -> Head:
    rows, flat = (lambda model, flat=flat: DataCollatorWithLengths(TOKENIZER, flat=flat) for flat in (False, True))
    return Head(reference, example, lambda model: padded(TOKENIZER), rows, flat, score, ours)


def of_tokens(reference, example, score, ours=from_transformers) -> Head:
    return of_texts(reference, example, score, DataCollatorForTokenClassification, ours)


HEADS = {
    "masked LM": of_tokens(bert("masked-lm"), some_tokens, likelihood),
    "masked LM, our attention": of_tokens(bert("masked-lm"), some_tokens, likelihood, with_our_attention),
    "causal LM": of_tokens(llama, a_text, next_likelihood),
    "causal LM, our attention": of_tokens(llama, a_text, next_likelihood, with_our_attention),
    "a class": of_texts(bert("sequence-classification"), a_class, likelihood),
    "several classes": of_texts(bert("sequence-classification"), several_classes, difference),
    "a number": of_texts(bert("sequence-classification", num_labels=1), a_number, difference),
    "classes of tokens": of_tokens(bert("token-classification"), some_tokens, likelihood),
    "an answer": of_texts(answering, an_answer, everything),
    "a choice": Head(
        bert("multiple-choice"),
        choices,
        lambda model: DataCollatorForMultipleChoice(TOKENIZER),
        lambda model: DataCollatorForChoices(),
        None,
        likelihood,
    ),
    "CTC": Head(
        recognizing,
        frames,
        lambda model: DataCollatorForPaddedFeatures(),
        lambda model: DataCollatorForFeatures(),
        lambda model: DataCollatorForFeatures(flat=True),
        everything,
        unchanged,
    ),
    "pairs": Head(
        bart("seq2seq-lm"),
        a_pair,
        lambda model: DataCollatorForSeq2Seq(TOKENIZER, model=model),
        lambda model: DataCollatorForSeq2SeqWithLengths(TOKENIZER, model=model),
        lambda model: DataCollatorForSeq2SeqWithLengths(TOKENIZER, model=model, flat=True),
        likelihood,
    ),
    "a class of both sides": of_texts(bart("sequence-classification"), a_text_with_an_end, likelihood),
    "recurrent, a class": of_texts(recurrent, a_class, likelihood, ours=unchanged),
}

# --- Runs -------------------------------------------------------------------------------------------------------------


class Scores:
    """What `compute_metrics` is given: all in one array, a list with one a batch, or batch after batch."""

    def __init__(self, score: Callable[[Any, Any], Tensor]):
        self.score = score
        self.found: list[dict[str, float]] = []

    def __call__(self, prediction: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        logits, labels = prediction.predictions, prediction.label_ids
        batches = zip(logits, labels, strict=True) if isinstance(logits, list) else [(logits, labels)]
        self.found += [{"score": float(self.score(*_read(*batch)))} for batch in batches]
        given = {"inputs": prediction.inputs, "losses": prediction.losses}
        self.found += [{name: _total(values)} for name, values in given.items() if values is not None]
        if not compute_result:
            return {}
        found, self.found = self.found, []
        return {name: sum(each.get(name, 0.0) for each in found) for name in {n: None for each in found for n in each}}


def _read(logits, labels) -> tuple[Any, Any]:
    """As tensors: both ends of an answer, or what is predicted first (an encoder-decoder adds its encoder's states)."""
    if isinstance(labels, tuple):
        return tuple(map(torch.as_tensor, logits[:2])), tuple(map(torch.as_tensor, labels))
    return torch.as_tensor(logits[0] if isinstance(logits, tuple) else logits), torch.as_tensor(labels)


def _total(values) -> float:
    """Of tokens, frames or losses; padding adds nothing."""
    if isinstance(values, Mapping):
        values = values.get("input_ids", values.get("input_features"))
    arrays = [np.asarray(each) for each in (values if isinstance(values, list) else [values])]
    return float(sum(array[array != IGNORED].sum() for array in arrays))


TIMES = ("runtime", "per_second", "model_preparation_time", "total_flos")


@dataclass
class Outcome:
    """The outcome of a training: logs by step, weights and files."""

    logs: list[dict[str, float]]
    weights: dict[str, Tensor]
    files: list[str]

    @classmethod
    def of(cls, trainer: Trainer) -> Outcome:
        logs = [
            {name: value for name, value in entry.items() if not any(time in name for time in TIMES)}
            for entry in trainer.state.log_history
        ]
        folder = Path(str(trainer.args.output_dir))
        files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        return cls(logs, _weights(trainer.model), files)


def _weights(model: Any) -> dict[str, Tensor]:
    """Under their stock names, where they have such."""
    of_stock = getattr(model.config, "source_model_type", None) is not None
    return (to_transformers(copy.deepcopy(model)) if of_stock else model).state_dict()


def make_trainer(
    head: Head, kind: str, folder: Path, arguments: Mapping[str, Any], of_trainer: Mapping[str, Any] | None = None
) -> Trainer:
    """A Trainer of a reference on rows that are `"padded"`, or of ours on `"rows"` or `"flat"`."""
    defaults: dict[str, Any] = {"per_device_train_batch_size": 3, "per_device_eval_batch_size": 3}
    defaults |= {"num_train_epochs": 1, "learning_rate": 0.1, "optim": "sgd", "logging_steps": 1, "save_strategy": "no"}
    defaults |= {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False}
    model = head.model(kind)
    pairs = head.example is a_pair
    trainer_class = Seq2SeqTrainer if pairs else Trainer
    arguments_class = Seq2SeqTrainingArguments if pairs else TrainingArguments
    given: dict[str, Any] = {"data_collator": getattr(head, kind)(model), "processing_class": TOKENIZER}
    given |= {"train_dataset": head.examples(), "eval_dataset": head.examples()}
    given |= {"compute_metrics": Scores(head.score), **(of_trainer or {})}
    return trainer_class(model, arguments_class(str(folder), **{**defaults, **arguments}), **given)


def trained(trainer: Trainer, **settings: Any) -> Outcome:
    """The outcome of training and the evaluation after it."""
    trainer.train(**settings)
    trainer.evaluate()
    return Outcome.of(trainer)


def assert_same(found: Outcome, right: Outcome, tolerance: float = 1e-5) -> None:
    assert found.files == right.files
    assert [entry.keys() for entry in found.logs] == [entry.keys() for entry in right.logs]
    for entry, expected in zip(found.logs, right.logs, strict=True):
        different = {
            name: (entry[name], value)
            for name, value in expected.items()
            if not np.isclose(entry[name], value, rtol=tolerance, atol=tolerance)
        }
        assert not different, f"found and right at step {expected['step']}: {different}"
    assert found.weights.keys() == right.weights.keys()
    for name, weight in right.weights.items():
        torch.testing.assert_close(found.weights[name], weight, atol=tolerance, rtol=tolerance, msg=f"{name} differs")
