# SPDX-License-Identifier: Apache-2.0
"""The pages of the documentation, and the fenced blocks in them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
RUN = [  # whose blocks run
    ROOT / "README.md",
    ROOT / "docs" / "measuring.md",
    *sorted((ROOT / "docs" / "usage").glob("*.md")),
]
ALL = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "examples").glob("*.md"))]

BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<why>.+?) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)


class Block(NamedTuple):
    language: str
    text: str
    line: int  # of its first line of text
    not_run: str | None  # why, where the page says so
    output: str | None  # of a python block: the text block that follows it


def name(page: Path) -> str:
    return page.relative_to(ROOT).with_suffix("").as_posix()


def blocks(page: Path) -> list[Block]:
    return list(_blocks(page.read_text(encoding="utf-8")))


def _blocks(source: str) -> Iterator[Block]:
    found = list(BLOCK.finditer(source))
    for block, following in zip(found, [*found[1:], None], strict=True):
        output = None
        if following is not None and following["language"] == "text":
            between = source[block.end() : following.start()]
            output = following["text"] if not between.strip() else None
        line = source.count("\n", 0, block.start("text")) + 1
        yield Block(block["language"], block["text"], line, block["why"], output)


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return BLOCK.sub("", page.read_text(encoding="utf-8"))
