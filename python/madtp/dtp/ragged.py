# SPDX-License-Identifier: Apache-2.0
"""A ragged batch of token sequences on its way through an encoder."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from madtp_kernels import AttentionStats, Selection, varlen_attention
from madtp_kernels.ragged import pad, sequence_ids

MERGED = -1  # `origin` of a token that is a merge of pruned ones


@dataclass(frozen=True)
class RaggedBatch:
    """B sequences, one after another in T rows, which may be followed by rows of no meaning."""

    x: Tensor  # (T, C)
    cu_seqlens: Tensor  # (B+1,) int32
    max_seqlen: int  # at least the longest sequence
    positions: int  # how many each sequence had at first, padding among them
    origin: Tensor  # (T,) int64: the position each token had in its sequence at first, or MERGED
    summary_index: Tensor | None = None  # (B,) int32: the row of each sequence's summary token, -1: none; None: row 0
    aligned: Tensor | None = None  # (B, K, d): MAG's feature of the block the tokens come from, where it is collected
    may_be_empty: bool = False  # some sequences may have no token at all
    fixed: bool = False  # T and the work on it depend on no value: nothing is read on the host
    # How many tokens of each sequence may go, where all have as many and the host knows it; all are as long then.
    prunable: int | None = None

    @classmethod
    def from_padded(
        cls,
        hidden: Tensor,
        mask: Tensor | None = None,
        summary_position: Tensor | None = None,
        fixed: bool = False,
        summary_tokens: int | None = None,
    ) -> RaggedBatch:
        """hidden (B, N, C), mask (B, N) with non-zero at real tokens (None: all are).

        summary_position: (B,) the position of each summary token, a real one; -1: none; None: the first real token.
        summary_tokens: how many each sequence has, 0 or 1; None: that is known of first tokens alone.
        """
        if hidden.device.type == "cpu" and (torch.compiler.is_exporting() or torch.jit.is_tracing()):
            fixed = False  # as ops on a CPU check that sequences end with the rows, which these cannot read
        batch, length, channels = hidden.shape
        position = torch.arange(length, device=hidden.device).expand(batch, length)
        if mask is None:
            ends = torch.arange(0, batch * length + 1, length, device=hidden.device, dtype=torch.int32)
            index = None if summary_position is None else summary_position.int()
            if summary_position is None:
                summary_tokens = 1
            prunable = None if summary_tokens is None else max(length - summary_tokens, 0)
            rows = hidden.reshape(-1, channels), ends, length, length, position.reshape(-1), index
            return cls(*rows, fixed=fixed, prunable=prunable)
        real = mask.bool()
        ends = torch.nn.functional.pad(real.sum(dim=1).cumsum(0, dtype=torch.int32), (1, 0))
        index = None
        if summary_position is not None:
            before = real & (position < summary_position[:, None])
            index = before.sum(dim=1, dtype=torch.int32).where(summary_position >= 0, -1)
        if not fixed:
            return cls(hidden[real], ends, length, length, position[real], index, may_be_empty=True)
        order = (~real).flatten().byte().argsort(stable=True)  # padding goes last
        hidden, origin = hidden.flatten(0, 1)[order], position.flatten()[order]
        return cls(hidden, ends, length, length, origin, index, may_be_empty=True, fixed=True)

    def to_padded(self) -> tuple[Tensor, Tensor]:
        """(B, N, C) with zeros in the padding, and the (B, N) int64 mask of real tokens."""
        hidden, real = pad(self.x, self.cu_seqlens, self.max_seqlen)
        return hidden, real.long()

    def to_positions(self) -> Tensor:
        """(B, N, C): every token where it was at first; zeros where none is left. Merged tokens have no place."""
        length = self.positions
        ids = sequence_ids(self.cu_seqlens, self.x.shape[0])
        nowhere = self.num_sequences * length
        lost = (self.origin == MERGED) | (ids == self.num_sequences)
        slots = torch.where(lost, nowhere, ids * length + self.origin)
        padded = self.x.new_zeros(nowhere + 1, self.x.shape[1]).index_copy(0, slots, self.x)
        return padded[:nowhere].unflatten(0, (self.num_sequences, length))

    @property
    def num_sequences(self) -> int:
        """B."""
        return self.cu_seqlens.numel() - 1

    @property
    def num_rows(self) -> Tensor | None:
        """How many rows have a meaning, unread: one int32. None: all have."""
        return self.cu_seqlens[-1:] if self.fixed else None

    def count_rows(self) -> int:
        """How many rows have a meaning. Reads it on the host."""
        return int(self.cu_seqlens[-1])

    def for_op(self, values: Tensor) -> Tensor:
        """`for_op` of values (T, ...) that belong to these rows."""
        return for_op(values, self.cu_seqlens) if self.fixed else values

    def with_x(self, x: Tensor) -> RaggedBatch:
        """The batch with other features (T, C')."""
        return replace(self, x=x)

    def without_features(self) -> RaggedBatch:
        """What the tokens are, and none of what a gradient could flow through."""
        return replace(self, x=self.x.new_empty(0), aligned=None)

    def summary_features(self) -> Tensor:
        """(B, C): the summary token of each sequence; in sequences without one, its first token; of none, zeros."""
        row, x = self.cu_seqlens[:-1], self.x
        row = row if self.summary_index is None else row + self.summary_index.clamp_min(0)
        if self.may_be_empty:
            x = torch.nn.functional.pad(x, (0, 0, 0, 1))
            row = torch.where(self.cu_seqlens.diff() > 0, row, self.x.shape[0])
        return x.index_select(0, row.long())

    def selected(self, x: Tensor, selection: Selection, prunable: int | None = None) -> RaggedBatch:
        """The batch after pruning: x (T_out, C) came out of a gather with `selection`, and `prunable` is its own."""
        kept = selection.source >= 0
        origin = torch.where(kept, self.origin[selection.source.clamp_min(0).long()], MERGED)
        index = self.summary_index
        if index is not None:  # it moves up by the pruned rows before it
            before = torch.nn.functional.pad((~selection.keep).cumsum(0, dtype=torch.int32), (1, 0))
            first = self.cu_seqlens[:-1]
            # int64: an exported program may have no other indices.
            index = index - (before[(first + index.clamp_min(0)).long()] - before[first.long()])
        longest = self.max_seqlen
        # On a CPU reading the longest sequence is free; elsewhere the bound does.
        free = x.device.type == "cpu" and not torch.compiler.is_exporting()
        if prunable is not None and self.prunable is not None:
            longest += prunable - self.prunable
        elif free and self.num_sequences and not self.fixed:
            longest = int(selection.cu_seqlens_out.diff().max())
        rows = replace(self, cu_seqlens=selection.cu_seqlens_out, max_seqlen=longest, aligned=None, prunable=prunable)
        return replace(rows, x=x, origin=origin, summary_index=index)

    def kept_positions(self) -> list[Tensor]:
        """Per sequence, the original positions of the tokens that are still there (merged tokens have none)."""
        ends = self.cu_seqlens.long().cpu()
        return [part[part != MERGED] for part in self.origin[: ends[-1]].tensor_split(ends[1:-1])]

    def split(self, count: int) -> tuple[RaggedBatch, RaggedBatch]:
        """The first `count` sequences and the others. Reads where they part, unless the batch is fixed."""
        if self.fixed:
            numbers = torch.arange(self.num_sequences, device=self.x.device)
            return self._copied(numbers[:count]), self._copied(numbers[count:])
        index, rows = self.summary_index, replace(self, aligned=None)
        row = self.cu_seqlens[count].item() if self.prunable is None else count * self.max_seqlen
        torch._check(row >= 0)
        torch._check(row <= self.x.shape[0])
        ends, other_ends = self.cu_seqlens[: count + 1], self.cu_seqlens[count:] - row
        first, other = (None, None) if index is None else (index[:count], index[count:])
        return (
            replace(rows, x=self.x[:row], cu_seqlens=ends, origin=self.origin[:row], summary_index=first),
            replace(rows, x=self.x[row:], cu_seqlens=other_ends, origin=self.origin[row:], summary_index=other),
        )

    def repeated(self, index: Tensor) -> RepeatedSequences:
        """The sequences `index` (Q,) names, as keys: nothing is copied yet."""
        source, ends = self._rows_of(index)
        return RepeatedSequences(self.x, source, ends, self.max_seqlen, self.fixed)

    def in_order(self) -> RepeatedSequences:
        """All sequences once, as keys."""
        return RepeatedSequences(self.x, None, self.cu_seqlens, self.max_seqlen, self.fixed)

    def _rows_of(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """(Tk,) int64, the rows of the sequences `index` (Q,) names, and their cu_seqlens (Q+1,)."""
        lengths = self.cu_seqlens.diff()[index]
        ends = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        known = self.fixed or self.prunable is not None
        count = index.numel() * self.max_seqlen if known else int(ends[-1])
        ids = sequence_ids(ends, count)
        inside = torch.arange(count, device=ids.device) - ends[ids]
        starts = torch.nn.functional.pad(self.cu_seqlens[index], (0, 1))  # past the last sequence: any row
        return (starts[ids] + inside).long().clamp_max(self.x.shape[0] - 1), ends

    def _copied(self, index: Tensor) -> RaggedBatch:
        """A copy of the sequences `index` (Q,) names."""
        source, ends = self._rows_of(index)
        summary_index = None if self.summary_index is None else self.summary_index[index]
        x, origin = self.x[source], self.origin[source]
        return replace(self, x=x, cu_seqlens=ends, origin=origin, summary_index=summary_index, aligned=None)


@dataclass(frozen=True)
class RepeatedSequences:
    """Keys of a cross-attention: several queries may read one sequence, whose projections are computed once."""

    x: Tensor  # (T, C)
    source: Tensor | None  # (Tk,) int64: the row of x that each key is; None is all of them
    cu_seqlens: Tensor  # (Q+1,) int32
    max_seqlen: int
    fixed: bool = False  # as of `RaggedBatch`

    def read(self, projected: Tensor) -> Tensor:
        """(T, ...) computed from x -> (Tk, ...)."""
        read = projected if self.source is None else projected.index_select(0, self.source)
        return for_op(read, self.cu_seqlens) if self.fixed else read


def for_op(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """(T, ...) of rows, on a CPU without those past the sequences: there ops check that sequences end with the rows."""
    return values[: int(cu_seqlens[-1])] if values.device.type == "cpu" else values


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """(T, H*D) -> (T, H, D)"""
    return x.unflatten(-1, (-1, head_dim))


class RaggedAttention(nn.Module):
    """The attention matmuls of a branch; a module, so that a profile finds whose MACs they are."""

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        batch: RaggedBatch,
        keys: RepeatedSequences | None = None,
        *,
        causal: bool = False,
        statistics: bool = False,
    ) -> tuple[Tensor, AttentionStats | None]:
        """q (Tq, H, D); k, v (T, H, D) of keys.x (None: self-attention) -> (Tq, H*D) and the statistics, if asked.

        What rows past the sequences hold then is undefined; on a CPU they are NaN, and the statistics have none.
        """
        given = q.shape[0]
        q = batch.for_op(q)
        ragged: dict[str, Any] = {"cu_seqlens_q": batch.cu_seqlens, "max_seqlen_q": batch.max_seqlen, "causal": causal}
        if keys is not None:
            k, v = keys.read(k), keys.read(v)
            ragged |= {"cu_seqlens_k": keys.cu_seqlens, "max_seqlen_k": keys.max_seqlen}
        else:
            k, v = batch.for_op(k), batch.for_op(v)
        if statistics:
            out, stats = varlen_attention(q, k, v, **ragged, summary_index=batch.summary_index, return_stats=True)
        else:
            out, stats = varlen_attention(q, k, v, **ragged), None
        if q.shape[0] < given:
            out = torch.nn.functional.pad(out, (0, 0, 0, 0, 0, given - q.shape[0]), value=math.nan)
        return out.flatten(1), stats
