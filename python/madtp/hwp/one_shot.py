# SPDX-License-Identifier: Apache-2.0
"""N:M masks, and weights in int8 or fp8, in one shot, without training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from madtp.choices import WEIGHT_DTYPES
from madtp.hwp.admm import reconstruct_admm, reconstruct_admm_rounded
from madtp.hwp.calibration import InputStatistics, known_inputs
from madtp.hwp.modules import linears, write_parameters
from madtp.hwp.rounding import reconstruct_rounded, round_weight
from madtp.hwp.scores import activation_score, norms_of, reconstruct
from madtp.hwp.weight_grid import GridWeight, grid_unsupported_reason, set_scale
from madtp_kernels import Pattern, explain_pattern, nm_mask
from madtp_kernels.checks import require
from madtp_kernels.nm_patterns import PatternReport


class Solver(NamedTuple):
    """What prunes a weight, and what rounds it too, so that the outputs stay close; see `reconstruct` for both."""

    prune: Callable[..., Tensor]
    round: Callable[..., GridWeight]


SOLVERS = {
    "second_order": Solver(reconstruct, reconstruct_rounded),
    "admm": Solver(reconstruct_admm, reconstruct_admm_rounded),
}


class OneShotReport(NamedTuple):
    """hardware: where the pattern runs. magnitude_kept: by module, sum |w| over weights that are not 0 / over all."""

    hardware: PatternReport
    magnitude_kept: dict[str, float]


def prune_one_shot(
    model: nn.Module,
    pattern: Pattern | str | None,
    modules: Iterable[str],
    statistics: Mapping[str, InputStatistics] | None = None,
    *,
    correct: bool | str = False,
    damping: float = 0.01,
    weight_dtype: str | None = None,
) -> OneShotReport:
    """Zeroes the weights of Linear modules that `pattern` has no room for, in place, and rounds the others if asked to.

    Args:
        pattern: None keeps all, which needs a weight_dtype.
        modules: names of Linear modules, such as `select_modules(...).selected`.
        statistics: of their inputs, from `collect_inputs`: the largest |W| ||x|| stay, token-weighted if those are.
            None keeps the largest |W|.
        correct: choose, correct and round weights so that the outputs stay close; statistics must hold Gram matrices.
            "second_order", or True, goes from left to right (`reconstruct`, `reconstruct_rounded`); "admm" looks at all
            columns together (`reconstruct_admm`, `reconstruct_admm_rounded`), and is better and slower. Both have the
            `damping`.
        weight_dtype: "int8" or "fp8": the weights become numbers of it times a scale for every row, which each module
            has from here on as its buffer `weight_scale` (float32 (N,), no part of the state dict). Rounding
            weight / weight_scale gives the numbers, as `pack` does it. Cast the model before, not after: that would
            round the scales too. None: they stay as they are, and a weight_scale of before goes.

    Raises:
        ValueError: a module does not exist, does not fit the pattern, shares its weight, its statistics lack something,
            or its weight cannot be rounded. Weights are written when all is known to be well.
    """
    rounds = weight_dtype is None or weight_dtype in WEIGHT_DTYPES
    require(rounds, "weight_dtype", f"None or {' or '.join(WEIGHT_DTYPES)}", repr(weight_dtype))
    require(pattern is not None or weight_dtype is not None, "pattern", "n:m where weights keep their dtype", pattern)
    pattern = Pattern(1, 1) if pattern is None else Pattern.parse(pattern)
    by = "second_order" if correct is True else correct or None
    require(by is None or by in SOLVERS, "correct", f"a bool or {' or '.join(SOLVERS)}", repr(correct))
    found = linears(model, modules, pattern)
    solver = None if by is None else SOLVERS[by]
    if solver is not None and statistics is None:
        raise ValueError("statistics must be given to correct weights, got None")
    weights: dict[str, tuple[Tensor, Tensor | None]] = {}  # and the scale
    for name, module in found.items():
        known = None if statistics is None else _known(name, statistics, gram=solver is not None)
        score = None
        if known is not None and solver is None:
            score = activation_score(module.weight, norms_of(name, module, {name: known.norms}))
        solve: Any = None
        if solver is not None and known is not None:
            solve = partial(solver.prune if weight_dtype is None else solver.round, gram=known.gram, damping=damping)
        if weight_dtype is None:
            weights[name] = _pruned(module.weight.detach(), pattern, score, solve), None
        else:
            weights[name] = _rounded(name, module, pattern, score, solve, weight_dtype)
    kept = {}
    for name, (weight, _) in weights.items():
        before = found[name].weight.detach().abs().double()
        kept[name] = (before * (weight != 0)).sum().item() / max(before.sum().item(), 1e-300)
    write_parameters({found[name].weight: weight for name, (weight, _) in weights.items()})
    for name, (_, scale) in weights.items():
        set_scale(found[name], scale)
    return OneShotReport(explain_pattern(pattern), kept)


def _known(name: str, statistics: Mapping[str, InputStatistics], *, gram: bool) -> InputStatistics:
    """`known_inputs`, whose Gram matrix is finite where it is asked for."""
    known = known_inputs(name, statistics, gram=gram)
    if gram and not known.gram.isfinite().all():  # type: ignore[union-attr]  # None was refused
        raise ValueError(f"gram must be finite, got a NaN or an infinity for {name!r}")
    return known


def _pruned(weight: Tensor, pattern: Pattern, score: Tensor | None, solve: Callable[..., Tensor] | None) -> Tensor:
    if solve is not None:
        return solve(weight, n=pattern.n, m=pattern.m)
    return weight.masked_fill(~nm_mask(weight, *pattern, score=score), 0.0)


def _rounded(
    name: str,
    module: nn.Linear,
    pattern: Pattern,
    score: Tensor | None,
    solve: Callable[..., GridWeight] | None,
    dtype: str,
) -> tuple[Tensor, Tensor]:
    """The weight on its grid, and the scale."""
    if (reason := grid_unsupported_reason(module)) is not None:
        raise ValueError(f"modules must have weights that can be rounded, got {name!r}: {reason}")
    weight = module.weight.detach()
    if solve is None:
        grid = round_weight(weight, pattern, score=score, dtype=dtype)
    else:
        grid = solve(weight, pattern=pattern, dtype=dtype)
    try:
        return grid.to_dense(weight.dtype), grid.scale
    except ValueError as error:
        raise ValueError(f"modules must hold {dtype} weights in their dtype, got {name!r}: {error}") from error
