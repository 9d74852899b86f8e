# SPDX-License-Identifier: Apache-2.0
"""Every benchmark by name."""

from __future__ import annotations

from benchmarks import attention, attention_backward, models, sparse24, sparse24_prune, tokens
from benchmarks.entry import Entry

MODULES = (tokens, attention, attention_backward, sparse24, sparse24_prune, models)


def entries() -> dict[str, Entry]:
    """The `ENTRIES` of every module above; a new op joins there."""
    return {entry.name: entry for module in MODULES for entry in module.ENTRIES}
