# SPDX-License-Identifier: Apache-2.0
"""The rule that sums of fp8 products keep on a GPU, and an accumulator in plain PyTorch that is as coarse as theirs."""

import torch
from torch.nn import functional as F

from madtp_kernels.reference.quantized import (
    FP8,
    SUM_FRACTION_BITS,
    SUM_PRODUCTS,
    dequantize,
    quantize_rows,
    sum_error,
)


def bits(values):
    """Of fp8, which torch does not compare."""
    return values.view(torch.uint8)


def rounded_rows(x):
    values, scale = quantize_rows(x, FP8)
    return values.double() * scale.double()[:, None]


def exact_product(x, weight):
    """(T, N) float64: of the rounded x, before the bias."""
    return F.linear(rounded_rows(x), dequantize(weight.values, weight.indices, weight.scale).double())


def assert_within_rule(got, x, weight, run=None):
    """got: x W^T as a backend has it, float32, of random signs. run: as in `sum_error`."""
    exact = exact_product(x, weight)
    error = got.double() - exact
    assert (error.abs() <= sum_error(x, weight.values, weight.indices, weight.scale, run)).all()
    products = weight.values.shape[1]
    assert error.norm() <= (2.0**-SUM_FRACTION_BITS * products**0.5 + 1e-6) * exact.norm()


def coarse_sums(x, values):
    """x (T, C), values (N, C) fp8 -> (T, N) float32: 32 products at once are aligned with the sum so far to the largest
    of them, and cut behind 13 bits."""
    products = x.double()[:, None] * values.double()
    total = products.new_zeros(products.shape[:2])
    for part in products.split(SUM_PRODUCTS, 2):
        summands = torch.cat([total[..., None], part], 2)
        largest = summands.abs().amax(2, keepdim=True)
        unit = torch.exp2(torch.frexp(largest)[1].double() - 1 - SUM_FRACTION_BITS)
        total = _cut((_cut(summands, unit)).sum(2))
    return total.float()


def _cut(values, unit=None):
    if unit is None:
        unit = torch.exp2(torch.frexp(values)[1].double() - 1 - SUM_FRACTION_BITS)
    return (values / unit).trunc() * unit
