# SPDX-License-Identifier: Apache-2.0
"""What `aot` calls launchers with: meta tensors of a batch of images, at the sizes of a model."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BATCH, LONGEST, ROWS, OUT_ROWS = 32, 577, 32 * 577, 32 * 300


class Sizes(NamedTuple):
    channels: int
    alignment_tokens: int
    head_dim: int
    optional: bool  # the optional arguments are given


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def cu_seqlens() -> Tensor:
    return meta(BATCH + 1, dtype=torch.int32)


def summary_index(sizes: Sizes) -> Tensor | None:
    return meta(BATCH, dtype=torch.int32) if sizes.optional else None
