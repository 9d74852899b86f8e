# SPDX-License-Identifier: Apache-2.0
"""N:M masks in one shot, without training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import nn

from madtp.hwp.calibration import InputStatistics
from madtp.hwp.modules import linears, write_parameters
from madtp.hwp.scores import activation_score, norms_of, reconstruct
from madtp_kernels import Pattern, explain_pattern, nm_mask
from madtp_kernels.nm_patterns import PatternReport


class OneShotReport(NamedTuple):
    """hardware: where the pattern runs. magnitude_kept: by module, sum |w| over kept weights / over all."""

    hardware: PatternReport
    magnitude_kept: dict[str, float]


def prune_one_shot(
    model: nn.Module,
    pattern: Pattern | str,
    modules: Iterable[str],
    statistics: Mapping[str, InputStatistics] | None = None,
    *,
    correct: bool = False,
    damping: float = 0.01,
) -> OneShotReport:
    """Zeroes the weights of Linear modules that `pattern` has no room for, in place.

    Args:
        modules: names of Linear modules, such as `select_modules(...).selected`.
        statistics: of their inputs, from `collect_inputs`: the largest |W| ||x|| stay, token-weighted if those are.
            None keeps the largest |W|.
        correct: choose and correct weights by `reconstruct`, with its `damping`; statistics must hold Gram matrices.

    Raises:
        ValueError: a module does not exist, does not fit the pattern, shares its weight, or its statistics lack
            something. Weights are written when all is known to be well.
    """
    pattern = Pattern.parse(pattern)
    found = linears(model, modules, pattern)
    if correct and statistics is None:
        raise ValueError("statistics must be given to correct weights, got None")
    pruned = {}
    for name, module in found.items():
        weight = module.weight.detach()
        if statistics is not None and (name not in statistics or not statistics[name].weight_sum > 0):
            raise ValueError(f"statistics must hold inputs of every module, got none of {name!r}")
        if correct and statistics is not None:
            gram = statistics[name].gram
            if gram is None:
                raise ValueError(f"gram must be finite, got None for {name!r}: collect inputs with gram=True")
            pruned[name] = reconstruct(weight, gram, *pattern, damping=damping)
            continue
        score = None
        if statistics is not None:
            score = activation_score(weight, norms_of(name, module, {name: statistics[name].norms}))
        pruned[name] = weight.masked_fill(~nm_mask(weight, *pattern, score=score), 0.0)
    kept = {}
    for name, weight in pruned.items():
        before = found[name].weight.detach().abs().double()
        kept[name] = (before * (weight != 0)).sum().item() / max(before.sum().item(), 1e-300)
    write_parameters({found[name].weight: weight for name, weight in pruned.items()})
    return OneShotReport(explain_pattern(pattern), kept)
