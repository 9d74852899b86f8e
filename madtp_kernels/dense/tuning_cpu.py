# SPDX-License-Identifier: Apache-2.0
"""Which product of a dense linear layer is faster on a CPU: torch's, or oneDNN's with the weight packed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from madtp_kernels.dense import onednn, packed, torch_product
from madtp_kernels.measured import LinearCall, Measurements, Timing, linear_call, take_turns

MAX_ROWS = 512  # the two keep their ratio beyond
MIN_MACS = 2**22  # below, to ask which is faster costs more than the faster one could gain
MARGIN = 0.9  # the packed weight takes as much memory again

measurements = Measurements("dense", LinearCall, MARGIN, ", or nearly as fast in half of the memory")


def dense_call(
    x: Tensor, weight: Tensor, activation: str | None, residual: Tensor | None, scale: Tensor | None
) -> LinearCall:
    """The class of a call."""
    return linear_call(x, weight.shape, activation, residual, scale, MAX_ROWS)


def fastest(case: LinearCall) -> str:
    """dense or onednn."""
    return measurements.fastest(case, backends(case), time_backends)


def backends(case: LinearCall) -> tuple[str, ...]:
    """Those that a class can run on."""
    runs = is_worth_asking(case) and onednn.unsupported_reason(getattr(torch, case.dtype)) is None
    return ("dense", "onednn") if runs else ("dense",)


def is_worth_asking(case: LinearCall) -> bool:
    return case.rows * case.out_features * case.in_features >= MIN_MACS


def time_backends(case: LinearCall, backends: Sequence[str]) -> Timing:
    """Runs both in turns on random data. That of oneDNN with the look-up of what was packed, which every call pays."""
    with torch.inference_mode(False):  # whose tensors count no writes
        x, weight, *epilogue = random_call(case)

    def run_on_onednn() -> Tensor:
        return onednn.linear(x, packed.packed(weight), *epilogue)

    functions: dict[str, Callable[[], Tensor]] = {
        "dense": functools.partial(torch_product.linear, x, weight, *epilogue),
        "onednn": run_on_onednn,
    }
    return take_turns({name: functions[name] for name in backends})


def measured_rows(rows: int) -> int:
    """How many rows stand for a class: no multiple of a tile, as those of images and texts seldom are; 577 for 512."""
    return rows if rows < 16 else rows + rows // 8 + 1


def random_call(case: LinearCall) -> tuple[Any, ...]:
    """x, weight, bias, activation, residual and scale, drawn by a generator of its own."""
    generator, dtype = torch.Generator().manual_seed(0), getattr(torch, case.dtype)
    activation, *rest = case.epilogue.split("+")
    rows = measured_rows(case.rows)
    shapes = (rows, case.in_features), (case.out_features, case.in_features), (case.out_features,)
    x, weight, vector = (torch.randn(shape, generator=generator, device="cpu").to(dtype) for shape in shapes)
    residual = x.new_zeros(rows, case.out_features) if "residual" in rest else None
    return x, weight, vector, activation, residual, vector if "scale" in rest else None
