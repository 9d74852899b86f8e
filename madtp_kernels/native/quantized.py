# SPDX-License-Identifier: Apache-2.0
"""The C++ kernels of `madtp/quantized.h` as functions of tensors, with the arguments of the reference."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from madtp_kernels import dispatch
from madtp_kernels.native.common import DTYPES, address, aligned, aligned_rows, call, map_given, row_contiguous
from madtp_kernels.native.sparse24 import ACTIVATIONS, Sparse24Config, epilogue_inputs

if TYPE_CHECKING:
    from madtp_kernels import _C

TYPES = {torch.int8: 0, torch.float8_e4m3fn: 1}  # madtp::cuda::QuantizedType


# From so many rows of x on the layout for many rows is the faster one. A class of rows begins here (`measured`).
MANY_ROWS = 182


def takes_many_rows(rows: int) -> bool:
    """Whether a 2:4 weight should have its layout for many rows, where this process knows two."""
    return rows >= MANY_ROWS and _has_two_layouts()


@functools.cache
def _has_two_layouts() -> bool:
    return quantized_layout_bytes(32, 64, True) != quantized_layout_bytes(32, 64, True, True)


def quantized_layout_bytes(out_features: int, in_features: int, sparse: bool, many_rows: bool = False) -> int:
    """Size of a layout of a weight, which the instruction set of this process shapes; sparse: 2:4."""
    return dispatch.extension().cpu.quantized_layout_bytes(out_features, in_features, sparse, many_rows)


def quantized_pack(values: Tensor, indices: Tensor | None, many_rows: bool = False) -> Tensor:
    sparse = indices is not None
    values = values.contiguous()
    indices = None if indices is None else indices.contiguous()
    out_features, in_features = values.shape[0], values.shape[1] * (2 if sparse else 1)
    size = quantized_layout_bytes(out_features, in_features, sparse, many_rows)
    layout = values.new_empty(size, dtype=torch.uint8)
    at = values.data_ptr(), address(indices), out_features, in_features, many_rows, layout.data_ptr()
    dispatch.extension().cpu.quantized_pack(*at, torch.get_num_threads())
    return layout


def quantized_linear(
    x: Tensor,
    values: Tensor,
    indices: Tensor | None,
    weight_scale: Tensor,
    layout: Tensor | None,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    scale: Tensor | None,
    num_rows: Tensor | None,
) -> Tensor:
    # As in native/sparse24.py, line by line: a function that both call takes a twentieth of the time of a small layer.
    layout = quantized_pack(values, indices) if layout is None else layout
    weight_scale = weight_scale.contiguous()
    x_stride, unit = x.stride()
    if unit != 1:
        x = x.contiguous()
        x_stride = x.stride(0)
    (tokens, in_features), out_features = x.shape, values.shape[0]
    sparse = indices is not None
    many_rows = sparse and layout.numel() != quantized_layout_bytes(out_features, in_features, True)
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
    dispatch.extension().cpu.quantized_linear(
        x.data_ptr(),
        DTYPES[x.dtype],
        x_stride,
        tokens,
        layout.data_ptr(),
        sparse,
        weight_scale.data_ptr(),
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
        many_rows,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def quantized_layout_bytes_cuda(out_features: int, in_features: int) -> int:
    """Size of the layout of a 2:4 weight on a GPU, of int8 or fp8."""
    return dispatch.extension().cuda.quantized_layout_bytes(out_features, in_features)


def quantized_pack_cuda(values: Tensor, indices: Tensor) -> Tensor:
    """The layout (bytes,) uint8 of values (N, C/2) int8 or float8_e4m3fn and indices (N, C/8), which ascend."""
    values, indices = aligned(values), aligned(indices)
    out_features, in_features = values.shape[0], 2 * values.shape[1]
    layout = indices.new_empty(quantized_layout_bytes_cuda(out_features, in_features))
    at = address(values), address(indices), out_features, in_features, address(layout)
    call("quantized_pack", values.device, *at)
    return layout


def quantize_rows_cuda(x: Tensor, dtype: torch.dtype, num_rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x (T, C), C a multiple of 16 -> values of dtype int8 or float8_e4m3fn (T, C), scales (T,) float32.

    The bits of `reference.quantized.quantize_rows`; rows from num_rows on are left as they are.
    """
    x = aligned_rows(x)
    (tokens, in_features) = x.shape
    values = torch.empty(tokens, in_features, dtype=dtype, device=x.device)
    scale = torch.empty(tokens, dtype=torch.float32, device=x.device)
    rows = address(values), TYPES[dtype], in_features, address(scale)
    source = address(x), DTYPES[x.dtype], x.stride(0), tokens, in_features, address(num_rows)
    call("quantize_rows", x.device, *source, *rows)
    return values, scale


def quantized_linear_cuda(
    x: Tensor,
    values: Tensor,
    indices: Tensor | None,
    weight_scale: Tensor,
    layout: Tensor | None,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    scale: Tensor | None,
    num_rows: Tensor | None,
    config: Sparse24Config | None = None,
) -> Tensor:
    """`quantized_linear` of a 2:4 weight on Sparse Tensor Cores: a kernel that quantises x, then the product.

    config: one of `quantized_linear_configs`, None for the one that a model of the device expects to be fastest;
        RuntimeError for one that cannot run here.
    """
    inputs, _alive = _cuda_inputs(x, values, indices, weight_scale, layout, bias, activation, residual, scale, num_rows)
    out = x.new_empty(x.shape[0], values.shape[0])
    with torch.cuda.device(x.device):
        stream = torch.cuda.current_stream().cuda_stream
        dispatch.extension().cuda.quantized_linear(inputs, address(out), stream, config)
    return out


def quantized_linear_configs(x: Tensor, *arguments: Any) -> list[Sparse24Config]:
    """Every configuration that can run `quantized_linear_cuda` of these arguments on the device of x."""
    inputs, _alive = _cuda_inputs(x, *arguments)
    with torch.cuda.device(x.device):
        return [Sparse24Config(*config) for config in dispatch.extension().cuda.quantized_linear_configs(inputs)]


def _cuda_inputs(
    x: Tensor,
    values: Tensor,
    indices: Tensor | None,
    weight_scale: Tensor,
    layout: Tensor | None,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    scale: Tensor | None,
    num_rows: Tensor | None,
) -> tuple[_C.cuda.QuantizedRowsLinear, tuple[Tensor | None, ...]]:
    """A layer of the rows of x, which are quantised here, and the tensors it points to, which must outlive it."""
    if layout is None:
        assert indices is not None, "the CUDA kernels have 2:4 weights alone"
        layout = quantized_pack_cuda(values, indices)
    rows, x_scale = quantize_rows_cuda(x, values.dtype, num_rows)
    weight_scale, residual = aligned(weight_scale), map_given(aligned_rows, residual)
    bias, scale = map_given(aligned, bias), map_given(aligned, scale)
    inputs = dispatch.extension().cuda.QuantizedRowsLinear(
        address(rows),
        TYPES[values.dtype],
        rows.shape[1],
        address(x_scale),
        DTYPES[x.dtype],
        x.shape[0],
        address(layout),
        address(weight_scale),
        values.shape[0],
        x.shape[1],
        *epilogue_inputs(bias, activation, scale, residual, num_rows),
    )
    return inputs, (rows, x_scale, layout, weight_scale, bias, residual, scale, num_rows)
