# SPDX-License-Identifier: Apache-2.0
"""The threshold of the method where no alignment takes part: how important a token has to be to stay, by a temperature.

Source: MADTP (Cao et al., CVPR 2024, arXiv 2403.02991), section 3.3; docs/method.md, DTP, says what stands in for MAG.
"""

from __future__ import annotations

import torch
from torch import Tensor

from madtp_kernels import select_tokens
from madtp_kernels.ragged import segment_sum, sequence_ids


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
    z = centred / mean(centred.square()).sqrt().clamp(min=torch.finfo(values.dtype).tiny)
    return -z[:, None]


def above_threshold(importance: Tensor, cu_seqlens: Tensor, temperature: float) -> Tensor:
    """(T,) bool: the tokens of each sequence that stay, at least one; all where those that tie are all there are.

    Args:
        importance: (T,), of any sign.
        cu_seqlens: (B + 1,) int32.
        temperature: > 0; larger prunes more.
    """
    values = importance.detach().float()
    nobody = torch.full_like(cu_seqlens[1:], -1)  # there are no summary tokens
    logits = least_first(values, cu_seqlens)
    keep = select_tokens(values, logits, cu_seqlens, temperature, summary_index=nobody).keep
    left = segment_sum(keep.float(), cu_seqlens)
    return keep | (left == 0)[sequence_ids(cu_seqlens, len(keep))]
