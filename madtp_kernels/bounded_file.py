# SPDX-License-Identifier: Apache-2.0
"""Files that may be anything are read in bounded time and memory: regular ones alone, no larger and no deeper than what
is read here ever is. Messages are one line, however long the text is that they are about.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator
from typing import Any

MAX_JSON = 1 << 24  # bytes
MAX_DEPTH = 32  # of lists and mappings inside each other
MAX_MESSAGE = 300  # characters

# What code raises that expects good values and gets odd ones of a file.
ODD_VALUES = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def one_line(text: object, limit: int = MAX_MESSAGE) -> str:
    """The text of an error or of anything else, on one line of at most `limit` characters."""
    line = " ".join(str(text)[: 4 * limit].split()) or type(text).__name__
    return line if len(line) <= limit else f"{line[: limit - 4]} ..."


def require_regular(path: str | os.PathLike[str], limit: int | None = None) -> int:
    """The size of a regular file, or of one that a link leads to: a pipe or a device would keep its reader waiting.

    Raises:
        OSError: it is not there. ValueError: it is no regular file, or has more than `limit` bytes.
    """
    try:
        found = os.stat(path)
    except ValueError as error:  # a NUL in the name
        raise ValueError(f"{one_line(repr(os.fspath(path)))} must be the name of a file ({error})") from error
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{one_line(os.fspath(path))} must be a regular file")
    if limit is not None and found.st_size > limit:
        raise ValueError(f"{one_line(os.fspath(path))} must have at most {limit} bytes, got {found.st_size}")
    return found.st_size


def read_bytes(path: str | os.PathLike[str], limit: int = MAX_JSON) -> bytes:
    """Raises what `require_regular` does."""
    require_regular(path, limit)
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        content = file.read(limit + 1)
    if len(content) > limit:  # it grew
        raise ValueError(f"{os.fspath(path)} must have at most {limit} bytes")
    return content


def read_json(path: str | os.PathLike[str], limit: int = MAX_JSON) -> Any:
    """The values of a JSON file.

    Raises:
        OSError: it is not there. ValueError: it is no regular file, too large, or not what `parse_json` takes.
    """
    return parse_json(read_bytes(path, limit))


def parse_json(text: str | bytes) -> Any:
    """Values of UTF-8 JSON. Raises ValueError where it is none, or `check_plain` does."""
    data = text.encode("utf-8") if isinstance(text, str) else text
    try:
        values = json.loads(data.decode("utf-8"))
    except RecursionError as error:
        raise ValueError(f"values must be at most {MAX_DEPTH} deep") from error
    check_plain(values)
    if _SURROGATE.search(data):  # half of one would be no text to anybody
        json.dumps(values, ensure_ascii=False).encode("utf-8")
    return values


def check_plain(values: Any) -> None:
    """Raises ValueError for values that are not those of JSON: nested too deep, integers beyond 64 bits, other types,
    keys that are no text."""
    level = [values]
    for _ in range(MAX_DEPTH + 1):
        level = [child for value in level for child in _children(value)]
        if not level:
            return
    raise ValueError(f"values must be at most {MAX_DEPTH} deep")


def _children(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise ValueError(f"keys must be text, got {one_line(repr(key), 80)}")
        yield from value.values()
    elif isinstance(value, list):
        yield from value
    elif type(value) is int:
        if value.bit_length() > 63:
            raise ValueError(f"integers must have at most 64 bits, got one of {value.bit_length()}")
    elif value is not None and not isinstance(value, str | bool | float):
        raise ValueError(f"values must be those of JSON, got a {type(value).__name__}")
