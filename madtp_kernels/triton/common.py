# SPDX-License-Identifier: Apache-2.0
"""What the launchers and kernels of every op share."""

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from madtp_kernels import selection

PADDING = tl.constexpr(selection.PADDING)
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}  # of a launch; the default of fusion depends on triton's version


def on_device(device: torch.device) -> contextlib.AbstractContextManager:
    """The context in which to launch: triton launches on the current device, not on that of its arguments."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def rows(x: Tensor) -> Tensor:
    """x (T, C), or a copy of it when its rows are not contiguous. Any row stride will do."""
    return x if x.shape[1] <= 1 or x.stride(1) == 1 else x.contiguous()


def power_of_two(size: int, smallest: int, largest: int) -> int:
    """The block size for `size` elements."""
    return min(max(triton.next_power_of_2(size), smallest), largest)


def empty_float32(like: Tensor, *shape: int) -> Tensor:
    """float32 of this shape where `like` is, to be written."""
    return torch.empty(shape, dtype=torch.float32, device=like.device)


@triton.jit
def sequence_bounds(p_cu_seqlens, i_b, T):
    """First row and end of sequence i_b, int64; inside [0, T] whatever cu_seqlens holds."""
    begin = tl.load(p_cu_seqlens + i_b).to(tl.int64)
    end = tl.load(p_cu_seqlens + i_b + 1).to(tl.int64)
    begin = tl.minimum(tl.maximum(begin, 0), T)
    end = tl.minimum(tl.maximum(end, begin), T)
    return begin, end


@triton.jit
def load_summary_row(p_summary_index, i_b):
    """The summary token's row inside sequence i_b; there is none at a row that the sequence does not have."""
    row = tl.full((), 0, tl.int32)
    if p_summary_index is not None:
        row = tl.load(p_summary_index + i_b)
    return row
