"""A ragged batch of token sequences on its way through an encoder."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from madtp_kernels import AttentionStats, Selection, varlen_attention
from madtp_kernels.ragged import pad, sequence_ids

MERGED = -1  # `origin` of a token that is a merge of pruned ones


@dataclass(frozen=True)
class Packed:
    """B sequences, one after another in T rows, which may be followed by rows of no meaning."""

    x: Tensor  # (T, C)
    cu_seqlens: Tensor  # (B+1,) int32
    max_seqlen: int  # at least the longest sequence
    origin: Tensor  # (T,) int64: the position each token had in its sequence at first, or MERGED
    summary_index: Tensor | None = None  # (B,) int32: the row of each sequence's summary token, -1: none; None: row 0
    aligned: Tensor | None = None  # (B, K, d): MAG's feature of the block the tokens come from, where it is collected
    fixed: bool = False  # T and the work on it depend on no value: nothing is read on the host

    @classmethod
    def from_padded(
        cls, hidden: Tensor, mask: Tensor | None = None, summary: Tensor | None = None, fixed: bool = False
    ) -> Packed:
        """hidden (B, N, C), mask (B, N) with non-zero at real tokens (None: all are).

        summary: (B,) the position of each summary token, a real one; -1: none; None: the first real token.
        """
        batch, length, channels = hidden.shape
        position = torch.arange(length, device=hidden.device).expand(batch, length)
        if mask is None:
            ends = torch.arange(0, batch * length + 1, length, device=hidden.device, dtype=torch.int32)
            row = None if summary is None else summary.int()
            return cls(hidden.reshape(-1, channels), ends, length, position.reshape(-1), row, fixed=fixed)
        real = mask.bool()
        ends = torch.nn.functional.pad(real.sum(dim=1).cumsum(0, dtype=torch.int32), (1, 0))
        row = None
        if summary is not None:
            row = (real & (position < summary[:, None])).sum(dim=1, dtype=torch.int32).where(summary >= 0, -1)
        if not fixed:
            return cls(hidden[real], ends, length, position[real], row)
        order = (~real).flatten().byte().argsort(stable=True)  # padding goes last
        return cls(hidden.flatten(0, 1)[order], ends, length, position.flatten()[order], row, fixed=True)

    def to_padded(self) -> tuple[Tensor, Tensor]:
        """(B, N, C) with zeros in the padding, and the (B, N) int64 mask of real tokens."""
        hidden, real = pad(self.x, self.cu_seqlens, self.max_seqlen)
        return hidden, real.long()

    def to_positions(self, length: int) -> Tensor:
        """(B, length, C): every token where it was at first; zeros where none is left. Merged tokens have no place."""
        rows = self.x.shape[0]
        ids = torch.bucketize(torch.arange(rows, device=self.x.device), self.cu_seqlens[1:], right=True)
        nowhere = self.batch * length
        slots = torch.where((self.origin == MERGED) | (ids == self.batch), nowhere, ids * length + self.origin)
        padded = self.x.new_zeros(nowhere + 1, self.x.shape[1]).index_copy(0, slots, self.x)
        return padded[:nowhere].unflatten(0, (self.batch, length))

    @property
    def batch(self) -> int:
        return self.cu_seqlens.numel() - 1

    def tokens(self) -> int:
        """How many rows have a meaning. Reads it."""
        return int(self.cu_seqlens[-1])

    @property
    def total(self) -> Tensor | None:
        """How many rows have a meaning, unread: one int32. None: all have."""
        return self.cu_seqlens[-1:] if self.fixed else None

    def for_op(self, rows: Tensor) -> Tensor:
        """`for_op` of rows (T, ...) that belong to these."""
        return for_op(rows, self.cu_seqlens) if self.fixed else rows

    def with_x(self, x: Tensor) -> Packed:
        return replace(self, x=x)

    def summary(self) -> Tensor:
        """(B, C): the summary token of each sequence; in sequences without one, its first token."""
        row = self.cu_seqlens[:-1]
        row = row if self.summary_index is None else row + self.summary_index.clamp_min(0)
        return self.x.index_select(0, row.long())

    def selected(self, x: Tensor, selection: Selection) -> Packed:
        """The batch after pruning: x (T_out, C) came out of a gather with `selection`."""
        kept = selection.source >= 0
        origin = torch.where(kept, self.origin[selection.source.clamp_min(0).long()], MERGED)
        summary = self.summary_index
        if summary is not None:  # it moves up by the pruned rows before it
            before = torch.nn.functional.pad((~selection.keep).cumsum(0, dtype=torch.int32), (1, 0))
            first = self.cu_seqlens[:-1]
            summary = summary - (before[first + summary.clamp_min(0)] - before[first])
        longest = self.max_seqlen
        if x.device.type == "cpu" and self.batch and not self.fixed:  # reading is free here; elsewhere the bound does
            longest = int(selection.cu_seqlens_out.diff().max())
        return Packed(x, selection.cu_seqlens_out, longest, origin, summary, fixed=self.fixed)

    def kept_positions(self) -> list[Tensor]:
        """Per sequence, the original positions of the tokens that are still there (merged tokens have none)."""
        ends = self.cu_seqlens.long().cpu()
        return [part[part != MERGED] for part in self.origin[: ends[-1]].tensor_split(ends[1:-1])]

    def split(self, batch: int) -> tuple[Packed, Packed]:
        """The first `batch` sequences and the others. Reads where they part, unless the batch is fixed."""
        if self.fixed:
            halves = torch.arange(self.batch, device=self.x.device).tensor_split([batch])
            return tuple(self._taken(index) for index in halves)
        row = int(self.cu_seqlens[batch])
        head, tail = self.cu_seqlens[: batch + 1], self.cu_seqlens[batch:] - row
        summary = (None, None) if self.summary_index is None else self.summary_index.tensor_split([batch])
        parts = zip(self.x.tensor_split([row]), (head, tail), self.origin.tensor_split([row]), summary, strict=True)
        return tuple(Packed(x, ends, self.max_seqlen, origin, index) for x, ends, origin, index in parts)

    def repeated(self, index: Tensor) -> Repeated:
        """The sequences `index` (Q,) names, as rows to read: nothing is copied yet."""
        rows, ends = self._rows_of(index)
        return Repeated(self.x, rows, ends, self.max_seqlen, self.fixed)

    def in_order(self) -> Repeated:
        return Repeated(self.x, None, self.cu_seqlens, self.max_seqlen, self.fixed)

    def _rows_of(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """(Tk,) int64, the rows of the sequences `index` (Q,) names, and their cu_seqlens (Q+1,)."""
        lengths = self.cu_seqlens.diff()[index]
        ends = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        total = index.numel() * self.max_seqlen if self.fixed else int(ends[-1])
        ids = sequence_ids(ends, total)
        inside = torch.arange(total, device=ids.device) - ends[ids]
        starts = torch.nn.functional.pad(self.cu_seqlens[index], (0, 1))  # past the last sequence: any row
        return (starts[ids] + inside).long().clamp_max(self.x.shape[0] - 1), ends

    def _taken(self, index: Tensor) -> Packed:
        """A copy of the sequences `index` (Q,) names."""
        rows, ends = self._rows_of(index)
        summary = None if self.summary_index is None else self.summary_index[index]
        return Packed(self.x[rows], ends, self.max_seqlen, self.origin[rows], summary, fixed=self.fixed)


@dataclass(frozen=True)
class Repeated:
    """Keys of a cross-attention: several queries may read one sequence, whose projections are computed once."""

    x: Tensor  # (T, C)
    rows: Tensor | None  # (Tk,) int64 into x; None is all of them
    cu_seqlens: Tensor  # (Q+1,) int32
    max_seqlen: int
    fixed: bool = False  # as of `Packed`

    def read(self, projected: Tensor) -> Tensor:
        """(T, ...) computed from x -> (Tk, ...)."""
        read = projected if self.rows is None else projected.index_select(0, self.rows)
        return for_op(read, self.cu_seqlens) if self.fixed else read


def for_op(rows: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Rows (T, ...), on a CPU without those past the sequences: there ops check that sequences end with the rows."""
    return rows[: int(cu_seqlens[-1])] if rows.device.type == "cpu" else rows


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(T, H*D) -> (T, H, D)"""
    return x.unflatten(-1, (heads, -1))


class RaggedAttention(nn.Module):
    """The attention matmuls of a branch; a module, so that accounting finds whose they are."""

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        packed: Packed,
        keys: Repeated | None = None,
        *,
        causal: bool = False,
        statistics: bool = False,
    ) -> tuple[Tensor, AttentionStats | None]:
        """q (Tq, H, D); k, v (T, H, D) of keys.x (None: self-attention) -> (Tq, H*D) and the statistics, if asked.

        What rows past the sequences hold then is undefined; on a CPU they are NaN, and the statistics have none.
        """
        rows = q.shape[0]
        q = packed.for_op(q)
        ragged = {"cu_seqlens_q": packed.cu_seqlens, "max_seqlen_q": packed.max_seqlen, "causal": causal}
        if keys is not None:
            k, v = keys.read(k), keys.read(v)
            ragged |= {"cu_seqlens_k": keys.cu_seqlens, "max_seqlen_k": keys.max_seqlen}
        else:
            k, v = packed.for_op(k), packed.for_op(v)
        if statistics:
            out, stats = varlen_attention(q, k, v, **ragged, summary_index=packed.summary_index, return_stats=True)
        else:
            out, stats = varlen_attention(q, k, v, **ragged), None
        if q.shape[0] < rows:
            out = torch.nn.functional.pad(out, (0, 0, 0, 0, 0, rows - q.shape[0]), value=math.nan)
        return out.flatten(1), stats
