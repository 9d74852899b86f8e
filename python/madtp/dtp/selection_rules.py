# SPDX-License-Identifier: Apache-2.0
"""Which tokens stay, by `CompressionConfig.selection`: the method's own rule and those it is compared with.

A rule takes (stats, logits, cu_seqlens, temperature, summary_index) and returns the importance (T,) by which pruned
tokens are merged, and the `Selection`. To add one, write its function and its row in `RULES`; the configuration and
the branches read the names from here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from madtp_kernels import AttentionStats, Selection, score_and_select, select_tokens, token_importance
from madtp_kernels.ragged import segment_sum, sequence_ids, summary_rows
from madtp_kernels.selection import layout

HALF = 10.0  # the temperature at which a rule of a fixed share keeps half of the tokens that enter a block


def batch_max(
    stats: AttentionStats, logits: Tensor, cu_seqlens: Tensor, temperature: float, summary_index: Tensor | None
) -> tuple[Tensor, Selection]:
    """The published rule: every sample keeps as many tokens as the sample that keeps most, its best.

    A sample with fewer than 2 tokens over that number keeps all. One host read per layer, as published.
    """
    importance, own = score_and_select(stats, logits, cu_seqlens, temperature, summary_index=summary_index)
    prunable = ~summary_rows(cu_seqlens, summary_index, importance.shape[0])
    counts = _count(own.keep & prunable, cu_seqlens)
    most = counts.max().expand_as(counts) if len(counts) else counts
    return importance, _best(importance, importance, most, cu_seqlens, summary_index)


def unguided(
    stats: AttentionStats, logits: None, cu_seqlens: Tensor, temperature: float, summary_index: Tensor | None
) -> tuple[Tensor, Selection]:
    """The method without MAG: what attention says decides alone.

    S = (S_cls + S_self) / 3, and in the threshold the softmax of A / tau is that of -z / tau, z the importances with
    mean 0 and deviation 1: near the least importance at a low temperature, at the mean at a high one, as with MAG.
    """
    nothing = stats.summary_attention.new_zeros(stats.summary_attention.shape[0], 1)
    importance = token_importance(stats, nothing, cu_seqlens, summary_index=summary_index)
    values = importance.detach()
    prunable = ~summary_rows(cu_seqlens, summary_index, values.shape[0])
    sequence, counts = sequence_ids(cu_seqlens, values.shape[0]), _count(prunable, cu_seqlens).clamp(min=1)

    def mean(of: Tensor) -> Tensor:  # over the prunable tokens of each sequence, at each token
        return (segment_sum(of.masked_fill(~prunable, 0), cu_seqlens) / counts)[sequence]

    centred = values - mean(values)
    z = centred / mean(centred.square()).sqrt().clamp(min=torch.finfo(values.dtype).tiny)
    return importance, select_tokens(importance, -z[:, None], cu_seqlens, temperature, summary_index=summary_index)


def static(
    stats: AttentionStats, logits: None, cu_seqlens: Tensor, temperature: float, summary_index: Tensor | None
) -> tuple[Tensor, Selection]:
    """In every block a fixed share, those the summary token attends to most (EViT, arXiv 2202.07800)."""
    attention = stats.summary_attention
    importance = attention.masked_fill(summary_rows(cu_seqlens, summary_index, attention.shape[0]), 0)
    return importance, _share(importance, importance, cu_seqlens, temperature, summary_index)


def random(
    stats: AttentionStats, logits: None, cu_seqlens: Tensor, temperature: float, summary_index: Tensor | None
) -> tuple[Tensor, Selection]:
    """In every block a fixed share, drawn at random; the others are averaged."""
    importance = torch.ones_like(stats.summary_attention)
    importance = importance.masked_fill(summary_rows(cu_seqlens, summary_index, importance.shape[0]), 0)
    return importance, _share(torch.rand_like(importance), importance, cu_seqlens, temperature, summary_index)


METHOD = "instance"  # each sample keeps its own number of tokens: `madtp_kernels.prune_tokens`, one call for all of it
RULES: dict[str, Callable[..., tuple[Tensor, Selection]]] = {
    "batch_max": batch_max,
    "unguided": unguided,
    "static": static,
    "random": random,
}
GUIDED = (METHOD, "batch_max")  # those that need the alignment of MAG; the others get None for their logits
SELECTIONS = (METHOD, *RULES)


def _share(score, importance, cu_seqlens, temperature, summary_index) -> Selection:
    prunable = ~summary_rows(cu_seqlens, summary_index, score.shape[0])
    counts = (_count(prunable, cu_seqlens) / (1 + temperature / HALF)).ceil()
    return _best(score, importance, counts, cu_seqlens, summary_index)


def _best(score, importance, counts, cu_seqlens, summary_index) -> Selection:
    """Keeps the `counts` (B,) prunable tokens with the largest scores, of equal ones the first; all where fewer than 2
    would go."""
    tokens = score.shape[0]
    is_summary = summary_rows(cu_seqlens, summary_index, tokens)
    sequence = sequence_ids(cu_seqlens, tokens)
    order = score.detach().masked_fill(is_summary, float("inf")).argsort(descending=True, stable=True)
    order = order[sequence[order].argsort(stable=True)]  # by sequence, the best first; row i is the (i - begin)th best
    few_would_go = _count(~is_summary, cu_seqlens) - counts < 2
    limit = torch.where(few_would_go, tokens, counts + _count(is_summary, cu_seqlens))
    keep = torch.empty_like(is_summary)
    keep[order] = torch.arange(tokens, device=score.device) - cu_seqlens[sequence] < limit[sequence]
    keep, cu_seqlens_out, source, merge_weight = layout(keep, importance, cu_seqlens)
    return Selection(keep, cu_seqlens, cu_seqlens_out, source[: int(cu_seqlens_out[-1])], merge_weight)


def _count(which: Tensor, cu_seqlens: Tensor) -> Tensor:
    """(B,) float32: how many rows of each sequence are of `which` (T,)."""
    return segment_sum(which.float(), cu_seqlens)
