# SPDX-License-Identifier: Apache-2.0
"""Triton launcher of the backward of `varlen_attention`, through the output and both statistics.

delta_hi = sum_j P dP is known before dP is: grad_out O, plus a little for each statistic. What comes through the norms
of `summary_attention` is folded into grad_out; `argmax` finds where the head maximum sends its gradient, and
`gradients` does the rest. Beside the gradients memory is O(T).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from madtp_kernels.triton.attention.argmax import HeadArgmax
from madtp_kernels.triton.attention.gradients import Inputs, StatisticGradients, launch_gradients
from madtp_kernels.triton.attention.masks import masking, observers, right_of
from madtp_kernels.triton.attention.scores import scoring
from madtp_kernels.triton.attention.statistics import head_sums, launch_from_summary
from madtp_kernels.triton.attention.tiles import (
    dims,
    eights,
    heads,
    load_tile,
    program_of,
    sequence_rows,
    store_tile,
    strides,
    summary_row_or_none,
)
from madtp_kernels.triton.common import OPTIONS, empty_float32, on_device

ELEMENTS = 8192  # of a program of the preparing kernel
SLAB = 1024  # queries of a sequence whose arg-max heads are held at a time
MAX_HEADS = 255
TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


class PreparedStatistics(NamedTuple):
    """What `prepare_kernel` reads and writes of the statistics: tensors for the launcher, pointers in the kernel."""

    grad_summary_attention: Tensor  # (T,) fp32
    grad_received_attention: Tensor  # (T,) fp32
    from_summary: Tensor  # (H, T) fp32: P[h,s,j]
    norms: Tensor  # (H, T) fp32: ||O||
    d_out: Tensor  # (T, H, D), out: grad_out and what comes through the norms
    through: Tensor  # (H, T) fp32, out: gradient of P[h,s,j] through `summary_attention`
    d_maximum: Tensor  # (T,) fp32, out: gradient of max_h P[h,i,j], the same for all counted queries


@triton.jit(do_not_specialize=["T", "H", "max_seqlen", "left", "right"])
def prepare_kernel(
    p_grad_out,  # (T, H, D), row stride grad_row, head stride grad_head
    p_out,  # (T, H, D) contiguous
    p_cu_seqlens,  # (B+1,) int32
    p_summary_index,  # (B,) int32 or None
    statistics,  # PreparedStatistics, or None
    p_delta,  # (H, T) fp32, out: d_out O, or without statistics grad_out O
    grad_row,
    grad_head,
    left,
    right,
    T,
    H,
    max_seqlen,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """One block of rows of one head."""
    i_m, i_h, i_b = program_of(tl.cdiv(max_seqlen, BLOCK), H)
    begin, n = sequence_rows(p_cu_seqlens, i_b, T, max_seqlen)
    if i_m * BLOCK >= n:
        return
    o_m = i_m * BLOCK + tl.arange(0, BLOCK)
    m_m = o_m < n
    o_head = i_h.to(tl.int64) * T + begin + o_m
    b_out = load_tile(p_out + i_h * D, begin + i_m * BLOCK, H * D, m_m, BLOCK, D, BLOCK_D).to(tl.float32)
    b_grad = load_tile(
        p_grad_out + i_h.to(tl.int64) * eights(grad_head, D), begin + i_m * BLOCK, grad_row, m_m, BLOCK, D, BLOCK_D
    )
    b_grad = b_grad.to(tl.float32)
    if statistics is not None:
        p_grad_summary, p_grad_received, p_from_summary, p_norms, p_d_out, p_through, p_d_maximum = statistics
        b_norms, b_weighted = head_sums(p_from_summary, p_norms, begin + o_m, m_m, T, H)
        b_norms = tl.maximum(b_norms, TINY)
        b_norm = tl.load(p_norms + o_head, mask=m_m, other=0.0)
        b_d_summary = tl.load(p_grad_summary + begin + o_m, mask=m_m, other=0.0)
        b_p = tl.load(p_from_summary + o_head, mask=m_m, other=0.0)
        b_d_norm = b_d_summary * (b_p - b_weighted / b_norms) / b_norms
        b_grad += tl.where(b_norm > 0, b_d_norm / b_norm, 0.0)[:, None] * b_out
        b_grad = b_grad.to(p_d_out.dtype.element_ty)
        store_tile(p_d_out + i_h * D, begin + i_m * BLOCK, H * D, m_m, b_grad, BLOCK, D, BLOCK_D)
        b_grad = b_grad.to(tl.float32)
        tl.store(p_through + o_head, b_d_summary * b_norm / b_norms, mask=m_m)
        if i_h == 0:
            summary_row = summary_row_or_none(p_summary_index, i_b, n)
            b_observers = observers(o_m, n, summary_row, left, right_of(right, CAUSAL))
            b_d_received = tl.load(p_grad_received + begin + o_m, mask=m_m, other=0.0)
            tl.store(p_d_maximum + begin + o_m, b_d_received / b_observers, mask=m_m)
    tl.store(p_delta + o_head, tl.sum(b_grad * b_out, 1), mask=m_m)


# --- launcher


def varlen_attention_backward(
    grad_out: Tensor,  # (Tq, H, D)
    grad_summary_attention: Tensor,  # (Tk,) fp32, empty without statistics
    grad_received_attention: Tensor,  # (Tk,) fp32
    out: Tensor,  # (Tq, H, D)
    lse: Tensor,  # (H, Tq) fp32
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
    alibi_slopes: Tensor | None,  # (H,) or (B, H) fp32
    summary_index: Tensor | None,
    return_stats: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # like q, k, v
    """As `reference.attention.varlen_attention_backward`, given `out` and `lse` of the forward.

    ValueError: more than 255 heads with statistics, a head is kept as a byte.
    """
    (rows, head_count, head_dim), batch = q.shape, cu_seqlens_q.numel() - 1
    if return_stats and head_count > MAX_HEADS:
        raise ValueError(f"q must have at most {MAX_HEADS} heads when return_stats is True, got {head_count}")
    if softmax_scale < 0:
        dq, dk, dv = varlen_attention_backward(
            grad_out,
            grad_summary_attention,
            grad_received_attention,
            out,
            lse,
            -q,
            k,
            v,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
            -softmax_scale,
            causal,
            window_left,
            window_right,
            softcap,
            alibi_slopes,
            summary_index,
            return_stats,
        )
        return dq.neg_(), dk, dv
    if min(max_seqlen_q, max_seqlen_k, rows, head_count, batch) == 0:
        dq, dk, dv = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        return dq, dk, dv

    q, k, v, grad_out, out, lse = heads(q), heads(k), heads(v), heads(grad_out), out.contiguous(), lse.contiguous()
    cu_seqlens_q, cu_seqlens_k = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    summary_index = None if summary_index is None else summary_index.contiguous()
    slab = triton.cdiv(max_seqlen_q, 128) * 128
    mask = masking(causal, window_left, window_right, max_seqlen_q, max_seqlen_k)
    score = scoring(softmax_scale, softcap, alibi_slopes)
    delta = empty_float32(q, head_count, rows)
    block = min(ELEMENTS // triton.next_power_of_2(head_dim), 64)
    prepared, argmax = None, None
    with on_device(q.device):
        if return_stats:
            slab = min(slab, SLAB)
            from_summary, norms = launch_from_summary(
                q, k, lse, out, cu_seqlens_q, max_seqlen_q, score, mask, summary_index
            )
            d_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
            through, d_maximum = empty_float32(q, head_count, rows), empty_float32(q, rows)
            assert norms is not None  # as out is given
            prepared = PreparedStatistics(
                grad_summary_attention.contiguous(),
                grad_received_attention.contiguous(),
                from_summary,
                norms,
                d_out,
                through,
                d_maximum,
            )
            argmax = HeadArgmax(q, k, lse, cu_seqlens_q, max_seqlen_q, slab)
        prepare_kernel[(triton.cdiv(max_seqlen_q, block) * head_count * batch,)](
            grad_out,
            out,
            cu_seqlens_q,
            summary_index,
            prepared,
            delta,
            *strides(grad_out),
            T=rows,
            H=head_count,
            max_seqlen=max_seqlen_q,
            **dims(head_dim),
            **mask,
            BLOCK=block,
            **OPTIONS,
        )
        slabs = range(0, max_seqlen_q, slab)
        dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        dk, dv = (  # several slabs add up in float32
            torch.empty(x.shape, dtype=x.dtype if len(slabs) == 1 else torch.float32, device=x.device) for x in (k, v)
        )
        d_out = grad_out if prepared is None else prepared.d_out
        inputs = Inputs(q, k, v, d_out, lse, delta, cu_seqlens_q, cu_seqlens_k)
        for slab_begin in slabs:
            statistics = None
            if prepared is not None and argmax is not None:
                through, d_maximum = prepared.through, prepared.d_maximum
                argmax.fill(slab_begin, d_maximum, prepared.from_summary, through, delta, score, mask, summary_index)
                statistics = StatisticGradients(summary_index, argmax.heads, through, d_maximum)
            launch_gradients(
                inputs,
                statistics,
                (dq, dk, dv),
                max_seqlen_q,
                max_seqlen_k,
                softmax_scale,
                score,
                mask,
                slab_begin,
                slab,
            )
    return dq, dk.to(k.dtype), dv.to(v.dtype)
