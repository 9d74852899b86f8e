# SPDX-License-Identifier: Apache-2.0
"""Backend `dense` of 2:4 linear layers: torch's dense product on the decompressed weight, then its epilogue."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from madtp_kernels.checks import require
from madtp_kernels.reference.sparse24 import ACTIVATIONS, sparse24_to_dense, valid_rows


def check_layout(layout: Tensor | None, values: Tensor, indices: Tensor) -> Tensor | None:
    """`layout`, if it is None or has the shape of the dense weight. Raises ValueError for another."""
    if layout is None:
        return None
    shape = values.shape[0], 2 * values.shape[1]
    ok = layout.dtype == values.dtype and tuple(layout.shape) == shape
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
    rows = _cast(x, dense.dtype)

    def product(bias: Tensor | None) -> Tensor:
        return F.linear(rows, dense, bias)

    if torch.is_autocast_enabled(x.device.type):  # which would round a float32 product
        with torch.autocast(x.device.type, enabled=False):
            return with_epilogue(product, x, dense.dtype, bias, activation, residual, scale, num_rows)
    return with_epilogue(product, x, dense.dtype, bias, activation, residual, scale, num_rows)


def with_epilogue(
    product: Callable[[Tensor | None], Tensor],
    x: Tensor,
    dtype: torch.dtype,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    scale: Tensor | None,
    num_rows: Tensor | None,
) -> Tensor:
    """The epilogue of the linear layer after product(bias) (T, N), a product in `dtype` that can add a bias in it."""
    if bias is not None and bias.dtype is not dtype and dtype is not torch.float32:
        out = product(None).float() + bias
    else:
        out = product(None if bias is None else _cast(bias, dtype))
    if activation != "none" or scale is not None or residual is not None:
        # One operation of torch rounds once by itself; several go through float32.
        steps = (activation != "none") + (activation == "quick_gelu") + (scale is not None) + (residual is not None)
        if steps > 1 or any(vector is not None and vector.dtype is torch.float32 for vector in (bias, scale)):
            out = _cast(out, torch.float32)
        out = ACTIVATIONS[activation](out)
        out = out if scale is None else out * scale
        out = out if residual is None else residual + out
    out = _cast(out, x.dtype)
    return out if num_rows is None else torch.where(valid_rows(x, num_rows), out, 0)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype is dtype else tensor.to(dtype)  # .to() that changes nothing takes as long as a check
