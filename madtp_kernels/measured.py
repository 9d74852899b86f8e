# SPDX-License-Identifier: Apache-2.0
"""Which backend of an op is faster on this machine's CPU: measured at the first use of a class of calls, and kept.

`MADTP_CACHE` (default ~/.cache/madtp) holds for every op one file per CPU, instruction set and versions. A file that
cannot be read counts as none, one of a newer format too, with a warning; what cannot be written, or has no home to go
to, stays in the process.
`MADTP_TUNE=off` never measures and reads no cache, so every process of an installation computes alike: the default of
the op runs, unless such a file in madtp_kernels/tables says otherwise.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import statistics
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from madtp_kernels import dispatch, table_file
from madtp_kernels._version import __version__
from madtp_kernels.atomic_file import atomic_file
from madtp_kernels.bounded_file import ODD_VALUES

SHIPPED = Path(__file__).with_name("tables")
SAME_KERNELS = ("0.1.0",)  # versions of madtp_kernels whose measurements hold for this one: its kernels are theirs
MAX_ROUNDS, MAX_SECONDS = 9, 0.05  # but three rounds at least,
CLEAR = 0.8  # or one, where that takes MAX_SECONDS and the fastest no more than this share of the next

DTYPE_NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in (*dispatch.FAST_DTYPES, torch.float64)}
_measuring, _reading = threading.Lock(), threading.Lock()


class Timing(NamedTuple):
    """What was measured of a class of calls."""

    times: dict[str, float]  # backend -> median in microseconds
    measured: str  # the day

    def fastest(self, backends: Sequence[str], margin: float) -> str:
        """The first of the backends, unless another takes less than `margin` of its time: then the fastest."""
        times = {name: self.times[name] for name in backends if name in self.times}
        best = min(times, key=times.__getitem__, default=backends[0])
        default = times.get(backends[0])
        return best if default is None or times[best] < margin * default else backends[0]


class LinearCall(NamedTuple):
    """A class of calls of a linear op: what one measurement stands for."""

    rows: int  # the power of two nearest to those of the call
    out_features: int
    in_features: int
    dtype: str
    epilogue: str
    threads: int

    def __str__(self) -> str:
        sizes = f"{self.rows} rows, {self.in_features} to {self.out_features}, {self.dtype}"
        return f"{sizes}, {self.epilogue}, {self.threads} threads"


Call = TypeVar("Call", bound=tuple[Any, ...])


class Measurements(Generic[Call]):
    """The measurements of one op, by class of calls.

    Args:
        op: what the names of its files begin with.
        call: the type of a class, a NamedTuple of numbers and texts, whose text says what it is.
        margin: the first backend of a call runs unless another takes less than this share of its time.
        why: what speaks for the first backend where another is about as fast.
    """

    def __init__(self, op: str, call: type[Call], margin: float, why: str) -> None:
        self.op, self.call, self.margin, self.why = op, call, margin, why
        self._tables: dict[str | Path | None, dict[Call, Timing]] = {}

    def fastest(self, case: Call, backends: Sequence[str], measure: Callable[[Call, Sequence[str]], Timing]) -> str:
        """The backend for a class. Measures what is not known, unless `MADTP_TUNE` is off or a dispatch mode would see
        it.
        """
        if len(backends) == 1:
            return backends[0]
        timing = self.known(case)
        if not _holds(timing, backends) and enabled() and _get_current_dispatch_mode() is None:
            with _measuring:
                timing = self.known(case)
                if not _holds(timing, backends):
                    timing = measure(case, backends)
                    self._keep(case, timing)
        return backends[0] if timing is None else timing.fastest(backends, self.margin)

    def add_timings(self, choice: dispatch.Choice, case: Call, backends: Sequence[str]) -> dispatch.Choice:
        """`choice`, of the first of the backends, with what is known of them."""
        if len(backends) == 1:
            return choice
        timing = self.known(case)
        if timing is None or (enabled() and not _holds(timing, backends)):
            why = "the first call does" if enabled() else "MADTP_TUNE is off"
            return replace(choice, reason=f"{choice.reason}; nothing was measured ({case}): {why}")
        best = timing.fastest(backends, self.margin)
        numbers = ", ".join(f"{name} {timing.times[name]:.1f} us" for name in backends if name in timing.times)
        others = {name: f"{best} is faster here{self.why if best == backends[0] else ''}" for name in backends}
        rejected = {**choice.rejected, **others}
        rejected.pop(best)
        reason = f"measured {timing.measured} ({case}): {numbers}"
        return replace(choice, backend=best, reason=reason, rejected=rejected)

    def known(self, case: Call) -> Timing | None:
        return self._table(os.environ.get("MADTP_CACHE") if enabled() else SHIPPED).get(case)

    def forget(self) -> None:
        """What this process knows, which is read again when it is asked for."""
        with _reading:
            self._tables.clear()

    def file_name(self, version: str | None = None) -> str:
        """The file of this machine, of this or another version of madtp_kernels."""
        found = machine() if version is None else machine() | {"madtp_kernels": version}
        return f"{self.op}-{hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16]}.json"

    def read(self, path: Path) -> dict[Call, Timing]:
        try:
            rows = table_file.read(path)["timings"]
            return {
                self.call(*case): Timing({str(name): float(us) for name, us in dict(times).items()}, str(day))
                for case, times, day in rows
            }
        except table_file.NewerTableError as error:
            warnings.warn(f"{error}; it is ignored", stacklevel=2)
            return {}
        except (OSError, *ODD_VALUES):
            return {}

    def _read_folder(self, folder: Path | None) -> dict[Call, Timing]:
        """What is known of this machine in a folder; a measurement of this version takes the place of an older one."""
        found: dict[Call, Timing] = {}
        if folder is None:
            return found
        for version in (*SAME_KERNELS, None):
            found |= self.read(folder / self.file_name(version))
        return found

    def _table(self, folder: str | Path | None) -> dict[Call, Timing]:
        """What this process knows: of SHIPPED that alone, else what is shipped and what the cache holds; `_keep`
        adds."""
        with _reading:  # one table for all threads, or what one adds would be lost with its table
            if folder not in self._tables:
                shipped = self._read_folder(SHIPPED)
                cached = {} if isinstance(folder, Path) else self._read_folder(cache_folder(folder))
                self._tables[folder] = shipped | cached
            return self._tables[folder]

    def _keep(self, case: Call, timing: Timing) -> None:
        folder = os.environ.get("MADTP_CACHE")
        self._table(folder)[case] = timing
        cache = cache_folder(folder)
        if cache is None:
            return
        path = cache / self.file_name()
        if table_file.newer_reason(path) is not None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            everyone = self.read(path) | {case: timing}  # other processes write here too
            rows = [(of, *found) for of, found in everyone.items()]
            content = {"version": table_file.VERSION, **machine(), "timings": rows}
            with atomic_file(path) as partial:
                partial.write_text(json.dumps(content) + "\n")
        except OSError:
            pass  # kept in this process


def _holds(timing: Timing | None, backends: Sequence[str]) -> bool:
    """Whether all of the backends were measured, as they were not before one of them came."""
    return timing is not None and timing.times.keys() >= set(backends)


@torch.no_grad()
def take_turns(functions: Mapping[str, Callable[[], object]]) -> Timing:
    """Runs the backends in turns, and stops early where one is clearly faster or all of them take long."""
    rounds, began = [], 0.0
    for turn in range(-1, MAX_ROUNDS):  # the first warms up
        times = [_seconds(function) for function in functions.values()]
        if turn < 0:
            began = time.perf_counter()
            continue
        rounds.append(times)
        first, second = (*sorted(times), float("inf"))[:2]
        enough = len(rounds) >= 3 or first < CLEAR * second
        if enough and time.perf_counter() - began > MAX_SECONDS:
            break
    medians = (1e6 * statistics.median(times) for times in zip(*rounds, strict=True))
    return Timing(dict(zip(functions, medians, strict=True)), time.strftime("%Y-%m-%d"))


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def power_of_two(rows: int) -> int:
    """The power of two nearest to `rows`."""
    return 1 << (rows**2).bit_length() // 2


def linear_call(
    x: Tensor,
    shape: Sequence[int],
    activation: str | None,
    residual: Tensor | None,
    scale: Tensor | None,
    max_rows: int,
) -> LinearCall:
    """The class of a call with x (T, C) and a weight of this shape (N, C); one for all rows from max_rows on."""
    rows = min(power_of_two(x.shape[0]), max_rows)
    (out_features, in_features), epilogue = shape, epilogue_name(activation, residual, scale)
    return LinearCall(rows, out_features, in_features, DTYPE_NAMES[x.dtype], epilogue, torch.get_num_threads())


def epilogue_name(activation: str | None, residual: Tensor | None, scale: Tensor | None) -> str:
    return f"{activation or 'none'}{'' if scale is None else '+scale'}{'' if residual is None else '+residual'}"


def enabled() -> bool:
    return is_on("MADTP_TUNE")


def is_on(variable: str) -> bool:
    """Whether an environment variable is on, as it is where nothing is set. Raises ValueError for no on or off."""
    value = os.environ.get(variable, "on").strip().lower() or "on"
    if value not in ("on", "off"):
        raise ValueError(f"{variable} must be on or off, got {value!r}")
    return value == "on"


@functools.cache
def machine() -> dict[str, str]:
    """What a measurement holds for."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    cpu = name or platform.processor() or platform.machine()
    has_ours = dispatch.extension_unsupported_reason() is None
    isa = dispatch.extension().cpu.isa() if has_ours else torch.backends.cpu.get_cpu_capability()
    return {"cpu": cpu, "isa": isa, "torch": torch.__version__, "madtp_kernels": __version__}


def cache_folder(folder: str | None) -> Path | None:
    """Where the cache is; None where nobody can tell: a user without a home directory has none."""
    try:
        return (Path(folder).expanduser() if folder else Path.home() / ".cache" / "madtp") / "tuning"
    except (RuntimeError, KeyError):
        return None
