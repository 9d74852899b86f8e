# SPDX-License-Identifier: Apache-2.0
"""Calls of the launcher of `attention_rows`, for `aot`: name -> function of (dtype, sizes)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from madtp_kernels.triton.attention_rows import forward
from madtp_kernels.triton.meta_arguments import BATCH, ROWS, Sizes, cu_seqlens, meta

QUERY_ROWS = BATCH * 16  # of text


def _attention_rows(dtype: torch.dtype, sizes: Sizes) -> None:
    """Keys of as many heads as the queries have, or with the optional arguments of one, and rows with positions."""
    heads = max(sizes.channels // sizes.head_dim, 1)
    key_heads = 1 if sizes.optional else heads
    q_rows = meta(QUERY_ROWS, heads, sizes.head_dim, dtype=dtype)
    k = meta(ROWS, key_heads, sizes.head_dim, dtype=dtype)
    position = meta(QUERY_ROWS, dtype=torch.int32) if sizes.optional else None
    forward.attention_rows(q_rows, k, cu_seqlens(), cu_seqlens(), position, sizes.head_dim**-0.5)


LAUNCHES: dict[str, Callable[[torch.dtype, Sizes], object]] = {"attention_rows": _attention_rows}
