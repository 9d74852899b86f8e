# SPDX-License-Identifier: Apache-2.0
"""The grid of a weight, int8 or fp8: its numbers times a scale for every row, as `madtp_kernels.quantize` has it.

A Linear whose weight lies on a grid other than that of its largest magnitudes keeps the scales beside it, in the buffer
`weight_scale`: what rounds the weight by them finds the same numbers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from madtp_kernels.checks import require
from madtp_kernels.reference.quantized import INT8, Grid, grid_of, nearest, row_scale

SCALE = "weight_scale"  # float32 (N,), on a Linear; no part of its state dict


class GridWeight(NamedTuple):
    """values: (N, C) int8 or float8_e4m3fn. scale: (N,) float32, positive."""

    values: Tensor
    scale: Tensor

    def to_dense(self, dtype: torch.dtype) -> Tensor:
        """(N, C): values * scale, which `nearest` makes the same values of.

        Raises:
            ValueError: the dtype cannot hold them, as float16 cannot where a scale is small.
        """
        wide = torch.promote_types(dtype, torch.float32)
        dense = (self.values.to(wide) * self.scale.to(wide)[:, None]).to(dtype)
        found = nearest(dense, self.scale[:, None], grid_of(self.values))
        name = str(dtype).removeprefix("torch.")
        require(torch.equal(found, self.values.to(found.dtype)), "dtype", "one that holds values * scale", name)
        return dense


def rounded(weight: Tensor, grid: Grid = INT8) -> Tensor:
    """The weight (N, C) on the grid of its rows' largest magnitudes, in its dtype."""
    scale = row_scale(weight, grid)[:, None]
    values = nearest(weight, scale, grid)
    return (values * scale.to(values.dtype)).to(weight.dtype)


def set_scale(module: nn.Linear, scale: Tensor | None) -> None:
    """Leaves the scale on the module, or takes away that of a weight it had before."""
    if scale is not None:
        module.register_buffer(SCALE, scale, persistent=False)
    elif SCALE in module._buffers:
        delattr(module, SCALE)


def grid_unsupported_reason(module: nn.Linear) -> str | None:
    """Why the weight of a module cannot be rounded, or the scale not be kept beside it."""
    if hasattr(module, SCALE) and SCALE not in module._buffers:
        return f"{SCALE} is an attribute of it already"
    return None if module.weight.isfinite().all() else "weight has a NaN or an infinity"
