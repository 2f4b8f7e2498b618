"""
Trains an encoder-decoder from random weights to translate, with the stock `Seq2SeqTrainer`, on batches with lengths.

    python recipes/translation.py

uses short English sentences and their Spanish translations. To also train the stock model on padded batches:

    python recipes/translation.py --baseline

With your own pairs, from the Hub or from disk (columns `source` and `target`), and a larger model:

    python recipes/translation.py --dataset pairs.csv --hidden_size 512 --num_hidden_layers 6 --num_train_epochs 10

All options of `Seq2SeqTrainingArguments` apply. Results, model card and model are written to `--output_dir`. Metrics
come from sacrebleu itself, since `evaluate` would download its wrapper from the Hub.
"""

import support.threads  # noqa: F401

from dataclasses import dataclass, field

from sacrebleu import corpus_bleu, corpus_chrf
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


def main(arguments: list[str] | None = None) -> None:
    recipe, training = parse_arguments([RecipeArguments, Seq2SeqTrainingArguments], arguments, DEFAULTS)

    texts = load_texts(recipe.dataset, "source", "target")
    tokenizer = train_tokenizer(texts["train"], recipe.vocab_size)
    data = encode(texts, tokenizer, recipe.max_source_tokens, recipe.max_target_tokens)
    references = list(texts["test"]["target"])

    set_seed(training.seed)
    model = new_model(recipe, tokenizer)
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
        trivial={"what": "the source as it is", **score(list(texts["test"]["source"]), references)},
    )


def score(answers: list[str], references: list[str]) -> dict[str, float]:
    """chrF (Popović, 2015) and BLEU (Papineni et al., 2002), from 0 to 100."""
    return {
        "chrf": corpus_chrf(answers, [references]).score,
        "bleu": corpus_bleu(answers, [references]).score,
    }


# --- Arguments and model card ----------------------------------------------------------------------------------------


@dataclass
class RecipeArguments(Seq2SeqArguments):
    dataset: str = field(
        default="sample:sentences",
        metadata={"help": "A Hub id, a csv, json or parquet file or a sample, with the columns `source` and `target`."},
    )
    max_source_tokens: int = field(default=32, metadata={"help": "Sources are truncated to this many tokens."})
    max_target_tokens: int = field(default=32, metadata={"help": "Targets are truncated to this many tokens."})


DEFAULTS = seq2seq.DEFAULTS | {"output_dir": "outputs/translation", "num_train_epochs": 4}
USAGE = """
import hf_dynmask  # registers the model type with transformers
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
model = AutoModelForSeq2SeqLM.from_pretrained("path/to/this/folder")
batch = tokenizer(["I like it.", "Where do you live?"], padding=True, return_tensors="pt")
tokenizer.batch_decode(model.generate(**batch, num_beams=4), skip_special_tokens=True)
"""
LIMITS = (
    "It may omit, add or reverse parts of the meaning without any sign of it. The metrics compare characters and "
    "words, not meaning."
)
ABOUT = About(
    recipe="translation",
    task="translation",
    metrics=["chrf", "bleu"],
    title="Translation",
    usage=USAGE,
    limits=LIMITS,
)
make_card = ABOUT.make_card

if __name__ == "__main__":
    main()
