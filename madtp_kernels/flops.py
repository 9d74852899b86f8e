# SPDX-License-Identifier: Apache-2.0
"""FLOP formulas of ops for torch.utils.flop_counter, registered when that is imported.

Importing it here would bring triton, a tenth of what torch takes to import, to everyone who counts nothing.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, TypeVar

COUNTER = "torch.utils.flop_counter"

Formula = TypeVar("Formula", bound=Callable[..., int])

_waiting: list[tuple[Any, Callable[..., int]]] = []


def flop_formula(op: Any) -> Callable[[Formula], Formula]:
    """Decorates the formula of `op`, an operator of torch.ops: the arguments of a call -> its FLOPs."""

    def decorate(formula: Formula) -> Formula:
        _waiting.append((op, formula))
        if COUNTER in sys.modules:
            _register()
        return formula

    return decorate


def _register() -> None:
    register = sys.modules[COUNTER].register_flop_formula
    while _waiting:
        op, formula = _waiting.pop()
        register(op, get_raw=True)(formula)


class _CounterImport(importlib.abc.MetaPathFinder):
    """Registers what is waiting right after the counter is imported, by whomever."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _register()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if COUNTER not in sys.modules:
    sys.meta_path.insert(0, _CounterImport())
