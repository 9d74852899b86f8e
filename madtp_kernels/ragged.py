# SPDX-License-Identifier: Apache-2.0
"""Helpers on ragged batches: B sequences in T rows, sequence b in rows cu_seqlens[b]:cu_seqlens[b+1].

Rows past the last sequence belong to none: they are written nowhere, and come out as zeros.
"""

import torch
from torch import Tensor


def sequence_ids(cu_seqlens: Tensor, rows: int) -> Tensor:
    """(T,) int64: the sequence each row belongs to, B past the last. No host read: the row count is given."""
    ends = cu_seqlens[1:].contiguous()
    return torch.bucketize(torch.arange(rows, device=ends.device), ends, right=True)


def summary_rows(cu_seqlens: Tensor, summary_index: Tensor | None, rows: int) -> Tensor:
    """(T,) bool: True at the summary token of each sequence (row 0 of it by default; index -1 means it has none)."""
    ids = sequence_ids(cu_seqlens, rows)
    position = torch.arange(rows, device=cu_seqlens.device) - cu_seqlens[ids]
    if summary_index is None:
        return (position == 0) & (ids < cu_seqlens.numel() - 1)
    return position == torch.nn.functional.pad(summary_index, (0, 1), value=-1)[ids]


def prunable_rows(cu_seqlens: Tensor, summary_index: Tensor | None, protected: Tensor | None, rows: int) -> Tensor:
    """(T,) bool: the candidates of a selection, neither the summary token of a sequence nor `protected` (T,) bool."""
    prunable = ~summary_rows(cu_seqlens, summary_index, rows)
    return prunable if protected is None else prunable & ~protected


def segment_sum(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """(B,) sums of (T,) values over each sequence, in a fixed order (no atomics)."""
    # A trailing sentinel keeps the kernel away from T = 0; lengths are trusted here, ops check them.
    padded = torch.cat([values, values.new_zeros(1)])
    return torch.segment_reduce(padded, "sum", offsets=cu_seqlens.long(), initial=0, unsafe=True)


def pad(x: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> tuple[Tensor, Tensor]:
    """(T, ...) -> zero-padded (B, max_seqlen, ...) and the (B, max_seqlen) bool mask of real rows."""
    rows, batch = x.shape[0], cu_seqlens.numel() - 1
    slots = padded_slots(cu_seqlens, max_seqlen, rows)
    padded = x.new_zeros(batch * max_seqlen + 1, *x.shape[1:]).index_copy(0, slots, x)[:-1]
    real = torch.arange(max_seqlen, device=x.device) < cu_seqlens.diff()[:, None]
    return padded.unflatten(0, (batch, max_seqlen)), real


def unpad(padded: Tensor, cu_seqlens: Tensor, rows: int) -> Tensor:
    """(B, max_seqlen, ...) -> (T, ...): the inverse of `pad`."""
    flat = padded.flatten(0, 1)
    flat = torch.cat([flat, flat.new_zeros(1, *flat.shape[1:])])
    return flat.index_select(0, padded_slots(cu_seqlens, padded.shape[1], rows))


def padded_slots(cu_seqlens: Tensor, max_seqlen: int, rows: int) -> Tensor:
    """(T,) int64: the row of the flattened padded batch that each row has; past its end where it has none."""
    ids, batch = sequence_ids(cu_seqlens, rows), cu_seqlens.numel() - 1
    slots = ids * max_seqlen + torch.arange(rows, device=ids.device) - cu_seqlens[ids]
    return torch.where(ids < batch, slots, batch * max_seqlen)
