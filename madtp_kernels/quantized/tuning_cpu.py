# SPDX-License-Identifier: Apache-2.0
"""Which kernel of an int8 2:4 linear layer is faster on a CPU: ours of 2:4 weights, or ours of dense ones.

Both give the same bits, so what is chosen shows in time and memory alone.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from madtp_kernels import dispatch
from madtp_kernels.measured import LinearCall, Measurements, Timing, linear_call, take_turns
from madtp_kernels.native import quantized as native
from madtp_kernels.quantized import backend_dense as dense
from madtp_kernels.quantized.weight import QuantizedWeight
from madtp_kernels.reference.quantized import INT8, to_dense_values
from madtp_kernels.sparse24.tuning_cpu import random_call

MAX_ROWS = 1024  # they keep their ratio beyond
MARGIN = 0.97  # a tie is ours of 2:4 weights: a dense one takes more memory
BACKENDS = ("cpu", "dense")

measurements = Measurements("quantized", LinearCall, MARGIN, ", or as fast in less memory")


def quantized_call(
    x: Tensor, weight: QuantizedWeight, activation: str | None, residual: Tensor | None, scale: Tensor | None
) -> LinearCall:
    """The class of a call; the weight is 2:4."""
    return linear_call(x, weight.shape, activation, residual, scale, MAX_ROWS)


def fastest(case: LinearCall) -> str:
    """cpu or dense."""
    return measurements.fastest(case, BACKENDS, time_backends)


def add_timings(choice: dispatch.Choice, case: LinearCall) -> dispatch.Choice:
    """`choice`, of cpu, with what is known of it and dense."""
    return measurements.add_timings(choice, case, BACKENDS)


def time_backends(case: LinearCall, backends: Sequence[str]) -> Timing:
    """Runs both in turns on random data."""
    rows, out_features, in_features, dtype, epilogue, _ = case
    x, weight, indices, *rest = random_call(rows, out_features, in_features, dtype, "float32", epilogue)
    values = (weight * INT8.largest / 4).clamp(-INT8.largest, INT8.largest).to(torch.int8)
    sparse = native.quantized_pack(values, indices, native.takes_many_rows(rows))
    layouts = sparse, native.quantized_pack(to_dense_values(values, indices), None)
    functions = {
        name: functools.partial(run, x, values, indices, torch.ones(out_features), layout, *rest)
        for name, run, layout in zip(BACKENDS, (native.quantized_linear, dense.quantized_linear), layouts, strict=True)
    }
    return take_turns({name: functions[name] for name in backends})
