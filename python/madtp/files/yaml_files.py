# SPDX-License-Identifier: Apache-2.0
"""YAML that people write: plain values, without aliases, by which a few lines could stand for billions of values."""

from __future__ import annotations

import os
from typing import Any

import yaml

from madtp_kernels.bounded_file import MAX_DEPTH, check_plain, one_line, read_bytes

MAX_YAML = 1 << 20  # bytes
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_yaml(path: str | os.PathLike) -> Any:
    """The values of a file: what JSON can say.

    Raises:
        OSError: it is not there. ValueError: it is no regular file, too large, no YAML, or holds aliases, values of
            other types, keys that are no text, integers beyond 64 bits, or values nested deeper than `MAX_DEPTH`.
    """
    content = read_bytes(path, MAX_YAML)
    try:
        text = content.decode("utf-8")
        _check_events(text)
        values = yaml.load(text, _LOADER)
        check_plain(values)
    except Exception as error:  # what its constructors raise has many kinds
        raise ValueError(f"must be YAML of plain values: {one_line(error)}") from error
    return values


def _check_events(text: str) -> None:
    """Before anything is made of them."""
    depth = 0
    for event in yaml.parse(text, _LOADER):
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"it must have no aliases, got *{event.anchor}")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise ValueError(f"values must be at most {MAX_DEPTH} deep")
