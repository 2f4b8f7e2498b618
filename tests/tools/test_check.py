"""`hf-dynmask check`: checkpoints that are right, and every way of being wrong that it looks for."""

import re
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import (
    AlbertConfig,
    AlbertForPreTraining,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    CLIPConfig,
    CLIPModel,
    PreTrainedTokenizerFast,
)
from typer.testing import CliRunner

from hf_dynmask import (
    DynMaskConfig,
    DynMaskForConditionalGeneration,
    DynMaskForCTC,
    DynMaskForTokenClassification,
    DynMaskRecurrentConfig,
    DynMaskRecurrentForTokenClassification,
    DynMaskSeq2SeqConfig,
    from_transformers,
)
from hf_dynmask.cli import app
from hf_dynmask.tools import check as check_module
from hf_dynmask.tools.check import Finding, Speed, check_model
from stock_models import random_stock

SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
SIZES |= {"vocab_size": 50}
AGREE = ["lengths, in rows", "lengths, end to end", "attention_mask, padding on the left", "one by one"]
APART = ["lengths, in rows", "lengths, end to end", "lengths, in rows"]
STOCK_AGREE = ["stock model, attention_mask", "stock model, lengths", "stock model, one by one"]
STOCK_APART = ["stock model, attention_mask", "stock model, lengths", "stock model, attention_mask"]
ALL = STOCK_AGREE + STOCK_APART + AGREE + APART
SPEED = Speed("one", torch.float32, 1.5, 0.5, torch.device("cpu"))


def findings_of(*arguments, **settings):
    return [result for result in check_model(*arguments, **settings) if isinstance(result, Finding)]


@pytest.fixture
def saved(tmp_path):
    """Saves a model, and gives its folder."""

    def save(model):
        model.save_pretrained(tmp_path / "model")
        return str(tmp_path / "model")

    return save


def token_classifier(**settings):
    torch.manual_seed(0)
    return DynMaskForTokenClassification(DynMaskConfig(**SIZES, **settings))


# --- Right -----------------------------------------------------------------------------------------------------------

STOCK = [("bert", "masked-lm"), ("roberta", "sequence-classification"), ("electra", "question-answering")]
STOCK += [("llama", "causal-lm"), ("gpt2", "base"), ("bart", "seq2seq-lm"), ("bart", "sequence-classification")]
STOCK += [("llama", "sequence-classification"), ("modernbert", "token-classification"), ("gemma3_text", "base")]
STOCK += [("eurobert", "sequence-classification")]


@pytest.mark.parametrize("family, task", STOCK)
def test_stock_checkpoints(family, task, saved):
    findings = findings_of(saved(random_stock(family, task)))
    left_out = task == "sequence-classification"  # what is in the padding: a head of its own may look for the pad token
    assert len(findings) == 2 * (len(ALL) - left_out)
    assert all("as the stock model" in finding.what for finding in findings[: len(STOCK_AGREE)])
    assert [finding for finding in findings if not finding.is_right] == []


SMALL: dict[str, Any] = {**SIZES, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
UNCONVERTED: dict[str, tuple[Any, dict[str, Any]]] = {
    "phi3": (AutoModelForCausalLM, SMALL),
    "mixtral": (AutoModelForCausalLM, SMALL | {"num_local_experts": 2, "num_key_value_heads": 2}),
    "albert": (AutoModelForMaskedLM, SMALL | {"embedding_size": 8}),
    "umt5": (AutoModelForSeq2SeqLM, {"d_model": 16, "d_kv": 8, "d_ff": 20, "num_layers": 2, "num_heads": 2}),
}


@pytest.mark.parametrize("family", UNCONVERTED)
def test_stock_checkpoints_that_cannot_be_converted(family, saved):
    auto_class, sizes = UNCONVERTED[family]
    torch.manual_seed(0)
    folder = saved(auto_class.from_config(AutoConfig.for_model(family, **{**sizes, "vocab_size": 50})))
    findings = findings_of(folder)
    assert [finding.what.split(":")[0] for finding in findings] == 2 * (STOCK_AGREE + STOCK_APART)
    assert [finding for finding in findings if not finding.is_right] == []
    (speed,) = (result for result in check_model(folder) if isinstance(result, Speed))
    assert (speed.what, speed.dtype) == ("attn_implementation='dynmask'", torch.float32) and speed.speedup > 0
    assert speed.padding == pytest.approx(1 - sum(check_module.LENGTHS) / (130 * len(check_module.LENGTHS)))


@pytest.mark.parametrize("family", ["bert", "distilbert", "electra", "modernbert"])
def test_multiple_choice(family, saved):
    """Its batches have no flat form."""
    findings = findings_of(saved(random_stock(family, "multiple-choice")))
    assert len(findings) == 2 * (len(ALL) - 3)
    assert [finding for finding in findings if not finding.is_right] == []


OURS = [
    (lambda: token_classifier(), "the dense reference"),
    (lambda: token_classifier(mask="causal & window(3, 0)", position_type="rotary"), "the dense reference"),
    (
        lambda: DynMaskForConditionalGeneration(DynMaskSeq2SeqConfig(**SIZES, decoder_start_token_id=1)),
        "the dense reference",
    ),
    (lambda: from_transformers(random_stock("bert", "masked-lm")), "the stock model"),
    (
        lambda: DynMaskRecurrentForTokenClassification(DynMaskRecurrentConfig(hidden_size=16, vocab_size=50)),
        "the model",
    ),
]


@pytest.mark.parametrize("make, reference", OURS)
def test_our_checkpoints(make, reference, saved):
    torch.manual_seed(0)
    findings = findings_of(saved(make()), dtypes=[torch.float32])
    assert [finding.what for finding in findings[: len(AGREE)]] == [
        f"{how}: as {reference} on padded rows" for how in AGREE
    ]
    assert [finding for finding in findings if not finding.is_right] == []


# --- Wrong -----------------------------------------------------------------------------------------------------------


def wrong_lines(source):
    return [finding.what for finding in findings_of(source, dtypes=[torch.float32]) if not finding.is_right]


def test_a_model_that_mixes_sequences(saved, monkeypatch):
    """A little of the first sequence's first token is added to all."""
    folder = saved(token_classifier())
    right = DynMaskForTokenClassification.forward

    def forward(self, *args, **kwargs):
        outputs = right(self, *args, **kwargs)
        outputs.logits = outputs.logits + 1e-3 * outputs.logits[0, 0]
        return outputs

    monkeypatch.setattr(DynMaskForTokenClassification, "forward", forward)
    wrong = wrong_lines(folder)
    assert wrong[-2:] == [f"{how}: sequences that change when another does" for how in APART[:2]]


def test_a_model_that_looks_at_padding(saved, monkeypatch):
    folder = saved(token_classifier())
    right = DynMaskForTokenClassification.forward

    def forward(self, input_ids, **kwargs):
        outputs = right(self, input_ids, **kwargs)
        outputs.logits = outputs.logits + 1e-3 * input_ids[1, -1]
        return outputs

    monkeypatch.setattr(DynMaskForTokenClassification, "forward", forward)
    monkeypatch.setattr(check_module, "_agreement", lambda *arguments: [])
    monkeypatch.setattr(check_module, "_flat", check_module._rows)
    assert wrong_lines(folder)[-1] == "lengths, in rows: sequences that change when padding does"


def test_weights_that_differ(saved, monkeypatch):
    """A conversion that loses a little of one weight is found; sequences stay apart all the same."""
    folder = saved(random_stock("bert", "masked-lm"))

    def convert(*args, **kwargs):
        model: Any = from_transformers(*args, **kwargs)
        with torch.no_grad():
            model.model.layers[1].attention.q_proj.weight[0, 0] += 1e-2
        return model

    monkeypatch.setattr(check_module, "from_transformers", convert)
    assert wrong_lines(folder) == [f"{how}: as the stock model on padded rows" for how in AGREE]


# --- The command -----------------------------------------------------------------------------------------------------


def run(*arguments):
    result = CliRunner().invoke(app, ["check", *arguments], env={"COLUMNS": "160"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def lines_of_table(output):
    """Cells of each line, the head left out."""
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.splitlines() if line.startswith("│")]


@pytest.fixture
def texts(tmp_path):
    (tmp_path / "texts.txt").write_text("a b c\n\nb\nc c c c a b c\na a\n")
    return str(tmp_path / "texts.txt")


@pytest.fixture
def with_tokenizer(saved):
    folder = saved(random_stock("bert", "masked-lm"))
    backend = Tokenizer(WordLevel({"[PAD]": 0, "[UNK]": 1, "a": 2, "b": 3, "c": 4}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    return folder


def test_the_users_own_texts(with_tokenizer, texts, monkeypatch):
    seen = []
    agreement = check_module._agreement

    def watched(models, examples, dtype):
        seen.append(([[tokens.tolist() for tokens in example] for example in examples], dtype))
        return agreement(models, examples, dtype)

    monkeypatch.setattr(check_module, "_agreement", watched)
    result = run(with_tokenizer, "--data", texts, "--dtype", "float32")
    assert seen == 2 * [([[[2, 3, 4]], [[3]], [[4, 4, 4, 4, 2, 3, 4]], [[2, 2]]], torch.float32)]
    assert result.exit_code == 0
    first, second, third, *_ = result.output.splitlines()
    assert re.fullmatch(r"exact, no leak, \d+\.\d\d times as fast as padded rows here \(.+\)", first)
    ways = r"attn_implementation='dynmask' \d+\.\d\d, DynMaskForMaskedLM \d+\.\d\d"
    assert re.fullmatch(rf"forward passes on (cpu|cuda.*), float32, 54% padding: {ways}", second)
    assert third == "With attn_implementation='dynmask' this bert model computes real tokens alone."
    lines = lines_of_table(result.output)
    assert [line[0].split(":")[0] for line in lines] == ALL
    assert {(line[1], line[4]) for line in lines} == {("float32", "right")}


def test_exit_code_of_what_is_wrong(with_tokenizer, monkeypatch):
    findings = [Finding("one", torch.float32, 0, 0), Finding("two", torch.bfloat16, 2, 0)]
    monkeypatch.setattr("hf_dynmask.cli.check_model", lambda *arguments: iter([*findings, SPEED]))
    result = run(with_tokenizer)
    assert result.output.startswith("NOT EXACT, no leak, 1.50 times as fast as padded rows here (one)\n")
    assert lines_of_table(result.output) == [
        ["one", "float32", "0", "0", "right"],
        ["two", "bfloat16", "2", "0", "WRONG"],
    ]
    assert result.exit_code == 1


def test_leaks_are_told(with_tokenizer, monkeypatch):
    leak = Finding("lengths: sequences that change when another does", torch.float32, 1, 0, is_of_leaks=True)
    monkeypatch.setattr("hf_dynmask.cli.check_model", lambda *arguments: iter([leak, SPEED]))
    result = run(with_tokenizer)
    assert result.output.startswith("exact, SEQUENCES LEAK, ") and result.exit_code == 1


def test_not_a_number_is_wrong():
    assert not Finding("", torch.float32, float("nan"), 1).is_right
    exact = [torch.tensor([0.0]), torch.tensor([0.0])]
    found = check_module._difference([torch.tensor([float("nan")]), torch.tensor([1.0])], exact)
    assert found != found


@pytest.mark.parametrize(
    "model, message",
    [
        (lambda: DynMaskForCTC(DynMaskConfig(**SIZES, num_features=3)), "tokens; DynMaskForCTC reads `input_features`"),
        (lambda: token_classifier(mask="segments"), "the field `segment_ids`"),
        (lambda: CLIPModel(CLIPConfig()), "a model to check must read tokens alone; CLIPModel has other parts, too"),
        (
            lambda: AlbertForPreTraining(AlbertConfig(**SIZES)),
            "last_hidden_state; AlbertForPreTraining returns prediction_logits, sop_logits",
        ),
    ],
)
def test_models_that_it_cannot_run(model, message, saved):
    with pytest.raises(ValueError, match=re.escape(message)):
        list(check_model(saved(model())))


def test_there_is_no_model(tmp_path):
    result = run(str(tmp_path / "nowhere"))
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")


def test_there_are_no_texts(with_tokenizer):
    with pytest.raises(ValueError, match="must hold at least one non-empty text; got none"):
        list(check_model(with_tokenizer, ["", "  "]))


def test_a_wrong_column(with_tokenizer, texts):
    result = run(with_tokenizer, "--data", texts, "--column", "words")
    assert result.exit_code == 2
    assert result.stderr.endswith("error: the data must have `words`, a column of text; got text (string)\n")
