# SPDX-License-Identifier: Apache-2.0
"""Which backend of a 2:4 linear layer is faster on this machine: ours or dense, measured at the first use and kept.

`MADTP_CACHE` (default ~/.cache/madtp) holds one file per CPU, instruction set and versions. A file that cannot be read
counts as none, one of a newer format too, with a warning; what cannot be written, or has no home to go to, stays in the
process.
`MADTP_TUNE=off` never measures and reads no cache, so every process of an installation computes alike: ours runs,
unless such a file in madtp_kernels/sparse24/tables says otherwise.
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
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from madtp_kernels import dispatch
from madtp_kernels._version import __version__
from madtp_kernels.atomic_file import atomic_file
from madtp_kernels.native import sparse24 as native
from madtp_kernels.reference.sparse24 import sparse24_to_dense
from madtp_kernels.sparse24 import backend_dense as dense
from madtp_kernels.sparse24 import table_file
from madtp_kernels.sparse24.weight import ASCENDING, Sparse24Weight

MAX_ROWS = 1024  # the two keep their ratio beyond
SHIPPED = Path(__file__).with_name("tables")
SAME_KERNELS = ("0.1.0",)  # versions of madtp_kernels whose measurements hold for this one: its kernels are theirs
MAX_ROUNDS, MAX_SECONDS = 9, 0.05  # but three rounds at least
MARGIN = 0.97  # a tie is ours: dense costs memory

DTYPE_NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in (*dispatch.FAST_DTYPES, torch.float64)}
_measuring, _reading = threading.Lock(), threading.Lock()


class LinearCall(NamedTuple):
    """A class of calls of `sparse24_linear`: what one measurement stands for."""

    rows: int  # the power of two nearest to those of the call
    out_features: int
    in_features: int
    dtype: str
    weight_dtype: str
    epilogue: str
    threads: int

    def __str__(self) -> str:
        sizes = f"{self.rows} rows, {self.in_features} to {self.out_features}, {self.dtype}, weight {self.weight_dtype}"
        return f"{sizes}, {self.epilogue}, {self.threads} threads"


class Timing(NamedTuple):
    """Medians in microseconds."""

    ours: float
    dense: float
    measured: str  # the day

    @property
    def backend(self) -> str:
        return "dense" if self.dense < MARGIN * self.ours else "cpu"


def linear_call(
    x: Tensor, weight: Sparse24Weight, activation: str | None, residual: Tensor | None, scale: Tensor | None
) -> LinearCall:
    """The class of a call."""
    rows = min(power_of_two(x.shape[0]), MAX_ROWS)
    out_features, half = weight.values.shape
    names = DTYPE_NAMES[x.dtype], DTYPE_NAMES[weight.dtype]
    return LinearCall(
        rows, out_features, 2 * half, *names, epilogue_name(activation, residual, scale), torch.get_num_threads()
    )


def power_of_two(rows: int) -> int:
    """The power of two nearest to `rows`."""
    return 1 << (rows**2).bit_length() // 2


def epilogue_name(activation: str | None, residual: Tensor | None, scale: Tensor | None) -> str:
    return f"{activation or 'none'}{'' if scale is None else '+scale'}{'' if residual is None else '+residual'}"


def fastest(case: LinearCall) -> str:
    """cpu or dense. Measures what is not known, unless `MADTP_TUNE` is off or a dispatch mode would see it."""
    timing = known(case)
    if timing is None and enabled() and _get_current_dispatch_mode() is None:
        with _measuring:
            timing = known(case)
            if timing is None:
                timing = time_backends(case)
                _keep(case, timing)
    return "cpu" if timing is None else timing.backend


def add_timings(choice: dispatch.Choice, case: LinearCall) -> dispatch.Choice:
    """`choice`, of cpu, with what is known of it and dense."""
    timing = known(case)
    if timing is None:
        why = "the first call does" if enabled() else "MADTP_TUNE is off"
        return replace(choice, reason=f"{choice.reason}; nothing was measured ({case}): {why}")
    numbers = f"measured {timing.measured} ({case}): cpu {timing.ours:.1f} us, dense {timing.dense:.1f} us"
    other = "cpu" if timing.backend == "dense" else "dense"
    rejected = {**choice.rejected, other: f"{timing.backend} is faster here, or as fast in less memory"}
    rejected.pop(timing.backend, None)
    return replace(choice, backend=timing.backend, reason=numbers, rejected=rejected)


def enabled() -> bool:
    value = os.environ.get("MADTP_TUNE", "on").strip().lower() or "on"
    if value not in ("on", "off"):
        raise ValueError(f"MADTP_TUNE must be on or off, got {value!r}")
    return value == "on"


def known(case: LinearCall) -> Timing | None:
    return _table(os.environ.get("MADTP_CACHE") if enabled() else SHIPPED).get(case)


@torch.no_grad()
def time_backends(case: LinearCall) -> Timing:
    """Runs both in turns on random data."""
    x, values, indices, *epilogue = random_call(*case[:-1])
    functions = (
        functools.partial(native.sparse24_linear, x, values, indices, native.sparse24_pack(values, indices), *epilogue),
        functools.partial(dense.sparse24_linear, x, values, indices, sparse24_to_dense(values, indices), *epilogue),
    )
    pairs, began = [], 0.0
    for turn in range(-1, MAX_ROUNDS):  # the first warms up
        pair = [_seconds(function) for function in functions]
        if turn < 0:
            began = time.perf_counter()
            continue
        pairs.append(pair)
        if len(pairs) >= 3 and time.perf_counter() - began > MAX_SECONDS:
            break
    ours, others = (1e6 * statistics.median(times) for times in zip(*pairs, strict=True))
    return Timing(ours, others, time.strftime("%Y-%m-%d"))


def random_call(
    rows: int, out_features: int, in_features: int, dtype: str, weight_dtype: str, epilogue: str
) -> tuple[Any, ...]:
    """x, values, indices, bias, activation, residual, scale and num_rows (None), drawn by a generator of its own."""
    generator = torch.Generator().manual_seed(0)
    x_dtype, values_dtype = getattr(torch, dtype), getattr(torch, weight_dtype)
    random = functools.partial(torch.randn, generator=generator, dtype=torch.float32, device="cpu")
    x, values = random(rows, in_features).to(x_dtype), random(out_features, in_features // 2).to(values_dtype)
    draws = torch.randint(6, (2, out_features, in_features // 8), generator=generator, device="cpu")
    low, high = torch.tensor(ASCENDING, dtype=torch.uint8, device="cpu")[draws]
    activation, *rest = epilogue.split("+")
    vector = random(out_features).to(x_dtype)  # bias, and scale
    residual = random(rows, out_features).to(x_dtype) if "residual" in rest else None
    return x, values, low | high << 4, vector, activation, residual, vector if "scale" in rest else None, None


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


@functools.cache
def machine() -> dict[str, str]:
    """What a measurement holds for."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    cpu = name or platform.processor() or platform.machine()
    isa = dispatch.extension().cpu.isa()
    return {"cpu": cpu, "isa": isa, "torch": torch.__version__, "madtp_kernels": __version__}


def _file_name(version: str | None = None) -> str:
    """The file of this machine, of this or another version of madtp_kernels."""
    found = machine() if version is None else machine() | {"madtp_kernels": version}
    return f"sparse24-{hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16]}.json"


def _cache_folder(folder: str | None) -> Path | None:
    """Where the cache is; None where nobody can tell: a user without a home directory has none."""
    try:
        return (Path(folder).expanduser() if folder else Path.home() / ".cache" / "madtp") / "tuning"
    except (RuntimeError, KeyError):
        return None


def _read(path: Path) -> dict[LinearCall, Timing]:
    try:
        rows = table_file.read(path)["timings"]
        return {LinearCall(*case): Timing(float(ours), float(other), str(day)) for case, (ours, other, day) in rows}
    except table_file.NewerTableError as error:
        warnings.warn(f"{error}; it is ignored", stacklevel=2)
        return {}
    except (OSError, ValueError, TypeError, KeyError, OverflowError):
        return {}


def _read_folder(folder: Path | None) -> dict[LinearCall, Timing]:
    """What is known of this machine in a folder; a measurement of this version takes the place of an older one."""
    found: dict[LinearCall, Timing] = {}
    if folder is None:
        return found
    for version in (*SAME_KERNELS, None):
        found |= _read(folder / _file_name(version))
    return found


def _table(folder: str | Path | None) -> dict[LinearCall, Timing]:
    """What this process knows: of SHIPPED that alone, else what is shipped and what the cache holds; `_keep` adds."""
    with _reading:  # one table for all threads, or what one adds would be lost with its table
        return _read_table(folder)


@functools.cache
def _read_table(folder: str | Path | None) -> dict[LinearCall, Timing]:
    shipped = _read_folder(SHIPPED)
    return shipped if isinstance(folder, Path) else shipped | _read_folder(_cache_folder(folder))


def _keep(case: LinearCall, timing: Timing) -> None:
    folder = os.environ.get("MADTP_CACHE")
    _table(folder)[case] = timing
    cache = _cache_folder(folder)
    if cache is None:
        return
    path = cache / _file_name()
    if table_file.newer_reason(path) is not None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        everyone = _read(path) | {case: timing}  # other processes write here too
        content = {"version": table_file.VERSION, **machine(), "timings": list(everyone.items())}
        with atomic_file(path) as partial:
            partial.write_text(json.dumps(content) + "\n")
    except OSError:
        pass  # kept in this process
