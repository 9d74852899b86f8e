# SPDX-License-Identifier: Apache-2.0
"""Writes the table of docs/dependencies.md from what is installed: python tests/docs/dependencies.py."""

from __future__ import annotations

import re
from importlib import metadata

from pages import ROOT

PAGE = ROOT / "docs" / "dependencies.md"
PIN = re.compile(r"^([\w.-]+)==([^;\s]+)", re.MULTILINE)
SILENT = "not said"
BEGIN, END = "<!-- dependencies -->\n", "<!-- /dependencies -->"


def pins(name: str = "requirements.txt") -> dict[str, str]:
    """Package -> version, as written."""
    return dict(PIN.findall((ROOT / name).read_text(encoding="utf-8")))


def licence(package: str) -> str:
    """What the package says: its SPDX expression, else its classifiers, else the text of its licence."""
    said = metadata.metadata(package)
    if said["License-Expression"]:
        return said["License-Expression"]
    classifiers = [c.rsplit(" :: ", 1)[-1] for c in said.get_all("Classifier", []) if c.startswith("License :: ")]
    classifiers = [c for c in classifiers if c != "OSI Approved"]
    if classifiers:
        return ", ".join(classifiers)
    if said["License"] and said["License"] != "UNKNOWN":
        return said["License"].strip().splitlines()[0][:60]
    texts = [file.read_text() for file in metadata.files(package) or () if "license" in file.name.lower()]
    return (
        "MIT, by its text" if any("Permission is hereby granted, free of charge" in text for text in texts) else SILENT
    )


def table() -> str:
    rows = ["| package | version | licence, as the package says it |", "|---|---|---|"]
    rows += [f"| {package} | {version} | {licence(package)} |" for package, version in pins().items()]
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(before + BEGIN + "\n" + table() + "\n" + END + rest.partition(END)[2], encoding="utf-8")
