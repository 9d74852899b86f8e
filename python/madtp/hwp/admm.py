# SPDX-License-Identifier: Apache-2.0
"""N:M weights, rounded ones too, by ADMM: the mask comes from all columns together, not from left to right.

Sources: ADMM onto a pattern and a grid (Yuan et al., ISLPED 2019, 10.1109/islped.2019.8824944); of one layer, on the
Gram matrix of its inputs (Boža, arXiv 2401.02938).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from madtp.hwp.rounding import reconstruct_rounded, search_scale
from madtp.hwp.scores import reconstruct
from madtp.hwp.sweep import checked_gram, damped
from madtp.hwp.weight_grid import GridWeight
from madtp_kernels import Pattern, nm_mask
from madtp_kernels.reference.quantized import GRIDS, nearest

MASK_STEPS, MASK_PENALTY, MASK_GROWTH = 40, 0.01, 1.2  # rho starts loose, and hardens to 12
GRID_STEPS, GRID_PENALTY = 50, 1.0
ELEMENTS = 2**22  # of the systems that are solved at once


def reconstruct_admm(weight: Tensor, gram: Tensor, n: int, m: int, *, damping: float = 0.01) -> Tensor:
    """An N:M weight whose outputs stay close to the dense ones: ADMM finds what stays, least squares the values.

    With channels scaled so that H has ones on its diagonal, it alternates a ridge solve of min ||(W - V) X||^2 +
    rho ||V - Z + U||^2, the projection Z of V + U onto N:M, and U <- U + V - Z, while rho grows. On the last mask the
    minimum is exact. A row that `reconstruct` has better is that.

    Args:
        weight: (N, C) floating point, no NaN; C a multiple of m.
        gram: (C, C) sum of x x^T over calibration inputs, finite: `InputStatistics.gram`.
        n, m: 1 <= n <= m.
        damping: share of the mean of gram's diagonal that is added to it, above 0.

    Returns:
        (N, C) in weight's dtype, with at most n that are not 0 in every m; computed in float64.

    Raises:
        ValueError: an argument breaks a rule.
    """
    swept = reconstruct(weight, gram, n, m, damping=damping).double()  # and its checks
    dense, known = weight.detach().double(), damped(checked_gram(gram, weight.shape[1], damping), damping)
    exact = solve_masked(dense, known, _find_mask(dense, known, n, m))
    return _best(dense, known, swept, exact).to(weight.dtype) + 0.0  # a cast can leave -0.0


def reconstruct_admm_rounded(
    weight: Tensor, gram: Tensor, pattern: Pattern | str | None = None, *, damping: float = 0.01, dtype: str = "int8"
) -> GridWeight:
    """An int8 or fp8 weight, dense or N:M, whose outputs stay close to those of `weight`.

    `reconstruct_admm` says what stays and its values, the scale of a row is the best of `search_scale`, and ADMM
    projects onto the grid; of all it meets a row keeps the best. A row that `reconstruct_rounded` has better is that.

    Args:
        weight: (N, C) floating point, finite; C a multiple of the pattern's m.
        gram: (C, C) sum of x x^T over calibration inputs, finite: `InputStatistics.gram`.
        pattern: None: all stay. What is 0 in `weight` stays 0 then.
        damping: share of the mean of gram's diagonal that is added to it, above 0.
        dtype: int8 or fp8.

    Raises:
        ValueError: an argument breaks a rule.
    """
    swept = reconstruct_rounded(weight, gram, pattern, damping=damping, dtype=dtype)  # and its checks
    dense, known = weight.detach().double(), damped(checked_gram(gram, weight.shape[1], damping), damping)
    pattern = Pattern(1, 1) if pattern is None else Pattern.parse(pattern)
    kept = dense if pattern.n == pattern.m else reconstruct_admm(dense, gram, *pattern, damping=damping)
    grid, mask = GRIDS[dtype], kept != 0
    scale = search_scale(kept, known, grid)

    def on_grid(value: Tensor) -> Tensor:
        return nearest(value.masked_fill(~mask, 0.0), scale[:, None], grid) * scale[:, None].double()

    best = _best(dense, known, swept.to_dense(torch.float64), _project(dense, known, kept, on_grid))
    ours = (best != swept.to_dense(torch.float64)).any(1)
    scale = torch.where(ours, scale, swept.scale)
    return GridWeight(nearest(best, scale[:, None], grid).to(grid.dtype), scale)


def solve_masked(weight: Tensor, gram: Tensor, mask: Tensor) -> Tensor:
    """The weight on the mask with the least error: of every row, H_SS v_S = (H w)_S over the columns S that stay.

    Args:
        weight: (N, C) float64.
        gram: (C, C) float64, positive definite.
        mask: (N, C) bool, as many in every row.
    """
    columns = mask.nonzero()[:, 1].view(len(weight), -1)  # (N, K)
    sides = (weight @ gram).gather(1, columns)
    solved = torch.zeros_like(weight)
    rows = max(1, ELEMENTS // max(columns.shape[1], 1) ** 2)
    for start in range(0, len(weight), rows):
        some = columns[start : start + rows]
        factor = torch.linalg.cholesky(gram[some[:, :, None], some[:, None, :]])
        values = torch.cholesky_solve(sides[start : start + rows, :, None], factor)[..., 0]
        solved[start : start + rows].scatter_(1, some, values)
    return solved


def _find_mask(weight: Tensor, gram: Tensor, n: int, m: int) -> Tensor:
    scale = gram.diagonal().sqrt()
    ridge = _Ridge(weight * scale, gram / scale[:, None] / scale)
    value, dual, penalty = weight * scale, torch.zeros_like(weight), MASK_PENALTY
    mask = torch.ones_like(weight, dtype=torch.bool)
    for _ in range(MASK_STEPS):
        free = ridge.solve(value - dual, penalty) + dual
        mask = nm_mask(free, n, m)
        value = free.masked_fill(~mask, 0.0)
        dual, penalty = (free - value) / MASK_GROWTH, penalty * MASK_GROWTH
    return mask


def _project(weight: Tensor, gram: Tensor, start: Tensor, onto: Callable[[Tensor], Tensor]) -> Tensor:
    """The best that ADMM meets among the projections of what it solves."""
    scale = gram.diagonal().sqrt()
    ridge = _Ridge(weight * scale, gram / scale[:, None] / scale)
    best = value = onto(start)
    dual = (start - value) * scale
    for _ in range(GRID_STEPS):
        free = ridge.solve(value * scale - dual, GRID_PENALTY) + dual
        value = onto(free / scale)
        dual = free - value * scale
        best = _best(weight, gram, best, value)
    return best


class _Ridge:
    """min over V of ||(W - V) X||^2 + rho ||V - near||^2, for every rho from one decomposition of H."""

    def __init__(self, weight: Tensor, gram: Tensor):
        self.values, self.vectors = torch.linalg.eigh(gram)
        self.target = weight @ gram @ self.vectors

    def solve(self, near: Tensor, penalty: float) -> Tensor:
        return (self.target + penalty * near @ self.vectors) / (self.values + penalty) @ self.vectors.T


def _best(weight: Tensor, gram: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Row by row the one with the least error over the inputs of the Gram matrix."""
    errors = [((weight - value) @ gram * (weight - value)).sum(1) for value in (first, second)]
    return torch.where((errors[1] < errors[0])[:, None], second, first)
