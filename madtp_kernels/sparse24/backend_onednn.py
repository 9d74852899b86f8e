# SPDX-License-Identifier: Apache-2.0
"""Backend `onednn` of 2:4 linear layers: oneDNN's dense product on the decompressed weight, packed once."""

from __future__ import annotations

import torch
from torch import Tensor

from madtp_kernels.checks import require
from madtp_kernels.dense import onednn
from madtp_kernels.reference.sparse24 import sparse24_to_dense, valid_rows


def pack(values: Tensor, indices: Tensor) -> Tensor:
    """values (N, C/2), indices (N, C/8) -> (N, C) as oneDNN reads it."""
    return onednn.pack(sparse24_to_dense(values.detach(), indices))


def check_layout(layout: Tensor | None, values: Tensor, indices: Tensor) -> Tensor | None:
    """`layout`, if it is None or may be what `pack` returned. Raises ValueError for another."""
    if layout is None:
        return None
    shape = values.shape[0], 2 * values.shape[1]
    ok = layout.is_mkldnn and layout.dtype == values.dtype and tuple(layout.shape) == shape
    require(ok, "layout", f"the dense weight, {values.dtype} of shape {shape}, packed by oneDNN", layout)
    return layout


def sparse24_linear(
    x: Tensor,  # (T, C)
    values: Tensor,  # (N, C/2)
    indices: Tensor,  # (N, C/8)
    layout: Tensor | None,  # from pack
    bias: Tensor | None,  # (N,)
    activation: str,
    residual: Tensor | None,  # (T, N)
    scale: Tensor | None,  # (N,)
    num_rows: Tensor | None,  # one int32
) -> Tensor:  # (T, N)
    """As `dense`, but what oneDNN fuses is rounded once."""
    packed = pack(values, indices) if layout is None else layout
    out = onednn.linear(x, packed, bias, activation, residual, scale)
    return out if num_rows is None else torch.where(valid_rows(x, num_rows), out, 0)
