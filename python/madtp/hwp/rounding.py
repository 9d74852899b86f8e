# SPDX-License-Identifier: Apache-2.0
"""Weights rounded to int8 or fp8 so that the outputs stay close, N:M as well where that is asked for.

Source: GPTQ (Frantar et al., ICLR 2023, arXiv 2210.17323), which SparseGPT does in one sweep with its masks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from madtp.hwp.sweep import checked_gram, inverse_factor, sweep
from madtp.hwp.weight_grid import GridWeight
from madtp_kernels import Pattern, nm_mask
from madtp_kernels.checks import require
from madtp_kernels.reference.quantized import GRIDS, INT8, Grid, nearest, row_scale

SHRINKS = (1.0, 0.95, 0.9, 0.8, 0.7)  # parts of the scale of the largest magnitude that are tried for every row


def round_weight(
    weight: Tensor, pattern: Pattern | str | None = None, *, score: Tensor | None = None, dtype: str = "int8"
) -> GridWeight:
    """The nearest values, on the grid of the rows' largest magnitudes; of the weights that stay, with a pattern.

    Args:
        weight: (N, C) floating point, finite; C a multiple of the pattern's m.
        score: (N, C), what the pattern keeps; None takes |weight|.
        dtype: int8 or fp8.

    Raises:
        ValueError: an argument breaks a rule.
    """
    _check(weight, dtype)
    if pattern is not None:
        weight = weight.detach().masked_fill(~nm_mask(weight, *Pattern.parse(pattern), score=score), 0.0)
    grid = GRIDS[dtype]
    return _grid_weight(weight.detach(), row_scale(weight, grid), grid)


def reconstruct_rounded(
    weight: Tensor, gram: Tensor, pattern: Pattern | str | None = None, *, damping: float = 0.01, dtype: str = "int8"
) -> GridWeight:
    """An int8 or fp8 weight, dense or N:M, whose outputs stay close to those of `weight`.

    A sweep with the pattern alone says what stays. Then every column is pruned and rounded in turn, and the columns
    after it make up for both (`madtp.hwp.sweep`). The scale of a row is the one of `SHRINKS` at which the values
    nearest to what the first sweep left have the least Gram-weighted error; a row for which these are better than what
    the second sweep found has them.

    Args:
        weight: (N, C) floating point, finite; C a multiple of the pattern's m.
        gram: (C, C) sum of x x^T over calibration inputs, finite: `InputStatistics.gram`.
        pattern: None: all stay. What is 0 in `weight` stays 0, so that what was pruned before is so still.
        damping: share of the mean of gram's diagonal that is added to it, above 0.
        dtype: int8 or fp8.

    Raises:
        ValueError: an argument breaks a rule.
    """
    _check(weight, dtype)
    gram = checked_gram(gram, weight.shape[1], damping)
    pattern = Pattern(1, 1) if pattern is None else Pattern.parse(pattern)
    grid, factor = GRIDS[dtype], inverse_factor(gram, damping)
    kept = weight.detach() if pattern.n == pattern.m else sweep(weight, factor, pattern)
    scale = search_scale(kept, gram, grid)
    alone = _grid_weight(kept, scale, grid)
    joint = _grid_weight(sweep(weight, factor, pattern, scale, kept != 0, grid), scale, grid)
    better = _error(weight, joint, gram) < _error(weight, alone, gram)
    return GridWeight(torch.where(better[:, None], joint.values, alone.values), scale)


def search_scale(weight: Tensor, gram: Tensor, grid: Grid = INT8) -> Tensor:
    """weight (N, C), gram (C, C) -> (N,) float32: for every row the one of `SHRINKS` times `row_scale` that is best."""
    dense, gram = weight.float(), (gram / gram.diagonal().mean().clamp_min(1e-300)).float()
    widest = row_scale(weight, grid)
    best, least = widest, torch.full_like(widest, torch.inf)
    for shrink in SHRINKS:
        scale = (shrink * widest).clamp_min(torch.finfo(torch.float32).tiny)
        lost = (dense - nearest(dense, scale[:, None], grid) * scale[:, None]) / widest[:, None]
        error = ((lost @ gram) * lost).sum(1)
        better = error < least
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    return best


def _check(weight: object, dtype: object) -> None:
    require(isinstance(dtype, str) and dtype in GRIDS, "dtype", " or ".join(GRIDS), repr(dtype))
    ok = isinstance(weight, Tensor) and weight.ndim == 2 and weight.is_floating_point()
    require(ok and bool(weight.isfinite().all()), "weight", "finite floating point of shape (N, C)", weight)  # type: ignore[attr-defined]  # ok says so


def _error(weight: Tensor, grid: GridWeight, gram: Tensor) -> Tensor:
    """(N,): the squared error of every output over the inputs of the Gram matrix."""
    lost = weight.detach().double() - grid.to_dense(torch.float64)
    return ((lost @ gram) * lost).sum(1)


def _grid_weight(weight: Tensor, scale: Tensor, grid: Grid) -> GridWeight:
    return GridWeight(nearest(weight, scale[:, None], grid).to(grid.dtype), scale)
