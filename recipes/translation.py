"""
Trains an encoder-decoder from random weights to translate, with the stock `Seq2SeqTrainer`, on batches with lengths.

    python recipes/translation.py

takes short English sentences and their Spanish translations. To train the stock model on padded batches too:

    python recipes/translation.py --baseline

With pairs of your own, from the Hub or from disk (columns `source` and `target`), and a larger model:

    python recipes/translation.py --dataset pairs.csv --hidden_size 512 --num_hidden_layers 6 --num_train_epochs 10

Every option of `Seq2SeqTrainingArguments` applies. Results, model card and model go to `--output_dir`. The measures are
chrF and BLEU of sacrebleu itself: `evaluate`, which wraps it, would have to fetch the wrapper from the Hub.
"""

from dataclasses import dataclass, field
from functools import partial

from datasets import DatasetDict
from sacrebleu import corpus_bleu, corpus_chrf

from support.seq2seq import Seq2SeqArguments, Task, run, task_card

USAGE = """
import hf_dynmask  # registers the model type with transformers
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
model = AutoModelForSeq2SeqLM.from_pretrained("path/to/this/folder")
batch = tokenizer(["I like it.", "Where do you live?"], padding=True, return_tensors="pt")
tokenizer.batch_decode(model.generate(**batch, num_beams=4), skip_special_tokens=True)
"""
LIMITS = (
    "It leaves out, adds or turns round what is said, and gives no sign of it. The measures compare characters and "
    "words, not what is meant."
)


@dataclass
class RecipeArguments(Seq2SeqArguments):
    dataset: str = field(
        default="sample:sentences",
        metadata={"help": "A Hub id, a csv, json or parquet file or a sample, with the columns `source` and `target`."},
    )
    max_source_tokens: int = field(default=32, metadata={"help": "Tokens of a source that are read."})
    max_target_tokens: int = field(default=32, metadata={"help": "Tokens of a target, at most."})


def score(answers: list[str], references: list[str]) -> dict[str, float]:
    """chrF (Popović, 2015) and BLEU (Papineni et al., 2002), of 100."""
    return {
        "chrf": corpus_chrf(answers, [references]).score,
        "bleu": corpus_bleu(answers, [references]).score,
    }


def sources(texts: DatasetDict) -> list[str]:
    return list(texts["test"]["source"])


TASK = Task(
    recipe="translation",
    task="translation",
    arguments=RecipeArguments,
    source="source",
    target="target",
    metric="chrf",
    others=["bleu"],
    score=score,
    trivial=("the source as it is", sources),
    title="Translation",
    usage=USAGE,
    limits=LIMITS,
)


make_card = partial(task_card, TASK)


def main(arguments: list[str] | None = None) -> None:
    run(TASK, arguments, {"num_train_epochs": 4})


if __name__ == "__main__":
    main()
