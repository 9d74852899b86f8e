# SPDX-License-Identifier: Apache-2.0
"""What a weight is worth beyond its magnitude: |W| ||x||, and the second-order cost of taking it away."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from madtp.hwp.sweep import checked_gram, inverse_factor, sweep
from madtp_kernels import Pattern
from madtp_kernels.checks import require


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

    What each pruned weight did is spread over the columns still to come (`madtp.hwp.sweep`). Source: SparseGPT (Frantar
    and Alistarh, ICML 2023, arXiv 2301.00774).

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
    factor = inverse_factor(checked_gram(gram, weight.shape[-1], damping), damping)
    return sweep(weight, factor, Pattern(n, m)).to(weight.dtype) + 0.0  # a cast can leave -0.0
