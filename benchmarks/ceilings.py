# SPDX-License-Identifier: Apache-2.0
"""What this machine can do at most, measured in the run whose rows are held against it: a matrix product and a copy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from benchmarks.measure import take_turns

PRODUCT_SIZE = {
    "cpu": 1024,
    "cuda": 8192,
}  # of square matrices: large enough for the full rate, small enough to be quick
COPY_BYTES = {"cpu": 128 << 20, "cuda": 1 << 30}  # that no cache holds
ROUNDS = 5


def ceilings(device: torch.device, dtypes: Sequence[str], size: int | None = None, copy: int | None = None) -> dict:
    """The fastest of some turns: {"flops_per_second": by dtype, "bytes_per_second"}; a copy reads and writes.

    size, copy: other sizes than those of the device.
    """
    size, copy = size or PRODUCT_SIZE[device.type], copy or COPY_BYTES[device.type]
    source = torch.zeros(copy, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    functions = {"copy": [lambda: target.copy_(source)]}
    for dtype in dtypes:
        left, right = torch.randn(2, size, size).to(device, getattr(torch, dtype))
        out = torch.empty_like(left)
        functions[dtype] = [lambda left=left, right=right, out=out: torch.mm(left, right, out=out)]
    best = {name: min(seconds) for name, seconds in take_turns(functions, device, ROUNDS).items()}
    return {
        "flops_per_second": {dtype: 2 * size**3 / best[dtype] for dtype in dtypes},
        "bytes_per_second": 2 * copy / best["copy"],
    }


def of_ceiling(row: Mapping[str, Any], ceiling: Mapping[str, Any], dtype: str) -> float | None:
    """The share of its bound that a timed row reaches: the larger one of its two rates, each of its ceiling.

    None for a row without times, or of a dtype that was not measured.
    """
    if "seconds" not in row or dtype not in ceiling["flops_per_second"]:
        return None
    moved = row["gb_per_second"] * 1e9 / ceiling["bytes_per_second"]
    return max(moved, row.get("gflop_per_second", 0.0) * 1e9 / ceiling["flops_per_second"][dtype])
