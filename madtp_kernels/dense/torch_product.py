# SPDX-License-Identifier: Apache-2.0
"""Torch's dense product, then the epilogue of a linear layer in torch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from madtp_kernels.reference.sparse24 import ACTIVATIONS


def linear(
    x: Tensor,  # (T, C)
    weight: Tensor,  # (N, C)
    bias: Tensor | None,  # (N,)
    activation: str,
    residual: Tensor | None,  # (T, N)
    scale: Tensor | None,  # (N,)
) -> Tensor:  # (T, N) dtype of x
    """As the reference, but in bfloat16 and float16 torch rounds the product before the epilogue."""
    dtype, autocast = weight.dtype, torch.is_autocast_enabled(x.device.type)  # which would round a float32 product
    alone = activation == "none" and residual is None and scale is None
    if alone and not autocast and x.dtype is dtype and (bias is None or bias.dtype is dtype):
        return F.linear(x, weight, bias)
    rows = cast(x, dtype)

    def product(bias: Tensor | None) -> Tensor:
        return F.linear(rows, weight, bias)

    with torch.autocast(x.device.type, enabled=False) if autocast else contextlib.nullcontext():
        return with_epilogue(product, x, dtype, bias, activation, residual, scale)


def with_epilogue(
    product: Callable[[Tensor | None], Tensor],
    x: Tensor,
    dtype: torch.dtype,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    scale: Tensor | None,
) -> Tensor:
    """The epilogue of the linear layer after product(bias) (T, N), a product in `dtype` that can add a bias in it."""
    if bias is not None and bias.dtype is not dtype and dtype is not torch.float32:
        out = product(None).float() + bias
    else:
        out = product(None if bias is None else cast(bias, dtype))
    if activation != "none" or scale is not None or residual is not None:
        # One operation of torch rounds once by itself; several go through float32.
        steps = (activation != "none") + (activation == "quick_gelu") + (scale is not None) + (residual is not None)
        if steps > 1 or any(vector is not None and vector.dtype is torch.float32 for vector in (bias, scale)):
            out = cast(out, torch.float32)
        out = ACTIVATIONS[activation](out)
        out = out if scale is None else out * scale
        out = out if residual is None else residual + out
    return cast(out, x.dtype)


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype is dtype else tensor.to(dtype)  # .to() that changes nothing takes as long as a check
