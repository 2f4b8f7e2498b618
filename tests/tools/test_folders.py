"""A folder is replaced as a whole, whenever the process dies, and what is not ours in it stays."""

import errno
import os
import signal
import sys
from pathlib import Path

import pytest

from dying import CONTEXT, SIGNALS, die
from hf_dynmask.tools import folders
from hf_dynmask.tools.folders import replacing

WITHOUT_EXCHANGE = pytest.param(False, id="two renames")
WITH_EXCHANGE = pytest.param(
    True, id="exchange", marks=pytest.mark.skipif(sys.platform != "linux", reason="only Linux exchanges two folders")
)


def written(folder: Path) -> set[str] | None:
    """Of a folder with a text that says so."""
    return {"ours", "number", "gone"} if (folder / "ours").is_file() else None


def write(folder: Path, number: int, **files: str) -> None:
    with replacing(folder, written) as new:
        for name, text in ({"ours": "", "number": str(number)} | files).items():
            (new / name).write_text(text)


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(params=[WITH_EXCHANGE, WITHOUT_EXCHANGE])
def exchange(request, monkeypatch) -> bool:
    """With and without a system that exchanges two folders in one step."""

    def unknown(one, other):
        raise OSError(errno.ENOSYS, "not implemented")

    if not request.param:
        monkeypatch.setattr(folders, "_exchange", unknown)
    return request.param


def test_what_others_have_put_there_stays(exchange, tmp_path):
    place = tmp_path / "place"
    write(place, 1, gone="")
    (place / "deep" / "er").mkdir(parents=True)
    for name in ("mine", ".hidden", "number.bak", "deep/number", "deep/er/gone"):
        (place / name).write_text("mine")
    (place / "link").symlink_to("deep")
    (place / "broken").symlink_to("nowhere")
    (place / "deep" / "up").symlink_to("..")
    (place / "empty").mkdir()
    place.chmod(0o750)
    (place / "mine").chmod(0o600)
    inode = (place / "mine").stat().st_ino
    write(place, 2)
    assert contents(place) == {"ours": "", "number": "2"} | dict.fromkeys(
        ["mine", ".hidden", "number.bak", "deep/number", "deep/er/gone"], "mine"
    )
    assert os.readlink(place / "link") == "deep"
    assert os.readlink(place / "broken") == "nowhere"
    assert os.readlink(place / "deep" / "up") == ".."
    assert (place / "empty").is_dir()
    assert place.stat().st_mode & 0o777 == 0o750
    assert (place / "mine").stat().st_ino == inode  # not a copy
    assert os.listdir(tmp_path) == ["place"]


def test_a_file_system_without_links(exchange, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(errno.EPERM, "not permitted")

    write(tmp_path / "place", 1)
    (tmp_path / "place" / "mine").write_text("mine")
    monkeypatch.setattr(os, "link", refuse)
    write(tmp_path / "place", 2)
    assert contents(tmp_path / "place") == {"ours": "", "number": "2", "mine": "mine"}


def test_what_others_write_meanwhile_stays(exchange, tmp_path, monkeypatch):
    """Between the copy and the exchange: another file, a changed one, one in a folder."""
    place = tmp_path / "place"
    write(place, 1)
    (place / "run").mkdir()
    (place / "run" / "state").write_text("old")
    keep = folders._keep

    def keep_and_go_on(*args):
        keep(*args)
        (place / "log").write_text("new")
        (place / "run" / "state.tmp").write_text("new")
        (place / "run" / "state.tmp").replace(place / "run" / "state")
        (place / "checkpoint").mkdir()
        (place / "checkpoint" / "weights").write_text("new")

    monkeypatch.setattr(folders, "_keep", keep_and_go_on)
    write(place, 2)
    meanwhile = {"log": "new", "run/state": "new", "checkpoint/weights": "new"}
    assert contents(place) == {"ours": "", "number": "2"} | meanwhile


def test_links_are_not_written_through(exchange, tmp_path):
    place = tmp_path / "place"
    write(place, 1)
    (tmp_path / "others").write_text("others'")
    (place / "number").unlink()
    (place / "number").symlink_to("../others")
    (place / "more").symlink_to("../others")
    write(place, 2, more="ours")
    assert (tmp_path / "others").read_text() == "others'"
    assert contents(place) == {"ours": "", "number": "2", "more": "ours"}
    assert not (place / "more").is_symlink()


def test_a_link_to_a_folder(exchange, tmp_path):
    (tmp_path / "latest").symlink_to("one")
    for number in (1, 2):
        write(tmp_path / "latest", number)
        assert os.readlink(tmp_path / "latest") == "one"
        assert contents(tmp_path / "one")["number"] == str(number)


def test_source_and_target_in_each_other(exchange, tmp_path):
    write(tmp_path / "place", 1)
    write(tmp_path / "place" / "inside", 2)
    write(tmp_path / "place", 3)
    assert contents(tmp_path / "place" / "inside")["number"] == "2"
    with replacing(tmp_path / "place", written) as new:
        (new / "ours").write_text((tmp_path / "place" / "inside" / "number").read_text())
    assert contents(tmp_path / "place") == {"ours": "2", "inside/ours": "", "inside/number": "2"}


def folder_named_number(place: Path) -> None:
    (place / "number").unlink()
    (place / "number").mkdir()


def file_named_templates(place: Path) -> None:
    (place / "templates").write_text("mine")


def code_of_others(place: Path) -> None:
    (place / "plan.py").write_text("mine")


@pytest.mark.parametrize(
    "make, message",
    [
        (folder_named_number, "`folder` must hold no folder of this name; got .*number"),
        (file_named_templates, "`folder` must hold a folder of this name; got .*templates"),
        (code_of_others, "`folder` must hold no code of others under this name; got .*plan.py"),
    ],
)
def test_names_that_are_taken(make, message, exchange, tmp_path):
    place = tmp_path / "place"
    write(place, 1)
    make(place)
    before = contents(place)
    with pytest.raises(ValueError, match=message), replacing(place, written) as new:
        for name in ("ours", "number", "plan.py"):
            (new / name).write_text("new")
        (new / "templates").mkdir()
    assert contents(place) == before
    assert os.listdir(tmp_path) == ["place"]


def test_folders_inside_that_both_have(exchange, tmp_path):
    place = tmp_path / "place"
    for number in "12":
        with replacing(place, written) as new:
            (new / "ours").write_text("")
            (new / "templates").mkdir()
            (new / "templates" / "a").write_text(number)
        (place / "templates" / f"mine{number}").write_text("mine")
    assert contents(place) == {"ours": "", "templates/a": "2", "templates/mine1": "mine", "templates/mine2": "mine"}


def test_places_that_cannot_be_replaced(tmp_path, monkeypatch):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_text("mine")
    write(tmp_path / "place", 1)
    (tmp_path / "place" / "inside").mkdir()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="`folder` must .*loop"):
        write(tmp_path / "loop", 2)
    with pytest.raises(ValueError, match="`folder` must be new, empty or an earlier export; .*file holds"):
        write(tmp_path / "file", 2)
    monkeypatch.chdir(tmp_path / "place" / "inside")
    for place in (Path(), Path(".."), tmp_path / "place"):
        with pytest.raises(ValueError, match="`folder` must not contain the working directory, .* got "):
            write(place, 2)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name in ("empty", "inside"))
    with pytest.raises(ValueError, match="`folder` must not be a mount point, .* give a folder in .*empty"):
        write(tmp_path / "empty", 2)
    with pytest.raises(ValueError, match="`folder` must not contain a mount point, .* got .*inside"):
        write(tmp_path / "place", 2)
    assert contents(tmp_path / "place") == {"ours": "", "number": "1"}
    assert sorted(os.listdir(tmp_path)) == ["empty", "file", "loop", "place"]


@pytest.mark.parametrize("number", [errno.EBUSY, errno.EXDEV])
def test_mount_points_that_only_the_system_knows(number, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(number, "refused")

    write(tmp_path / "place", 1)
    (tmp_path / "place" / "mine").write_text("mine")
    monkeypatch.setattr(*((folders, "_exchange") if number == errno.EBUSY else (os, "link")), refuse)
    with pytest.raises(ValueError, match="`folder` must not (be|contain) a mount point, which cannot be"):
        write(tmp_path / "place", 2)
    assert contents(tmp_path / "place") == {"ours": "", "number": "1", "mine": "mine"}
    assert os.listdir(tmp_path) == ["place"]


def test_a_rename_that_fails(tmp_path, monkeypatch):
    def refuse(one, other):
        raise OSError(errno.EACCES, "not now")

    write(tmp_path / "place", 1)
    monkeypatch.setattr(folders, "_exchange", refuse)
    with pytest.raises(OSError, match="not now"):
        write(tmp_path / "place", 2)
    assert contents(tmp_path / "place")["number"] == "1"
    assert os.listdir(tmp_path) == ["place"]


# --- Processes that die ----------------------------------------------------------------------------------------------


@pytest.mark.skipif(CONTEXT is None, reason="needs fork")
@pytest.mark.parametrize("how", SIGNALS, ids=lambda how: how.name)
def test_a_process_that_dies(how, exchange, tmp_path):
    """At each of its calls, until one comes through."""
    place, mine = tmp_path / "place", {"mine": "mine", "deep/mine": "mine"}
    write(place, 0)
    (place / "deep").mkdir()
    for name in mine:
        (place / name).write_text("mine")
    moment, missing, number = 0, 0, 0
    died = True
    while died:
        moment += 1
        died = die(moment, how, write, place, number + 1)
        missing += not place.exists()
        write(tmp_path / "beside", 0)  # any other folder that is written
        assert sorted(os.listdir(tmp_path)) == ["beside", "place"]
        found = contents(place)
        assert found == {"ours": "", "number": found["number"]} | mine
        assert int(found["number"]) in (number, number + 1)
        number = int(found["number"])
    assert moment > 20
    assert missing == 0 if exchange or how == signal.SIGINT else 1 <= missing <= 2  # calls between the two renames


@pytest.mark.skipif(CONTEXT is None, reason="needs fork")
def test_a_process_that_goes_on_is_left_alone(tmp_path):
    with replacing(tmp_path / "place", written) as new:
        process = CONTEXT.Process(target=write, args=(tmp_path / "other", 1))
        process.start()
        process.join()
        (new / "ours").write_text("")
    assert contents(tmp_path / "place") == {"ours": ""}
    assert sorted(os.listdir(tmp_path)) == ["other", "place"]


def test_a_workspace_that_its_owner_removes_meanwhile(tmp_path, monkeypatch):
    """Between its name being read and its lock being asked for."""
    workspace, open_file = tmp_path / f".hf_dynmask-{'0' * 32}", os.open
    workspace.mkdir()

    def open_late(path, *args, **kwargs):
        if Path(path) == workspace:
            workspace.rmdir()
        return open_file(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", open_late)
    write(tmp_path / "place", 1)
    assert os.listdir(tmp_path) == ["place"]


@pytest.mark.skipif(CONTEXT is None or sys.platform != "linux", reason="needs fork, and folders that are exchanged")
def test_many_processes_write_one_folder(tmp_path):
    """A reader, who opens the folder once, finds one of theirs at any time, and never two mixed."""
    place = tmp_path / "place"
    write(place, 0)
    (place / "mine").write_text("mine")
    processes = [CONTEXT.Process(target=write_many, args=(place, process)) for process in range(8)]
    for process in processes:
        process.start()
    seen = set()
    while any(process.is_alive() for process in processes):
        seen.add(read_number(place))
    assert [process.exitcode for process in processes] == [0] * 8
    assert None not in seen
    assert len(seen) > 1
    assert contents(place).keys() == {"ours", "number", "mine"}
    assert os.listdir(tmp_path) == ["place"]


def write_many(place: Path, process: int) -> None:
    for k in range(10):
        write(place, 10 * process + k)


def read_number(place: Path) -> str | None:
    """`None` where the folder is not there, or lacks a file that everyone keeps or writes."""
    try:
        folder = os.open(place, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        names = os.listdir(folder)
        if not names:
            return "removed meanwhile"
        with open(os.open("number", os.O_RDONLY, dir_fd=folder)) as file:
            return file.read() if {"ours", "number", "mine"} <= set(names) else "removed meanwhile"
    except FileNotFoundError:
        return "removed meanwhile"
    finally:
        os.close(folder)
