# SPDX-License-Identifier: Apache-2.0
"""Whether what docs/api names breaks with what an earlier commit had there: python -m website.api_check COMMIT.

griffe by itself compares every module that has no underscore, of which most are not public: docs/api/README.md.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from website.api import NAMED, ROOT

if TYPE_CHECKING:
    from griffe import Breakage

PACKAGES = {"madtp": "python", "madtp_kernels": "."}  # and the folder that each lies in
PAGES = [f"docs/api/{name}.md" for name in PACKAGES]


def public_names(commit: str) -> set[str]:
    """What the pages of a commit name. Raises CalledProcessError where it has none."""
    pages = (subprocess.check_output(("git", "show", f"{commit}:{page}"), cwd=ROOT, text=True) for page in PAGES)
    return {name for page in pages for name in NAMED.findall(page)}


def is_public(path: str, names: Iterable[str]) -> bool:
    """Whether a path is one of the names, or a part of what it names."""
    return any(path == name or path.startswith((f"{name}.", f"{name}(")) for name in names)


def breakages(commit: str) -> Iterator[Breakage]:
    import griffe

    names = public_names(commit)
    for package, folder in PACKAGES.items():
        old = griffe.load_git(package, ref=commit, repo=ROOT, search_paths=[folder])
        new = griffe.load(package, search_paths=[ROOT / folder])
        yield from (found for found in griffe.find_breaking_changes(old, new) if is_public(found.obj.path, names))


def main(arguments: list[str]) -> int:
    (commit,) = arguments
    try:
        found = list(breakages(commit))
    except subprocess.CalledProcessError:  # git has said why
        print(f"{commit} must be a commit with {' and '.join(PAGES)}", file=sys.stderr)
        return 2
    for each in found:
        print(each.explain())
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
