# SPDX-License-Identifier: Apache-2.0
"""A directory of several files takes the place of another in one step, whichever moment its writer is killed.

The new files come into being in a scratch folder beside it, and go to the disk. Files of the old directory that stay
are linked into the new one, and the kernel exchanges the two names (`renameat2`, RENAME_EXCHANGE).

Where that cannot be the directory itself stays, and files change their place inside it: where folders stay in it, it is
a mount point, the working directory or of another owner, its parent cannot be written to, or the file system has no
such exchange. The scratch folder is then called `WHOLE`, inside the directory, until all is done, and the file named
`last` is away meanwhile. So a directory without `last` that holds `WHOLE` is one whose writer was killed:
`whole_copy` is what a reader reads, and the next writer ends what was begun.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from madtp_kernels.atomic_file import is_being_filled, is_scratch, scratch_folder, sync, try_lock, unlock
from madtp_kernels.bounded_file import read_json

WHOLE, LEAVING = ".madtp-whole", ".madtp-leaving.json"  # LEAVING: in WHOLE, names of old files that go
MAX_WAIT = 60.0  # seconds for other writers, each of which takes milliseconds
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of linux/fcntl.h, linux/fs.h


def _nothing(new: Path, old: Path) -> Iterable[str]:
    return ()


@contextmanager
def atomic_directory(
    path: str | os.PathLike,
    stays: Callable[[Path, Path], Iterable[str]] = _nothing,
    last: str = "config.json",
) -> Iterator[Path]:
    """Yields a folder to fill. Its files take the place of those of `path` when the block ends well, else it goes.

    They are on the disk by then. Of several writers the last one wins, whole; what a killed one left goes.

    Args:
        stays: takes the new folder and `path`, which may not be there, and gives the names of the old files that stay.
            It may still write to the new one, as `atomic_write` does, and is called again where another writer came in
            between. What gets into `path` later stays as well.
        last: a file without which the directory is nothing to a reader.

    Raises:
        TimeoutError: others have been writing to it for `MAX_WAIT`. OSError: it cannot be written.
    """
    path = Path(os.path.realpath(path))
    if is_being_filled(path):  # by an outer block, at whose end all of it takes its place
        with scratch_folder(path, path.name) as folder:
            yield folder
            _move_in(folder, path, stays)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder(_place(path), path.name) as folder:
        yield folder
        _sync_all(folder)
        while not _replace(folder, path, stays, last):
            pass


def whole_copy(path: Path, last: str = "config.json") -> Path:
    """Where the files of a directory are that were written together: `path`, but for a writer killed in the midst."""
    return path if os.path.lexists(path / last) or not (path / WHOLE / last).is_file() else path / WHOLE


def _place(path: Path) -> Path:
    """Where a scratch folder can be made: beside `path`, or in it where it is a disk of its own or has a parent that
    cannot be written to."""
    if path.is_dir() and (path.stat().st_dev != path.parent.stat().st_dev or not os.access(path.parent, os.W_OK)):
        return path
    return path.parent


def _replace(folder: Path, path: Path, stays: Callable[[Path, Path], Iterable[str]], last: str) -> bool:
    """Whether it could be done: another writer may have made or exchanged `path` in the meantime."""
    if not path.is_dir():
        tuple(stays(folder, path))
        try:
            os.rename(folder, path)
        except OSError:
            if path.is_dir():
                return False
            raise
        sync(path.parent)
        return True
    if not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), os.fspath(path))
    held = _locked(path)
    if held is None:
        return False
    try:
        _finish(path, last)
        before = _names(path)
        kept = before.intersection(stays(folder, path))
        new = set(os.listdir(folder))
        if not _exchange(folder, path, kept - new):
            _in_place(folder, path, before - kept - new, last)
            return True
        for name in set(os.listdir(folder)) - before:
            if not os.path.lexists(path / name):
                os.rename(folder / name, path / name)
        sync(path.parent)
        return True
    finally:
        unlock(held)


def _move_in(folder: Path, path: Path, stays: Callable[[Path, Path], Iterable[str]]) -> None:
    before = _names(path)
    leaving = before.difference(stays(folder, path))
    new = set(os.listdir(folder))
    for name in before & (leaving | new):
        _remove(path / name)
    for name in new:
        os.rename(folder / name, path / name)


def _names(path: Path) -> set[str]:
    return {name for name in os.listdir(path) if not is_scratch(name, path.name)}


def _locked(path: Path) -> int | None:
    """A descriptor by which nobody else writes to `path` until it is closed; None where it is not there any more."""
    end = time.monotonic() + MAX_WAIT
    while True:
        try:
            held = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        if try_lock(held) is not False:
            if path.is_dir() and os.path.samestat(os.fstat(held), os.stat(path)):
                return held
            end = time.monotonic() + MAX_WAIT  # another writer came to its end, and it is a new directory
        unlock(held)
        if time.monotonic() > end:
            raise TimeoutError(f"{path} cannot be written: another process has been writing to it for {MAX_WAIT:g} s")
        time.sleep(0.005)


def _exchange(folder: Path, path: Path, kept: Iterable[str]) -> bool:
    """Whether the two have changed their names, with the kept files in the new one too; else all is as it was."""
    linked = []
    try:
        if folder.parent == path or os.path.ismount(path) or _owners(folder) != _owners(path) or _is_current(path):
            return False
        shutil.copymode(path, folder)
        for name in kept:
            os.link(path / name, folder / name, follow_symlinks=False)  # which a folder has not
            linked.append(folder / name)
        sync(folder)
        rename = ctypes.CDLL(None, use_errno=True).renameat2
        if rename(_AT_FDCWD, os.fsencode(folder), _AT_FDCWD, os.fsencode(path), _RENAME_EXCHANGE) == 0:
            return True
    except (AttributeError, OSError):  # AttributeError: of a C library without it
        pass
    for link in linked:
        link.unlink(missing_ok=True)
    return False


def _owners(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_uid, found.st_gid


def _is_current(path: Path) -> bool:
    try:
        return path.samefile(".")
    except FileNotFoundError:  # the working directory is there no more
        return False


def _in_place(folder: Path, path: Path, leaving: Iterable[str], last: str) -> None:
    """Files change their place one after another. From the second line on the new ones are what counts."""
    (folder / LEAVING).write_text(json.dumps(sorted(leaving)), encoding="utf-8")
    sync(folder / LEAVING)
    sync(folder)
    try:
        os.rename(folder, path / WHOLE)
    except OSError:  # on another disk
        with scratch_folder(path, path.name) as inside:
            shutil.copytree(folder, inside, dirs_exist_ok=True, symlinks=True)
            _sync_all(inside)
            os.rename(inside, path / WHOLE)
    sync(path)
    _finish(path, last, begins=True)


def _finish(path: Path, last: str, begins: bool = False) -> None:
    """Ends what `_in_place` began, perhaps in a process that was killed: with `last` in its place, it was at its end,
    or not yet at its beginning.

    Args:
        begins: now.
    """
    whole = path / WHOLE
    if not whole.is_dir():
        return
    with scratch_folder(path, path.name) as scratch:
        if begins:
            _remove(path / last)
            sync(path)
        if not os.path.lexists(path / last):
            for name in _leaving(whole):
                _remove(path / name)
            for name in sorted(os.listdir(whole), key=lambda name: name == last):
                if name == LEAVING:
                    continue
                _link(whole / name, scratch / name)
                if (path / name).is_dir() or (scratch / name).is_dir():
                    _remove(path / name)
                if name == last:
                    sync(path)
                os.replace(scratch / name, path / name)
            sync(path)
        os.rename(whole, scratch / WHOLE)


def _leaving(whole: Path) -> list[str]:
    """Names alone: what lies outside the directory is none of ours, whatever a file says."""
    try:
        names = read_json(whole / LEAVING)
    except (OSError, ValueError):
        return []
    return [name for name in names if isinstance(name, str) and name == os.path.basename(name) and name.strip(".")]


def _link(source: Path, target: Path) -> None:
    if source.is_dir() and not source.is_symlink():
        shutil.copytree(source, target, symlinks=True)
        return
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # of a file system without links
        shutil.copy2(source, target, follow_symlinks=False)
        sync(target)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync_all(folder: Path) -> None:
    for parent, _, names in os.walk(folder):
        for name in names:
            if not os.path.islink(os.path.join(parent, name)):
                sync(Path(parent, name))
        sync(Path(parent))
