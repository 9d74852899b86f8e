# SPDX-License-Identifier: Apache-2.0
"""Calls of the launchers of attention, for `aot`: name -> function of (dtype, sizes)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from madtp_kernels.triton.attention import backward, forward
from madtp_kernels.triton.meta_arguments import LONGEST, ROWS, Sizes, cu_seqlens, meta, summary_index


def _arguments(dtype: torch.dtype, sizes: Sizes, statistics: bool) -> tuple[Any, ...]:
    """All arguments of the forward: q, k and v of a fused projection; causal where the optional arguments are given."""
    qkv = meta(ROWS, 3, sizes.channels // sizes.head_dim, sizes.head_dim, dtype=dtype).unbind(1)
    ragged = (cu_seqlens(), cu_seqlens(), LONGEST, LONGEST)
    return *qkv, *ragged, sizes.head_dim**-0.5, sizes.optional, -1, -1, 0.0, None, summary_index(sizes), statistics


def _backward(dtype: torch.dtype, sizes: Sizes, statistics: bool) -> None:
    arguments = _arguments(dtype, sizes, statistics)
    out = meta(*arguments[0].shape, dtype=dtype)
    backward.varlen_attention_backward(out, meta(ROWS), meta(ROWS), out, meta(out.shape[1], ROWS), *arguments)


LAUNCHES: dict[str, Callable[[torch.dtype, Sizes], object]] = {
    "varlen_attention": lambda dtype, sizes: forward.varlen_attention(*_arguments(dtype, sizes, False)),
    "varlen_attention with statistics": lambda dtype, sizes: forward.varlen_attention(*_arguments(dtype, sizes, True)),
    "varlen_attention_backward": lambda dtype, sizes: _backward(dtype, sizes, False),
    "varlen_attention_backward with statistics": lambda dtype, sizes: _backward(dtype, sizes, True),
}
