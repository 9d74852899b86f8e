# SPDX-License-Identifier: Apache-2.0
"""Lays out what Sphinx reads: python -m website.tree FOLDER, which is made anew."""

from __future__ import annotations

import posixpath
import shutil
import sys
from pathlib import Path

from website.api import filled
from website.links import ROOT, all_files, moved, place, shown
from website.navigation import FIRST, NAVIGATION, pages


def toctrees() -> str:
    """The navigation, below the text of the first page."""
    trees = []
    for caption, listed in NAVIGATION.items():
        lines = "\n".join(posixpath.splitext(place(path))[0] for path in listed)
        trees.append(f"```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{lines}\n```\n")
    return "\n".join(trees)


def with_place(path: str, markdown: str) -> str:
    """A page outside the navigation says that it is: only links lead to it."""
    return markdown if path in pages() else f"---\norphan: true\n---\n\n{markdown}"


def lay_out(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    for uri, path in all_files().items():
        target = folder / uri
        target.parent.mkdir(parents=True, exist_ok=True)
        if not path.endswith(".md"):
            if uri.endswith(".md"):
                target.write_text(shown(path), encoding="utf-8")
            else:  # a picture
                shutil.copyfile(ROOT / path, target)
            continue
        text = with_place(path, filled(moved(path, (ROOT / path).read_text(encoding="utf-8"))))
        target.write_text(f"{text}\n{toctrees()}" if path == FIRST else text, encoding="utf-8")


if __name__ == "__main__":
    lay_out(Path(sys.argv[1]))
