# SPDX-License-Identifier: Apache-2.0
"""What the documentation points to exists: linked files, headings, paths in backticks; and no variable is left out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pages import ALL, ROOT, name, prose

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
PATH = re.compile(r"`([\w.-]+(?:/[\w.-]+)+/?|[\w-]+\.(?:md|toml|cff))`")
FOLDERS = ("", "python", "madtp_kernels", "python/madtp", "csrc", "docs")  # that the pages leave out
WRITTEN = re.compile(
    r"^(runs|build|checkpoints|images|model)/|^~|report\.(md|json|html)|^plan\."
)  # by commands, not here


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def headings(page: Path) -> set[str]:
    return {slug(line.lstrip("#")) for line in prose(page).splitlines() if line.startswith("#")}


@pytest.mark.parametrize("page", ALL, ids=name)
def test_links_lead_somewhere(page):
    for target in LINK.findall(prose(page)):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{target} does not exist"
        assert not anchor or anchor in headings(file), f"{target} names no heading of {file.name}"


@pytest.mark.parametrize("page", [page for page in ALL if page.name != "CHANGELOG.md"], ids=name)
def test_named_files_exist(page):
    for path in PATH.findall(prose(page)):
        if not WRITTEN.match(path) and ("." in path.rsplit("/", 1)[-1] or path.endswith("/")):
            places = [page.parent / path, *(ROOT / folder / path for folder in FOLDERS)]
            assert any(place.exists() for place in places), f"{path} does not exist"


def test_every_variable_is_documented():
    sources = [ROOT / "setup.py"]
    for folder, ends in (("madtp_kernels", "py"), ("python", "py"), ("csrc", "cpp"), ("csrc", "h"), ("csrc", "cu")):
        sources += (ROOT / folder).rglob(f"*.{ends}")
    read = re.compile(r"(?:environ|encodekey|getenv|PASSED_THROUGH).*")
    lines = [line for source in sources for line in read.findall(source.read_text(encoding="utf-8"))]
    names = {name for line in lines for name in re.findall(r"[\"'](MADTP_[A-Z_]+)[\"']", line)}
    text = (ROOT / "docs" / "environment.md").read_text(encoding="utf-8")
    assert names and not {name for name in names if f"`{name}`" not in text}
