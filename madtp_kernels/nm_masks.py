# SPDX-License-Identifier: Apache-2.0
"""N:M masks: which n of every m consecutive weights stay."""

from __future__ import annotations

import functools
import itertools

import torch
from torch import Tensor

from madtp_kernels.checks import require

RANKED = 32  # up to this m comparing all pairs beats a sort
BLOCKS_AT_ONCE = 1 << 16  # 4x4 blocks scored together: 47 MB


def nm_mask(weight: Tensor, n: int, m: int, *, score: Tensor | None = None, dim: int = -1) -> Tensor:
    """Keep the n entries with the largest score of every m consecutive ones.

    Args:
        weight: any shape, floating point, no NaN; its size along `dim` is a multiple of m.
        n, m: 1 <= n <= m.
        score: shape of weight, no NaN; None scores by magnitude.
        dim: the dimension the groups of m run along; -1 is the input dimension of a Linear weight.

    Returns:
        bool, shape of weight, with exactly n True in every group. Equal scores keep the lowest index (-0.0 equals 0.0):
        a mask depends on the values alone, on every device.

    Raises:
        ValueError: an argument breaks a rule. The check for NaN reads one value on the host.
    """
    require(isinstance(weight, Tensor) and weight.is_floating_point(), "weight", "a floating-point tensor", weight)
    require(isinstance(m, int) and m >= 1, "m", "an integer of at least 1", m)
    require(isinstance(n, int) and 1 <= n <= m, "n", f"an integer from 1 to m = {m}", n)
    require(isinstance(dim, int) and -weight.ndim <= dim < weight.ndim, "dim", f"a dimension of {weight.ndim}", dim)
    require(weight.shape[dim] % m == 0, "weight", f"of a size along dim {dim} that is a multiple of m = {m}", weight)
    groups = checked_scores(weight, score).movedim(dim, -1).unflatten(-1, (-1, m))
    keep = _first_by_rank(groups, n) if m <= RANKED else _first_by_sort(groups, n)
    return keep.flatten(-2).movedim(-1, dim).contiguous()


def transposable_mask(weight: Tensor, *, score: Tensor | None = None) -> Tensor:
    """A mask that is 2:4 along rows and along columns: W^T, in the input gradient, runs sparse too.

    Of the 90 ways to keep exactly 2 in each row and each column of a 4x4 block, every block gets the one that keeps
    most score. Source: Hubara et al., NeurIPS 2021, arXiv 2102.08124, which solves the same choice as a flow.

    Args:
        weight: (N, C) floating point, no NaN; N and C multiples of 4.
        score: shape of weight, no NaN; None scores by magnitude.

    Returns:
        bool (N, C). Of equal choices the one that keeps the earliest entries, row by row, stays.

    Raises:
        ValueError: an argument breaks a rule. The check for NaN reads one value on the host.
    """
    ok = isinstance(weight, Tensor) and weight.is_floating_point() and weight.ndim == 2
    require(ok, "weight", "a 2-dimensional floating-point tensor", weight)
    rows, columns = weight.shape
    require(rows % 4 == 0 and columns % 4 == 0, "weight", "of sizes that are multiples of 4", weight)
    # Sums of float32 scores in float64 do not round; an infinite score would turn 0 * inf into NaN.
    limit = torch.finfo(torch.float64).max / 16
    scores = checked_scores(weight, score).double().clamp(-limit, limit)
    blocks = scores.unflatten(1, (-1, 4)).unflatten(0, (-1, 4)).transpose(1, 2).reshape(-1, 16)
    patterns = _transposable_patterns().to(weight.device)  # (90, 16)
    best = [(chunk @ patterns.double().T).argmax(1) for chunk in blocks.split(BLOCKS_AT_ONCE)]
    keep = patterns[torch.cat(best)].view(rows // 4, columns // 4, 4, 4)
    return keep.transpose(1, 2).reshape(rows, columns)


def checked_scores(weight: Tensor, score: Tensor | None) -> Tensor:
    """What ranks the weights. Raises ValueError for a NaN or a score of another shape or device."""
    require(not weight.isnan().any(), "weight", "free of NaN", weight)
    if score is None:
        return weight.detach().abs()
    ok = isinstance(score, Tensor) and score.shape == weight.shape and score.device == weight.device
    require(ok, "score", f"of shape {tuple(weight.shape)} on {weight.device} like weight", score)
    require(not score.isnan().any(), "score", "free of NaN", score)
    return score.detach()


def _first_by_rank(groups: Tensor, n: int) -> Tensor:
    """(..., m) scores -> bool: an entry stays when fewer than n beat it, earlier ones by being equal."""
    entries = groups.movedim(-1, 0).contiguous()
    beaten = torch.zeros(entries.shape, dtype=torch.uint8, device=groups.device)
    for j in range(1, len(entries)):
        wins = entries[j] > entries[:j]
        beaten[:j] += wins
        beaten[j] += j - wins.sum(0, dtype=torch.uint8)
    return (beaten < n).movedim(0, -1)


def _first_by_sort(groups: Tensor, n: int) -> Tensor:
    order = (groups + 0.0).sort(dim=-1, descending=True, stable=True).indices  # a radix sort puts -0.0 below 0.0
    keep = torch.zeros(groups.shape, dtype=torch.bool, device=groups.device)
    return keep.scatter_(-1, order[..., :n], True)


@functools.cache
def _transposable_patterns() -> Tensor:
    """(90, 16) bool: the 4x4 masks with exactly 2 in each row and column, those that keep early entries first."""
    rows = [[column in pair for column in range(4)] for pair in itertools.combinations(range(4), 2)]
    blocks = torch.tensor(list(itertools.product(rows, repeat=4)))  # (6^4, 4, 4)
    return blocks[(blocks.sum(1) == 2).all(1)].flatten(1)
