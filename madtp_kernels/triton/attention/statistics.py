# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of the statistics of `varlen_attention`, from q, k and the log-sum-exp of every query and head.

The exponential is monotonic: max_h P[h,i,j] = exp2(max_h(s_hij - lse_hi)). So the scores are formed a second time, for
a tile of queries and keys over all heads, one multiply-add and one maximum per score (more under a soft cap or ALiBi),
and one exponential per pair at the end. Column sums of a tile go to a buffer that the last kernel adds up in order; no
atomics.
Bound: the matrix products of Q K^T, half of a plain forward, and for short sequences the three launches.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from madtp_kernels.triton.attention.masks import observers, queries_of, right_of, visible
from madtp_kernels.triton.attention.scores import capped, load_lse, slant, slope_of
from madtp_kernels.triton.attention.tiles import (
    dims,
    eights,
    load_tile,
    program_of,
    sequence_rows,
    strides,
    summary_row_or_none,
    zero_tail,
)
from madtp_kernels.triton.common import OPTIONS, empty_float32

KEYS = 128  # keys of a program of the small kernels


@triton.jit(do_not_specialize=["T", "H", "max_seqlen", "left", "right"])
def head_maximum_kernel(
    p_q,  # (T, H, D)
    p_k,  # (T, H / GROUP, D)
    p_lse,  # (H, T) fp32
    p_cu_seqlens,  # (B+1,) int32
    p_summary_index,  # (B,) int32 or None
    p_partial,  # (blocks of queries, T) fp32, out: sums over the counted queries of a block
    q_row,
    q_head,
    k_row,
    k_head,
    scale,
    bias,  # Bias or None
    left,
    right,
    T,
    H,
    max_seqlen,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """One tile of queries and keys."""
    i_n, i_m, i_b = program_of(tl.cdiv(max_seqlen, BLOCK_N), tl.cdiv(max_seqlen, BLOCK_M))
    begin, n = sequence_rows(p_cu_seqlens, i_b, T, max_seqlen)
    if (i_n * BLOCK_N >= n) | (i_m * BLOCK_M >= n):
        return
    right = right_of(right, CAUSAL)
    if right is not None:
        if i_n * BLOCK_N >= (i_m + 1) * BLOCK_M + right:
            return
    if left is not None:
        if (i_n + 1) * BLOCK_N <= i_m * BLOCK_M - left:
            return
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_m, m_n = o_m < n, o_n < n
    b_best = tl.full((BLOCK_M, BLOCK_N), float("-inf"), tl.float32)
    for i_h in range(H):
        b_q = load_tile(p_q, begin + i_m * BLOCK_M, q_row, m_m, BLOCK_M, D, BLOCK_D)
        b_k = load_tile(p_k, begin + i_n * BLOCK_N, k_row, m_n, BLOCK_N, D, BLOCK_D)
        b_s = capped(tl.dot(b_q, tl.trans(b_k), input_precision="ieee"), bias)
        b_s = slant(b_s * scale, slope_of(bias, i_b, i_h), o_m[:, None], o_n[None, :])
        b_log = b_s - load_lse(p_lse, begin + o_m, m_m, 0.0)[:, None]
        b_best = tl.maximum(b_best, b_log, propagate_nan=tl.PropagateNan.ALL)
        p_q += eights(q_head, D)
        p_k += tl.where(i_h % GROUP == GROUP - 1, eights(k_head, D), 0)
        p_lse += T

    m_counted = (m_m & (o_m != summary_row_or_none(p_summary_index, i_b, n)))[:, None] & m_n[None, :]
    m_counted = visible(m_counted, o_m[:, None], o_n[None, :], left, right)
    b_received = tl.sum(tl.where(m_counted, tl.exp2(b_best), 0.0), 0)
    tl.store(p_partial + i_m.to(tl.int64) * T + begin + o_n, b_received, mask=m_n)


@triton.jit(do_not_specialize=["T", "H", "max_seqlen", "left", "right"])
def from_summary_kernel(
    p_q,  # (T, H, D)
    p_k,  # (T, H / GROUP, D)
    p_lse,  # (H, T) fp32
    p_cu_seqlens,  # (B+1,) int32
    p_summary_index,  # (B,) int32 or None
    p_from_summary,  # (H, T) fp32, out: P[h,s,j], 0 without a summary token
    p_out,  # (T, H, D) contiguous, or None
    p_norms,  # (H, T) fp32 or None, out: ||O||
    q_row,
    q_head,
    k_row,
    k_head,
    scale,
    bias,  # Bias or None
    left,
    right,
    T,
    H,
    max_seqlen,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """The summary query against one block of keys of one head."""
    i_n, i_h, i_b = program_of(tl.cdiv(max_seqlen, BLOCK), H)
    begin, n = sequence_rows(p_cu_seqlens, i_b, T, max_seqlen)
    if i_n * BLOCK >= n:
        return
    summary_row = summary_row_or_none(p_summary_index, i_b, n)
    o_n = i_n * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < n
    m_seen = visible(o_n < tl.where(summary_row < 0, 0, n), summary_row, o_n, left, right_of(right, CAUSAL))
    o_d = tl.arange(0, BLOCK_D)
    row = begin + tl.maximum(summary_row, 0)
    i_h = i_h.to(tl.int64)
    b_q = tl.load(p_q + i_h * eights(q_head, D) + row * q_row + o_d, mask=o_d < D, other=0.0).to(tl.float32)
    b_k = load_tile(p_k + i_h // GROUP * eights(k_head, D), begin + i_n * BLOCK, k_row, m_seen, BLOCK, D, BLOCK_D).to(
        tl.float32
    )
    b_s = capped(tl.sum(b_k * b_q[None, :], 1), bias)
    b_s = slant(b_s * scale, slope_of(bias, i_b, i_h), summary_row, o_n)
    b_log = b_s - load_lse(p_lse, i_h * T + row, None, None)
    tl.store(p_from_summary + i_h * T + begin + o_n, tl.where(m_seen, tl.exp2(b_log), 0.0), mask=m_n)
    if p_norms is not None:
        b_out = load_tile(p_out + i_h * D, begin + i_n * BLOCK, H * D, m_n, BLOCK, D, BLOCK_D).to(tl.float32)
        tl.store(p_norms + i_h * T + begin + o_n, tl.sqrt(tl.sum(b_out * b_out, 1)), mask=m_n)


@triton.jit
def head_sums(p_from_summary, p_norms, o_rows, m_rows, T, H):
    """Of rows o_rows over all heads: the sum of norms, and of P[h,s,j] weighted by them."""
    b_norms = o_rows * 0.0
    b_weighted = o_rows * 0.0
    for _ in range(H):
        b_norm = tl.load(p_norms + o_rows, mask=m_rows, other=0.0)
        b_norms += b_norm
        b_weighted += b_norm * tl.load(p_from_summary + o_rows, mask=m_rows, other=0.0)
        p_norms += T
        p_from_summary += T
    return b_norms, b_weighted


@triton.jit(do_not_specialize=["T", "H", "B", "max_seqlen", "left", "right"])
def finish_kernel(
    p_partial,  # (blocks of queries, T) fp32
    p_from_summary,  # (H, T) fp32
    p_norms,  # (H, T) fp32
    p_cu_seqlens,  # (B+1,) int32
    p_summary_index,  # (B,) int32 or None
    p_summary_attention,  # (T,) fp32, out
    p_received_attention,  # (T,) fp32, out
    left,
    right,
    T,
    H,
    B,
    max_seqlen,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """Both statistics of one block of keys."""
    zero_tail(p_summary_attention, p_cu_seqlens, B, T, 1)
    zero_tail(p_received_attention, p_cu_seqlens, B, T, 1)
    i_n, _, i_b = program_of(tl.cdiv(max_seqlen, BLOCK), 1)
    begin, n = sequence_rows(p_cu_seqlens, i_b, T, max_seqlen)
    if i_n * BLOCK >= n:
        return
    o_n = i_n * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < n
    b_received = tl.zeros((BLOCK,), tl.float32)
    right = right_of(right, CAUSAL)
    earliest, end = queries_of(i_n * BLOCK, 0, i_n * 0, n, left, right, BLOCK_M, BLOCK)
    p_partial += (earliest // BLOCK_M).to(tl.int64) * T + begin
    for i_m in range(earliest // BLOCK_M, tl.cdiv(end, BLOCK_M)):
        m_part = m_n  # what is not seen from a block of queries has no sum there
        if right is not None:
            m_part = m_part & (o_n < (i_m + 1) * BLOCK_M + right)
        if left is not None:
            m_part = m_part & (o_n >= i_m * BLOCK_M - left)
        b_received += tl.load(p_partial + o_n, mask=m_part, other=0.0)
        p_partial += T
    b_received /= observers(o_n, n, summary_row_or_none(p_summary_index, i_b, n), left, right)
    tl.store(p_received_attention + begin + o_n, b_received, mask=m_n)
    b_norms, b_weighted = head_sums(p_from_summary, p_norms, begin + o_n, m_n, T, H)
    tl.store(p_summary_attention + begin + o_n, b_weighted / tl.where(b_norms == 0, 1.0, b_norms), mask=m_n)


# --- launchers


def _blocks(head_dim: int, dtype: torch.dtype, biased: bool) -> dict[str, int]:
    """Three stages, as shared memory allows: with two, the tiles of a head are asked for when those before are used up.

    A plain tile takes 128 registers, and so has another block beside it, which works while it waits.
    """
    if dtype == torch.float32:
        return {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2}
    if head_dim > 128:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 8, "num_stages": 1}
    stages = {"num_stages": 2 if head_dim > 64 else 3}
    registers = {} if biased or head_dim > 64 else {"maxnreg": 128}
    return {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8} | stages | registers


def launch_from_summary(
    q, k, lse, out, cu_seqlens, max_seqlen, score, mask, summary_index
) -> tuple[Tensor, Tensor | None]:
    """P[h,s,j] (H, T) and, of out, the norms (H, T) if it is given."""
    length, head_count, head_dim = q.shape
    from_summary = empty_float32(q, head_count, length)
    norms = None if out is None else empty_float32(q, head_count, length)
    from_summary_kernel[(triton.cdiv(max_seqlen, KEYS) * head_count * (cu_seqlens.numel() - 1),)](
        q,
        k,
        lse,
        cu_seqlens,
        summary_index,
        from_summary,
        out,
        norms,
        *strides(q, k),
        T=length,
        H=head_count,
        max_seqlen=max_seqlen,
        **dims(head_dim),
        GROUP=head_count // k.shape[1],
        **score,
        **mask,
        BLOCK=KEYS,
        **OPTIONS | {"num_warps": 8},
    )
    return from_summary, norms


def attention_statistics(
    q: Tensor,  # (T, H, D)
    k: Tensor,  # (T, Hk, D)
    lse: Tensor,  # (H, T) fp32
    norms: Tensor,  # (H, T) fp32
    cu_seqlens: Tensor,  # (B+1,) int32
    max_seqlen: int,
    score: dict[str, Any],  # of `scoring`
    mask: dict[str, Any],  # of `masking`
    summary_index: Tensor | None,  # (B,) int32
) -> tuple[Tensor, Tensor]:  # summary_attention (T,), received_attention (T,) fp32
    summary_index = None if summary_index is None else summary_index.contiguous()
    (length, head_count, head_dim), batch = q.shape, cu_seqlens.numel() - 1
    blocks = _blocks(head_dim, q.dtype, score["bias"] is not None)
    query_blocks, key_blocks = (triton.cdiv(max_seqlen, blocks[name]) for name in ("BLOCK_M", "BLOCK_N"))
    partial = empty_float32(q, query_blocks, length)
    head_maximum_kernel[(key_blocks * query_blocks * batch,)](
        q,
        k,
        lse,
        cu_seqlens,
        summary_index,
        partial,
        *strides(q, k),
        T=length,
        H=head_count,
        max_seqlen=max_seqlen,
        **dims(head_dim),
        GROUP=head_count // k.shape[1],
        **score,
        **mask,
        **OPTIONS | blocks,
    )
    from_summary, _ = launch_from_summary(q, k, lse, None, cu_seqlens, max_seqlen, score, mask, summary_index)
    summary_attention, received_attention = empty_float32(q, length), empty_float32(q, length)
    finish_kernel[(triton.cdiv(max_seqlen, KEYS) * batch,)](
        partial,
        from_summary,
        norms,
        cu_seqlens,
        summary_index,
        summary_attention,
        received_attention,
        T=length,
        H=head_count,
        B=batch,
        max_seqlen=max_seqlen,
        BLOCK_M=blocks["BLOCK_M"],
        BLOCK=KEYS,
        **mask,
        **OPTIONS,
    )
    return summary_attention, received_attention
