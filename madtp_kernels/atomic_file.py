# SPDX-License-Identifier: Apache-2.0
"""Files that are whole or not there: a crash while writing leaves what was there before."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

REMOVALS = 3  # of a folder into which somebody may write while it goes
_being_filled: set[str] = set()  # scratch folders of this process


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary file to write. It takes the place of `path` when the block ends well, else it goes.

    It is on the disk before it takes that place. Of several writers the last one wins.

    Raises:
        OSError: it cannot be written; names `path`.
    """
    path = Path(path)
    try:
        with scratch_folder(path.parent, path.name) as folder:
            yield folder / path.name
            sync(folder / path.name)
            os.replace(folder / path.name, path)
            sync(path.parent)
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


@contextmanager
def scratch_folder(parent: Path, name: str) -> Iterator[Path]:
    """Yields a new hidden folder for what will be `name` in `parent`; it goes when the block ends.

    It is locked as long as its writer lives, so that what a killed one left is known, and goes here: `sweep`.

    Raises:
        OSError: it cannot be made.
    """
    sweep(parent, name)
    folder, held = _locked_folder(parent, name)
    place = os.path.realpath(folder)
    _being_filled.add(place)
    try:
        yield folder
    finally:
        _being_filled.discard(place)
        unlock(held)  # first: what an interrupt leaves of the rest is swept as what a killed writer left
        for _ in range(REMOVALS):
            shutil.rmtree(folder, ignore_errors=True)
            if not folder.exists():
                break


def sweep(parent: Path, name: str) -> None:
    """Removes scratch folders of `name` whose writers are dead; without locks nobody knows, and they stay."""
    try:
        entries = [entry for entry in os.listdir(parent) if is_scratch(entry, name)]
    except OSError:  # a folder that may be written to but not listed
        return
    for entry in entries:
        try:
            held = os.open(parent / entry, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:  # gone by now, or of somebody else
            continue
        if try_lock(held):
            shutil.rmtree(parent / entry, ignore_errors=True)
        unlock(held)


def is_scratch(entry: str, name: str) -> bool:
    """Whether a file name is that of a scratch folder of `name`."""
    return entry.startswith(f".{name}.") and entry.endswith(".partial")


def is_being_filled(path: str | os.PathLike[str]) -> bool:
    """Whether it is a scratch folder that this process has made, and nobody else looks at."""
    return os.path.realpath(path) in _being_filled


def try_lock(descriptor: int) -> bool | None:
    """Locks what is open: True until it is closed or its process ends, False where somebody else has the lock, None
    where the file system has no locks. Two threads exclude each other as two processes do (`flock`)."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def unlock(descriptor: int) -> None:
    """Closes what `try_lock` has locked. A child that was forked meanwhile has it open too, and would keep the lock."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    except OSError:  # a file system without locks
        pass
    finally:
        os.close(descriptor)


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # of file systems that know no such thing
            raise
    finally:
        os.close(descriptor)


def _locked_folder(parent: Path, name: str) -> tuple[Path, int]:
    while True:
        folder = parent / f".{name}.{secrets.token_hex(4)}.partial"
        folder.mkdir()
        try:
            held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:  # somebody swept it before it was locked
            continue
        if try_lock(held) is not False and folder.is_dir():
            return folder, held
        unlock(held)
