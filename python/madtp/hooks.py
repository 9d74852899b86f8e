# SPDX-License-Identifier: Apache-2.0
"""Who sees the calls of a module: where nobody does, its work may be done without calling it."""

from __future__ import annotations

from types import MethodType

from torch import nn
from torch.nn.modules.module import _has_any_global_hook


def is_watched(module: nn.Module) -> bool:
    """Whether there are hooks on the module, or on all modules, or a forward that was set on the object."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or _has_any_global_hook()
    )


def is_of_class(method: object, module: nn.Module, name: str = "forward") -> bool:
    """Whether it is the method of the module's class, bound to the module, as `accelerate` keeps and leaves one."""
    bound = isinstance(method, MethodType) and method.__self__ is module
    return bound and method.__func__ is getattr(type(module), name, None)  # type: ignore[attr-defined]  # bound: a method
