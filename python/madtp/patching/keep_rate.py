# SPDX-License-Identifier: Apache-2.0
"""Pruning without training: the temperatures at which each branch keeps a given share of its tokens."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from madtp.config import CompressionConfig
from madtp.dtp.ragged import RaggedBatch
from madtp.dtp.scalars import is_number
from madtp.inference import evaluating
from madtp.search import find_root

if TYPE_CHECKING:
    from madtp.patching.handle import Handle
    from madtp.patching.vlm_handle import VlmHandle

TOLERANCE = 0.005  # of a share that was asked for
ROUNDS = 20  # passes over the calibration inputs, at most, for a branch


def check_rates(keep_rate: float | Mapping[str, float], branches: Iterable[str]) -> dict[str, float]:
    """The rate of each branch that was given one. Raises ValueError for an unknown branch or a rate not in (0, 1]."""
    branches = _branches(branches, "keep_rate", keep_rate)
    rates = dict(keep_rate) if isinstance(keep_rate, Mapping) else dict.fromkeys(branches, keep_rate)
    if not rates or not set(rates) <= set(branches):
        raise ValueError(f"keep_rate must be for branches {', '.join(branches)}, got {keep_rate!r}")
    for rate in rates.values():
        if not (is_number(rate) and 0 < rate <= 1):
            raise ValueError(f"keep_rate must be a number in (0, 1], or one for each branch, got {keep_rate!r}")
    return {name: float(rate) for name, rate in rates.items()}


def check_temperatures(temperature: float | Mapping[str, float], branches: Iterable[str]) -> dict[str, float]:
    """By branch. Raises ValueError for an unknown branch or a number that is none >= 0."""
    if isinstance(temperature, Mapping) and not temperature:
        return {}
    branches = _branches(branches, "temperature", temperature)
    by_branch = temperature if isinstance(temperature, Mapping) else dict.fromkeys(branches, temperature)
    for name, value in by_branch.items():
        if name not in branches:
            raise ValueError(f"temperature must be for branches {', '.join(branches)}, got {name!r}")
        if not (is_number(value) and value >= 0):
            raise ValueError(f"temperature must be a finite number >= 0, got {value!r} for {name}")
    return {name: float(value) for name, value in by_branch.items()}


def _branches(branches: Iterable[str], argument: str, given: Any) -> list[str]:
    """The names of branches. Raises ValueError where there are none, which is of decoders alone."""
    if not (names := list(branches)):
        raise ValueError(
            f"{argument} must be of a model patched with a temperature at a seam, such as madtp.Keep(temperature=1.0), "
            f"got {given!r} and no seam with one"
        )
    return names


def check_calibration(calibration: Iterable[Mapping[str, Any]] | None) -> list[Mapping[str, Any]]:
    """Raises ValueError unless it is a few batches of model inputs."""
    rule = "calibration must be an iterable of dicts of model inputs, at least one, for keep_rate"
    if calibration is None or isinstance(calibration, Mapping) or not isinstance(calibration, Iterable):
        raise ValueError(f"{rule}, got {type(calibration).__name__}")
    batches = list(calibration)
    wrong = next((batch for batch in batches if not isinstance(batch, Mapping)), None)
    if not batches or wrong is not None:
        raise ValueError(f"{rule}, got {'none' if not batches else f'one with a {type(wrong).__name__}'}")
    return batches


def kept_shares(handle: Handle, batches: Sequence[Mapping[str, Any]], only: str | None = None) -> dict[str, float]:
    """Of each branch of a tower, the share of its tokens that are left after a block, averaged over its blocks.

    Of all samples together; neither summary tokens nor merged ones count. What the blocks cost falls with it, where the
    share after the last block alone says little of that. In eval mode, without gradients.

    Args:
        only: a branch whose tower is run, and nothing else; the batches are its inputs.
    """
    model = handle.model if only is None else handle.tower(only)
    branches = {name: branch for name, branch in handle.pruning.items() if only in (None, name)}
    entered: Counter[str] = Counter()
    left: defaultdict[str, float] = defaultdict(float)
    with evaluating(handle.model), handle.inference():
        for batch in batches:
            for branch in branches.values():
                branch.forget()
            model(**batch)
            for name, branch in branches.items():
                record = branch.last
                if record.entered is not None:
                    summary_tokens = _count_summary_tokens(record.entered)
                    entered[name] += record.entered.count_rows() - summary_tokens
                    kept = [sum(part.numel() for part in layer.kept_positions()) for layer in record.layers]
                    left[name] += sum(kept) / len(kept) - summary_tokens
    for name in branches:
        if not entered[name]:
            raise ValueError(f"calibration must have tokens to prune in branch {name}, got none")
    return {name: left[name] / entered[name] for name in branches}


def find_temperatures(
    handle: Handle | VlmHandle,
    rates: Mapping[str, float],
    shares: Callable[[], Mapping[str, float]],
    config: CompressionConfig,
) -> Mapping[str, float]:
    """Sets the temperature of each branch of `rates` so that its share is this, one branch after the other.

    A branch may read what is left of one before it, so they go in the order of the handle. Where the share jumps over
    the rate, which it does in few and short sequences, the nearest seen is taken.

    Args:
        shares: what each branch keeps at the temperatures that are set.
        config: where the search begins, and between which temperatures it goes.

    Returns:
        the shares that are kept now.

    Raises:
        ValueError: a rate is out of reach of the temperatures of the config; the message says what is not. The
            temperatures are what they were.
    """
    before = handle.temperatures
    start = math.log(config.temperature)
    low, high = (math.log(tau) - start for tau in (config.temperature_min, config.temperature_max))

    def share(branch: str, shift: float) -> float:
        handle.set_temperature({branch: math.exp(start + shift)})
        return shares()[branch]

    try:
        for branch in before:
            rate = rates.get(branch)
            if rate == 1:
                handle.set_temperature({branch: 0.0})
            elif rate is not None:
                miss = lambda shift, branch=branch, rate=rate: share(branch, shift) - rate  # noqa: E731
                shift, missed = find_root(miss, low, high, tolerance=TOLERANCE, rounds=ROUNDS)
                if abs(missed) > TOLERANCE:
                    least, most = sorted(share(branch, bound) for bound in (low, high))
                    if not least - TOLERANCE <= rate <= most + TOLERANCE:
                        handle.set_temperature({branch: 0.0})
                        whole = "1 or " if shares()[branch] == 1 else ""
                        raise ValueError(
                            f"keep_rate of {branch} must be {whole}from {least:.3f} to {most:.3f}, what temperatures "
                            f"from {config.temperature_min:g} to {config.temperature_max:g} keep of the calibration "
                            f"inputs, got {rate}"
                        )
                handle.set_temperature({branch: math.exp(start + shift)})
        found = shares()
        for branch, rate in rates.items():
            if rate == 1 and found[branch] < 1:
                raise ValueError(
                    f"keep_rate of {branch} must be below 1 where amounts or duplicates leave {found[branch]:.3f} at "
                    f"temperature 0, got {rate:g}"
                )
        return found
    except BaseException:
        handle.set_temperature(before)
        raise


def _count_summary_tokens(batch: RaggedBatch) -> int:
    """Over all sequences of a batch."""
    lengths, index = batch.cu_seqlens.diff(), batch.summary_index
    return int(((lengths > 0) if index is None else (lengths > 0) & (index >= 0)).sum())
