"""Checkpoints for others: the same without the package, written as a whole or not at all."""

import ast
import json
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner

from dying import CONTEXT, SIGNALS, calls_of, die
from hf_dynmask import (
    DynMaskConfig,
    DynMaskForMaskedLM,
    DynMaskRecurrentConfig,
    DynMaskSeq2SeqConfig,
    cli,
    from_transformers,
    masks,
)
from hf_dynmask.cli import app
from hf_dynmask.registration import AUTO_CLASSES
from hf_dynmask.tools.shared_code import verify
from hf_dynmask.tools.sharing import export
from stock_models import random_stock

RECURRENT: dict[str, Any] = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "hidden_dropout_prob": 0.0}
SIZES = RECURRENT | {"num_attention_heads": 2, "intermediate_size": 8, "attention_probs_dropout_prob": 0.0}
OF_FRAMES: dict[str, Any] = {"num_features": 6, "conv_kernel": [3], "conv_stride": [2]}
CONFIGS = {
    DynMaskConfig: lambda: DynMaskConfig(**SIZES, layer_masks=["window(3) & topk(2)", "heads(full, causal)"]),
    DynMaskRecurrentConfig: lambda: DynMaskRecurrentConfig(**RECURRENT),
    DynMaskSeq2SeqConfig: lambda: DynMaskSeq2SeqConfig(
        **SIZES, decoder_start_token_id=2, encoder={"mask": "window(4)"}, decoder={"cross_mask": "topk(3)"}
    ),
}

GENERATOR = torch.Generator().manual_seed(1)
IDS = torch.randint(3, 50, (2, 9), generator=GENERATOR)
LENGTHS = torch.tensor([9, 4])
TEXTS = {"input_ids": IDS, "lengths": LENGTHS}
FRAMES = {"input_features": torch.randn(2, 9, 6, generator=GENERATOR), "lengths": LENGTHS}
CLASSES = {"labels": torch.tensor([1, 0])}
TARGETS = {"labels": IDS[:, :5], "decoder_lengths": torch.tensor([3, 5])}
BATCHES = {
    "AutoModel": TEXTS,
    "AutoModelForCausalLM": TEXTS | {"labels": IDS},
    "AutoModelForCTC": FRAMES | {"labels": torch.tensor([[5, 6], [7, -100]])},
    "AutoModelForMaskedLM": TEXTS | {"labels": IDS},
    "AutoModelForMultipleChoice": CLASSES
    | {"input_ids": IDS[:, None].repeat(1, 2, 1), "lengths": torch.tensor([[9, 4], [1, 8]])},
    "AutoModelForQuestionAnswering": TEXTS
    | {"start_positions": torch.tensor([1, 0]), "end_positions": torch.tensor([5, 3])},
    "AutoModelForSeq2SeqLM": TEXTS | TARGETS,
    "AutoModelForSequenceClassification": TEXTS | CLASSES,
    "AutoModelForTokenClassification": TEXTS | {"labels": IDS % 2},
}


def cases() -> dict[str, tuple[Any, Any, dict[str, torch.Tensor]]]:
    """An Auto class, a configuration and a batch for every head, and for frames in place of tokens."""
    found = {}
    for config_class, auto_classes in AUTO_CLASSES.items():
        for auto in auto_classes:
            config, batch = CONFIGS[config_class](), BATCHES[auto.__name__]
            if auto is transformers.AutoModelForCausalLM:
                config.layer_masks, config.mask = None, "causal & window(3, 0)"
            elif auto is transformers.AutoModelForCTC:
                config = DynMaskConfig(**SIZES, **OF_FRAMES)
            elif config_class is DynMaskSeq2SeqConfig and auto is transformers.AutoModel:
                batch = TEXTS | {"decoder_input_ids": IDS[:, :5], "decoder_lengths": torch.tensor([3, 5])}
            found[f"{config_class.model_type}-{auto.__name__}"] = auto, config, batch
    images, speech = transformers.AutoModelForSequenceClassification, transformers.AutoModelForSeq2SeqLM
    of_speech = DynMaskSeq2SeqConfig(**SIZES, decoder_start_token_id=2, encoder=OF_FRAMES)
    found["images"] = images, DynMaskConfig(**SIZES, num_features=6), FRAMES | CLASSES
    found["speech"] = speech, of_speech, FRAMES | TARGETS
    return found


CASES = cases()
HASH = "0" * 64

# Runs where `hf_dynmask` cannot be imported, in a folder with one for each case, and with ones that are wrong.
ELSEWHERE = """
import json, logging, sys
from pathlib import Path

sys.modules["hf_dynmask"] = None  # importing it is an ImportError
import torch, transformers

def outputs_of(model, batch):
    with torch.no_grad():
        return [value for value in model(**batch).to_tuple() if isinstance(value, torch.Tensor)]

for case in Path().glob("*/case.pt"):
    auto_class, batch = torch.load(case)
    auto_class, again = getattr(transformers, auto_class), case.parent / "again" / "model"
    model = auto_class.from_pretrained(case.parent / "model", trust_remote_code=True)
    results = [outputs_of(model, batch)]
    outputs = model.train()(**batch)
    (outputs.loss if "loss" in outputs else outputs[0].square().mean()).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    model.save_pretrained(again)
    results.append(outputs_of(model.eval(), batch))
    model = auto_class.from_pretrained(again, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules.model."), type(model)
    torch.save([*results, outputs_of(model, batch)], case.parent / "outputs.pt")

said = {}
for folder in Path("wrong").iterdir():
    records = []
    logging.getLogger("transformers_modules").handlers = [handler := logging.Handler()]
    handler.emit = records.append
    try:
        transformers.AutoModel.from_pretrained(folder, trust_remote_code=folder.name != "refused")
        said[folder.name] = [record.getMessage() for record in records]
    except Exception as error:
        said[folder.name] = [type(error).__name__, str(error)]
auto_class = transformers.AutoModelForMaskedLM
model = auto_class.from_pretrained("registered/model", trust_remote_code=True, attn_implementation="sdpa")
model.set_attn_implementation("dynmask")
said["registered"] = type(model).__name__
said["implementation"] = model.config._attn_implementation
tokenizer = transformers.AutoTokenizer.from_pretrained("registered/model", trust_remote_code=True)
said["tokens"] = tokenizer("b a")["input_ids"]
print(json.dumps(said))
"""


def make_model(name: str) -> Any:
    auto, config, _ = CASES[name]
    torch.manual_seed(0)
    return auto.from_config(config).eval()


def masked_lm(**settings) -> DynMaskForMaskedLM:
    return DynMaskForMaskedLM(DynMaskConfig(**SIZES, **settings))


def outputs_of(model, batch) -> list[torch.Tensor]:
    with torch.no_grad():
        return [value for value in model(**batch).to_tuple() if isinstance(value, torch.Tensor)]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    """Equal to the last bit or two: which kernel multiplies a matrix depends on where it lies in memory."""
    return all(torch.allclose(*pair, rtol=0, atol=1e-7) for pair in zip(one, other, strict=True))


def change_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def break_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def tokenizer():
    backend = Tokenizer(WordLevel({"[PAD]": 0, "[UNK]": 1, "a": 2, "b": 3}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]")


# --- Where the package is not installed ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory, tokenizer):
    """A folder with what was exported and what came of it elsewhere, and what was said there."""
    root = tmp_path_factory.mktemp("elsewhere")
    for name, (auto, _, batch) in CASES.items():
        export(make_model(name), root / name / "model")  # of one name, for transformers to load the code once
        torch.save((auto.__name__, batch), root / name / "case.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DynMaskConfig, "_auto_class", None)
        patch.setattr(DynMaskForMaskedLM, "_auto_class", None)
        DynMaskForMaskedLM.register_for_auto_class("AutoModelForMaskedLM")
        make_model("dynmask-AutoModelForMaskedLM").save_pretrained(root / "registered" / "model")
    tokenizer.save_pretrained(root / "registered" / "model")
    (root / "wrong").mkdir()
    for name in ("refused", "changed", "newer", "broken"):
        export(make_model("dynmask-AutoModel"), root / "wrong" / name)
    with (root / "wrong/changed/plan.py").open("a") as file:
        file.write("# another line")
    change_config(root / "wrong/newer", config_version=3, mask="a_mask_of_the_future")
    break_weights(root / "wrong/broken")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(root / "home"), "HF_MODULES_CACHE": str(root / "modules")}
    command = [sys.executable, "-c", ELSEWHERE]
    run = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return root, json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", CASES)
def test_every_head(name, elsewhere):
    auto, _, batch = CASES[name]
    exported, trained, again = torch.load(elsewhere[0] / name / "outputs.pt")
    assert same(exported, outputs_of(make_model(name), batch))
    assert not same(trained, exported)
    assert same(again, trained)
    folder = elsewhere[0] / name / "again" / "model"
    verify(folder)
    back = auto.from_pretrained(folder)
    assert type(back) is type(make_model(name))
    assert same(outputs_of(back, batch), trained)


def test_what_was_registered_by_hand(elsewhere):
    folder, said = elsewhere[0] / "registered" / "model", elsewhere[1]
    verify(folder)
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModelForMaskedLM"] == "modeling_dynmask.DynMaskForMaskedLM"
    assert said["registered"] == "DynMaskForMaskedLM"
    assert said["implementation"] == "dynmask"
    assert said["tokens"] == [3, 2]


def test_code_that_was_changed(elsewhere):
    (warning,) = elsewhere[1]["changed"]
    assert re.search(r"the code of hf_dynmask [\d.]+; the code that runs differs from it in plan.py", warning)


def test_code_that_the_user_refuses(elsewhere):
    name, message = elsewhere[1]["refused"]
    assert name == "ValueError"
    assert "contains custom code which must be executed" in message
    assert "pass the argument `trust_remote_code=True`" in message


NEWER = r"`config_version` must be at most 2, .* hf_dynmask .* reads; got 3: the checkpoint needs a newer hf_dynmask"


def test_a_newer_configuration(elsewhere):
    assert re.search(NEWER, elsewhere[1]["newer"][1])
    with pytest.raises(StrictDataclassError, match=NEWER):
        AutoConfig.from_pretrained(elsewhere[0] / "wrong" / "newer")
    result = CliRunner().invoke(app, ["export", str(elsewhere[0] / "wrong" / "newer"), "unused"])
    assert result.exit_code == 2
    assert re.search(NEWER, result.output)
    with pytest.raises(StrictDataclassError, match=NEWER):
        DynMaskSeq2SeqConfig(config_version=3)
    with pytest.raises(StrictDataclassError, match=NEWER):
        DynMaskRecurrentConfig(config_version=3)


def test_broken_weights(elsewhere):
    folder = elsewhere[0] / "wrong" / "broken"
    message = "weights must be whole safetensors files; .*model.safetensors cannot be read: "
    assert elsewhere[1]["broken"][0] == "ValueError"
    assert re.search(message, elsewhere[1]["broken"][1])
    with pytest.raises(ValueError, match=message):
        AutoModel.from_pretrained(folder)


def test_the_code_needs_nothing_but_torch_and_transformers(elsewhere):
    allowed = {"torch", "numpy", "transformers", "huggingface_hub", "safetensors", *sys.stdlib_module_names}
    for folder in ("dynmask-AutoModel", "dynmask_seq2seq-AutoModel", "dynmask_recurrent-AutoModel"):
        files = list((elsewhere[0] / folder / "model").glob("*.py"))
        assert len(files) > 10
        for node in (node for path in files for node in ast.walk(ast.parse(path.read_text()))):
            if isinstance(node, ast.Import):
                assert {alias.name.partition(".")[0] for alias in node.names} <= allowed
            elif isinstance(node, ast.ImportFrom) and not node.level:
                assert str(node.module).partition(".")[0] in allowed


# --- Where it is -----------------------------------------------------------------------------------------------------

# The code of a folder first, then the package, then both again.
SIDE_BY_SIDE = """
import sys
import torch
from transformers import AutoModelForMaskedLM
first = AutoModelForMaskedLM.from_pretrained(sys.argv[1], trust_remote_code=True)
import hf_dynmask
second = AutoModelForMaskedLM.from_pretrained(sys.argv[1], trust_remote_code=True)
third = AutoModelForMaskedLM.from_pretrained(sys.argv[1])
batch = {"input_ids": torch.arange(12).reshape(2, 6), "lengths": torch.tensor([6, 2])}
for model in (first.eval(), third.eval()):
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(**batch).logits, model(**batch).logits)
first.save_pretrained(sys.argv[1] + "-first")
third.save_pretrained(sys.argv[1] + "-third")
print(type(first).__module__.partition(".")[0], type(second).__module__, type(third).__module__)
"""


def test_code_of_a_folder_and_the_package_side_by_side(tmp_path):
    export(masked_lm(), tmp_path / "model")
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    command = [sys.executable, "-c", SIDE_BY_SIDE, str(tmp_path / "model")]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split()[-3:] == ["transformers_modules", *["hf_dynmask.modeling.modeling_dynmask"] * 2]
    expected = contents(tmp_path / "model")
    for name in ("model-first", "model-third"):
        found = contents(tmp_path / name)
        assert {**found, "config.json": b""} == {**expected, "config.json": b""}
        assert json.loads(found["config.json"]) == json.loads(expected["config.json"])


def test_a_package_with_other_code(tmp_path, caplog):
    export(masked_lm(), tmp_path / "model")
    AutoModelForMaskedLM.from_pretrained(tmp_path / "model")
    assert caplog.messages == []
    change_config(tmp_path / "model", dynmask_code={"version": "0.0.1", "sha256": {"plan.py": HASH, "gone.py": HASH}})
    AutoModelForMaskedLM.from_pretrained(tmp_path / "model")
    (message,) = caplog.messages
    assert "code of hf_dynmask 0.0.1; the code that runs differs from it in plan.py, gone.py" in message


def test_the_model_is_left_as_it_is(tmp_path):
    model = masked_lm()
    before = model.config.to_dict()
    export(model, tmp_path / "model")
    assert model.config.to_dict() == before


def test_a_former_export_is_replaced(tmp_path, tokenizer):
    folder = tmp_path / "model"
    export(make_model("dynmask_seq2seq-AutoModel"), folder, tokenizer)
    part = "model-00001-of-00002.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": part, "b": "README.md"}}))
    for name in (part, "README.md", "adapter_model.safetensors", "model-00002-of-00002.safetensors"):
        (folder / name).write_text("mine")
    config = json.loads((folder / "config.json").read_text())  # as the former release had written it
    config["dynmask_code"]["sha256"] |= {"cached.py": HASH, "README.py": HASH}
    change_config(folder, dynmask_code=config["dynmask_code"])
    for name in ("cached.py", "graph.py", "README.py"):
        (folder / name).write_text("of another time")
    for inside in ("checkpoint-2", "runs/today"):
        DynMaskConfig().save_pretrained(folder / inside)
    kept = {path.relative_to(folder) for path in folder.rglob("*/*")}
    model = masked_lm()
    export(model, str(folder))
    assert sorted(os.listdir(tmp_path)) == ["model"]
    names = os.listdir(folder)
    assert {"graph.py", "README.py"} <= set(names)  # not listed; not a name of this package
    assert {"README.md", "adapter_model.safetensors", "model-00002-of-00002.safetensors"} <= set(names)
    assert {"tokenizer.json", "model.safetensors", "modeling_dynmask.py"} <= set(names)
    gone = {"modeling_dynmask_seq2seq.py", "generation_config.json", "cached.py", part, "model.safetensors.index.json"}
    assert gone.isdisjoint(names)
    assert {path.relative_to(folder) for path in folder.rglob("*/*")} == kept
    loaded = AutoModelForMaskedLM.from_pretrained(folder)
    assert same(list(loaded.state_dict().values()), list(model.state_dict().values()))


def test_folders_that_are_new_or_empty(tmp_path):
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "deep/new"):
        export(masked_lm(), tmp_path / folder)
        verify(tmp_path / folder)


class Failing:
    """A tokenizer that cannot be saved."""

    def save_pretrained(self, folder):
        (folder / "half.json").write_text("{")
        raise OSError("no space left on device")


@pytest.mark.parametrize("there", [True, False])
def test_an_export_that_fails_leaves_what_was_there(there, tmp_path):
    folder = tmp_path / "model"
    if there:
        export(masked_lm(), folder)
    before = contents(folder) if there else None
    with pytest.raises(OSError, match="no space left"):
        export(masked_lm(mask="causal"), folder, Failing())  # type: ignore[arg-type]
    assert (contents(folder) if folder.exists() else None) == before
    assert os.listdir(tmp_path) == ["model"] * there


@pytest.mark.skipif(CONTEXT is None, reason="needs fork")
@pytest.mark.parametrize("how", SIGNALS, ids=lambda how: how.name)
@pytest.mark.parametrize("act", ["export", "convert"])
def test_a_process_that_dies(act, how, tmp_path):
    """At any moment: the folder is the former export, or the new one, with the files of others in it."""
    kill_often(act, how, tmp_path, times=4)


def kill_often(act: str, how: signal.Signals, root: Path, times: int) -> None:
    random_stock("bert", "masked-lm").save_pretrained(root / "stock")
    models = [masked_lm(), masked_lm(mask="causal")]
    acts = {"export": lambda: export(models[1], root / "model"), "convert": lambda: convert(root)}
    expected = []
    for former in (lambda: None, acts[act]):
        export(models[0], root / "model")
        former()
        (root / "model" / "mine").write_text("mine")
        expected.append(contents(root / "model"))
    export(models[0], root / "model")
    calls = calls_of(acts[act])
    chosen = random.Random(how)
    for _ in range(times):
        export(models[0], root / "model")
        (root / "model" / "mine").write_text("mine")
        die(chosen.randint(1, calls), how, acts[act])
        assert contents(root / "model") in expected
        export(models[0], root / "beside")  # the next one removes what is left
        assert sorted(os.listdir(root)) == ["beside", "model", "stock"]


def convert(root: Path) -> None:
    assert run("convert", root / "stock", root / "model").exit_code == 0


def a_file(path: Path) -> None:
    path.write_text("mine")


def a_folder(path: Path) -> None:
    path.mkdir()
    (path / "config.json").write_text("{")


@pytest.mark.parametrize("make", [a_file, a_folder, lambda path: masked_lm().save_pretrained(path)])
def test_folders_of_others(make, tmp_path):
    make(tmp_path / "model")
    with pytest.raises(ValueError, match="`folder` must be new, empty or an earlier export; .* holds something else"):
        export(masked_lm(), tmp_path / "model")
    with pytest.raises(ValueError, match="`folder` must be an export, .* lists none"):
        verify(tmp_path / "model")


def test_models_that_cannot_be_shared(tmp_path):
    masks.register("even", lambda i, j: j % 2 == 0)
    with pytest.raises(ValueError, match=r"`custom\(...\)` mask cannot be saved"):
        export(masked_lm(mask="custom(even)"), tmp_path / "new" / "model")
    with pytest.raises(ValueError, match="`model` must be one of DynMaskModel, .*; got BertForMaskedLM"):
        export(random_stock("bert", "masked-lm"), tmp_path / "model")
    assert os.listdir(tmp_path) == []


# --- The command -----------------------------------------------------------------------------------------------------


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_export_by_the_command(tmp_path, tokenizer):
    model = masked_lm(mask="window(3)").eval()
    model.save_pretrained(tmp_path / "in")
    tokenizer.save_pretrained(tmp_path / "in")
    result = run("export", tmp_path / "in", tmp_path / "out")
    assert result.exit_code == 0, result.output
    verify(tmp_path / "out")
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path / "out")
    assert same(outputs_of(loaded, TEXTS), outputs_of(model, TEXTS))
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("b a")["input_ids"] == [3, 2]


FAMILIES = [("bert", "masked-lm"), ("roberta", "multiple-choice"), ("llama", "causal-lm"), ("bart", "seq2seq-lm")]
FAMILIES += [
    ("gemma3_text", "sequence-classification"),
    ("modernbert", "question-answering"),
    ("eurobert", "masked-lm"),
]


@pytest.mark.parametrize("family, task", FAMILIES)
def test_convert_there_and_back(family, task, tmp_path, tokenizer):
    stock = random_stock(family, task)
    stock.save_pretrained(tmp_path / "stock")
    tokenizer.save_pretrained(tmp_path / "stock")
    for source, output in (("stock", "ours"), ("ours", "back")):
        result = run("convert", tmp_path / source, tmp_path / output)
        assert result.exit_code == 0, result.output
        assert AutoTokenizer.from_pretrained(tmp_path / output)("b a")["input_ids"] == [3, 2]
    verify(tmp_path / "ours")
    back = type(stock).from_pretrained(tmp_path / "back")
    assert same(list(back.state_dict().values()), list(stock.state_dict().values()))


def test_convert_to_another_type(tmp_path):
    from_transformers(random_stock("bert", "base")).save_pretrained(tmp_path / "in")
    result = run("convert", tmp_path / "in", tmp_path / "out", "--to", "gpt2")
    assert result.exit_code == 2
    assert "'gpt2' cannot represent the model" in result.output
    assert run("convert", tmp_path / "in", tmp_path / "out", "--to", "bert").exit_code == 0
    assert AutoConfig.from_pretrained(tmp_path / "out").model_type == "bert"


def test_a_conversion_that_is_wrong_is_not_written(tmp_path, monkeypatch):
    random_stock("bert", "masked-lm").save_pretrained(tmp_path / "in")
    export(masked_lm(), tmp_path / "out")
    before = contents(tmp_path / "out")

    def wrong(source):
        model = convert_right(source)
        with torch.no_grad():
            model.get_input_embeddings().get_parameter("weight").mul_(1.01)
        return model

    convert_right = cli.from_transformers
    monkeypatch.setattr(cli, "from_transformers", wrong)
    result = run("convert", tmp_path / "in", tmp_path / "out")
    assert result.exit_code == 2
    assert re.search("out was not written: the outputs differ; .* as a BertForMaskedLM on padded rows", result.output)
    assert contents(tmp_path / "out") == before
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]


@pytest.mark.parametrize(
    "command, message",
    [
        (["export", "stock", "out"], "stock must be a DynMask checkpoint; got one of type 'bert'"),
        (
            ["convert", "stock", "out", "--to", "bert"],
            "--to must be left out unless the checkpoint is a DynMask one",
        ),
        (["convert", "stock", "stock"], "`folder` must be new, empty or an earlier export; stock holds something else"),
    ],
)
def test_wrong_commands(command, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    random_stock("bert", "masked-lm").save_pretrained("stock")
    result = run(*command)
    assert result.exit_code == 2
    assert message in result.output
    assert os.listdir() == ["stock"]
