"""Backend `dense` of 2:4 linear layers: torch's dense product on the decompressed weight, then its epilogue."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from madtp_kernels.reference.sparse24 import ACTIVATIONS, real_rows, sparse24_to_dense


def sparse24_linear(
    x: Tensor,  # (T, C)
    values: Tensor,  # (N, C/2)
    indices: Tensor,  # (N, C/8)
    dense: Tensor | None,  # (N, C)
    bias: Tensor | None,  # (N,)
    activation: str,
    residual: Tensor | None,  # (T, N)
    scale: Tensor | None,  # (N,)
    total: Tensor | None,  # one int32
) -> Tensor:  # (T, N)
    """As the reference, but in bfloat16 and float16 torch rounds the product before the epilogue."""
    dense = sparse24_to_dense(values, indices) if dense is None else dense
    arguments = x, dense, bias, activation, residual, scale
    if torch.is_autocast_enabled(x.device.type):  # which would round a float32 product
        with torch.autocast(x.device.type, enabled=False):
            out = _product_and_epilogue(*arguments)
    else:
        out = _product_and_epilogue(*arguments)
    return out if total is None else torch.where(real_rows(x, total), out, 0)


def _product_and_epilogue(x, dense, bias, activation, residual, scale):
    fused = bias is None or dense.dtype in (bias.dtype, torch.float32)
    out = F.linear(x.to(dense.dtype), dense, bias.to(dense.dtype) if fused and bias is not None else None)
    # One operation of torch rounds once by itself; several go through float32.
    steps = (activation != "none") + (activation == "quick_gelu") + (scale is not None) + (residual is not None)
    if steps > 1 or any(vector is not None and vector.dtype == torch.float32 for vector in (bias, scale)):
        out = out.float()
    out = ACTIVATIONS[activation](out if fused else out + bias)
    out = out if scale is None else out * scale
    out = out if residual is None else residual + out
    return out.to(x.dtype)
