# SPDX-License-Identifier: Apache-2.0
"""What the forward pass sees of a weight under an N:M mask while it trains, and what the dense weight feels.

Each is a parametrization of the weight; `WeightPruner` says when, and which mask.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from madtp_kernels import Pattern, nm_mask

FLOOR = 0.01  # of the mean square of a weight: a reweighted penalty grows no further below it


class Masking(nn.Module):
    """Straight-through with the decay of SR-STE (Zhou et al., ICLR 2021, arXiv 2102.04010): the forward pass sees
    M * W, and the gradient of every weight is that of the masked one; pruned ones also feel decay * W."""

    mask: Tensor  # (N, C) bool, what stays
    shrinks_first = False  # whether it acts on the dense weight, which then goes N:M at once

    def __init__(self, weight: Tensor, pattern: Pattern, decay: float):
        super().__init__()
        self.pattern, self.decay = pattern, decay
        self.register_buffer("mask", torch.ones_like(weight, dtype=torch.bool, requires_grad=False))

    def forward(self, weight: Tensor) -> Tensor:
        return _StraightThrough.apply(weight, self)

    def value(self, weight: Tensor) -> Tensor:
        """What the forward pass sees."""
        return weight.masked_fill(~self.mask, 0.0)  # not a product: that would leave -0.0

    def penalty_gradient(self, weight: Tensor) -> Tensor:
        """What is added to the gradient of the weight."""
        return self.decay * weight.masked_fill(self.mask, 0.0)

    @torch.no_grad()
    def update(self, weight: Tensor, mask: Tensor) -> None:
        """Takes a mask (N, C), chosen by the dense weight as it is now."""
        self.mask.copy_(mask)


class Reweighted(Masking):
    """A penalty before the mask: decay * a * W on all that the pattern has no room for, a = q / (W^2 + 0.01 q), q the
    mean of W^2, with a and the choice as they were at the last update.

    Source: reweighted group penalties (Ma et al., DAC 2021, 10.1109/dac18074.2021.9586152).
    """

    penalty: Tensor  # (N, C), decay * a where it acts
    shrinks_first = True

    def __init__(self, weight: Tensor, pattern: Pattern, decay: float):
        super().__init__(weight, pattern, decay)
        self.register_buffer("penalty", torch.zeros_like(weight, requires_grad=False))

    def penalty_gradient(self, weight: Tensor) -> Tensor:
        return self.penalty * weight

    @torch.no_grad()
    def update(self, weight: Tensor, mask: Tensor) -> None:
        super().update(weight, mask)
        squares = weight.square()
        mean = squares.mean().clamp_min(torch.finfo(weight.dtype).tiny)
        penalty = self.decay * mean / (squares + FLOOR * mean)
        self.penalty.copy_(penalty.masked_fill(nm_mask(weight, *self.pattern), 0.0))


class Soft(Masking):
    """S-STE (Hu et al., NeurIPS 2024, arXiv 2409.09099): the forward pass sees b S(W), where S shrinks every weight by
    the largest magnitude that its group has no room for, so that nothing jumps where two weights change places.

    b = <W, S(W)> / ||S(W)||^2 keeps the size of the weight; it is fixed when the number of weights that stay is. The
    gradient passes straight through, and nothing decays.
    """

    scale: Tensor  # (), b
    kept: Tensor  # () int64, of every m weights, for which the scale is

    def __init__(self, weight: Tensor, pattern: Pattern, decay: float):
        super().__init__(weight, pattern, decay)
        self.register_buffer("scale", torch.ones((), dtype=weight.dtype, device=weight.device))
        self.register_buffer("kept", torch.tensor(pattern.m, device=weight.device))

    def value(self, weight: Tensor) -> Tensor:
        return self.scale * soft_threshold(weight, self.mask, self.pattern.m)

    def penalty_gradient(self, weight: Tensor) -> Tensor:
        return torch.zeros_like(weight)

    @torch.no_grad()
    def update(self, weight: Tensor, mask: Tensor) -> None:
        super().update(weight, mask)
        kept = mask[0, : self.pattern.m].sum()
        if kept != self.kept:
            shrunk = soft_threshold(weight, mask, self.pattern.m).double()
            squares = shrunk.square().sum()
            self.scale.copy_(torch.where(squares > 0, (weight * shrunk).sum() / squares, 1.0))
            self.kept.copy_(kept)


MASKINGS: dict[str | None, type[Masking]] = {None: Masking, "reweighted": Reweighted, "s_ste": Soft}


def soft_threshold(weight: Tensor, mask: Tensor, m: int) -> Tensor:
    """sign(w) max(|w| - t, 0) where the mask is, t the largest |w| of the same m columns where it is not; (N, C)."""
    magnitudes, shape = weight.abs(), (*weight.shape[:-1], -1, m)
    pruned = magnitudes.masked_fill(mask, 0.0).view(shape).amax(-1, keepdim=True).expand(shape)
    threshold = pruned.reshape(weight.shape)
    return (weight - weight.clamp(-threshold, threshold)).masked_fill(~mask, 0.0)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, masking: Masking) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.masking = masking
        return masking.value(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return gradients[0] + ctx.masking.penalty_gradient(weight), None
