# SPDX-License-Identifier: Apache-2.0
"""The gradients of importance and selection as functions of tensors, without a host read."""

import torch
from torch import Tensor

from madtp_kernels.ragged import segment_sum, sequence_ids, summary_rows


def importance_gradient(
    grad: Tensor,  # (T,), of importance
    received_attention: Tensor,  # (T,)
    mag_logits: Tensor,  # (T, K)
    cu_seqlens: Tensor,  # (B+1,) int32
    summary_index: Tensor | None,  # (B,) int32
) -> tuple[Tensor, Tensor, Tensor]:
    """-> the gradients of summary_attention (T,), received_attention (T,) and mag_logits (T, K)."""
    prunable = ~summary_rows(cu_seqlens, summary_index, received_attention.shape[0])
    grad = grad * prunable / 3
    best, alignment_token = mag_logits.max(dim=1)
    guidance = best.to(received_attention.dtype).relu() * prunable
    grad_guidance = _share_backward(grad, guidance, cu_seqlens) * (prunable & (best > 0))
    grad_logits = torch.zeros_like(mag_logits).scatter(
        1, alignment_token[:, None], grad_guidance.to(mag_logits.dtype)[:, None]
    )
    grad_received_attention = _share_backward(grad, received_attention * prunable, cu_seqlens) * prunable
    return grad, grad_received_attention, grad_logits


def selection_gradient(
    grad: Tensor,  # (T,), of merge_weight
    importance: Tensor,  # (T,)
    cu_seqlens: Tensor,  # (B+1,) int32
    keep: Tensor,  # (T,) bool
    merge_weight: Tensor,  # (T,)
) -> Tensor:  # (T,)
    """-> the gradient of importance; which tokens stay is a constant.

    merge_weight_j = S_j / their sum over the pruned; constant (uniform) where that sum is not positive.
    """
    rows = importance.shape[0]
    pruned_importance = _per_row(segment_sum(importance * ~keep, cu_seqlens), cu_seqlens, rows)
    mean = _per_row(segment_sum(grad * merge_weight, cu_seqlens), cu_seqlens, rows)
    live = ~keep & (pruned_importance > 0)
    divisor = torch.where(live, pruned_importance, torch.ones_like(pruned_importance))
    return torch.where(live, (grad - mean) / divisor, 0)


def _per_row(values: Tensor, cu_seqlens: Tensor, rows: int) -> Tensor:
    """(B,) -> (T,): the value of the sequence each row belongs to."""
    return values[sequence_ids(cu_seqlens, rows)]


def _share_backward(grad: Tensor, values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The gradient through values / (their sum over the sequence), zero where that sum is zero."""
    sums = _per_row(segment_sum(values, cu_seqlens), cu_seqlens, values.shape[0])
    safe = torch.where(sums == 0, torch.ones_like(sums), sums)
    mean = _per_row(segment_sum(grad * values / safe, cu_seqlens), cu_seqlens, values.shape[0])
    return torch.where(sums == 0, torch.zeros_like(grad), (grad - mean) / safe)
