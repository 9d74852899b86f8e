# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of the backward of `received_attention`: which head has each pair's maximum, what it adds to delta.

The gradient of max_h P[h,i,j] goes to one head. It is found once per pair from the scores of all heads, as in the
forward, and kept as a byte for the two gradient kernels. Rows of queries are taken a slab at a time, so that the bytes
take (T, slab) and not (T, longest sequence); key by key, with the queries of the slab side by side.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from madtp_kernels.triton.attention.masks import keys_of, right_of, visible
from madtp_kernels.triton.attention.scores import capped, load_lse, slant, slope_of
from madtp_kernels.triton.attention.tiles import (
    dims,
    eights,
    head_tile,
    load_tile,
    program_of,
    sequence_rows,
    strides,
    summary_row_or_none,
)
from madtp_kernels.triton.common import OPTIONS, empty_float32

ROWS = 128  # of a program of the delta kernel
NO_HEAD = tl.constexpr(255)  # pairs whose query is not counted; heads are numbered up to 254


@triton.jit(do_not_specialize=["T", "H", "max_seqlen", "slab_begin", "left", "right"])
def head_argmax_kernel(
    p_q,  # (T, H, D)
    p_k,  # (T, H / GROUP, D)
    p_lse,  # (H, T) fp32
    p_grad,  # (T,) fp32: of the maximum, per key
    p_cu_seqlens,  # (B+1,) int32
    p_summary_index,  # (B,) int32 or None
    p_head,  # (T, slab) uint8, out: first head of the maximum of key j and query slab_begin + column
    p_partial,  # (blocks of keys, H, slab) fp32, out: sum over a block's keys of P grad where the head has the maximum
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
    slab_begin,
    slab,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """One tile of queries and keys."""
    rows = tl.minimum(max_seqlen - slab_begin, slab)
    i_n, i_m, i_b = program_of(tl.cdiv(max_seqlen, BLOCK_N), tl.cdiv(rows, BLOCK_M))
    begin, n = sequence_rows(p_cu_seqlens, i_b, T, max_seqlen)
    top = slab_begin + i_m * BLOCK_M
    o_m = top + tl.arange(0, BLOCK_M)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if (i_n * BLOCK_N >= n) | (top >= n):
        return
    right = right_of(right, CAUSAL)
    if right is not None:
        if i_n * BLOCK_N >= top + BLOCK_M + right:
            return
    if left is not None:
        if (i_n + 1) * BLOCK_N <= top - left:
            return
    m_m, m_n = o_m < n, o_n < n
    b_best = tl.full((BLOCK_M, BLOCK_N), float("-inf"), tl.float32)
    b_head = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for i_h in range(H):
        b_q = load_tile(p_q, begin + top, q_row, m_m, BLOCK_M, D, BLOCK_D)
        b_k = load_tile(p_k, begin + i_n * BLOCK_N, k_row, m_n, BLOCK_N, D, BLOCK_D)
        b_s = capped(tl.dot(b_q, tl.trans(b_k), input_precision="ieee"), bias)
        b_s = slant(b_s * scale, slope_of(bias, i_b, i_h), o_m[:, None], o_n[None, :])
        b_log = b_s - load_lse(p_lse, begin + o_m, m_m, 0.0)[:, None]
        b_head = tl.where(b_log > b_best, i_h, b_head)
        b_best = tl.maximum(b_best, b_log)
        p_q += eights(q_head, D)
        p_k += tl.where(i_h % GROUP == GROUP - 1, eights(k_head, D), 0)
        p_lse += T

    m_counted = m_m & (o_m != summary_row_or_none(p_summary_index, i_b, n))
    b_head = tl.where(m_counted[:, None], b_head, NO_HEAD)
    p_tile = tl.trans(head_tile(p_head, begin + i_n * BLOCK_N, i_m * BLOCK_M, slab, BLOCK_N, BLOCK_M))
    tl.store(p_tile, b_head.to(tl.uint8), mask=m_m[:, None] & m_n[None, :])

    m_pair = visible(m_counted[:, None] & m_n[None, :], o_m[:, None], o_n[None, :], left, right)
    b_grad = tl.load(p_grad + begin + o_n, mask=m_n, other=0.0)
    b_share = tl.where(m_pair, tl.exp2(b_best) * b_grad[None, :], 0.0)
    p_partial += _partial_block(begin, i_n, i_b, BLOCK_N) * H * slab
    for i_h in range(H):
        b_sum = tl.sum(tl.where(b_head == i_h, b_share, 0.0), 1)
        tl.store(p_partial + (o_m - slab_begin), b_sum, mask=m_m)
        p_partial += slab


@triton.jit
def _partial_block(begin, i_n, i_b, BLOCK_N: tl.constexpr):
    """A number of its own for every block of keys of the batch, below T // BLOCK_N + B."""
    return begin // BLOCK_N + i_n + i_b


@triton.jit(do_not_specialize=["T", "H", "max_seqlen", "slab_begin", "left", "right"])
def delta_kernel(
    p_partial,  # (blocks of keys, H, slab) fp32
    p_from_summary,  # (H, T) fp32: P[h,s,j]
    p_through,  # (H, T) fp32: gradient of P[h,s,j] through `summary_attention`
    p_cu_seqlens,  # (B+1,) int32
    p_summary_index,  # (B,) int32 or None
    p_delta,  # (H, T) fp32, in and out
    left,
    right,
    T,
    H,
    max_seqlen,
    slab_begin,
    slab,
    BLOCK_N: tl.constexpr,
    BLOCK: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """delta_hi += sum_j P[h,i,j] dP[h,i,j] of the gradients that come through the statistics."""
    rows = tl.minimum(max_seqlen - slab_begin, slab)
    i_m, i_h, i_b = program_of(tl.cdiv(rows, BLOCK), H)
    begin, n = sequence_rows(p_cu_seqlens, i_b, T, max_seqlen)
    o_slab = i_m * BLOCK + tl.arange(0, BLOCK)
    o_m = slab_begin + o_slab
    if slab_begin + i_m * BLOCK >= n:
        return
    m_m = o_m < n
    o_head = i_h.to(tl.int64) * T + begin
    b_delta = tl.load(p_delta + o_head + o_m, mask=m_m, other=0.0)
    right = right_of(right, CAUSAL)
    first, _, _, end = keys_of(slab_begin + i_m * BLOCK, 0, n, left, right, BLOCK, BLOCK_N)
    p_partial += (_partial_block(begin, first // BLOCK_N, i_b, BLOCK_N) * H + i_h) * slab
    for start in range(first, end, BLOCK_N):
        m_part = m_m  # where a query sees nothing of a block of keys there is no sum
        if right is not None:
            m_part = m_part & (start <= o_m + right)
        if left is not None:
            m_part = m_part & (start + BLOCK_N > o_m - left)
        b_delta += tl.load(p_partial + o_slab, mask=m_part, other=0.0)
        p_partial += H.to(tl.int64) * slab

    summary_row = summary_row_or_none(p_summary_index, i_b, n)
    inside = (summary_row >= slab_begin + i_m * BLOCK) & (summary_row < slab_begin + (i_m + 1) * BLOCK)
    b_sum = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, tl.where(inside, n, 0), BLOCK):
        o_n = start + tl.arange(0, BLOCK)
        b_p = tl.load(p_from_summary + o_head + o_n, mask=o_n < n, other=0.0)
        b_sum += b_p * tl.load(p_through + o_head + o_n, mask=o_n < n, other=0.0)
    b_delta += tl.where(o_m == summary_row, tl.sum(b_sum), 0.0)
    tl.store(p_delta + o_head + o_m, b_delta, mask=m_m)


# --- launcher


def _blocks(head_dim: int, dtype: torch.dtype) -> dict[str, int]:
    if dtype == torch.float32:
        return {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1}
    if head_dim > 128:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 8, "num_stages": 1}
    return {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2}


class HeadArgmax:
    """The slab of arg-max heads, filled anew for every slab of queries."""

    def __init__(self, q: Tensor, k: Tensor, lse: Tensor, cu_seqlens: Tensor, max_seqlen: int, slab: int):
        self.q, self.k, self.lse, self.cu_seqlens = q, k, lse, cu_seqlens
        self.max_seqlen, self.slab = max_seqlen, slab
        length, head_count, head_dim = q.shape
        self.blocks = _blocks(head_dim, q.dtype)
        self.heads = torch.empty((length, slab), dtype=torch.uint8, device=q.device)
        block_count = length // self.blocks["BLOCK_N"] + cu_seqlens.numel() - 1
        self.partial = empty_float32(q, block_count, head_count, slab)

    def fill(self, slab_begin, grad, from_summary, through, delta, score, mask, summary_index) -> None:
        """Writes `heads` for queries from slab_begin on, and completes their delta."""
        (length, head_count, head_dim), batch = self.q.shape, self.cu_seqlens.numel() - 1
        rows = min(self.max_seqlen - slab_begin, self.slab)
        sizes = {
            "T": length,
            "H": head_count,
            "max_seqlen": self.max_seqlen,
            "slab_begin": slab_begin,
            "slab": self.slab,
        }
        tiles = triton.cdiv(rows, self.blocks["BLOCK_M"]) * triton.cdiv(self.max_seqlen, self.blocks["BLOCK_N"])
        head_argmax_kernel[(tiles * batch,)](
            self.q,
            self.k,
            self.lse,
            grad,
            self.cu_seqlens,
            summary_index,
            self.heads,
            self.partial,
            *strides(self.q, self.k),
            **sizes,
            **dims(head_dim),
            GROUP=head_count // self.k.shape[1],
            **score,
            **mask,
            **OPTIONS | self.blocks,
        )
        delta_kernel[(triton.cdiv(rows, ROWS) * head_count * batch,)](
            self.partial,
            from_summary,
            through,
            self.cu_seqlens,
            summary_index,
            delta,
            **sizes,
            BLOCK_N=self.blocks["BLOCK_N"],
            BLOCK=ROWS,
            **mask,
            **OPTIONS,
        )
