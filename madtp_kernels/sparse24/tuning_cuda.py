# SPDX-License-Identifier: Apache-2.0
"""Which backend of a 2:4 linear layer is faster on a GPU, and how ours is laid out there: a table per kind of GPU.

`python -m madtp_kernels.tune` measures and writes madtp_kernels/tables/<GPU>.json. Calls only look up: without
an entry ours runs, with the configuration that its model of the device expects to be fastest.
"""

from __future__ import annotations

import functools
import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from madtp_kernels import dispatch, measured, table_file
from madtp_kernels._version import __version__
from madtp_kernels.atomic_file import atomic_file
from madtp_kernels.bounded_file import ODD_VALUES
from madtp_kernels.native import sparse24 as native
from madtp_kernels.native.sparse24 import Sparse24Config
from madtp_kernels.sparse24 import backend_cusparselt as cusparselt
from madtp_kernels.sparse24.backend_cusparselt import Algorithm

MIN_ROWS, MAX_ROWS = 16, 32768
MARGIN = 0.98  # a tie is ours: dense costs memory


class LinearCall(NamedTuple):
    """A class of calls of `sparse24_linear`: what one measurement stands for."""

    rows: int  # the power of two nearest to those of the call
    out_features: int
    in_features: int
    dtype: str  # of x and weight
    epilogue: str

    def __str__(self) -> str:
        return f"{self.rows} rows, {self.in_features} to {self.out_features}, {self.dtype}, {self.epilogue}"


class Timing(NamedTuple):
    """Medians in microseconds, and what ran."""

    config: Sparse24Config
    cuda: float
    dense: float
    algorithm: Algorithm | None  # None where there is no cuSPARSELt
    cusparselt: float | None
    measured: str  # the day

    def backend(self, runs_cusparselt: bool) -> str:
        """The fastest that runs; ours unless another takes less than 98 % of its time."""
        others = {"dense": self.dense}
        if runs_cusparselt and self.cusparselt is not None:
            others["cusparselt"] = self.cusparselt
        best = min(others, key=others.__getitem__)
        return best if others[best] < MARGIN * self.cuda else "cuda"

    def __str__(self) -> str:
        peers = "" if self.cusparselt is None else f", cusparselt {self.cusparselt:.1f} us"
        return f"cuda {self.cuda:.1f} us ({describe(self.config)}), dense {self.dense:.1f} us{peers}"


def describe(config: Sparse24Config) -> str:
    tile = f"sm_{config.architecture}, {config.tile_tokens} tokens by {config.tile_out_features} features"
    return tile + ("" if config.cluster == 1 else f", clusters of {config.cluster}")


def linear_call(
    x: Tensor, values: Tensor, activation: str | None, residual: Tensor | None, scale: Tensor | None
) -> LinearCall:
    """The class of a call."""
    rows = min(max(measured.power_of_two(x.shape[0]), MIN_ROWS), MAX_ROWS)
    epilogue = measured.epilogue_name(activation, residual, scale)
    return LinearCall(rows, values.shape[0], 2 * values.shape[1], measured.DTYPE_NAMES[x.dtype], epilogue)


def fastest(case: LinearCall, device: torch.device) -> str:
    """cuda, dense or cusparselt, where cuda runs."""
    timing = known(case, device)
    return "cuda" if timing is None else timing.backend(_runs_cusparselt(case, device))


def _runs_cusparselt(case: LinearCall, device: torch.device) -> bool:
    return dispatch.unsupported_reason("sparse24_linear", "cusparselt", getattr(torch, case.dtype), device) is None


def add_timings(choice: dispatch.Choice, case: LinearCall, device: torch.device) -> dispatch.Choice:
    """`choice`, of cuda, with what is known of it and its rivals."""
    timing = known(case, device)
    if timing is None:
        why = f"nothing was measured on {_name(device)} ({case}): python -m madtp_kernels.tune does"
        return replace(choice, reason=f"{choice.reason}; {why}")
    best, rejected = fastest(case, device), dict(choice.rejected)
    for name in ("cuda", "dense", "cusparselt") if _runs_cusparselt(case, device) else ("cuda", "dense"):
        rejected[name] = f"{best} is faster here, or as fast in less memory"
    rejected.pop(best)
    return replace(choice, backend=best, reason=f"measured {timing.measured} ({case}): {timing}", rejected=rejected)


def known(case: LinearCall, device: torch.device) -> Timing | None:
    return table(_name(device)).get(case)


def sparse24_linear_cuda(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    layout: Tensor | None,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    scale: Tensor | None,
    num_rows: Tensor | None,
) -> Tensor:
    """`native.sparse24_linear_cuda` in the configuration of the table."""
    arguments = x, values, indices, layout, bias, activation, residual, scale, num_rows
    case = linear_call(x, values, activation, residual, scale)
    timing = known(case, x.device)
    config = None if timing is None else timing.config
    if config is not None and not _exists(case, x.device, config, arguments):
        config = None  # the table is of another version of the kernels
    return native.sparse24_linear_cuda(*arguments, config)


def sparse24_linear_cusparselt(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    layout: Tensor | None,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    scale: Tensor | None,
    num_rows: Tensor | None,
) -> Tensor:
    """`cusparselt.sparse24_linear` with the algorithm of the table."""
    arguments = x, values, indices, layout, bias, activation, residual, scale, num_rows
    timing = known(linear_call(x, values, activation, residual, scale), x.device)
    algorithm = None if timing is None else timing.algorithm
    return cusparselt.sparse24_linear(*arguments, algorithm or cusparselt.DEFAULT)


_checked: dict[tuple[LinearCall, torch.device], bool] = {}


def _exists(case: LinearCall, device: torch.device, config: Sparse24Config, arguments: tuple[Any, ...]) -> bool:
    if (case, device) not in _checked:
        _checked[case, device] = config in native.sparse24_linear_configs(*arguments)
    return _checked[case, device]


@functools.cache
def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def path_of(name: str) -> Path:
    """The table of the GPU of this name, as the package ships it."""
    return measured.SHIPPED / ("".join(c if c.isalnum() else "-" for c in name.lower()) + ".json")


@functools.cache
def table(name: str) -> dict[LinearCall, Timing]:
    return read(path_of(name), name)


def head(name: str) -> dict[str, object]:
    """What a table holds for. An algorithm of cuSPARSELt means something in its version alone."""
    versions = {"madtp_kernels": __version__, "torch": torch.__version__}
    return {"gpu": name, **versions, "cusparselt": torch.backends.cusparselt.version()}


def read(path: Path, name: str) -> dict[LinearCall, Timing]:
    """The table in a file; empty where there is none that can be read, or one of a newer format, with a warning."""
    try:
        found, timings = table_file.read(path), {}
        same = found["cusparselt"] == head(name)["cusparselt"]
        for row in found["timings"]:
            case = LinearCall(*(row[field] for field in LinearCall._fields))
            config, numbers = Sparse24Config(*row["config"]), (float(row["cuda"]), float(row["dense"]))
            peer: tuple[Algorithm | None, float | None] = None, None
            if same and row["cusparselt"] is not None:
                peer = Algorithm(*row["algorithm"]), float(row["cusparselt"])
            timings[case] = Timing(config, *numbers, *peer, str(row["measured"]))
        return timings
    except table_file.NewerTableError as error:
        warnings.warn(f"{error}; it is ignored", stacklevel=2)
        return {}
    except (OSError, *ODD_VALUES):
        return {}


def write(path: Path, name: str, timings: dict[LinearCall, Timing]) -> None:
    """A line for each class of calls, so that a change of one can be read."""
    rows = [json.dumps({**case._asdict(), **timing._asdict()}) for case, timing in sorted(timings.items())]
    header = json.dumps({"version": table_file.VERSION, **head(name)})[1:-1]
    with atomic_file(path) as partial:
        partial.write_text("{" + header + ', "timings": [\n' + ",\n".join(rows) + "\n]}\n")
