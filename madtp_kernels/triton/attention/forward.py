# SPDX-License-Identifier: Apache-2.0
"""Triton kernel of `varlen_attention`: a flash forward that keeps the log-sum-exp, and the norms for the statistics.

Bound: at head dimension 64 the exponentials (one per score, 16 a clock and SM) and the matrix products take about the
same time, so both are overlapped by resident programs rather than inside one. float32 multiplies in float32 (no TF32),
which costs an order of magnitude and keeps the error of the reference.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from madtp_kernels.triton.attention.masks import keys_of, masking, right_of, visible
from madtp_kernels.triton.attention.scores import capped, scoring, slant, slope_of
from madtp_kernels.triton.attention.statistics import attention_statistics
from madtp_kernels.triton.attention.tiles import (
    dims,
    eights,
    heads,
    load_tile,
    program_of,
    sequence_rows,
    store_tile,
    strides,
    zero_tail,
)
from madtp_kernels.triton.common import OPTIONS, empty_float32, on_device

LN_2 = tl.constexpr(0.6931471805599453)
# What the running maximum starts from: finite, so that a block of which a query sees nothing leaves its sum at 0.
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


@triton.jit
def _attend(
    b_acc,  # (BLOCK_M, BLOCK_D) fp32
    b_max,  # (BLOCK_M,) fp32
    b_sum,  # (BLOCK_M,) fp32
    b_q,  # (BLOCK_M, BLOCK_D)
    p_k,
    p_v,
    first,
    start,
    o_p,  # (BLOCK_M,) positions of the queries
    n,
    k_row,
    v_row,
    scale,
    bias,
    slope,
    left,
    right,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One block of keys into the running softmax; unless MASKED every query sees every key of it."""
    o_n = start + tl.arange(0, BLOCK_N)
    m_n = o_n < n if MASKED else None
    b_k = load_tile(p_k, first + start, k_row, m_n, BLOCK_N, D, BLOCK_D)
    b_s = capped(tl.dot(b_q, tl.trans(b_k), input_precision="ieee"), bias)
    if slope is not None:
        b_s = slant(b_s * scale, slope, o_p[:, None], o_n[None, :])
        scale = 1.0
    if MASKED:
        m_pairs = m_n[None, :]  # type: ignore[index]  # MASKED: it is not None
        b_s = tl.where(visible(m_pairs, o_p[:, None], o_n[None, :], left, right), b_s, float("-inf"))
    b_next = tl.maximum(b_max, tl.max(b_s, 1) * scale)
    b_p = tl.exp2(b_s * scale - b_next[:, None])
    b_shrink = tl.exp2(b_max - b_next)
    b_v = load_tile(p_v, first + start, v_row, m_n, BLOCK_N, D, BLOCK_D)
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_shrink[:, None], input_precision="ieee")
    return b_acc, b_next, b_sum * b_shrink + tl.sum(b_p, 1)


@triton.jit(do_not_specialize=["Tq", "Tk", "H", "B", "max_seqlen_q", "max_seqlen_k", "left", "right"])
def attention_kernel(
    p_q,  # (Tq, H, D), row stride q_row, head stride q_head
    p_k,  # (Tk, H / GROUP, D)
    p_v,  # (Tk, H / GROUP, D)
    p_cu_seqlens_q,  # (B+1,) int32
    p_cu_seqlens_k,  # (B+1,) int32
    p_out,  # (Tq, H, D), out
    p_lse,  # (H, Tq) fp32, out: natural logarithm
    p_norms,  # (H, Tq) fp32 or None, out: ||O||
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    scale,  # not negative
    bias,  # Bias or None
    left,
    right,
    Tq,
    Tk,
    H,
    B,
    max_seqlen_q,
    max_seqlen_k,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,  # query heads of a key head
    CAUSAL: tl.constexpr,
):
    """One block of queries of one head."""
    zero_tail(p_out, p_cu_seqlens_q, B, Tq, H * D)
    blocks = tl.cdiv(max_seqlen_q, BLOCK_M)
    i_m, i_h, i_b = program_of(blocks, H)
    if CAUSAL:
        i_m = blocks - 1 - i_m  # the longest first
    begin, n_q = sequence_rows(p_cu_seqlens_q, i_b, Tq, max_seqlen_q)
    first, n_k = sequence_rows(p_cu_seqlens_k, i_b, Tk, max_seqlen_k)
    if i_m * BLOCK_M >= n_q:
        return

    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < n_q
    p_k += (i_h // GROUP).to(tl.int64) * eights(k_head, D)
    p_v += (i_h // GROUP).to(tl.int64) * eights(v_head, D)
    b_q = load_tile(p_q + i_h.to(tl.int64) * eights(q_head, D), begin + i_m * BLOCK_M, q_row, m_m, BLOCK_M, D, BLOCK_D)
    b_acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    b_max = tl.full((BLOCK_M,), LOWEST, tl.float32)
    b_sum = tl.zeros((BLOCK_M,), tl.float32)
    slope = slope_of(bias, i_b, i_h)
    right = right_of(right, CAUSAL)
    shift = n_k - n_q
    o_p = o_m + shift
    begin_n, whole, edge, end = keys_of(i_m * BLOCK_M, shift, n_k, left, right, BLOCK_M, BLOCK_N)
    if left is not None:
        for start in range(begin_n, whole, BLOCK_N):
            b_acc, b_max, b_sum = _attend(
                b_acc, b_max, b_sum, b_q, p_k, p_v, first, start, o_p, end, k_row, v_row, scale, bias, slope,
                left, right, D, BLOCK_D, BLOCK_N, True,
            )  # fmt: skip
    for start in range(whole, edge, BLOCK_N):
        b_acc, b_max, b_sum = _attend(
            b_acc, b_max, b_sum, b_q, p_k, p_v, first, start, o_p, end, k_row, v_row, scale, bias, slope,
            left, right, D, BLOCK_D, BLOCK_N, False,
        )  # fmt: skip
    for start in range(edge, end, BLOCK_N):
        b_acc, b_max, b_sum = _attend(
            b_acc, b_max, b_sum, b_q, p_k, p_v, first, start, o_p, end, k_row, v_row, scale, bias, slope,
            left, right, D, BLOCK_D, BLOCK_N, True,
        )  # fmt: skip

    b_out = b_acc / tl.where(b_sum == 0, 1.0, b_sum)[:, None]  # 0: a query that sees no key
    o_head = i_h.to(tl.int64) * Tq + begin + o_m
    store_tile(p_out + i_h * D, begin + i_m * BLOCK_M, H * D, m_m, b_out, BLOCK_M, D, BLOCK_D)
    tl.store(p_lse + o_head, (b_max + tl.log2(b_sum)) * LN_2, mask=m_m)
    if p_norms is not None:
        tl.store(p_norms + o_head, tl.sqrt(tl.sum(b_out * b_out, 1)), mask=m_m)


def _blocks(head_dim: int, dtype: torch.dtype) -> dict[str, int]:
    """The largest tiles that keep everything in registers on sm_80 and sm_90."""
    if dtype == torch.float32:
        return {"BLOCK_M": 32 if head_dim <= 128 else 16, "BLOCK_N": 16, "num_warps": 8, "num_stages": 2}
    if head_dim > 128:
        return {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2}
    return {"BLOCK_M": 128, "BLOCK_N": 64 if head_dim <= 64 else 32, "num_warps": 8, "num_stages": 3}


def varlen_attention(
    q: Tensor,  # (Tq, H, D)
    k: Tensor,  # (Tk, H, D)
    v: Tensor,  # (Tk, H, D)
    cu_seqlens_q: Tensor,  # (B+1,) int32
    cu_seqlens_k: Tensor,  # (B+1,) int32
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    window_left: int,
    window_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,  # (H,) or (B, H) fp32
    summary_index: Tensor | None,  # (B,) int32
    return_stats: bool,
) -> tuple[
    Tensor, Tensor, Tensor, Tensor
]:  # out (Tq, H, D), summary_attention (Tk,), received_attention (Tk,), lse (H, Tq) fp32
    """As `reference.attention.varlen_attention`; rows past the last sequence are zero in the first three."""
    if softmax_scale < 0:  # the running maximum is taken before scaling
        q, softmax_scale = -q, -softmax_scale
    q, k, v = heads(q), heads(k), heads(v)
    cu_seqlens_q, cu_seqlens_k = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    (rows, head_count, head_dim), batch = q.shape, cu_seqlens_q.numel() - 1
    blocks = _blocks(head_dim, q.dtype)
    programs = triton.cdiv(max_seqlen_q, blocks["BLOCK_M"]) * head_count * batch
    lse = empty_float32(q, head_count, rows)
    if programs == 0 or rows == 0:
        empty = torch.zeros(k.shape[0] if return_stats else 0, dtype=torch.float32, device=q.device)
        return torch.zeros(q.shape, dtype=q.dtype, device=q.device), empty, empty.clone(), lse.zero_()

    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    norms = empty_float32(q, head_count, rows) if return_stats else None
    mask = masking(causal, window_left, window_right, max_seqlen_q, max_seqlen_k)
    score = scoring(softmax_scale, softcap, alibi_slopes)
    with on_device(q.device):
        attention_kernel[(programs,)](
            q,
            k,
            v,
            cu_seqlens_q,
            cu_seqlens_k,
            out,
            lse,
            norms,
            *strides(q, k, v),
            Tq=rows,
            Tk=k.shape[0],
            H=head_count,
            B=batch,
            max_seqlen_q=max_seqlen_q,
            max_seqlen_k=max_seqlen_k,
            **dims(head_dim),
            GROUP=head_count // k.shape[1],
            **score,
            **mask,
            **OPTIONS | blocks,
        )
        if norms is None:
            return out, empty_float32(q, 0), empty_float32(q, 0), lse
        summary_attention, received_attention = attention_statistics(
            q, k, lse, norms, cu_seqlens_q, max_seqlen_q, score, mask, summary_index
        )
    return out, summary_attention, received_attention, lse
