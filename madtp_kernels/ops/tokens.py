# SPDX-License-Identifier: Apache-2.0
"""Token pruning ops: `token_importance` -> `select_tokens` -> `gather_merge`, alone or with the norm that follows.

All take a ragged batch: B sequences one after another in T rows, sequence b in rows cu_seqlens[b]:cu_seqlens[b+1]. Each
sequence keeps its own number of tokens, in order, and its result is bit-equal whoever else is in the batch.
`ops/prune.py` has the first two as one op and the whole step as one call.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from madtp_kernels import dispatch
from madtp_kernels.checks import check_not_recorded, check_number, check_optional_types, check_types, require
from madtp_kernels.ops import token_library as token_library  # registers the ops in torch.ops.madtp
from madtp_kernels.ops.attention import AttentionStats
from madtp_kernels.renamed import renamed


@renamed(cu_seqlens="cu_seqlens_out", input_cu_seqlens="cu_seqlens_in")
class Selection(NamedTuple):
    """Which tokens of a ragged batch stay, and where they go.

    An output row is a kept row (`source` >= 0: its row in the input), the merged row of sequence b (`source` = -(b+1),
    the last row of its sequence), or, with capacity="upper_bound", padding past `cu_seqlens_out[-1]` (INT32_MIN).
    """

    keep: Tensor  # (T,) bool
    cu_seqlens_in: Tensor  # (B+1,) int32
    cu_seqlens_out: Tensor  # (B+1,) int32
    source: Tensor  # (T_out,) int32
    merge_weight: Tensor  # (T,) float32, differentiable: importance / its sum over the pruned tokens of the sequence


@dispatch.public
def token_importance(
    stats: AttentionStats,
    mag_logits: Tensor,
    cu_seqlens: Tensor,
    *,
    summary_index: Tensor | None = None,
    protected: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Importance of every token: S = (S_cls + S_self + S_mag) / 3 (MADTP, arXiv 2403.02991, section 3.3).

    Args:
        stats: `AttentionStats`, each (T,) float32, from `varlen_attention(..., return_stats=True)`.
        mag_logits: (T, K) alignment logits q E^T, float32, bfloat16 or float16.
        cu_seqlens: (B+1,) int32.
        summary_index: (B,) int32, the summary token's row inside its sequence; None is row 0, -1 is none.
        protected: (T,) bool, rows that are never pruned besides the summary token: registers, text; None is none.
        backend: auto, reference, cpu or triton.

    Returns:
        (T,) float32. `received_attention` and relu(max_k mag_logits) are divided by their sums over the prunable tokens
        of the sequence (a zero sum gives zeros); the summary token and protected rows have 0, and what they hold takes
        no part. Differentiable in stats and mag_logits.

    Raises:
        ValueError: an argument breaks a rule. RuntimeError: the backend cannot run here.
    """
    check_statistics_types(stats, mag_logits, cu_seqlens, summary_index, protected)
    importance: Tensor = torch.ops.madtp.token_importance(
        *stats, mag_logits, cu_seqlens, summary_index, dispatch.as_argument(backend), protected
    )
    return importance


@dispatch.public
def select_tokens(
    importance: Tensor,
    mag_logits: Tensor,
    cu_seqlens: Tensor,
    temperature: float,
    *,
    summary_index: Tensor | None = None,
    protected: Tensor | None = None,
    capacity: str = "exact",
    backend: str | None = None,
) -> Selection:
    """Chooses the tokens of each sequence that stay: S_j > min_k sum_j softmax_j(A_jk / tau) S_j (arXiv 2403.02991).

    Args:
        importance: (T,) float32.
        mag_logits: (T, K) float32, bfloat16 or float16.
        cu_seqlens: (B+1,) int32.
        temperature: tau >= 0. Larger prunes more; below 0.01 the threshold goes to the least importance, in proportion
            to tau, and 0 switches pruning off.
        summary_index: (B,) int32, always kept; None is row 0, -1 is none.
        protected: (T,) bool, rows that are always kept besides the summary token; None is none.
        capacity: "exact" reads the number of rows once and returns that many `source` rows; "upper_bound" returns T
            rows, those past that number being padding, and reads nothing on the host.
        backend: auto, reference, cpu or triton.

    Returns:
        A `Selection`. The summary token and protected rows are no candidates: the threshold is that of the others
        alone, whatever these hold. If fewer than 2 tokens of a sequence would go, none goes. A sequence whose
        candidates have an importance that is not finite, or thresholds that are NaN, keeps everything: what is broken
        stays visible, others are untouched. Differentiable from `merge_weight` to importance.

    Raises:
        ValueError: an argument breaks a rule. RuntimeError: the backend cannot run here.
    """
    check_types(importance=importance, mag_logits=mag_logits, cu_seqlens=cu_seqlens)
    check_optional_types(summary_index=summary_index, protected=protected)
    check_choice(temperature, capacity)
    merge_weight, keep, cu_seqlens_out, source = torch.ops.madtp.select_tokens(
        importance, mag_logits, cu_seqlens, float(temperature), summary_index, dispatch.as_argument(backend), protected
    )
    return Selection(keep, cu_seqlens, cu_seqlens_out, sized(source, cu_seqlens_out, capacity), merge_weight)


@dispatch.public
def gather_merge(x: Tensor, selection: Selection, *, backend: str | None = None) -> Tensor:
    """Keeps the selected rows of x and appends to each pruned sequence one merged row, sum_j merge_weight_j x_j.

    Args:
        x: (T, C) float32, bfloat16 or float16; any row stride.
        selection: from `select_tokens`, with its T.
        backend: auto, reference, cpu, triton or cuda.

    Returns:
        (T_out, C) dtype of x: accumulated in float32, cast once; padding rows are zero. Differentiable in x and in
        selection.merge_weight. Each row of x is read once, each output row written once.

    Raises:
        ValueError: an argument breaks a rule. RuntimeError: the backend cannot run here.
    """
    _check_gather_types(x, selection)
    out: Tensor = torch.ops.madtp.gather_merge(x, *selection, dispatch.as_argument(backend))
    return out


@dispatch.public
def gather_merge_layernorm(
    x: Tensor, selection: Selection, weight: Tensor, bias: Tensor, eps: float = 1e-5, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """`gather_merge` and the LayerNorm that follows it, in one pass over memory.

    Args:
        x, selection, backend: as in `gather_merge`.
        weight, bias: (C,) dtype of x or float32.
        eps: > 0, added to the variance.

    Returns:
        (x_out, normed), both (T_out, C) dtype of x; statistics in float32; padding rows are zero. Differentiable in x,
        selection.merge_weight, weight and bias.

    Raises:
        ValueError: an argument breaks a rule. RuntimeError: the backend cannot run here.
    """
    _check_gather_types(x, selection)
    check_types(weight=weight, bias=bias)
    check_number("eps", eps)
    x_out, normed, _, _ = torch.ops.madtp.gather_merge_layernorm(
        x, *selection, weight, bias, float(eps), dispatch.as_argument(backend)
    )
    return x_out, normed


@dispatch.public
def gather_merge_rmsnorm(
    x: Tensor, selection: Selection, weight: Tensor, eps: float = 1e-6, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """`gather_merge` and the RMSNorm that follows it (Zhang and Sennrich, arXiv 1910.07467), in one pass over memory.

    Args:
        x, selection: as in `gather_merge`.
        weight: (C,) dtype of x or float32; where a model multiplies by 1 + weight, as Gemma's do, that sum.
        eps: > 0, added to the mean square.
        backend: auto, reference, cpu or triton.

    Returns:
        (x_out, normed), both (T_out, C) dtype of x; padding rows are zero. x_out / sqrt(mean(x_out^2) + eps) is formed
        in float32 and rounded to the dtype of x before the weight multiplies it, as in Qwen2RMSNorm and LlamaRMSNorm of
        transformers. Differentiable in x, selection.merge_weight and weight.

    Raises:
        ValueError: an argument breaks a rule. RuntimeError: the backend cannot run here.
    """
    _check_gather_types(x, selection)
    check_types(weight=weight)
    check_number("eps", eps)
    x_out, normed = torch.ops.madtp.gather_merge_rmsnorm(
        x, *selection, weight, float(eps), dispatch.as_argument(backend)
    )
    return x_out, normed


def sized(source: Tensor, cu_seqlens_out: Tensor, capacity: str) -> Tensor:
    """`source` with as many rows as the capacity says; "exact" reads that number on the host."""
    if capacity == "upper_bound":
        return source
    instead = 'use capacity="upper_bound"'
    check_not_recorded(source.device, 'capacity="exact" reads the number of rows on the host', instead)
    num_rows = cu_seqlens_out[-1].item()
    torch._check(num_rows >= 0)
    torch._check(num_rows <= source.shape[0])
    return source[:num_rows]


def check_statistics_types(
    stats: AttentionStats,
    mag_logits: Tensor,
    cu_seqlens: Tensor,
    summary_index: Tensor | None,
    protected: Tensor | None,
) -> None:
    require(isinstance(stats, tuple) and len(stats) == 2, "stats", "an AttentionStats", stats)
    check_types(**{"stats.summary_attention": stats[0], "stats.received_attention": stats[1]})
    check_types(mag_logits=mag_logits, cu_seqlens=cu_seqlens)
    check_optional_types(summary_index=summary_index, protected=protected)


def check_choice(temperature: float, capacity: str) -> None:
    check_number("temperature", temperature)
    require(capacity in ("exact", "upper_bound"), "capacity", '"exact" or "upper_bound"', capacity)


def _check_gather_types(x: Tensor, selection: Selection) -> None:
    check_types(x=x)
    require(isinstance(selection, Selection), "selection", "a Selection from select_tokens", type(selection).__name__)
    for name, value in zip(selection._fields, selection, strict=True):
        if not isinstance(value, Tensor):
            require(False, f"selection.{name}", "a tensor", value)
