# SPDX-License-Identifier: Apache-2.0
"""The gradients of importance, selection and RMSNorm as functions of tensors, without a host read."""

import torch
from torch import Tensor

from madtp_kernels.ragged import prunable_rows, segment_sum, sequence_ids


def importance_gradient(
    grad: Tensor,  # (T,), of importance
    received_attention: Tensor,  # (T,)
    mag_logits: Tensor,  # (T, K)
    cu_seqlens: Tensor,  # (B+1,) int32
    summary_index: Tensor | None,  # (B,) int32
    protected: Tensor | None,  # (T,) bool
) -> tuple[Tensor, Tensor, Tensor]:
    """-> the gradients of summary_attention (T,), received_attention (T,) and mag_logits (T, K)."""
    prunable = prunable_rows(cu_seqlens, summary_index, protected, received_attention.shape[0])
    # Masked, not multiplied by zero: what is no candidate takes no part, whatever it holds.
    grad = grad.masked_fill(~prunable, 0) / 3
    best, alignment_token = mag_logits.max(dim=1)
    guidance = best.to(received_attention.dtype).relu().masked_fill(~prunable, 0)
    grad_guidance = _share_backward(grad, guidance, cu_seqlens) * (prunable & (best > 0))
    grad_logits = torch.zeros_like(mag_logits).scatter(
        1, alignment_token[:, None], grad_guidance.to(mag_logits.dtype)[:, None]
    )
    received_attention = received_attention.masked_fill(~prunable, 0)
    grad_received_attention = _share_backward(grad, received_attention, cu_seqlens) * prunable
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
    pruned_importance = _per_row(segment_sum(importance.masked_fill(keep, 0), cu_seqlens), cu_seqlens, rows)
    mean = _per_row(segment_sum(grad * merge_weight, cu_seqlens), cu_seqlens, rows)
    live = ~keep & (pruned_importance > 0)
    divisor = torch.where(live, pruned_importance, torch.ones_like(pruned_importance))
    return torch.where(live, (grad - mean) / divisor, 0)


def rmsnorm_gradient(
    grad: Tensor,  # (R, C), of the normalised rows
    rows: Tensor,  # (R, C)
    weight: Tensor,  # (C,)
    eps: float,
) -> tuple[Tensor, Tensor]:
    """-> the gradients of rows (R, C) and weight (C,), float32 or wider; roundings count for nothing.

    The scale of a row is made again here: it depends on rows, which a second derivative has to see.
    """
    wide = torch.promote_types(rows.dtype, torch.float32)
    grad, rows, weight = grad.to(wide), rows.to(wide), weight.to(wide)
    scale = (rows.square().mean(dim=1, keepdim=True) + eps).rsqrt()
    normed, through_weight = rows * scale, grad * weight
    along = (through_weight * normed).mean(dim=1, keepdim=True)
    return (through_weight - normed * along) * scale, (grad * normed).sum(dim=0)


def _per_row(values: Tensor, cu_seqlens: Tensor, rows: int) -> Tensor:
    """(B,) -> (T,): the value of the sequence each row belongs to."""
    return values[sequence_ids(cu_seqlens, rows)]


def _share_backward(grad: Tensor, values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The gradient through values / (their sum over the sequence), zero where that sum is zero."""
    sums = _per_row(segment_sum(values, cu_seqlens), cu_seqlens, values.shape[0])
    safe = torch.where(sums == 0, torch.ones_like(sums), sums)
    mean = _per_row(segment_sum(grad * values / safe, cu_seqlens), cu_seqlens, values.shape[0])
    return torch.where(sums == 0, torch.zeros_like(grad), (grad - mean) / safe)
