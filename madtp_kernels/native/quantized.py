# SPDX-License-Identifier: Apache-2.0
"""The C++ kernels of `madtp/quantized.h` as functions of tensors, with the arguments of the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from madtp_kernels import dispatch
from madtp_kernels.native.common import DTYPES, address, row_contiguous
from madtp_kernels.native.sparse24 import ACTIVATIONS


def quantized_layout_bytes(out_features: int, in_features: int, sparse: bool) -> int:
    """Size of the layout of a weight, which the instruction set of this process shapes; sparse: 2:4."""
    return dispatch.extension().cpu.quantized_layout_bytes(out_features, in_features, sparse)


def quantized_pack(values: Tensor, indices: Tensor | None) -> Tensor:
    sparse = indices is not None
    values = values.contiguous()
    indices = None if indices is None else indices.contiguous()
    out_features, in_features = values.shape[0], values.shape[1] * (2 if sparse else 1)
    layout = values.new_empty(quantized_layout_bytes(out_features, in_features, sparse), dtype=torch.uint8)
    dispatch.extension().cpu.quantized_pack(
        values.data_ptr(), address(indices), out_features, in_features, layout.data_ptr(), torch.get_num_threads()
    )
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
        indices is not None,
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
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out
