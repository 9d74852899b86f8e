# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of `token_importance`, `select_tokens` and `score_and_select`.

Either a program does all of a sequence, in one launch, or, where that would leave most of the device idle for long,
three kernels share it out: guidance by rows, thresholds by sequences and alignment tokens, keep by sequences. Rows are
read in blocks counted from the start of the sequence, blocks depend on K only, and all kernels are made of the same
functions: a result depends neither on the batch nor on which kernels ran. Bound: the logits are read once from memory
(T * K elements) and from cache after that; everything else is a few bytes per row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from madtp_kernels.triton.common import (
    OPTIONS,
    empty_float32,
    load_summary_row,
    on_device,
    power_of_two,
    rows,
    sequence_bounds,
)
from madtp_kernels.triton.tokens.layout import layout
from madtp_kernels.triton.tokens.sequence import (
    LOG2_E,
    sequence_extremes,
    sequence_guidance,
    sequence_importance,
    sequence_keep,
    sequence_threshold,
    store_guidance,
)

BLOCK = 1024  # values of rows
BLOCK_BYTES = 16384  # of logits
MAX_PARTS = 8  # programs of a sequence that share its alignment tokens
WIDEST, WIDEST_GUIDANCE = 32, 128  # alignment tokens of a block
SHARED_LOGITS = 32768  # of a sequence, from which on it is shared out
SHARED_SEQUENCES = 128  # from which on a program for each keeps a device busy


# --- kernels


@triton.jit(do_not_specialize=["T"])
def importance_kernel(
    p_summary_attention,  # (T,) fp32
    p_received_attention,  # (T,) fp32
    p_logits,  # (T, K), row stride STRIDE
    p_cu_seqlens,  # (B+1,) int32
    p_summary_index,  # (B,) int32 or None
    p_protected,  # (T,) uint8 or None
    p_guidance,  # (T,) fp32, out
    p_importance,  # (T,) fp32, out
    T,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    i_b = tl.program_id(0).to(tl.int64)
    begin, end = sequence_bounds(p_cu_seqlens, i_b, T)
    summary_row = load_summary_row(p_summary_index, i_b)
    sequence_guidance(p_logits, p_guidance, begin, end, K, STRIDE, BLOCK_T, BLOCK_K)
    sequence_importance(
        p_summary_attention, p_received_attention, p_guidance, p_importance, begin, end, summary_row, p_protected, BLOCK
    )


@triton.jit
def _select(
    p_importance, p_logits, p_keep, p_count, p_pruned_importance, scale, i_b, begin, end, summary_row, p_protected,
    K: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Threshold and keep of one sequence by one program."""
    highest, lowest, prunable, broken = sequence_extremes(p_importance, begin, end, summary_row, p_protected, BLOCK)
    threshold = sequence_threshold(
        p_importance, p_logits, highest, scale, begin, end, summary_row, p_protected, 0, 1, K, STRIDE, BLOCK_T, BLOCK_K
    )
    sequence_keep(
        p_importance, p_keep, p_count, p_pruned_importance, threshold, highest, lowest, prunable, broken, scale, i_b,
        begin, end, summary_row, p_protected, BLOCK,
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
    BLOCK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    i_b = tl.program_id(0).to(tl.int64)
    begin, end = sequence_bounds(p_cu_seqlens, i_b, T)
    summary_row = load_summary_row(p_summary_index, i_b)
    _select(
        p_importance, p_logits, p_keep, p_count, p_pruned_importance, scale, i_b, begin, end, summary_row,
        p_protected, K, STRIDE, BLOCK, BLOCK_T, BLOCK_K,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T"])
def score_and_select_kernel(
    p_summary_attention,  # (T,) fp32
    p_received_attention,  # (T,) fp32
    p_logits,  # (T, K), row stride STRIDE
    p_cu_seqlens,  # (B+1,) int32
    p_summary_index,  # (B,) int32 or None
    p_protected,  # (T,) uint8 or None
    p_guidance,  # (T,) fp32, out
    p_importance,  # (T,) fp32, out
    p_keep,  # (T,) uint8, out
    p_count,  # (B,) int32, out
    p_pruned_importance,  # (B,) fp32, out
    scale,  # log2(e) / tau, or 0: keep everything
    T,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    i_b = tl.program_id(0).to(tl.int64)
    begin, end = sequence_bounds(p_cu_seqlens, i_b, T)
    summary_row = load_summary_row(p_summary_index, i_b)
    sequence_guidance(p_logits, p_guidance, begin, end, K, STRIDE, BLOCK_T, BLOCK_K)
    sequence_importance(
        p_summary_attention, p_received_attention, p_guidance, p_importance, begin, end, summary_row, p_protected, BLOCK
    )
    _select(
        p_importance, p_logits, p_keep, p_count, p_pruned_importance, scale, i_b, begin, end, summary_row,
        p_protected, K, STRIDE, BLOCK, BLOCK_T, BLOCK_K,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T"])
def guidance_kernel(
    p_logits,  # (T, K), row stride STRIDE
    p_guidance,  # (T,) fp32, out
    T,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One block of rows, of whatever sequences: a maximum has no order."""
    o_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    store_guidance(p_logits, p_guidance, o_t, o_t < T, K, STRIDE, BLOCK_T, BLOCK_K)


@triton.jit(do_not_specialize=["T"])
def threshold_kernel(
    p_summary_attention,  # (T,) fp32
    p_received_attention,  # (T,) fp32
    p_guidance,  # (T,) fp32
    p_logits,  # (T, K), row stride STRIDE
    p_cu_seqlens,  # (B+1,) int32
    p_summary_index,  # (B,) int32 or None
    p_protected,  # (T,) uint8 or None
    p_importance,  # (T,) fp32, out
    p_copies,  # (PARTS - 1, T) fp32, out: importance again, for each of the other programs of a sequence
    p_threshold,  # (B, PARTS) fp32, out
    scale,  # log2(e) / tau, or 0: keep everything
    T,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Every PARTS-th block of alignment tokens of one sequence.

    A few bytes a row give its importance: each program works it out again and waits for no other.
    """
    i_b, i_part = tl.program_id(0).to(tl.int64) // PARTS, tl.program_id(0).to(tl.int64) % PARTS
    begin, end = sequence_bounds(p_cu_seqlens, i_b, T)
    summary_row = load_summary_row(p_summary_index, i_b)
    p_own = p_importance
    if i_part > 0:
        p_own = p_copies + (i_part - 1) * T
    sequence_importance(
        p_summary_attention, p_received_attention, p_guidance, p_own, begin, end, summary_row, p_protected, BLOCK
    )
    highest, _, _, _ = sequence_extremes(p_own, begin, end, summary_row, p_protected, BLOCK)
    threshold = sequence_threshold(
        p_own, p_logits, highest, scale, begin, end, summary_row, p_protected, i_part, PARTS, K, STRIDE,
        BLOCK_T, BLOCK_K,
    )  # fmt: skip
    tl.store(p_threshold + tl.program_id(0), threshold)


@triton.jit(do_not_specialize=["T"])
def keep_kernel(
    p_importance,  # (T,) fp32
    p_threshold,  # (B, PARTS) fp32
    p_cu_seqlens,  # (B+1,) int32
    p_summary_index,  # (B,) int32 or None
    p_protected,  # (T,) uint8 or None
    p_keep,  # (T,) uint8, out
    p_count,  # (B,) int32, out
    p_pruned_importance,  # (B,) fp32, out
    scale,  # log2(e) / tau, or 0: keep everything
    T,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_b = tl.program_id(0).to(tl.int64)
    begin, end = sequence_bounds(p_cu_seqlens, i_b, T)
    summary_row = load_summary_row(p_summary_index, i_b)
    threshold = tl.full((), float("-inf"), tl.float32)
    for i_part in range(PARTS):
        part = tl.load(p_threshold + i_b * PARTS + i_part)
        threshold = tl.maximum(threshold, part, propagate_nan=tl.PropagateNan.ALL)
    highest, lowest, prunable, broken = sequence_extremes(p_importance, begin, end, summary_row, p_protected, BLOCK)
    sequence_keep(
        p_importance, p_keep, p_count, p_pruned_importance, threshold, highest, lowest, prunable, broken, scale, i_b,
        begin, end, summary_row, p_protected, BLOCK,
    )  # fmt: skip


# --- launchers


def tile(alignment_tokens: int, element_size: int, widest: int) -> dict[str, int]:
    """The block of logits, and nothing but it orders sums."""
    block_k = power_of_two(alignment_tokens, 16, widest)
    return {"BLOCK_T": min(BLOCK_BYTES // (block_k * element_size), 256), "BLOCK_K": block_k}


def _blocks(mag_logits: Tensor, widest: int = WIDEST) -> dict[str, int]:
    """K and its stride are compile-time: K = 100 then still loads 4 logits at a time."""
    sizes = {"K": mag_logits.shape[1], "STRIDE": mag_logits.stride(0)}
    return sizes | tile(mag_logits.shape[1], mag_logits.element_size(), widest) | OPTIONS | {"num_warps": 8}


def _parts(mag_logits: Tensor, batch: int) -> int:
    """How many programs share the alignment tokens of a sequence; 1: one does all of it.

    Lengths are on the device, so it is the mean that decides.
    """
    long = mag_logits.numel() >= SHARED_LOGITS * batch
    blocks = triton.cdiv(mag_logits.shape[1], _blocks(mag_logits)["BLOCK_K"])
    return min(blocks, MAX_PARTS) if long and batch < SHARED_SEQUENCES else 1


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
    importance = empty_float32(summary_attention, *summary_attention.shape)
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
                empty_float32(importance, *importance.shape),
                importance,
                summary_attention.shape[0],
                BLOCK=BLOCK,
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
                BLOCK=BLOCK,
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
    length, batch = summary_attention.shape[0], cu_seqlens.numel() - 1
    importance, guidance = (empty_float32(summary_attention, length) for _ in range(2))
    keep, count, pruned_importance = _kept(importance, batch)
    statistics = summary_attention.contiguous(), received_attention.contiguous()
    sequences = cu_seqlens, _contiguous(summary_index), _as_bytes(protected)
    kept = keep.view(torch.uint8), count, pruned_importance
    scale, parts = _scale(temperature), _parts(mag_logits, batch)
    with on_device(summary_attention.device):
        if batch > 0 and parts == 1:
            score_and_select_kernel[(batch,)](
                *statistics,
                mag_logits,
                *sequences,
                guidance,
                importance,
                *kept,
                scale,
                length,
                BLOCK=BLOCK,
                **_blocks(mag_logits),
            )
        elif batch > 0:
            wide = _blocks(mag_logits, widest=WIDEST_GUIDANCE)
            guidance_kernel[(triton.cdiv(length, wide["BLOCK_T"]),)](mag_logits, guidance, length, **wide)
            copies, threshold = empty_float32(guidance, parts - 1, length), empty_float32(guidance, batch, parts)
            threshold_kernel[(batch * parts,)](
                *statistics,
                guidance,
                mag_logits,
                *sequences,
                importance,
                copies,
                threshold,
                scale,
                length,
                PARTS=parts,
                BLOCK=BLOCK,
                **_blocks(mag_logits),
            )
            keep_kernel[(batch,)](
                importance,
                threshold,
                *sequences,
                *kept,
                scale,
                length,
                PARTS=parts,
                BLOCK=BLOCK,
                **OPTIONS | {"num_warps": 8},
            )
    return importance, keep, *layout(importance, keep, cu_seqlens, count, pruned_importance)
