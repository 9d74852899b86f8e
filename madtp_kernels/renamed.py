# SPDX-License-Identifier: Apache-2.0
"""Old names of arguments: a call with one fails with a line that names the new one."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, TypeVar

Called = TypeVar("Called", bound=Callable[..., Any])


def renamed(**new_names: str) -> Callable[[Called], Called]:
    """Decorates a function or a class; `new_names` maps each old keyword to the one that took its place.

    Raises:
        TypeError: at a call with an old keyword.
    """

    def decorate(called: Called) -> Called:
        # A NamedTuple takes its fields in __new__, other classes in __init__.
        constructor = "__new__" if isinstance(called, type) and issubclass(called, tuple) else "__init__"
        function = getattr(called, constructor) if isinstance(called, type) else called

        @functools.wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            for old in new_names.keys() & kwargs.keys():
                raise TypeError(f"{called.__qualname__}: {old} is now called {new_names[old]}")
            return function(*args, **kwargs)

        if isinstance(called, type):
            setattr(called, constructor, checked)
            return called
        return checked  # type: ignore[return-value]

    return decorate


def takes_old(function: Called) -> Called:
    """Decorates a function whose `**old` is there for `refuse_old` alone: its signature does not show that.

    For functions that are called so often that the wrapper of `renamed` would be felt.
    """
    signature = inspect.signature(function)
    shown = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    function.__signature__ = signature.replace(parameters=shown)  # type: ignore[attr-defined]
    return function


def refuse_old(name: str, old: Mapping[str, object], **new_names: str) -> NoReturn:
    """Raises the TypeError of a call of `name` with keywords that it does not have, of which some may be old names."""
    for keyword in old:
        if keyword in new_names:
            raise TypeError(f"{name}: {keyword} is now called {new_names[keyword]}")
    raise TypeError(f"{name}() got an unexpected keyword argument {next(iter(old))!r}")
