# SPDX-License-Identifier: Apache-2.0
"""Links of the pages, in the repository and on the site.

Files outside docs/ that pages link to come along, below repository/: Markdown stays what it is, sources are shown as
they are, of a folder its files are listed. So the site is whole wherever it lies, and a link is written once.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable
from pathlib import Path

from website.navigation import FIRST, pages

ROOT = Path(__file__).parents[1]
FENCED = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<=\]\()(?!https?://|mailto:|#)([^)\s#]+)")
PICTURE_OF_OTHERS = re.compile(r"!\[([^\]]*)\]\(https?://[^)\s]+\)")  # such as badges
LANGUAGES = {".py": "python", ".json": "json", ".toml": "toml", ".h": "cpp", ".cpp": "cpp", ".cu": "cpp"}


def in_prose(change: Callable[[str], str], markdown: str) -> str:
    """The text with everything but its fenced blocks changed."""
    parts, end = [], 0
    for fenced in FENCED.finditer(markdown):
        parts += [change(markdown[end : fenced.start()]), fenced[0]]
        end = fenced.end()
    return "".join([*parts, change(markdown[end:])])


def linked(path: str) -> list[str]:
    """What a Markdown file of the repository links to, as paths from its root."""
    found: list[str] = []

    def collect(text: str) -> str:
        targets = (posixpath.join(posixpath.dirname(path), target) for target in LINK.findall(text))
        found.extend(map(posixpath.normpath, targets))
        return text

    in_prose(collect, (ROOT / path).read_text(encoding="utf-8"))
    return found


def place(path: str) -> str:
    """Where a path of the repository is on the site."""
    if path == FIRST:
        return "index.md"
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"repository/{path}" if path.endswith(".md") else f"repository/{path}.md"


def all_files() -> dict[str, str]:
    """Place on the site -> path in the repository: the pages, and all that is linked to from them."""
    waiting, found = pages(), {}
    while waiting:
        path = waiting.pop()
        if place(path) in found:
            continue
        if not (ROOT / path).exists():
            raise FileNotFoundError(f"{path} is linked to and does not exist")
        found[place(path)] = path
        if path.endswith(".md"):
            waiting += linked(path)
    return found


def moved(path: str, markdown: str) -> str:
    """A Markdown file of the repository with links to where their targets are on the site; nothing is fetched."""
    here, there = posixpath.dirname(path), posixpath.dirname(place(path))

    def to(match: re.Match[str]) -> str:
        return posixpath.relpath(place(posixpath.normpath(posixpath.join(here, match[1]))), there or ".")

    return in_prose(lambda text: LINK.sub(to, PICTURE_OF_OTHERS.sub(r"\1", text)), markdown)


def shown(path: str) -> str:
    """The page of a source, or of a folder of the repository."""
    file = ROOT / path
    head = f"---\norphan: true\n---\n\n# {path}\n\n"
    if file.is_dir():
        names = sorted(each.relative_to(file).as_posix() for each in file.rglob("*") if each.is_file())
        return head + "\n".join(f"* `{name}`" for name in names) + "\n"
    text = file.read_text(encoding="utf-8").rstrip("\n")
    return f"{head}~~~~~~{LANGUAGES.get(file.suffix, 'text')}\n{text}\n~~~~~~\n"
