"""Triton kernels of `token_importance` and `select_tokens`: one program per sequence.

Rows are read in blocks counted from the start of the sequence, so a result does not depend on the batch. Block sizes
depend on K only. Bound: the logits are read once from memory (T * K elements) and a second time, by `select_tokens`,
from cache; everything else is a few bytes per row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from madtp_kernels.triton.common import OPTIONS, PADDING, on_device, power_of_two, rows, sequence_bounds

LOG2_E = 1.4426950408889634
BLOCK_BYTES = 16384  # of logits
LAYOUT_ROWS = 1024


# --- kernels


@triton.jit
def _summary_row(p_summary_index, i_b):
    """The summary token's row inside its sequence; -1 is none."""
    row = tl.full((), 0, tl.int32)
    if p_summary_index is not None:
        row = tl.load(p_summary_index + i_b)
    return row


@triton.jit
def _logits(p_logits, o_t, m_t, k, K: tl.constexpr, STRIDE: tl.constexpr, BLOCK_K: tl.constexpr):
    """(BLOCK_T, BLOCK_K) float32 from alignment token k on; -inf where masked or past K."""
    o_k = k + tl.arange(0, BLOCK_K)
    m_a = m_t[:, None] & (o_k < K)[None, :]
    return tl.load(p_logits + o_t[:, None] * STRIDE + o_k[None, :], mask=m_a, other=float("-inf")).to(tl.float32)


@triton.jit(do_not_specialize=["T"])
def importance_kernel(
    p_summary,  # (T,) fp32
    p_received,  # (T,) fp32
    p_logits,  # (T, K), row stride STRIDE
    p_cu_seqlens,  # (B+1,) int32
    p_summary_index,  # (B,) int32 or None
    p_importance,  # (T,) fp32, out
    T,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    i_b = tl.program_id(0).to(tl.int64)
    begin, end = sequence_bounds(p_cu_seqlens, i_b, T)
    summary = _summary_row(p_summary_index, i_b)

    b_received_sum = tl.zeros((BLOCK_T,), tl.float32)
    b_guidance_sum = tl.zeros((BLOCK_T,), tl.float32)
    for start in range(begin, end, BLOCK_T):
        o_t = start + tl.arange(0, BLOCK_T).to(tl.int64)
        m_t = (o_t < end) & (o_t - begin != summary)
        b_best = tl.full((BLOCK_T, BLOCK_K), float("-inf"), tl.float32)
        for k in range(0, K, BLOCK_K):
            b_a = _logits(p_logits, o_t, m_t, k, K, STRIDE, BLOCK_K)
            b_best = tl.maximum(b_best, b_a, propagate_nan=tl.PropagateNan.ALL)
        b_broken = tl.max((b_best != b_best).to(tl.int32), axis=1)  # tl.max drops NaN, the reference does not
        b_guidance = tl.maximum(tl.max(b_best, axis=1), 0.0)
        b_guidance = tl.where(b_broken > 0, float("nan"), b_guidance)
        tl.store(p_importance + o_t, b_guidance, mask=m_t)
        b_received_sum += tl.load(p_received + o_t, mask=m_t, other=0.0)
        b_guidance_sum += b_guidance
    received_sum = tl.sum(b_received_sum)
    guidance_sum = tl.sum(b_guidance_sum)
    tl.debug_barrier()  # the guidance parked in p_importance is read back, perhaps by other threads

    for start in range(begin, end, BLOCK_T):
        o_t = start + tl.arange(0, BLOCK_T).to(tl.int64)
        m_t = (o_t < end) & (o_t - begin != summary)
        b_received = tl.load(p_received + o_t, mask=m_t, other=0.0)
        b_guidance = tl.load(p_importance + o_t, mask=m_t, other=0.0)
        b_received = tl.where(received_sum == 0, 0.0, b_received / received_sum)
        b_guidance = tl.where(guidance_sum == 0, 0.0, b_guidance / guidance_sum)
        b_s = (tl.load(p_summary + o_t, mask=m_t, other=0.0) + b_received + b_guidance) / 3
        tl.store(p_importance + o_t, tl.where(m_t, b_s, 0.0), mask=o_t < end)


@triton.jit(do_not_specialize=["T"])
def select_kernel(
    p_importance,  # (T,) fp32
    p_logits,  # (T, K), row stride STRIDE
    p_cu_seqlens,  # (B+1,) int32
    p_summary_index,  # (B,) int32 or None
    p_keep,  # (T,) uint8, out
    p_count,  # (B,) int32, out: rows of the sequence after pruning, the merged one included
    p_total,  # (B,) fp32, out: importance of the pruned tokens
    scale,  # log2(e) / tau, or 0: keep everything
    T,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    i_b = tl.program_id(0).to(tl.int64)
    begin, end = sequence_bounds(p_cu_seqlens, i_b, T)
    summary = _summary_row(p_summary_index, i_b)

    b_highest = tl.full((BLOCK_T,), float("-inf"), tl.float32)
    b_prunable = tl.zeros((BLOCK_T,), tl.int32)
    b_broken = tl.zeros((BLOCK_T,), tl.int32)
    for start in range(begin, end, BLOCK_T):
        o_t = start + tl.arange(0, BLOCK_T).to(tl.int64)
        m_t = (o_t < end) & (o_t - begin != summary)
        b_s = tl.load(p_importance + o_t, mask=m_t, other=0.0)
        b_highest = tl.where(m_t, tl.maximum(b_highest, b_s), b_highest)
        b_prunable += m_t.to(tl.int32)
        b_broken = tl.where(tl.abs(b_s) < float("inf"), b_broken, 1)  # NaN too
    highest = tl.max(b_highest)
    prunable = tl.sum(b_prunable)
    broken = tl.max(b_broken)

    # max_k sum_j softmax_j(A_jk / tau) (highest - S_j). The maximum over j comes first, in a pass of its own: the
    # second pass hits the cache and needs one exponential per logit, an online softmax needs two. Sums stay in BLOCK_T
    # lanes until the end, so that there is one reduction per BLOCK_K alignment tokens.
    threshold = tl.full((), float("-inf"), tl.float32)
    for k in range(0, K, BLOCK_K):
        b_best = tl.full((BLOCK_T, BLOCK_K), float("-inf"), tl.float32)
        for start in range(begin, end, BLOCK_T):
            o_t = start + tl.arange(0, BLOCK_T).to(tl.int64)
            m_t = (o_t < end) & (o_t - begin != summary)
            b_best = tl.maximum(b_best, _logits(p_logits, o_t, m_t, k, K, STRIDE, BLOCK_K))
        b_max = tl.max(b_best, axis=0)
        b_max = tl.where(b_max == float("-inf"), 0.0, b_max)  # -inf - -inf would be NaN on rows that do not exist

        b_weight = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
        b_weighted = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
        for start in range(begin, end, BLOCK_T):
            o_t = start + tl.arange(0, BLOCK_T).to(tl.int64)
            m_t = (o_t < end) & (o_t - begin != summary)
            b_deficit = highest - tl.load(p_importance + o_t, mask=m_t, other=0.0)
            b_deficit = tl.where(m_t, b_deficit, 0.0)
            b_e = tl.exp2((_logits(p_logits, o_t, m_t, k, K, STRIDE, BLOCK_K) - b_max[None, :]) * scale)
            b_weight += b_e
            b_weighted += b_e * b_deficit[:, None]
        b_theta = tl.div_rn(tl.sum(b_weighted, axis=0), tl.sum(b_weight, axis=0))
        b_theta = tl.where(k + tl.arange(0, BLOCK_K) < K, b_theta, float("-inf"))
        broken = tl.maximum(broken, tl.max((b_theta != b_theta).to(tl.int32)))
        threshold = tl.maximum(threshold, tl.max(b_theta))

    b_pruned = tl.zeros((BLOCK_T,), tl.int32)
    b_total = tl.zeros((BLOCK_T,), tl.float32)
    for start in range(begin, end, BLOCK_T):
        o_t = start + tl.arange(0, BLOCK_T).to(tl.int64)
        m_t = (o_t < end) & (o_t - begin != summary)
        b_s = tl.load(p_importance + o_t, mask=m_t, other=0.0)
        m_pruned = m_t & (highest - b_s >= threshold)
        b_pruned += m_pruned.to(tl.int32)
        b_total += tl.where(m_pruned, b_s, 0.0)
    pruned = tl.sum(b_pruned)
    everything = (scale == 0) | (broken > 0) | (prunable < 2) | (pruned < 2)
    tl.store(p_count + i_b, tl.where(everything, end - begin, end - begin - pruned + 1).to(tl.int32))
    tl.store(p_total + i_b, tl.sum(b_total))

    for start in range(begin, end, BLOCK_T):
        o_t = start + tl.arange(0, BLOCK_T).to(tl.int64)
        m_t = (o_t < end) & (o_t - begin != summary)
        b_s = tl.load(p_importance + o_t, mask=m_t, other=0.0)
        m_pruned = m_t & (highest - b_s >= threshold)
        b_keep = tl.where(m_pruned, 0, 1) | everything.to(tl.int32)
        tl.store(p_keep + o_t, b_keep.to(tl.uint8), mask=o_t < end)


@triton.jit(do_not_specialize=["T", "B"])
def layout_kernel(
    p_importance,  # (T,) fp32
    p_keep,  # (T,) uint8
    p_cu_seqlens,  # (B+1,) int32
    p_count,  # (B,) int32
    p_total,  # (B,) fp32
    p_cu_seqlens_out,  # (B+1,) int32, out
    p_source,  # (T,) int32, out
    p_merge_weight,  # (T,) fp32, out
    T,
    B,
    BLOCK: tl.constexpr,
):
    i_b = tl.program_id(0).to(tl.int64)
    # Every program sums the counts itself: cheaper than a launch for a prefix sum.
    b_before = tl.zeros((BLOCK,), tl.int64)
    b_rows = tl.zeros((BLOCK,), tl.int64)
    for first in range(0, B, BLOCK):
        o_b = first + tl.arange(0, BLOCK)
        b_count = tl.load(p_count + o_b, mask=o_b < B, other=0).to(tl.int64)
        b_rows += b_count
        b_before += tl.where(o_b < i_b, b_count, 0)
    before = tl.sum(b_before)
    total_rows = tl.minimum(tl.sum(b_rows), T)
    if i_b == 0:
        tl.store(p_cu_seqlens_out, 0)

    if i_b < B:  # there is one program even without sequences: source has to be filled
        begin, end = sequence_bounds(p_cu_seqlens, i_b, T)
        count = tl.load(p_count + i_b)
        total = tl.load(p_total + i_b)
        tl.store(p_cu_seqlens_out + i_b + 1, tl.minimum(before + count, T).to(tl.int32))
        pruned = end - begin - count + 1  # means something where a row was pruned only
        row = before
        for start in range(begin, end, BLOCK):
            o_t = start + tl.arange(0, BLOCK).to(tl.int64)
            m_t = o_t < end
            b_keep = tl.load(p_keep + o_t, mask=m_t, other=0).to(tl.int32)
            o_row = row + tl.cumsum(b_keep, axis=0) - b_keep
            tl.store(p_source + o_row, o_t.to(tl.int32), mask=m_t & (b_keep != 0) & (o_row < T))
            row += tl.sum(b_keep)
            b_s = tl.load(p_importance + o_t, mask=m_t, other=0.0)
            b_weight = tl.where(total > 0, b_s / total, 1.0 / pruned.to(tl.float32))
            tl.store(p_merge_weight + o_t, tl.where(b_keep != 0, 0.0, b_weight), mask=m_t)
        if (count < end - begin) & (row < T):
            tl.store(p_source + row, (-(i_b + 1)).to(tl.int32))

    programs = tl.num_programs(0).to(tl.int64)
    for start in range(total_rows + i_b * BLOCK, T, programs * BLOCK):
        o_row = start + tl.arange(0, BLOCK).to(tl.int64)
        tl.store(p_source + o_row, tl.full((BLOCK,), PADDING, tl.int32), mask=o_row < T)


# --- launchers


def _blocks(mag_logits: Tensor) -> dict[str, int]:
    """K and its stride are compile-time: K = 100 then still loads 4 logits at a time, and one block needs no loop."""
    alignment_tokens = mag_logits.shape[1]
    block_k = power_of_two(alignment_tokens, 16, 128)
    return {
        "K": alignment_tokens,
        "STRIDE": mag_logits.stride(0),
        "BLOCK_T": min(BLOCK_BYTES // (block_k * mag_logits.element_size()), 256),
        "BLOCK_K": block_k,
        **OPTIONS,
        "num_warps": 8,
    }


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def token_importance(
    summary: Tensor,  # (T,) fp32
    received: Tensor,  # (T,) fp32
    mag_logits: Tensor,  # (T, K)
    cu_seqlens: Tensor,  # (B+1,) int32
    summary_index: Tensor | None = None,  # (B,) int32
) -> Tensor:  # (T,) fp32
    """As `reference.tokens.token_importance`; what the summary token itself received has no influence."""
    mag_logits = rows(mag_logits)
    importance = torch.empty(summary.shape, dtype=summary.dtype, device=summary.device)
    batch = cu_seqlens.numel() - 1
    if batch > 0:
        with on_device(summary.device):
            importance_kernel[(batch,)](
                summary.contiguous(),
                received.contiguous(),
                mag_logits,
                cu_seqlens.contiguous(),
                _contiguous(summary_index),
                importance,
                summary.shape[0],
                **_blocks(mag_logits),
            )
    return importance


def select_tokens(
    importance: Tensor,  # (T,) fp32
    mag_logits: Tensor,  # (T, K)
    cu_seqlens: Tensor,  # (B+1,) int32
    temperature: float,
    summary_index: Tensor | None = None,  # (B,) int32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> keep (T,) bool, cu_seqlens of the output (B+1,) int32, source (T,) int32, merge_weight (T,) fp32."""
    importance, mag_logits, cu_seqlens = importance.contiguous(), rows(mag_logits), cu_seqlens.contiguous()
    length, batch, device = importance.shape[0], cu_seqlens.numel() - 1, importance.device
    # A tiny tau would make the scale infinite and 0 * inf NaN, a huge one would make it 0 and -inf * 0 NaN.
    limits = torch.finfo(torch.float32)
    scale = min(max(LOG2_E / temperature, limits.tiny), limits.max) if temperature != 0 else 0.0

    keep = torch.empty(length, dtype=torch.bool, device=device)
    count = torch.empty(batch, dtype=torch.int32, device=device)
    total = torch.empty(batch, dtype=torch.float32, device=device)
    cu_seqlens_out = torch.empty(batch + 1, dtype=torch.int32, device=device)
    source = torch.empty(length, dtype=torch.int32, device=device)
    merge_weight = torch.empty(length, dtype=torch.float32, device=device)
    keep_bytes = keep.view(torch.uint8)
    with on_device(device):
        if batch > 0:
            select_kernel[(batch,)](
                importance,
                mag_logits,
                cu_seqlens,
                _contiguous(summary_index),
                keep_bytes,
                count,
                total,
                scale,
                length,
                **_blocks(mag_logits),
            )
        layout_kernel[(max(batch, 1),)](
            importance,
            keep_bytes,
            cu_seqlens,
            count,
            total,
            cu_seqlens_out,
            source,
            merge_weight,
            length,
            batch,
            BLOCK=LAYOUT_ROWS,
            **OPTIONS,
        )
    return keep, cu_seqlens_out, source, merge_weight
