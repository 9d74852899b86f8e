"""The C++ kernels of `madtp/tokens.h` as functions of tensors, with the arguments of the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from madtp_kernels.native.common import DTYPES, address, call, contiguous, matrix, row_contiguous


def token_importance(
    summary: Tensor, received: Tensor, mag_logits: Tensor, cu_seqlens: Tensor, summary_index: Tensor | None
) -> Tensor:
    summary, received, mag_logits = summary.contiguous(), received.contiguous(), row_contiguous(mag_logits)
    cu_seqlens, summary_index = cu_seqlens.contiguous(), contiguous(summary_index)
    importance = torch.empty_like(summary)
    call(
        "token_importance",
        summary.device,
        address(summary),
        address(received),
        *matrix(mag_logits),
        mag_logits.shape[1],
        address(cu_seqlens),
        summary.shape[0],
        cu_seqlens.numel() - 1,
        address(summary_index),
        address(importance),
    )
    return importance


def select_tokens(
    importance: Tensor, mag_logits: Tensor, cu_seqlens: Tensor, temperature: float, summary_index: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    importance, mag_logits = importance.contiguous(), row_contiguous(mag_logits)
    cu_seqlens, summary_index = cu_seqlens.contiguous(), contiguous(summary_index)
    selection = _empty_selection(importance, cu_seqlens)
    call(
        "select_tokens",
        importance.device,
        address(importance),
        *matrix(mag_logits),
        mag_logits.shape[1],
        address(cu_seqlens),
        importance.shape[0],
        cu_seqlens.numel() - 1,
        address(summary_index),
        temperature,
        *(address(t) for t in selection),
    )
    return selection


def score_and_select(
    summary: Tensor,
    received: Tensor,
    mag_logits: Tensor,
    cu_seqlens: Tensor,
    temperature: float,
    summary_index: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    summary, received, mag_logits = summary.contiguous(), received.contiguous(), row_contiguous(mag_logits)
    cu_seqlens, summary_index = cu_seqlens.contiguous(), contiguous(summary_index)
    importance = torch.empty_like(summary)
    selection = _empty_selection(importance, cu_seqlens)
    call(
        "score_and_select",
        summary.device,
        address(summary),
        address(received),
        *matrix(mag_logits),
        mag_logits.shape[1],
        address(cu_seqlens),
        summary.shape[0],
        cu_seqlens.numel() - 1,
        address(summary_index),
        temperature,
        *(address(t) for t in (importance, *selection)),
    )
    return importance, *selection


def _empty_selection(importance: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """keep, cu_seqlens_out, source and merge_weight, to be written."""
    keep, source = (torch.empty_like(importance, dtype=dtype) for dtype in (torch.bool, torch.int32))
    return keep, torch.empty_like(cu_seqlens), source, torch.empty_like(importance)


def gather_merge(x: Tensor, *selection: Tensor) -> Tensor:
    x, selection = row_contiguous(x), _Selection(*selection)
    out = x.new_empty(selection.capacity, x.shape[1])
    call("gather_merge", x.device, *matrix(x), x.shape[1], *selection.arguments(), address(out))
    return out


def gather_merge_backward(grad: Tensor, x: Tensor, *selection: Tensor) -> tuple[Tensor, Tensor]:
    grad, x, selection = row_contiguous(grad), row_contiguous(x), _Selection(*selection)
    grad_x = x.new_empty(x.shape)
    grad_weight = torch.empty_like(selection.merge_weight)
    call(
        "gather_merge_backward",
        x.device,
        address(grad),
        grad.stride(0),
        *matrix(x),
        x.shape[1],
        *selection.arguments(),
        address(grad_x),
        address(grad_weight),
    )
    return grad_x, grad_weight


def gather_merge_layernorm(x: Tensor, *arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *selection, weight, bias, eps = arguments
    x, weight, bias, selection = row_contiguous(x), weight.contiguous(), bias.contiguous(), _Selection(*selection)
    x_out = x.new_empty(selection.capacity, x.shape[1])
    normed = torch.empty_like(x_out)
    mean = x.new_empty(selection.capacity, dtype=torch.float32)
    rstd = torch.empty_like(mean)
    call(
        "gather_merge_layernorm",
        x.device,
        *matrix(x),
        x.shape[1],
        *selection.arguments(),
        address(weight),
        address(bias),
        DTYPES[weight.dtype],
        eps,
        address(x_out),
        address(normed),
        address(mean),
        address(rstd),
    )
    return x_out, normed, mean, rstd


class _Selection:
    """madtp::TokenSelection: keeps its contiguous tensors alive for the call."""

    def __init__(self, keep: Tensor, source: Tensor, merge_weight: Tensor, cu_seqlens: Tensor, cu_seqlens_out: Tensor):
        self.merge_weight = merge_weight.contiguous()
        self._tensors = [t.contiguous() for t in (keep, source, self.merge_weight, cu_seqlens, cu_seqlens_out)]
        self.capacity = source.shape[0]
        self._sizes = (keep.shape[0], self.capacity, cu_seqlens.numel() - 1)

    def arguments(self) -> tuple[int, ...]:
        return (*(t.data_ptr() for t in self._tensors), *self._sizes)
