# SPDX-License-Identifier: Apache-2.0
"""Importance, threshold and keep of one sequence, by one program: what the kernels of `scores` are made of.

Sums have one order, whatever kernel they are in: by BLOCK rows, and of logits by BLOCK_T rows and BLOCK_K columns.
"""

import triton
import triton.language as tl

from madtp_kernels.selection import ARGMAX_TEMPERATURE

LOG2_E = 1.4426950408889634
ARGMAX_SCALE = tl.constexpr(LOG2_E / ARGMAX_TEMPERATURE)


@triton.jit
def prunable_rows(p_protected, o_t, begin, end, summary_row):
    """Which rows of the batch are candidates of the sequence [begin, end)."""
    m_t = (o_t < end) & (o_t - begin != summary_row)
    if p_protected is not None:
        m_t = m_t & (tl.load(p_protected + o_t, mask=o_t < end, other=1) == 0)
    return m_t


@triton.jit
def _logits(p_logits, o_t, m_t, k, K: tl.constexpr, STRIDE: tl.constexpr, BLOCK_K: tl.constexpr):
    """(BLOCK_T, BLOCK_K) float32 from alignment token k on; -inf where masked or past K."""
    o_k = k + tl.arange(0, BLOCK_K)
    m_a = m_t[:, None] & (o_k < K)[None, :]
    return tl.load(p_logits + o_t[:, None] * STRIDE + o_k[None, :], mask=m_a, other=float("-inf")).to(tl.float32)


@triton.jit
def store_guidance(
    p_logits,
    p_guidance,  # (T,) fp32, out
    o_t,  # (BLOCK_T,) int64
    m_t,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The highest logit of rows o_t, at least 0; NaN where one is."""
    b_best = tl.full((BLOCK_T, BLOCK_K), float("-inf"), tl.float32)
    for k in range(0, K, BLOCK_K):
        b_a = _logits(p_logits, o_t, m_t, k, K, STRIDE, BLOCK_K)
        b_best = tl.maximum(b_best, b_a, propagate_nan=tl.PropagateNan.ALL)
    b_broken = tl.max((b_best != b_best).to(tl.int32), axis=1)  # tl.max drops NaN, the reference does not
    b_guidance = tl.maximum(tl.max(b_best, axis=1), 0.0)
    tl.store(p_guidance + o_t, tl.where(b_broken > 0, float("nan"), b_guidance), mask=m_t)


@triton.jit
def sequence_guidance(
    p_logits,
    p_guidance,
    begin,
    end,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Writes the guidance of one sequence."""
    for start in range(begin, end, BLOCK_T):
        o_t = start + tl.arange(0, BLOCK_T).to(tl.int64)
        store_guidance(p_logits, p_guidance, o_t, o_t < end, K, STRIDE, BLOCK_T, BLOCK_K)
    tl.debug_barrier()  # what one thread wrote others read


@triton.jit
def sequence_importance(
    p_summary_attention,
    p_received_attention,
    p_guidance,
    p_importance,  # (T,) fp32, out
    begin,
    end,
    summary_row,  # inside the sequence
    p_protected,  # or None
    BLOCK: tl.constexpr,
):
    """Writes the importance of one sequence."""
    b_received_sum = tl.zeros((BLOCK,), tl.float32)
    b_guidance_sum = tl.zeros((BLOCK,), tl.float32)
    for start in range(begin, end, BLOCK):
        o_t = start + tl.arange(0, BLOCK).to(tl.int64)
        m_t = prunable_rows(p_protected, o_t, begin, end, summary_row)
        b_received_sum += tl.load(p_received_attention + o_t, mask=m_t, other=0.0)
        b_guidance_sum += tl.load(p_guidance + o_t, mask=m_t, other=0.0)
    received_sum = tl.sum(b_received_sum)
    guidance_sum = tl.sum(b_guidance_sum)

    for start in range(begin, end, BLOCK):
        o_t = start + tl.arange(0, BLOCK).to(tl.int64)
        m_t = prunable_rows(p_protected, o_t, begin, end, summary_row)
        b_received = tl.load(p_received_attention + o_t, mask=m_t, other=0.0)
        b_guidance = tl.load(p_guidance + o_t, mask=m_t, other=0.0)
        b_received = tl.where(received_sum == 0, 0.0, b_received / received_sum)
        b_guidance = tl.where(guidance_sum == 0, 0.0, b_guidance / guidance_sum)
        b_s = (tl.load(p_summary_attention + o_t, mask=m_t, other=0.0) + b_received + b_guidance) / 3
        tl.store(p_importance + o_t, tl.where(m_t, b_s, 0.0), mask=o_t < end)
    tl.debug_barrier()


@triton.jit
def sequence_extremes(p_importance, begin, end, summary_row, p_protected, BLOCK: tl.constexpr):
    """The highest and the lowest importance of the candidates, how many there are, and 1 if one is not finite."""
    b_highest = tl.full((BLOCK,), float("-inf"), tl.float32)
    b_lowest = tl.full((BLOCK,), float("inf"), tl.float32)
    b_prunable = tl.zeros((BLOCK,), tl.int32)
    b_broken = tl.zeros((BLOCK,), tl.int32)
    for start in range(begin, end, BLOCK):
        o_t = start + tl.arange(0, BLOCK).to(tl.int64)
        m_t = prunable_rows(p_protected, o_t, begin, end, summary_row)
        b_s = tl.load(p_importance + o_t, mask=m_t, other=0.0)
        b_highest = tl.where(m_t, tl.maximum(b_highest, b_s), b_highest)
        b_lowest = tl.where(m_t, tl.minimum(b_lowest, b_s), b_lowest)
        b_prunable += m_t.to(tl.int32)
        b_broken = tl.where(tl.abs(b_s) < float("inf"), b_broken, 1)  # NaN too
    return tl.max(b_highest), tl.min(b_lowest), tl.sum(b_prunable), tl.max(b_broken)


@triton.jit
def sequence_threshold(
    p_importance,
    p_logits,
    highest,
    scale,
    begin,
    end,
    summary_row,
    p_protected,
    i_part,
    PARTS: tl.constexpr,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """max_k sum_j softmax_j(A_jk / tau) (highest - S_j) over every PARTS-th block of alignment tokens from block i_part
    on; NaN if a sum is.

    The maximum over j comes first, in a pass of its own: the second pass hits the cache and needs one exponential per
    logit, an online softmax needs two. Sums stay in BLOCK_T lanes until the end, so that there is one reduction per
    BLOCK_K alignment tokens.
    """
    threshold = tl.full((), float("-inf"), tl.float32)
    broken = tl.full((), 0, tl.int32)
    for k in range(i_part * BLOCK_K, K, PARTS * BLOCK_K):
        b_best = tl.full((BLOCK_T, BLOCK_K), float("-inf"), tl.float32)
        for start in range(begin, end, BLOCK_T):
            o_t = start + tl.arange(0, BLOCK_T).to(tl.int64)
            m_t = prunable_rows(p_protected, o_t, begin, end, summary_row)
            b_best = tl.maximum(b_best, _logits(p_logits, o_t, m_t, k, K, STRIDE, BLOCK_K))
        b_max = tl.max(b_best, axis=0)
        b_max = tl.where(b_max == float("-inf"), 0.0, b_max)  # -inf - -inf would be NaN on rows that do not exist

        b_weight = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
        b_weighted = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
        for start in range(begin, end, BLOCK_T):
            o_t = start + tl.arange(0, BLOCK_T).to(tl.int64)
            m_t = prunable_rows(p_protected, o_t, begin, end, summary_row)
            b_deficit = highest - tl.load(p_importance + o_t, mask=m_t, other=0.0)
            b_deficit = tl.where(m_t, b_deficit, 0.0)
            b_e = tl.exp2((_logits(p_logits, o_t, m_t, k, K, STRIDE, BLOCK_K) - b_max[None, :]) * scale)
            b_weight += b_e
            b_weighted += b_e * b_deficit[:, None]
        b_theta = tl.div_rn(tl.sum(b_weighted, axis=0), tl.sum(b_weight, axis=0))
        b_theta = tl.where(k + tl.arange(0, BLOCK_K) < K, b_theta, float("-inf"))
        broken = tl.maximum(broken, tl.max((b_theta != b_theta).to(tl.int32)))
        threshold = tl.maximum(threshold, tl.max(b_theta))
    return tl.where(broken > 0, float("nan"), threshold)


@triton.jit
def sequence_keep(
    p_importance,
    p_keep,
    p_count,
    p_pruned_importance,
    threshold,  # over all alignment tokens
    highest,
    lowest,
    prunable,
    broken,
    scale,
    i_b,
    begin,
    end,
    summary_row,
    p_protected,
    BLOCK: tl.constexpr,
):
    """Writes keep, the row count and the pruned importance of sequence i_b."""
    broken = tl.maximum(broken, (threshold != threshold).to(tl.int32))
    # As the reference lowers it. Scales are inverse to temperatures; div_rn so that equal ones give exactly 1.
    ratio = tl.div_rn(tl.full((), ARGMAX_SCALE, tl.float32), tl.maximum(scale, ARGMAX_SCALE).to(tl.float32))
    threshold += (1 - ratio) * (highest - lowest - threshold)

    b_pruned = tl.zeros((BLOCK,), tl.int32)
    b_pruned_importance = tl.zeros((BLOCK,), tl.float32)
    for start in range(begin, end, BLOCK):
        o_t = start + tl.arange(0, BLOCK).to(tl.int64)
        m_t = prunable_rows(p_protected, o_t, begin, end, summary_row)
        b_s = tl.load(p_importance + o_t, mask=m_t, other=0.0)
        m_pruned = m_t & (highest - b_s >= threshold)
        b_pruned += m_pruned.to(tl.int32)
        b_pruned_importance += tl.where(m_pruned, b_s, 0.0)
    pruned = tl.sum(b_pruned)
    everything = (scale == 0) | (broken > 0) | (prunable < 2) | (pruned < 2)
    tl.store(p_count + i_b, tl.where(everything, end - begin, end - begin - pruned + 1).to(tl.int32))
    tl.store(p_pruned_importance + i_b, tl.sum(b_pruned_importance))

    for start in range(begin, end, BLOCK):
        o_t = start + tl.arange(0, BLOCK).to(tl.int64)
        m_t = prunable_rows(p_protected, o_t, begin, end, summary_row)
        b_s = tl.load(p_importance + o_t, mask=m_t, other=0.0)
        m_pruned = m_t & (highest - b_s >= threshold)
        b_keep = tl.where(m_pruned, 0, 1) | everything.to(tl.int32)
        tl.store(p_keep + o_t, b_keep.to(tl.uint8), mask=o_t < end)
