# SPDX-License-Identifier: Apache-2.0
"""Every promise of docs/guarantees.md names a test, and every test that it names exists."""

from __future__ import annotations

import ast
import functools
import re

import pytest
from pages import ROOT

PAGE = (ROOT / "docs" / "guarantees.md").read_text(encoding="utf-8")
TEST = re.compile(r"`((?:tests|csrc/tests)/[\w/.-]+)::(\w+)`")
UNPROMISED = "What is not promised"


def sections() -> dict[str, list[str]]:
    """The items of the lists below each heading."""
    found = {}
    for part in re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]:
        heading, _, text = part.partition("\n")
        found[heading] = re.findall(r"^\* .*(?:\n  .*)*", text, flags=re.MULTILINE)
    return found


PROMISES = [item for heading, items in sections().items() if heading != UNPROMISED for item in items]


@functools.cache
def defined_in(path: str) -> set[str]:
    """The tests that are defined in a file, read and not run."""
    source = (ROOT / path).read_text(encoding="utf-8")
    if path.endswith(".cpp"):
        return set(re.findall(r"^TEST\((\w+)\)", source, flags=re.MULTILINE))
    return {node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}


def test_there_are_promises_and_limits():
    assert len(PROMISES) > 30 and sections()[UNPROMISED]


@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise[2:42])
def test_a_promise_names_its_tests(promise):
    named = TEST.findall(promise)
    assert named, "a promise ends with the names of its tests"
    for path, name in named:
        assert (ROOT / path).is_file(), f"{path} does not exist"
        assert name.startswith("test_") or path.endswith(".cpp"), f"{name} is no test"
        assert name in defined_in(path), f"{path} has no {name}"


def test_a_promise_ends_with_its_tests():
    """And what looks like one is one: no name is left in another form."""
    for promise in PROMISES:
        last = promise.rstrip().splitlines()[-1].strip()
        assert TEST.fullmatch(last), last
        assert promise.count("::") == len(TEST.findall(promise)), promise


def test_versions_are_those_of_the_package():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    bounds = dict(re.findall(r'"(torch|transformers)>=([\d.]+)"', project))
    (promise,) = (item for item in sections()["Versions"] if item.startswith("* Python"))
    for package, version in bounds.items():
        assert f"{package} >= {version}" in promise
    assert len(bounds) == 2
    assert f"Python {re.search(r'requires-python = .>=([0-9.]+)', project)[1]} to " in promise
