"""Replaces a folder as a whole, and keeps files in it that are not ours."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from uuid import uuid4

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

WORKSPACE = re.compile(r"\.hf_dynmask-[0-9a-f]{32}")  # a temporary folder next to the destination
NOT_SUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # constants of Linux

_HOLDS_SOMETHING_ELSE = "`folder` must be new, empty or an earlier export; {} holds something else"
_HOLDS_A_MOUNT_POINT = "`folder` must not contain a mount point, which cannot be moved; got {}"

Written = Callable[[Path], set[str] | None]


@contextmanager
def replacing(folder: str | os.PathLike, written: Written) -> Iterator[Path]:
    """
    Yields a new folder that replaces `folder` at the end of the block, unless an error is raised.

    Files of the old folder that `written` does not name are kept, and so are all its subfolders. On systems that can
    exchange two folders in one step (Linux), the folder exists at every moment. On others, if a process is killed
    between two renames, the old folder is left in a temporary folder next to its place, and the next process moves it
    back. The next process also removes the temporary folders of processes that were killed.

    Args:
        folder (`str` or `os.PathLike`): The folder. If it is a link, its target is replaced and the link stays.
        written (`Callable[[Path], set[str] | None]`):
            Takes the old folder and returns the names of the files directly in it that may be replaced or removed;
            `None`: the folder must not be replaced.

    Yields:
        `Path`: The new folder, to write to.

    Raises:
        ValueError: `folder` holds something that must not be replaced, is a mount point, or contains the working
            directory. In this case nothing has been changed.
    """
    place = _resolved(folder)
    place.parent.mkdir(parents=True, exist_ok=True)
    with _locked(place.parent):  # so that no other process replaces the folder at the same time
        _check(place, folder, written)
    with _workspace(place.parent) as workspace:
        new = workspace / "new"
        new.mkdir()
        yield new
        with _locked(place.parent):
            _put(new, place, written)


def _resolved(folder: str | os.PathLike) -> Path:
    try:
        return Path(folder).resolve()
    except RuntimeError:  # raised by Python before 3.13
        raise ValueError(f"`folder` must not be a link to itself; got {folder}") from None


def _check(place: Path, folder: str | os.PathLike, written: Written) -> None:
    if not os.path.lexists(place):
        return
    if not (_is_free(place) or (place.is_dir() and written(place) is not None)):
        raise ValueError(_HOLDS_SOMETHING_ELSE.format(folder))
    if os.path.ismount(place):
        raise ValueError(f"`folder` must not be a mount point, which cannot be replaced: give a folder in {folder}")
    if Path.cwd().is_relative_to(place):
        raise ValueError(f"`folder` must not contain the working directory, since it is replaced; got {folder}")


def _is_free(place: Path) -> bool:
    return not os.path.lexists(place) or (place.is_dir() and not any(place.iterdir()))


# --- The temporary folder --------------------------------------------------------------------------------------------


@contextmanager
def _workspace(parent: Path) -> Iterator[Path]:
    """A temporary folder of this process. Those of killed processes are removed first."""
    workspace = parent / f".hf_dynmask-{uuid4().hex}"
    with ExitStack() as stack:
        with _locked(parent):  # so that no other process removes the workspace before it is locked
            _recover(parent)
            workspace.mkdir()
            stack.enter_context(_locked(workspace))
        stack.callback(shutil.rmtree, workspace, ignore_errors=True)
        yield workspace


def _recover(parent: Path) -> None:
    for workspace in parent.iterdir():
        if WORKSPACE.fullmatch(workspace.name) and workspace.is_dir() and not workspace.is_symlink():
            with _locked(workspace, wait=False) as is_ours:
                if is_ours:
                    _put_back(workspace)
                    shutil.rmtree(workspace, ignore_errors=True)


def _put_back(workspace: Path) -> None:
    """Moves back the folder that a process had moved away before it was killed."""
    with suppress(FileNotFoundError):
        for former in (workspace / "former").iterdir():
            if not os.path.lexists(workspace.parent / former.name):
                former.rename(workspace.parent / former.name)


@contextmanager
def _locked(folder: Path, wait: bool = True) -> Iterator[bool]:
    """Locks a folder until the block or the process ends. Yields whether this process has the lock."""
    if fcntl is None:
        yield False
        return
    try:
        handle = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:  # another process has removed it
        yield False
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_locked = True
        except OSError:  # another process has the lock, or the file system has no locks
            is_locked = False
        yield is_locked
    finally:
        os.close(handle)


# --- Replacing the folder --------------------------------------------------------------------------------------------


def _put(new: Path, place: Path, written: Written) -> None:
    if place.is_dir():
        shutil.copymode(place, new)
    if _is_free(place):
        try:
            new.rename(place)
            return
        except OSError:  # another process was faster
            if _is_free(place):
                raise
    replaced = {path.relative_to(new) for path in new.rglob("*") if not path.is_dir()}
    _keep(place, new, written(place))
    former = _exchanged(new, place, new.parent / "former" / place.name)
    replaced |= {Path(name) for name in written(former) or ()}
    _bring_back(former, place, replaced)


def _keep(place: Path, new: Path, replaced: set[str] | None) -> None:
    """Links the files that are kept of the old folder into the new one."""
    if replaced is None:
        raise ValueError(_HOLDS_SOMETHING_ELSE.format(place))

    def is_left_out(path: Path) -> bool:
        there, here = place / path, new / path
        is_folder = there.is_dir() and not there.is_symlink()
        if not here.exists():
            return not is_folder and str(path) in replaced
        if here.is_dir() != is_folder:
            raise ValueError(f"`folder` must hold {'no folder' if is_folder else 'a folder'} of this name; got {there}")
        if path.suffix == ".py" and str(path) not in replaced:
            raise ValueError(f"`folder` must hold no code of others under this name; got {there}")
        return not is_folder

    def left_out(folder: str, names: list[str]) -> list[str]:
        if os.path.ismount(folder):
            raise ValueError(_HOLDS_A_MOUNT_POINT.format(folder))
        inside = Path(folder).relative_to(place)
        return [name for name in names if is_left_out(inside / name)]

    shutil.copytree(place, new, symlinks=True, ignore=left_out, copy_function=_link, dirs_exist_ok=True)


def _link(source: str, target: str) -> None:
    """A hard link to a file; a copy where the file system has no hard links."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError as error:
        if error.errno == errno.EXDEV:
            raise ValueError(_HOLDS_A_MOUNT_POINT.format(source)) from None
        shutil.copy2(source, target, follow_symlinks=False)


def _exchanged(new: Path, place: Path, aside: Path) -> Path:
    """Puts the new folder in place, and returns the path of the old one."""
    try:
        _exchange(new, place)
        return new
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise ValueError(f"`folder` must not be a mount point, which cannot be replaced; got {place}") from None
        if error.errno not in NOT_SUPPORTED:
            raise
    aside.parent.mkdir()
    try:
        place.rename(aside)
        new.rename(place)
    except BaseException:
        if aside.exists() and not place.exists():
            aside.rename(place)
        raise
    return aside


def _exchange(one: Path, other: Path) -> None:
    """Exchanges two folders in one step. Raises an `OSError` if the system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, TypeError):  # not on Linux
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS)) from None
    if renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(one), None, str(other))


def _bring_back(former: Path, place: Path, replaced: set[Path], inside: Path = Path()) -> None:
    """Moves files that other processes have put into the old folder since it was linked."""
    for entry in os.scandir(former / inside):
        path = inside / entry.name
        if entry.is_dir(follow_symlinks=False) and (place / path).is_dir():
            _bring_back(former, place, replaced, path)
        elif path not in replaced and not _is_same(former / path, place / path):
            os.replace(former / path, place / path)


def _is_same(one: Path, other: Path) -> bool:
    if one.is_symlink() and other.is_symlink():
        return os.readlink(one) == os.readlink(other)
    return os.path.lexists(other) and os.path.samestat(one.lstat(), other.lstat())
