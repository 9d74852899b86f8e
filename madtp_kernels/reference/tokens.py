# SPDX-License-Identifier: Apache-2.0
"""Dynamic token pruning (DTP), sequence by sequence: importance, threshold, selection, gather and merge.

Source: MADTP (Cao et al., CVPR 2024, arXiv 2403.02991), section 3.3, with the deviations listed in docs/method.md.
"""

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from madtp_kernels.ragged import prunable_rows
from madtp_kernels.selection import ARGMAX_TEMPERATURE, bounds, layout


def _share(values: Tensor) -> Tensor:
    """values / their sum, or zeros when the sum is zero."""
    values_sum = values.sum()
    return values / values_sum if values_sum != 0 else torch.zeros_like(values)


def token_importance(
    summary_attention: Tensor,  # (T,) S_cls, unnormalised
    received_attention: Tensor,  # (T,) S_self before normalisation
    mag_logits: Tensor,  # (T, K)
    cu_seqlens: Tensor,  # (B+1,) int32
    summary_index: Tensor | None = None,  # (B,) int32
    protected: Tensor | None = None,  # (T,) bool
) -> Tensor:  # (T,)
    """S = (S_cls + S_self + S_mag) / 3 over the prunable tokens of each sequence; 0 at its summary token and where
    protected."""
    prunable = prunable_rows(cu_seqlens, summary_index, protected, summary_attention.numel())
    guidance = mag_logits.to(summary_attention.dtype).max(dim=1).values.relu()  # (T,)
    parts = []
    for begin, end in bounds(cu_seqlens):
        # Masked, not multiplied by zero: what is no candidate takes no part, whatever it holds.
        parts_of_s = (summary_attention, received_attention, guidance)
        s, r, g = (t[begin:end].masked_fill(~prunable[begin:end], 0) for t in parts_of_s)
        parts.append((s + _share(r) + _share(g)) / 3)
    return torch.cat(parts) if parts else summary_attention.clone()


def _kept(importance: Tensor, mag_logits: Tensor, temperature: float) -> Tensor:
    """(N,) bool: which prunable tokens of one sequence stay, importance > min_k sum_j softmax_j(A_jk / tau) S_j.

    Below `ARGMAX_TEMPERATURE` the threshold goes on to the least S_j, in proportion to tau. Written with deficits
    max(S) - S, so that equal tokens compare equal whatever the order of the sum.
    """
    everything = torch.ones_like(importance, dtype=torch.bool)
    if importance.numel() < 2 or not importance.isfinite().all():
        return everything
    deficit = importance.max() - importance  # (N,)
    weights = (mag_logits.to(importance.dtype) / temperature).softmax(dim=0)  # (N, K)
    threshold = (weights * deficit[:, None]).sum(dim=0).max()
    if threshold.isnan():
        return everything
    threshold = threshold + (1 - min(temperature / ARGMAX_TEMPERATURE, 1.0)) * (deficit.max() - threshold)
    keep = deficit < threshold
    return keep if (~keep).sum() >= 2 else everything


def select_tokens(
    importance: Tensor,  # (T,)
    mag_logits: Tensor,  # (T, K)
    cu_seqlens: Tensor,  # (B+1,) int32
    temperature: float,
    summary_index: Tensor | None = None,  # (B,) int32
    protected: Tensor | None = None,  # (T,) bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> keep (T,) bool, cu_seqlens_out (B+1,) int32, source (T,) int32, merge_weight (T,)."""
    keep = torch.ones_like(importance, dtype=torch.bool)
    if temperature != 0:
        prunable = prunable_rows(cu_seqlens, summary_index, protected, importance.numel())
        for begin, end in bounds(cu_seqlens):
            rows = begin + prunable[begin:end].nonzero().flatten()
            keep[rows] = _kept(importance[rows], mag_logits[rows], temperature)
    return layout(keep, importance, cu_seqlens)


def score_and_select(
    summary_attention: Tensor,  # (T,)
    received_attention: Tensor,  # (T,)
    mag_logits: Tensor,  # (T, K)
    cu_seqlens: Tensor,  # (B+1,) int32
    temperature: float,
    summary_index: Tensor | None = None,  # (B,) int32
    protected: Tensor | None = None,  # (T,) bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`token_importance` and `select_tokens` of it: importance (T,), then what `select_tokens` returns."""
    importance = token_importance(
        summary_attention, received_attention, mag_logits, cu_seqlens, summary_index, protected
    )
    return importance, *select_tokens(importance, mag_logits, cu_seqlens, temperature, summary_index, protected)


def gather_merge(
    x: Tensor,  # (T, C)
    keep: Tensor,  # (T,) bool
    cu_seqlens_in: Tensor,  # (B+1,) int32
    cu_seqlens_out: Tensor,  # (B+1,) int32
    source: Tensor,  # (R,) int32
    merge_weight: Tensor,  # (T,)
) -> Tensor:  # (R, C)
    """Kept rows copied, pruned rows of a sequence summed with their weights, zeros past the last sequence."""
    wide = torch.promote_types(x.dtype, torch.float32)
    # Masked, not multiplied by zero: what is broken in a kept row stays there.
    weighted = (x.to(wide) * merge_weight.to(wide)[:, None]).masked_fill(keep[:, None], 0)
    merged = [weighted[begin:end].sum(dim=0) for begin, end in bounds(cu_seqlens_in)]
    zero = x.new_zeros(1, x.shape[1])
    table = torch.cat([x, torch.stack(merged).to(x.dtype), zero]) if merged else torch.cat([x, zero])
    row = torch.where(source >= 0, source.long(), x.shape[0] - 1 - source.long())
    return table[torch.where(is_row(source, x.shape[0], len(merged)), row, table.shape[0] - 1)]


def is_row(source: Tensor, rows: int, batch: int) -> Tensor:
    """(R,) bool: whether an output row is a row of the input or a merged one; what is neither is padding."""
    return (source >= -batch) & (source < rows)


def gather_merge_backward(
    grad: Tensor,  # (R, C)
    x: Tensor,  # (T, C)
    keep: Tensor,
    cu_seqlens_in: Tensor,
    cu_seqlens_out: Tensor,
    source: Tensor,
    merge_weight: Tensor,
) -> tuple[Tensor, Tensor]:  # (T, C), (T,)
    """The gradient of `gather_merge` to x and to merge_weight, exactly."""
    wide = torch.promote_types(x.dtype, torch.float32)
    grad_x, grad_weight = torch.zeros_like(x, memory_format=torch.contiguous_format), torch.zeros_like(merge_weight)
    inside = (source >= 0) & (source < x.shape[0])
    grad_x[source[inside].long()] = grad[inside]
    merged_row = dict(zip((-source - 1).tolist(), range(source.numel()), strict=True))
    for sequence, (begin, end) in enumerate(bounds(cu_seqlens_in)):
        pruned = begin + (~keep[begin:end]).nonzero().flatten()
        if pruned.numel() and sequence in merged_row:  # or the selection contradicts itself
            row = grad[merged_row[sequence]].to(wide)
            grad_x[pruned] = (merge_weight[pruned].to(wide)[:, None] * row).to(x.dtype)
            grad_weight[pruned] = (x[pruned].to(wide) @ row).to(grad_weight.dtype)
    return grad_x, grad_weight


def gather_merge_layernorm(
    x: Tensor,  # (T, C)
    keep: Tensor,
    cu_seqlens_in: Tensor,
    cu_seqlens_out: Tensor,
    source: Tensor,
    merge_weight: Tensor,
    weight: Tensor,  # (C,)
    bias: Tensor,  # (C,)
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # x_out (R, C), normed (R, C), mean (R,), rstd (R,)
    """`gather_merge`, then LayerNorm of the rows as stored; all four are zero past the last sequence."""
    x_out = gather_merge(x, keep, cu_seqlens_in, cu_seqlens_out, source, merge_weight)
    return x_out, *layernorm(x_out, is_row(source, x.shape[0], cu_seqlens_in.numel() - 1), weight, bias, eps)


def layernorm(
    x: Tensor,  # (R, C)
    real: Tensor,  # (R,) bool
    weight: Tensor,  # (C,)
    bias: Tensor,  # (C,)
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # normed (R, C), mean (R,), rstd (R,)
    """All three are zero where a row is not real."""
    wide = torch.promote_types(x.dtype, torch.float32)
    rows = x.to(wide)
    mean, variance = rows.mean(dim=1), rows.var(dim=1, correction=0)
    rstd = (variance + eps).rsqrt()
    normed = layer_norm(rows, (x.shape[1],), weight.to(wide), bias.to(wide), eps).to(x.dtype)
    return normed * real[:, None], mean * real, rstd * real


def gather_merge_rmsnorm(
    x: Tensor,  # (T, C)
    keep: Tensor,
    cu_seqlens_in: Tensor,
    cu_seqlens_out: Tensor,
    source: Tensor,
    merge_weight: Tensor,
    weight: Tensor,  # (C,)
    eps: float,
) -> tuple[Tensor, Tensor]:  # x_out (R, C), normed (R, C)
    """`gather_merge`, then RMSNorm of the rows as stored; both are zero past the last sequence.

    Computed in float32, rounded to the dtype of x, then multiplied by the weight: as in Qwen2RMSNorm and LlamaRMSNorm
    of transformers.
    """
    x_out = gather_merge(x, keep, cu_seqlens_in, cu_seqlens_out, source, merge_weight)
    return x_out, rmsnorm(x_out, is_row(source, x.shape[0], cu_seqlens_in.numel() - 1), weight, eps)


def rmsnorm(
    x: Tensor,  # (R, C)
    real: Tensor,  # (R,) bool
    weight: Tensor,  # (C,)
    eps: float,
) -> Tensor:  # (R, C)
    """Zero where a row is not real."""
    rows = x.to(torch.promote_types(x.dtype, torch.float32))
    scaled = (rows * (rows.square().mean(dim=1, keepdim=True) + eps).rsqrt()).to(x.dtype)
    return (scaled * weight).to(x.dtype) * real[:, None]
