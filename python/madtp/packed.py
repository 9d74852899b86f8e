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
    """B sequences, one after another in T rows; the summary token is row 0 of each."""

    x: Tensor  # (T, C)
    cu_seqlens: Tensor  # (B+1,) int32
    max_seqlen: int  # at least the longest sequence
    origin: Tensor  # (T,) int64: the position each token had in its sequence at first, or MERGED

    @classmethod
    def from_padded(cls, hidden: Tensor, mask: Tensor | None = None) -> Packed:
        """hidden (B, N, C), mask (B, N) with non-zero at real tokens (None: all are)."""
        batch, length, channels = hidden.shape
        position = torch.arange(length, device=hidden.device).expand(batch, length)
        if mask is None:
            ends = torch.arange(0, batch * length + 1, length, device=hidden.device, dtype=torch.int32)
            return cls(hidden.reshape(-1, channels), ends, length, position.reshape(-1))
        real = mask.bool()
        ends = torch.nn.functional.pad(real.sum(dim=1).cumsum(0, dtype=torch.int32), (1, 0))
        return cls(hidden[real], ends, length, position[real])

    def to_padded(self) -> tuple[Tensor, Tensor]:
        """(B, N, C) with zeros in the padding, and the (B, N) int64 mask of real tokens."""
        hidden, real = pad(self.x, self.cu_seqlens, self.max_seqlen)
        return hidden, real.long()

    @property
    def batch(self) -> int:
        return self.cu_seqlens.numel() - 1

    def with_x(self, x: Tensor) -> Packed:
        return replace(self, x=x)

    def summary(self) -> Tensor:
        """(B, C): the summary token of each sequence."""
        return self.x.index_select(0, self.cu_seqlens[:-1].long())

    def selected(self, x: Tensor, selection: Selection) -> Packed:
        """The batch after pruning: x (T_out, C) came out of a gather with `selection`."""
        kept = selection.source >= 0
        origin = torch.where(kept, self.origin[selection.source.clamp_min(0).long()], MERGED)
        longest = self.max_seqlen
        if x.device.type == "cpu" and self.batch:  # reading it is free here; elsewhere the bound does
            longest = int(selection.cu_seqlens.diff().max())
        return Packed(x, selection.cu_seqlens, longest, origin)

    def kept_positions(self) -> list[Tensor]:
        """Per sequence, the original positions of the tokens that are still there (merged tokens have none)."""
        return [part[part != MERGED] for part in self.origin.tensor_split(self.cu_seqlens[1:-1].long().cpu())]

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
        self, q: Tensor, k: Tensor, v: Tensor, packed: Packed, keys: Repeated | None = None, *, statistics: bool = False
    ) -> tuple[Tensor, AttentionStats | None]:
        """q (Tq, H, D); k, v (T, H, D) of keys.x (None: self-attention) -> (Tq, H*D) and the statistics, if asked."""
        ragged = {"cu_seqlens_q": packed.cu_seqlens, "max_seqlen_q": packed.max_seqlen}
        if keys is not None:
            k, v = keys.read(k), keys.read(v)
            ragged |= {"cu_seqlens_k": keys.cu_seqlens, "max_seqlen_k": keys.max_seqlen}
        if not statistics:
            return varlen_attention(q, k, v, **ragged).flatten(1), None
        out, stats = varlen_attention(q, k, v, **ragged, return_stats=True)
        return out.flatten(1), stats
