# SPDX-License-Identifier: Apache-2.0
"""Backend `dense` of int8 linear layers: the C++ kernel of dense int8 weights, for which a 2:4 weight is made dense.

The sums are the same integers and the epilogue is the same code, so the bits are those of `cpu`.
"""

from __future__ import annotations

from torch import Tensor

from madtp_kernels.native import quantized as native
from madtp_kernels.reference.quantized import to_dense_int8


def quantized_linear(
    x: Tensor,  # (T, C)
    values: Tensor,  # int8 (N, C), or (N, C/2) with indices
    indices: Tensor | None,  # (N, C/8)
    weight_scale: Tensor,  # (N,) float32
    layout: Tensor | None,  # of the dense weight
    bias: Tensor | None,  # (N,)
    activation: str,
    residual: Tensor | None,  # (T, N)
    scale: Tensor | None,  # (N,)
    num_rows: Tensor | None,  # one int32
) -> Tensor:  # (T, N)
    if layout is None:
        values = to_dense_int8(values, indices)
    # With a layout it asks values for N alone.
    return native.quantized_linear(x, values, None, weight_scale, layout, bias, activation, residual, scale, num_rows)
