# SPDX-License-Identifier: Apache-2.0
"""How a tensor becomes an address, sizes and strides, as the torch-free binding takes it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from madtp_kernels import dispatch

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # madtp::DType


def call(op: str, device: torch.device, *args: Any) -> None:
    """Runs one entry point on the caller's threads or on the current stream of the tensors' device."""
    if device.type == "cpu":
        getattr(dispatch.extension().cpu, op)(*args, torch.get_num_threads())
        return
    with torch.cuda.device(device):
        getattr(dispatch.extension().cuda, op)(*args, torch.cuda.current_stream(device).cuda_stream)


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def row_contiguous(x: Tensor) -> Tensor:
    """x, or a copy of it when its rows are not contiguous. Any row stride will do."""
    return x if x.shape[1] <= 1 or x.stride(1) == 1 else x.contiguous()


def head_contiguous(x: Tensor) -> Tensor:
    """x (T, H, D), or a copy of it when the elements of a head are not contiguous. Any other strides will do."""
    return x if x.shape[2] <= 1 or x.stride(2) == 1 else x.contiguous()


def strided_heads(x: Tensor) -> tuple[int, int, int]:
    """Of x (T, H, D) the address, the row stride and the head stride."""
    return x.data_ptr(), x.stride(0), x.stride(1)


def workspace(op: str, inputs: object, *options: bool) -> Tensor:
    """The scratch memory of one call on the CPU, from torch's allocator, so that its profiler sees it."""
    size = getattr(dispatch.extension().cpu, f"{op}_workspace")(inputs, *options, torch.get_num_threads())
    return torch.empty(max(size, 1), dtype=torch.uint8)


def aligned(x: Tensor) -> Tensor:
    """x, or a copy of it that is contiguous from a 16-byte boundary on, as CUDA kernels read."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def aligned_rows(x: Tensor) -> Tensor:
    """x (T, C), or a copy of it whose rows are contiguous and start on 16-byte boundaries."""
    if x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def map_given(function: Callable[[Tensor], Tensor], tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else function(tensor)


def matrix(x: Tensor) -> tuple[int, int, int]:
    return x.data_ptr(), DTYPES[x.dtype], x.stride(0)


def contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()
