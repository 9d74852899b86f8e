# SPDX-License-Identifier: Apache-2.0
"""Backend `dense` of quantized linear layers, for which a 2:4 weight is made dense.

On a CPU it is the C++ kernel of dense int8 weights: the sums are the same integers and the epilogue is the same code,
so the bits are those of `cpu`. On a GPU it is torch's product (`torch_product`).
"""

from __future__ import annotations

from torch import Tensor

from madtp_kernels.native import quantized as native
from madtp_kernels.quantized import torch_product
from madtp_kernels.reference.quantized import to_dense_values


def quantized_linear(
    x: Tensor,  # (T, C)
    values: Tensor,  # int8, or on a GPU float8_e4m3fn (N, C), or (N, C/2) with indices
    indices: Tensor | None,  # (N, C/8)
    weight_scale: Tensor,  # (N,) float32
    layout: Tensor | None,  # of the dense weight
    bias: Tensor | None,  # (N,)
    activation: str,
    residual: Tensor | None,  # (T, N)
    scale: Tensor | None,  # (N,)
    num_rows: Tensor | None,  # one int32
) -> Tensor:  # (T, N)
    if x.device.type != "cpu":
        return torch_product.quantized_linear(
            x, values, indices, weight_scale, layout, bias, activation, residual, scale, num_rows
        )
    if layout is None:
        values = to_dense_values(values, indices)
    # With a layout it asks values for N alone.
    return native.quantized_linear(x, values, None, weight_scale, layout, bias, activation, residual, scale, num_rows)
