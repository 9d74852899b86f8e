# SPDX-License-Identifier: Apache-2.0
"""What the Linears of a model meet on given batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from madtp.handles import handle_of
from madtp.hwp import InputStatistics, collect_inputs
from madtp.inference import evaluating


def input_statistics(
    model: nn.Module,
    modules: Iterable[str],
    batches: Iterable[Mapping[str, Tensor]],
    *,
    gram: bool = False,
    token_weighted: bool = False,
) -> dict[str, InputStatistics]:
    """The statistics of `madtp.hwp.collect_inputs`, by Linear, of forwards in eval mode and without gradients.

    Args:
        model: patched; it runs at the temperatures it has.
        modules: names of Linears.
        batches: keyword arguments of forwards, where the model is.
        gram, token_weighted: of `collect_inputs`.
    """
    with (
        evaluating(model),
        handle_of(model).inference(),
        collect_inputs(model, modules, gram=gram, token_weighted=token_weighted) as statistics,
    ):
        for batch in batches:
            model(**batch)
    return statistics


def require_reached(statistics: Mapping[str, InputStatistics]) -> None:
    """Raises ValueError for a Linear of which the calibration data say nothing."""
    for name, met in statistics.items():
        if not met.weight_sum > 0:
            raise ValueError(
                f"calibration_data must reach all Linears that are changed by what they meet, got no input of "
                f"{name!r}: sparse_exclude leaves it out"
            )
