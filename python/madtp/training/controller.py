# SPDX-License-Identifier: Apache-2.0
"""Moves the temperature of every branch until the multiply-adds it observes are the ones asked for.

Source: docs/method.md, cooperative optimisation, step 5.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping

from madtp.profiling.macs import Profile
from madtp_kernels.renamed import renamed

GAIN_RANGE = (1 / 8, 4.0)  # how far damping may take a gain from the one asked for
SETTLE_ROUNDS, SETTLE_TOLERANCE = 30, 0.02  # of the MACs of a branch
GROW, SHRINK = 1.2, 0.5  # of a gain, while the error keeps its sign and when it changes


class TemperatureController:
    """One log tau per branch, under integral control on log(observed / target).

    How steeply MACs fall with tau differs by branch and drifts as the model learns. So each branch has a gain of its
    own: halved when the error changes sign, a little larger when it does not (Kesten 1958), never so small that drift
    is not followed.

    A branch that sits at a bound and cannot reach its target leaves a gap in the total; the other branches share it in
    proportion to their targets.

    Args:
        targets: counted MACs per sample of each branch, such as `branch_targets` gives; {} where none is pruned.
        temperature: where tau starts, for all branches or by branch.
        gain: log tau per unit of log error.
        bounds: (lowest, highest) tau.
        max_step: largest change of log tau in one update.
    """

    def __init__(
        self,
        targets: Mapping[str, float],
        *,
        temperature: float | Mapping[str, float] = 1.0,
        gain: float = 1.0,
        bounds: tuple[float, float] = (1e-4, 1000.0),
        max_step: float = 0.7,
    ):
        if not all(_positive(target) for target in targets.values()):
            raise ValueError(f"targets must be positive MACs by branch, got {dict(targets)}")
        if not (_positive(bounds[0]) and _positive(bounds[1]) and bounds[0] < bounds[1]):
            raise ValueError(f"bounds must be 0 < lowest < highest, got {bounds}")
        if not (_positive(gain) and _positive(max_step)):
            raise ValueError(f"gain and max_step must be positive, got {gain} and {max_step}")
        start = temperature if isinstance(temperature, Mapping) else dict.fromkeys(targets, temperature)
        if set(start) != set(targets) or not all(_positive(tau) for tau in start.values()):
            raise ValueError(f"temperature must be positive for each of {list(targets)}, got {temperature}")
        self.targets = dict(targets)
        self.gain, self.max_step = gain, max_step
        self.low, self.high = math.log(bounds[0]), math.log(bounds[1])
        self._log_tau = {branch: self._clamp(math.log(start[branch])) for branch in targets}
        self._gain = dict.fromkeys(targets, gain)
        self._error = dict.fromkeys(targets, 0.0)
        self._last_step = dict.fromkeys(targets, 0.0)

    @property
    def temperatures(self) -> dict[str, float]:
        return {branch: math.exp(log_tau) for branch, log_tau in self._log_tau.items()}

    @property
    def shifts(self) -> tuple[float, float]:
        """The range of `shifted` beyond which nothing changes any more."""
        taus = self._log_tau.values()
        return self.low - max(taus, default=self.low), self.high - min(taus, default=self.high)

    def shifted(self, shift: float) -> dict[str, float]:
        """The temperatures, every log tau moved by `shift` and kept in bounds."""
        return {branch: math.exp(self._clamp(log_tau + shift)) for branch, log_tau in self._log_tau.items()}

    def update(self, observed: Mapping[str, float]) -> dict[str, float]:
        """Counted MACs per sample of each branch, at the present temperatures -> the temperatures to use next."""
        if set(observed) != set(self.targets) or not all(_positive(macs) for macs in observed.values()):
            raise ValueError(f"observed must be positive MACs for each of {list(self.targets)}, got {dict(observed)}")
        for branch, target in self._effective_targets(observed).items():
            error = math.log(observed[branch] / target)
            agreement = error * self._error[branch]
            if agreement:
                gain = self._gain[branch] * (GROW if agreement > 0 else SHRINK)
                self._gain[branch] = min(max(gain, GAIN_RANGE[0] * self.gain), GAIN_RANGE[1] * self.gain)
            step = min(max(self._gain[branch] * error, -self.max_step), self.max_step)
            before = self._log_tau[branch]
            self._log_tau[branch] = self._clamp(before + step)
            self._last_step[branch] = self._log_tau[branch] - before
            self._error[branch] = error
        return self.temperatures

    def halve_step(self) -> dict[str, float]:
        """Takes back half of what is left of the last update -> the temperatures to use next."""
        for branch, step in self._last_step.items():
            self._last_step[branch] = step / 2
            self._log_tau[branch] -= step / 2
        return self.temperatures

    def state_dict(self) -> dict[str, dict[str, float]]:
        """Plain numbers, ready for JSON; the targets are part of it."""
        return {
            "targets": dict(self.targets),
            "log_temperature": dict(self._log_tau),
            "gain": dict(self._gain),
            "error": dict(self._error),
        }

    def load_state_dict(self, state: Mapping[str, Mapping[str, float]]) -> None:
        names = ("targets", "log_temperature", "gain", "error")
        if set(state) != set(names) or any(set(state[name]) != set(self.targets) for name in names):
            raise ValueError(f"state must hold {', '.join(names)} for each of {list(self.targets)}, got {dict(state)}")
        self.targets, self._log_tau, self._gain, self._error = (dict(state[name]) for name in names)

    def _effective_targets(self, observed: Mapping[str, float]) -> dict[str, float]:
        stuck = {branch for branch, target in self.targets.items() if self._is_stuck(branch, observed[branch] / target)}
        free = sum(target for branch, target in self.targets.items() if branch not in stuck)
        rest = sum(self.targets.values()) - sum(observed[branch] for branch in stuck)
        # With nothing left to share, every branch still goes as far as it can.
        share = max(rest, 1e-3 * free) / free if free else 1.0
        return {branch: target * (1.0 if branch in stuck else share) for branch, target in self.targets.items()}

    def _is_stuck(self, branch: str, ratio: float) -> bool:
        log_tau = self._log_tau[branch]
        return (log_tau >= self.high and ratio > 1) or (log_tau <= self.low and ratio < 1)

    def _clamp(self, log_tau: float) -> float:
        return min(max(log_tau, self.low), self.high)


def settle(
    controller: TemperatureController,
    observe: Callable[[], Mapping[str, float]],
    apply: Callable[[Mapping[str, float]], object],
) -> None:
    """Moves the temperatures until every branch costs about its target, or all are at their bounds.

    Args:
        observe: counted MACs per sample of each branch, with the temperatures that were applied.
        apply: sets temperatures; those of the controller are set.
    """
    for _ in range(SETTLE_ROUNDS):
        seen, before = observe(), controller.temperatures
        if all(abs(seen[branch] / target - 1) <= SETTLE_TOLERANCE for branch, target in controller.targets.items()):
            break
        apply(controller.update(seen))
        if controller.temperatures == before:  # all at their bounds
            break


@renamed(flops_reduction="macs_reduction")
def branch_targets(profile: Profile, macs_reduction: float, prunable: Collection[str]) -> dict[str, float]:
    """Counted MACs per sample each prunable branch may spend so that the whole model meets the target.

    The budget is (1 - macs_reduction) of the dense MACs. What the fixed branches count comes off first; the prunable
    ones scale what they count now (with 2:4 linears at half) by one factor, at most 1.

    Args:
        profile: of the model with all its tokens; before weights are pruned, `profile(..., planned_sparse=names)`.
        prunable: branches of the profile with a temperature.

    Raises:
        ValueError: a branch does not exist, or the fixed branches alone exceed the budget.
    """
    missing = [branch for branch in prunable if branch not in profile.branches]
    if missing or not prunable:
        raise ValueError(f"prunable must name branches of {list(profile.branches)}, got {list(prunable)}")
    if not 0 <= macs_reduction < 1:
        raise ValueError(f"macs_reduction must be a number in [0, 1), got {macs_reduction}")
    budget = (1 - macs_reduction) * profile.total.dense_macs
    counted = {branch: profile.branches[branch].counted_macs for branch in prunable}
    fixed = profile.total.counted_macs - sum(counted.values())
    if budget <= fixed:
        reachable = 1 - fixed / profile.total.dense_macs
        raise ValueError(
            f"macs_reduction must be below {reachable:.3f}, the share the fixed parts leave "
            f"({fixed:.4g} of {profile.total.dense_macs:.4g} MACs), got {macs_reduction}"
        )
    factor = min((budget - fixed) / sum(counted.values()), 1.0)
    return {branch: factor * macs for branch, macs in counted.items()}


def _positive(value: float) -> bool:
    return 0 < value < math.inf
