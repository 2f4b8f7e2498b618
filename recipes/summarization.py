"""
Trains an encoder-decoder from random weights to summarise, with the stock `Seq2SeqTrainer`, on batches with lengths.

    python recipes/summarization.py

takes the beginnings of news articles and their highlights. To train the stock model on padded batches too:

    python recipes/summarization.py --baseline

With texts of your own, from the Hub or from disk (columns `text` and `summary`), and a larger model:

    python recipes/summarization.py --dataset articles.csv --max_source_tokens 1024 --num_train_epochs 10

Every option of `Seq2SeqTrainingArguments` applies. Results, model card and model go to `--output_dir`. The measures are
ROUGE of rouge-score itself: `evaluate`, which wraps it, would have to fetch the wrapper from the Hub.
"""

import random
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean

from datasets import DatasetDict
from rouge_score.rouge_scorer import RougeScorer

from support.seq2seq import Seq2SeqArguments, Task, run, task_card

METRICS = ["rouge1", "rouge2", "rougeL"]
USAGE = """
import hf_dynmask  # registers the model type with transformers
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
model = AutoModelForSeq2SeqLM.from_pretrained("path/to/this/folder")
batch = tokenizer(["An article."], truncation=True, max_length=128, return_tensors="pt")
tokenizer.batch_decode(model.generate(**batch), skip_special_tokens=True)
"""
LIMITS = (
    "It reads the beginning of a text alone and may state what the text does not say, which the measures do not notice."
)


@dataclass
class RecipeArguments(Seq2SeqArguments):
    dataset: str = field(
        default="sample:news",
        metadata={"help": "A Hub id, a csv, json or parquet file or a sample, with the columns `text` and `summary`."},
    )
    max_source_tokens: int = field(default=128, metadata={"help": "Tokens of a text that are read."})
    max_target_tokens: int = field(default=128, metadata={"help": "Tokens of a summary, at most."})
    vocab_size: int = field(default=4000, metadata={"help": "Tokens that are learned from the training data."})


def score(answers: list[str], references: list[str]) -> dict[str, float]:
    """Mean F-measures of ROUGE (Lin, 2004), of 100: common words, pairs of words, and the longest common sequence."""
    scorer = RougeScorer(METRICS)
    scores = [scorer.score(*pair) for pair in zip(references, answers, strict=True)]
    return {metric: 100 * fmean(found[metric].fmeasure for found in scores) for metric in METRICS}


def summaries_of_others(texts: DatasetDict) -> list[str]:
    draw = random.Random(0)
    return draw.choices(list(texts["train"]["summary"]), k=len(texts["test"]))


TASK = Task(
    recipe="summarization",
    task="summarization",
    arguments=RecipeArguments,
    source="text",
    target="summary",
    metric="rougeL",
    others=["rouge1", "rouge2"],
    score=score,
    trivial=("the summary of another text", summaries_of_others),
    generation={"no_repeat_ngram_size": 3},
    title="Summarization",
    usage=USAGE,
    limits=LIMITS,
)


make_card = partial(task_card, TASK)


def main(arguments: list[str] | None = None) -> None:
    run(TASK, arguments, {"num_train_epochs": 2, "per_device_train_batch_size": 32})


if __name__ == "__main__":
    main()
