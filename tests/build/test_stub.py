# SPDX-License-Identifier: Apache-2.0
"""madtp_kernels/_C.pyi says what the compiled module has."""

import ast
import inspect
import re
from pathlib import Path

import pytest
import torch  # noqa: F401  # first, so that one OpenMP runtime serves both

_C = pytest.importorskip("madtp_kernels._C")

STUB = Path(__file__).parents[2] / "madtp_kernels" / "_C.pyi"
TYPES = {"BuildInfo"}  # for type checkers alone


def members(body: list[ast.stmt]) -> dict[str, ast.FunctionDef | ast.ClassDef]:
    return {
        node.name: node for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name not in TYPES
    }


def stubbed() -> dict[str, int]:
    """Dotted name -> number of arguments, of every function and, without self, constructor of the stub."""
    found = {}

    def visit(prefix: str, body: list[ast.stmt]) -> None:
        for name, node in members(body).items():
            if isinstance(node, ast.ClassDef):
                visit(f"{prefix}{name}.", node.body)
                continue
            arguments = node.args
            assert not (arguments.args or arguments.kwonlyargs or arguments.vararg), f"{prefix}{name} is by position"
            found[prefix + name] = len(arguments.posonlyargs) - (name == "__init__")

    visit("", ast.parse(STUB.read_text()).body)
    return found


def compiled() -> dict[str, int]:
    """The same of the compiled module, as pybind11 says it in the docstrings."""
    found = {}

    def visit(prefix: str, scope: object) -> None:
        for name, value in vars(scope).items():
            if inspect.ismodule(value) or (inspect.isclass(value) and not name.startswith("_")):
                visit(f"{prefix}{name}.", value)
            elif name == "__init__" or (callable(value) and not name.startswith("_")):
                signature = value.__doc__.splitlines()[0]
                found[prefix + name] = len(re.findall(r"\barg\d+:", signature))

    visit("", _C)
    return found


def test_the_stub_has_the_functions_of_the_module_and_their_numbers_of_arguments():
    expected, found = stubbed(), compiled()
    assert {"build_info", "cpu.isa", "cpu.AttentionInputs.__init__", "cuda.sparse24_linear"} <= expected.keys()
    if not hasattr(_C, "cuda"):
        expected = {name: count for name, count in expected.items() if not name.startswith("cuda.")}
    assert found == expected


def test_build_info_has_the_fields_of_the_stub():
    declared = {node.name: node for node in ast.parse(STUB.read_text()).body if isinstance(node, ast.ClassDef)}
    fields = {node.target.id for node in declared["BuildInfo"].body if isinstance(node, ast.AnnAssign)}
    assert fields == _C.build_info().keys()
