"""`hf-dynmask audit`: what it counts, against hand-made batches, in files of every format."""

import re
import sys
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict, NamedSplit, config
from matplotlib import image, pyplot
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import AlbertConfig, BartConfig, BertConfig, DebertaConfig, PreTrainedTokenizerFast, T5Config
from typer.testing import CliRunner

import command
from benchmark import flops
from hf_dynmask.cli import app
from hf_dynmask.tools import audit
from hf_dynmask.tools.audit import Bin, audit_dataset, audit_sizes, histogram
from hf_dynmask.tools.plotting import plot_lengths
from hf_dynmask.training.flops import config_work

BERT = BertConfig(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40, vocab_size=5)
BART: dict[str, Any] = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 5}
BART |= {"encoder_ffn_dim": 20, "decoder_ffn_dim": 20, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
T5 = T5Config(d_model=8, d_ff=8, num_layers=1, num_heads=2, d_kv=4, vocab_size=5)
ALBERT: dict[str, Any] = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 5}
LENGTHS = [3, 9, 1, 40, 6, 2, 7, 5, 12, 4]
TEXTS = [" ".join("abc"[(k + place) % 3] for place in range(length)) for k, length in enumerate(LENGTHS)]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")


def save(configuration, folder, **settings):
    backend = Tokenizer(WordLevel({"[PAD]": 0, "[UNK]": 1, "a": 2, "b": 3, "c": 4}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", **settings)
    tokenizer.save_pretrained(folder)
    configuration.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def model(tmp_path):
    return save(BERT, tmp_path / "model")


@pytest.fixture
def pairs_model(tmp_path):
    return save(BartConfig(**BART), tmp_path / "model")


# --- Batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize("two_sides", [False, True])
def test_batches(batch_size, two_sides, monkeypatch):
    """Padding and operations of batches in order, as the benchmark counts them."""
    configuration = BartConfig(**BART) if two_sides else BERT
    sizes = list(zip(LENGTHS, LENGTHS[::-1], strict=True)) if two_sides else [(length,) for length in LENGTHS]
    monkeypatch.setattr("torch.randperm", lambda number, generator: torch.arange(number))
    plain = audit_sizes(sizes, config_work(configuration), batch_size)[0]
    batches = [sizes[start : start + batch_size] for start in range(0, len(sizes), batch_size)]
    padded = [tuple(map(max, zip(*batch, strict=True))) for batch in batches for _ in batch]
    tokens = [sum(map(sum, batch)) for batch in batches]
    assert plain.name == "plain"
    assert plain.steps == len(batches)
    assert (plain.mean_tokens, plain.most_tokens) == (sum(tokens) / len(tokens), max(tokens))
    assert plain.padding == pytest.approx(1 - sum(map(sum, sizes)) / sum(map(sum, padded)))
    assert plain.speedup == flops(configuration, padded, training=True) / flops(configuration, sizes, training=True)


def test_ways_to_make_batches():
    """Groups pad less than random batches, and a budget evens out the tokens."""
    sizes = [(length,) for length in LENGTHS * 40]
    plain, grouped, budget = audit_sizes(sizes, config_work(BERT), 8)
    assert budget.name == "budget of 72 tokens"  # eight times the mean of 8.9
    assert grouped.padding < plain.padding
    assert 1 < grouped.speedup < plain.speedup
    assert budget.most_tokens <= 72 < plain.most_tokens
    assert plain.steps == grouped.steps == 50
    assert audit_sizes(sizes, config_work(BERT), 8)[0] == plain  # the same each time


def test_a_budget_holds_the_longest_example():
    assert audit_sizes([(1,), (1,), (30,)], config_work(BERT), 1)[2].name == "budget of 30 tokens"


def test_no_padding_at_all():
    for batching in audit_sizes([(5,)] * 6, config_work(BERT), 3):
        assert (batching.padding, batching.speedup) == (0, 1)


# --- Data ------------------------------------------------------------------------------------------------------------


def audited(data, model, *arguments, **options):
    return audit_dataset(Dataset.from_dict(data), model, 4, *arguments, **options)


def test_texts(model):
    found = audited({"number": list(range(10)), "words": TEXTS}, model)
    assert found.sizes == [(length,) for length in LENGTHS]
    assert found.truncated == 0


def test_texts_cut_off(model):
    found = audited({"text": TEXTS}, model, max_length=6)
    assert found.sizes == [(min(length, 6),) for length in LENGTHS]
    assert found.truncated == 4


@pytest.mark.parametrize("settings, longest", [({"model_max_length": 8}, 8), ({}, 20)])
def test_what_the_model_takes(settings, longest, tmp_path):
    bert = BertConfig(**{**BERT.to_dict(), "max_position_embeddings": 20})
    found = audited({"text": TEXTS}, save(bert, tmp_path, **settings))
    assert max(found.sizes) == (longest,)


def test_two_columns_go_in_together(model):
    found = audited({"first": TEXTS, "second": TEXTS[::-1]}, model, ["first", "second"])
    assert found.sizes == [(one + other,) for one, other in zip(LENGTHS, LENGTHS[::-1], strict=True)]


def test_targets(pairs_model):
    found = audited({"text": TEXTS, "summary": TEXTS[::-1]}, pairs_model, target="summary")
    assert found.sizes == list(zip(LENGTHS, LENGTHS[::-1], strict=True))


def test_tokens_need_no_tokenizer(tmp_path):
    BERT.save_pretrained(tmp_path)
    found = audited({"input_ids": [[2] * length for length in LENGTHS]}, str(tmp_path))
    assert found.sizes == [(length,) for length in LENGTHS]


@pytest.mark.parametrize("form", [None, "numpy", "torch"])
def test_padding_in_the_data_is_not_counted(form, model):
    data = {"input_ids": [[2, 2, 0, 0], [2, 0, 0, 0]], "attention_mask": [[1, 1, 0, 0], [0, 1, 1, 1]], "length": [4, 4]}
    assert audit_dataset(Dataset.from_dict(data).with_format(form), model, 4).sizes == [(2,), (3,)]


@pytest.mark.parametrize(
    "data, options, message",
    [
        ({"input_ids": []}, {}, "at least one example; got none"),
        ({"number": [1]}, {}, "the data must have a column of text; got number (int64)"),
        ({"text": ["a"]}, {"columns": ["words"]}, "the data must have `words`, a column of text; got text (string)"),
        ({"text": ["a"]}, {"target": "text"}, "BertConfig needs no column of targets (`target`); got 'text'"),
    ],
)
def test_data_that_does_not_fit(data, options, message, model):
    with pytest.raises(ValueError, match=re.escape(message)):
        audited(data, model, **options)


def test_an_encoder_decoder_without_targets(pairs_model):
    with pytest.raises(ValueError, match=re.escape("BartConfig needs column of targets (`target`); got none")):
        audited({"text": TEXTS}, pairs_model)


def test_a_batch_size_of_none(model):
    with pytest.raises(ValueError, match="`batch_size` must be at least 1; got 0"):
        audit_dataset(Dataset.from_dict({"text": TEXTS}), model, 0)


# --- The command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lengths, expected",
    [
        ([4], [Bin(4, 4, 1)]),
        ([1, 2, 2, 5], [Bin(1, 1, 1), Bin(2, 2, 2), Bin(3, 3, 0), Bin(4, 4, 0), Bin(5, 5, 1)]),
        ([0, 41, 40], [Bin(0, 2, 1), *(Bin(k, k + 2, 0) for k in range(3, 39, 3)), Bin(39, 41, 2)]),
    ],
)
def test_histogram(lengths, expected):
    assert histogram(lengths) == expected


def test_picture_of_lengths():
    """Bars of equally many lengths, a panel for each side."""
    figure: Any = plot_lengths({"tokens": [1, 2, 2, 5], "tokens of the target": [0, 149, 150]})
    heights = [[bar.get_height() for bar in axis.patches] for axis in figure.axes]
    assert heights == [[1, 2, 0, 0, 1], [1, *[0] * 36, 2]]
    assert [axis.get_xlabel() for axis in figure.axes] == ["tokens", "tokens of the target"]
    assert figure.axes[0].get_title(loc="left") == "4 examples, 10 tokens"
    legend = [text.get_text() for text in figure.axes[1].get_legend().get_texts()]
    assert legend == ["mean 100", "longest 150"]
    pyplot.close("all")


def run(*arguments):
    result = CliRunner().invoke(app, ["audit", *map(str, arguments), "--batch-size", "4"], env={"COLUMNS": "120"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


WRITERS = {
    "csv": lambda data, path: data.to_csv(path),
    "tsv": lambda data, path: data.to_csv(path, sep="\t"),
    "jsonl": lambda data, path: data.to_json(path),
    "parquet": lambda data, path: data.to_parquet(path),
    "txt": lambda data, path: path.write_text("\n".join(data["text"]) + "\n", encoding="utf-8-sig"),
}


@pytest.mark.parametrize("ending", [*WRITERS, "CSV"])
def test_files(ending, model, tmp_path):
    path = tmp_path / f"data.{ending}"
    WRITERS[ending.lower()](Dataset.from_dict({"text": TEXTS}), path)
    result = run(path, "--model", model)
    assert result.exit_code == 0, result.stderr
    assert "10 examples, 89 tokens: median 5, 90% 12, 99% 12, most 40" in result.output


def test_what_is_shown(model, tmp_path):
    path, picture = tmp_path / "data.parquet", tmp_path / "lengths.png"
    Dataset.from_dict({"text": TEXTS}).to_parquet(path)
    result = run(path, "--model", model, "--max-length", 12, "--output", picture)
    lines = result.stdout.splitlines()
    assert lines[0].startswith("10 examples, 61 tokens: median 5")
    assert [line.split() for line in lines[1:4]] == [
        ["1-1", "█" * 25, "1"],
        ["2-2", "█" * 25, "1"],
        ["3-3", "█" * 25, "1"],
    ]
    assert lines[12].split() == ["12-12", "█" * 50, "2"]
    assert "Truncated examples: 1" in lines
    table = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]
    expected = audit_dataset(Dataset.from_dict({"text": TEXTS}), model, 4, max_length=12).batchings
    assert [row[0] for row in table] == ["plain", "grouped by length", "budget of 25 tokens"]
    assert [row[1:] for row in table] == [
        [str(b.steps), f"{b.mean_tokens:.0f}", str(b.most_tokens), f"{b.padding:.1%}", f"{b.speedup:.2f}"]
        for b in expected
    ]
    assert lines[-1] == f"wrote {picture}"
    assert min(image.imread(picture).shape[:2]) >= 600
    pyplot.close("all")


# --- Times -----------------------------------------------------------------------------------------------------------


def places(model, optimizer, inputs):
    """In place of seconds: what a step computes."""
    lengths = [inputs[name] for name in ("lengths", "decoder_lengths") if name in inputs]
    masks = [inputs[name] for name in ("attention_mask", "decoder_attention_mask") if name in inputs]
    assert all((mask.cummin(-1).values == mask).all() for mask in masks)
    return sum(of_side.sum().item() for of_side in lengths) or sum(mask.numel() for mask in masks)


@pytest.mark.parametrize("configuration, sides", [(BERT, 1), (BartConfig(**BART), 2)], ids=["bert", "bart"])
def test_times(configuration, sides, monkeypatch):
    """No epoch has more than four batches here, so that all of them are timed."""
    sizes = [(length,) * sides for length in LENGTHS]
    real = audit.time_speedups(configuration, sizes, 3)
    assert len(real) == 3 and min(real) > 0
    monkeypatch.setattr(audit, "_seconds_of_step", places)
    expected = [1 / (1 - found.padding) for found in audit_sizes(sizes, config_work(configuration), 3)]
    assert audit.time_speedups(configuration, sizes, 3) == pytest.approx(expected)


@pytest.mark.parametrize("configuration, sides", [(T5, 2), (AlbertConfig(**ALBERT), 1)], ids=["t5", "albert"])
def test_times_of_a_model_that_cannot_be_converted(configuration, sides):
    """It is the stock one, with our attention."""
    assert min(audit.time_speedups(configuration, [(length,) * sides for length in LENGTHS], 3)) > 0


def test_times_of_texts_without_a_token():
    assert min(audit.time_speedups(BERT, [(0,), (0,), (2,)], 2)) > 0


def test_times_of_a_model_that_computes_attention_itself():
    with pytest.raises(ValueError, match="needs a model that uses transformers' attention interface; DebertaModel"):
        audit.time_speedups(DebertaConfig(**ALBERT), [(3,), (4,)], 2)


def test_times_are_printed(model, tmp_path, monkeypatch):
    monkeypatch.setattr(audit, "_seconds_of_step", places)
    (tmp_path / "data.txt").write_text("\n".join(TEXTS))
    result = run(tmp_path / "data.txt", "--model", model, "--time")
    header, plain = (line for line in result.stdout.splitlines() if "batches" in line or "plain" in line)
    assert header.split("┃")[-2].strip() == "speed-up, timed"
    padding = audit_dataset(Dataset.from_dict({"text": TEXTS}), model, 4).batchings[0].padding
    assert plain.split("│")[-2].strip() == f"{1 / (1 - padding):.2f}"


# --- Files -----------------------------------------------------------------------------------------------------------


def test_files_of_another_format(model, tmp_path):
    (tmp_path / "data.doc").write_text("a")
    result = run(tmp_path / "data.doc", "--model", model)
    assert result.exit_code == 2
    assert result.stderr.startswith(
        "error: a data file must end in one of .csv, .tsv, .json, .jsonl, .parquet, .txt; got "
    )


@pytest.mark.parametrize(
    "ending, content, message",
    [
        ("parquet", b'{"text": ', "not a parquet file"),
        ("json", b'{"text": ', "cannot be read as json: "),
        ("jsonl", '{"text": "é"}'.encode("latin-1"), "column `text` must hold text in UTF-8: 'utf-8' codec can't"),
        ("csv", b"text,label\n", r"data\.csv cannot be read as csv: .*no data"),
    ],
)
def test_broken_files(ending, content, message, model, tmp_path):
    (tmp_path / f"data.{ending}").write_bytes(content)
    result = run(tmp_path / f"data.{ending}", "--model", model)
    assert result.exit_code == 2
    assert re.search(f"error: .*{message}", result.stderr)


def test_the_working_directory(model, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    Dataset.from_dict({"text": TEXTS}).to_csv(tmp_path / "data/texts.csv")
    monkeypatch.chdir(tmp_path / "data")
    assert "10 examples, 89 tokens" in run(".", "--model", model).output


def test_a_split_that_is_not_there(model, tmp_path):
    (tmp_path / "data.txt").write_text("a\n")
    result = run(tmp_path / "data.txt", "--model", model, "--split", "held_out")
    assert result.exit_code == 2
    assert 'error: Unknown split "held_out"' in result.stderr


@pytest.mark.parametrize("split", [[], ["--split", "train"]])
def test_a_folder_of_a_saved_data_set(split, model, tmp_path):
    data = Dataset.from_dict({"text": TEXTS})
    data.save_to_disk(tmp_path / "one")
    DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(tmp_path / "splits")
    for folder in ("one", "splits"):
        assert "10 examples, 89 tokens" in run(tmp_path / folder, "--model", model, *split).output
    assert "1 examples, 3 tokens" in run(tmp_path / "splits", "--model", model, "--split", "test").output


def test_a_saved_split_has_its_own_name(model, tmp_path):
    Dataset.from_dict({"text": TEXTS}, split=NamedSplit("test")).save_to_disk(tmp_path / "data")
    for split in ([], ["--split", "test"]):
        assert "10 examples, 89 tokens" in run(tmp_path / "data", "--model", model, *split).output


def test_a_split_that_was_not_saved(model, tmp_path):
    data = Dataset.from_dict({"text": TEXTS})
    data.save_to_disk(tmp_path / "one")
    DatasetDict({"train": data, "test": data}).save_to_disk(tmp_path / "splits")
    for folder, known in (("one", "'train'"), ("splits", "'train', 'test'")):
        result = run(tmp_path / folder, "--model", model, "--split", "held_out")
        assert result.exit_code == 2
        assert result.stderr == f"error: the split must be one of {known}; got 'held_out'\n"


def test_a_saved_data_set_of_tokens(model, tmp_path):
    rows = {"input_ids": [[2] * length for length in LENGTHS], "labels": list(range(10))}
    Dataset.from_dict(rows).with_format("torch").save_to_disk(tmp_path / "data")
    assert "10 examples, 89 tokens" in run(tmp_path / "data", "--model", model).output


def test_without_datasets(monkeypatch, model):
    monkeypatch.setitem(sys.modules, "datasets", None)
    result = run("data.txt", "--model", model)
    assert result.exit_code == 2
    assert result.stderr == "error: reading data needs datasets: pip install 'hf_dynmask[data]'\n"


def test_samples_are_the_recipes(model, monkeypatch, capsys):
    """The command names the script that takes them, which hands it files."""
    result = run("sample:reviews", "--model", model)
    assert result.exit_code == 2
    assert "run `python recipes/command.py` instead of `hf-dynmask`; got sample:reviews" in result.stderr
    data = {"train": Dataset.from_dict({"text": TEXTS})}
    monkeypatch.setattr(command, "resolve_dataset", {"sample:reviews": data}.__getitem__)
    monkeypatch.setattr(command, "resolve_model", {"sample:minilm": model}.__getitem__)
    with pytest.raises(SystemExit, match="0"):
        command.main(["audit", "sample:reviews", "--model", "sample:minilm", "--batch-size", "4"])
    assert "10 examples, 89 tokens" in capsys.readouterr().out
