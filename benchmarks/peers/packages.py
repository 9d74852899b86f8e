# SPDX-License-Identifier: Apache-2.0
"""Packages that only peers need."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import logging
import warnings
from collections.abc import Iterator
from types import ModuleType

from benchmarks.entry import Unavailable


def version(name: str) -> str:
    """Of an installed package. Raises `Unavailable` where it is not."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        raise _missing(name) from None


def package(name: str) -> ModuleType:
    """Imports it. Raises `Unavailable` where it is not installed, or cannot be imported."""
    try:
        with quiet():
            return importlib.import_module(name)
    except ImportError as error:
        installed = name.partition(".")[0]
        if error.name == installed:
            raise _missing(installed) from None
        raise Unavailable(f"{installed} cannot be imported: {error}") from None


def _missing(name: str) -> Unavailable:
    return Unavailable(f"{name} is not installed: pip install -e .[peers]")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what libraries say below an error while they import, export and round."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
