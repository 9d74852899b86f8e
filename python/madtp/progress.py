# SPDX-License-Identifier: Apache-2.0
"""Bars for what takes long."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

from rich import progress
from rich.console import Console
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainerState

Item = TypeVar("Item")


class Progress:
    """What `compress` shows of itself; `progress(items, title)` wraps an iteration."""

    def __init__(self, console: Console | None = None):
        self.console = console or Console(stderr=True)

    def __call__(self, items: Iterable[Item], title: str) -> Iterator[Item]:
        with progress.Progress(*_columns(), console=self.console) as bar:
            yield from bar.track(items, description=title)

    def status(self, title: str) -> AbstractContextManager:
        """A context that takes a while and counts nothing."""
        return self.console.status(title)

    @contextmanager
    def shards(self, title: str, total: int, done: int) -> Iterator[ShardBar]:
        """A context that counts shards of images, `done` of which were there before, and says how fast it goes."""
        with progress.Progress(*_columns(), progress.TextColumn("{task.fields[seen]}"), console=self.console) as bar:
            yield ShardBar(bar, bar.add_task(title, total=total, completed=done, seen=""))

    @contextmanager
    def training(self, trainer: Trainer) -> Iterator[None]:
        """In this context the trainer reports here instead of in its own bar and dictionaries."""
        for theirs in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(theirs)
        with progress.Progress(*_columns(), progress.TextColumn("{task.fields[seen]}"), console=self.console) as bar:
            shown = _TrainingBar(bar)
            trainer.add_callback(shown)
            try:
                yield
            finally:
                trainer.remove_callback(shown)


class ShardBar:
    """Shards that are done, and the images of this run, with those a second."""

    def __init__(self, bar: progress.Progress, task: progress.TaskID):
        self.bar, self.task = bar, task
        self.images, self.skipped, self.start = 0, 0, time.monotonic()

    def add(self, images: int = 0, skipped: int = 0, shards: int = 0) -> None:
        """What was done since the last call."""
        self.images += images
        self.skipped += skipped
        rate = self.images / max(time.monotonic() - self.start, 1e-9)
        broken = f", {self.skipped:,} skipped" if self.skipped else ""
        self.bar.update(self.task, advance=shards, seen=f"{self.images:,} images, {rate:,.1f} a second{broken}")


class _TrainingBar(TrainerCallback):
    def __init__(self, bar: progress.Progress):
        self.bar = bar
        self.task = bar.add_task("training", total=None, seen="")

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self._show(state)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self._show(state)

    def _show(self, state: TrainerState) -> None:
        self.bar.update(self.task, completed=state.global_step, total=state.max_steps)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if "loss" in (logs or {}):
            macs = sum(value for name, value in logs.items() if name.startswith("macs_"))
            seen = f"loss {logs['loss']:.3f}" + (f", {macs / 1e9:.4f} GMACs" if macs else "")
            self.bar.update(self.task, seen=seen)


def _columns() -> tuple[progress.ProgressColumn, ...]:
    return (
        progress.TextColumn("{task.description:<22}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
    )
