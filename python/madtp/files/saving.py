# SPDX-License-Identifier: Apache-2.0
"""Text files that are whole or not there, checksums, and whether something can be written at all."""

from __future__ import annotations

import hashlib
import os
import tempfile
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
