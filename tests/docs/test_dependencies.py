# SPDX-License-Identifier: Apache-2.0
"""The lists of dependencies agree: requirements.txt, its lock with hashes, and docs/dependencies.md."""

import re

from dependencies import PAGE, PIN, SILENT, pins
from pages import ROOT

LOCK = (ROOT / "requirements.lock").read_text(encoding="utf-8")


def normal(package):
    return re.sub(r"[-_.]+", "-", package).lower()


def test_every_requirement_is_listed_with_its_licence():
    text = PAGE.read_text(encoding="utf-8")
    rows = {row[0]: row[1:] for row in re.findall(r"^\| ([\w.-]+) \| (\S+) \| (.+) \|$", text, flags=re.MULTILINE)}
    for package, version in pins().items():
        assert package in rows and rows[package][0] == version, f"{package}: run python tests/docs/dependencies.py"
    assert [package for package, (_, licence) in rows.items() if licence == SILENT] == ["pycocoevalcap"]
    assert len(pins()) > 25


def test_the_lock_holds_every_requirement():
    locked = {normal(package): version for package, version in PIN.findall(LOCK)}
    for package, version in pins().items():
        assert locked.get(normal(package)) == version, package
    assert len(locked) > len(pins())


def test_everything_in_the_lock_has_hashes_and_nothing_says_where_it_comes_from():
    entries = re.split(r"^(?=[\w.-]+==)", LOCK, flags=re.MULTILINE)[1:]
    assert entries and all("--hash=sha256:" in entry for entry in entries)
    assert not re.search(r"https?:|index-url|find-links|trusted-host|file:", LOCK)
