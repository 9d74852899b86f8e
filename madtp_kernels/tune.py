# SPDX-License-Identifier: Apache-2.0
"""python -m madtp_kernels.tune: measures the 2:4 linear layers of common models on this GPU, for `tuning_cuda`.

Every configuration of ours is held to the dense product, then timed beside it and cuSPARSELt: in turns, with nothing of
them in L2, by events on a GPU that has the whole call queued. All are tried a few times; the fastest of ours meet the
others over more rounds.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from madtp_kernels import dispatch, table_file
from madtp_kernels.native import sparse24 as native
from madtp_kernels.sparse24 import backend_cusparselt as cusparselt
from madtp_kernels.sparse24 import backend_dense as dense
from madtp_kernels.sparse24 import tuning_cpu as tuning
from madtp_kernels.sparse24 import tuning_cuda
from madtp_kernels.sparse24.tuning_cuda import LinearCall, Timing
from madtp_kernels.sparse24.weight import Sparse24Weight, supports_shape

WIDTHS = (768, 1024)
DTYPES = ("bfloat16", "float16")
ROWS = tuple(1 << exponent for exponent in range(4, 16))
ROUNDS, SCREENING, FINALISTS = 21, 3, 6
TOLERANCE = 0.02  # of the largest result
L2_FLUSH_BYTES = 256 << 20
AHEAD_CLOCKS = 1 << 20  # of the GPU, half a millisecond: the host queues a whole call in less

Clock = Callable[[Callable[[], object]], float]  # microseconds of one call


def linear_calls(
    widths: Sequence[int] = WIDTHS, dtypes: Sequence[str] = DTYPES, rows: Sequence[int] = ROWS
) -> Iterator[LinearCall]:
    """The layers of a transformer block of these widths, with the epilogues that the known models have."""
    ends = "none+residual", "none+scale+residual"  # scale: DINOv2
    for dtype, width, count in itertools.product(dtypes, widths, rows):
        yield LinearCall(count, 3 * width, width, dtype, "none")  # query, key and value in one
        yield LinearCall(count, width, width, dtype, "none")  # or apart
        for epilogue in ends:
            yield LinearCall(count, width, width, dtype, epilogue)
        for activation in ("gelu", "gelu_tanh", "quick_gelu"):
            yield LinearCall(count, 4 * width, width, dtype, activation)
        for epilogue in ends:
            yield LinearCall(count, width, 4 * width, dtype, epilogue)


@torch.no_grad()
def time_backends(case: LinearCall, device: torch.device, clock: Clock, rounds: int = ROUNDS) -> Timing:
    """Raises RuntimeError for a configuration whose result is wrong: no speed without correctness."""
    drawn = tuning.random_call(*case[:4], case.dtype, case.epilogue)
    x, values, indices, *epilogue = (t.to(device) if isinstance(t, torch.Tensor) else t for t in drawn)
    weight = Sparse24Weight(values, indices)

    def call(backend: str, *more: object) -> tuple[Any, ...]:
        return x, values, indices, weight.layout(backend), *epilogue, *more

    theirs = {"dense": functools.partial(dense.sparse24_linear, *call("dense"))}
    algorithm = None
    if dispatch.unsupported_reason("sparse24_linear", "cusparselt", x.dtype, device) is None:
        algorithm = cusparselt.search(x, weight.layout("cusparselt"), epilogue[0])
        theirs["cusparselt"] = functools.partial(cusparselt.sparse24_linear, *call("cusparselt", algorithm))
    ours = {
        config: functools.partial(native.sparse24_linear_cuda, *call("cuda", config))
        for config in native.sparse24_linear_configs(*call("cuda"))
    }
    expected = theirs["dense"]().float()
    for name, function in (*ours.items(), *theirs.items()):
        error, size = (function().float() - expected).abs().max().item(), expected.abs().max().item()
        if not error <= TOLERANCE * size:
            raise RuntimeError(f"{name} is wrong by {error:.3g} of {size:.3g} ({case})")
    screened = take_turns(ours, clock, min(SCREENING, rounds))
    best = {config: ours[config] for config in sorted(ours, key=screened.__getitem__)[:FINALISTS]}
    medians = take_turns(best | theirs, clock, rounds)
    config = min(best, key=medians.__getitem__)
    times = medians[config], medians["dense"], algorithm, medians.get("cusparselt")
    return Timing(config, *times, time.strftime("%Y-%m-%d"))


def take_turns(functions: Mapping[Any, Any], clock: Clock, rounds: int) -> dict[Any, float]:
    """Medians by name. Each round has another order, as a call finds the clocks that the one before it left."""
    shuffled = random.Random(0)
    times: dict[Any, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name in shuffled.sample(list(functions), len(functions)):
            times[name].append(clock(functions[name]))
    return {name: statistics.median(values) for name, values in times.items()}


def cuda_clock(device: torch.device) -> Clock:
    """Between two events on the stream. The GPU sleeps before them, so that all of a call is queued when it begins."""
    flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.int8, device=device)

    def microseconds(function: Callable[[], object]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        torch.cuda._sleep(AHEAD_CLOCKS)
        begin.record()
        function()
        end.record()
        end.synchronize()
        return 1e3 * begin.elapsed_time(end)

    return microseconds


def unsupported_reason() -> str | None:
    """Why nothing can be measured here."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return dispatch.unsupported_reason("sparse24_linear", "cuda", torch.bfloat16, torch.device("cuda", 0))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m madtp_kernels.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="the table to write; by default the one that auto reads")
    parser.add_argument("--output", help=argparse.SUPPRESS)
    parser.add_argument("--widths", type=sizes, default=WIDTHS, help="of models, multiples of 16 (default 768,1024)")
    parser.add_argument("--rows", type=sizes, default=ROWS, help="powers of two (default 16 to 32768)")
    parser.add_argument("--dtypes", default=",".join(DTYPES), help="of bfloat16, float16 (default both)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"turns of each finalist (default {ROUNDS})")
    options = parser.parse_args(arguments)
    if options.output is not None:
        print("madtp_kernels.tune: --output is now called --out", file=sys.stderr)
        return 2
    dtypes = options.dtypes.split(",")
    if not set(dtypes) <= set(DTYPES):
        parser.error(f"--dtypes must be of {', '.join(DTYPES)}, got {options.dtypes!r}")
    if not all(supports_shape(width, width) for width in options.widths):
        parser.error(f"--widths must be multiples of 16, got {','.join(map(str, options.widths))}")
    if not set(options.rows) <= set(ROWS):
        parser.error(f"--rows must be of {', '.join(map(str, ROWS))}, got {','.join(map(str, options.rows))}")
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds}")
    if (why := unsupported_reason()) is not None:
        print(f"madtp_kernels.tune: nothing can be measured here: {why}", file=sys.stderr)
        return 2
    device = torch.device("cuda", 0)
    name = torch.cuda.get_device_name(device)
    path = options.out or tuning_cuda.path_of(name)
    try:  # before anything is measured
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        print(f"madtp_kernels.tune: {path} cannot be written: {error}; --out names another", file=sys.stderr)
        return 2
    if (why := table_file.newer_reason(path)) is not None:
        print(f"madtp_kernels.tune: {why}, so it is not written over; --out names another", file=sys.stderr)
        return 2
    timings, clock = tuning_cuda.read(path, name), cuda_clock(device)
    for case in linear_calls(options.widths, dtypes, options.rows):
        timings[case] = timing = time_backends(case, device, clock, options.rounds)
        tuning_cuda.write(path, name, timings)  # each time: what was measured stays when this is stopped
        print(f"{case}: {timing}", flush=True)
    return 0


def sizes(text: str) -> tuple[int, ...]:
    """1,2,3 -> positive integers; argparse says what is not."""
    sizes = tuple(int(part) for part in text.split(","))
    if min(sizes) < 1:
        raise ValueError(text)
    return sizes


if __name__ == "__main__":
    sys.exit(main())
