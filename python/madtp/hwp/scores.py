# SPDX-License-Identifier: Apache-2.0
"""What a weight is worth beyond its magnitude: |W| ||x||, and the second-order cost of taking it away."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from madtp_kernels import nm_mask
from madtp_kernels.checks import require

BLOCK = 128  # columns corrected together before the rest of the row hears of it


def activation_score(weight: Tensor, norms: Tensor) -> Tensor:
    """|W_ij| ||x_j||: weight (N, C), norms (C,) of the inputs -> (N, C). Source: Wanda, arXiv 2306.11695."""
    return weight.detach().abs() * norms.to(weight)


def norms_of(name: str, module: nn.Linear, norms: Mapping[str, Tensor]) -> Tensor:
    """norms[name], checked."""
    found = norms.get(name)
    ok = isinstance(found, Tensor) and found.shape == (module.in_features,) and bool(found.isfinite().all())
    require(ok, f"norms[{name!r}]", f"finite of shape ({module.in_features},)", found)
    return norms[name]


def reconstruct(weight: Tensor, gram: Tensor, n: int, m: int, *, damping: float = 0.01) -> Tensor:
    """An N:M weight whose outputs stay close to the dense ones: the kept weights make up for those that go.

    Goes through the columns from left to right. At the start of every group of m, the n that cost the output most stay
    (W_ij^2 over the j-th pivot of the inverse Gram matrix); what each pruned weight did is then spread over the columns
    still to come. Source: SparseGPT (Frantar and Alistarh, ICML 2023, arXiv 2301.00774).

    Args:
        weight: (N, C) floating point, no NaN; C a multiple of m.
        gram: (C, C) sum of x x^T over calibration inputs, finite: `InputStatistics.gram`.
        n, m: 1 <= n <= m.
        damping: share of the mean of gram's diagonal that is added to it, above 0.

    Returns:
        (N, C) in weight's dtype, with exactly n kept in every m; computed in float64.

    Raises:
        ValueError: an argument breaks a rule.
    """
    columns = weight.shape[-1]
    ok = isinstance(gram, Tensor) and gram.shape == (columns, columns) and bool(gram.isfinite().all())
    require(ok, "gram", f"finite of shape {(columns, columns)}", gram)
    require(isinstance(damping, int | float) and damping > 0, "damping", "a number above 0", damping)
    mask = nm_mask(weight, n, m)  # its checks; every group is chosen again below
    dense = weight.detach().double()
    factor = _inverse_factor(gram.double(), damping)
    block = m * max(1, BLOCK // m)
    for start in range(0, columns, block):
        end = min(start + block, columns)
        errors = dense.new_zeros(len(dense), end - start)
        for j in range(start, end):
            if j % m == 0:
                group = slice(j, j + m)
                score = (dense[:, group] / factor.diagonal()[group]).square()
                mask[:, group] = nm_mask(dense[:, group], n, m, score=score)
            error = dense[:, j].masked_fill(mask[:, j], 0.0) / factor[j, j]
            dense[:, j + 1 : end] -= error[:, None] * factor[j, j + 1 : end]
            errors[:, j - start] = error
        dense[:, end:] -= errors @ factor[start:end, end:]
    return dense.masked_fill(~mask, 0.0).to(weight.dtype) + 0.0  # a cast can leave -0.0


def _inverse_factor(gram: Tensor, damping: float) -> Tensor:
    """Upper U with U^T U = (gram + damping I)^-1."""
    level = gram.diagonal().mean()
    level = torch.where(level > 0, damping * level, 1.0)  # inputs that were all 0: nothing to correct
    damped = gram + torch.diag(level.expand(len(gram)))
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
