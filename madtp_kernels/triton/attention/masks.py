# SPDX-License-Identifier: Apache-2.0
"""Which keys a query sees, and which blocks a program need not visit.

Query i of n_q stands at position i + shift among the n_k keys of its sequence, shift = n_k - n_q: the last query at the
last key. It sees `left` keys before its position and `right` after it; None: all of them. A causal mask is right = 0,
known when a kernel is compiled.
"""

import triton
import triton.language as tl


@triton.jit
def right_of(right, CAUSAL: tl.constexpr):
    """The bound that holds on the right."""
    bound = None  # not `right`: triton 3.6 returns no argument that is None
    if CAUSAL:
        bound = 0
    elif right is not None:
        bound = right
    return bound


@triton.jit
def visible(m_pairs, o_p, o_n, left, right):
    """m_pairs, or all of them where that is None, of which a query at position o_p sees key o_n."""
    if right is not None:
        m_right = o_n <= o_p + right
        m_pairs = m_right if m_pairs is None else m_pairs & m_right
    if left is not None:
        m_left = o_n >= o_p - left
        m_pairs = m_left if m_pairs is None else m_pairs & m_left
    return m_pairs


@triton.jit
def keys_of(top, shift, n_k, left, right, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Keys that queries top, top + 1, ... of a block see: (first, whole, edge, end), all but `end` at a block's begin.

    Blocks in [whole, edge) every query sees whole; those in [first, whole) and [edge, end) are masked.
    """
    first = n_k * 0
    whole = n_k * 0
    end = n_k
    seen = n_k  # by the first query, and so by all
    if right is not None:
        end = tl.maximum(tl.minimum(n_k, top + shift + BLOCK_M + right), 0)
        seen = tl.maximum(tl.minimum(end, top + shift + 1 + right), 0)
    edge = seen // BLOCK_N * BLOCK_N
    if left is not None:
        first = tl.maximum(top + shift - left, 0) // BLOCK_N * BLOCK_N
        whole = tl.cdiv(tl.maximum(top + shift + BLOCK_M - 1 - left, 0), BLOCK_N) * BLOCK_N
        whole = tl.minimum(whole, tl.cdiv(end, BLOCK_N) * BLOCK_N)
        edge = tl.maximum(edge, whole)
    return first, whole, edge, end


@triton.jit
def queries_of(start, shift, begin, end, left, right, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Of queries begin to end those that see keys start, start + 1, ... of a block: (first, a block's begin; end)."""
    first = begin
    if right is not None:
        first = tl.maximum(begin, tl.maximum(start - shift - right, 0) // BLOCK_M * BLOCK_M)
    if left is not None:
        end = tl.minimum(end, start - shift + BLOCK_N + left)
    return first, end


@triton.jit
def observers(o_n, n, summary_row, left, right):
    """How many counted queries `received_attention` of key o_n is divided by, in self-attention."""
    b_count = o_n * 0 + 1
    if left is not None or right is not None:
        b_first = o_n * 0
        b_last = o_n * 0 + n - 1
        if right is not None:
            b_first = tl.maximum(o_n - right, 0)
        if left is not None:
            b_last = tl.minimum(o_n + left, n - 1)
        m_summary = (summary_row >= b_first) & (summary_row <= b_last)
        b_count = tl.maximum(b_last - b_first + 1 - m_summary.to(tl.int32), 1)
    return b_count.to(tl.float32)


# --- launchers


def masking(causal: bool, left: int, right: int, max_seqlen_q: int, max_seqlen_k: int) -> dict[str, int | bool | None]:
    """These arguments of a kernel; bounds as wide as a sequence stay below what 32 bits hold."""
    return {
        "left": None if left < 0 else min(left, max_seqlen_k),
        "right": None if right < 0 or causal else min(right, max_seqlen_q),
        "CAUSAL": causal,
    }
