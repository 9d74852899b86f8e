# SPDX-License-Identifier: Apache-2.0
"""Backend `dense` of 2:4 linear layers: torch's dense product on the decompressed weight, then its epilogue."""

from __future__ import annotations

import torch
from torch import Tensor

from madtp_kernels.checks import require
from madtp_kernels.dense import torch_product
from madtp_kernels.reference.sparse24 import sparse24_to_dense, valid_rows


def check_layout(layout: Tensor | None, values: Tensor, indices: Tensor) -> Tensor | None:
    """`layout`, if it is None or has the shape of the dense weight. Raises ValueError for another."""
    if layout is None:
        return None
    shape = values.shape[0], 2 * values.shape[1]
    ok = layout.dtype == values.dtype and layout.layout is torch.strided and tuple(layout.shape) == shape
    require(ok, "layout", f"the dense weight, {values.dtype} of shape {shape}", layout)
    return layout


def sparse24_linear(
    x: Tensor,  # (T, C)
    values: Tensor,  # (N, C/2)
    indices: Tensor,  # (N, C/8)
    dense: Tensor | None,  # (N, C)
    bias: Tensor | None,  # (N,)
    activation: str,
    residual: Tensor | None,  # (T, N)
    scale: Tensor | None,  # (N,)
    num_rows: Tensor | None,  # one int32
) -> Tensor:  # (T, N)
    """As the reference, but in bfloat16 and float16 torch rounds the product before the epilogue."""
    dense = sparse24_to_dense(values, indices) if dense is None else dense
    out = torch_product.linear(x, dense, bias, activation, residual, scale)
    return out if num_rows is None else torch.where(valid_rows(x, num_rows), out, 0)
