# SPDX-License-Identifier: Apache-2.0
"""Linear layers with an int8 weight, dense or 2:4, in plain PyTorch.

Every row of x gets a scale of its own, every row of the weight has one. The sums are integers and exact; what follows
them is one rounding after another, in the same order on every backend. So every CPU, instruction set and thread count
gives the same bits, but for the activations that are approximated.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from madtp_kernels.reference.sparse24 import (
    ACTIVATIONS,
    epilogue_backward,
    needs_product,
    sparse24_to_dense,
    valid_rows,
)

MAX_INT8 = 127  # symmetric: -128 is not used
MAX_IN_FEATURES = 2**16  # so that every sum is an int32: 255 * 127 * C
# Below this the scale of a row, amax / 127, would not be a normal float32: such a row counts as zeros.
MIN_AMAX = 2.0**-119


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (T, C) -> int8 (T, C) and the scales (T,) float32, so that x is about int8 * scale.

    With amax the largest magnitude of the row, int8 is x * (127 / amax), rounded half to even, the scale amax / 127.
    A row whose amax is below `MIN_AMAX` is one of zeros, of scale 0. A row with a NaN or an infinity has zeros and the
    scale NaN, so that all that comes from it is NaN.
    """
    wide = x.float()
    amax = wide.abs().amax(1) if x.shape[1] else wide.new_zeros(x.shape[0])
    finite = amax.isfinite()
    usable = finite & (amax >= MIN_AMAX)
    inverse = torch.full_like(amax, MAX_INT8) / amax  # 127 / amax would be 127 * (1 / amax) in torch: two roundings
    integers = (wide * inverse[:, None]).round().clamp(-MAX_INT8, MAX_INT8)
    scale = torch.where(usable, amax / MAX_INT8, torch.where(finite, 0.0, torch.nan))
    return torch.where(usable[:, None], integers, 0).to(torch.int8), scale


def row_scale(weight: Tensor) -> Tensor:
    """weight (N, C) -> (N,) float32: the largest magnitude of each row / 127; 1 where that is below `MIN_AMAX`."""
    magnitudes = weight.detach().abs()
    amax = magnitudes.amax(1).float() if weight.shape[1] else magnitudes.new_zeros(weight.shape[0]).float()
    return torch.where(amax >= MIN_AMAX, amax / MAX_INT8, 1.0)


def nearest(weight: Tensor, scale: Tensor) -> Tensor:
    """The integers of weight / scale, half to even, in float32 or what is wider; a NaN stays one."""
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    return (wide / scale.to(wide.dtype)).round().clamp(-MAX_INT8, MAX_INT8) + 0.0  # -0.0 + 0.0 is 0.0


def to_dense_int8(values: Tensor, indices: Tensor | None) -> Tensor:
    """values (N, C), or (N, C/2) and indices (N, C/8) -> int8 (N, C)."""
    return values if indices is None else sparse24_to_dense(values, indices)


def dequantize(values: Tensor, indices: Tensor | None, weight_scale: Tensor) -> Tensor:
    """The weight (N, C) float32 that the integers stand for."""
    return to_dense_int8(values, indices).float() * weight_scale[:, None]


def _product(
    x: Tensor, values: Tensor, indices: Tensor | None, weight_scale: Tensor, bias: Tensor | None
) -> Tensor:  # (T, N) float32
    integers, x_scale = quantize_rows(x)
    # Sums of integers below 2^53: exact in float64, whatever their order.
    sums = F.linear(integers.double(), to_dense_int8(values, indices).double()).float()
    product = sums * x_scale[:, None] * weight_scale
    return product if bias is None else product + bias.float()


def quantized_linear(
    x: Tensor,  # (T, C)
    values: Tensor,  # int8 (N, C), or (N, C/2) with indices
    indices: Tensor | None,  # (N, C/8)
    weight_scale: Tensor,  # (N,) float32
    layout: Tensor | None,  # for other backends
    bias: Tensor | None,  # (N,)
    activation: str,
    residual: Tensor | None,  # (T, N)
    scale: Tensor | None,  # (N,)
    num_rows: Tensor | None,  # one int32
) -> Tensor:  # (T, N)
    """residual + scale * activation(x W^T + bias), zeros from row `num_rows` on."""
    out = ACTIVATIONS[activation](_product(x, values, indices, weight_scale, bias))
    if scale is not None:
        out = out * scale.float()
    if residual is not None:
        out = residual.float() + out
    return torch.where(valid_rows(x, num_rows), out.to(x.dtype), 0)


def quantized_linear_backward(
    grad: Tensor,  # (T, N)
    x: Tensor,
    values: Tensor,
    indices: Tensor | None,
    weight_scale: Tensor,
    layout: Tensor | None,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    scale: Tensor | None,
    num_rows: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients to x, bias, residual and scale; empty for what is None.

    The rounding of x has no useful derivative and counts as the identity (the straight-through estimator,
    https://arxiv.org/abs/1308.3432); what the activation was given is what the forward gave it.
    """
    valid, dense, before = valid_rows(x, num_rows), dequantize(values, indices, weight_scale), None
    if needs_product(activation, scale):
        rows = torch.where(valid, x, 0)  # rows past num_rows may hold anything, and take no part
        smooth = F.linear(rows.float(), dense, None if bias is None else bias.float())
        with torch.no_grad():
            rounding = _product(rows, values, indices, weight_scale, bias) - smooth
        before = smooth + rounding
    grad = torch.where(valid, grad, 0)
    grad_before, grad_bias, grad_residual, grad_scale = epilogue_backward(
        grad, before, bias, activation, residual, scale
    )
    return (grad_before @ dense).to(x.dtype), grad_bias, grad_residual, grad_scale
