"""Loss and gradients of a step are the same however its 16 examples are split: batches, accumulation, processes."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments

from hf_dynmask import (
    DataCollatorForFeatures,
    DataCollatorForSeq2SeqWithLengths,
    DataCollatorWithLengths,
    DynMaskConfig,
    DynMaskForCausalLM,
    DynMaskForConditionalGeneration,
    DynMaskForCTC,
    DynMaskForMaskedLM,
    DynMaskForMultipleChoice,
    DynMaskForQuestionAnswering,
    DynMaskForSequenceClassification,
    DynMaskForTokenClassification,
    DynMaskRecurrentConfig,
    DynMaskRecurrentForSequenceClassification,
    DynMaskRecurrentForTokenClassification,
    DynMaskSeq2SeqConfig,
    DynMaskSeq2SeqForSequenceClassification,
)
from two_processes import in_two_processes

VOCABULARY = 20
EXAMPLES = 16
LENGTHS = [3, 11, 5, 2, 7, 4, 9, 3, 6, 12, 2, 5, 8, 3, 10, 4]
SPLITS = [(4, 4), (2, 8), (6, 3)]  # the last with a batch of four
SIZES: dict[str, Any] = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 12, "vocab_size": VOCABULARY}
SIZES |= {"num_hidden_layers": 2, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
RECURRENT: dict[str, Any] = {"hidden_size": 8, "vocab_size": VOCABULARY, "hidden_dropout_prob": 0.0}
TOKENIZER = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"[PAD]": 0, "a": 1})), pad_token="[PAD]")
ROWS, FLAT = DataCollatorWithLengths(TOKENIZER), DataCollatorWithLengths(TOKENIZER, flat=True)
ANSWERS, FLAT_ANSWERS = (DataCollatorWithLengths(TOKENIZER, flat=flat, count_answers=True) for flat in (False, True))
PAIRS, FLAT_PAIRS = (DataCollatorForSeq2SeqWithLengths(TOKENIZER, flat=flat) for flat in (False, True))

# --- Examples: of a number and a length, one whose share in the targets differs from that in the tokens ---------------


def ids(k, length):
    return [1 + (5 * k + 3 * place) % (VOCABULARY - 1) for place in range(length)]


def some_tokens(k, length):
    """A third of the tokens are targets, in some examples none."""
    return {
        "input_ids": ids(k, length),
        "labels": [t % 3 if (k + n) % 3 == 0 else -100 for n, t in enumerate(ids(k, length))],
    }


def text(k, length):
    """The label of the first token is no target; the Trainer, which counts targets, must not take it for one."""
    return {"input_ids": ids(k, length), "labels": ids(k, length)}


def one_class(k, length):
    """Of two, in some examples none."""
    return {"input_ids": ids(k, length), "labels": -100 if k % 5 == 0 else k % 2}


def a_number(k, length):
    return {"input_ids": ids(k, length), "labels": k / 7}


def several_classes(k, length):
    return {"input_ids": ids(k, length), "labels": [float(k % 2), float(k % 3 == 0)]}


def an_answer(k, length):
    """In some examples none, at a position behind the sequence."""
    start, end = (length, length) if k % 3 == 0 else (k % length, length - 1)
    return {"input_ids": ids(k, length), "start_positions": start, "end_positions": end}


def a_pair(k, length):
    return {"input_ids": ids(k, length), "labels": ids(k + 1, 1 + k % 5)}


def a_class_of_a_pair(k, length):
    return {"input_ids": ids(k, length), "labels": k % 2}


def frames(k, length):
    steps = torch.arange(2.0 * length)[:, None]
    return {
        "input_features": torch.cat([(steps + k).sin(), (steps * k).cos()], 1).tolist(),
        "labels": ids(k, 1 + k % 2),
    }


def choices(k, length):
    return {"choices": [ids(k, length), ids(k + 1, 14 - length)], "labels": k % 2}


def collate_choices(features):
    """Rows `(B, 2, T)` with lengths `(B, 2)`."""
    batch = ROWS([{"input_ids": choice} for feature in features for choice in feature["choices"]])
    batch = {name: values.unflatten(0, (-1, 2)) for name, values in batch.items()}
    return batch | {"labels": torch.tensor([feature["labels"] for feature in features])}


def dynmask(model_class, **settings):
    return lambda: model_class(DynMaskConfig(**{**SIZES, **settings}))


def seq2seq(model_class):
    return lambda: model_class(DynMaskSeq2SeqConfig(**SIZES, decoder_start_token_id=1))


def recurrent(model_class, **settings):
    return lambda: model_class(DynMaskRecurrentConfig(**RECURRENT, **settings))


HEADS = {
    "masked LM": (dynmask(DynMaskForMaskedLM), some_tokens, ROWS),
    "masked LM, flat": (dynmask(DynMaskForMaskedLM), some_tokens, FLAT),
    "causal LM": (dynmask(DynMaskForCausalLM), text, ROWS),
    "causal LM, flat": (dynmask(DynMaskForCausalLM), text, FLAT),
    "a class": (dynmask(DynMaskForSequenceClassification), one_class, ROWS),
    "a number": (dynmask(DynMaskForSequenceClassification, num_labels=1), a_number, ROWS),
    "several classes": (dynmask(DynMaskForSequenceClassification), several_classes, ROWS),
    "token classes": (dynmask(DynMaskForTokenClassification, num_labels=3), some_tokens, ROWS),
    "answers": (dynmask(DynMaskForQuestionAnswering), an_answer, ANSWERS),
    "answers, flat": (dynmask(DynMaskForQuestionAnswering), an_answer, FLAT_ANSWERS),
    "choices": (dynmask(DynMaskForMultipleChoice), choices, collate_choices),
    "CTC": (dynmask(DynMaskForCTC, num_features=2, ctc_zero_infinity=True), frames, DataCollatorForFeatures()),
    "pairs": (seq2seq(DynMaskForConditionalGeneration), a_pair, PAIRS),
    "pairs, flat": (seq2seq(DynMaskForConditionalGeneration), a_pair, FLAT_PAIRS),
    "a class of a pair": (seq2seq(DynMaskSeq2SeqForSequenceClassification), a_class_of_a_pair, ROWS),
    "recurrent, a class": (recurrent(DynMaskRecurrentForSequenceClassification), one_class, ROWS),
    "recurrent, token classes": (recurrent(DynMaskRecurrentForTokenClassification, num_labels=3), some_tokens, ROWS),
}

# --- Steps -----------------------------------------------------------------------------------------------------------


class Gradients(TrainerCallback):
    """What the optimizer is given."""

    def __init__(self):
        self.found = {}

    def on_pre_optimizer_step(self, args, state, control, model: Any = None, **kwargs):
        self.found = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def step(head: str, batch_size: int, accumulation: int, folder: Path) -> dict[str, torch.Tensor]:
    """Loss and gradients of one optimizer step, by a real Trainer."""
    make, example, collator = HEADS[head]
    torch.manual_seed(0)
    gradients = Gradients()
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        logging_steps=1,
        max_grad_norm=0,  # as they are, before anything is clipped
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(
        make(),
        arguments,
        data_collator=collator,
        train_dataset=Dataset.from_list([example(k, length) for k, length in enumerate(LENGTHS)]),
        callbacks=[gradients],
    )
    trainer.train()
    assert gradients.found
    loss = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    return {"loss": torch.tensor(loss)} | gradients.found


@pytest.fixture(scope="module", autouse=True)
def few_objects():
    """The Trainer collects garbage before it trains, which takes longer than a step here: of all modules loaded."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The step of all examples in one batch, of each head."""
    return {head: step(head, EXAMPLES, 1, tmp_path_factory.mktemp("whole")) for head in HEADS}


def assert_equal(found, expected):
    assert found["loss"] > 0
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("head", HEADS)
def test_batches_and_accumulation(head, whole, tmp_path):
    for batch_size, accumulation in SPLITS:
        assert_equal(step(head, batch_size, accumulation, tmp_path), whole[head])


def steps_of_half_the_examples(folder: Path) -> None:
    """For a process of two: of all heads."""
    found = {head: step(head, EXAMPLES // 2, 1, folder) for head in HEADS}
    torch.save(found, folder / f"{torch.distributed.get_rank()}.pt")


def test_two_processes(whole, tmp_path):
    in_two_processes(steps_of_half_the_examples, tmp_path, __name__)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        for head in HEADS:
            assert_equal(found[head], whole[head])
