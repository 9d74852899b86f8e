# SPDX-License-Identifier: Apache-2.0
"""Finding where a measured quantity meets its target."""

from __future__ import annotations

import math
from collections.abc import Callable


def find_root(
    function: Callable[[float], float],
    low: float,
    high: float,
    *,
    tolerance: float,
    rounds: int = 12,
    slope: float = 0.2,
) -> tuple[float, float]:
    """Where a function that falls from `low` to `high` is within `tolerance` of 0, from x = 0 on.

    It steps as if the function fell by `slope`, twice as far each time, until it has crossed 0, and goes on by regula
    falsi with the Illinois rule. Where no x will do (a jump at 0, no 0 in the range) the best one seen is the answer.

    Returns:
        x and the function there.
    """
    ends: dict[bool, tuple[float, float]] = {}  # whether the function is above 0 -> the last x there, its value
    x, best, stride, last = 0.0, (0.0, math.inf), 1 / slope, None
    for _ in range(rounds):
        value = function(x)
        best = min(best, (x, value), key=lambda point: abs(point[1]))
        above = value > 0
        if abs(value) <= tolerance or x == (high if above else low):
            break
        ends[above] = (x, value)
        if len(ends) == 2:
            (a, f), (b, g) = ends[above], ends[not above]
            if above is last:  # the other end stays where it is: count it for half, so that it moves
                g /= 2
                ends[not above] = (b, g)
            x = a - f * (b - a) / (g - f)
        else:
            x = min(max(x + stride * value, low), high)
            stride *= 2
        last = above
    return best
