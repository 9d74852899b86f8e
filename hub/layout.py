# SPDX-License-Identifier: Apache-2.0
"""Lays out the ops as a kernel of the Hugging Face Hub: python -m hub.layout FOLDER, which is made anew.

A kernel of the Hub is a package that is loaded from any folder under any name, several versions at once. So it imports
itself by relative names alone, and registers its ops in a namespace of its own, that of a module `_ops`. The code is
that of madtp_kernels, rewritten for both: its Triton kernels and references, as what is compiled is not part of it.

torch-ext/ is what kernel-builder reads, with build.toml and flake.nix; it writes `_ops` by itself. build/ is what
`kernels.get_local_kernel` loads.
"""

from __future__ import annotations

import ast
import base64
import fnmatch
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

import tomllib

HERE = Path(__file__).parent
PACKAGE = HERE.parent / "madtp_kernels"
NAME = PACKAGE.name
# commands, and what they alone use
LEFT_OUT = ("env.py", "tune.py", "triton/aot.py", "triton/embed.py", "triton/meta_arguments.py", "triton/*/launches.py")

OPS = '''# SPDX-License-Identifier: Apache-2.0
"""The namespace of the ops of this build."""

import torch

ops = getattr(torch.ops, "{identifier}")


def add_op_namespace_prefix(name: str) -> str:
    """The full name of an op."""
    return f"{identifier}::{{name}}"
'''


def sources() -> dict[str, str]:
    """Path in the kernel -> rewritten source, of every file that is part of it."""
    paths = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))
    paths = [path for path in paths if not any(fnmatch.fnmatchcase(path.as_posix(), pattern) for pattern in LEFT_OUT)]
    return {path.as_posix(): rewritten((PACKAGE / path).read_text(encoding="utf-8"), path) for path in paths}


def rewritten(source: str, path: Path) -> str:
    """The source of madtp_kernels/`path`, with relative imports and the ops of `_ops`.

    Raises ValueError for what has no such form.
    """
    root = "." * len(path.parts)
    edits: list[tuple[int, int, int, str]] = []  # line, columns from and to, what stands there
    found: set[str] = set()

    def replace(node: ast.expr, text: str) -> None:
        if node.lineno != node.end_lineno or node.end_col_offset is None:
            raise ValueError(f"{path}:{node.lineno}: {ast.unparse(node)} is on several lines")
        edits.append((node.lineno, node.col_offset, node.end_col_offset, text))

    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == NAME:
            module, column = str(node.module), node.col_offset + len("from ")
            edits.append((node.lineno, column, column + len(module), root + module[len(NAME) + 1 :]))
        elif isinstance(node, ast.Import) and any(alias.name.split(".")[0] == NAME for alias in node.names):
            raise ValueError(f"{path}:{node.lineno}: import {NAME} has no relative form; use from {NAME} import")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if op := re.fullmatch(r"madtp::(\w+)", node.value):
                replace(node, f'add_op_namespace_prefix("{op[1]}")')
                found.add("add_op_namespace_prefix")
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.ops.madtp":
            replace(node, "ops")
            found.add("ops")
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.library.Library":
            replace(node.args[0], "ops.name")
            found.add("ops")
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "importlib.import_module":
            module = ast.get_source_segment(source, node.args[0]) or ""
            if NAME in module:
                replace(node.args[0], f'{module.replace(NAME, "")}, __name__.partition(".")[0]')
    if found:
        if taken := found & {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}:
            raise ValueError(f"{path}: {', '.join(sorted(taken))} is the name of something else")
        first = next(node for node in tree.body if not is_before_imports(node))
        edits.append((first.lineno, 0, 0, f"from {root}_ops import {', '.join(sorted(found))}\n"))
    lines = [line.encode() for line in source.splitlines(keepends=True)]  # columns count bytes
    for line, begin, end, text in sorted(edits, reverse=True):
        was = lines[line - 1]
        lines[line - 1] = was[:begin] + text.encode() + was[end:]
    return b"".join(lines).decode()


def is_before_imports(node: ast.stmt) -> bool:
    is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return is_docstring or (isinstance(node, ast.ImportFrom) and node.module == "__future__")


def digest(content: bytes) -> str:
    return base64.b64encode(hashlib.sha256(content).digest()).decode()


def lay_out(folder: Path) -> None:
    """Writes the kernel into `folder`: what kernel-builder reads, and a build for each backend."""
    files = sources()
    content = "".join(f"{path}\n{text}" for path, text in files.items())
    short = hashlib.sha256(content.encode()).hexdigest()[:10]
    shutil.rmtree(folder, ignore_errors=True)
    write(folder / "torch-ext" / NAME, files)
    for name in ("build.toml", "flake.nix", "CARD.md"):
        shutil.copyfile(HERE / name, folder / name)
    general = tomllib.loads((HERE / "build.toml").read_text(encoding="utf-8"))["general"]
    for backend in general["backends"]:
        identifier = f"_{NAME}_{backend}_{short}"
        build = files | {"_ops.py": OPS.format(identifier=identifier)}
        metadata = {
            "id": identifier,
            **{key: general[key] for key in ("name", "version", "license")},
            "python-depends": [],
            "backend": {"type": backend},
            "digest": {
                "algorithm": "sha256",
                "files": {path: digest(build[path].encode()) for path in sorted(build)},
            },
        }
        write(folder / "build" / f"torch-{backend}", build | {"metadata.json": json.dumps(metadata, indent=2) + "\n"})


def write(folder: Path, files: dict[str, str]) -> None:
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    lay_out(Path(sys.argv[1]))
