# SPDX-License-Identifier: Apache-2.0
"""What rounding to int8 or fp8 does to the outputs of every Linear, told from the statistics of its inputs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import cast

from torch import Tensor, nn

from madtp.hwp.calibration import InputStatistics, known_inputs
from madtp.hwp.modules import ModuleTree, require_linears
from madtp.hwp.weight_grid import SCALE
from madtp_kernels.checks import require
from madtp_kernels.reference.quantized import GRIDS, INT8, nearest, row_scale

ROUNDING_VARIANCE = 1 / 12  # of a value rounded to a whole number, in squared steps
# Of fp8, in squared values: of m 2^e with m from 1 to 2 a step is 2^(e - 3), and 1 / m^2 is 1/2 in the mean.
FP8_VARIANCE = ROUNDING_VARIANCE * 2.0**-6 / 2


def rounding_sensitivity(
    model: nn.Module, statistics: Mapping[str, InputStatistics], *, dtype: str = "int8"
) -> dict[str, float]:
    """The relative error of every Linear's outputs, ||y_rounded - y|| / ||y|| over the rows met, without bias.

    The weights' part is exact, sqrt(E G E^T) with E the rounding errors and G the Gram matrix; the weights are rounded
    by the module's `weight_scale`, or by their largest magnitudes. The inputs' part takes the rounding error of each
    value for independent and evenly spread over a step of its row, which for fp8 grows with the value.

    Args:
        statistics: of their inputs by the names of Linears, from `collect_inputs` with gram=True.
        dtype: int8 or fp8.

    Returns:
        name -> error, in the order of statistics; 0 where all outputs are 0.

    Raises:
        ValueError: a name is no Linear of the model, or its statistics have no rows, no Gram matrix, something that is
            not finite, or are those of inputs before smoothing.
    """
    require(isinstance(dtype, str) and dtype in GRIDS, "dtype", " or ".join(GRIDS), repr(dtype))
    found = require_linears("statistics", statistics, ModuleTree(model))
    return {name: _error(name, module, statistics, dtype) for name, module in found.items()}


def select_rounded(errors: Mapping[str, float], *, keep_float: float = 0.0, max_error: float = math.inf) -> list[str]:
    """The Linears that go to int8 or fp8: all but those that it harms most.

    Args:
        errors: of `rounding_sensitivity`.
        keep_float: share of the Linears that stay as they are, rounded down; those of the largest errors.
        max_error: the largest error of a Linear that goes.

    Returns:
        names in the order of errors.

    Raises:
        ValueError: an argument breaks a rule, or an error is NaN.
    """
    share = isinstance(keep_float, int | float) and 0 <= keep_float <= 1
    require(share, "keep_float", "a number in [0, 1]", keep_float)
    require(isinstance(max_error, int | float) and max_error >= 0, "max_error", "a number of at least 0", max_error)
    wrong = next((name for name, error in errors.items() if math.isnan(error)), None)
    require(wrong is None, "errors", "numbers", f"NaN for {wrong!r}")
    worst = sorted(errors, key=lambda name: errors[name], reverse=True)[: int(keep_float * len(errors))]
    return [name for name, error in errors.items() if name not in worst and error <= max_error]


def _error(name: str, module: nn.Linear, statistics: Mapping[str, InputStatistics], dtype: str) -> float:
    grid = GRIDS[dtype]
    known = known_inputs(name, statistics, gram=True)
    gram, rows = cast(Tensor, known.gram), known.row_amax_squares
    if rows is None:
        raise ValueError(f"statistics must be of the inputs as they are, got those before smoothing for {name!r}")
    weight = module.weight.detach()
    size = weight.shape[1]
    shape_fits = gram.shape == (size, size)
    require(shape_fits, f"gram of {name!r}", f"of shape {(size, size)}", gram)
    if not (gram.isfinite().all() and weight.isfinite().all()):
        raise ValueError(f"gram and weight must be finite, got a NaN or an infinity for {name!r}")
    dense = weight.double()
    scale = getattr(module, SCALE, None)
    step = (row_scale(weight, grid) if scale is None else scale)[:, None]
    on_grid = nearest(weight, step, grid).double() * step.double()
    lost = dense - on_grid
    by_weights = ((lost @ gram) * lost).sum()
    if grid is INT8:
        by_inputs = ROUNDING_VARIANCE * rows / INT8.largest**2 * on_grid.square().sum()
    else:
        by_inputs = FP8_VARIANCE * (gram.diagonal() * on_grid.square().sum(0)).sum()
    outputs = ((dense @ gram) * dense).sum().item()
    return math.sqrt((by_weights + by_inputs).clamp_min(0).item() / outputs) if outputs > 0 else 0.0
