# SPDX-License-Identifier: Apache-2.0
"""docs/troubleshooting.md has every class of errors, and each message on it stands in the sources."""

from __future__ import annotations

import ast
import builtins
import functools
import re

import pytest
from pages import ROOT

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
SOURCES = [path for folder in ("madtp_kernels", "python/madtp") for path in sorted((ROOT / folder).rglob("*.py"))]
HOLE = "…"
MESSAGE = re.compile(r"^\| `([^`]+)` \|", re.MULTILINE)
NOT_FOR_USERS = {
    "NotImplementedError",
    "Exit",
    "StopIteration",
    "SystemExit",
}  # of methods that a class leaves to others


def template(node: ast.AST) -> str | None:
    """A text of the sources with a mark in the place of each value."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else HOLE for part in node.values)
    return None


def raised_class(node: ast.AST) -> str | None:
    """A class of errors that is defined here for others, or one of Python's that is raised here."""
    if isinstance(node, ast.ClassDef):
        bases = {base.id for base in node.bases if isinstance(base, ast.Name)}
        public = not node.name.startswith("_")
        return node.name if public and any(base.endswith(("Error", "Exception")) for base in bases) else None
    if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name):
        return node.exc.func.id if isinstance(getattr(builtins, node.exc.func.id, None), type) else None
    return None


@functools.cache
def read() -> tuple[frozenset[str], frozenset[str]]:
    """All texts of the sources, and the classes of errors."""
    texts, classes = set(), set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant | ast.JoinedStr):
                texts.add(template(node))
            elif isinstance(node, ast.Raise | ast.ClassDef):
                classes.add(raised_class(node))
    return frozenset(texts - {None}), frozenset(classes - {None})


def raised() -> frozenset[str]:
    return read()[1]


def headings() -> set[str]:
    return {name for line in re.findall(r"^## (.+)$", PAGE, re.MULTILINE) for name in line.split(", ")}


def test_every_class_of_errors_has_its_section():
    assert raised() - headings() - NOT_FOR_USERS == set()
    assert {"ValueError", "ModelError", "DataError", "DivergedError"} <= raised()


def test_every_section_is_of_a_class_that_is_raised():
    classes = {name for name in headings() if re.fullmatch(r"\w+", name)}
    assert classes <= raised()


@pytest.mark.parametrize("message", MESSAGE.findall(PAGE))
def test_a_message_stands_in_the_sources(message):
    pieces = sorted(message.split(HOLE), key=len)
    pattern = re.compile(".*".join(map(re.escape, message.split(HOLE))))  # a mark may stand for words of the text too
    assert any(pieces[-1] in text and pattern.search(text) for text in read()[0]), message


def test_there_are_messages():
    assert len(MESSAGE.findall(PAGE)) > 30
