"""
Fine-tunes a BERT-like checkpoint to find answers in texts with the stock `Trainer`, on batches with lengths.

    python recipes/question_answering.py

uses questions of SQuAD and MiniLM. To also train the stock model on padded batches, from the same weights:

    python recipes/question_answering.py --baseline

With your own model and data, from the Hub or from disk (columns `context`, `question` and `answers`, as in SQuAD):

    python recipes/question_answering.py --model google-bert/bert-base-uncased --dataset rajpurkar/squad_v2

Long contexts are read in overlapping windows. All options of `TrainingArguments` apply. Results, model card and model
are written to `--output_dir`. The metrics of SQuAD are implemented here, since `evaluate` would download them.
"""

import support.threads  # noqa: F401

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict
from transformers import (
    AutoModelForQuestionAnswering,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_dynmask import DataCollatorWithLengths, to_transformers
from support.common import (
    DropoutArguments,
    check_texts,
    dropout_settings,
    load_columns,
    load_model,
    parse_arguments,
)
from support.reporting import About, train_and_report
from support.samples import resolve_model

MAX_ANSWER_TOKENS = 30
NO_ANSWER = 0  # the first token of a window, [CLS], means "no answer"
ELSEWHERE = (-1, -1)  # offsets of tokens outside the context


def main(arguments: list[str] | None = None) -> None:
    recipe, training = parse_arguments([RecipeArguments, TrainingArguments], arguments, DEFAULTS)

    checkpoint = resolve_model(recipe.model)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    questions = load_questions(recipe.dataset)
    questions["test"] = questions["test"].select(range(min(recipe.eval_rows, len(questions["test"]))))
    windowing = {"max_length": recipe.max_length, "stride": recipe.stride}
    data = DatasetDict({name: windows(rows, tokenizer, **windowing) for name, rows in questions.items()})
    references = [row["text"] for row in questions["test"]["answers"]]

    set_seed(training.seed)
    settings = dropout_settings(recipe)
    model = load_model(checkpoint, "question-answering", AutoModelForQuestionAnswering, **settings)
    trainer = Trainer(
        model,
        training,
        data_collator=DataCollatorWithLengths(tokenizer, count_answers=True),
        train_dataset=data["train"],
        eval_dataset=data["test"],
        processing_class=tokenizer,
        compute_metrics=Evaluation(data["test"], list(questions["test"]["context"]), references),
    )

    train_and_report(
        ABOUT,
        recipe,
        trainer,
        AutoModelForQuestionAnswering.from_pretrained,
        {"stock": (to_transformers(model), DataCollatorWithPadding(tokenizer))} if recipe.baseline else {},
        settings={"dropout": model.config.hidden_dropout_prob} | windowing,
        rows=questions,
        trivial={"what": "no answer to any question", **score([""] * len(references), references)},
    )


# --- Data ------------------------------------------------------------------------------------------------------------


def load_questions(source: str) -> DatasetDict:
    """Loads the columns `context`, `question` and `answers`, and checks the positions of the answers."""
    data = load_columns(source, "context", "question", "answers")
    check_texts(data, "context", "question")
    answers = data["train"].features["answers"]
    if not (isinstance(answers, dict) and {"text", "answer_start"} <= answers.keys()):
        raise ValueError(f"column `answers` must hold lists `text` and `answer_start`; got {answers}")
    for rows in data.values():
        for row, (context, answers) in enumerate(zip(rows["context"], rows["answers"], strict=True)):
            for text, start in zip(answers["text"], answers["answer_start"], strict=True):
                if not context.startswith(text, start):
                    found = context[start : start + len(text)]
                    raise ValueError(f"answer {text!r} must be in its context at {start}; got {found!r} in row {row}")
    return data


def windows(rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, stride: int) -> Dataset:
    """
    Tokenizes questions, each with overlapping windows of its context.

    Args:
        rows (`Dataset`): Questions.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): A fast tokenizer.
        max_length (`int`): Maximum number of tokens per window.
        stride (`int`): Tokens of the context that a window shares with the next one.

    Returns:
        `Dataset`: One row per window: the tokenizer's columns; `start_positions` and `end_positions` of the first
        answer, or 0 if the window does not contain it; the `row` of the question; and `offsets`, where in the context
        each token begins and ends.

    Raises:
        ValueError: A question leaves room for no more context than `stride`.
    """

    def read(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        special = tokenizer.num_special_tokens_to_add(pair=True)
        questions = tokenizer(batch["question"], add_special_tokens=False)["input_ids"]
        for ids, row in zip(questions, indices, strict=True):
            if (left := max_length - special - len(ids)) <= stride:
                raise ValueError(
                    f"`max_length` must leave more than stride={stride} tokens for the context; "
                    f"got {left} beside the question in row {row}"
                )
        pieces = tokenizer(
            batch["question"],
            batch["context"],
            truncation="only_second",
            max_length=max_length,
            stride=stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        samples = pieces["overflow_to_sample_mapping"]
        offsets = [
            [place if part == 1 else ELSEWHERE for place, part in zip(places, pieces.sequence_ids(piece), strict=True)]
            for piece, places in enumerate(pieces["offset_mapping"])
        ]
        answers = [answer_place(places, batch["answers"][i]) for places, i in zip(offsets, samples, strict=True)]
        return {
            **{name: pieces[name] for name in tokenizer.model_input_names if name != "attention_mask"},
            "start_positions": [first for first, _ in answers],
            "end_positions": [last for _, last in answers],
            "row": [indices[i] for i in samples],
            "offsets": offsets,
        }

    return rows.map(read, batched=True, with_indices=True, remove_columns=rows.column_names)


def answer_place(offsets: Sequence[tuple[int, int]], answers: dict[str, list[Any]]) -> tuple[int, int]:
    """First and last token of the first answer. Both are `NO_ANSWER` unless the window contains the whole answer."""
    if not answers["text"]:
        return NO_ANSWER, NO_ANSWER
    start = answers["answer_start"][0]
    end = start + len(answers["text"][0])
    context = [(i, place) for i, place in enumerate(offsets) if place != ELSEWHERE]
    inside = [i for i, (begins, ends) in context if begins < end and ends > start]
    is_whole = context and context[0][1][0] <= start and context[-1][1][1] >= end
    return (inside[0], inside[-1]) if is_whole and inside else (NO_ANSWER, NO_ANSWER)


# --- Measuring -------------------------------------------------------------------------------------------------------


@dataclass
class Evaluation:
    """Computes metrics of answers from the logits of windows. `contexts` and `references` are per question."""

    windows: Dataset
    contexts: list[str]
    references: list[list[str]]

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        start_logits, end_logits = (np.asarray(logits) for logits in prediction.predictions)
        return score(self.answers(start_logits, end_logits), self.references)

    def answers(self, start_logits: np.ndarray, end_logits: np.ndarray) -> list[str]:
        """The answer to each question: the best span over all its windows, or no answer if the lowest score for "no
        answer" among the windows is at least as high (Devlin et al., arXiv:1810.04805)."""
        spans: list[tuple[float, str]] = [(-np.inf, "")] * len(self.contexts)
        no_answer = np.full(len(self.contexts), np.inf)
        columns = (self.windows["row"], self.windows["offsets"], start_logits, end_logits)
        for row, offsets, starts, ends in zip(*columns, strict=True):
            score, first, last = best_span(np.array(offsets), starts, ends)
            text = self.contexts[row][offsets[first][0] : offsets[last][1]]
            spans[row] = max(spans[row], (score, text))
            no_answer[row] = min(no_answer[row], starts[NO_ANSWER] + ends[NO_ANSWER])
        return [text if score > none else "" for (score, text), none in zip(spans, no_answer, strict=True)]


def best_span(offsets: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> tuple[float, int, int]:
    """Score, first and last token of the best span of the context, of up to `MAX_ANSWER_TOKENS` tokens."""
    length = len(offsets)  # logits include padding
    in_context = offsets[:, 0] >= 0
    scores = starts[:length, None] + ends[None, :length]
    allowed = np.tril(np.triu(in_context[:, None] & in_context), MAX_ANSWER_TOKENS - 1)
    first, last = np.unravel_index(np.where(allowed, scores, -np.inf).argmax(), scores.shape)
    return float(scores[first, last]), int(first), int(last)


def score(answers: list[str], references: list[list[str]]) -> dict[str, float]:
    """
    The metrics of SQuAD (Rajpurkar et al., arXiv:1606.05250, arXiv:1806.03822), in percent: `exact_match`, and `f1`
    over words, each against the best matching reference. If there are no references, the right answer is empty.

    Args:
        answers (`list[str]`): One answer per question; empty for no answer.
        references (`list[list[str]]`): The right answers to each question.
    """
    exact, overlap = 0.0, 0.0
    for answer, texts in zip(answers, references, strict=True):
        found = words(answer)
        expected = [each for text in texts if (each := words(text))] or [[]]
        exact += max(found == each for each in expected)
        overlap += max(word_f1(found, each) for each in expected)
    return {"f1": 100 * overlap / len(answers), "exact_match": 100 * exact / len(answers)}


def words(text: str) -> list[str]:
    """Lower-case words of a text without punctuation and articles."""
    kept = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", kept).split()


def word_f1(found: list[str], expected: list[str]) -> float:
    if not (found and expected):
        return float(found == expected)
    return 2 * (Counter(found) & Counter(expected)).total() / (len(found) + len(expected))


# --- Arguments and model card ----------------------------------------------------------------------------------------


@dataclass
class RecipeArguments(DropoutArguments):
    model: str = field(default="sample:minilm", metadata={"help": "A checkpoint folder, a Hub id or a sample."})
    dataset: str = field(
        default="sample:squad",
        metadata={"help": "A Hub id, a json or parquet file or a sample, with `context`, `question` and `answers`."},
    )
    max_length: int = field(default=384, metadata={"help": "Tokens per window, including the question."})
    stride: int = field(default=128, metadata={"help": "Tokens that a window shares with the next."})
    eval_rows: int = field(default=300, metadata={"help": "Maximum number of questions for evaluation."})


DEFAULTS = {
    "output_dir": "outputs/question_answering",
    "max_steps": 240,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 16,
    "learning_rate": 2e-4,
    "logging_steps": 20,
}
USAGE = """
import hf_dynmask  # registers the model type with transformers
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
model = AutoModelForQuestionAnswering.from_pretrained("path/to/this/folder")
inputs = tokenizer("Who wrote the play?", "The play was written by Ben Jonson.", return_tensors="pt")
outputs = model(**inputs)
first, last = outputs.start_logits.argmax(), outputs.end_logits.argmax()  # both 0: there is no answer
tokenizer.decode(inputs["input_ids"][0, first : last + 1])
"""
LIMITS = "It copies a span of the given text, even if that text is wrong or has no answer."
ABOUT = About(
    recipe="question_answering",
    task="question-answering",
    metrics=["f1", "exact_match"],
    title="Extractive question answering",
    usage=USAGE,
    limits=LIMITS,
)
make_card = ABOUT.make_card

if __name__ == "__main__":
    main()
