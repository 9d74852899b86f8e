"""N:M masks: which n of every m consecutive weights stay."""

from __future__ import annotations

import torch
from torch import Tensor

from madtp_kernels.ops.checks import require


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
    require(not weight.isnan().any(), "weight", "free of NaN", weight)
    if score is None:
        score = weight.detach().abs()
    else:
        ok = isinstance(score, Tensor) and score.shape == weight.shape and score.device == weight.device
        require(ok, "score", f"of shape {tuple(weight.shape)} on {weight.device} like weight", score)
        require(not score.isnan().any(), "score", "free of NaN", score)
        score = score.detach() + 0.0  # a radix sort would put -0.0 below 0.0
    groups = score.movedim(dim, -1).unflatten(-1, (-1, m))
    order = groups.sort(dim=-1, descending=True, stable=True).indices
    keep = torch.zeros(groups.shape, dtype=torch.bool, device=weight.device)
    keep.scatter_(-1, order[..., :n], True)
    return keep.flatten(-2).movedim(-1, dim).contiguous()
