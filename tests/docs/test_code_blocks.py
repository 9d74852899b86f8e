# SPDX-License-Identifier: Apache-2.0
"""What the documentation shows runs: every Python block and its output, every command line.

The blocks of a page run in order, in one namespace and in an empty folder. A `text` block right after a Python block is
what it prints: words and whole numbers as they are, others within a hundredth (the last bits differ between CPUs), and
`...` for anything.
`<!-- not run: why -->` before a block leaves it out.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import shlex
from pathlib import Path

import pytest
from pages import ROOT, RUN, Block, blocks, name

NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*\.?\d*(?:e[-+]?\d+)?")
MAX_NOT_RUN = 6  # of all pages: what is not run rots


SLOW = {"docs/usage/training"}  # compresses a model, which takes minutes


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=[pytest.mark.slow] * (name(page) in SLOW)) for page in RUN], ids=name
)
def test_python_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for block in blocks(page):
        if block.language != "python" or block.not_run:
            continue
        printed = io.StringIO()
        code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")  # tracebacks name lines of the page
        with contextlib.redirect_stdout(printed):
            exec(code, namespace)
        if block.output is not None:
            assert same(block.output, printed.getvalue()), f"{page}:{block.line} printed\n{printed.getvalue()}"


def same(shown: str, printed: str) -> bool:
    """Whether `printed` is what is shown, whatever the spaces, but for `...` and the last digits of numbers."""
    shown, printed = " ".join(shown.split()), " ".join(printed.split())
    pieces = (re.escape(NUMBER.sub("\0", piece)) for piece in shown.split("..."))
    numbers = rf"({NUMBER.pattern})"
    pattern = ".*?".join(piece.replace("\0", numbers).replace(r"\x00", numbers) for piece in pieces)
    found = re.fullmatch(pattern, printed, re.DOTALL)
    if found is None:
        return False
    expected = NUMBER.findall(shown.replace("...", " "))
    return all(close(*pair) for pair in zip(expected, found.groups(), strict=True))


def close(shown: str, printed: str) -> bool:
    """Whether a number is that of the page: a count exactly, what was measured or computed within a hundredth."""
    first, second = (float(number.replace(",", "")) for number in (shown, printed))
    is_count = re.fullmatch(r"[-+]?[\d,]+\.?", shown) is not None
    return abs(first - second) <= (0 if is_count else 0.01) * max(abs(first), abs(second))


@pytest.mark.parametrize(
    ("shown", "printed", "expected"),
    [
        ("tokens 31.0, 8", "tokens  31.2,\n8", True),
        ("tokens 31.0, 8", "tokens 32.0, 8", False),
        ("tokens 31.0, 800", "tokens 31.0, 801", False),
        ("0.0", "0.001", False),
        ("cpu: ... us", "cpu: 12.5 us", True),
        ("cpu: ... us", "cuda: 12.5 us", False),
        ("torch.float32 2:4", "torch.float32 2:4", True),
        ("a\nb", "a", False),
    ],
)
def test_output_is_compared(shown, printed, expected):
    assert same(shown, printed) is expected


def commands(block: Block) -> list[list[str]]:
    """The command lines of a shell block as words; comments go, lines that end in a backslash go on."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def command_lines() -> list:
    found = []
    for page in RUN:
        for block in blocks(page):
            if block.language == "bash" and not block.not_run:
                found += [pytest.param(words, id=f"{name(page)}:{' '.join(words)}") for words in commands(block)]
    return found


@pytest.mark.parametrize("words", command_lines())
def test_command_line_exists(words):
    if words[0] == "madtp":
        parse_madtp(words[1:])
    elif words[0] == "make":
        targets = (ROOT / "Makefile").read_text(encoding="utf-8")
        for target in words[1:]:
            assert "=" in target or re.search(rf"^{target}:", targets, re.MULTILINE), f"no target {target}"
    elif words[:2] == ["python", "-m"]:
        found = importlib.util.find_spec(words[2])
        assert found is not None, f"no module {words[2]}"
        require_options(Path(found.origin), words[3:])
    elif words[0] == "python":
        require_options(ROOT / words[1], words[2:])
    else:
        assert words[0] in ("pip", "cmake", "torchrun", "git", "c++", "pkg-config"), (
            f"this test does not know {words[0]}"
        )


def parse_madtp(words: list[str]) -> None:
    """Parses a command line as `madtp` does, and stops before anything runs."""
    import typer

    from madtp.cli.app import app

    group = typer.main.get_command(app)
    with group.make_context("madtp", list(words)) as context:
        _, command, rest = group.resolve_command(context, [*context._protected_args, *context.args])
        command.make_context(command.name, rest, parent=context)


def require_options(script: Path, words: list[str]) -> None:
    source = script.read_text(encoding="utf-8")
    for word in words:
        if word.startswith("--"):
            option = word.partition("=")[0]
            assert f'"{option}"' in source, f"{script.name} has no {option}"


def test_little_is_not_run():
    reasons = [(name(page), block.not_run) for page in RUN for block in blocks(page) if block.not_run]
    assert len(reasons) <= MAX_NOT_RUN, reasons
