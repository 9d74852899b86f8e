# SPDX-License-Identifier: Apache-2.0
"""Tuning tables on disk: JSON with a format version. Those of 0.1, which state none, are read as version 1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from madtp_kernels.bounded_file import ODD_VALUES, one_line, read_json

VERSION = 2

_NAMES_OF_2 = {"features": "out_features", "channels": "in_features"}  # in the rows of a GPU table


class NewerTableError(ValueError):
    """A table of a later madtp_kernels: not to be read, nor written over."""


def read(path: Path) -> dict[str, Any]:
    """What a table holds, in the form of `VERSION`.

    Raises:
        NewerTableError: its version is a later one; the message names the file and both versions.
        OSError, ValueError: it cannot be read, or is no table.
    """
    found = read_json(path)
    version = found.get("version", 1) if isinstance(found, dict) else None
    if not isinstance(version, int):
        raise ValueError(f"{path} is no tuning table")
    if version > VERSION:
        raise NewerTableError(
            f"{path} is a tuning table of version {version}, and this madtp_kernels reads versions up to {VERSION}"
        )
    return found if version == VERSION else _from_version_1(found)


def newer_reason(path: Path) -> str | None:
    """Why `path` must not be written over, None where it may."""
    try:
        read(path)
    except NewerTableError as error:
        return str(error)
    except (OSError, ValueError):
        pass
    return None


def _from_version_1(found: dict[str, Any]) -> dict[str, Any]:
    try:
        return {**found, "version": VERSION, "timings": [_row_from_version_1(row) for row in found["timings"]]}
    except ODD_VALUES as error:
        raise ValueError(f"a tuning table of version 1 has no such rows: {one_line(repr(error))}") from error


def _row_from_version_1(row: Any) -> Any:
    if isinstance(row, dict):  # of a GPU
        architecture, tokens, out_features, _split_k, cluster = row["config"]  # no kernel splits any more
        renamed = {_NAMES_OF_2.get(name, name): value for name, value in row.items()}
        return {**renamed, "config": [architecture, tokens, out_features, cluster]}
    case, (ours, dense, day) = row  # of a CPU
    return [case, {"cpu": ours, "dense": dense}, day]
