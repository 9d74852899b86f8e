# SPDX-License-Identifier: Apache-2.0
"""The layout of a selection from its keep mask: one program per sequence, whatever its length."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from madtp_kernels.triton.common import OPTIONS, PADDING, on_device, sequence_bounds

BLOCK_ROWS = 1024


@triton.jit(do_not_specialize=["T", "B"])
def layout_kernel(
    p_importance,  # (T,) fp32
    p_keep,  # (T,) uint8
    p_cu_seqlens,  # (B+1,) int32
    p_count,  # (B,) int32
    p_pruned_importance,  # (B,) fp32
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
    b_num_rows = tl.zeros((BLOCK,), tl.int64)
    for first in range(0, B, BLOCK):
        o_b = first + tl.arange(0, BLOCK)
        b_count = tl.load(p_count + o_b, mask=o_b < B, other=0).to(tl.int64)
        b_num_rows += b_count
        b_before += tl.where(o_b < i_b, b_count, 0)
    before = tl.sum(b_before)
    num_rows = tl.minimum(tl.sum(b_num_rows), T)
    if i_b == 0:
        tl.store(p_cu_seqlens_out, 0)

    if i_b < B:  # there is one program even without sequences: source has to be filled
        begin, end = sequence_bounds(p_cu_seqlens, i_b, T)
        count = tl.load(p_count + i_b)
        pruned_importance = tl.load(p_pruned_importance + i_b)
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
            b_weight = tl.where(pruned_importance > 0, b_s / pruned_importance, 1.0 / pruned.to(tl.float32))
            tl.store(p_merge_weight + o_t, tl.where(b_keep != 0, 0.0, b_weight), mask=m_t)
        if (count < end - begin) & (row < T):
            tl.store(p_source + row, (-(i_b + 1)).to(tl.int32))

    programs = tl.num_programs(0).to(tl.int64)
    for start in range(num_rows + i_b * BLOCK, T, programs * BLOCK):
        o_row = start + tl.arange(0, BLOCK).to(tl.int64)
        tl.store(p_source + o_row, tl.full((BLOCK,), PADDING, tl.int32), mask=o_row < T)


def layout(
    importance: Tensor,  # (T,) fp32
    keep: Tensor,  # (T,) bool
    cu_seqlens: Tensor,  # (B+1,) int32
    count: Tensor,  # (B,) int32: rows of the sequence after pruning, the merged one included
    pruned_importance: Tensor,  # (B,) fp32: its sum over the pruned tokens
) -> tuple[Tensor, Tensor, Tensor]:
    """-> cu_seqlens_out (B+1,) int32, source (T,) int32, merge_weight (T,) fp32."""
    length, batch, device = importance.shape[0], count.shape[0], importance.device
    cu_seqlens_out = torch.empty(batch + 1, dtype=torch.int32, device=device)
    source = torch.empty(length, dtype=torch.int32, device=device)
    merge_weight = torch.empty(length, dtype=torch.float32, device=device)
    with on_device(device):
        layout_kernel[(max(batch, 1),)](
            importance,
            keep.view(torch.uint8),
            cu_seqlens,
            count,
            pruned_importance,
            cu_seqlens_out,
            source,
            merge_weight,
            length,
            batch,
            BLOCK=BLOCK_ROWS,
            **OPTIONS,
        )
    return cu_seqlens_out, source, merge_weight
