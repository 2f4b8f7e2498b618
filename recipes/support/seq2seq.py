"""What the recipes from text to text share: tokenizer, encoder-decoder, and one run from the data to the report."""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from datasets import DatasetDict
from huggingface_hub import ModelCard
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForSeq2SeqLM,
    DataCollatorForSeq2Seq,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    set_seed,
)

from hf_dynmask import (
    DataCollatorForSeq2SeqWithLengths,
    DynMaskForConditionalGeneration,
    DynMaskSeq2SeqConfig,
    to_transformers,
)
from support.cards import Results, describe_new_model, describe_source, describe_training, model_card, report
from support.common import CommonArguments, load_texts, parse_arguments, special_token_ids
from support.measuring import Contenders, compare

PAD, START, END = "<pad>", "<s>", "</s>"
HEAD_SIZE = 64
DEFAULTS = {
    "per_device_train_batch_size": 64,
    "per_device_eval_batch_size": 100,
    "learning_rate": 2e-3,
    "predict_with_generate": True,
    "logging_steps": 50,
}


@dataclass
class Seq2SeqArguments(CommonArguments):
    """Arguments of these recipes; each states its own data set and lengths."""

    dataset: str
    max_source_tokens: int
    max_target_tokens: int
    vocab_size: int = field(default=2000, metadata={"help": "Tokens that are learned from the training data."})
    hidden_size: int = field(default=128, metadata={"help": f"Width of both sides; {HEAD_SIZE} a head."})
    num_hidden_layers: int = field(default=2, metadata={"help": "Layers of each side."})
    dropout: float = field(default=0.0, metadata={"help": "Of hidden states and attention weights."})


@dataclass(frozen=True, kw_only=True)
class Task:
    """
    What tells one of these recipes from another.

    Args:
        recipe, task (`str`): Name of the recipe, and of the task as the Hub has it.
        arguments (`type[Seq2SeqArguments]`): Its arguments.
        source, target (`str`): Columns of its data.
        metric (`str`), others (`list[str]`): Names of the measures of quality, the main one first.
        score (`Callable`): Takes answers and references, and gives each metric under its name.
        trivial (`tuple[str, Callable]`): What is done without a model, in words, and the answers for a `test` split.
        generation (`dict[str, Any]`): How the model generates, beside the length.
        title, usage, limits (`str`): Of the model card, as [`model_card`] takes them.
    """

    recipe: str
    task: str
    arguments: type[Seq2SeqArguments]
    source: str
    target: str
    metric: str
    others: list[str]
    score: Callable[[list[str], list[str]], dict[str, float]]
    trivial: tuple[str, Callable[[DatasetDict], list[str]]]
    generation: dict[str, Any] = field(default_factory=dict)
    title: str
    usage: str
    limits: str


def run(task: Task, arguments: list[str] | None = None, defaults: dict[str, Any] | None = None) -> None:
    """Trains and evaluates a new model, and writes model, results and model card."""
    defaults = DEFAULTS | {"output_dir": f"outputs/{task.recipe}"} | (defaults or {})
    recipe, training = parse_arguments([task.arguments, Seq2SeqTrainingArguments], arguments, defaults)
    training.include_num_input_tokens_seen = "non_padding"  # the parser takes it for a boolean

    texts = load_texts(recipe.dataset, task.source, task.target)
    tokenizer = train_tokenizer(texts["train"], recipe.vocab_size)
    data = encode(texts, tokenizer, recipe)
    evaluate = Evaluation(task, tokenizer, list(texts["test"][task.target]))

    set_seed(training.seed)
    model = make_model(recipe, tokenizer, task.generation)
    contenders: Contenders = {"dynmask": (model, DataCollatorForSeq2SeqWithLengths(tokenizer, model))}
    if recipe.baseline:
        stock = stock_twin(model)
        contenders["stock"] = (stock, DataCollatorForSeq2Seq(tokenizer, stock))
    trainer_of = partial(make_trainer, data=data, evaluation=evaluate)
    compared = compare(contenders, trainer_of, training, AutoModelForSeq2SeqLM, [task.metric, *task.others])

    what, answers = task.trivial
    results = {
        "recipe": task.recipe,
        "arguments": recipe.given,
        "task": task.task,
        "metric": task.metric,
        "others": task.others,
        "model": describe_new_model(model),
        "dataset": describe_source(recipe.dataset) | {"rows": {name: len(rows) for name, rows in data.items()}},
        "trivial": {"what": what, **task.score(answers(texts), evaluate.references)},
        "training": describe_training(training) | {"dropout": recipe.dropout},
        **compared,
    }
    report(results, task_card(task, results), training, recipe.model_card_dir)


def task_card(task: Task, results: Results) -> ModelCard:
    return model_card(results, title=task.title, usage=task.usage, limits=task.limits)


# --- Data ------------------------------------------------------------------------------------------------------------


def train_tokenizer(rows: Iterable[Any], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level byte-pair encoding (Radford et al., 2019) of sources and targets alike; [`END`] ends every text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel()
    backend.decoder = decoders.ByteLevel()
    learned = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator((text for row in rows for text in row.values()), learned)
    backend.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, backend.token_to_id(END))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=START,
        eos_token=END,
        model_input_names=["input_ids", "attention_mask"],
    )


def encode(texts: DatasetDict, tokenizer: PreTrainedTokenizerFast, recipe: Seq2SeqArguments) -> DatasetDict:
    """`input_ids` and `labels`, each cut to its greatest length."""

    def encoded(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        limits = (recipe.max_source_tokens, recipe.max_target_tokens)
        sources, targets = (
            tokenizer(column, truncation=True, max_length=limit)["input_ids"]
            for column, limit in zip(rows.values(), limits, strict=True)
        )
        return {"input_ids": sources, "labels": targets}

    return texts.map(encoded, batched=True, remove_columns=texts["train"].column_names)


# --- Model -----------------------------------------------------------------------------------------------------------


def make_model(
    recipe: Seq2SeqArguments, tokenizer: PreTrainedTokenizerFast, generation: dict[str, Any]
) -> DynMaskForConditionalGeneration:
    """An encoder-decoder with random weights that a BART can hold."""
    side = {
        "vocab_size": len(tokenizer),
        "hidden_size": recipe.hidden_size,
        "num_hidden_layers": recipe.num_hidden_layers,
        "num_attention_heads": recipe.hidden_size // HEAD_SIZE,
        "intermediate_size": 4 * recipe.hidden_size,
        "position_offset": 2,  # as BART's
        "initializer_range": recipe.hidden_size**-0.5,  # the usual 0.02 is too little for a small model
        "max_position_embeddings": max(recipe.max_source_tokens, recipe.max_target_tokens + 1) + 2,
        "hidden_dropout_prob": recipe.dropout,
        "attention_probs_dropout_prob": recipe.dropout,
    }
    ids = special_token_ids(tokenizer)
    config = DynMaskSeq2SeqConfig(encoder=side, decoder=side, decoder_start_token_id=ids["bos_token_id"], **ids)
    model = DynMaskForConditionalGeneration(config)
    model.generation_config.update(max_length=recipe.max_target_tokens + 1, **generation)
    return model


def stock_twin(model: DynMaskForConditionalGeneration) -> PreTrainedModel:
    """A BART of the same weights, that generates alike."""
    stock = to_transformers(model, "bart")
    stock.generation_config = copy.deepcopy(model.generation_config)
    return stock


# --- Training --------------------------------------------------------------------------------------------------------


@dataclass
class Evaluation:
    """Generated tokens to metrics, against the whole texts of the references."""

    task: Task
    tokenizer: PreTrainedTokenizerFast
    references: list[str]

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        ids: Any = prediction.predictions
        ids = np.where(ids < 0, self.tokenizer.pad_token_id, ids)  # the trainer pads with -100
        answers = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return self.task.score([answer.strip() for answer in answers], self.references)


def make_trainer(model, collator, training, data: DatasetDict, evaluation: Evaluation) -> Seq2SeqTrainer:
    return Seq2SeqTrainer(
        model,
        training,
        data_collator=collator,
        train_dataset=data["train"],
        eval_dataset=data["test"],  # pyright: ignore[reportArgumentType]: its annotation admits those of torch alone
        processing_class=evaluation.tokenizer,
        compute_metrics=evaluation,
    )
