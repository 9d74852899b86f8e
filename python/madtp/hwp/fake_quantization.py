# SPDX-License-Identifier: Apache-2.0
"""Fake quantisation: Linears that compute in training as they will with int8 or fp8 weights.

Sources: quantisation-aware training (Jacob et al., CVPR 2018, arXiv 1712.05877), with gradients straight through the
rounding (Bengio et al., 2013, arXiv 1308.3432).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from madtp.hwp.modules import ModuleTree, require_linears, shared_reason, write_unsupported_reason
from madtp.hwp.pruner import is_masked
from madtp.hwp.weight_grid import grid_unsupported_reason, rounded, set_scale
from madtp_kernels.checks import require
from madtp_kernels.reference.quantized import GRIDS, Grid, quantize_rows


class FakeQuantizer:
    """Rounds the inputs and the weights of Linears in the last part of a training.

    From then on their outputs are those of `quantized_linear` with `quantize(weight, dtype)`, up to the rounding of
    sums; the gradients are those of the rounded Linear, as if rounding were the identity. Weights keep their dtype and
    their place, so optimisers, masks of a `WeightPruner` and checkpoints know nothing of it: `step` alone says whether
    it is on, in a resumed training too.

    Scales are those of the largest magnitudes at every step, as `pack` takes them in the end. A `weight_scale` of
    before goes at the start: it was chosen for weights that training has moved since, and would cut off those that
    grow. Under autocast the rounded values are cast as all others are.

    Args:
        model: its masks, if it gets some, are there already.
        modules: names of Linear modules.
        total_steps: optimiser steps of the training.
        share: of them, at the end.
        dtype: int8 or fp8.

    Raises:
        ValueError: a module does not exist, is no plain Linear, shares its weight or has one that is computed (other
            than by a `WeightPruner`) or not finite; or another argument breaks a rule.
    """

    def __init__(
        self, model: nn.Module, modules: Iterable[str], *, total_steps: int, share: float = 0.2, dtype: str = "int8"
    ):
        require(isinstance(dtype, str) and dtype in GRIDS, "dtype", " or ".join(GRIDS), repr(dtype))
        require(
            isinstance(total_steps, int) and total_steps >= 1, "total_steps", "an integer of at least 1", total_steps
        )
        require(isinstance(share, int | float) and 0 <= share <= 1, "share", "a number in [0, 1]", share)
        tree = ModuleTree(model)
        found = require_linears("modules", modules, tree)
        for name, module in found.items():
            reason = _unsupported_reason(module, tree)
            if reason is not None:
                raise ValueError(f"modules must be Linears that can be rounded, got {name!r}: {reason}")
        self.modules: dict[str, nn.Linear] = found
        self.first_step = round((1 - share) * total_steps)
        self.active = False
        self._forward = _forward_on(GRIDS[dtype])

    def step(self, step: int) -> None:
        """Before optimiser step `step` (from 0), or after the last one: on or off, as the schedule says."""
        self.start() if step >= self.first_step else self.stop()

    def start(self) -> None:
        for module in self.modules.values() if not self.active else ():
            set_scale(module, None)
            vars(module)["forward"] = MethodType(self._forward, module)
        self.active = True

    def stop(self) -> None:
        """The Linears as they were: before they are packed, or for good."""
        for module in self.modules.values() if self.active else ():
            del vars(module)["forward"]
        self.active = False


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rounding: Callable[[Tensor], Tensor]) -> Tensor:
        return rounding(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def _forward_on(grid: Grid) -> Callable[[nn.Linear, Tensor], Tensor]:
    """The forward of a Linear whose inputs and weight are rounded to a grid."""

    def forward(self: nn.Linear, input: Tensor) -> Tensor:
        x = _StraightThrough.apply(input, lambda x: _rounded_rows(x, grid))
        weight = _StraightThrough.apply(self.weight, lambda weight: rounded(weight, grid))
        return F.linear(x, weight, self.bias)

    return forward


def _rounded_rows(x: Tensor, grid: Grid) -> Tensor:
    """x (..., C), every row rounded as `quantized_linear` does it."""
    values, scale = quantize_rows(x.flatten(0, -2) if x.ndim > 1 else x[None], grid)
    return (values.float() * scale[:, None]).view_as(x).to(x.dtype)


def _unsupported_reason(module: nn.Linear, tree: ModuleTree) -> str | None:
    if type(module).forward is not nn.Linear.forward or "forward" in vars(module):
        return "its forward is another than that of a Linear"
    if not is_masked(module):  # or a WeightPruner has asked
        reason = write_unsupported_reason(module, "weight") or shared_reason(module, "weight", tree)
        if reason is not None:
            return reason
    return "weight is on the meta device" if module.weight.is_meta else grid_unsupported_reason(module)
