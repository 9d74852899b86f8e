# SPDX-License-Identifier: Apache-2.0
"""Lines `::: package.module.name` of a page become what the sources say of that name; nothing is imported."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from website.docstrings import arguments, sections

if TYPE_CHECKING:
    from griffe import Class, Function, Module, Object

ROOT = Path(__file__).parents[1]
NAMED = re.compile(r"^::: ([\w.]+)$", re.MULTILINE)


@cache
def package(name: str) -> Module:
    import griffe

    return griffe.load(name, search_paths=[ROOT, ROOT / "python"])


def find(path: str) -> Object:
    """What a dotted path names. Raises KeyError where there is nothing of that name."""
    root, _, rest = path.partition(".")
    found = package(root)[rest]
    return found.final_target if found.is_alias else found


def filled(markdown: str) -> str:
    return NAMED.sub(lambda match: "\n".join(described(find(match[1]), level=3)), markdown)


def described(thing: Object, level: int, prefix: str = "") -> Iterator[str]:
    yield f"{'#' * level} {prefix}{thing.name}\n"
    if not thing.is_class:
        yield f"```python\n{signature(thing, thing.name)}\n```\n"
    elif is_record(thing):
        yield f"```python\n{fields(thing)}\n```\n"
    elif "__init__" in thing.members and not thing.members["__init__"].is_alias:
        yield f"```python\n{signature(thing.members['__init__'], thing.name)}\n```\n"
    yield from _documented(thing)
    if thing.is_class:
        for name, member in thing.members.items():
            if not name.startswith("_") and not member.is_alias and member.docstring is not None:
                if member.is_function or "property" in member.labels:
                    yield from described(member, level + 1, f"{thing.name}.")


def _documented(thing: Object) -> Iterator[str]:
    text = thing.docstring.value if thing.docstring is not None else None
    about = sections(text)
    yield _with_examples(about[""]) + "\n"
    if listed := list(arguments(text)):
        yield "**Arguments**\n"
        yield "\n".join(f"* {', '.join(f'`{name}`' for name in names)}: {what}" for names, what in listed) + "\n"
    for name in ("Returns", "Raises"):
        if name in about:
            yield f"**{name}**\n\n{_with_examples(about[name])}\n"


def _with_examples(text: str) -> str:
    """Lines that begin with >>> as code, and lists after a blank line."""
    return re.sub(r"(?:^>>> .*\n?)+", lambda lines: f"```python\n{lines[0].rstrip()}\n```\n", text, flags=re.MULTILINE)


def is_record(thing: Class) -> bool:
    return "dataclass" in thing.labels or any(str(base).endswith("NamedTuple") for base in thing.bases)


def fields(thing: Class) -> str:
    """The fields of a record as its source has them, with the comments that say what they are."""
    ends = [
        member.endlineno
        for name, member in thing.members.items()
        if member.is_attribute and member.annotation is not None and "property" not in member.labels
    ]
    lines = thing.filepath.read_text(encoding="utf-8").splitlines()
    return textwrap.dedent("\n".join(lines[thing.docstring.endlineno : max(ends)])).strip()


def signature(function: Function, name: str) -> str:
    """On one line where it is short, else an argument a line."""
    if function.is_attribute:  # a property
        return f"{name}: {function.annotation}"
    listed, keyword = [], False
    for parameter in function.parameters:
        if parameter.name in ("self", "cls"):
            continue
        kind = parameter.kind.value
        if kind == "keyword-only" and not keyword:
            keyword = True
            listed.append("*")
        keyword = keyword or kind == "variadic positional"
        stars = {"variadic positional": "*", "variadic keyword": "**"}.get(kind, "")
        text = f"{stars}{parameter.name}" + (f": {parameter.annotation}" if parameter.annotation is not None else "")
        has_default = parameter.default is not None and not stars
        listed.append(f"{text} = {parameter.default}" if has_default else text)
    result = "" if function.returns is None else f" -> {function.returns}"
    short = f"{name}({', '.join(listed)}){result}"
    if len(short) <= 100:
        return short
    return f"{name}(\n" + "".join(f"    {each},\n" for each in listed) + f"){result}"
