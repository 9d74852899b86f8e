# SPDX-License-Identifier: Apache-2.0
"""The second-order sweep over the columns of a weight: what one column loses, the columns after it make up for.

Sources: SparseGPT (Frantar and Alistarh, ICML 2023, arXiv 2301.00774) for masks; GPTQ (Frantar et al., ICLR 2023,
arXiv 2210.17323) for a grid. Both are one sweep.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from madtp_kernels import Pattern, nm_mask
from madtp_kernels.checks import require
from madtp_kernels.reference.quantized import INT8, Grid, nearest

BLOCK = 128  # columns corrected together before the rest of the row hears of it


def checked_gram(gram: object, columns: int, damping: object) -> Tensor:
    """The Gram matrix in float64. Raises ValueError for it, or for the damping."""
    ok = isinstance(gram, Tensor) and gram.shape == (columns, columns) and bool(gram.isfinite().all())
    require(ok, "gram", f"finite of shape {(columns, columns)}", gram)
    require(isinstance(damping, int | float) and 0 < damping < math.inf, "damping", "a finite number above 0", damping)
    assert isinstance(gram, Tensor), "required above"
    return gram.double()


def inverse_factor(gram: Tensor, damping: float) -> Tensor:
    """Upper U with U^T U = (gram + damping I)^-1, damping being a share of the mean of gram's diagonal."""
    factor = torch.linalg.cholesky(damped(gram, damping))
    return torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True)


def damped(gram: Tensor, damping: float) -> Tensor:
    """gram + damping I, damping being a share of the mean of gram's diagonal."""
    level = gram.diagonal().mean()
    level = torch.where(level > 0, damping * level, 1.0)  # inputs that were all 0: nothing to correct
    return gram + torch.diag(level.expand(len(gram)))


def sweep(
    weight: Tensor,
    factor: Tensor,
    pattern: Pattern,
    scale: Tensor | None = None,
    mask: Tensor | None = None,
    grid: Grid = INT8,
) -> Tensor:
    """Goes through the columns from left to right: each is pruned and rounded, and its error spread over those to come.

    At the start of every group of m, the n weights that cost the output most stay: W_ij^2 over the j-th pivot of the
    inverse Gram matrix.

    Args:
        weight: (N, C) floating point, no NaN; C a multiple of m.
        factor: (C, C) float64, of `inverse_factor`.
        scale: (N,) of the grid that the kept weights are rounded to; None leaves them as they are.
        mask: (N, C) bool, what stays of every group; None chooses.

    Returns:
        (N, C) float64, with n in every m and 0 elsewhere; with a scale, values of the grid times it.
    """
    n, m = pattern
    chosen = nm_mask(weight, n, m)  # its checks; every group is chosen again below
    dense = weight.detach().to(torch.float64, copy=True)
    scales = None if scale is None else scale.double()
    columns = dense.shape[1]
    block = m * max(1, BLOCK // m)
    for start in range(0, columns, block):
        end = min(start + block, columns)
        errors = dense.new_zeros(len(dense), end - start)
        for j in range(start, end):
            if mask is None and j % m == 0 and n < m:
                group = slice(j, j + m)
                score = (dense[:, group] / factor.diagonal()[group]).square()
                chosen[:, group] = nm_mask(dense[:, group], n, m, score=score)
            value = dense[:, j].masked_fill(~(chosen if mask is None else mask)[:, j], 0.0)
            if scales is not None:
                value = nearest(value, scales, grid) * scales
            error = (dense[:, j] - value) / factor[j, j]
            dense[:, j] = value
            dense[:, j + 1 : end] -= error[:, None] * factor[j, j + 1 : end]
            errors[:, j - start] = error
        dense[:, end:] -= errors @ factor[start:end, end:]
    return dense
