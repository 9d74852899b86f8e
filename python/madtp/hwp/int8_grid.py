# SPDX-License-Identifier: Apache-2.0
"""The int8 grid of a weight: integers from -127 to 127 times a scale for every row, as `madtp_kernels.quantize` has it.

A Linear whose weight lies on a grid other than that of its largest magnitudes keeps the scales beside it, in the buffer
`weight_scale`: what rounds the weight by them finds the same integers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from madtp_kernels.checks import require
from madtp_kernels.reference.quantized import nearest, row_scale

SCALE = "weight_scale"  # float32 (N,), on a Linear; no part of its state dict


class GridWeight(NamedTuple):
    """integers: (N, C) int8. scale: (N,) float32, positive."""

    integers: Tensor
    scale: Tensor

    def to_dense(self, dtype: torch.dtype) -> Tensor:
        """(N, C): integers * scale, which `nearest` makes the same integers of.

        Raises:
            ValueError: the dtype cannot hold them, as float16 cannot where a scale is small.
        """
        wide = torch.promote_types(dtype, torch.float32)
        dense = (self.integers.to(wide) * self.scale.to(wide)[:, None]).to(dtype)
        found = nearest(dense, self.scale[:, None])
        name = str(dtype).removeprefix("torch.")
        require(torch.equal(found, self.integers.to(found.dtype)), "dtype", "one that holds integers * scale", name)
        return dense


def rounded(weight: Tensor) -> Tensor:
    """The weight (N, C) on the grid of its rows' largest magnitudes, in its dtype."""
    scale = row_scale(weight)[:, None]
    integers = nearest(weight, scale)
    return (integers * scale.to(integers.dtype)).to(weight.dtype)


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
