# SPDX-License-Identifier: Apache-2.0
"""Products of int8 and of fp8 by torch: what `dense` runs on a GPU. A 2:4 weight is made dense for them.

x is rounded, and what follows the product is done, as in the reference, one operation of torch after another. So int8
has the bits of the reference, but for the activations that are approximated. For fp8 the sums are those of the GPU's
accumulator (`reference.quantized`).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from madtp_kernels.checks import require
from madtp_kernels.reference.quantized import (
    INT8,
    finish,
    grid_of,
    product,
    quantize_rows,
    to_dense_values,
)

# torch._int_mm takes 17 rows and more, and multiples of 8; torch._scaled_mm takes multiples of 16.
MULTIPLE = 16
MIN_ROWS = 32


def pack(values: Tensor, indices: Tensor | None) -> Tensor:
    """The dense weight with zeros to multiples of 16: (N', C') contiguous."""
    dense = to_dense_values(values, indices)
    return _padded(dense, _multiple(dense.shape[0]), _multiple(dense.shape[1])).contiguous()


def check_layout(layout: Tensor | None, values: Tensor, shape: tuple[int, int]) -> Tensor | None:
    """`layout`, if it is None or one that `pack` makes of a weight of this shape. Raises ValueError for another."""
    if layout is not None:
        shape = _multiple(shape[0]), _multiple(shape[1])
        ok = layout.dtype == values.dtype and layout.is_contiguous() and tuple(layout.shape) == shape
        require(ok, "layout", f"the dense weight, contiguous {values.dtype} of shape {shape}", layout)
    return layout


def quantized_linear(
    x: Tensor,  # (T, C)
    values: Tensor,  # int8 or float8_e4m3fn (N, C), or (N, C/2) with indices
    indices: Tensor | None,  # (N, C/8)
    weight_scale: Tensor,  # (N,) float32
    layout: Tensor | None,  # of `pack`
    bias: Tensor | None,  # (N,)
    activation: str,
    residual: Tensor | None,  # (T, N)
    scale: Tensor | None,  # (N,)
    num_rows: Tensor | None,  # one int32
) -> Tensor:  # (T, N)
    dense = pack(values, indices) if layout is None else layout
    rounded, x_scale = quantize_rows(x, grid_of(values))
    sums = _sums(_padded(rounded, max(MIN_ROWS, x.shape[0]), dense.shape[1]), dense)
    before = product(sums[: x.shape[0], : values.shape[0]], x_scale, weight_scale, bias)
    return finish(before, x, activation, residual, scale, num_rows)


def _sums(x: Tensor, dense: Tensor) -> Tensor:
    """x (T, C), dense (N, C) -> (T, N) float32."""
    if grid_of(dense) is INT8:
        return torch._int_mm(x, dense.t()).float()
    # With scales by row torch rounds the sums to 16 bits, but on sm_90: so they are 1, and ours follow in float32.
    one = torch.ones((), dtype=torch.float32, device=x.device)
    out: Tensor = torch._scaled_mm(x, dense.t(), scale_a=one, scale_b=one, out_dtype=torch.float32)
    return out


def _padded(x: Tensor, rows: int, columns: int) -> Tensor:
    """With zeros up to this shape, whose bytes are 0 in both dtypes."""
    more = rows - x.shape[0], columns - x.shape[1]
    return F.pad(x.view(torch.uint8), (0, more[1], 0, more[0])).view(x.dtype) if any(more) else x


def _multiple(size: int) -> int:
    return -(-size // MULTIPLE) * MULTIPLE
