# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of `gather_merge`, its backward, `gather_merge_layernorm` and `gather_merge_rmsnorm`.

All are bound by memory: at B = 32, N = 577, C = 768, bfloat16, half of the rows kept, `gather_merge` reads 28 MB and
writes 14 MB (13 us at 3.35 TB/s), its backward moves 57 MB, `gather_merge_layernorm` 57 MB. So rows move in 16-byte
accesses and are read once. A merged row is the one long sum: it is split over MERGE_C channels and its programs come
first, so that the copies fill the device around them. Block sizes depend on C only, and rows of a sum are counted from
the start of their sequence: a result does not depend on the batch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from madtp_kernels.triton.common import OPTIONS, PADDING, on_device, power_of_two, rows, sequence_bounds

COPY_BLOCK, BACKWARD_BLOCK, NORM_BLOCK = 8192, 4096, 4096  # elements of a block of rows
MAX_ROWS = 32  # of a block: what a row needs besides its channels takes registers too
PRUNED_BLOCKS = 4  # blocks of rows per program of the backward, at the mean sequence length


# --- kernels


@triton.jit
def _merged_row(p_cu_seqlens_out, p_source, i_b, R):
    """The output row of the merged token of sequence i_b, int64: its last one, if source agrees; -1 if it has none."""
    row = tl.load(p_cu_seqlens_out + i_b + 1).to(tl.int64) - 1
    source = tl.load(p_source + row, mask=(row >= 0) & (row < R), other=0)
    return tl.where(source == -(i_b + 1), row, -1)


@triton.jit
def _row_sources(p_cu_seqlens_out, p_source, o_row, T, R, B):
    """Input row of each output row, and masks: kept rows, and merged rows as `_merged_row` finds them."""
    b_source = tl.load(p_source + o_row, mask=o_row < R, other=PADDING).to(tl.int64)
    m_kept = (b_source >= 0) & (b_source < T)
    b_sequence = -(b_source + 1)
    m_merged = (b_sequence >= 0) & (b_sequence < B)
    b_end = tl.load(p_cu_seqlens_out + b_sequence + 1, mask=m_merged, other=0)
    return b_source, m_kept, m_merged & (b_end - 1 == o_row)


@triton.jit(do_not_specialize=["T", "R", "B"])
def gather_merge_kernel(
    p_x,  # (T, C), row stride x_stride
    p_keep,  # (T,) uint8
    p_cu_seqlens_in,  # (B+1,) int32
    p_cu_seqlens_out,  # (B+1,) int32
    p_source,  # (R,) int32
    p_merge_weight,  # (T,) fp32
    p_out,  # (R, C), out
    x_stride,
    T,
    R,
    B,
    C: tl.constexpr,
    MERGE_T: tl.constexpr,
    MERGE_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """B * ceil(C / MERGE_C) programs for the merged rows, then ceil(R / BLOCK_R) that copy, where the grid has them."""
    i_program = tl.program_id(0).to(tl.int64)
    PARTS: tl.constexpr = (C + MERGE_C - 1) // MERGE_C
    if i_program < B * PARTS:
        i_b = i_program // PARTS
        o_c = (i_program % PARTS) * MERGE_C + tl.arange(0, MERGE_C)
        m_c = o_c < C
        begin, end = sequence_bounds(p_cu_seqlens_in, i_b, T)
        row = _merged_row(p_cu_seqlens_out, p_source, i_b, R)
        end = tl.where(row >= 0, end, begin)
        b_sum = tl.zeros((MERGE_T, MERGE_C), tl.float32)
        for start in range(begin, end, MERGE_T):
            o_t = start + tl.arange(0, MERGE_T).to(tl.int64)
            m_t = tl.load(p_keep + o_t, mask=o_t < end, other=1) == 0
            b_weight = tl.load(p_merge_weight + o_t, mask=m_t, other=0.0)
            p_rows = p_x + o_t[:, None] * x_stride + o_c[None, :]
            b_x = tl.load(p_rows, mask=m_t[:, None] & m_c[None, :], other=0.0)
            b_sum += b_weight[:, None] * b_x.to(tl.float32)
        b_merged = tl.sum(b_sum, axis=0).to(p_out.dtype.element_ty)
        tl.store(p_out + row * C + o_c, b_merged, mask=o_c < tl.where(row >= 0, C, 0))
    else:
        o_row = (i_program - B * PARTS) * BLOCK_R + tl.arange(0, BLOCK_R).to(tl.int64)
        b_source, m_kept, m_merged = _row_sources(p_cu_seqlens_out, p_source, o_row, T, R, B)
        m_store = (o_row < R) & ~m_merged
        for c in range(0, C, BLOCK_C):
            o_c = c + tl.arange(0, BLOCK_C)
            m_c = o_c < C
            p_rows = p_x + b_source[:, None] * x_stride + o_c[None, :]
            b_x = tl.load(p_rows, mask=m_kept[:, None] & m_c[None, :], other=0.0)
            tl.store(p_out + o_row[:, None] * C + o_c[None, :], b_x, mask=m_store[:, None] & m_c[None, :])


@triton.jit
def _stored_rows(p_x, p_out, b_source, o_row, m_kept, m_merged, x_stride, c, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """(BLOCK_R, BLOCK_C) of the gathered rows from channel c on: kept rows from x, merged rows from out, else zeros."""
    o_c = c + tl.arange(0, BLOCK_C)
    m_c = (o_c < C)[None, :]
    b_x = tl.load(p_x + b_source[:, None] * x_stride + o_c[None, :], mask=m_kept[:, None] & m_c, other=0.0)
    b_out = tl.load(p_out + o_row[:, None] * C + o_c[None, :], mask=m_merged[:, None] & m_c, other=0.0)
    return tl.where(m_merged[:, None], b_out, b_x)


@triton.jit(do_not_specialize=["T", "R", "B"])
def copy_norm_kernel(
    p_x,  # (T, C), row stride x_stride
    p_cu_seqlens_out,  # (B+1,) int32
    p_source,  # (R,) int32
    p_weight,  # (C,)
    p_bias,  # (C,); None with RMS, as are p_mean and p_rstd
    p_out,  # (R, C): merged rows are read, the others written
    p_normed,  # (R, C), out
    p_mean,  # (R,) fp32, out
    p_rstd,  # (R,) fp32, out
    x_stride,
    eps,
    T,
    R,
    B,
    C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    RMS: tl.constexpr,
):
    """Copies BLOCK_R rows and normalises them, by LayerNorm or RMSNorm.

    C is known when compiling: up to BLOCK_C the loops fold into one block, loaded once and kept in registers, as long
    as nothing is stored before the last.
    """
    o_row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R).to(tl.int64)
    m_row = o_row < R
    b_source, m_kept, m_merged = _row_sources(p_cu_seqlens_out, p_source, o_row, T, R, B)
    m_real = m_kept | m_merged

    b_mean = tl.zeros((BLOCK_R,), tl.float32)
    if not RMS:
        for c in range(0, C, BLOCK_C):
            b_x = _stored_rows(p_x, p_out, b_source, o_row, m_kept, m_merged, x_stride, c, C, BLOCK_C)
            b_mean += tl.sum(b_x.to(tl.float32), axis=1)
        b_mean = b_mean / C

    b_squares = tl.zeros((BLOCK_R,), tl.float32)
    for c in range(0, C, BLOCK_C):
        b_x = _stored_rows(p_x, p_out, b_source, o_row, m_kept, m_merged, x_stride, c, C, BLOCK_C)
        b_centred = b_x.to(tl.float32)
        if not RMS:
            m_c = (c + tl.arange(0, BLOCK_C) < C)[None, :]
            b_centred = tl.where(m_c, b_centred - b_mean[:, None], 0.0)
        b_squares += tl.sum(b_centred * b_centred, axis=1)
    b_rstd = tl.div_rn(1.0, tl.sqrt_rn(b_squares / C + eps))

    for c in range(0, C, BLOCK_C):
        b_x = _stored_rows(p_x, p_out, b_source, o_row, m_kept, m_merged, x_stride, c, C, BLOCK_C)
        o_c = c + tl.arange(0, BLOCK_C)
        m_c = o_c < C
        b_weight = tl.load(p_weight + o_c, mask=m_c, other=0.0).to(tl.float32)
        if RMS:  # rounded before the weight, as models of transformers round
            b_scaled = (b_x.to(tl.float32) * b_rstd[:, None]).to(p_normed.dtype.element_ty)
            b_normed = b_scaled.to(tl.float32) * b_weight[None, :]
        else:
            b_bias = tl.load(p_bias + o_c, mask=m_c, other=0.0).to(tl.float32)
            b_normed = (b_x.to(tl.float32) - b_mean[:, None]) * b_rstd[:, None] * b_weight[None, :] + b_bias[None, :]
        b_normed = tl.where(m_real[:, None], b_normed, 0.0).to(p_normed.dtype.element_ty)
        o_out = o_row[:, None] * C + o_c[None, :]
        tl.store(p_out + o_out, b_x, mask=(m_row & ~m_merged)[:, None] & m_c[None, :])
        tl.store(p_normed + o_out, b_normed, mask=m_row[:, None] & m_c[None, :])
    if not RMS:
        tl.store(p_mean + o_row, tl.where(m_real, b_mean, 0.0), mask=m_row)
        tl.store(p_rstd + o_row, tl.where(m_real, b_rstd, 0.0), mask=m_row)


@triton.jit(do_not_specialize=["T", "R", "B", "splits"])
def gather_merge_backward_kernel(
    p_grad,  # (R, C), row stride grad_stride
    p_x,  # (T, C), row stride x_stride
    p_keep,  # (T,) uint8
    p_cu_seqlens_in,  # (B+1,) int32
    p_cu_seqlens_out,  # (B+1,) int32
    p_source,  # (R,) int32
    p_merge_weight,  # (T,) fp32
    p_grad_x,  # (T, C), out
    p_grad_weight,  # (T,) fp32, out
    grad_stride,
    x_stride,
    T,
    R,
    B,
    splits,
    C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """First B * splits programs with the pruned rows and grad_weight, then ceil(R / BLOCK_R) with the kept rows.

    Rows do not depend on each other, so `splits` may depend on the batch.
    """
    i_program = tl.program_id(0).to(tl.int64)
    merging = B * splits.to(tl.int64)
    if i_program < merging:
        i_b = i_program // splits
        begin, end = sequence_bounds(p_cu_seqlens_in, i_b, T)
        row = _merged_row(p_cu_seqlens_out, p_source, i_b, R)
        width = tl.where(row >= 0, C, 0)  # nothing to read without a merged row
        for start in range(begin + (i_program % splits) * BLOCK_R, end, splits.to(tl.int64) * BLOCK_R):
            o_t = start + tl.arange(0, BLOCK_R).to(tl.int64)
            m_t = tl.load(p_keep + o_t, mask=o_t < end, other=1) == 0
            b_weight = tl.load(p_merge_weight + o_t, mask=m_t, other=0.0)
            b_dot = tl.zeros((BLOCK_R,), tl.float32)
            for c in range(0, C, BLOCK_C):
                o_c = c + tl.arange(0, BLOCK_C)
                m_c = o_c < C
                m_x = m_t[:, None] & m_c[None, :]
                b_grad = tl.load(p_grad + row * grad_stride + o_c, mask=o_c < width, other=0.0).to(tl.float32)
                b_x = tl.load(p_x + o_t[:, None] * x_stride + o_c[None, :], mask=m_x, other=0.0).to(tl.float32)
                b_dot += tl.sum(b_x * b_grad[None, :], axis=1)
                b_grad_x = (b_weight[:, None] * b_grad[None, :]).to(p_grad_x.dtype.element_ty)
                tl.store(p_grad_x + o_t[:, None] * C + o_c[None, :], b_grad_x, mask=m_x)
            tl.store(p_grad_weight + o_t, b_dot, mask=o_t < end)
    else:
        o_row = (i_program - merging) * BLOCK_R + tl.arange(0, BLOCK_R).to(tl.int64)
        b_source = tl.load(p_source + o_row, mask=o_row < R, other=PADDING).to(tl.int64)
        m_kept = (b_source >= 0) & (b_source < T)
        for c in range(0, C, BLOCK_C):
            o_c = c + tl.arange(0, BLOCK_C)
            m_rows = m_kept[:, None] & (o_c < C)[None, :]
            b_grad = tl.load(p_grad + o_row[:, None] * grad_stride + o_c[None, :], mask=m_rows, other=0.0)
            tl.store(p_grad_x + b_source[:, None] * C + o_c[None, :], b_grad, mask=m_rows)


# --- launchers


def _row_blocks(channels: int, elements: int, max_channels: int = 1024) -> dict[str, int]:
    block_c = power_of_two(channels, 16, max_channels)
    return {"C": channels, "BLOCK_R": min(elements // block_c, MAX_ROWS), "BLOCK_C": block_c}


def _gather_merge(x: Tensor, *selection: Tensor, copy: bool) -> Tensor:
    """The merged rows of the output, and the others too if `copy`."""
    keep, cu_seqlens_in, cu_seqlens_out, source, merge_weight = selection
    (length, channels), capacity, batch = x.shape, source.shape[0], cu_seqlens_in.numel() - 1
    out = torch.empty(capacity, channels, dtype=x.dtype, device=x.device)
    merge_c = power_of_two(channels, 16, 64)
    blocks = _row_blocks(channels, COPY_BLOCK) | {"MERGE_T": 128, "MERGE_C": merge_c}
    programs = batch * triton.cdiv(channels, merge_c) + copy * triton.cdiv(capacity, blocks["BLOCK_R"])
    if capacity > 0 and channels > 0 and programs > 0:
        with on_device(x.device):
            gather_merge_kernel[(programs,)](
                x,
                keep.contiguous().view(torch.uint8),
                cu_seqlens_in.contiguous(),
                cu_seqlens_out,
                source,
                merge_weight.contiguous(),
                out,
                x.stride(0),
                length,
                capacity,
                batch,
                **blocks,
                **OPTIONS | {"num_warps": 8},
            )
    return out


def gather_merge(
    x: Tensor,  # (T, C)
    keep: Tensor,  # (T,) bool
    cu_seqlens_in: Tensor,  # (B+1,) int32
    cu_seqlens_out: Tensor,  # (B+1,) int32
    source: Tensor,  # (R,) int32
    merge_weight: Tensor,  # (T,) fp32
) -> Tensor:  # (R, C)
    """As `reference.tokens.gather_merge`, in one launch; what a kept row holds does not reach the merged row."""
    source, cu_seqlens_out = source.contiguous(), cu_seqlens_out.contiguous()
    return _gather_merge(rows(x), keep, cu_seqlens_in, cu_seqlens_out, source, merge_weight, copy=True)


def _gather_merge_norm(
    x: Tensor, selection: tuple[Tensor, ...], weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """x_out (R, C), normed (R, C), and of LayerNorm mean and rstd (R,) fp32; without bias it is RMSNorm.

    In two launches: the first sums the merged rows over blocks of channels, the second copies the kept rows and
    normalises all. A merged row needs its whole sum before its statistics.
    """
    keep, cu_seqlens_in, cu_seqlens_out, source, merge_weight = selection
    x, source, cu_seqlens_out = rows(x), source.contiguous(), cu_seqlens_out.contiguous()
    out = _gather_merge(x, keep, cu_seqlens_in, cu_seqlens_out, source, merge_weight, copy=False)
    capacity, channels = out.shape
    normed = torch.empty(capacity, channels, dtype=x.dtype, device=x.device)
    mean = rstd = None
    if bias is not None:
        bias = bias.contiguous()
        mean = torch.empty(capacity, dtype=torch.float32, device=x.device)
        rstd = torch.empty(capacity, dtype=torch.float32, device=x.device)
    blocks = _row_blocks(channels, NORM_BLOCK, NORM_BLOCK)
    if capacity > 0:
        with on_device(x.device):
            copy_norm_kernel[(triton.cdiv(capacity, blocks["BLOCK_R"]),)](
                x,
                cu_seqlens_out,
                source,
                weight.contiguous(),
                bias,
                out,
                normed,
                mean,
                rstd,
                x.stride(0),
                eps,
                x.shape[0],
                capacity,
                cu_seqlens_out.numel() - 1,
                **blocks,
                RMS=bias is None,
                **OPTIONS,
            )
    return out, normed, mean, rstd


def gather_merge_layernorm(
    x: Tensor,  # (T, C)
    keep: Tensor,
    cu_seqlens_in: Tensor,
    cu_seqlens_out: Tensor,
    source: Tensor,
    merge_weight: Tensor,
    weight: Tensor,  # (C,) dtype of x or fp32
    bias: Tensor,  # (C,)
    eps: float,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # x_out (R, C), normed (R, C), mean (R,), rstd (R,) fp32
    """As `reference.tokens.gather_merge_layernorm`."""
    selection = (keep, cu_seqlens_in, cu_seqlens_out, source, merge_weight)
    return _gather_merge_norm(x, selection, weight, bias, eps)


def gather_merge_rmsnorm(
    x: Tensor,  # (T, C)
    keep: Tensor,
    cu_seqlens_in: Tensor,
    cu_seqlens_out: Tensor,
    source: Tensor,
    merge_weight: Tensor,
    weight: Tensor,  # (C,) dtype of x or fp32
    eps: float,
) -> tuple[Tensor, Tensor]:  # x_out (R, C), normed (R, C)
    """As `reference.tokens.gather_merge_rmsnorm`."""
    selection = (keep, cu_seqlens_in, cu_seqlens_out, source, merge_weight)
    return _gather_merge_norm(x, selection, weight, None, eps)[:2]


def gather_merge_backward(
    grad: Tensor,  # (R, C)
    x: Tensor,  # (T, C)
    keep: Tensor,
    cu_seqlens_in: Tensor,
    cu_seqlens_out: Tensor,
    source: Tensor,
    merge_weight: Tensor,
) -> tuple[Tensor, Tensor]:  # (T, C), (T,) fp32
    """As `reference.tokens.gather_merge_backward`, in one launch; kept rows are scattered by `source`."""
    grad, x = rows(grad), rows(x)
    (length, channels), capacity, batch = x.shape, source.shape[0], cu_seqlens_in.numel() - 1
    grad_x = torch.empty(length, channels, dtype=x.dtype, device=x.device)
    grad_weight = torch.empty(length, dtype=torch.float32, device=x.device)
    blocks = _row_blocks(channels, BACKWARD_BLOCK)
    splits = max(triton.cdiv(length, max(batch, 1) * PRUNED_BLOCKS * blocks["BLOCK_R"]), 1)
    programs = batch * splits + triton.cdiv(capacity, blocks["BLOCK_R"])
    if length > 0 and programs > 0:
        with on_device(x.device):
            gather_merge_backward_kernel[(programs,)](
                grad,
                x,
                keep.contiguous().view(torch.uint8),
                cu_seqlens_in.contiguous(),
                cu_seqlens_out.contiguous(),
                source.contiguous(),
                merge_weight.contiguous(),
                grad_x,
                grad_weight,
                grad.stride(0),
                x.stride(0),
                length,
                capacity,
                batch,
                splits,
                **blocks,
                **OPTIONS | {"num_warps": 8},
            )
    return grad_x, grad_weight
