"""The recipe, end to end on a tiny checkpoint, and its parts."""

import contextlib
import io
import json
import random
import shlex
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from datasets import config as datasets_config
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    BertTokenizer,
    TrainingArguments,
    set_seed,
)

from hf_dynmask import DynMaskForSequenceClassification
from sequence_classification import DEFAULTS, RecipeArguments, encode_labels, main, make_card
from support.cards import command, describe_source
from support.common import dropout_of, dropout_settings, load_columns, load_model, names_of, parse_arguments
from support.measuring import check_reloaded, padding_share
from support.samples import resolve_dataset

WORDS = ["a", "the", "film", "plot", "was", "is", "not", "very", "good", "bad", "dull", "great"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a stock checkpoint, `model`, and reviews, `reviews.csv`."""
    folder = tmp_path_factory.mktemp("recipe")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    BertTokenizer({word: i for i, word in enumerate(vocabulary)}).save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    BertModel(config).save_pretrained(folder / "model")
    draw = random.Random(0)
    rows = [f"{' '.join(draw.choices(WORDS, k=draw.randint(1, 9)))},{draw.choice(['no', 'yes'])}" for _ in range(40)]
    (folder / "reviews.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    return folder


@pytest.fixture(scope="module")
def run(folder):
    """The output folder of a run with `--baseline`, and what it printed."""
    printed = call(folder, "--baseline", output_dir=folder / "output", model_card_dir=folder / "cards")
    return folder / "output", printed


def call(folder, *flags, **options):
    """What the recipe prints."""
    options |= {"model": folder / "model", "dataset": folder / "reviews.csv", "save_strategy": "epoch"}
    options |= {"per_device_train_batch_size": 16, "learning_rate": 1e-2}
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(datasets_config, "HF_DATASETS_CACHE", folder / "datasets-cache")
        main([*arguments, *flags, "--use_cpu"])
    return printed.getvalue()


def load_classifier(checkpoint: str, labels: list[str], dropout: float) -> Any:
    settings = names_of(labels) | dropout_of(dropout)
    return load_model(checkpoint, "sequence-classification", AutoModelForSequenceClassification, **settings)


@pytest.fixture(scope="module")
def output(run):
    return run[0]


@pytest.fixture(scope="module")
def results(output):
    return json.loads((output / "results.json").read_text())


@pytest.fixture
def splits(folder, monkeypatch):
    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", folder / "datasets-cache")
    return resolve_dataset(str(folder / "reviews.csv"))


# --- the run ---------------------------------------------------------------------------------------------------------


def test_saved_model_has_the_accuracy(output, results, splits):
    """Computed here from the saved files alone, on padded rows with an attention mask."""
    model = AutoModelForSequenceClassification.from_pretrained(output)
    assert isinstance(model, DynMaskForSequenceClassification)
    batch = AutoTokenizer.from_pretrained(output)(list(splits["test"]["text"]), padding=True, return_tensors="pt")
    predicted = [("no", "yes")[label] for label in model(**batch).logits.argmax(-1).tolist()]
    right = [found == label for found, label in zip(predicted, splits["test"]["label"], strict=True)]
    assert results["runs"]["dynmask"]["accuracy"] == sum(right) / len(right)


def test_a_resumed_run_ends_where_the_other_did(output, results, folder, tmp_path):
    """Its tokens are those since the checkpoint, half of all."""
    call(folder, output_dir=tmp_path, dropout=0, resume_from_checkpoint=output / "checkpoint-3")
    weights = [load_file(place / "model.safetensors") for place in (tmp_path, output)]
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())
    found, whole = (json.loads((place / "results.json").read_text())["runs"]["dynmask"] for place in (tmp_path, output))
    assert found["accuracy"] == whole["accuracy"] and 2 * found["train_tokens"] == whole["train_tokens"]


def test_baseline_follows_the_same_course(output, folder):
    """Same weights to start from, same batches: after two epochs the two models still say the same."""
    model = AutoModelForSequenceClassification.from_pretrained(output)
    (checkpoint,) = (output / "stock").glob("checkpoint-6")
    stock = AutoModelForSequenceClassification.from_pretrained(checkpoint)
    assert isinstance(stock, BertForSequenceClassification)
    set_seed(42)  # as the run did
    before = load_classifier(str(folder / "model"), ["no", "yes"], 0.0)
    batch = AutoTokenizer.from_pretrained(output)(
        [" ".join(WORDS), "good film", "bad"], padding=True, return_tensors="pt"
    )
    found, expected, start = (candidate(**batch).logits for candidate in (model, stock, before))
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)
    assert (found - start).abs().max() > 1e-2


def test_real_tokens_are_counted(output, results, splits):
    tokenizer = AutoTokenizer.from_pretrained(output)
    tokens = sum(len(input_ids) for input_ids in tokenizer(list(splits["train"]["text"]))["input_ids"])
    for figures in results["runs"].values():
        assert figures["train_tokens"] == 2 * tokens == 2 * round(36 * results["lengths"]["input_ids"]["mean"])
        assert figures["tokens_per_second"] == pytest.approx(2 * tokens / figures["train_seconds"])
    assert 0.1 < results["padding_share"] < 0.6


def test_what_the_results_tell(results, folder):
    assert list(results["runs"]) == ["dynmask", "stock"]
    assert results["model"] == {"name": str(folder / "model")}
    assert results["dataset"] == {"name": str(folder / "reviews.csv"), "rows": {"train": 36, "test": 4}}
    assert results["labels"] == ["no", "yes"]
    assert results["masks"] == {"attention": "full"}
    assert results["arguments"] | {"use_cpu": True} == {
        "model": str(folder / "model"),
        "dataset": str(folder / "reviews.csv"),
        "save_strategy": "epoch",
        "per_device_train_batch_size": 16,
        "learning_rate": 1e-2,
        "baseline": True,
        "use_cpu": True,  # what is usual where there is no accelerator
    }
    assert results["training"]["learning_rate"] == 1e-2
    assert results["training"]["num_train_epochs"] == 2
    assert results["environment"]["torch"] == version("torch")


def test_model_card_is_the_results(output, results, folder):
    card = ModelCard.load(output / "README.md")
    assert str(card) == str(make_card(results))
    metadata: Any = card.data
    (measured,) = metadata.eval_results
    assert (measured.dataset_split, measured.dataset_args) == ("test", {"rows": 4})
    assert (measured.metric_type, measured.metric_value) == ("accuracy", results["runs"]["dynmask"]["accuracy"])
    assert metadata.pipeline_tag == "text-classification"
    for name in ("json", "md"):
        written = {"json": output / "results.json", "md": output / "README.md"}[name]
        assert (folder / "cards" / f"sequence_classification.{name}").read_text() == written.read_text()
    figure = "sequence_classification.png"
    assert f"]({figure})" in card.text
    assert (folder / "cards" / figure).read_bytes() == (output / figure).read_bytes()


def test_the_command_of_the_card(results):
    python, script, *arguments = shlex.split(command(results))
    assert (python, script) == ("python", "recipes/sequence_classification.py")
    recipe, training = parse_arguments([RecipeArguments, TrainingArguments], arguments, DEFAULTS)
    assert recipe.given == results["arguments"]
    assert (recipe.dataset, training.learning_rate) == (results["dataset"]["name"], 1e-2)
    several = results | {"environment": {"processes": 2}, "arguments": {"parts": ["a", "b c"], "seed": 7}}
    script = "recipes/sequence_classification.py"
    assert command(several) == f"accelerate launch --num_processes 2 {script} --parts a 'b c' --seed 7"


def test_printed_summary_is_in_the_card(run, output, results):
    printed = run[1]
    lines = [line for line in printed.splitlines() if line.startswith(("|", "Padding", "Speed-up"))]
    assert len(lines) == 6
    assert all(line in (output / "README.md").read_text() for line in lines)
    assert f"{results['padding_share']:.1%}" in printed


# --- its parts -------------------------------------------------------------------------------------------------------


def test_model_that_is_a_dynmask_one_already(output):
    model = load_classifier(str(output), ["a", "b"], 0.25)
    assert (model.config.hidden_dropout_prob, model.config.attention_probs_dropout_prob) == (0.25, 0.25)
    assert model.config.id2label == {0: "a", 1: "b"}
    saved = load_file(output / "model.safetensors")
    assert {name: weight.tolist() for name, weight in model.state_dict().items()} == {
        name: weight.tolist() for name, weight in saved.items()
    }


@pytest.mark.parametrize(
    "flags, expected",
    [
        ([], {}),
        (["--baseline"], dropout_of(0.0)),
        (["--dropout", "0.3"], dropout_of(0.3)),
        (["--dropout", "0.3", "--baseline"], dropout_of(0.3)),
        (["--dropout", "0"], dropout_of(0.0)),
    ],
)
def test_dropout_is_the_model_s_own_unless_two_trainings_are_compared(flags, expected):
    (recipe,) = parse_arguments([RecipeArguments], flags)
    assert dropout_settings(recipe) == expected


def test_card_names_what_is_on_the_hub(results):
    hub = {"name": "owner/model", "hub_id": "owner/model"}, {"name": "owner/data", "hub_id": "owner/data"}
    model, dataset = hub
    metadata: Any = make_card(results | {"model": model, "dataset": results["dataset"] | dataset}).data
    assert (metadata.base_model, metadata.datasets) == ("owner/model", ["owner/data"])
    (measured,) = metadata.eval_results
    assert (measured.dataset_type, measured.dataset_split) == ("owner/data", None)  # which one of its was not kept


def test_origin_and_licence_of_samples():
    assert describe_source("sample:minilm")["licence"].startswith("Apache-2.0")
    assert "rotten_tomatoes" in describe_source("sample:reviews")["origin"]
    assert describe_source("owner/model") == {"name": "owner/model", "hub_id": "owner/model"}


def test_padding_share():
    batches = [
        {"input_ids": torch.zeros(2, 3), "lengths": torch.tensor([3, 1])},
        {"input_ids": torch.zeros(2, 5), "lengths": torch.tensor([5, 4])},
    ]
    assert padding_share(batches) == 3 / 16


def test_labels_keep_their_order():
    data = DatasetDict({"train": Dataset.from_dict({"label": [10, 2, 2]}), "test": Dataset.from_dict({"label": [10]})})
    encoded = encode_labels(data)
    assert encoded["train"].features["label"].names == ["2", "10"]
    assert (list(encoded["train"]["label"]), list(encoded["test"]["label"])) == ([1, 0, 0], [1])


def test_one_class():
    rows = Dataset.from_dict({"label": ["yes", "yes"]})
    with pytest.raises(ValueError, match="`label` must have at least two classes; got yes"):
        encode_labels(DatasetDict({"train": rows, "test": rows}))


def test_columns_are_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", tmp_path / "cache")
    file = tmp_path / "data.csv"
    file.write_text("sentence,label\ngood,1\nbad,0\n")
    with pytest.raises(ValueError, match="must have the columns `text` and `label`; got sentence, label"):
        load_columns(str(file), "text", "label")


def test_saved_model_is_another():
    trainer: Any = SimpleNamespace(evaluate=lambda: {"eval_accuracy": 0.5})
    with pytest.raises(RuntimeError, match="the saved model must have the accuracy 0.75; got 0.5"):
        check_reloaded(trainer, "accuracy", 0.75)
