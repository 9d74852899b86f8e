# SPDX-License-Identifier: Apache-2.0
"""Which heads or channels go, and how the Linear that reads them makes up for those.

Sources: structured optimal brain surgeon, as in ZipLM (Kurtic, Frantar and Alistarh, NeurIPS 2023, arXiv 2302.04089);
without correction, the norms of inputs times those of their columns, as in Wanda (arXiv 2306.11695) for single weights.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from madtp.hwp.calibration import InputStatistics
from madtp.hwp.sweep import checked_gram

SCORES = ("second_order", "activation")
ROUNDING = 1e-12  # of a Gram matrix, in its own diagonal; what is about the mean may be less than that
ROUNDS = 4  # in which channels go by the second-order score; heads go one by one


class Cut(NamedTuple):
    """What is left of a Linear that reads heads or channels.

    error: the sum of squared changes of its outputs on the calibration data, over that of the outputs about their mean.
    """

    kept: Tensor  # (width,) int64, ascending
    weight: Tensor  # (N, width * size), in the dtype of before
    bias: Tensor | None  # (N,)
    error: float


def cut(
    weight: Tensor,
    bias: Tensor | None,
    inputs: InputStatistics,
    size: int,
    width: int,
    *,
    score: str,
    correct: bool,
    damping: float,
) -> Cut:
    """Removes all but `width` units of `size` columns, those that cost the outputs least; computed in float64.

    Args:
        weight, bias: (N, C), (N,) of the Linear.
        inputs: with Gram matrix and sums.
        score, correct, damping: of `madtp.prune_width`.

    Raises:
        ValueError: the Gram matrix is not finite.
    """
    dense, gram = weight.detach().double(), checked_gram(inputs.gram, weight.shape[1], damping)
    mean = gram.diagonal().new_zeros(len(gram)) if inputs.sums is None else inputs.sums.to(gram) / inputs.weight_sum
    about_mean = gram - inputs.weight_sum * mean[:, None] * mean
    tiny = torch.finfo(gram.dtype).tiny
    floor = (ROUNDING * gram.diagonal().mean()).clamp_min(tiny)
    least = (ROUNDING * ((dense @ gram) * dense).sum()).clamp_min(tiny)  # of outputs, as the floor is of inputs
    moves = correct and bias is not None
    if moves:  # what the mean of an input gives, a bias gives too
        gram = about_mean
    level = damping * gram.diagonal().mean().clamp_min(floor)
    kept = torch.arange(weight.shape[1] // size, device=weight.device)
    batch = 1 if size > 1 else -(-(len(kept) - width) // ROUNDS)
    while len(kept) > width:
        costs = _costs(dense, gram, _columns(kept, size), size, level, score)
        left = max(len(kept) - batch, width)
        kept = kept[costs.argsort(descending=True, stable=True)[:left].sort().values]
    columns = _columns(kept, size)
    new = _fitted(dense, gram, columns, level) if correct else dense[:, columns]
    change = dense.clone()
    change[:, columns] -= new
    outputs = ((dense @ about_mean) * dense).sum().clamp_min(least)
    error = (((change @ gram) * change).sum() / outputs).item()
    moved = None if bias is None else bias.detach() + (change @ mean).to(bias.dtype) * moves
    return Cut(kept, new.to(weight.dtype), moved, max(error, 0.0))


def _columns(units: Tensor, size: int) -> Tensor:
    return (units[:, None] * size + torch.arange(size, device=units.device)).flatten()


def _costs(dense: Tensor, gram: Tensor, columns: Tensor, size: int, level: Tensor, score: str) -> Tensor:
    """(units,): what the removal of each alone, of those in the columns, does to the squared outputs."""
    if score == "activation":
        weight, blocks = dense[:, columns], _blocks(gram[columns][:, columns], size)
    else:  # the others make up for it
        weight = _fitted(dense, gram, columns, level)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(_damped(gram[columns][:, columns], level)))
        blocks = torch.linalg.inv(_blocks(inverse, size))
    units = weight.T.unflatten(0, (-1, size))  # (units, size, N)
    return ((blocks @ units) * units).sum((1, 2))


def _blocks(gram: Tensor, size: int) -> Tensor:
    """(C, C) -> (C / size, size, size) along the diagonal."""
    count = len(gram) // size
    units = torch.arange(count, device=gram.device)
    return gram.view(count, size, count, size)[units, :, units]


def _fitted(dense: Tensor, gram: Tensor, columns: Tensor, level: Tensor) -> Tensor:
    """(N, kept): least squares, W_K + W_R G_RK (G_KK + level I)^-1, R being what is not kept."""
    rest = torch.ones(len(gram), dtype=torch.bool, device=gram.device)
    rest[columns] = False
    factor = torch.linalg.cholesky(_damped(gram[columns][:, columns], level))
    lost = dense[:, rest] @ gram[rest][:, columns]
    return dense[:, columns] + torch.cholesky_solve(lost.T, factor).T


def _damped(gram: Tensor, level: Tensor) -> Tensor:
    return gram + torch.diag(level.expand(len(gram)))
