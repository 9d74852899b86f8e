# SPDX-License-Identifier: Apache-2.0
"""Result files: of one entry, or of a suite of them. What is read and written is checked against result.schema.json."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from benchmarks.schema import problem

VERSION = 1
SCHEMA = json.loads(Path(__file__).with_name("result.schema.json").read_text(encoding="utf-8"))


class ResultError(ValueError):
    """A file that is no result, or one of a newer version."""


def check(result: Any, name: object) -> None:
    """Raises ResultError where the result breaks the schema; `name` is how the message calls it."""
    if isinstance(result, dict):
        version = result.get("version", VERSION)
        if isinstance(version, int) and version > VERSION:
            raise ResultError(f"{name} must be of a version up to {VERSION}, got {version}")
        kind = SCHEMA["$defs"]["suite" if "suite" in result else "entry"]
    else:
        kind = SCHEMA
    if (found := problem(result, kind, SCHEMA)) is not None:
        raise ResultError(f"{name} must hold results of benchmarks: {found}")
    for row in (row for entry in entries_of(result) for block in entry["blocks"] for row in block["rows"]):
        for key in ("seconds", "speedup"):
            if (spread := row.get(key)) is not None and not _is_spread(spread):
                raise ResultError(f"{name} must hold {key} above 0 with p20 <= median <= p80, got {spread}")


def _is_spread(found: dict) -> bool:
    low, median, high = (found[part] for part in ("p20", "median", "p80"))
    return 0 < low <= median <= high < math.inf


def write(result: dict, path: Path) -> None:
    check(result, path)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def read(path: Path) -> dict:
    """A result, of either kind. Raises ResultError for anything else, and OSError."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ResultError(f"{path} must be JSON: {error}") from None
    check(result, path)
    return result


def entries_of(result: dict) -> list[dict]:
    """The results of single entries in a file of either kind."""
    return result["entries"] if "suite" in result else [result]
