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


def _decoder(dtype: torch.dtype, sizes: Sizes, statistics: bool) -> tuple[Any, ...]:
    """All arguments again: two query heads on a key head, and every mask and bias at once."""
    heads = sizes.channels // sizes.head_dim // 2
    q, k, v = (meta(ROWS, n * heads, sizes.head_dim, dtype=dtype) for n in (2, 1, 1))
    options = (sizes.head_dim**-0.5, True, 128, -1, 50.0, meta(2 * heads), summary_index(sizes), statistics)
    return q, k, v, cu_seqlens(), cu_seqlens(), LONGEST, LONGEST, *options


def _forward(arguments: tuple[Any, ...]) -> None:
    forward.varlen_attention(*arguments)


def _backward(arguments: tuple[Any, ...]) -> None:
    out = meta(*arguments[0].shape, dtype=arguments[0].dtype)
    backward.varlen_attention_backward(out, meta(ROWS), meta(ROWS), out, meta(out.shape[1], ROWS), *arguments)


def _of_decoders(launch: Callable[..., object], statistics: bool) -> Callable[[torch.dtype, Sizes], object]:
    """Where the optional arguments are given, and without them one dtype and no statistics: compiling takes minutes."""

    def run(dtype: torch.dtype, sizes: Sizes) -> None:
        if sizes.optional or (dtype == torch.bfloat16 and not statistics):
            launch(_decoder(dtype, sizes, statistics))

    return run


LAUNCHES: dict[str, Callable[[torch.dtype, Sizes], object]] = {
    "varlen_attention": lambda dtype, sizes: _forward(_arguments(dtype, sizes, False)),
    "varlen_attention with statistics": lambda dtype, sizes: _forward(_arguments(dtype, sizes, True)),
    "varlen_attention_backward": lambda dtype, sizes: _backward(_arguments(dtype, sizes, False)),
    "varlen_attention_backward with statistics": lambda dtype, sizes: _backward(_arguments(dtype, sizes, True)),
    "varlen_attention, decoder": _of_decoders(_forward, False),
    "varlen_attention, decoder, statistics": _of_decoders(_forward, True),
    "varlen_attention_backward, decoder": _of_decoders(_backward, False),
    "varlen_attention_backward, decoder, statistics": _of_decoders(_backward, True),
}
