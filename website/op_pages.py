# SPDX-License-Identifier: Apache-2.0
"""Writes the tables of docs/ops/ from the sources: python -m website.op_pages.

A page has its prose by hand and, between two marks, what docstring, registry and checks say: signature, arguments,
results, backends, rules. tests/docs/test_ops.py holds the pages to them.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import madtp_kernels
from madtp_kernels import dispatch
from website.docstrings import arguments, sections

FOLDER = Path(__file__).parents[1] / "docs" / "ops"
BEGIN, END = "<!-- from the sources: python -m website.op_pages -->\n", "<!-- /from the sources -->\n"
NO_OP_OF_ITS_OWN = ("prune_tokens",)  # calls others
NOTES = {
    "reference": "plain PyTorch, any device and dtype; what the op means",
    "cpu": "C++, float32, bfloat16 and float16",
    "triton": "Triton on an NVIDIA GPU of compute capability 8.0 and newer; on a CPU with `TRITON_INTERPRET=1`",
    "cuda": "CUDA C++ on such a GPU, where the extension was built with nvcc",
    "dense": "torch's product with a dense weight",
    "onednn": "oneDNN as torch brings it for CPUs, with the weight packed",
    "cusparselt": "NVIDIA's library for 2:4, through torch",
}
OTHER_NOTES = {("quantized_linear", "dense"): "our kernel of dense int8 weights"}


def ops() -> list[str]:
    """Every op that users call: those whose backends `explain` tells, and the step made of them."""
    public = [name for name in madtp_kernels.__all__ if name in dispatch._records or name in NO_OP_OF_ITS_OWN]
    return sorted(public)


def signature(name: str, function: Callable[..., Any]) -> str:
    """One line for each argument."""
    lines, keyword = [], False
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:  # old names, which are refused
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword:
            keyword = True
            lines.append("    *,")
        default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
        lines.append(f"    {parameter.name}: {parameter.annotation}{default},")
    result = inspect.signature(function).return_annotation
    return "\n".join([f"{name}(", *lines, f") -> {result}"])


# --- rules


def _imported_checks(module: ModuleType) -> Iterator[tuple[ast.AST, dict[str, Any]]]:
    """The code in which a module of ops checks arguments, its own and what it imports from other ops, each with the
    names that are global there."""
    tree = ast.parse(inspect.getsource(module))
    yield tree, vars(module)
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module is not None and node.module.startswith("madtp_kernels.ops"):
            for alias in node.names:
                value = getattr(module, alias.asname or alias.name)
                if inspect.ismodule(value) or alias.name.startswith("check_"):
                    yield ast.parse(inspect.getsource(value)), vars(inspect.getmodule(value))


def template(node: ast.expr, names: dict[str, Any]) -> str | None:
    """The text of a message, with a mark where a value comes in that is not a text among the global `names`."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.Name):
        return names[node.id] if isinstance(names.get(node.id), str) else None
    if isinstance(node, ast.JoinedStr):
        holes = (part.value if isinstance(part, ast.FormattedValue) else part for part in node.values)
        return "".join(template(hole, names) or "…" for hole in holes)
    return None


def rules(function: Callable[..., Any]) -> list[tuple[str, str]]:
    """Argument and rule of every `require` on an argument of this function, as its errors say them.

    Where None may be given too, the rule of the op, in which it has a name, is said already.
    """
    names = set(inspect.signature(function).parameters)
    found = {}
    for tree, known in _imported_checks(inspect.getmodule(inspect.unwrap(function))):
        for node in ast.walk(tree):
            is_rule = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "require"
            if not is_rule or len(node.args) < 3:
                continue
            name, rule = template(node.args[1], known), template(node.args[2], known)
            if name is not None and rule is not None and name.partition(".")[0] in names:
                found[name, rule] = None
    return sorted((name, rule) for name, rule in found if (name, f"{rule} or None") not in found)


def limits(record: dispatch.OpRecord) -> list[str]:
    """Why a backend refuses a call that others run."""
    if record.limits is None:
        return []
    tree = ast.parse(inspect.getsource(record.limits))
    returned = [node.value for node in ast.walk(tree) if isinstance(node, ast.Return) and node.value is not None]
    return [text for value in returned if (text := template(value, record.limits.__globals__))]


# --- pages


def cost(function: Callable[..., Any]) -> str | None:
    """What the FLOP counter counts: the first line of the op's `@flop_formula`."""
    module = inspect.getmodule(inspect.unwrap(function))
    for node in ast.parse(inspect.getsource(module)).body:
        for mark in node.decorator_list if isinstance(node, ast.FunctionDef) else ():
            is_formula = (
                isinstance(mark, ast.Call) and isinstance(mark.func, ast.Name) and mark.func.id == "flop_formula"
            )
            if is_formula and isinstance(mark.args[0], ast.Attribute) and mark.args[0].attr == function.__name__:
                return ast.get_docstring(node)
    return None


def generated(name: str) -> str:
    function = getattr(madtp_kernels, name)
    about = sections(function.__doc__)
    parts = ["## Arguments and results\n", f"```python\n{signature(name, function)}\n```\n"]
    lines = ["| argument | what |", "|---|---|"]
    for names, text in arguments(function.__doc__):
        listed = ", ".join(f"`{each}`" for each in names)
        lines.append(f"| {listed} | {text.replace('|', chr(92) + '|')} |")
    parts.append("\n".join(lines) + "\n")
    parts.append("Returns: " + " ".join(about["Returns"].split()) + "\n")
    parts.append("Raises: " + " ".join(about["Raises"].split()) + "\n")
    if name in dispatch._records:
        record = dispatch._records[name]
        parts.append("## Backends\n")
        lines = ["| backend | what runs |", "|---|---|"]
        lines += [
            f"| `{backend}` | {OTHER_NOTES.get((name, backend), NOTES[backend])} |"
            for backend in dispatch.BACKENDS
            if backend in record.implementations
        ]
        parts.append("\n".join(lines) + "\n")
        for device, order in record.auto_order.items():
            names = ", ".join(f"`{backend}`" for backend in order if backend in record.implementations)
            parts.append(f"`auto` on {device}: the first that runs of {names}.\n")
        if record.tuned is not None:
            parts.append("What was measured to be faster comes before that: [tuning](../usage/tuning.md).\n")
        if found := limits(record):
            parts.append("A backend is passed over, or refuses a call that asks for it, with:\n")
            parts.append("\n".join(f"* `{text}`" for text in found) + "\n")
    if (counted := cost(function)) is not None:
        parts.append(f"## Counted FLOPs\n\n{counted}\n")
    if found := rules(function):
        parts.append("## Rules\n")
        parts.append("Broken ones raise ValueError, `NAME must be RULE, got WHAT CAME`, before anything runs.\n")
        lines = ["| argument | must be |", "|---|---|"]
        lines += [f"| `{argument}` | {rule.replace('|', chr(92) + '|')} |" for argument, rule in found]
        parts.append("\n".join(lines) + "\n")
        parts.append("Dtype, number of dimensions, rows and device of every tensor are checked in the same words.\n")
    return "\n".join(parts)


def page(name: str) -> Path:
    return FOLDER / f"{name}.md"


def index() -> str:
    """The table of all ops."""
    backends = [name for name in dispatch.BACKENDS if name != "reference"]
    lines = [f"| op | what | {' | '.join(backends)} |", "|---" * (2 + len(backends)) + "|"]
    for name in ops():
        first = sections(getattr(madtp_kernels, name).__doc__)[""].splitlines()[0].replace("|", "\\|")
        have = dispatch._records[name].implementations if name in dispatch._records else ()
        cells = " | ".join("yes" if backend in have else "" for backend in backends)
        lines.append(f"| [{name}]({name}.md) | {first} | {cells} |")
    return "\n".join(lines) + "\n"


def filled(text: str, part: str) -> str:
    """A page with what is between its marks replaced."""
    before, begin, rest = text.partition(BEGIN)
    if not begin or END not in rest:
        raise ValueError("a page of docs/ops needs both marks")
    return f"{before}{BEGIN}\n{part}\n{END}{rest.partition(END)[2]}"


def parts() -> dict[Path, str]:
    """Page -> what belongs between its marks."""
    return {FOLDER / "README.md": index(), **{page(name): generated(name) for name in ops()}}


if __name__ == "__main__":
    for path, part in parts().items():
        path.write_text(filled(path.read_text(encoding="utf-8"), part), encoding="utf-8")
