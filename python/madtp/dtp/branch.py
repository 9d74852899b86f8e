# SPDX-License-Identifier: Apache-2.0
"""A branch of a patched model: its settings, which all threads share, and what each thread knows of its forwards."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from madtp.dtp.keep_rules import Rule
from madtp.dtp.ragged import RaggedAttention, RaggedBatch
from madtp.dtp.record import ForwardRecord
from madtp.dtp.selection_rules import METHOD
from madtp.dtp.step import PruningStep
from madtp.handles import find_handle
from madtp.mag import AlignmentGuide
from madtp_kernels import Selection


class Branch:
    """One branch of a patched model: its settings, and the records of the last forward of each thread.

    A forward reads the settings once, as its `PruningStep`: threads share a model, and a block that runs again for its
    gradient does what it did at first, whatever was set in between.

    Args:
        name: such as "vision".
        guide: alignment tokens and maps, shared with the other branches.
        attention: runs the branch's attention.
        layers: how many blocks the branch has.
        selection: one of `selection_rules.SELECTIONS`, or a function like the rules of `Keep`.
    """

    def __init__(
        self,
        name: str,
        guide: AlignmentGuide,
        attention: RaggedAttention,
        layers: int,
        selection: str | Rule = METHOD,
    ):
        self.name, self.guide, self.attention, self.layers, self.selection = name, guide, attention, layers, selection
        self.temperature = 0.0
        self.first_layer = 0  # whose tokens are pruned; blocks before it keep all of theirs
        self.capacity = "exact"  # or "upper_bound", where a forward needs no gradients: of `madtp.patch`
        self.samples_per_feature = 1  # consecutive parts of the batch whose aligned features are averaged
        self.align = False  # collect the aligned features of MAG, for its loss
        self.observer: Callable[[Tensor, Selection], None] | None = None  # told of every importance (T,) and selection
        self._threads = _Threads()

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles have the settings; what a forward left belongs to the thread that ran it."""
        return {name: value for name, value in vars(self).items() if name != "_threads"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._threads = _Threads()

    @property
    def prunes(self) -> bool:
        return self.temperature > 0 and not self.here.dense

    @property
    def here(self) -> ThreadState:
        """What holds in this thread alone."""
        return self._threads.here

    @property
    def last(self) -> ForwardRecord:
        """Of the last forward of this thread; an empty one before the first."""
        return self.here.record

    def fixed(self, tower: nn.Module) -> bool:
        """Whether a forward works on as many rows as there were tokens at first.

        Rows of no meaning must not reach gradients, nor the random numbers of dropout.
        """
        if self.capacity != "upper_bound" or self.here.exact:
            return False
        return not (tower.training or torch.is_grad_enabled())

    def begin(self, batch: RaggedBatch) -> tuple[PruningStep, ForwardRecord]:
        """A forward of `batch`: what its blocks do, and where it writes what it leaves."""
        record = ForwardRecord(batch.without_features(), self.samples_per_feature)
        if not torch.compiler.is_exporting():  # whose tensors are fake
            self.here.record = record
        return self._step(), record

    def _step(self) -> PruningStep:
        """With the settings of now."""
        here = self.here
        return PruningStep(
            self.name,
            self.guide,
            self.attention,
            self.selection,
            0.0 if here.dense else self.temperature,
            self.first_layer,
            self.align and not here.inference,
            self.observer,
        )

    def forget(self) -> None:
        """Forgets the last forward of this thread."""
        self.here.record = ForwardRecord()


class ThreadState:
    """What one thread knows of a branch: its last forward, and the contexts that it has entered."""

    def __init__(self) -> None:
        self.record = ForwardRecord()
        # How many contexts hold that say so; contexts of coroutines need not end in the order they began.
        self.dense = 0  # temperature 0, whatever is set
        self.inference = 0  # aligned features are not collected, whatever is set
        self.exact = 0  # exact capacity, whatever is set


class _Threads(threading.local):
    # An object of its own for each thread: torch.compile follows what is set on it, and not what is set on a local.
    def __init__(self) -> None:
        self.here = ThreadState()


@contextmanager
def exact_capacity(model: nn.Module) -> Iterator[None]:
    """A context in which a patched model has no rows but those of its tokens; any other model stays as it is.

    For the thread that enters it.
    """
    handle = find_handle(model)
    with in_this_thread([] if handle is None else handle.pruning.values(), "exact"):
        yield


@contextmanager
def in_this_thread(branches: Iterable[Branch], *flags: str) -> Iterator[None]:
    """A context in which these flags of `ThreadState` hold, for the thread that enters it."""
    states = [branch.here for branch in branches]

    def count(change: int) -> None:
        for state in states:
            for flag in flags:
                setattr(state, flag, getattr(state, flag) + change)

    count(1)
    try:
        yield
    finally:
        count(-1)
