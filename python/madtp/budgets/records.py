# SPDX-License-Identifier: Apache-2.0
"""What budgets are chosen by: what each part of a model does to its answers when it is pruned, and what that saves."""

from __future__ import annotations

from dataclasses import dataclass, field

from madtp.profiling.macs import Profile


@dataclass(frozen=True)
class TokenPoint:
    """One branch at one temperature, everything else dense."""

    share: float  # of the branch's dense MACs that is left
    temperature: float
    distill_loss: float


@dataclass(frozen=True)
class WeightUnit:
    """One Linear gone N:M, corrected, everything else dense."""

    branch: str
    zeroed: int  # weights
    macs: float  # counted per sample that it saves with all tokens; 0 where the hardware cannot run the pattern
    distill_loss: float
    rounding_error: float | None = None  # of its outputs with a dense weight; None: not looked at, or no input was met


@dataclass(frozen=True)
class WidthPoint:
    """One part with so many heads or channels left, everything else dense."""

    width: int
    distill_loss: float


@dataclass(frozen=True)
class WidthUnit:
    """The heads of one attention or the channels of one MLP (`madtp.width.WidthPart`)."""

    branch: str
    full: int  # how many there are
    macs: float  # of each, counted per sample with all tokens and dense weights
    params: int  # of each
    linears: tuple[str, ...]  # whose rows or columns they are
    points: tuple[WidthPoint, ...]  # from all of them to the fewest


@dataclass(frozen=True)
class Times:
    """Milliseconds per sample, of forward passes of one batch.

    Args:
        dense: of the model as it was given.
        patched: of the patched model with all its tokens and weights, those rounded that will be.
        tokens: of the same with one branch at the temperature of each of its `Sensitivities.tokens`.
        weights: by Linear, what it saves as a packed 2:4 layer with all tokens; never below 0. One that goes to
            int8 or fp8 is compared there.
    """

    dense: float
    patched: float
    tokens: dict[str, tuple[float, ...]]
    weights: dict[str, float]


@dataclass(frozen=True)
class Sensitivities:
    """profile: of the dense model on the calibration data. tokens: per branch, from all tokens to the fewest.

    times: of `madtp.budgets.latency.time_parts`, where budgets are for a latency target.
    widths: by part, where the config has a width_reduction.
    """

    profile: Profile
    tokens: dict[str, tuple[TokenPoint, ...]]
    weights: dict[str, WeightUnit]
    times: Times | None = None
    widths: dict[str, WidthUnit] = field(default_factory=dict)
