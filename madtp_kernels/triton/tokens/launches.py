# SPDX-License-Identifier: Apache-2.0
"""Calls of the launchers of token pruning, for `aot`: name -> function of (dtype, sizes)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from madtp_kernels.triton.meta_arguments import BATCH, OUT_ROWS, ROWS, Sizes, cu_seqlens, meta, summary_index
from madtp_kernels.triton.tokens import gather_merge, scores


def _logits(dtype: torch.dtype, sizes: Sizes) -> Tensor:
    return meta(ROWS, sizes.alignment_tokens, dtype=dtype)


def _x(dtype: torch.dtype, sizes: Sizes, rows: int = ROWS) -> Tensor:
    return meta(rows, sizes.channels, dtype=dtype)


def _selection() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    keep, source = meta(ROWS, dtype=torch.bool), meta(OUT_ROWS, dtype=torch.int32)
    return keep, cu_seqlens(), cu_seqlens(), source, meta(ROWS)


def _protected(sizes: Sizes) -> Tensor | None:
    return meta(ROWS, dtype=torch.bool) if sizes.optional else None


def _affine(dtype: torch.dtype, sizes: Sizes) -> Tensor:
    """The weight or the bias of a norm."""
    return meta(sizes.channels, dtype=torch.float32 if sizes.optional else dtype)


def _score_and_select_short(dtype: torch.dtype, sizes: Sizes) -> None:
    """Sequences of which a program does all."""
    tokens = BATCH * 8
    stats, logits = (meta(tokens), meta(tokens)), meta(tokens, sizes.alignment_tokens, dtype=dtype)
    protected = meta(tokens, dtype=torch.bool) if sizes.optional else None
    scores.score_and_select(*stats, logits, cu_seqlens(), 1.0, summary_index(sizes), protected)


LAUNCHES: dict[str, Callable[[torch.dtype, Sizes], object]] = {
    "token_importance": lambda dtype, sizes: scores.token_importance(
        meta(ROWS), meta(ROWS), _logits(dtype, sizes), cu_seqlens(), summary_index(sizes), _protected(sizes)
    ),
    "select_tokens": lambda dtype, sizes: scores.select_tokens(
        meta(ROWS), _logits(dtype, sizes), cu_seqlens(), 1.0, summary_index(sizes), _protected(sizes)
    ),
    "score_and_select": lambda dtype, sizes: scores.score_and_select(
        meta(ROWS), meta(ROWS), _logits(dtype, sizes), cu_seqlens(), 1.0, summary_index(sizes), _protected(sizes)
    ),
    "score_and_select, short": _score_and_select_short,
    "gather_merge": lambda dtype, sizes: gather_merge.gather_merge(_x(dtype, sizes), *_selection()),
    "gather_merge_layernorm": lambda dtype, sizes: gather_merge.gather_merge_layernorm(
        _x(dtype, sizes), *_selection(), _affine(dtype, sizes), _affine(dtype, sizes), 1e-5
    ),
    "gather_merge_rmsnorm": lambda dtype, sizes: gather_merge.gather_merge_rmsnorm(
        _x(dtype, sizes), *_selection(), _affine(dtype, sizes), 1e-6
    ),
    "gather_merge_backward": lambda dtype, sizes: gather_merge.gather_merge_backward(
        _x(dtype, sizes, OUT_ROWS), _x(dtype, sizes), *_selection()
    ),
}
