# SPDX-License-Identifier: Apache-2.0
"""The C++ kernels of `madtp/tokens.h` as functions of tensors, with the arguments of the reference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from madtp_kernels.native.common import DTYPES, address, call, contiguous, matrix, row_contiguous


def token_importance(
    summary_attention: Tensor,
    received_attention: Tensor,
    mag_logits: Tensor,
    cu_seqlens: Tensor,
    summary_index: Tensor | None,
    protected: Tensor | None,
) -> Tensor:
    summary_attention, received_attention = summary_attention.contiguous(), received_attention.contiguous()
    inputs, _alive = _score_inputs(mag_logits, cu_seqlens, summary_index, protected)
    importance = torch.empty_like(summary_attention)
    call(
        "token_importance",
        importance.device,
        address(summary_attention),
        address(received_attention),
        inputs,
        address(importance),
    )
    return importance


def select_tokens(
    importance: Tensor,
    mag_logits: Tensor,
    cu_seqlens: Tensor,
    temperature: float,
    summary_index: Tensor | None,
    protected: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    importance = importance.contiguous()
    inputs, _alive = _score_inputs(mag_logits, cu_seqlens, summary_index, protected)
    selection, outputs = _empty_selection(importance, cu_seqlens)
    call("select_tokens", importance.device, address(importance), inputs, temperature, outputs)
    return selection


def score_and_select(
    summary_attention: Tensor,
    received_attention: Tensor,
    mag_logits: Tensor,
    cu_seqlens: Tensor,
    temperature: float,
    summary_index: Tensor | None,
    protected: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    summary_attention, received_attention = summary_attention.contiguous(), received_attention.contiguous()
    inputs, _alive = _score_inputs(mag_logits, cu_seqlens, summary_index, protected)
    importance = torch.empty_like(summary_attention)
    selection, outputs = _empty_selection(importance, cu_seqlens)
    call(
        "score_and_select",
        importance.device,
        address(summary_attention),
        address(received_attention),
        inputs,
        temperature,
        address(importance),
        outputs,
    )
    return importance, *selection


def _score_inputs(
    mag_logits: Tensor, cu_seqlens: Tensor, summary_index: Tensor | None, protected: Tensor | None
) -> tuple[tuple[int, ...], tuple[Tensor | None, ...]]:
    """The fields of madtp::ScoreInputs, and the tensors it points to, which must outlive it."""
    mag_logits, cu_seqlens = row_contiguous(mag_logits), cu_seqlens.contiguous()
    summary_index, protected = contiguous(summary_index), contiguous(protected)
    inputs = (
        *matrix(mag_logits),
        mag_logits.shape[1],
        address(cu_seqlens),
        mag_logits.shape[0],
        cu_seqlens.numel() - 1,
        address(summary_index),
        address(protected),
    )
    return inputs, (mag_logits, cu_seqlens, summary_index, protected)


def _empty_selection(
    importance: Tensor, cu_seqlens: Tensor
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], tuple[int, ...]]:
    """keep, cu_seqlens_out, source and merge_weight, to be written, and the fields of madtp::SelectionOutputs."""
    keep, source = (torch.empty_like(importance, dtype=dtype) for dtype in (torch.bool, torch.int32))
    selection = keep, torch.empty_like(cu_seqlens), source, torch.empty_like(importance)
    return selection, tuple(t.data_ptr() for t in selection)


def gather_merge(x: Tensor, *selection: Tensor) -> Tensor:
    x = row_contiguous(x)
    record, capacity, _alive = _token_selection(*selection)
    out = x.new_empty(capacity, x.shape[1])
    call("gather_merge", x.device, *matrix(x), x.shape[1], record, address(out))
    return out


def gather_merge_backward(grad: Tensor, x: Tensor, *selection: Tensor) -> tuple[Tensor, Tensor]:
    grad, x = row_contiguous(grad), row_contiguous(x)
    record, _, _alive = _token_selection(*selection)
    grad_x = x.new_empty(x.shape)
    grad_weight = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    call(
        "gather_merge_backward",
        x.device,
        address(grad),
        grad.stride(0),
        *matrix(x),
        x.shape[1],
        record,
        address(grad_x),
        address(grad_weight),
    )
    return grad_x, grad_weight


def gather_merge_layernorm(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *selection, weight, bias, eps = arguments
    x, weight, bias = row_contiguous(x), weight.contiguous(), bias.contiguous()
    record, capacity, _alive = _token_selection(*selection)
    x_out = x.new_empty(capacity, x.shape[1])
    normed = torch.empty_like(x_out)
    mean = x.new_empty(capacity, dtype=torch.float32)
    rstd = torch.empty_like(mean)
    call(
        "gather_merge_layernorm",
        x.device,
        *matrix(x),
        x.shape[1],
        record,
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


def gather_merge_rmsnorm(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    *selection, weight, eps = arguments
    x, weight = row_contiguous(x), weight.contiguous()
    record, capacity, _alive = _token_selection(*selection)
    x_out = x.new_empty(capacity, x.shape[1])
    normed = torch.empty_like(x_out)
    call(
        "gather_merge_rmsnorm",
        x.device,
        *matrix(x),
        x.shape[1],
        record,
        address(weight),
        DTYPES[weight.dtype],
        eps,
        address(x_out),
        address(normed),
    )
    return x_out, normed


def _token_selection(
    keep: Tensor, cu_seqlens_in: Tensor, cu_seqlens_out: Tensor, source: Tensor, merge_weight: Tensor
) -> tuple[tuple[int, ...], int, list[Tensor]]:
    """The fields of madtp::TokenSelection, its capacity, and the tensors it points to, which must outlive it."""
    tensors = [t.contiguous() for t in (keep, cu_seqlens_in, cu_seqlens_out, source, merge_weight)]
    capacity = source.shape[0]
    sizes = (keep.shape[0], capacity, cu_seqlens_in.numel() - 1)
    return (*(t.data_ptr() for t in tensors), *sizes), capacity, tensors
