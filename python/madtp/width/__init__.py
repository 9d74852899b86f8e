# SPDX-License-Identifier: Apache-2.0
"""Width: attention heads and hidden channels of MLPs that are removed, which leaves smaller Linears.

It goes before masks and integers (`hwp`): the kernels run what is left as they run any Linear. How many of them go is
decided in `budgets`.
"""

from madtp.width.parts import WidthPart, tile, width_parts, widths_of
from madtp.width.prune import Narrowed, narrowed, prune_width, uniform_width, uniform_widths

__all__ = [
    "Narrowed",
    "WidthPart",
    "narrowed",
    "prune_width",
    "tile",
    "uniform_width",
    "uniform_widths",
    "width_parts",
    "widths_of",
]
