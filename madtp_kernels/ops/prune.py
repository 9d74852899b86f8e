# SPDX-License-Identifier: Apache-2.0
"""The prune step as one call: `score_and_select`, then a gather. It is what follows attention in a pruned block."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from madtp_kernels import dispatch
from madtp_kernels.checks import check_device, check_number, check_rows, check_tensor, check_types, require
from madtp_kernels.ops.attention import AttentionStats
from madtp_kernels.ops.token_library import FLOATS, STATISTICS, check_norm
from madtp_kernels.ops.tokens import Selection, check_choice, check_statistics_types, sized


class Pruned(NamedTuple):
    """What the prune step leaves of a ragged batch, and how it came to it."""

    x: Tensor  # (T_out, C)
    normed: Tensor | None  # (T_out, C), the LayerNorm or RMSNorm of x; None without `norm`
    selection: Selection
    importance: Tensor  # (T,) float32


@dispatch.public
def score_and_select(
    stats: AttentionStats,
    mag_logits: Tensor,
    cu_seqlens: Tensor,
    temperature: float,
    *,
    summary_index: Tensor | None = None,
    protected: Tensor | None = None,
    capacity: str = "exact",
    backend: str | None = None,
) -> tuple[Tensor, Selection]:
    """`token_importance` and `select_tokens` in one call; bit-equal to the two.

    Args:
        stats, mag_logits, cu_seqlens, summary_index, protected: as in `token_importance`.
        temperature, capacity: as in `select_tokens`.
        backend: auto, reference, cpu or triton.

    Returns:
        importance (T,) float32 and the `Selection`. Differentiable in stats and, through importance, in mag_logits;
        which tokens stay is a constant: the gradient is that of the two ops with mag_logits detached in the second.

    Raises:
        ValueError: an argument breaks a rule. RuntimeError: the backend cannot run here.
    """
    check_statistics_types(stats, mag_logits, cu_seqlens, summary_index, protected)
    check_choice(temperature, capacity)
    return _score_and_select(stats, mag_logits, cu_seqlens, temperature, summary_index, protected, capacity, backend)


def prune_tokens(
    x: Tensor,
    stats: AttentionStats,
    mag_logits: Tensor,
    cu_seqlens: Tensor,
    temperature: float,
    *,
    norm: tuple[Tensor, Tensor, float] | tuple[Tensor, float] | None = None,
    summary_index: Tensor | None = None,
    protected: Tensor | None = None,
    capacity: str = "exact",
    backend: str | None = None,
) -> Pruned:
    """The whole prune step of MADTP (arXiv 2403.02991, section 3.3): what follows attention in a pruned block.

    `score_and_select`, then `gather_merge`, or with `norm` `gather_merge_layernorm` or `gather_merge_rmsnorm`; all of
    which `explain` knows by name.

    Args:
        x: (T, C) float32, bfloat16 or float16, the features after attention and its residual; any row stride.
        stats: `AttentionStats`, each (T,) float32, from `varlen_attention(..., return_stats=True)`.
        mag_logits: (T, K) alignment logits q E^T, float32, bfloat16 or float16.
        cu_seqlens: (B+1,) int32.
        temperature: tau >= 0. Larger prunes more; 0 keeps everything.
        norm: (weight, bias, eps) of the LayerNorm that follows: (C,) dtype of x or float32, (C,) likewise, > 0; or
            (weight, eps) of the RMSNorm.
        summary_index: (B,) int32, the summary token's row inside its sequence, always kept; None is row 0, -1 is none.
        protected: (T,) bool, rows that are always kept besides, and no candidates; None is none.
        capacity: "exact" reads the number of rows once; "upper_bound" returns T rows and reads nothing on the host.
        backend: auto, reference, cpu or triton.

    Returns:
        A `Pruned`: x with each sequence's kept rows in order and then, where any was pruned, their merged row; normed;
        the selection and the importance it came from. Differentiable in x, stats, mag_logits, weight and bias.

    Raises:
        ValueError: an argument breaks a rule. RuntimeError: the backend cannot run here.
    """
    # The ops check the rest; this is what the second would say after the first has run.
    check_tensor("x", x, 2, FLOATS)
    check_statistics_types(stats, mag_logits, cu_seqlens, summary_index, protected)
    check_choice(temperature, capacity)
    summary_attention = stats[0]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    check_tensor("stats.summary_attention", summary_attention, 1, STATISTICS)
    require(summary_attention.dtype == wide, "stats.summary_attention", f"{wide} for x of {x.dtype}", summary_attention)
    check_rows("x", x, summary_attention.shape[0], "stats.summary_attention")
    check_device(summary_attention.device, x=x)
    if norm is not None:
        ok = isinstance(norm, tuple) and len(norm) in (2, 3)
        require(ok, "norm", "(weight, bias, eps), (weight, eps) or None", norm)
        weight, *biases, eps = norm
        check_types(**dict(zip(("norm.weight", "norm.bias"), norm[:-1], strict=False)))
        check_number("norm.eps", eps)
        check_norm(x, weight, biases[0] if biases else None, eps, of="norm.")
    importance, selection = _score_and_select(
        stats, mag_logits, cu_seqlens, temperature, summary_index, protected, capacity, backend
    )
    backend = dispatch.as_argument(backend)
    if norm is None:
        return Pruned(torch.ops.madtp.gather_merge(x, *selection, backend), None, selection, importance)
    gather = torch.ops.madtp.gather_merge_layernorm if biases else torch.ops.madtp.gather_merge_rmsnorm
    out, normed, *_ = gather(x, *selection, weight, *biases, float(eps), backend)
    return Pruned(out, normed, selection, importance)


def _score_and_select(
    stats: AttentionStats,
    mag_logits: Tensor,
    cu_seqlens: Tensor,
    temperature: float,
    summary_index: Tensor | None,
    protected: Tensor | None,
    capacity: str,
    backend: str | None,
) -> tuple[Tensor, Selection]:
    importance, keep, cu_seqlens_out, source, merge_weight = torch.ops.madtp.score_and_select(
        *stats, mag_logits, cu_seqlens, float(temperature), summary_index, dispatch.as_argument(backend), protected
    )
    source = sized(source, cu_seqlens_out, capacity)
    return importance, Selection(keep, cu_seqlens, cu_seqlens_out, source, merge_weight)
