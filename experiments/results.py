# SPDX-License-Identifier: Apache-2.0
"""Rows of measurements in one JSON file per task: a run that was cut off goes on where it was."""

from __future__ import annotations

import json
from pathlib import Path

from madtp.files import atomic_write

FOLDER = Path(__file__).with_name("results")
KEY = ("variant", "reduction", "seed")


class Results:
    """The rows of a file; each is a dict with the fields of `key` and what was measured.

    Args:
        head: what all rows have in common. A file of another head is refused: its rows are of other settings.
    """

    def __init__(self, path: Path, head: dict, key: tuple[str, ...] = KEY):
        self.path, self.head, self.key, self.rows = path, head, key, []
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            before = read(path)
            self.rows = before.pop("rows")
            changed = sorted(name for name in {*head, *before} if head.get(name) != before.get(name))
            if changed:
                raise ValueError(f"results {path} are of another {', '.join(changed)}: move them away first")

    def find(self, *key: str | float) -> dict | None:
        """The row whose fields of the key these are."""
        return next((row for row in self.rows if tuple(row[name] for name in self.key) == key), None)

    def add(self, row: dict) -> None:
        self.rows.append(row)
        atomic_write(self.path, json.dumps(self.head | {"rows": self.rows}, indent=1) + "\n")


def read(path: Path) -> dict:
    return json.loads(path.read_text())
