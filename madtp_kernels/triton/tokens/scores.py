# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of `token_importance`, `select_tokens` and `score_and_select`: one program per sequence.

Rows are read in blocks counted from the start of the sequence, so a result does not depend on the batch. Block sizes
depend on K only. Bound: the logits are read once from memory (T * K elements) and from cache after that; everything
else is a few bytes per row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from madtp_kernels.triton.common import OPTIONS, load_summary_row, on_device, power_of_two, rows, sequence_bounds
from madtp_kernels.triton.tokens.layout import layout
from madtp_kernels.triton.tokens.sequence import LOG2_E, sequence_importance, sequence_keep

BLOCK_BYTES = 16384  # of logits


# --- kernels


@triton.jit(do_not_specialize=["T"])
def importance_kernel(
    p_summary_attention,  # (T,) fp32
    p_received_attention,  # (T,) fp32
    p_logits,  # (T, K), row stride STRIDE
    p_cu_seqlens,  # (B+1,) int32
    p_summary_index,  # (B,) int32 or None
    p_protected,  # (T,) uint8 or None
    p_importance,  # (T,) fp32, out
    T,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    i_b = tl.program_id(0).to(tl.int64)
    begin, end = sequence_bounds(p_cu_seqlens, i_b, T)
    summary_row = load_summary_row(p_summary_index, i_b)
    sequence_importance(
        p_summary_attention, p_received_attention, p_logits, p_importance, begin, end, summary_row,
        p_protected, K, STRIDE, BLOCK_T, BLOCK_K,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T"])
def select_kernel(
    p_importance,  # (T,) fp32
    p_logits,  # (T, K), row stride STRIDE
    p_cu_seqlens,  # (B+1,) int32
    p_summary_index,  # (B,) int32 or None
    p_protected,  # (T,) uint8 or None
    p_keep,  # (T,) uint8, out
    p_count,  # (B,) int32, out: rows of the sequence after pruning, the merged one included
    p_pruned_importance,  # (B,) fp32, out: its sum over the pruned tokens
    scale,  # log2(e) / tau, or 0: keep everything
    T,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    i_b = tl.program_id(0).to(tl.int64)
    begin, end = sequence_bounds(p_cu_seqlens, i_b, T)
    summary_row = load_summary_row(p_summary_index, i_b)
    sequence_keep(
        p_importance, p_logits, p_keep, p_count, p_pruned_importance, scale, i_b, begin, end, summary_row,
        p_protected, K, STRIDE, BLOCK_T, BLOCK_K,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T"])
def score_and_select_kernel(
    p_summary_attention,  # (T,) fp32
    p_received_attention,  # (T,) fp32
    p_logits,  # (T, K), row stride STRIDE
    p_cu_seqlens,  # (B+1,) int32
    p_summary_index,  # (B,) int32 or None
    p_protected,  # (T,) uint8 or None
    p_importance,  # (T,) fp32, out
    p_keep,  # (T,) uint8, out
    p_count,  # (B,) int32, out
    p_pruned_importance,  # (B,) fp32, out
    scale,  # log2(e) / tau, or 0: keep everything
    T,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    i_b = tl.program_id(0).to(tl.int64)
    begin, end = sequence_bounds(p_cu_seqlens, i_b, T)
    summary_row = load_summary_row(p_summary_index, i_b)
    sequence_importance(
        p_summary_attention, p_received_attention, p_logits, p_importance, begin, end, summary_row,
        p_protected, K, STRIDE, BLOCK_T, BLOCK_K,
    )  # fmt: skip
    tl.debug_barrier()  # what one thread wrote others read
    sequence_keep(
        p_importance, p_logits, p_keep, p_count, p_pruned_importance, scale, i_b, begin, end, summary_row,
        p_protected, K, STRIDE, BLOCK_T, BLOCK_K,
    )  # fmt: skip


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


def _as_bytes(protected: Tensor | None) -> Tensor | None:
    return None if protected is None else protected.contiguous().view(torch.uint8)


def token_importance(
    summary_attention: Tensor,  # (T,) fp32
    received_attention: Tensor,  # (T,) fp32
    mag_logits: Tensor,  # (T, K)
    cu_seqlens: Tensor,  # (B+1,) int32
    summary_index: Tensor | None = None,  # (B,) int32
    protected: Tensor | None = None,  # (T,) bool
) -> Tensor:  # (T,) fp32
    """As `reference.tokens.token_importance`; what rows that are no candidates receive has no influence."""
    mag_logits = rows(mag_logits)
    importance = torch.empty(summary_attention.shape, dtype=torch.float32, device=summary_attention.device)
    batch = cu_seqlens.numel() - 1
    if batch > 0:
        with on_device(summary_attention.device):
            importance_kernel[(batch,)](
                summary_attention.contiguous(),
                received_attention.contiguous(),
                mag_logits,
                cu_seqlens.contiguous(),
                _contiguous(summary_index),
                _as_bytes(protected),
                importance,
                summary_attention.shape[0],
                **_blocks(mag_logits),
            )
    return importance


def _scale(temperature: float) -> float:
    """log2(e) / tau, 0 where nothing is pruned. A tiny tau must not give 0 * inf, nor a huge one -inf * 0."""
    limits = torch.finfo(torch.float32)
    return min(max(LOG2_E / temperature, limits.tiny), limits.max) if temperature != 0 else 0.0


def _kept(importance: Tensor, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """keep (T,) bool, count (B,) int32 and pruned_importance (B,) fp32, to be written."""
    device = importance.device
    return (
        torch.empty(importance.shape, dtype=torch.bool, device=device),
        torch.empty(batch, dtype=torch.int32, device=device),
        torch.empty(batch, dtype=torch.float32, device=device),
    )


def select_tokens(
    importance: Tensor,  # (T,) fp32
    mag_logits: Tensor,  # (T, K)
    cu_seqlens: Tensor,  # (B+1,) int32
    temperature: float,
    summary_index: Tensor | None = None,  # (B,) int32
    protected: Tensor | None = None,  # (T,) bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> keep (T,) bool, cu_seqlens_out (B+1,) int32, source (T,) int32, merge_weight (T,) fp32."""
    importance, mag_logits, cu_seqlens = importance.contiguous(), rows(mag_logits), cu_seqlens.contiguous()
    batch = cu_seqlens.numel() - 1
    keep, count, pruned_importance = _kept(importance, batch)
    if batch > 0:
        with on_device(importance.device):
            select_kernel[(batch,)](
                importance,
                mag_logits,
                cu_seqlens,
                _contiguous(summary_index),
                _as_bytes(protected),
                keep.view(torch.uint8),
                count,
                pruned_importance,
                _scale(temperature),
                importance.shape[0],
                **_blocks(mag_logits),
            )
    return keep, *layout(importance, keep, cu_seqlens, count, pruned_importance)


def score_and_select(
    summary_attention: Tensor,  # (T,) fp32
    received_attention: Tensor,  # (T,) fp32
    mag_logits: Tensor,  # (T, K)
    cu_seqlens: Tensor,  # (B+1,) int32
    temperature: float,
    summary_index: Tensor | None = None,  # (B,) int32
    protected: Tensor | None = None,  # (T,) bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> importance (T,) fp32, then what `select_tokens` returns."""
    mag_logits, cu_seqlens = rows(mag_logits), cu_seqlens.contiguous()
    batch = cu_seqlens.numel() - 1
    importance = torch.empty(summary_attention.shape, dtype=torch.float32, device=summary_attention.device)
    keep, count, pruned_importance = _kept(importance, batch)
    if batch > 0:
        with on_device(summary_attention.device):
            score_and_select_kernel[(batch,)](
                summary_attention.contiguous(),
                received_attention.contiguous(),
                mag_logits,
                cu_seqlens,
                _contiguous(summary_index),
                _as_bytes(protected),
                importance,
                keep.view(torch.uint8),
                count,
                pruned_importance,
                _scale(temperature),
                summary_attention.shape[0],
                **_blocks(mag_logits),
            )
    return importance, keep, *layout(importance, keep, cu_seqlens, count, pruned_importance)
