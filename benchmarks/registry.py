# SPDX-License-Identifier: Apache-2.0
"""Every benchmark by name."""

from __future__ import annotations

import importlib
import pkgutil

from benchmarks import entries as package
from benchmarks.entry import Entry


def entries() -> dict[str, Entry]:
    """The `ENTRIES` of every file in benchmarks/entries."""
    names = [name for _, name, _ in pkgutil.iter_modules(package.__path__, f"{package.__name__}.")]
    return {entry.name: entry for name in names for entry in importlib.import_module(name).ENTRIES}
