# SPDX-License-Identifier: Apache-2.0
"""A docstring of ours in its parts. Several arguments may share a line of it, as `k, v: (Tk, Hk, D)`."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterator

NAMES = re.compile(r"\*{0,2}\w+(?:, \*{0,2}\w+)*(?=:)")


def sections(docstring: str | None) -> dict[str, str]:
    """ "" -> what it does, and the text below Args, Returns and Raises."""
    found, name, lines = {}, "", []
    for line in inspect.cleandoc(docstring or "").splitlines():
        if re.fullmatch(r"(Args|Returns|Raises):", line):
            found[name], name, lines = "\n".join(lines), line[:-1], []
        elif name and line and not line.startswith(" "):  # prose again
            found[name], name, lines = "\n".join(lines), "", [*found[""].splitlines(), "", line]
        else:
            lines.append(line)
    found[name] = "\n".join(lines)
    return {name: textwrap.dedent(text).strip() for name, text in found.items()}


def arguments(docstring: str | None) -> Iterator[tuple[list[str], str]]:
    """Names, as the docstring groups them, and what it says of them."""
    for item in re.split(r"\n(?=\S)", sections(docstring).get("Args", "")):
        if (names := NAMES.match(item)) is not None:
            yield names[0].split(", "), " ".join(item[names.end() + 1 :].split())
