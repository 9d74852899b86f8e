# SPDX-License-Identifier: Apache-2.0
"""The C++ kernels of `madtp/attention.h` as functions of tensors, with the arguments of the reference."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from madtp_kernels import dispatch
from madtp_kernels.native.common import DTYPES, address, call, contiguous, head_contiguous, strided_heads, workspace

if TYPE_CHECKING:
    from madtp_kernels import _C


def _attention_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    window_left: int,
    window_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    summary_index: Tensor | None,
    return_stats: bool,
) -> tuple[_C.cpu.AttentionInputs, tuple[Tensor | None, ...]]:
    """madtp::AttentionInputs, and the tensors it points to, which must outlive it."""
    q, k, v = (head_contiguous(x) for x in (q, k, v))
    cu_seqlens_q, cu_seqlens_k = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    summary_index, alibi_slopes = contiguous(summary_index), contiguous(alibi_slopes)
    inputs = dispatch.extension().cpu.AttentionInputs(
        DTYPES[q.dtype],
        strided_heads(q),
        strided_heads(k),
        strided_heads(v),
        address(cu_seqlens_q),
        address(cu_seqlens_k),
        q.shape[0],
        k.shape[0],
        cu_seqlens_q.numel() - 1,
        q.shape[1],
        q.shape[2],
        softmax_scale,
        causal,
        address(summary_index),
        k.shape[1],
        window_left,
        window_right,
        softcap,
        address(alibi_slopes),
        q.shape[1] if alibi_slopes is not None and alibi_slopes.ndim == 2 else 0,
    )
    return inputs, (q, k, v, cu_seqlens_q, cu_seqlens_k, summary_index, alibi_slopes)


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Arguments and results of `reference.attention.varlen_attention`."""
    return_stats = options[-1]
    inputs, _alive = _attention_inputs(q, k, v, cu_seqlens_q, cu_seqlens_k, *options)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    summary_attention = q.new_empty(q.shape[0] if return_stats else 0, dtype=torch.float32)
    received_attention = torch.empty_like(summary_attention)
    memory = workspace("varlen_attention", inputs, return_stats)
    results = (out, lse, summary_attention, received_attention)
    call("varlen_attention", q.device, inputs, *(address(t) for t in (*results, memory)))
    return out, summary_attention, received_attention, lse


def varlen_attention_backward(
    grad_out: Tensor,
    grad_summary_attention: Tensor,
    grad_received_attention: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results of `reference.attention.varlen_attention_backward`."""
    return_stats = options[-1]
    inputs, _alive = _attention_inputs(q, k, v, cu_seqlens_q, cu_seqlens_k, *options)
    given = [t.contiguous() for t in (out, lse, grad_out, grad_summary_attention, grad_received_attention)]
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    memory = workspace("varlen_attention_backward", inputs, return_stats)
    call("varlen_attention_backward", q.device, inputs, *(address(t) for t in (*given, dq, dk, dv, memory)))
    return dq, dk, dv
