# SPDX-License-Identifier: Apache-2.0
"""Dense int8 in plain torch: rows of x are rounded at each call, `torch._int_mm` multiplies, scales bring it back."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

MAX_INT8 = 127
SMALLEST = torch.finfo(torch.float32).tiny


def linear(
    weight: Tensor,  # (N, C)
    bias: Tensor,  # (N,)
) -> Callable[[Tensor], Tensor]:
    """x (T, C) float32 -> (T, N) float32."""
    integers, weight_scale = _rounded(weight.float())
    transposed, weight_scale, bias = integers.t(), weight_scale.t(), bias.float()

    def run(x: Tensor) -> Tensor:
        rows, scale = _rounded(x)
        return torch._int_mm(rows, transposed).float().mul_(scale).mul_(weight_scale).add_(bias)

    return run


def _rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 of the same shape, and the scale of each row (R, 1)."""
    scale = x.abs().amax(1, keepdim=True).clamp_min_(SMALLEST) / MAX_INT8
    return (x / scale).round_().to(torch.int8), scale
