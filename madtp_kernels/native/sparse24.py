# SPDX-License-Identifier: Apache-2.0
"""The C++ kernels of `madtp/sparse24.h` as functions of tensors, with the arguments of the reference."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from madtp_kernels import dispatch
from madtp_kernels.checks import check_not_recorded
from madtp_kernels.native.common import DTYPES, address, aligned, aligned_rows, call, map_given, matrix, row_contiguous

if TYPE_CHECKING:
    from madtp_kernels import _C

ACTIVATIONS = {"none": 0, "gelu": 1, "gelu_tanh": 2, "quick_gelu": 3, "relu": 4}  # madtp::Activation


def sparse24_layout_bytes(out_features: int, in_features: int, dtype: torch.dtype, device: torch.device) -> int:
    """Size of the layout of a weight; on a CPU it depends on the instruction set of this process."""
    return getattr(dispatch.extension(), device.type).sparse24_layout_bytes(out_features, in_features, DTYPES[dtype])


def sparse24_pack(values: Tensor, indices: Tensor) -> Tensor:
    prepare = Tensor.contiguous if values.device.type == "cpu" else aligned
    values, indices = prepare(values), prepare(indices)
    out_features, in_features = values.shape[0], 2 * values.shape[1]
    size = sparse24_layout_bytes(out_features, in_features, values.dtype, values.device)
    layout = values.new_empty(size, dtype=torch.uint8)
    call(
        "sparse24_pack",
        values.device,
        address(values),
        DTYPES[values.dtype],
        address(indices),
        out_features,
        in_features,
        address(layout),
    )
    return layout


def sparse24_prune(weight: Tensor, score: Tensor | None) -> tuple[Tensor, Tensor]:
    """Arguments and results of the reference; RuntimeError for a NaN, which a GPU is asked for once."""
    check_not_recorded(weight.device, "pruning asks the GPU for a NaN", "prune before the capture")
    score = None if score is None else score.float()
    out_features, in_features = weight.shape
    values = weight.new_empty(out_features, in_features // 2)
    indices = weight.new_empty(out_features, in_features // 8, dtype=torch.uint8)
    sizes, outputs = weight.shape, (address(values), address(indices))
    if weight.device.type == "cpu":
        weight, score = row_contiguous(weight), map_given(row_contiguous, score)
        call("sparse24_prune", weight.device, *matrix(weight), *_optional_matrix(score), *sizes, *outputs)
        return values, indices
    transposed = weight.stride(0) == 1 and weight.stride(1) != 1
    if transposed:  # as it lies: the kernel turns it over
        weight, score = weight.t(), map_given(Tensor.t, score)
    weight, score = aligned_rows(weight), map_given(aligned_rows, score)
    has_nan = torch.empty(1, dtype=torch.int32, device=weight.device)
    call(
        "sparse24_prune",
        weight.device,
        *matrix(weight),
        *_optional_matrix(score),
        *sizes,
        transposed,
        *outputs,
        address(has_nan),
    )
    if has_nan.item():
        raise RuntimeError("madtp::cuda::sparse24_prune: there is a NaN")
    return values, indices


def sparse24_linear(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    layout: Tensor | None,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    scale: Tensor | None,
    num_rows: Tensor | None,
) -> Tensor:
    # Every microsecond counts here: a layer may take as few.
    layout = sparse24_pack(values, indices) if layout is None else layout
    x_stride, unit = x.stride()
    if unit != 1:
        x = x.contiguous()
        x_stride = x.stride(0)
    (tokens, in_features), out_features = x.shape, values.shape[0]
    bias_at = scale_at = residual_at = residual_stride = bias_dtype = scale_dtype = 0
    if bias is not None:
        bias = bias.contiguous()
        bias_at, bias_dtype = bias.data_ptr(), DTYPES[bias.dtype]
    if scale is not None:
        scale = scale.contiguous()
        scale_at, scale_dtype = scale.data_ptr(), DTYPES[scale.dtype]
    if residual is not None:
        residual = row_contiguous(residual)
        residual_at, residual_stride = residual.data_ptr(), residual.stride(0)
    out = x.new_empty(tokens, out_features)
    dispatch.extension().cpu.sparse24_linear(
        x.data_ptr(),
        DTYPES[x.dtype],
        x_stride,
        tokens,
        layout.data_ptr(),
        DTYPES[values.dtype],
        out_features,
        in_features,
        bias_at,
        bias_dtype,
        ACTIVATIONS[activation],
        scale_at,
        scale_dtype,
        residual_at,
        residual_stride,
        0 if num_rows is None else num_rows.data_ptr(),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


class Sparse24Config(NamedTuple):
    """madtp::cuda::Sparse24Config: how a linear layer is laid out on a GPU."""

    architecture: int  # of the kernel: 80 (mma.sp) or 90 (wgmma.sp)
    tile_tokens: int  # of a block
    tile_out_features: int  # of a block
    cluster: int = 1  # blocks that share the tokens of a tile


def sparse24_linear_cuda(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    layout: Tensor | None,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    scale: Tensor | None,
    num_rows: Tensor | None,
    config: Sparse24Config | None = None,
) -> Tensor:
    """`sparse24_linear` on Sparse Tensor Cores, of x and values in bfloat16 or float16.

    config: one of `sparse24_linear_configs`, None for the one that a model of the device expects to be fastest;
        RuntimeError for one that cannot run here.
    """
    inputs, _alive = _sparse24_inputs(x, values, indices, layout, bias, activation, residual, scale, num_rows)
    out = x.new_empty(x.shape[0], values.shape[0])
    cuda = dispatch.extension().cuda
    with torch.cuda.device(x.device):
        cuda.sparse24_linear(inputs, address(out), torch.cuda.current_stream().cuda_stream, config)
    return out


def sparse24_linear_configs(x: Tensor, *arguments: Any) -> list[Sparse24Config]:
    """Every configuration that can run `sparse24_linear_cuda` of these arguments on the device of x."""
    inputs, _alive = _sparse24_inputs(x, *arguments)
    with torch.cuda.device(x.device):
        return [Sparse24Config(*config) for config in dispatch.extension().cuda.sparse24_linear_configs(inputs)]


def _sparse24_inputs(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    layout: Tensor | None,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    scale: Tensor | None,
    num_rows: Tensor | None,
) -> tuple[_C.cuda.Sparse24Linear, tuple[Tensor | None, ...]]:
    """madtp::Sparse24Linear, and the tensors it points to, which must outlive it."""
    layout = sparse24_pack(values, indices) if layout is None else layout
    x, residual = aligned_rows(x), map_given(aligned_rows, residual)
    bias, scale = map_given(aligned, bias), map_given(aligned, scale)
    inputs = dispatch.extension().cuda.Sparse24Linear(
        address(x),
        DTYPES[x.dtype],
        x.stride(0),
        x.shape[0],
        address(layout),
        DTYPES[values.dtype],
        values.shape[0],
        x.shape[1],
        *epilogue_inputs(bias, activation, scale, residual, num_rows),
    )
    return inputs, (x, layout, bias, residual, scale, num_rows)


def epilogue_inputs(
    bias: Tensor | None, activation: str, scale: Tensor | None, residual: Tensor | None, num_rows: Tensor | None
) -> tuple[int, int, int, int, int, int, int, int]:
    """What follows the product of a linear layer on a GPU, as the last arguments of its record in C++."""
    return (
        address(bias),
        0 if bias is None else DTYPES[bias.dtype],
        ACTIVATIONS[activation],
        address(scale),
        0 if scale is None else DTYPES[scale.dtype],
        address(residual),
        0 if residual is None else residual.stride(0),
        address(num_rows),
    )


def _optional_matrix(x: Tensor | None) -> tuple[int, int]:
    """Address and row stride."""
    return (0, 0) if x is None else (x.data_ptr(), x.stride(0))
