# SPDX-License-Identifier: Apache-2.0
"""The ops in plain PyTorch, for programs that run where they are not: ONNX, OpenVINO, a C++ program without Python.

They are those of the reference where that reads nothing on the host. Where it goes sequence by sequence, what is here
goes through all of them at once; tests hold the two together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from madtp_kernels.ragged import prunable_rows, segment_sum, sequence_ids
from madtp_kernels.reference import attention, dense, quantized, sparse24, tokens
from madtp_kernels.selection import ARGMAX_TEMPERATURE, layout_on_device

Decomposition = Callable[..., Any]


def decompositions() -> dict[Any, Decomposition]:
    """What `ExportedProgram.run_decompositions` takes to leave no op of `torch.ops.madtp` in a program.

    It has the ops that run in towers, and two of torch that they use and few runtimes have. Weights that are 2:4 or of
    8 bits are made dense in the program; a runtime that folds constants does it when it loads. A batch has at least one
    row.

    ```python
    program = torch.export.export(model, (), inputs).run_decompositions(madtp_kernels.decompositions())
    ```

    Returns:
        a new dict from overloads of ops to functions.
    """
    return {
        torch.ops.madtp.varlen_attention.default: _varlen_attention,
        torch.ops.madtp.token_importance.default: _token_importance,
        torch.ops.madtp.select_tokens.default: _select_tokens,
        torch.ops.madtp.score_and_select.default: _score_and_select,
        torch.ops.madtp.gather_merge.default: _gather_merge,
        torch.ops.madtp.gather_merge_layernorm.default: _gather_merge_layernorm,
        torch.ops.madtp.gather_merge_rmsnorm.default: _gather_merge_rmsnorm,
        torch.ops.madtp.sparse24_linear.default: _sparse24_linear,
        torch.ops.madtp.quantized_linear.default: _quantized_linear,
        torch.ops.aten.segment_reduce.default: _segment_reduce,
        torch.ops.aten.sort.stable: _stable_sort,
    }


def _varlen_attention(*arguments: Any) -> tuple[Tensor, ...]:
    *inputs, _ = arguments  # the backend
    return attention.varlen_attention(*inputs)


def _sparse24_linear(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    layout: Tensor | None,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    scale: Tensor | None,
    num_rows: Tensor | None,
    *_: Any,
) -> Tensor:
    y = dense.dense_linear(x, _to_dense(values, indices), bias, activation, residual, scale)
    return y if num_rows is None else torch.where(sparse24.valid_rows(x, num_rows), y, 0)


def _quantized_linear(
    x: Tensor,
    values: Tensor,
    indices: Tensor | None,
    weight_scale: Tensor,
    layout: Tensor | None,
    bias: Tensor | None,
    *epilogue: Any,
) -> Tensor:
    """Sums are those of float32: exact below 2^24, about 1000 input features of the largest magnitude."""
    *epilogue, _ = epilogue  # type: ignore[assignment]
    rounded, x_scale = quantized.quantize_rows(x, quantized.grid_of(values))
    weight = values.float() if indices is None else _to_dense(values.float(), indices)
    before = quantized.product(linear(rounded.float(), weight), x_scale, weight_scale, bias)
    return quantized.finish(before, x, *epilogue)


def _to_dense(values: Tensor, indices: Tensor) -> Tensor:
    """(N, C/2), (N, C/8) -> (N, C). Divided and not shifted: few runtimes shift what is signed, or have bytes."""
    byte = indices.int()
    columns = torch.stack([byte % 4, byte // 4 % 4, byte // 16 % 4, byte // 64], dim=2)  # (N, C/8, 4)
    groups = values.new_zeros(values.shape[0], values.shape[1] // 2, 4)
    return groups.scatter(2, columns.reshape(*groups.shape[:2], 2).long(), values.unflatten(1, (-1, 2))).flatten(1)


def _segment_reduce(data: Tensor, reduce: str, *, offsets: Tensor, initial: float = 0.0, **_: Any) -> Tensor:
    """Sums, of one dimension."""
    if reduce != "sum":
        raise NotImplementedError(f"reduce must be sum, got {reduce}")
    count = offsets.shape[0] - 1
    ids = sequence_ids(offsets, data.shape[0])
    return data.new_full((count + 1,), initial).index_add(0, ids, data)[:count]


def _stable_sort(x: Tensor, *, stable: bool | None, dim: int = -1, descending: bool = False) -> Any:
    """ONNX knows no other sort than TopK, of equal values the first; OpenVINO may take others of them."""
    return torch.ops.aten.sort.default(x, dim, descending)


def _members(cu_seqlens: Tensor, prunable: Tensor) -> Tensor:
    """(B, T) bool: the prunable rows of each sequence."""
    ids = sequence_ids(cu_seqlens, prunable.shape[0])
    return (ids == torch.arange(cu_seqlens.shape[0] - 1, device=ids.device)[:, None]) & prunable


def _of_rows(values: Tensor, cu_seqlens: Tensor, rows: int) -> Tensor:
    """(B,) of sequences -> (T,) of their rows; 0 past the last sequence."""
    return pad(values, (0, 1))[sequence_ids(cu_seqlens, rows)]


def _token_importance(
    summary_attention: Tensor,
    received_attention: Tensor,
    mag_logits: Tensor,
    cu_seqlens: Tensor,
    summary_index: Tensor | None,
    backend: str,
    protected: Tensor | None = None,
) -> Tensor:
    rows = summary_attention.shape[0]
    prunable = prunable_rows(cu_seqlens, summary_index, protected, rows)
    guidance = mag_logits.to(summary_attention.dtype).amax(1).relu()
    s, r, g = (t.masked_fill(~prunable, 0) for t in (summary_attention, received_attention, guidance))

    def share(values: Tensor) -> Tensor:
        total = _of_rows(segment_sum(values, cu_seqlens), cu_seqlens, rows)
        return torch.where(total != 0, values / total, 0)

    return (s + share(r) + share(g)) / 3


def _kept(importance: Tensor, mag_logits: Tensor, temperature: float, members: Tensor) -> Tensor:
    """(T,) bool: `reference.tokens._kept` of all sequences at once."""
    count = members.sum(1)  # (B,)
    broken = ~(importance.isfinite() | ~members).all(1)
    largest = importance.masked_fill(~members, -torch.inf).amax(1)  # (B,)
    deficit = torch.where(members, largest[:, None] - importance, 0)  # (B, T)
    logits = (mag_logits.to(importance.dtype) / temperature).masked_fill(~members[..., None], -torch.inf)
    weights = logits.softmax(1)  # (B, T, K)
    threshold = (weights * deficit[..., None]).sum(1).amax(1)  # (B,)
    broken = broken | threshold.isnan() | (count < 2)
    lower = 1 - min(temperature / ARGMAX_TEMPERATURE, 1.0)
    threshold = threshold + lower * (deficit.amax(1) - threshold)
    keep = (deficit < threshold[:, None]) | ~members
    all_stay = broken | ((~keep).sum(1) < 2)
    return (keep | all_stay[:, None]).all(0)


def _select_tokens(
    importance: Tensor,
    mag_logits: Tensor,
    cu_seqlens: Tensor,
    temperature: float,
    summary_index: Tensor | None,
    backend: str,
    protected: Tensor | None = None,
) -> tuple[Tensor, ...]:
    keep = torch.ones_like(importance, dtype=torch.bool)
    if temperature != 0:
        prunable = prunable_rows(cu_seqlens, summary_index, protected, importance.shape[0])
        keep = _kept(importance, mag_logits, temperature, _members(cu_seqlens, prunable))
    keep, cu_seqlens_out, source, merge_weight = layout_on_device(keep, importance, cu_seqlens)
    return merge_weight, keep, cu_seqlens_out, source


def _score_and_select(
    summary_attention: Tensor,
    received_attention: Tensor,
    mag_logits: Tensor,
    cu_seqlens: Tensor,
    temperature: float,
    summary_index: Tensor | None,
    backend: str,
    protected: Tensor | None = None,
) -> tuple[Tensor, ...]:
    rows = cu_seqlens, summary_index, backend, protected
    importance = _token_importance(summary_attention, received_attention, mag_logits, *rows)
    merge_weight, *selection = _select_tokens(
        importance, mag_logits, cu_seqlens, temperature, summary_index, backend, protected
    )
    return importance, *selection, merge_weight


def _gather_merge(x: Tensor, *arguments: Any) -> Tensor:
    *selection, _ = arguments
    return _gathered(x, *selection)


def _gathered(
    x: Tensor,
    keep: Tensor,
    cu_seqlens_in: Tensor,
    cu_seqlens_out: Tensor,
    source: Tensor,
    merge_weight: Tensor,
) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    weighted = (x.to(wide) * merge_weight.to(wide)[:, None]).masked_fill(keep[:, None], 0)
    sequences = cu_seqlens_in.shape[0] - 1
    ids = sequence_ids(cu_seqlens_in, x.shape[0])
    merged = weighted.new_zeros(sequences + 1, x.shape[1]).index_add(0, ids, weighted)[:sequences]
    table = torch.cat([x, merged.to(x.dtype), x.new_zeros(1, x.shape[1])])
    row = torch.where(source >= 0, source.long(), x.shape[0] - 1 - source.long())
    real = tokens.is_row(source, x.shape[0], sequences)
    return table.index_select(0, torch.where(real, row, x.shape[0] + sequences))


def _gather_merge_layernorm(x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *selection, weight, bias, eps, _ = arguments
    rows = _gathered(x, *selection)
    return rows, *tokens.layernorm(rows, _real(x, selection), weight, bias, eps)


def _gather_merge_rmsnorm(x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *selection, weight, eps, _ = arguments
    rows = _gathered(x, *selection)
    return rows, tokens.rmsnorm(rows, _real(x, selection), weight, eps)


def _real(x: Tensor, selection: list[Tensor]) -> Tensor:
    """(R,) bool: which rows a gather fills."""
    _, cu_seqlens_in, _, source, _ = selection
    return tokens.is_row(source, x.shape[0], cu_seqlens_in.shape[0] - 1)
