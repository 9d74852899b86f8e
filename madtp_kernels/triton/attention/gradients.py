# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of dQ, dK and dV of `varlen_attention`.

P is recomputed from the log-sum-exp, dS = P (dP - delta). One kernel per block of keys sums dK and dV over the queries
of all heads that read them, one per block of queries sums dQ over the keys, so nothing is added atomically. What comes
through P[h,s,j] and the head maximum is added to dP where it belongs. The kernels take their arguments in the groups
defined here.
Bound: seven matrix products of the size of Q K^T, with the registers for one or two programs an SM.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from madtp_kernels.triton.attention.masks import keys_of, queries_of, right_of, visible
from madtp_kernels.triton.attention.scores import capped, load_lse, slant, slope_of, uncapped
from madtp_kernels.triton.attention.tiles import (
    dims,
    eights,
    head_tile,
    load_tile,
    program_of,
    sequence_rows,
    store_tile,
    summary_row_or_none,
    zero_tail,
)
from madtp_kernels.triton.common import OPTIONS

# --- groups of arguments: tensors for the launcher, pointers in the kernels


class Inputs(NamedTuple):
    q: Tensor  # (Tq, H, D)
    k: Tensor  # (Tk, Hk, D)
    v: Tensor  # (Tk, Hk, D)
    d_out: Tensor  # (Tq, H, D)
    lse: Tensor  # (H, Tq) fp32
    delta: Tensor  # (H, Tq) fp32
    cu_seqlens_q: Tensor  # (B+1,) int32
    cu_seqlens_k: Tensor  # (B+1,) int32


class StatisticGradients(NamedTuple):
    """What reaches dP through the statistics of self-attention."""

    summary_index: Tensor | None  # (B,) int32
    head: Tensor  # (T, slab) uint8: first head of the maximum of key j and query slab_begin + column
    through: Tensor  # (H, T) fp32: gradient of P[h,s,j] through `summary_attention`
    d_maximum: Tensor  # (T,) fp32: gradient of max_h P[h,i,j], the same for all counted queries


class Strides(NamedTuple):
    """Elements between rows and between heads."""

    q_row: int
    q_head: int
    k_row: int
    k_head: int
    v_row: int
    v_head: int
    d_out_row: int
    d_out_head: int


class Sizes(NamedTuple):
    """What differs from batch to batch, so that kernels are not specialised on it."""

    Tq: int
    Tk: int
    H: int
    B: int
    max_seqlen_q: int
    max_seqlen_k: int
    slab_begin: int


# --- kernels


@triton.jit(do_not_specialize=["sizes", "left", "right"])
def key_gradient_kernel(
    inputs,  # Inputs
    statistics,  # StatisticGradients, or None
    p_dk,  # (Tk, H / GROUP, D) contiguous, out
    p_dv,  # (Tk, H / GROUP, D) contiguous, out
    strides,  # Strides
    sizes,  # Sizes
    slab,
    softmax_scale,
    scale,
    bias,  # Bias or None
    left,
    right,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
    CAUSAL: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """dK and dV of one block of keys of one key head, head by head of those that read it, from the queries of one slab.

    ACCUMULATE: added to what is there.
    """
    p_q, p_k, p_v, p_d_out, p_lse, p_delta, p_cu_seqlens_q, p_cu_seqlens_k = inputs
    Tq, Tk, H, B, max_seqlen_q, max_seqlen_k, slab_begin = sizes
    key_heads = H // GROUP
    zero_tail(p_dk, p_cu_seqlens_k, B, Tk, key_heads * D)
    zero_tail(p_dv, p_cu_seqlens_k, B, Tk, key_heads * D)
    i_n, i_key_head, i_b = program_of(tl.cdiv(max_seqlen_k, BLOCK_N), key_heads)
    begin, n_q = sequence_rows(p_cu_seqlens_q, i_b, Tq, max_seqlen_q)
    first, n_k = sequence_rows(p_cu_seqlens_k, i_b, Tk, max_seqlen_k)
    if i_n * BLOCK_N >= n_k:
        return
    if ACCUMULATE:
        if slab_begin >= n_q:
            return

    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < n_k
    row = first + i_n * BLOCK_N
    b_k = load_tile(
        p_k + i_key_head.to(tl.int64) * eights(strides.k_head, D), row, strides.k_row, m_n, BLOCK_N, D, BLOCK_D
    )
    b_v = load_tile(
        p_v + i_key_head.to(tl.int64) * eights(strides.v_head, D), row, strides.v_row, m_n, BLOCK_N, D, BLOCK_D
    )
    if statistics is not None:
        p_summary_index, p_head, p_through, p_d_maximum = statistics
        summary_row = summary_row_or_none(p_summary_index, i_b, n_q)
        b_d_maximum = tl.load(p_d_maximum + first + o_n, mask=m_n, other=0.0)
    b_dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    b_dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    right = right_of(right, CAUSAL)
    shift = n_k - n_q
    slab_end = tl.minimum(n_q, slab_begin + slab)
    earliest, end = queries_of(i_n * BLOCK_N, shift, slab_begin, slab_end, left, right, BLOCK_M, BLOCK_N)
    for i_group in range(GROUP):
        i_h = i_key_head * GROUP + i_group
        p_q_head = p_q + i_h.to(tl.int64) * eights(strides.q_head, D)
        p_d_out_head = p_d_out + i_h.to(tl.int64) * eights(strides.d_out_head, D)
        o_head = i_h.to(tl.int64) * Tq + begin
        slope = slope_of(bias, i_b, i_h)
        if statistics is not None:
            b_through = tl.load(p_through + o_head + o_n, mask=m_n, other=0.0)
        for start in range(earliest, end, BLOCK_M):
            o_m = start + tl.arange(0, BLOCK_M)
            m_m = o_m < n_q
            b_q = load_tile(p_q_head, begin + start, strides.q_row, m_m, BLOCK_M, D, BLOCK_D)
            b_d_out = load_tile(p_d_out_head, begin + start, strides.d_out_row, m_m, BLOCK_M, D, BLOCK_D)
            b_lse = load_lse(p_lse, o_head + o_m, m_m, float("inf"))  # queries that do not exist: P = 0
            b_delta = tl.load(p_delta + o_head + o_m, mask=m_m, other=0.0)
            b_s = capped(tl.dot(b_k, tl.trans(b_q), input_precision="ieee"), bias)
            b_p = tl.exp2(slant(b_s * scale, slope, o_m[None, :] + shift, o_n[:, None]) - b_lse[None, :])
            if left is not None or right is not None:
                b_p = tl.where(visible(None, o_m[None, :] + shift, o_n[:, None], left, right), b_p, 0.0)
            b_dv = tl.dot(b_p.to(b_d_out.dtype), b_d_out, b_dv, input_precision="ieee")
            b_dp = tl.dot(b_v, tl.trans(b_d_out), input_precision="ieee")
            if statistics is not None:
                p_tile = head_tile(p_head, row, start - slab_begin, slab, BLOCK_N, BLOCK_M)
                b_best = tl.load(p_tile, mask=m_n[:, None] & m_m[None, :], other=255)
                b_dp += tl.where(b_best.to(tl.int32) == i_h, b_d_maximum[:, None], 0.0)
                b_dp += tl.where(o_m[None, :] == summary_row, b_through[:, None], 0.0)
            b_ds = uncapped(b_p * (b_dp - b_delta[None, :]), b_s, bias)
            b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision="ieee")
    b_dk *= softmax_scale
    o_key_head = i_key_head * D
    if ACCUMULATE:
        b_dk += load_tile(p_dk + o_key_head, row, key_heads * D, m_n, BLOCK_N, D, BLOCK_D)
        b_dv += load_tile(p_dv + o_key_head, row, key_heads * D, m_n, BLOCK_N, D, BLOCK_D)
    store_tile(p_dk + o_key_head, row, key_heads * D, m_n, b_dk, BLOCK_N, D, BLOCK_D)
    store_tile(p_dv + o_key_head, row, key_heads * D, m_n, b_dv, BLOCK_N, D, BLOCK_D)


@triton.jit
def _add_keys(
    b_dq,  # (BLOCK_M, BLOCK_D) fp32
    queries,  # b_q and b_d_out (BLOCK_M, BLOCK_D), b_lse and b_delta (BLOCK_M,) fp32, o_m and m_m (BLOCK_M,), shift
    keys,  # p_k and p_v of the head, their row strides, the sequence's first row and number of keys
    heads,  # p_head, p_through of the head, p_d_maximum, i_h, summary_row, column of the first query, slab; or None
    start,
    scale,
    bias,  # these two apart: triton 3.6 makes no tuple that holds None
    slope,
    left,
    right,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    """dQ from one block of keys; unless MASKED every query sees every key of it."""
    b_q, b_d_out, b_lse, b_delta, o_m, m_m, shift = queries
    p_k, p_v, k_row, v_row, first, n = keys
    o_p = o_m + shift
    o_n = start + tl.arange(0, BLOCK_N)
    m_n = o_n < n if MASKED else None
    b_k = load_tile(p_k, first + start, k_row, m_n, BLOCK_N, D, BLOCK_D)
    b_v = load_tile(p_v, first + start, v_row, m_n, BLOCK_N, D, BLOCK_D)
    b_s = capped(tl.dot(b_q, tl.trans(b_k), input_precision="ieee"), bias)
    b_p = tl.exp2(slant(b_s * scale, slope, o_p[:, None], o_n[None, :]) - b_lse[:, None])
    if MASKED:
        m_pairs = m_n[None, :]  # type: ignore[index]  # MASKED: it is not None
        b_p = tl.where(visible(m_pairs, o_p[:, None], o_n[None, :], left, right), b_p, 0.0)
    b_dp = tl.dot(b_d_out, tl.trans(b_v), input_precision="ieee")
    if heads is not None:
        p_head, p_through, p_d_maximum, i_h, summary_row, column, slab = heads
        m_n = o_n < n
        p_tile = tl.trans(head_tile(p_head, first + start, column, slab, BLOCK_N, BLOCK_M))
        b_best = tl.load(p_tile, mask=m_m[:, None] & m_n[None, :], other=255)
        b_d_maximum = tl.load(p_d_maximum + first + o_n, mask=m_n, other=0.0)
        b_dp += tl.where(b_best.to(tl.int32) == i_h, b_d_maximum[None, :], 0.0)
        b_through = tl.load(p_through + first + o_n, mask=m_n, other=0.0)
        b_dp += tl.where(o_m[:, None] == summary_row, b_through[None, :], 0.0)
    b_ds = uncapped(b_p * (b_dp - b_delta[:, None]), b_s, bias)
    return tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision="ieee")


@triton.jit(do_not_specialize=["sizes", "left", "right"])
def query_gradient_kernel(
    inputs,  # Inputs
    statistics,  # StatisticGradients, or None
    p_dq,  # (Tq, H, D) contiguous, out
    strides,  # Strides
    sizes,  # Sizes
    slab,
    softmax_scale,
    scale,
    bias,  # Bias or None
    left,
    right,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """dQ of one block of queries of one head."""
    p_q, p_k, p_v, p_d_out, p_lse, p_delta, p_cu_seqlens_q, p_cu_seqlens_k = inputs
    Tq, Tk, H, B, max_seqlen_q, max_seqlen_k, slab_begin = sizes
    zero_tail(p_dq, p_cu_seqlens_q, B, Tq, H * D)
    i_m, i_h, i_b = program_of(tl.cdiv(tl.minimum(max_seqlen_q - slab_begin, slab), BLOCK_M), H)
    begin, n_q = sequence_rows(p_cu_seqlens_q, i_b, Tq, max_seqlen_q)
    first, n_k = sequence_rows(p_cu_seqlens_k, i_b, Tk, max_seqlen_k)
    top = slab_begin + i_m * BLOCK_M
    if top >= n_q:
        return

    o_m = top + tl.arange(0, BLOCK_M)
    m_m = o_m < n_q
    p_k += (i_h // GROUP).to(tl.int64) * eights(strides.k_head, D)
    p_v += (i_h // GROUP).to(tl.int64) * eights(strides.v_head, D)
    p_q += i_h.to(tl.int64) * eights(strides.q_head, D)
    p_d_out += i_h.to(tl.int64) * eights(strides.d_out_head, D)
    o_head = i_h.to(tl.int64) * Tq
    heads = None
    if statistics is not None:
        p_summary_index, p_head, p_through, p_d_maximum = statistics
        summary_row = summary_row_or_none(p_summary_index, i_b, n_q)
        heads = (p_head, p_through + o_head, p_d_maximum, i_h, summary_row, i_m * BLOCK_M, slab)
    b_q = load_tile(p_q, begin + top, strides.q_row, m_m, BLOCK_M, D, BLOCK_D)
    b_d_out = load_tile(p_d_out, begin + top, strides.d_out_row, m_m, BLOCK_M, D, BLOCK_D)
    b_lse = load_lse(p_lse, o_head + begin + o_m, m_m, 0.0)
    b_delta = tl.load(p_delta + o_head + begin + o_m, mask=m_m, other=0.0)
    b_dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    right = right_of(right, CAUSAL)
    shift = n_k - n_q
    begin_n, whole, edge, end = keys_of(top, shift, n_k, left, right, BLOCK_M, BLOCK_N)
    queries = (b_q, b_d_out, b_lse, b_delta, o_m, m_m, shift)
    keys = (p_k, p_v, strides.k_row, strides.v_row, first, end)
    slope = slope_of(bias, i_b, i_h)
    if left is not None:
        for start in range(begin_n, whole, BLOCK_N):
            b_dq = _add_keys(
                b_dq, queries, keys, heads, start, scale, bias, slope, left, right, D, BLOCK_D, BLOCK_M, BLOCK_N, True
            )  # fmt: skip
    for start in range(whole, edge, BLOCK_N):
        b_dq = _add_keys(
            b_dq, queries, keys, heads, start, scale, bias, slope, left, right, D, BLOCK_D, BLOCK_M, BLOCK_N, False
        )  # fmt: skip
    for start in range(edge, end, BLOCK_N):
        b_dq = _add_keys(
            b_dq, queries, keys, heads, start, scale, bias, slope, left, right, D, BLOCK_D, BLOCK_M, BLOCK_N, True
        )  # fmt: skip
    store_tile(p_dq + i_h * D, begin + top, H * D, m_m, b_dq * softmax_scale, BLOCK_M, D, BLOCK_D)


# --- launcher


def _key_blocks(head_dim: int, dtype: torch.dtype, crowded: bool) -> dict[str, int]:
    if dtype == torch.float32:
        return {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4 if head_dim <= 128 else 8, "num_stages": 1}
    if head_dim > 128:
        return {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1}
    return {"BLOCK_M": 32, "BLOCK_N": 128 if head_dim <= 64 and not crowded else 64, "num_warps": 8, "num_stages": 2}


def _query_blocks(head_dim: int, dtype: torch.dtype, crowded: bool) -> dict[str, int]:
    if dtype == torch.float32:
        return {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 8 if head_dim <= 128 else 16, "num_stages": 1}
    if head_dim > 128:
        return {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1}
    return {"BLOCK_M": 128 if head_dim <= 64 and not crowded else 64, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2}


def launch_gradients(
    inputs: Inputs,
    statistics: StatisticGradients | None,
    grads: tuple[Tensor, Tensor, Tensor],  # dq (Tq, H, D), dk, dv (Tk, Hk, D), out
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    score: dict[str, Any],  # of `scoring`
    mask: dict[str, Any],  # of `masking`
    slab_begin: int,
    slab: int,
) -> None:
    """dq of the queries of one slab, and what they add to dk and dv."""
    q, k, v, d_out = inputs[:4]
    (rows, head_count, head_dim), batch = q.shape, inputs.cu_seqlens_q.numel() - 1
    strides = Strides(*(stride for x in (q, k, v, d_out) for stride in x.stride()[:2]))
    sizes = Sizes(rows, k.shape[0], head_count, batch, max_seqlen_q, max_seqlen_k, slab_begin)
    key_heads = k.shape[1]
    shared = {
        "strides": strides,
        "sizes": sizes,
        "slab": slab,
        "softmax_scale": softmax_scale,
        **score,
        **mask,
        **dims(head_dim),
        "GROUP": head_count // key_heads,
    }
    dq, dk, dv = grads
    options = head_count > key_heads or any(x is not None for x in (score["bias"], mask["left"], mask["right"]))
    crowded = statistics is not None and options  # of registers
    blocks = _key_blocks(head_dim, q.dtype, crowded)
    key_gradient_kernel[(triton.cdiv(max_seqlen_k, blocks["BLOCK_N"]) * key_heads * batch,)](
        inputs, statistics, dk, dv, **shared, ACCUMULATE=slab_begin > 0, **OPTIONS | blocks
    )
    blocks = _query_blocks(head_dim, q.dtype, crowded)
    slab_rows = min(max_seqlen_q - slab_begin, slab)
    query_gradient_kernel[(triton.cdiv(slab_rows, blocks["BLOCK_M"]) * head_count * batch,)](
        inputs, statistics, dq, **shared, **OPTIONS | blocks
    )
