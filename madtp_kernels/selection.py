# SPDX-License-Identifier: Apache-2.0
"""What every backend of the selection agrees on: its constants, and how a keep mask is laid out."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from madtp_kernels.ragged import segment_sum, sequence_ids

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


def layout_on_device(
    keep: Tensor,  # (T,) bool
    importance: Tensor,  # (T,)
    cu_seqlens: Tensor,  # (B+1,) int32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`layout`, which reads nothing on the host: for what is exported, and for devices that would wait."""
    rows, device = keep.shape[0], keep.device
    ids = sequence_ids(cu_seqlens, rows)  # (T,), B past the last sequence
    pruned = segment_sum((~keep).to(importance.dtype), cu_seqlens)  # (B,), of each sequence how many
    merged = pruned > 0
    ends = torch.nn.functional.pad((cu_seqlens.diff() - pruned.int() + merged.int()).cumsum(0), (1, 0))
    # Before a row stand the kept rows before it, and the merged ones of earlier sequences.
    earlier = torch.nn.functional.pad(merged.long().cumsum(0), (1, 0))[ids]
    nowhere = torch.full_like(ids, rows)
    slot = torch.where(keep & (ids < merged.shape[0]), keep.long().cumsum(0) - 1 + earlier, nowhere)
    source = torch.full((rows + 1,), PADDING, dtype=torch.int32, device=device)
    source = source.scatter(0, slot, torch.arange(rows, dtype=torch.int32, device=device))
    last = torch.where(merged, ends[1:] - 1, rows)
    source = source.scatter(0, last, -1 - torch.arange(merged.shape[0], dtype=torch.int32, device=device))
    weight = importance.masked_fill(keep, 0)
    total = torch.nn.functional.pad(segment_sum(weight, cu_seqlens), (0, 1))[ids]
    uniform = (~keep).to(weight.dtype) / torch.nn.functional.pad(pruned.clamp_min(1), (0, 1), value=1)[ids]
    return keep, ends.int(), source[:rows], torch.where(total > 0, weight / total, uniform)
