# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of `attention_rows`: the softmax of every row and head, then the sums of the probabilities by key.

Scores are formed twice, since a key needs all rows and a row all keys; they stay in the log2 domain. A program has the
query heads that read one key head, which is read where it is. Blocks of keys are counted from the start of their
sequence and rows are added in their order, so a result does not depend on the batch; no atomics.
Bound: the keys, read once from memory and from cache after that.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from madtp_kernels.triton.attention.scores import LOG2_E
from madtp_kernels.triton.attention.tiles import addressable, strides, zero_tail
from madtp_kernels.triton.common import OPTIONS, on_device, power_of_two, sequence_bounds

MIN_DOT = 16  # rows of the smallest product
SEQUENCES = tl.constexpr(256)  # whose ends are looked at together


# --- kernels


@triton.jit
def _sequence_of(p_cu_seqlens, i_row, B):
    """The sequence that row i_row belongs to, B past the last."""
    b_count = tl.zeros((SEQUENCES,), tl.int32)
    for first in range(0, B, SEQUENCES):
        o_b = first + tl.arange(0, SEQUENCES)
        b_end = tl.load(p_cu_seqlens + 1 + o_b, mask=o_b < B, other=2147483647)
        b_count += (b_end <= i_row).to(tl.int32)
    return tl.sum(b_count).to(tl.int64)


@triton.jit
def _visible(p_row_position, o_row, m_row, keys):
    """How many keys a row sees, from the first on: 0 where masked."""
    b_seen = tl.where(m_row, keys, 0)
    if p_row_position is not None:
        b_position = tl.load(p_row_position + o_row, mask=m_row, other=-1).to(tl.int64)
        b_seen = tl.minimum(tl.maximum(b_position + 1, 0), keys)
    return b_seen


@triton.jit
def _scores(
    p_rows,  # (BLOCK_M,) pointers to queries
    p_keys,  # pointer to the first of BLOCK_N keys
    k_row,
    m_rows,
    m_keys,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """(BLOCK_M, BLOCK_N) fp32, 0 where masked; by BLOCK_D channels, so that registers hold any head dimension."""
    b_s = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for d in range(0, D, BLOCK_D):
        o_d = d + tl.arange(0, BLOCK_D)
        m_d = (o_d < D)[None, :]
        b_q = tl.load(p_rows[:, None] + o_d[None, :], mask=m_rows[:, None] & m_d, other=0.0)
        p_tile = p_keys + (tl.arange(0, BLOCK_N)[:, None] * k_row + o_d[None, :])
        b_k = tl.load(p_tile, mask=m_keys[:, None] & m_d, other=0.0)
        b_s = tl.dot(b_q, tl.trans(b_k), acc=b_s, input_precision="ieee")
    return b_s


@triton.jit(do_not_specialize=["R", "T", "B"])
def row_softmax_kernel(
    p_q,  # (R, H, D)
    p_k,  # (T, Hk, D)
    p_cu_seqlens_q,  # (B+1,) int32
    p_cu_seqlens_k,  # (B+1,) int32
    p_row_position,  # (R,) int32 or None
    p_highest,  # (R, H) fp32, out: the largest score, to base 2
    p_weight,  # (R, H) fp32, out: 1 / the sum of the exponentials; 0 where a row sees no key
    q_row,
    q_head,
    k_row,
    k_head,
    scale,  # softmax_scale * log2(e)
    R,
    T,
    B,
    GROUP: tl.constexpr,  # query heads of a key head
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,  # GROUP or more
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One row and the heads that read one key head."""
    i_row, i_h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    i_b = _sequence_of(p_cu_seqlens_q, i_row, B)
    begin, end = sequence_bounds(p_cu_seqlens_k, tl.minimum(i_b, B - 1), T)
    seen = tl.max(_visible(p_row_position, i_row + tl.arange(0, 1), tl.arange(0, 1) < B - i_b, end - begin))

    o_g = tl.arange(0, BLOCK_M)
    m_g = o_g < GROUP
    p_heads = p_q + i_row * q_row + (i_h * GROUP + o_g) * q_head
    p_k += i_h * k_head + begin * k_row

    b_highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    b_sum = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, seen, BLOCK_N):
        m_n = start + tl.arange(0, BLOCK_N) < seen
        b_s = _scores(p_heads, p_k + start * k_row, k_row, m_g, m_n, D, BLOCK_M, BLOCK_N, BLOCK_D) * scale
        b_s = tl.where(m_n[None, :], b_s, float("-inf"))
        b_new = tl.maximum(b_highest, tl.max(b_s, axis=1))
        b_sum = b_sum * tl.exp2(b_highest - b_new) + tl.sum(tl.exp2(b_s - b_new[:, None]), axis=1)
        b_highest = b_new
    o_out = (i_row * tl.num_programs(1) + i_h) * GROUP + o_g
    tl.store(p_highest + o_out, tl.where(seen > 0, b_highest, 0.0), mask=m_g)
    tl.store(p_weight + o_out, tl.where(seen > 0, 1 / tl.where(seen > 0, b_sum, 1.0), 0.0), mask=m_g)


@triton.jit(do_not_specialize=["R", "T", "B", "Hk"])
def attention_rows_kernel(
    p_q,  # (R, H, D)
    p_k,  # (T, Hk, D)
    p_cu_seqlens_q,  # (B+1,) int32
    p_cu_seqlens_k,  # (B+1,) int32
    p_row_position,  # (R,) int32 or None
    p_highest,  # (R, H) fp32
    p_weight,  # (R, H) fp32
    p_attention,  # (T,) fp32, out
    q_row,
    q_head,
    k_row,
    k_head,
    scale,
    R,
    T,
    B,
    Hk,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One block of keys of one sequence, against all of its rows and heads."""
    zero_tail(p_attention, p_cu_seqlens_k, B, T, 1)
    blocks = tl.cdiv(T, BLOCK_N)
    i_n, i_b = (tl.program_id(0) % blocks).to(tl.int64), (tl.program_id(0) // blocks).to(tl.int64)
    begin, end = sequence_bounds(p_cu_seqlens_k, i_b, T)
    start = i_n * BLOCK_N
    if start >= end - begin:
        return
    first, last = sequence_bounds(p_cu_seqlens_q, i_b, R)
    pairs = (last - first) * GROUP
    o_n = start + tl.arange(0, BLOCK_N)
    m_n = o_n < end - begin
    p_k += (begin + start) * k_row

    b_sum = tl.zeros((BLOCK_N,), tl.float32)
    for _ in range(Hk):
        for pair in range(0, pairs, BLOCK_M):
            # A scalar row of 64 bits, and from there on offsets of 32: vectors of 64 would fill the registers.
            row, o_pair = first + pair // GROUP, (pair % GROUP + tl.arange(0, BLOCK_M)).to(tl.int32)
            m_pair = tl.arange(0, BLOCK_M) < pairs - pair
            o_row, o_head = o_pair // GROUP, o_pair % GROUP
            p_rows = p_q + row * q_row + (o_row * q_row + o_head.to(tl.int64) * q_head)
            o_softmax = o_row * (Hk * GROUP) + o_head
            b_highest = tl.load(p_highest + row * (Hk * GROUP) + o_softmax, mask=m_pair, other=0.0)
            b_weight = tl.load(p_weight + row * (Hk * GROUP) + o_softmax, mask=m_pair, other=0.0)
            b_seen = _visible(p_row_position, row + o_row, m_pair, end - begin)
            b_s = _scores(p_rows, p_k, k_row, m_pair, m_n, D, BLOCK_M, BLOCK_N, BLOCK_D) * scale
            m_seen = o_n[None, :] < b_seen[:, None]
            b_p = tl.exp2(b_s - b_highest[:, None]) * b_weight[:, None]
            b_sum += tl.sum(tl.where(m_seen, b_p, 0.0), axis=0)
        p_q += GROUP * q_head
        p_k += k_head
        p_highest += GROUP
        p_weight += GROUP

    b_count = tl.zeros((BLOCK_M,), tl.int32)
    for row in range(first, last, BLOCK_M):
        o_row = row + tl.arange(0, BLOCK_M).to(tl.int64)
        b_count += (_visible(p_row_position, o_row, o_row < last, end - begin) > 0).to(tl.int32)
    rows = tl.maximum(tl.sum(b_count), 1).to(tl.float32)
    tl.store(p_attention + begin + o_n, b_sum / (rows * (Hk * GROUP)), mask=m_n)


# --- launcher


def _options(head_dim: int, group: int, dtype: torch.dtype) -> dict[str, Any]:
    block_n, most_d = (32, 16) if dtype == torch.float32 else (64, 64)
    block_d = power_of_two(head_dim, MIN_DOT, most_d)
    return OPTIONS | {"GROUP": group, "D": head_dim, "BLOCK_N": block_n, "BLOCK_D": block_d}


def attention_rows(
    q_rows: Tensor,  # (R, H, D)
    k: Tensor,  # (T, Hk, D)
    cu_seqlens_q: Tensor,  # (B+1,) int32
    cu_seqlens_k: Tensor,  # (B+1,) int32
    row_position: Tensor | None,  # (R,) int32
    softmax_scale: float,
) -> Tensor:  # (T,) fp32
    """As `reference.attention_rows.attention_rows`; 0 in rows past the last sequence."""
    q_rows, k = addressable(q_rows), addressable(k)
    cu_seqlens_q, cu_seqlens_k = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    row_position = None if row_position is None else row_position.contiguous()
    (rows, heads, head_dim), (tokens, key_heads, _) = q_rows.shape, k.shape
    batch, group = cu_seqlens_k.numel() - 1, heads // key_heads
    if rows == 0 or tokens == 0 or batch == 0:
        return torch.zeros(tokens, dtype=torch.float32, device=k.device)
    attention = torch.empty(tokens, dtype=torch.float32, device=k.device)
    softmax = torch.empty(2, rows, heads, dtype=torch.float32, device=k.device)
    scale, options = softmax_scale * LOG2_E, _options(head_dim, group, k.dtype)
    with on_device(k.device):
        row_softmax_kernel[(rows, key_heads)](
            q_rows,
            k,
            cu_seqlens_q,
            cu_seqlens_k,
            row_position,
            *softmax,
            *strides(q_rows, k),
            scale,
            rows,
            tokens,
            batch,
            **options,
            BLOCK_M=max(triton.next_power_of_2(group), MIN_DOT),
        )
        # A sequence may have all keys: no length is read on the host, and a program without keys ends at once.
        attention_rows_kernel[(triton.cdiv(tokens, options["BLOCK_N"]) * batch,)](
            q_rows,
            k,
            cu_seqlens_q,
            cu_seqlens_k,
            row_position,
            *softmax,
            attention,
            *strides(q_rows, k),
            scale,
            rows,
            tokens,
            batch,
            key_heads,
            **options,
            BLOCK_M=MIN_DOT,
        )
    return attention
