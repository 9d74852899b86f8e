# SPDX-License-Identifier: Apache-2.0
"""Linear layers with a dense weight, in plain PyTorch."""

import torch
from torch import Tensor
from torch.nn import functional as F

from madtp_kernels.reference.sparse24 import ACTIVATIONS


def dense_linear(
    x: Tensor,  # (T, C)
    weight: Tensor,  # (N, C)
    bias: Tensor | None,  # (N,)
    activation: str,
    residual: Tensor | None,  # (T, N)
    scale: Tensor | None,  # (N,)
) -> Tensor:  # (T, N)
    """residual + scale * activation(x W^T + bias), rounded once."""
    wide = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        out = ACTIVATIONS[activation](F.linear(x.to(wide), weight.to(wide), None if bias is None else bias.to(wide)))
    if scale is not None:
        out = out * scale.to(wide)
    if residual is not None:
        out = residual.to(wide) + out
    return out.to(x.dtype)
