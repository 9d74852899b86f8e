# SPDX-License-Identifier: Apache-2.0
"""MAG, multi-modality alignment guidance: learnable tokens that every branch is compared with.

Source: MADTP (Cao et al., CVPR 2024, arXiv 2403.02991), section 3.2.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from madtp_kernels.ragged import pad, summary_rows


class AlignmentGuide(nn.Module):
    """K alignment tokens E (K, d), shared by the branches, and each branch's map to their d dimensions.

    Args:
        tokens: K. dim: d.
        widths: channels of each branch; where they equal d the map is the identity, else one Linear.
    """

    def __init__(self, tokens: int, dim: int, widths: dict[str, int]):
        super().__init__()
        self.alignment_tokens = nn.Parameter(torch.randn(tokens, dim))
        self.maps = nn.ModuleDict(
            {branch: nn.Identity() if width == dim else nn.Linear(width, dim) for branch, width in widths.items()}
        )
        self.logits = nn.ModuleDict({branch: AlignmentLogits() for branch in widths})

    def parameters_of(self, branch: str) -> Iterator[nn.Parameter]:
        """Those that take part in a branch."""
        yield self.alignment_tokens
        yield from self.maps[branch].parameters()

    def forward(self, branch: str, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features entering a block (T, C) -> q (T, d) and the unscaled logits A = q E^T (T, K)."""
        q = self.maps[branch](x)
        return q, self.logits[branch](q, self.alignment_tokens)


class AlignmentLogits(nn.Module):
    """A module of its own, so that a profile finds each branch's share of the MACs."""

    def forward(self, q: Tensor, alignment_tokens: Tensor) -> Tensor:
        return q @ alignment_tokens.T


def aligned_feature(
    q: Tensor, logits: Tensor, cu_seqlens: Tensor, max_seqlen: int, summary_index: Tensor | None = None
) -> Tensor:
    """F = softmax over the prunable tokens of (A^T / sqrt(d)) times q: (T, d), (T, K) -> (B, K, d).

    The summary token (row 0 of a sequence, or `summary_index`) takes no part; a sequence with nothing else has F = 0.
    """
    prunable = ~summary_rows(cu_seqlens, summary_index, q.shape[0])
    padded_q, _ = pad(q, cu_seqlens, max_seqlen)  # (B, N, d)
    padded_logits, _ = pad(logits / q.shape[1] ** 0.5, cu_seqlens, max_seqlen)  # (B, N, K)
    counts, _ = pad(prunable, cu_seqlens, max_seqlen)  # (B, N)
    # A finite floor: a row of nothing but masked tokens stays defined, and the mask makes it zero.
    weights = padded_logits.masked_fill(~counts[..., None], torch.finfo(logits.dtype).min).softmax(dim=1)
    return torch.einsum("bnk,bnd->bkd", weights * counts[..., None], padded_q)


def normalised(features: list[Tensor]) -> Tensor:
    """The features of a branch's layers, summed and l2-normalised per alignment token: all (B, K, d)."""
    return torch.nn.functional.normalize(torch.stack(features).sum(dim=0), dim=-1)
