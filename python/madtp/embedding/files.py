# SPDX-License-Identifier: Apache-2.0
"""The folder that a run fills: for each shard vectors, their names and a summary, and in the end an index of all.

The summary is written last. So a shard is there whole or not at all, at whatever moment its writer is killed, and a
shard that is written again gets the same bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from madtp.data.errors import DataError
from madtp.files import atomic_write
from madtp_kernels.atomic_file import atomic_file, is_scratch, sweep
from madtp_kernels.bounded_file import read_json

VERSION = 1  # of all files
RUN, INDEX, SHARDS = "run.json", "index.json", "shards"
VECTORS, KEYS, SUMMARY = ".npy", ".keys.json", ".json"


@dataclass(frozen=True)
class ShardSummary:
    """What a shard holds."""

    name: str
    source: Mapping[str, Any]  # `Shard.source`
    images: int
    bytes: int  # of the vectors' file
    skipped: tuple[tuple[str, str], ...]  # broken images, and why


class OutputFolder:
    """The shards of a folder, and its index."""

    def __init__(self, path: Path):
        self.path = path

    def write(self, name: str, source: Mapping[str, Any], keys: Sequence[str], vectors: np.ndarray, skipped) -> None:
        """Of vectors (N, D), N names, and (name, reason) of what was skipped. Raises OSError."""
        path = self._path(name, VECTORS)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as partial, open(partial, "wb") as file:
            np.save(file, vectors, allow_pickle=False)
        atomic_write(self._path(name, KEYS), _json(list(keys)))
        summary = ShardSummary(name, source, len(keys), path.stat().st_size, tuple(skipped))
        atomic_write(self._path(name, SUMMARY), _json({"version": VERSION, **asdict(summary)}))

    def summary(self, name: str, source: Mapping[str, Any]) -> ShardSummary | None:
        """Of a shard that is there and whole; None for another.

        Raises:
            DataError: it was made of other images.
        """
        try:
            values = read_json(self._path(name, SUMMARY))
            skipped = tuple((str(key), str(reason)) for key, reason in values["skipped"])
            found = ShardSummary(name, values["source"], int(values["images"]), int(values["bytes"]), skipped)
            whole = self._path(name, VECTORS).stat().st_size == found.bytes and self._path(name, KEYS).is_file()
        except (OSError, ValueError, LookupError, TypeError):  # not there, or damaged: it is made again
            return None
        if found.source != source:
            raise DataError(
                f"out {self.path} must be of the same images: {name} was made of {dict(found.source)}, "
                f"and is now {dict(source)}"
            )
        return found if whole else None

    def names(self) -> list[str]:
        """Of the shards that have a summary. What killed writers left goes."""
        root, found = self.path / SHARDS, []
        for parent, folders, names in os.walk(self.path):
            for entry in [entry for entry in folders if entry.startswith(".")]:
                folders.remove(entry)
                name = entry[1:].removesuffix(".partial").rpartition(".")[0]
                if name and is_scratch(entry, name):
                    sweep(Path(parent), name)
            if Path(parent).is_relative_to(root):
                summaries = [name for name in names if name.endswith(SUMMARY) and not name.endswith(KEYS)]
                places = (Path(parent, name).relative_to(root).as_posix() for name in summaries)
                found += [place.removesuffix(SUMMARY) for place in places]
        return sorted(found)

    def write_index(self, summaries: Sequence[ShardSummary], width: int, dtype: str) -> None:
        """Of all shards, which are whole."""
        shards = [{"name": s.name, "images": s.images, "skipped": len(s.skipped)} for s in summaries]
        values = {
            "version": VERSION,
            "images": sum(summary.images for summary in summaries),
            "skipped": sum(len(summary.skipped) for summary in summaries),
            "width": width,
            "dtype": dtype,
            "shards": shards,
        }
        atomic_write(self.path / INDEX, _json(values))

    def _path(self, name: str, suffix: str) -> Path:
        return self.path / SHARDS / f"{name}{suffix}"


def _json(values: Any) -> str:
    return json.dumps(values, indent=0 if isinstance(values, list) else 2) + "\n"
