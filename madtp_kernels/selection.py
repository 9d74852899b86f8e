# SPDX-License-Identifier: Apache-2.0
"""What every backend of the selection agrees on: its constants, and how a keep mask is laid out."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

PADDING = torch.iinfo(torch.int32).min  # `source` of output rows past the last sequence
ARGMAX_TEMPERATURE = 0.01  # the softmax of the threshold picks one token here; a lower tau lowers the threshold itself


def bounds(cu_seqlens: Tensor) -> list[tuple[int, int]]:
    """(first row, end) of every sequence, read on the host."""
    offsets = cu_seqlens.tolist()
    return list(zip(offsets[:-1], offsets[1:], strict=True))


def layout(
    keep: Tensor,  # (T,) bool
    importance: Tensor,  # (T,)
    cu_seqlens: Tensor,  # (B+1,) int32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> keep, cu_seqlens_out (B+1,) int32, source (T,) int32, merge_weight (T,): kept rows in order, then one merged
    row where any was pruned."""
    source, ends, weights = [], [0], []
    for sequence, (begin, end) in enumerate(bounds(cu_seqlens)):
        kept = keep[begin:end]
        source += (begin + kept.nonzero().flatten()).tolist()
        if not kept.all():
            source.append(-(sequence + 1))
            pruned = importance[begin:end].masked_fill(kept, 0)  # masked, not multiplied: a kept row may hold NaN
            pruned_importance = importance[begin:end][~kept].sum()
            uniform = (~kept).to(importance.dtype) / (~kept).sum()
            weights.append(pruned / pruned_importance if pruned_importance > 0 else uniform)
        else:
            weights.append(torch.zeros_like(importance[begin:end]))
        ends.append(len(source))
    source += [PADDING] * (keep.numel() - len(source))
    as_int32 = functools.partial(torch.tensor, dtype=torch.int32, device=keep.device)
    merge_weight = torch.cat(weights) if weights else torch.zeros_like(importance)
    return keep, as_int32(ends), as_int32(source), merge_weight
