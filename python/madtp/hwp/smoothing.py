# SPDX-License-Identifier: Apache-2.0
"""Smoothing: what makes a few channels between a LayerNorm and its Linears large moves from the inputs to the weights.

A row of inputs is rounded by its largest magnitude, so one large channel leaves few steps to the others. Source:
SmoothQuant (Xiao et al., ICML 2023, arXiv 2211.10438).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from madtp.hooks import is_watched
from madtp.hwp.calibration import InputStatistics
from madtp.hwp.modules import ModuleTree, shared_reason, write_parameters, write_unsupported_reason
from madtp.hwp.weight_grid import SCALE
from madtp_kernels.checks import require

MIN_AMAX = 1e-5  # of a channel or a column, below which it is left as it is


class NormReaders(NamedTuple):
    """A LayerNorm and the Linears that read what it returns, which nothing else does; by name."""

    norm: str
    readers: tuple[str, ...]


class Smoothing(NamedTuple):
    """Of the inputs of a norm's readers.

    divisor: (C,) float32, what every channel was divided by; None where they were left, and reason says why.
    outliers_before, outliers_after: the largest magnitude of any channel over the median of them.
    """

    readers: tuple[str, ...]
    divisor: Tensor | None
    outliers_before: float
    outliers_after: float
    reason: str | None = None


def smooth(
    model: nn.Module,
    pairs: Iterable[NormReaders],
    statistics: Mapping[str, InputStatistics],
    *,
    alpha: float = 0.5,
    min_outliers: float = 6.0,
) -> dict[str, Smoothing]:
    """Divides what LayerNorms return, channel by channel, and multiplies the weights that read it; in place.

    Channel j is divided by amax(x_j)^alpha / amax(W_:j)^(1 - alpha), rounded to a power of two: the model computes the
    same, to the bit where nothing leaves the range of its dtype.

    Args:
        pairs: such as `madtp.models.norm_readers(model)`.
        statistics: of the inputs of the readers, from `collect_inputs`, of at least one reader of every pair. Those of
            what was smoothed become those of the inputs from here on, but for `rounding_sensitivity`: collect anew.
        alpha: 0 leaves the work to the inputs, 1 to the weights.
        min_outliers: pairs are left alone whose largest channel is below this many times the median one.

    Returns:
        by the name of the norm what was done, or why it was not: hooks, shared or computed parameters, packed layers.

    Raises:
        ValueError: a name is none of the model, the statistics have nothing of a pair or something that is not finite,
            or another argument breaks a rule. Parameters are written when all is known to be well.
    """
    require(isinstance(alpha, int | float) and 0 <= alpha <= 1, "alpha", "a number in [0, 1]", alpha)
    number = isinstance(min_outliers, int | float) and min_outliers >= 1
    require(number, "min_outliers", "a number of at least 1", min_outliers)
    pairs, tree = list(pairs), ModuleTree(model)
    _check_names(pairs, tree)
    found, values = dict[str, Smoothing](), dict[Tensor, Tensor]()
    for pair in pairs:
        amax = _amax(pair, statistics)
        smoothing, changed = _smoothed(pair, amax, tree, alpha, min_outliers)
        found[pair.norm] = smoothing
        values |= changed
    write_parameters(values)
    for smoothing in found.values():
        if smoothing.divisor is not None:
            for name in smoothing.readers:
                if name in statistics:
                    statistics[name].divide_channels(smoothing.divisor)
    return found


def _check_names(pairs: Iterable[NormReaders], tree: ModuleTree) -> None:
    seen = set[str]()
    for pair in pairs:
        for name in (pair.norm, *pair.readers):
            require(name in tree, "pairs", "of modules of the model", repr(name))
            require(name not in seen, "pairs", "of other modules each", f"{name!r} again")
            seen.add(name)


def _amax(pair: NormReaders, statistics: Mapping[str, InputStatistics]) -> Tensor:
    """(C,) float32: the largest magnitude of every channel that the readers meet."""
    met = [statistics[name].amax for name in pair.readers if name in statistics]
    known = [amax for amax in met if amax is not None]
    if not known:
        raise ValueError(f"statistics must hold inputs of every pair, got none of {pair.norm!r}")
    amax = torch.stack(known).amax(0)
    finite = bool(amax.isfinite().all())
    require(finite, "statistics", "finite", f"a NaN or an infinity behind {pair.norm!r}")
    return amax


def _smoothed(
    pair: NormReaders, amax: Tensor, tree: ModuleTree, alpha: float, min_outliers: float
) -> tuple[Smoothing, dict[Tensor, Tensor]]:
    """What is to be done, and what the parameters become."""
    before = _outliers(amax)
    reason = _unsupported_reason(pair, tree)
    if reason is None and before < min_outliers:
        reason = f"the largest channel is {before:.3g} times the median one, below {min_outliers:g}"
    if reason is not None:
        return Smoothing(pair.readers, None, before, before, reason), {}
    weights = [cast(nn.Linear, tree[name]).weight for name in pair.readers]
    columns = torch.stack([weight.detach().abs().amax(0).float() for weight in weights]).amax(0)
    divisor = _divisor(amax, columns, alpha)
    if (divisor == 1).all():
        return Smoothing(pair.readers, None, before, before, "all divisors are 1"), {}
    changed: dict[Tensor, Tensor] = {p: p.detach() / divisor.to(p) for p in tree[pair.norm].parameters()}
    changed |= {weight: weight.detach() * divisor.to(weight) for weight in weights}
    if not all(bool(value.isfinite().all()) for value in changed.values()):
        return Smoothing(pair.readers, None, before, before, "a parameter would leave the range of its dtype"), {}
    return Smoothing(pair.readers, divisor, before, _outliers(amax / divisor)), changed


def _divisor(amax: Tensor, columns: Tensor, alpha: float) -> Tensor:
    """(C,) float32, powers of two: 1 where there is nothing to divide, or nothing that reads it."""
    power = alpha * amax.log2() - (1 - alpha) * columns.log2()
    return torch.where((amax >= MIN_AMAX) & (columns >= MIN_AMAX), power.round().exp2(), 1.0)


def _outliers(amax: Tensor) -> float:
    """The largest over the median of those that are there; 1 where none is."""
    there = amax[amax >= MIN_AMAX]
    return (there.max() / there.median()).item() if len(there) else 1.0


def _unsupported_reason(pair: NormReaders, tree: ModuleTree) -> str | None:
    """Why the norm cannot be divided and its readers be multiplied."""
    norm = tree[pair.norm]
    if type(norm) is not nn.LayerNorm:
        return f"{pair.norm} is a {type(norm).__name__}"
    if norm.weight is None:
        return f"{pair.norm} has no weight"
    for name in (pair.norm, *pair.readers):
        module = tree[name]
        if module is not norm and type(module) is not nn.Linear:
            return f"{name} is a {type(module).__name__}"
        if len(tree.places(module)) > 1:
            return f"{name} has several places"
        if is_watched(module):
            return f"{name} has hooks, which may read it"
        if SCALE in module._buffers:
            return f"{name} has a weight that is rounded already"
        for parameter in ("weight", "bias") if module is norm else ("weight",):
            reason = write_unsupported_reason(module, parameter) or shared_reason(module, parameter, tree)
            if reason is not None:
                return f"{name}: {reason}"
    return None
