"""Models, tokenizers, cards and data sets that go to a Hub and come back, through the real client.

The client reads its environment once, when it is imported. So what a user does runs in a process of its own, which
knows no other Hub than the one that these tests serve; the process of the tests stays offline.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from datasets import Dataset, DatasetDict
from datasets import config as datasets_config
from huggingface_hub import ModelCard, create_repo, list_repo_tree, upload_file, upload_folder
from huggingface_hub.hf_api import RepoFile
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)
from typer.testing import CliRunner

import sequence_classification
from hf_dynmask import (
    DataCollatorWithLengths,
    DynMaskConfig,
    DynMaskForSequenceClassification,
    DynMaskRecurrentConfig,
    DynMaskSeq2SeqConfig,
)
from hf_dynmask.cli import app
from hf_dynmask.tools.shared_code import verify_code
from hf_dynmask.tools.sharing import export
from hub_server import HOST, TOKEN, USER, Hub
from recipe_examples import write_examples
from support.common import load_model
from support.samples import resolve_dataset, resolve_model

REPOSITORY = Path(__file__).parents[1]
FIGURE = "sequence_classification.png"
TIMEOUT = 40  # seconds, beyond which the user's process is stuck

WORDS = ["[PAD]", "[UNK]", *(f"w{k}" for k in range(30))]
SIZES: dict[str, Any] = {"vocab_size": len(WORDS), "hidden_size": 24, "num_hidden_layers": 2}
LABELS: dict[str, Any] = {"id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}}
MODELS: dict[str, tuple[Any, type, dict[str, Any]]] = {
    "masked-lm": (AutoModelForMaskedLM, DynMaskConfig, {"layer_masks": ["full", "window(2)"]}),
    "causal-lm": (AutoModelForCausalLM, DynMaskConfig, {"mask": "causal & window(3, 0)"}),
    "classifier": (AutoModelForSequenceClassification, DynMaskConfig, LABELS),
    "tagger": (AutoModelForTokenClassification, DynMaskRecurrentConfig, {"cell": "gru"}),
    "translator": (AutoModelForSeq2SeqLM, DynMaskSeq2SeqConfig, {"decoder_start_token_id": 2}),
}


# --- The Hub and its user --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    hub = Hub()
    hub.start()
    yield hub
    hub.stop()


@pytest.fixture(scope="module")
def environment(hub, tmp_path_factory) -> dict[str, str]:
    """Of a process that is logged in to the Hub and knows no other."""
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path_factory.mktemp("home")),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": TOKEN,
        "NO_PROXY": HOST,
    }


@pytest.fixture(scope="module")
def user(environment) -> Iterator[Callable[..., Any]]:
    """Calls a function of this module in the user's process."""
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=raise_warnings) as pool:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            pool.submit(os.getpid).result(TIMEOUT)  # the process has started, and has the environment
        yield lambda function, *arguments: pool.submit(function, *arguments).result(TIMEOUT)


def raise_warnings() -> None:
    """As these tests do, but for what the client itself does wrong when it uploads a file by LFS."""
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "Use 'content=<...>' to upload raw bytes", DeprecationWarning)


def make(name: str, seed: int = 0) -> Any:
    auto_class, config_class, settings = MODELS[name]
    torch.manual_seed(seed)
    return auto_class.from_config(config_class(**SIZES, **settings))


def make_tokenizer(**settings: Any) -> PreTrainedTokenizerFast:
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", **settings)


def logits(model: Any) -> Any:
    """Of two rows with lengths."""
    ids = torch.stack([torch.arange(5, 12), torch.arange(11, 4, -1)])
    inputs = {"input_ids": ids, "lengths": torch.tensor([7, 4])}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids[:, :3]
    with torch.no_grad():
        return model.eval()(**inputs).logits.tolist()


def error_of(function: Callable[..., Any], *arguments: Any) -> str:
    """What the user sees; the client's waits between its tries are left out."""
    with mock.patch("time.sleep"):
        try:
            function(*arguments)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return "no error"


# --- There and back --------------------------------------------------------------------------------------------------


def push_and_pull(name: str) -> Any:
    """Class and logits of a model, before and after, and the configuration."""
    model = make(name)
    model.push_to_hub(name)
    loaded = MODELS[name][0].from_pretrained(f"{USER}/{name}")
    config = AutoConfig.from_pretrained(f"{USER}/{name}")
    return [(type(each).__name__, logits(each)) for each in (model, loaded)], config


@pytest.mark.parametrize("name", MODELS)
def test_models(name, user, hub):
    (pushed, pulled), config = user(push_and_pull, name)
    assert pulled == pushed
    assert type(config) is MODELS[name][1]
    for field, value in MODELS[name][2].items():
        assert getattr(config, field) == value
    files = hub.model(f"{USER}/{name}").files
    assert {"README.md", "config.json", "model.safetensors"} <= files.keys()
    assert [path for path, file in files.items() if file.is_lfs] == ["model.safetensors"]


def push_and_pull_in_parts() -> Any:
    model = make("classifier")
    model.push_to_hub("parts", max_shard_size="10KB")
    return logits(model), logits(AutoModelForSequenceClassification.from_pretrained(f"{USER}/parts"))


def test_weights_in_several_files(user, hub):
    pushed, pulled = user(push_and_pull_in_parts)
    assert pulled == pushed
    assert sum(path.endswith(".safetensors") for path in hub.model(f"{USER}/parts").files) > 1


def push_tokenizer_and_generation() -> Any:
    """A repository as a training leaves it: a model, how it generates, and its tokenizer."""
    model = make("causal-lm").eval()
    model.generation_config.update(max_new_tokens=5, repetition_penalty=1.5)
    model.push_to_hub("writer")
    make_tokenizer(padding_side="left").push_to_hub("writer")
    tokenizer = AutoTokenizer.from_pretrained(f"{USER}/writer")
    loaded: Any = AutoModelForCausalLM.from_pretrained(f"{USER}/writer")
    inputs = tokenizer(["w1 w2 w3", "w4"], padding=True, return_tensors="pt")
    texts = [each.generate(**inputs, pad_token_id=0).tolist() for each in (model, loaded)]
    return texts, inputs["input_ids"].tolist(), GenerationConfig.from_pretrained(f"{USER}/writer")


def test_a_tokenizer_and_a_way_to_generate(user, hub):
    (pushed, pulled), ids, generation = user(push_tokenizer_and_generation)
    assert pulled == pushed
    assert ids == make_tokenizer(padding_side="left")(["w1 w2 w3", "w4"], padding=True)["input_ids"]
    assert (generation.max_new_tokens, generation.repetition_penalty) == (5, 1.5)
    assert len(hub.model(f"{USER}/writer").commits) == 3  # empty; the model; the tokenizer


def push_card(text: str) -> str:
    make("classifier").push_to_hub("carded")
    ModelCard(text).push_to_hub(f"{USER}/carded")
    make("classifier", seed=1).push_to_hub("carded")
    return str(ModelCard.load(f"{USER}/carded"))


def test_a_card_stays_when_its_model_is_pushed_again(user, hub):
    card = ModelCard.load(REPOSITORY / "model_cards/sequence_classification.md")
    loaded = ModelCard(user(push_card, str(card)))
    assert loaded.text == card.text
    assert loaded.data.to_dict() == card.data.to_dict()
    assert len({files["model.safetensors"].oid for files in hub.model(f"{USER}/carded").commits.values() if files}) == 2


TEXTS = [" ".join(WORDS[2 : 4 + k]) for k in range(8)]
REVIEWS = {"text": TEXTS, "label": [k % 2 for k in range(len(TEXTS))]}


def push_dataset() -> Any:
    reviews = Dataset.from_dict(REVIEWS)
    DatasetDict({"train": reviews, "test": reviews.select(range(4))}).push_to_hub(f"{USER}/reviews")
    return {split: rows.to_dict() for split, rows in resolve_dataset(f"{USER}/reviews").items()}


def test_a_data_set(user, hub):
    found = user(push_dataset)
    assert found == {"train": REVIEWS, "test": {name: column[:4] for name, column in REVIEWS.items()}}
    files = hub.repositories["datasets", f"{USER}/reviews"].files
    assert sorted(files) == ["README.md", *(f"data/{split}-00000-of-00001.parquet" for split in ("test", "train"))]


def push(name: str, seed: int, token: str) -> None:
    make("classifier", seed).push_to_hub(name, token=token)


def list_files(name: str) -> dict[str, int]:
    return {entry.path: entry.size for entry in list_repo_tree(name, recursive=True) if isinstance(entry, RepoFile)}


def test_what_is_listed(user, hub):
    user(push, "listed", 0, TOKEN)
    files = hub.model(f"{USER}/listed").files
    assert user(list_files, f"{USER}/listed") == {path: len(file.content) for path, file in files.items()}


# --- Training --------------------------------------------------------------------------------------------------------


def trainer_of(name: str, folder: str) -> Trainer:
    """A few steps, pushed while they go on."""
    arguments = TrainingArguments(
        output_dir=folder,
        push_to_hub=True,
        hub_model_id=f"{USER}/{name}",
        max_steps=2,
        save_steps=1,
        per_device_train_batch_size=2,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    tokenizer = make_tokenizer()
    examples = [{"input_ids": tokenizer(text)["input_ids"], "labels": k % 2} for k, text in enumerate(TEXTS)]
    return Trainer(
        make("classifier"),
        arguments,
        data_collator=DataCollatorWithLengths(tokenizer),
        train_dataset=examples,  # pyright: ignore[reportArgumentType]: a list is a data set
        processing_class=tokenizer,
    )


def train_and_push(folder: str) -> Any:
    trainer = trainer_of("trained", folder)
    trainer.train()
    trainer.push_to_hub()
    loaded = AutoModelForSequenceClassification.from_pretrained(f"{USER}/trained")
    AutoTokenizer.from_pretrained(f"{USER}/trained")
    return logits(trainer.model), logits(loaded)


def test_a_trainer_pushes(user, hub, tmp_path):
    trained, pulled = user(train_and_push, str(tmp_path))
    assert pulled == trained != logits(make("classifier"))
    assert len(hub.model(f"{USER}/trained").commits) > 2  # in training, and at its end


# --- Ids in place of folders -----------------------------------------------------------------------------------------


def push_what_commands_read() -> None:
    make("classifier").push_to_hub("read")
    make_tokenizer(model_max_length=30).push_to_hub("read")
    Dataset.from_dict(REVIEWS).push_to_hub(f"{USER}/read")


def run_command(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "160"})
    return result.exit_code, result.output


@pytest.mark.parametrize(
    "command, expected",
    [
        (["check", f"{USER}/read", "--data", f"{USER}/read", "--dtype", "float32"], "the dense reference on padded"),
        (["audit", f"{USER}/read", "--model", f"{USER}/read", "--batch-size", "4"], "8 examples, 44 tokens: median 5"),
    ],
)
def test_commands(command, expected, user):
    user(push_what_commands_read)
    code, output = user(run_command, *command)
    assert code == 0, output
    assert expected in output


def load_as_a_recipe() -> Any:
    push_what_commands_read()
    model = load_model(resolve_model(f"{USER}/read"), "sequence-classification", AutoModelForSequenceClassification)
    return logits(model)


def test_a_recipe_loads_a_model(user):
    assert user(load_as_a_recipe) == logits(make("classifier"))


# --- The code travels ------------------------------------------------------------------------------------------------

# Runs in an interpreter without the package. Prints what `logits` gives.
STRANGER = """
import json, sys
sys.modules["hf_dynmask"] = None
import torch
from transformers import AutoModelForSequenceClassification
name, trusts = sys.argv[1], sys.argv[2] == "trusts"
model = AutoModelForSequenceClassification.from_pretrained(name, trust_remote_code=trusts)
ids, lengths = torch.stack([torch.arange(5, 12), torch.arange(11, 4, -1)]), torch.tensor([7, 4])
print(json.dumps(model(ids, lengths=lengths).logits.tolist()))
"""


@pytest.fixture
def stranger(environment, tmp_path) -> Callable[[str, str], subprocess.CompletedProcess[str]]:
    """Loads a classifier of the user's by its name, and trusts its code or does not."""

    def load(name: str, attitude: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", STRANGER, f"{USER}/{name}", attitude]
        return subprocess.run(command, cwd=tmp_path, env=os.environ | environment, capture_output=True, text=True)

    return load


def push_with_code(name: str) -> Any:
    model = make("classifier")
    with (
        mock.patch.object(DynMaskConfig, "_auto_class", None),  # as it is again thereafter
        mock.patch.object(DynMaskForSequenceClassification, "_auto_class", None),
    ):
        DynMaskConfig.register_for_auto_class("AutoConfig")
        DynMaskForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
        model.push_to_hub(name)
    return logits(model)


def test_a_stranger_trusts_the_code(user, stranger):
    pushed = user(push_with_code, "trusted")
    run = stranger("trusted", "trusts")
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == pushed


def test_a_stranger_does_not_trust_the_code(user, stranger):
    user(push_with_code, "suspected")
    run = stranger("suspected", "does not")
    assert run.returncode != 0
    assert re.search(r"ValueError: .*user/suspected.*trust_remote_code=True", run.stderr, re.DOTALL)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """What a recipe leaves: model, tokenizer, results, card and figure."""
    folder = tmp_path_factory.mktemp("recipe")
    write_examples(folder)
    options = {"model": folder / "model", "dataset": folder / "notes.csv", "output_dir": folder / "output"}
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets_config, "HF_DATASETS_CACHE", folder / "datasets-cache")
        sequence_classification.main([*arguments, "--max_steps", "2", "--use_cpu"])
    return folder / "output"


def push_export(trained: Path, folder: Path) -> Any:
    """Of the model before and after what it says and where its code is; tokens; the card."""
    name = f"{USER}/exported"
    model = AutoModelForSequenceClassification.from_pretrained(trained)
    export(model, folder, AutoTokenizer.from_pretrained(trained))
    for file in ("README.md", FIGURE):
        shutil.copy(trained / file, folder)
    create_repo(name)
    upload_folder(repo_id=name, folder_path=folder)
    loaded = AutoModelForSequenceClassification.from_pretrained(name, trust_remote_code=True)
    tokens = AutoTokenizer.from_pretrained(name)("the film was good")["input_ids"]
    return [(logits(each), type(each).__module__) for each in (model, loaded)], tokens, str(ModelCard.load(name))


def pull_code(folder: Path) -> Any:
    """What the code on the Hub, and that of the model saved again, are compared with; its map; and with other code."""
    loaded: Any = AutoModelForSequenceClassification.from_pretrained(f"{USER}/exported")
    loaded.save_pretrained(folder)
    compared = verify_code(f"{USER}/exported"), verify_code(str(folder))
    upload_file(path_or_fileobj=b"import os", path_in_repo="masks.py", repo_id=f"{USER}/exported")
    return compared, loaded.config.auto_map, error_of(verify_code, f"{USER}/exported")


def test_an_export_of_a_recipe(trained, user, hub, stranger, tmp_path):
    """With the package, its own code runs; without it, that of the repository. Outputs are the same."""
    (pushed, pulled), tokens, card = user(push_export, trained, tmp_path / "export")
    assert pulled == pushed and pushed[1] == "hf_dynmask.modeling.modeling_dynmask"
    run = stranger("exported", "trusts")
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == pushed[0]
    assert tokens == AutoTokenizer.from_pretrained(trained)("the film was good")["input_ids"]
    assert card == str(ModelCard.load(trained / "README.md"))
    files = hub.model(f"{USER}/exported").files
    assert files[FIGURE].content == (trained / FIGURE).read_bytes()
    assert {"model.safetensors", "modeling_dynmask.py", "masks.py"} <= files.keys()
    (here, again), auto_map, error = user(pull_code, tmp_path / "again")
    assert here == again == f"the installed hf_dynmask {version('hf_dynmask')}"
    assert auto_map["AutoModel"] == "modeling_dynmask.DynMaskModel"
    assert re.search("ValueError: the code in .* changed or missing: masks.py", error)


# --- What goes wrong -------------------------------------------------------------------------------------------------


def pull(name: str, token: str | None = None) -> Any:
    return logits(AutoModelForSequenceClassification.from_pretrained(f"{USER}/{name}", token=token))


def push_dataset_to(name: str) -> None:
    Dataset.from_dict({"text": [name]}).push_to_hub(f"{USER}/{name}")


WRONG = "hf_wrong"
REFUSED = "401 Unauthorized.*Invalid credentials in Authorization header"


def test_a_wrong_token(user, hub):
    user(push, "mine", 0, TOKEN)
    before = hub.commits()
    for name in ("mine", "new"):
        assert re.search(REFUSED, user(error_of, push, name, 1, WRONG), re.DOTALL)
    assert re.search("OSError.*credentials", user(error_of, pull, "mine", WRONG), re.DOTALL)
    assert hub.commits() == before
    assert user(pull, "mine") == logits(make("classifier"))


def test_no_such_repository(user):
    error = user(error_of, pull, "nothing")
    assert re.search("OSError: user/nothing is not a local folder and is not a valid model identifier", error)


def test_an_unreachable_hub(user, hub, tmp_path):
    before = hub.commits()
    with hub.unreachable():
        assert "ConnectError" in user(error_of, push, "far", 0, TOKEN)
        assert "ConnectError" in user(error_of, push_dataset_to, "far")
        assert re.search(f"OSError: We couldn't connect to '{hub.url}'", user(error_of, pull, "far"))
        assert "ConnectError" in user(error_of, trainer_of, "far", str(tmp_path))  # before it trains
    assert hub.commits() == before


def push_trained(folder: str) -> None:
    trainer = trainer_of("trained", folder)
    trainer.push_to_hub()


@pytest.mark.parametrize(
    "pushes, file",
    [
        (lambda folder: (push, "broken", 2, TOKEN), "model.safetensors"),
        (lambda folder: (push_trained, folder), "(model.safetensors|training_args.bin)"),
        (lambda folder: (push_dataset_to, "broken"), "data/train-00000-of-00001.parquet"),
    ],
)
def test_an_upload_breaks(pushes, file, user, hub, tmp_path):
    """Each repository is as it was, or new and empty."""
    before = hub.commits()
    with hub.dropping_uploads():
        error = user(error_of, *pushes(str(tmp_path)))
    assert re.fullmatch(f"RuntimeError: Error while uploading '{file}' to the Hub.", error)
    for name, commits in hub.commits().items():
        assert commits == before[name] if name in before else not hub.repositories[name].files


def test_a_broken_upload_is_made_good(user, hub):
    """What was there is there until the next one succeeds."""
    user(push, "mended", 0, TOKEN)
    with hub.dropping_uploads():
        assert "Error while uploading" in user(error_of, push, "mended", 3, TOKEN)
    assert user(pull, "mended") == logits(make("classifier", 0))
    user(push, "mended", 3, TOKEN)
    assert user(pull, "mended") == logits(make("classifier", 3))
