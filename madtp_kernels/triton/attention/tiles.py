# SPDX-License-Identifier: Apache-2.0
"""What the attention kernels share: how a program finds its tile, and how tiles are read.

Sequences are cut into blocks of rows counted from their own start, and block sizes depend on the head dimension and the
dtype only: a result does not depend on the batch. A head dimension that is no power of two is padded with zeros inside
the tile.
"""

import triton
import triton.language as tl
from torch import Tensor

from madtp_kernels.triton.common import load_summary_row, sequence_bounds

MAX_STRIDE = 2**24  # elements from row to row
TAIL_BLOCK = tl.constexpr(1024)


@triton.jit
def program_of(blocks, H):
    """(block, head, sequence) of this program.

    Blocks of one head, and query heads of one key head, run side by side and share K and V in cache.
    """
    i_program = tl.program_id(0)
    return i_program % blocks, i_program // blocks % H, (i_program // blocks // H).to(tl.int64)


@triton.jit
def sequence_rows(p_cu_seqlens, i_b, T, max_seqlen):
    """First row (int64) and length (int32) of sequence i_b, never longer than the grid and buffers were made for."""
    begin, end = sequence_bounds(p_cu_seqlens, i_b, T)
    return begin, tl.minimum(end - begin, max_seqlen).to(tl.int32)


@triton.jit
def summary_row_or_none(p_summary_index, i_b, n):
    """The summary token's row inside sequence i_b of n rows; -1 if there is none."""
    row = load_summary_row(p_summary_index, i_b)
    return tl.where((row >= 0) & (row < n), row, -1)


@triton.jit
def eights(stride, D: tl.constexpr):
    """The stride, seen to be a multiple of 8 where D is one but not of 16, which triton sees by itself: `heads` has
    made it so, and rows are then read 16 bytes at a time."""
    if D % 16 != 0:
        stride = stride // 8 * 8
    return stride


@triton.jit
def _tile(p_x, row, stride, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Pointers to rows row, row + 1, ...: one 64-bit address, and 32-bit offsets, which take half the registers."""
    stride = eights(stride, D)
    return p_x + row * stride + (tl.arange(0, ROWS)[:, None] * stride + tl.arange(0, BLOCK_D)[None, :])


@triton.jit
def load_tile(p_x, row, stride, m_rows, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """(ROWS, BLOCK_D) of one head from `row` (int64) on; zeros where masked. m_rows None: all rows exist."""
    o_d = tl.arange(0, BLOCK_D)
    p_tile = _tile(p_x, row, stride, ROWS, D, BLOCK_D)
    if m_rows is None and D == BLOCK_D:
        return tl.load(p_tile)
    elif m_rows is None:
        return tl.load(p_tile, mask=(o_d < D)[None, :], other=0.0)
    elif D == BLOCK_D:
        return tl.load(p_tile, mask=m_rows[:, None], other=0.0)
    else:
        return tl.load(p_tile, mask=m_rows[:, None] & (o_d < D)[None, :], other=0.0)


@triton.jit
def store_tile(p_x, row, stride, m_rows, b_x, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    o_d = tl.arange(0, BLOCK_D)
    m_tile = m_rows[:, None] if D == BLOCK_D else m_rows[:, None] & (o_d < D)[None, :]
    tl.store(_tile(p_x, row, stride, ROWS, D, BLOCK_D), b_x.to(p_x.dtype.element_ty), mask=m_tile)


@triton.jit
def head_tile(p_head, row, column, slab, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Pointers to (ROWS, COLUMNS) of the arg-max heads: keys from `row` (int64), queries of the slab from `column`."""
    return p_head + row * slab + (column + tl.arange(0, ROWS)[:, None] * slab + tl.arange(0, COLUMNS)[None, :])


@triton.jit
def zero_tail(p_x, p_cu_seqlens, B, T, WIDTH):
    """Rows of x (T, WIDTH) past the last sequence become zero, shared out over all programs."""
    num_rows = tl.minimum(tl.maximum(tl.load(p_cu_seqlens + B).to(tl.int64), 0), T)
    step = tl.num_programs(0).to(tl.int64) * TAIL_BLOCK
    for start in range(num_rows * WIDTH + tl.program_id(0).to(tl.int64) * TAIL_BLOCK, T.to(tl.int64) * WIDTH, step):
        o_x = start + tl.arange(0, TAIL_BLOCK).to(tl.int64)
        tl.store(p_x + o_x, tl.zeros((TAIL_BLOCK,), p_x.dtype.element_ty), mask=o_x < T.to(tl.int64) * WIDTH)


# --- launchers


def addressable(x: Tensor) -> Tensor:
    """x (T, H, D), or a copy when its channels are not contiguous or its rows too far apart for 32-bit offsets."""
    return x if x.stride(2) == 1 and x.stride(0) < MAX_STRIDE else x.contiguous()


def heads(x: Tensor) -> Tensor:
    """`addressable`, and a copy too when one of its strides is not what `eights` makes of it."""
    x = addressable(x)
    even = x.shape[2] % 16 == 0 or (x.stride(0) % 8 == 0 and x.stride(1) % 8 == 0)
    return x if even else x.contiguous()


def strides(*tensors: Tensor) -> tuple[int, ...]:
    """Row and head stride of each."""
    return tuple(stride for x in tensors for stride in x.stride()[:2])


def dims(head_dim: int) -> dict[str, int]:
    return {"D": head_dim, "BLOCK_D": max(triton.next_power_of_2(head_dim), 16)}
