# SPDX-License-Identifier: Apache-2.0
"""The threshold of the method where no alignment takes part: how important a token has to be to stay, by a temperature.

Source: MADTP (Cao et al., CVPR 2024, arXiv 2403.02991), section 3.3; docs/method.md, DTP, says what stands in for MAG.
"""

from __future__ import annotations

import torch
from torch import Tensor

from madtp_kernels import select_tokens
from madtp_kernels.ragged import segment_sum, sequence_ids

TIE = 8  # roundings, of the largest of a sequence, by which importances may differ that tie
EXPONENT = 126  # at most, of a power of two that is a float32 as its inverse is


def least_first(importance: Tensor, cu_seqlens: Tensor, prunable: Tensor | None = None) -> Tensor:
    """(T, 1), in place of the logits of MAG: -z, z the importances (T,) with mean 0 and deviation 1 in each sequence.

    Their softmax is at the least important token where the temperature is low, and even where it is high.

    Args:
        prunable: (T,) bool, the tokens that count; None: all.
    """
    values = importance.detach()
    prunable = torch.ones_like(values, dtype=torch.bool) if prunable is None else prunable
    sequence = sequence_ids(cu_seqlens, values.shape[0])
    counts = segment_sum(prunable.float(), cu_seqlens).clamp(min=1)

    def mean(of: Tensor) -> Tensor:  # over the prunable tokens of each sequence, at each token
        return (segment_sum(of.masked_fill(~prunable, 0), cu_seqlens) / counts)[sequence]

    centred = values - mean(values)
    # By a power of two, which rounds nothing: squares of what is left neither overflow nor vanish.
    most = _largest(centred.abs().masked_fill(~prunable, 0), cu_seqlens, sequence)
    scaled = torch.ldexp(centred, -most.frexp().exponent.clamp(-EXPONENT, EXPONENT)[sequence])
    z = scaled / mean(scaled.square()).sqrt().clamp(min=torch.finfo(values.dtype).tiny)
    return -z[:, None]


def without_rounding(importance: Tensor, cu_seqlens: Tensor) -> Tensor:
    """(T,) float32: the importances (T,), and one value for all of a sequence where they tie but for rounding."""
    values, sequence = importance.detach().float(), sequence_ids(cu_seqlens, importance.shape[0])
    most, least = _largest(values, cu_seqlens, sequence), -_largest(-values, cu_seqlens, sequence)
    eps = max(torch.finfo(importance.dtype).eps, torch.finfo(values.dtype).eps)
    ties = most - least <= TIE * eps * torch.maximum(most.abs(), least.abs())
    return torch.where(ties[sequence], most[sequence], values)


def above_threshold(importance: Tensor, cu_seqlens: Tensor, temperature: float) -> Tensor:
    """(T,) bool: the tokens of each sequence that stay, at least one; all where all tie, or differ by rounding alone.

    Args:
        importance: (T,), of any sign.
        cu_seqlens: (B + 1,) int32.
        temperature: > 0; larger prunes more.
    """
    values = without_rounding(importance, cu_seqlens)
    nobody = torch.full_like(cu_seqlens[1:], -1)  # there are no summary tokens
    logits = least_first(values, cu_seqlens)
    keep = select_tokens(values, logits, cu_seqlens, temperature, summary_index=nobody).keep
    left = segment_sum(keep.float(), cu_seqlens)
    return keep | (left == 0)[sequence_ids(cu_seqlens, len(keep))]


def _largest(values: Tensor, cu_seqlens: Tensor, sequence: Tensor) -> Tensor:
    """(B,), of each sequence; -inf where it is empty."""
    nothing = values.new_full((len(cu_seqlens) - 1,), -torch.inf)
    return nothing.scatter_reduce(0, sequence, values, "amax")
