# SPDX-License-Identifier: Apache-2.0
"""Classes mixed into those of a model's modules, and back: a patched module goes on to be one of its Hugging Face
class, with its name."""

from __future__ import annotations

import copyreg
import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from types import MethodType
from typing import Any

from torch import nn

from madtp.hooks import is_of_class


class _MixedType(type):
    """The type of mixed classes: it says what they were mixed of, so that they can be pickled, and their objects."""

    madtp_parts: tuple[type, type]


def _reduced(kind: _MixedType) -> tuple[Any, tuple[type, type]]:
    return mixed, kind.madtp_parts


copyreg.pickle(_MixedType, _reduced)


@functools.cache
def mixed(source: type, mixin: type) -> type:
    """`source` with `mixin` ahead of it. It keeps its name, which a saved model gives as that of its class."""
    names = {"__doc__": source.__doc__, "__module__": __name__, "madtp_parts": (source, mixin)}
    return _type_of_mixed(type(source))(source.__name__, (mixin, source), names)


@functools.cache
def _type_of_mixed(kind: type) -> type:
    """For classes with a type of their own, one that is of that type as well."""
    if issubclass(_MixedType, kind):
        return _MixedType
    if issubclass(kind, _MixedType):
        return kind
    found = type(kind.__name__, (_MixedType, kind), {})
    copyreg.pickle(found, _reduced)
    return found


def names_of(model: nn.Module, pattern: str) -> list[str]:
    """The modules whose names match a shell-style pattern."""
    return [name for name, _ in model.named_modules() if fnmatchcase(name, pattern)]


def check_forward(module: nn.Module, name: str) -> None:
    """Raises ValueError where a module's forward is none that `change_class` can take along."""
    own = vars(module).get("_old_forward", vars(module).get("forward"))  # accelerate keeps the one it wraps
    if own is not None and not is_of_class(own, module):
        raise ValueError(
            f"{name or 'model'}.forward must be that of its class, got one set on the object: patch first, then wrap"
        )


def change_class(module: nn.Module, kind: type) -> None:
    """Makes a module one of another class; what has bound its forward to the object, as accelerate does, gets the new
    one."""
    for name in ("forward", "_old_forward"):
        if name in vars(module) and is_of_class(vars(module)[name], module):
            vars(module)[name] = MethodType(kind.forward, module)  # type: ignore[attr-defined]  # of a module's class
    module.__class__ = kind


@contextmanager
def mixed_in(model: nn.Module, mixins: Mapping[str, type]) -> Iterator[None]:
    """A context in which classes are mixed into those of the modules whose names match the patterns."""
    before: dict[nn.Module, type] = {}
    try:
        for pattern, mixin in mixins.items():
            for module in map(model.get_submodule, names_of(model, pattern)):
                kind: type = type(module)  # mypy holds a type[nn.Module] to be unhashable
                before[module] = kind
                change_class(module, mixed(kind, mixin))
        yield
    finally:
        for module, kind in before.items():
            change_class(module, kind)
