# SPDX-License-Identifier: Apache-2.0
"""Which backend of a 2:4 linear layer is faster on a CPU: ours, or the dense product of torch or of oneDNN."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from madtp_kernels import dispatch
from madtp_kernels.dense import onednn
from madtp_kernels.measured import DTYPE_NAMES, Measurements, Timing, epilogue_name, power_of_two, take_turns
from madtp_kernels.native import sparse24 as native
from madtp_kernels.reference.sparse24 import sparse24_to_dense
from madtp_kernels.sparse24 import backend_dense as dense
from madtp_kernels.sparse24 import backend_onednn
from madtp_kernels.sparse24.weight import ASCENDING, Sparse24Weight

MAX_ROWS = 1024  # they keep their ratios beyond
MARGIN = 0.97  # a tie is ours: a dense weight costs memory


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


measurements = Measurements("sparse24", LinearCall, MARGIN, ", or as fast in less memory")


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


def fastest(case: LinearCall) -> str:
    """cpu, dense or onednn."""
    return measurements.fastest(case, _backends(case), time_backends)


def add_timings(choice: dispatch.Choice, case: LinearCall) -> dispatch.Choice:
    """`choice`, of cpu, with what is known of it and the others."""
    return measurements.add_timings(choice, case, _backends(case))


def _backends(case: LinearCall) -> tuple[str, ...]:
    dtype = torch.promote_types(getattr(torch, case.dtype), getattr(torch, case.weight_dtype))
    runs = onednn.unsupported_reason(dtype) is None
    return ("cpu", "dense", "onednn") if runs else ("cpu", "dense")


def time_backends(case: LinearCall, backends: Sequence[str]) -> Timing:
    """Runs the backends in turns on random data."""
    x, values, indices, *epilogue = random_call(*case[:-1])
    weight = sparse24_to_dense(values, indices)
    kinds: dict[str, tuple[Callable[..., Tensor], Callable[[], Tensor]]] = {
        "cpu": (native.sparse24_linear, lambda: native.sparse24_pack(values, indices)),
        "dense": (dense.sparse24_linear, lambda: weight),
        "onednn": (backend_onednn.sparse24_linear, lambda: onednn.pack(weight)),
    }
    functions = {}
    for name in backends:
        run, pack = kinds[name]
        functions[name] = functools.partial(run, x, values, indices, pack(), *epilogue)
    return take_turns(functions)


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
