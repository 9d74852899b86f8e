# SPDX-License-Identifier: Apache-2.0
"""Packages that are not installed: who needs them, and the command that brings them."""

from __future__ import annotations

INSTALL = "pip install -e ."
OURS = ("madtp", "madtp_kernels")


def package_needed(error: ModuleNotFoundError, what: str) -> ImportError:
    """The error to raise in the place of one that came out of an import.

    Args:
        what: needs the module, as users call it.

    Returns:
        an ImportError of one line; `error` itself where the module that was not found is one of ours.
    """
    package = (error.name or "").partition(".")[0]
    if not package or package in OURS:
        return error
    return ImportError(f"{package} is needed for {what}: {INSTALL}", name=package)
