"""A ragged batch of token sequences on its way through an encoder."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from madtp_kernels import AttentionStats, Selection, varlen_attention
from madtp_kernels.reference.ragged import pad, sequence_ids

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

    @classmethod
    def from_padded(cls, hidden: Tensor, mask: Tensor | None = None, summary: Tensor | None = None) -> Packed:
        """hidden (B, N, C), mask (B, N) with non-zero at real tokens (None: all are).

        summary: (B,) the position of each summary token, a real one; -1: none; None: the first real token.
        """
        batch, length, channels = hidden.shape
        position = torch.arange(length, device=hidden.device).expand(batch, length)
        if mask is None:
            ends = torch.arange(0, batch * length + 1, length, device=hidden.device, dtype=torch.int32)
            row = None if summary is None else summary.int()
            return cls(hidden.reshape(-1, channels), ends, length, position.reshape(-1), row)
        real = mask.bool()
        ends = torch.nn.functional.pad(real.sum(dim=1).cumsum(0, dtype=torch.int32), (1, 0))
        row = None
        if summary is not None:
            row = (real & (position < summary[:, None])).sum(dim=1, dtype=torch.int32).where(summary >= 0, -1)
        return cls(hidden[real], ends, length, position[real], row)

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
        if x.device.type == "cpu" and self.batch:  # reading it is free here; elsewhere the bound does
            longest = int(selection.cu_seqlens.diff().max())
        return Packed(x, selection.cu_seqlens, longest, origin, summary)

    def kept_positions(self) -> list[Tensor]:
        """Per sequence, the original positions of the tokens that are still there (merged tokens have none)."""
        ends = self.cu_seqlens.long().cpu()
        return [part[part != MERGED] for part in self.origin[: ends[-1]].tensor_split(ends[1:-1])]

    def split(self, batch: int) -> tuple[Packed, Packed]:
        """The first `batch` sequences and the others. Reads where they part."""
        row = int(self.cu_seqlens[batch])
        head, tail = self.cu_seqlens[: batch + 1], self.cu_seqlens[batch:] - row
        summary = (None, None) if self.summary_index is None else self.summary_index.tensor_split([batch])
        parts = zip(self.x.tensor_split([row]), (head, tail), self.origin.tensor_split([row]), summary, strict=True)
        return tuple(Packed(x, ends, self.max_seqlen, origin, index) for x, ends, origin, index in parts)

    def repeated(self, index: Tensor) -> Repeated:
        """The sequences `index` (Q,) names, as rows to read: nothing is copied yet."""
        lengths = self.cu_seqlens.diff()[index]
        ends = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        total = int(ends[-1])
        ids = sequence_ids(ends, total)
        inside = torch.arange(total, device=ids.device) - ends[ids]
        return Repeated(self.x, (self.cu_seqlens[index][ids] + inside).long(), ends, self.max_seqlen)

    def in_order(self) -> Repeated:
        return Repeated(self.x, None, self.cu_seqlens, self.max_seqlen)


@dataclass(frozen=True)
class Repeated:
    """Keys of a cross-attention: several queries may read one sequence, whose projections are computed once."""

    x: Tensor  # (T, C)
    rows: Tensor | None  # (Tk,) int64 into x; None is all of them
    cu_seqlens: Tensor  # (Q+1,) int32
    max_seqlen: int

    def read(self, projected: Tensor) -> Tensor:
        """(T, ...) computed from x -> (Tk, ...)."""
        return projected if self.rows is None else projected.index_select(0, self.rows)


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
        """q (Tq, H, D); k, v (T, H, D) of keys.x (None: self-attention) -> (Tq, H*D) and the statistics, if asked."""
        ragged = {"cu_seqlens_q": packed.cu_seqlens, "max_seqlen_q": packed.max_seqlen, "causal": causal}
        if keys is not None:
            k, v = keys.read(k), keys.read(v)
            ragged |= {"cu_seqlens_k": keys.cu_seqlens, "max_seqlen_k": keys.max_seqlen}
        if not statistics:
            return varlen_attention(q, k, v, **ragged).flatten(1), None
        out, stats = varlen_attention(q, k, v, **ragged, summary_index=packed.summary_index, return_stats=True)
        return out.flatten(1), stats
