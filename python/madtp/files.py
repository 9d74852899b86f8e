# SPDX-License-Identifier: Apache-2.0
"""Files and directories that are whole or not there: a crash while writing leaves what was there before."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from madtp_kernels.atomic_file import atomic_file

CHUNK = 1 << 20  # bytes of a file that are read at a time


def atomic_write(path: str | os.PathLike, text: str) -> None:
    """Writes a text file under a temporary name and renames it."""
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def file_sha256(path: str | os.PathLike) -> str:
    """The SHA-256 of a file in hexadecimal, read a chunk at a time (`hashlib.file_digest` came with Python 3.11)."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def atomic_directory(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary sibling to fill. It takes the place of `path` when the block ends well, else it goes."""
    path = Path(path)
    partial, previous = (path.with_name(f"{path.name}.{what}") for what in ("partial", "previous"))
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        # A directory cannot replace a full one in one step; between the two renames the old one is `previous`.
        shutil.rmtree(previous, ignore_errors=True)
        if path.exists():
            os.rename(path, previous)
        os.rename(partial, path)
        shutil.rmtree(previous, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def require_writable_file(name: str, path: str | os.PathLike) -> Path:
    """Makes the directory of a file and tries it. Raises ValueError when no such file can be written there."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{name} must be a file to write, got the directory {path}")
    require_writable(name, path.parent)
    return path


def require_writable(name: str, directory: str | os.PathLike) -> Path:
    """Makes the directory and tries it. Raises ValueError when nothing can be written there."""
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise ValueError(f"{name} must be a directory to write to, got {directory} ({error.strerror})") from error
    return directory
