"""Old names of arguments: a call with one fails with a line that names the new one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

Called = TypeVar("Called", bound=Callable)


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
        def checked(*args, **kwargs):
            for old in new_names.keys() & kwargs.keys():
                raise TypeError(f"{called.__qualname__}: {old} is now called {new_names[old]}")
            return function(*args, **kwargs)

        if isinstance(called, type):
            setattr(called, constructor, checked)
            return called
        return checked  # type: ignore[return-value]

    return decorate
