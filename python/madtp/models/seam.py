# SPDX-License-Identifier: Apache-2.0
"""A place where a decoder loses image tokens: what all threads share of it, and what each knows of its prompts."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any


class ThreadState:
    """What one thread knows of a seam: its calls of `generate`, and the contexts it has entered."""

    def __init__(self) -> None:
        self.calls: list[Any] = []  # of each `generate` that runs, the record of its prompt once it is known
        self.dense = 0  # contexts in which nothing is pruned
        self.simulated = 0  # contexts in which tokens are hidden and not removed

    @contextmanager
    def counted(self, name: str) -> Iterator[None]:
        """A context that counts as one of `dense` or `simulated`."""
        setattr(self, name, getattr(self, name) + 1)
        try:
            yield
        finally:
            setattr(self, name, getattr(self, name) - 1)


class Seam:
    """Base of the seams; `State` is the class of what a thread knows."""

    State: Callable[[], Any] = ThreadState

    def __init__(self) -> None:
        self._warned = False
        self._threads = _Threads(self.State)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles have what is kept; what a prompt left belongs to the thread that ran it."""
        return {name: value for name, value in vars(self).items() if name != "_threads"}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)
        self._threads = _Threads(self.State)

    @property
    def here(self) -> Any:
        """What holds in this thread alone."""
        return self._threads.here

    def warn_of_large(self, where: str, amount: float | None, lengths: Sequence[int]) -> None:
        """Says once that a count is larger than an image."""
        least = min((length for length in lengths if length), default=None)
        if isinstance(amount, int) and least is not None and amount > least and not self._warned:
            self._warned = True
            warnings.warn(
                f"keep of {where} is {amount} tokens an image, and an image has {least}: it keeps all", stacklevel=3
            )


class _Threads(threading.local):
    def __init__(self, state: Callable[[], Any]) -> None:
        self.here = state()
