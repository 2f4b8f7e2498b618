"""
Trains an encoder-decoder from random weights to summarise, with the stock `Seq2SeqTrainer`, on batches with lengths.

    python recipes/summarization.py

uses the beginnings of news articles and their summaries. To also train the stock model on padded batches:

    python recipes/summarization.py --baseline

With your own texts, from the Hub or from disk (columns `text` and `summary`), and a larger model:

    python recipes/summarization.py --dataset articles.csv --max_source_tokens 1024 --num_train_epochs 10

All options of `Seq2SeqTrainingArguments` apply. Results, model card and model are written to `--output_dir`. Metrics
come from rouge-score itself, since `evaluate` would download its wrapper from the Hub.
"""

import support.threads  # noqa: F401

import random
from dataclasses import dataclass, field
from statistics import fmean

from datasets import DatasetDict
from rouge_score.rouge_scorer import RougeScorer
from transformers import AutoModelForSeq2SeqLM, Seq2SeqTrainer, Seq2SeqTrainingArguments, set_seed

from hf_dynmask import DataCollatorForSeq2SeqWithLengths
from support import seq2seq
from support.common import load_texts, parse_arguments
from support.reporting import About, train_and_report
from support.seq2seq import (
    Evaluation,
    Seq2SeqArguments,
    bart_baseline,
    dropout_of_decoder,
    encode,
    new_model,
    train_tokenizer,
)

ROUGE = ["rouge1", "rouge2", "rougeL"]


def main(arguments: list[str] | None = None) -> None:
    recipe, training = parse_arguments([RecipeArguments, Seq2SeqTrainingArguments], arguments, DEFAULTS)

    texts = load_texts(recipe.dataset, "text", "summary")
    tokenizer = train_tokenizer(texts["train"], recipe.vocab_size)
    data = encode(texts, tokenizer, recipe.max_source_tokens, recipe.max_target_tokens)
    references = list(texts["test"]["summary"])

    set_seed(training.seed)
    model = new_model(recipe, tokenizer, no_repeat_ngram_size=3)
    trainer = Seq2SeqTrainer(
        model,
        training,
        data_collator=DataCollatorForSeq2SeqWithLengths(tokenizer, model),
        train_dataset=data["train"],
        eval_dataset=data["test"],  # pyright: ignore[reportArgumentType]: annotated for data sets of torch only
        processing_class=tokenizer,
        compute_metrics=Evaluation(score, tokenizer, references),
    )

    train_and_report(
        ABOUT,
        recipe,
        trainer,
        AutoModelForSeq2SeqLM.from_pretrained,
        bart_baseline(model, tokenizer) if recipe.baseline else {},
        settings={"dropout": dropout_of_decoder(model)},
        trivial={"what": "the summary of another text", **score(summaries_of_others(texts), references)},
    )


def score(answers: list[str], references: list[str]) -> dict[str, float]:
    """Mean F-measures of ROUGE-1, -2 and -L (Lin, 2004), from 0 to 100."""
    scorer = RougeScorer(ROUGE)
    scores = [scorer.score(*pair) for pair in zip(references, answers, strict=True)]
    return {metric: 100 * fmean(found[metric].fmeasure for found in scores) for metric in ROUGE}


def summaries_of_others(texts: DatasetDict) -> list[str]:
    draw = random.Random(0)
    return draw.choices(list(texts["train"]["summary"]), k=len(texts["test"]))


# --- Arguments and model card ----------------------------------------------------------------------------------------


@dataclass
class RecipeArguments(Seq2SeqArguments):
    dataset: str = field(
        default="sample:news",
        metadata={"help": "A Hub id, a csv, json or parquet file or a sample, with the columns `text` and `summary`."},
    )
    max_source_tokens: int = field(default=128, metadata={"help": "Texts are truncated to this many tokens."})
    max_target_tokens: int = field(default=128, metadata={"help": "Summaries are truncated to this many tokens."})
    vocab_size: int = field(default=4000, metadata={"help": "Size of the vocabulary learned from the training data."})


DEFAULTS = seq2seq.DEFAULTS | {
    "output_dir": "outputs/summarization",
    "num_train_epochs": 2,
    "per_device_train_batch_size": 32,
}
USAGE = """
import hf_dynmask  # registers the model type with transformers
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
model = AutoModelForSeq2SeqLM.from_pretrained("path/to/this/folder")
batch = tokenizer(["An article."], truncation=True, max_length=128, return_tensors="pt")
tokenizer.batch_decode(model.generate(**batch), skip_special_tokens=True)
"""
LIMITS = (
    "It reads only the beginning of a text. It may state what the text does not say, which the metrics do not detect."
)
ABOUT = About(
    recipe="summarization",
    task="summarization",
    metrics=["rougeL", "rouge1", "rouge2"],
    title="Summarization",
    usage=USAGE,
    limits=LIMITS,
)
make_card = ABOUT.make_card

if __name__ == "__main__":
    main()
