# SPDX-License-Identifier: Apache-2.0
"""Linear layers with a weight of 8 bits, int8 or fp8 (e4m3), dense or 2:4, in plain PyTorch.

Every row of x gets a scale of its own, every row of the weight has one. The sums of products are exact here: integers,
or for fp8 multiples of 2^-18 below 2^34, which are float64 numbers in whatever order they are added. What follows them
is one rounding after another, in the same order on every backend.

A backend of int8 weights sums exactly too, so every CPU, instruction set and thread count gives the same bits, but for
the activations that are approximated. Tensor Cores add products of fp8 with fewer bits than float32 has: on sm_89 and
sm_90 the summands of an instruction, 32 products and what was summed before, are aligned to the largest of them and cut
behind its leading bit and 13 more (`SUM_FRACTION_BITS`; DeepSeek-V3, arXiv 2412.19437, section 3.3.2: "around 14 bits";
the same by measurement in SageAttention2, arXiv 2411.10958, section 3.2). So for fp8 the rule of a backend is of that
accumulator: `sum_error` bounds its sums, and where all summands are multiples of a number, whose magnitudes add up to
at most 2^13 times it, the sum is exact.
"""

from __future__ import annotations

from typing import NamedTuple

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

MAX_IN_FEATURES = 2**16  # so that every sum of integers is an int32, 255 * 127 * C, and one of fp8 a float64
SUM_FRACTION_BITS = 13  # that an fp8 accumulator keeps of the largest summand, behind its leading bit
SUM_PRODUCTS = 32  # products that it adds at once


class Grid(NamedTuple):
    """The numbers that a weight and the rows of x are rounded to, each times a scale."""

    dtype: torch.dtype
    largest: int  # magnitude; symmetric: -128 is not used
    # Below this the scale of a row, amax / largest, would not be a normal float32: such a row counts as zeros.
    min_amax: float


INT8 = Grid(torch.int8, 127, 2.0**-119)
FP8 = Grid(torch.float8_e4m3fn, 448, 2.0**-117)
GRIDS = {"int8": INT8, "fp8": FP8}


def grid_of(values: Tensor) -> Grid:
    """That of a weight's values."""
    return FP8 if values.dtype == FP8.dtype else INT8


def quantize_rows(x: Tensor, grid: Grid = INT8) -> tuple[Tensor, Tensor]:
    """x (T, C) -> values of the grid (T, C) and the scales (T,) float32, so that x is about values * scale.

    With amax the largest magnitude of the row, values are x * (largest / amax), rounded half to even, the scale
    amax / largest. A row whose amax is below `min_amax` is one of zeros, of scale 0. A row with a NaN or an infinity
    has zeros and the scale NaN, so that all that comes from it is NaN.
    """
    wide = x.float()
    amax = wide.abs().amax(1) if x.shape[1] else wide.new_zeros(x.shape[0])
    finite = amax.isfinite()
    usable = finite & (amax >= grid.min_amax)
    # largest / amax would be largest * (1 / amax) in torch: two roundings
    inverse = torch.full_like(amax, grid.largest) / amax
    scaled = torch.where(usable[:, None], wide * inverse[:, None], 0)
    scale = torch.where(usable, amax / grid.largest, torch.where(finite, 0.0, torch.nan))
    return _round(scaled, grid).to(grid.dtype), scale


def row_scale(weight: Tensor, grid: Grid = INT8) -> Tensor:
    """weight (N, C) -> (N,) float32: the largest magnitude of each row / largest; 1 where that is below `min_amax`."""
    magnitudes = weight.detach().abs()
    amax = magnitudes.amax(1).float() if weight.shape[1] else magnitudes.new_zeros(weight.shape[0]).float()
    return torch.where(amax >= grid.min_amax, amax / grid.largest, 1.0)


def nearest(weight: Tensor, scale: Tensor, grid: Grid = INT8) -> Tensor:
    """What weight / scale is on the grid, half to even, in float32 or what is wider; a NaN stays one.

    To fp8 it goes through float32.
    """
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    return _round(wide / scale.to(wide.dtype), grid) + 0.0  # -0.0 + 0.0 is 0.0


def _round(scaled: Tensor, grid: Grid) -> Tensor:
    """The nearest of the grid, in the dtype of `scaled`."""
    if grid is INT8:
        return scaled.round().clamp(-grid.largest, grid.largest)
    # What is above 448 becomes NaN or 448, as the version of torch has it.
    return scaled.float().clamp(-grid.largest, grid.largest).to(grid.dtype).to(scaled.dtype)


def to_dense_values(values: Tensor, indices: Tensor | None) -> Tensor:
    """values (N, C), or (N, C/2) and indices (N, C/8) -> (N, C) of their dtype."""
    if indices is None:
        return values
    # As bytes, since torch scatters no fp8; the byte 0 is the number 0 in both.
    return sparse24_to_dense(values.view(torch.uint8), indices).view(values.dtype)


def dequantize(values: Tensor, indices: Tensor | None, weight_scale: Tensor) -> Tensor:
    """The weight (N, C) float32 that the values stand for."""
    return to_dense_values(values, indices).float() * weight_scale[:, None]


def sum_error(
    x: Tensor, values: Tensor, indices: Tensor | None, weight_scale: Tensor, run: int | None = None
) -> Tensor:
    """How far x W^T of an fp8 weight may be from that of the reference, before the bias: (T, N) float64.

    An instruction cuts each of its summands, and their sum, by less than 2^-13 of the largest magnitude that it met,
    which the magnitudes of all products bound: 34 cuts for every 32 products. To them come the roundings of float32:
    of the sum, of its two scales and of every accumulator that is added.

    Args:
        run: after how many products of a row the accumulator is added to a float32 and starts again. None: never.
    """
    rounded, x_scale = quantize_rows(x, FP8)
    magnitudes = F.linear(rounded.double().abs(), to_dense_values(values, indices).double().abs())
    products = values.shape[1] if run is None else min(run, values.shape[1])
    instructions = -(-products // SUM_PRODUCTS)
    cuts = instructions * (SUM_PRODUCTS + 2) * 2.0**-SUM_FRACTION_BITS
    additions = 0 if run is None else -(-values.shape[1] // run)
    rounding = (additions + 4) * torch.finfo(torch.float32).eps
    return magnitudes * x_scale.double()[:, None] * weight_scale.double() * (cuts + rounding)


def exact_sums(x: Tensor, values: Tensor) -> Tensor:
    """x (T, C) and values (N, C) of one grid -> (T, N) float32, rounded once."""
    return F.linear(x.double(), values.double()).float()


def product(sums: Tensor, x_scale: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """(T, N) float32: the sums with their scales and the bias."""
    scaled = sums * x_scale[:, None] * weight_scale
    return scaled if bias is None else scaled + bias.float()


def _product(
    x: Tensor, values: Tensor, indices: Tensor | None, weight_scale: Tensor, bias: Tensor | None
) -> Tensor:  # (T, N) float32
    rounded, x_scale = quantize_rows(x, grid_of(values))
    return product(exact_sums(rounded, to_dense_values(values, indices)), x_scale, weight_scale, bias)


def finish(
    before: Tensor,  # (T, N) float32: x W^T + bias
    x: Tensor,  # (T, C)
    activation: str,
    residual: Tensor | None,  # (T, N)
    scale: Tensor | None,  # (N,)
    num_rows: Tensor | None,  # one int32
) -> Tensor:  # (T, N) dtype of x
    """residual + scale * activation(before), zeros from row `num_rows` on."""
    out = ACTIVATIONS[activation](before)
    if scale is not None:
        out = out * scale.float()
    if residual is not None:
        out = residual.float() + out
    return torch.where(valid_rows(x, num_rows), out.to(x.dtype), 0)


def quantized_linear(
    x: Tensor,  # (T, C)
    values: Tensor,  # int8 or float8_e4m3fn (N, C), or (N, C/2) with indices
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
    return finish(_product(x, values, indices, weight_scale, bias), x, activation, residual, scale, num_rows)


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
