# SPDX-License-Identifier: Apache-2.0
"""Times and memory of functions that take turns in one process."""

from __future__ import annotations

import ctypes
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

import torch

from benchmarks.entry import Thunk

L2_FLUSH_BYTES = 256 << 20
MIN_TURNS = 3
MIN_CLOCKS_AHEAD = 1 << 20  # of the GPU, half a millisecond
CLOCKS_PER_SECOND = 2e9  # about, of a GPU
MAX_SECONDS_AHEAD = 0.2


class Spread(NamedTuple):
    """Seconds: median and the 20th and 80th percentile."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        cuts = statistics.quantiles(values, n=5, method="inclusive") if len(values) > 1 else [values[0]] * 4
        return cls(statistics.median(values), cuts[0], cuts[3])


def keep_freed_memory() -> None:
    """Makes glibc keep what is freed, as servers' allocators do: else page faults rule the time of large outputs."""
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(-4, 0)  # M_MMAP_MAX
            mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def take_turns(
    functions: Mapping[str, Sequence[Thunk]],
    device: torch.device,
    rounds: int,
    warmup: int = 2,
    limit: float = math.inf,
    warm: Collection[str] = (),
) -> dict[str, list[float]]:
    """Seconds of every call, by name: in each round every function runs once, on the next of its input sets.

    limit: seconds after which a function takes no more turns, but for the first `MIN_TURNS`. warm: names of those that
    need no warm-up.

    Turns make a drift of the machine's speed hit all alike, and give pairs to take ratios of. Each round has another
    order, as a function finds in the caches what the one before it left there.
    """
    shuffled = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    timer = _cuda_timer() if device.type == "cuda" else _cpu_timer
    for turn in range(-warmup, rounds):
        for name in shuffled.sample(list(functions), len(functions)):
            sets = functions[name]
            if turn < 0 and name in warm:
                continue
            if len(seconds[name]) >= MIN_TURNS and sum(seconds[name]) > limit:
                continue
            elapsed = timer(sets[turn % len(sets)])
            if turn >= 0:
                seconds[name].append(elapsed)
    return seconds


def ratios(baseline: Sequence[float], own: Sequence[float]) -> list[float]:
    """How many times as fast as the baseline, turn by turn. A single call is held against the other's median."""
    if 1 in (len(baseline), len(own)):
        median = statistics.median(baseline)
        return [median / seconds for seconds in own]
    return [theirs / seconds for theirs, seconds in zip(baseline, own, strict=False)]


def _cpu_timer(function: Thunk) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _cuda_timer() -> Callable[[Thunk], float]:
    """Between two events on the stream. The GPU sleeps before them for as long as the host took to queue an earlier
    call, so that it does not wait for the host within one: what is timed is the work. A call that waits for the GPU
    itself is timed with its waits."""
    flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.int8, device="cuda")
    queueing: dict[Thunk, float] = {}  # seconds, the least that was seen

    def timer(function: Thunk) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        ahead = min(2 * queueing.get(function, 0.0), MAX_SECONDS_AHEAD)
        torch.cuda._sleep(max(MIN_CLOCKS_AHEAD, int(ahead * CLOCKS_PER_SECOND)))
        begin.record()
        start = time.perf_counter()
        function()
        queued = time.perf_counter() - start
        end.record()
        end.synchronize()
        queueing[function] = min(queued, queueing.get(function, queued))
        return begin.elapsed_time(end) / 1e3

    return timer


def peak_bytes(function: Thunk, device: torch.device) -> int:
    """Most memory the call held at once beyond what was held before, its result included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak
