"""Budgets before pruning: which Linears go N:M, and how many of its tokens each branch may spend.

Source: docs/method.md, cooperative optimisation, step 3.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from torch import nn
from torch.utils.data import Dataset

from madtp.compression import TIMING_BATCH, pairs
from madtp.config import CompressionConfig
from madtp.files import write_whole
from madtp.latency import Times, measure_times
from madtp.patching import patch
from madtp.sensitivity import Calibration, Sensitivities, TokenPoint, measure_sensitivities
from madtp.tasks.task import Task

ALLOCATIONS = ("joint", "uniform", "tokens", "weights")
CALIBRATION_SAMPLES = 64
REDUCTIONS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
TOKEN_STEP = 0.01  # of a branch's share, in which the tokens are given away


@dataclass(frozen=True)
class Plan:
    """What a compression run aims at; readable and editable as YAML.

    Args:
        flops_reduction: share of the dense MACs to save, counted; with a latency_reduction, what that comes to.
        tokens: for each branch that can prune, the share of its MACs that its tokens may spend: 1 keeps all tokens, and
            the branch is not pruned. What it counts in the end is this share of what it counts with all tokens and
            with its 2:4 Linears at half.
        sparse_modules: names of the Linears that go N:M.
        allocation: how it was chosen.
        latency_reduction: share of the dense model's time to save, on the device that it was chosen on; None: the
            target is flops_reduction.
        predicted: {"params_reduction", "rise"}: share of the parameters that go to zero, and the sum of what each part
            does to the distillation loss by itself. With a latency_reduction also {"dense_ms", "ms"}: time per sample
            of the dense model, as measured, and of what is planned.
        compared: what this plan and the others at the same budget did to the distillation loss on the calibration data
            before any training, by allocation; those that cannot reach the budget are not there.
    """

    flops_reduction: float
    tokens: dict[str, float]
    sparse_modules: tuple[str, ...]
    allocation: str = "joint"
    latency_reduction: float | None = None
    predicted: dict[str, float] = field(default_factory=dict)
    compared: dict[str, float] = field(default_factory=dict)

    def __post_init__(self):
        if not _is_share(self.flops_reduction) or self.flops_reduction == 1:
            raise ValueError(f"flops_reduction must be a number in [0, 1), got {self.flops_reduction!r}")
        if self.latency_reduction is not None and (
            not _is_share(self.latency_reduction) or self.latency_reduction == 1
        ):
            raise ValueError(f"latency_reduction must be a number in [0, 1) or null, got {self.latency_reduction!r}")
        if not isinstance(self.tokens, Mapping) or not all(_is_share(s) and s > 0 for s in self.tokens.values()):
            raise ValueError(f"tokens must give each branch a share in (0, 1], got {self.tokens!r}")
        names = self.sparse_modules
        if not isinstance(names, Sequence) or isinstance(names, str) or not all(isinstance(n, str) for n in names):
            raise ValueError(f"sparse_modules must be a list of module names, got {names!r}")
        if self.allocation not in ALLOCATIONS:
            raise ValueError(f"allocation must be one of {', '.join(ALLOCATIONS)}, got {self.allocation!r}")
        object.__setattr__(self, "sparse_modules", tuple(names))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON and YAML."""
        return asdict(self) | {"sparse_modules": list(self.sparse_modules)}

    def save(self, path: str | PathLike) -> None:
        """Writes YAML, whole or not at all."""
        write_whole(path, yaml.safe_dump(self.to_dict(), sort_keys=False, width=120))

    @classmethod
    def load(cls, path: str | PathLike) -> Plan:
        """Raises ValueError where the file is no plan, naming what is wrong."""
        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(f"plan {path} must be YAML: {' '.join(str(error).split())}") from error
        known = {entry.name for entry in fields(cls)}
        if not isinstance(values, dict) or not {"flops_reduction", "tokens", "sparse_modules"} <= set(values) <= known:
            got = ", ".join(map(str, values)) if isinstance(values, dict) else type(values).__name__
            raise ValueError(f"plan {path} must have the fields {', '.join(sorted(known))}, got {got}")
        try:
            return cls(**values)
        except ValueError as error:
            raise ValueError(f"plan {path}: {error}") from error

    def require_fit(self, branches: Iterable[str], modules: Iterable[str]) -> None:
        """Raises ValueError unless it gives tokens to these branches, prunes something, and names Linears of these."""
        if set(self.tokens) != set(branches):
            raise ValueError(f"plan must give tokens to {', '.join(branches)}, got {', '.join(self.tokens)}")
        if all(share == 1 for share in self.tokens.values()) and not self.sparse_modules:
            raise ValueError(f"plan must give a branch fewer tokens than all or name a Linear, got {self.tokens}")
        unknown = sorted(set(self.sparse_modules) - set(modules))
        if unknown:
            raise ValueError(f"plan must name Linears that may go N:M, got {unknown[0]!r}")


def allocate(
    model: nn.Module,
    task: Task,
    calibration_data: Dataset,
    config: CompressionConfig,
    *,
    allocation: str = "joint",
    progress: Callable[[Sequence], Iterable] = iter,
) -> Plan:
    """Chooses the budgets of a dense model for the targets of a config; nothing is trained, the model stays as it is.

    Every Linear and every branch is pruned by itself on `CALIBRATION_SAMPLES` samples of the data; what costs the
    answers least per MAC saved goes first; with a latency_reduction, per millisecond saved on the model's device
    (`madtp.latency`).

    Args:
        allocation: "joint", tokens and weights as they come; "tokens" or "weights", only those; "uniform", all Linears
            that can, and one share for all branches.
        progress: wraps the list of what is pruned, for a bar.

    Returns:
        the plan, with what the other allocations would do at the same budget.

    Raises:
        ValueError: the targets cannot be reached; the message says what can. The data are empty.
    """
    if allocation not in ALLOCATIONS:
        raise ValueError(f"allocation must be one of {', '.join(ALLOCATIONS)}, got {allocation!r}")
    calibration, sensitivities = _measured(model, task, calibration_data, config, progress)
    plan = choose(sensitivities, config, allocation)
    return replace(plan, compared=_compared(calibration, sensitivities, config))


def pareto(
    model: nn.Module,
    task: Task,
    calibration_data: Dataset,
    config: CompressionConfig,
    *,
    reductions: Sequence[float] = REDUCTIONS,
    progress: Callable[[Sequence], Iterable] = iter,
) -> list[Plan]:
    """The front of cost against harm from one measurement of the sensitivities: a joint plan for each reduction.

    Args:
        reductions: shares of the dense MACs to save, or of its time where the config has a latency_reduction, in
            place of the config's; those that cannot be reached are left out.
        others: as of `allocate`.

    Returns:
        plans from the least reduction on, each with what every allocation would do at its budget (`compared`).

    Raises:
        ValueError: as `allocate`; or no reduction can be reached.
    """
    target = "flops_reduction" if config.latency_reduction is None else "latency_reduction"
    configs = [replace(config, **{target: reduction}) for reduction in sorted(set(reductions))]
    calibration, sensitivities = _measured(model, task, calibration_data, config, progress)
    plans, refusal = [], ValueError("reductions must be numbers in (0, 1), got none")
    for target in configs:
        try:
            plan = choose(sensitivities, target)
        except ValueError as error:
            refusal = error
            continue
        plans.append(replace(plan, compared=_compared(calibration, sensitivities, target)))
    if not plans:
        raise refusal
    return plans


def _measured(model, task, calibration_data, config, progress) -> tuple[Calibration, Sensitivities]:
    if not len(calibration_data):
        raise ValueError("calibration_data must hold samples, got none")
    device, patched = next(model.parameters()).device, copy.deepcopy(model)
    patch(patched, config)
    calibration = Calibration(patched, task, pairs(task, calibration_data, CALIBRATION_SAMPLES, device), config)
    sensitivities = measure_sensitivities(calibration, progress=progress)
    if config.latency_reduction is not None:
        batch = pairs(task, calibration_data, TIMING_BATCH, device)[0]
        sensitivities = replace(sensitivities, times=measure_times(model, patched, sensitivities, batch))
    return calibration, sensitivities


def _compared(calibration: Calibration, sensitivities: Sensitivities, config: CompressionConfig) -> dict[str, float]:
    """Allocation -> what it does at the budget of a config; those that cannot reach it are left out."""
    compared = {}
    for allocation in ALLOCATIONS:
        try:
            plan = choose(sensitivities, config, allocation)
        except ValueError:
            continue
        compared[allocation] = measured_rise(calibration, sensitivities, plan)
    return compared


def choose(sensitivities: Sensitivities, config: CompressionConfig, allocation: str = "joint") -> Plan:
    """The plan of an allocation (see `allocate`) for the targets of a config.

    Raises:
        ValueError: a target cannot be reached.
    """
    macs = ledger = _Ledger(sensitivities)
    goal, target = "flops_reduction", (1 - (config.flops_reduction or 0)) * macs.full
    if config.latency_reduction is not None:
        times = sensitivities.times
        if times is None:
            raise ValueError("sensitivities must hold times with a latency_reduction, got None")
        ledger = _Ledger(sensitivities, times)
        goal, target = "latency_reduction", (1 - config.latency_reduction) * times.dense
    dense = ledger.full if ledger is macs else times.dense
    everything = list(sensitivities.weights)
    sparse = everything if allocation == "uniform" else []
    if config.params_reduction is not None:
        sparse = _enough_parameters(sensitivities, config.params_reduction, allocation)
    shares = dict.fromkeys(sensitivities.tokens, 1.0)
    fewest = shares if allocation == "weights" else {branch: ledger.least(branch) for branch in shares}
    least = ledger.cost(fewest, sparse if allocation == "tokens" else everything)
    if least > target:
        if least >= dense:
            raise ValueError(
                f"{goal} must be None: no plan of allocation {allocation!r} is faster than the dense model on this "
                f"device ({least:.4g} and {dense:.4g} ms a sample), got {getattr(config, goal)}"
            )
        where = "on this model" if goal == "flops_reduction" else "with this model on this device"
        raise ValueError(
            f"{goal} must be at most about {1 - least / dense:.3f}, which allocation {allocation!r} "
            f"with temperature_max {config.temperature_max:g} reaches {where}, got {getattr(config, goal)}"
        )
    if allocation != "uniform":
        at_least = sparse
        shares, sparse = ledger.greedy(shares, sparse, target, fewest, [] if allocation == "tokens" else everything)
        past = ledger.cost(shares, sparse) < (1 - 1e-6) * target and len(sparse) > len(at_least)
        if allocation == "joint" and past and min(shares.values()) == 1:
            # A whole Linear goes past the target, tokens end on it.
            if ledger.cost(fewest, sparse[:-1]) <= target:
                shares, sparse = ledger.greedy(shares, sparse[:-1], target, fewest, [])
    shares = ledger.exactly(shares, sparse, target, fewest, uniform=allocation == "uniform")
    zeroed = sum(sensitivities.weights[name].zeroed for name in sparse)
    rise = sum(ledger.rise(b, share) for b, share in shares.items())
    rise += sum(sensitivities.weights[name].rise for name in sparse)
    predicted = {"params_reduction": zeroed / sensitivities.profile.total.params, "rise": rise}
    if config.latency_reduction is not None:
        predicted |= {"dense_ms": dense, "ms": ledger.cost(shares, sparse)}
    reduction = 1 - macs.cost(shares, sparse) / macs.full
    ordered = tuple(name for name in everything if name in set(sparse))
    return Plan(reduction, shares, ordered, allocation, config.latency_reduction, predicted)


def measured_rise(calibration: Calibration, sensitivities: Sensitivities, plan: Plan) -> float:
    """The distillation loss of the calibration data with the whole plan carried out, before any training."""
    temperatures = {}
    for branch, share in plan.tokens.items():
        points = sensitivities.tokens[branch]  # shares fall, temperatures rise
        logs = [np.log(max(point.temperature, calibration.config.temperature_min)) for point in points]
        log = np.interp(share, [point.share for point in reversed(points)], logs[::-1])
        temperatures[branch] = float(np.exp(log)) if share < 1 else 0.0
    with calibration.masked(plan.sparse_modules), calibration.at(temperatures):
        return calibration.rise()


def _enough_parameters(sensitivities: Sensitivities, reduction: float, allocation: str) -> list[str]:
    """Linears whose zeros are this share of the parameters, those first whose rise per zero is least."""
    units, total = sensitivities.weights, sensitivities.profile.total.params
    reachable = 0.0 if allocation == "tokens" else sum(unit.zeroed for unit in units.values()) / total
    if reduction > reachable:
        raise ValueError(
            f"params_reduction must be at most {reachable:.3f}, which allocation {allocation!r} reaches in "
            f"{len(units)} modules, got {reduction}"
        )
    if allocation == "uniform":
        return list(units)
    ranked = sorted(units, key=lambda name: units[name].rise / units[name].zeroed)
    zeroed = list(itertools.accumulate(units[name].zeroed for name in ranked))
    enough = next((i for i, count in enumerate(zeroed, 1) if count >= reduction * total), 0)
    return ranked[:enough] if reduction else []


class _Ledger:
    """What a choice of shares and sparse Linears costs, and what it does to the loss, part by part.

    The cost is counted MACs, or milliseconds, per sample: what everything costs with all tokens and dense weights, less
    what each branch saves by its tokens, less what each sparse Linear saves at the share of its branch.
    """

    def __init__(self, sensitivities: Sensitivities, times: Times | None = None):
        self.weights = sensitivities.weights
        if times is None:
            branches = sensitivities.profile.branches
            self.full = sensitivities.profile.total.dense_macs
            self.saves = {name: unit.macs for name, unit in self.weights.items()}
            by_tokens = {
                branch: [(1 - point.share) * branches[branch].dense_macs for point in points]
                for branch, points in sensitivities.tokens.items()
            }
        else:
            self.full, self.saves = times.patched, times.weights
            by_tokens = {b: [times.patched - time for time in measured] for b, measured in times.tokens.items()}
        self.curves = {
            branch: _lower_hull(points, by_tokens[branch]) for branch, points in sensitivities.tokens.items()
        }

    def least(self, branch: str) -> float:
        return self.curves[branch][0][0]

    def rise(self, branch: str, share: float) -> float:
        shares, _, rises = self.curves[branch]
        return float(np.interp(share, shares, rises))

    def cost(self, shares: Mapping[str, float], sparse: Iterable[str]) -> float:
        by_tokens = sum(np.interp(share, *self.curves[branch][:2]) for branch, share in shares.items())
        by_weights = sum(self.saves[name] * shares.get(self.weights[name].branch, 1.0) for name in sparse)
        return float(self.full - by_tokens - by_weights)

    def greedy(
        self,
        shares: Mapping[str, float],
        sparse: Sequence[str],
        target: float,
        fewest: Mapping[str, float],
        allowed: Sequence[str],
    ) -> tuple[dict[str, float], list[str]]:
        """Takes what raises the loss least per cost saved, a Linear or a step of tokens, until the target is met."""
        shares, sparse = dict(shares), list(sparse)
        now = self.cost(shares, sparse)
        while now > target:
            options = []  # rise of the loss, shares, sparse
            for branch, share in shares.items():
                fewer = max(share - TOKEN_STEP, fewest[branch])
                changed = shares | {branch: fewer}
                options.append((self.rise(branch, fewer) - self.rise(branch, share), changed, sparse))
            for name in allowed:
                if name not in sparse:
                    options.append((self.weights[name].rise, shares, [*sparse, name]))
            rated = [(rise, now - self.cost(*choice), choice) for rise, *choice in options]
            rated = [(rise / saved, choice) for rise, saved, choice in rated if saved > 1e-9 * self.full]
            _, (shares, sparse) = min(rated, key=lambda option: option[0])
            now = self.cost(shares, sparse)
        return shares, sparse

    def exactly(
        self,
        shares: Mapping[str, float],
        sparse: Sequence[str],
        target: float,
        fewest: Mapping[str, float],
        *,
        uniform: bool,
    ) -> dict[str, float]:
        """The shares of the branches that prune, moved together until they cost the target, as far as they go."""
        moving = [branch for branch, share in shares.items() if uniform or share < 1]

        def moved(step: float) -> dict[str, float]:  # 0: the fewest tokens, 1: all of them
            more = {branch: fewest[branch] + step * (1 - fewest[branch]) for branch in moving}
            if not uniform:  # giving back what the last step took too much
                more = {branch: shares[branch] + step * (1 - shares[branch]) for branch in moving}
            return dict(shares) | more

        low, high = 0.0, 1.0
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if self.cost(moved(middle), sparse) <= target else (low, middle)
        return moved(low if self.cost(moved(1.0), sparse) > target else 1.0)


def _lower_hull(points: Sequence[TokenPoint], saved: Sequence[float]) -> tuple[list[float], list[float], list[float]]:
    """The convex curve of rise against cost below the points: steps along it get dearer.

    Points from all tokens to the fewest, and what each saves; one that saves no more than one with more tokens is left
    out, as times are not exact.

    Returns:
        (shares, saved, rises) from the fewest tokens on.
    """
    ahead: list[tuple[float, float, float]] = []
    for point, saving in zip(points, saved, strict=True):
        if not ahead or saving > ahead[-1][1]:
            ahead.append((point.share, saving, point.rise))
    hull: list[tuple[float, float, float]] = []
    for corner in reversed(ahead):
        while len(hull) > 1 and _turns_up(*((-saving, rise) for _, saving, rise in (*hull[-2:], corner))):
            hull.pop()
        hull.append(corner)
    shares, savings, rises = (list(column) for column in zip(*hull, strict=True))
    return shares, savings, rises


def _turns_up(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    """Whether b lies on or above the line from a to c."""
    return (b[1] - a[1]) * (c[0] - a[0]) >= (c[1] - a[1]) * (b[0] - a[0])


def _is_share(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
