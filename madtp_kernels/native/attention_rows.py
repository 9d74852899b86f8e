# SPDX-License-Identifier: Apache-2.0
"""The C++ kernel of `madtp/attention_rows.h` as a function of tensors, with the arguments of the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from madtp_kernels import dispatch
from madtp_kernels.native.common import DTYPES, address, call, contiguous, head_contiguous, strided_heads, workspace


def attention_rows(
    q_rows: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    row_position: Tensor | None,
    softmax_scale: float,
) -> Tensor:
    q_rows, k = head_contiguous(q_rows), head_contiguous(k)
    cu_seqlens_q, cu_seqlens_k = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    row_position = contiguous(row_position)
    inputs = dispatch.extension().cpu.AttentionRowsInputs(
        DTYPES[k.dtype],
        strided_heads(q_rows),
        strided_heads(k),
        address(cu_seqlens_q),
        address(cu_seqlens_k),
        q_rows.shape[0],
        k.shape[0],
        cu_seqlens_q.numel() - 1,
        q_rows.shape[1],
        k.shape[1],
        k.shape[2],
        softmax_scale,
        address(row_position),
    )
    attention = k.new_empty(k.shape[0], dtype=torch.float32)
    memory = workspace("attention_rows", inputs)
    call("attention_rows", k.device, inputs, address(attention), address(memory))
    return attention
