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

from madtp.compression import pairs
from madtp.config import CompressionConfig
from madtp.files import write_whole
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
        flops_reduction: share of the dense MACs to save, counted.
        tokens: for each branch that can prune, the share of its MACs that its tokens may spend: 1 keeps all tokens, and
            the branch is not pruned. What it counts in the end is this share of what it counts with all tokens and
            with its 2:4 Linears at half.
        sparse_modules: names of the Linears that go N:M.
        allocation: how it was chosen.
        predicted: {"params_reduction", "rise"}: share of the parameters that go to zero, and the sum of what each part
            does to the distillation loss by itself.
        compared: what this plan and the others at the same budget did to the distillation loss on the calibration data
            before any training, by allocation; those that cannot reach the budget are not there.
    """

    flops_reduction: float
    tokens: dict[str, float]
    sparse_modules: tuple[str, ...]
    allocation: str = "joint"
    predicted: dict[str, float] = field(default_factory=dict)
    compared: dict[str, float] = field(default_factory=dict)

    def __post_init__(self):
        if not _is_share(self.flops_reduction) or self.flops_reduction == 1:
            raise ValueError(f"flops_reduction must be a number in [0, 1), got {self.flops_reduction!r}")
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
        """Raises ValueError unless it gives tokens to these branches, prunes one, and names Linears of these."""
        if set(self.tokens) != set(branches):
            raise ValueError(f"plan must give tokens to {', '.join(branches)}, got {', '.join(self.tokens)}")
        if all(share == 1 for share in self.tokens.values()):
            raise ValueError(f"plan must give a branch fewer tokens than all, got {self.tokens}")
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
    answers least per MAC saved goes first.

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
        reductions: shares of the dense MACs to save, in place of the config's; those that cannot be reached are left
            out.
        others: as of `allocate`.

    Returns:
        plans from the least reduction on, each with what every allocation would do at its budget (`compared`).

    Raises:
        ValueError: as `allocate`; or no reduction can be reached.
    """
    configs = [replace(config, flops_reduction=reduction) for reduction in sorted(set(reductions))]
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
    device, model = next(model.parameters()).device, copy.deepcopy(model)
    patch(model, config)
    calibration = Calibration(model, task, pairs(task, calibration_data, CALIBRATION_SAMPLES, device), config)
    return calibration, measure_sensitivities(calibration, progress=progress)


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
    ledger = _Ledger(sensitivities)
    everything = list(sensitivities.weights)
    sparse = everything if allocation == "uniform" else []
    if config.params_reduction is not None:
        sparse = _enough_parameters(sensitivities, config.params_reduction, allocation)
    shares = dict.fromkeys(sensitivities.tokens, 1.0)
    fewest = shares if allocation == "weights" else {branch: ledger.least(branch) for branch in shares}
    least = ledger.macs(fewest, sparse if allocation == "tokens" else everything)
    target = (1 - config.flops_reduction) * ledger.dense
    if least > target:
        raise ValueError(
            f"flops_reduction must be at most about {1 - least / ledger.dense:.3f}, which allocation {allocation!r} "
            f"with temperature_max {config.temperature_max:g} reaches on this model, got {config.flops_reduction}"
        )
    if allocation != "uniform":
        shares, sparse = ledger.greedy(shares, sparse, target, fewest, [] if allocation == "tokens" else everything)
    shares = ledger.exactly(shares, sparse, target, fewest, uniform=allocation == "uniform")
    zeroed = sum(sensitivities.weights[name].zeroed for name in sparse)
    rise = sum(ledger.rise(b, share) for b, share in shares.items())
    rise += sum(sensitivities.weights[name].rise for name in sparse)
    predicted = {"params_reduction": zeroed / sensitivities.profile.total.params, "rise": rise}
    reduction = 1 - ledger.macs(shares, sparse) / ledger.dense
    ordered = tuple(name for name in everything if name in set(sparse))
    return Plan(reduction, shares, ordered, allocation, predicted)


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
    """What a choice of shares and sparse Linears costs, and what it does to the loss, part by part."""

    def __init__(self, sensitivities: Sensitivities):
        self.weights = sensitivities.weights
        self.dense = sensitivities.profile.total.dense_macs
        self.branches = {b: account.dense_macs for b, account in sensitivities.profile.branches.items()}
        self.curves = {branch: _lower_hull(points) for branch, points in sensitivities.tokens.items()}

    def least(self, branch: str) -> float:
        return self.curves[branch][0][0]

    def rise(self, branch: str, share: float) -> float:
        return float(np.interp(share, *self.curves[branch]))

    def macs(self, shares: Mapping[str, float], sparse: Iterable[str]) -> float:
        """Counted, per sample."""
        left = dict(self.branches)
        for name in sparse:
            left[self.weights[name].branch] -= self.weights[name].macs
        return sum(shares.get(branch, 1.0) * macs for branch, macs in left.items())

    def greedy(
        self,
        shares: Mapping[str, float],
        sparse: Sequence[str],
        target: float,
        fewest: Mapping[str, float],
        allowed: Sequence[str],
    ) -> tuple[dict[str, float], list[str]]:
        """Takes what raises the loss least per MAC saved, a Linear or a step of tokens, until the target is met."""
        shares, sparse = dict(shares), list(sparse)
        now = self.macs(shares, sparse)
        while now > target:
            options = []  # loss per MAC, shares, sparse
            for branch, share in shares.items():
                fewer = max(share - TOKEN_STEP, fewest[branch])
                changed = shares | {branch: fewer}
                options.append((self.rise(branch, fewer) - self.rise(branch, share), changed, sparse))
            for name in allowed:
                if name not in sparse:
                    options.append((self.weights[name].rise, shares, [*sparse, name]))
            rated = [(rise, now - self.macs(*choice), choice) for rise, *choice in options]
            rated = [(rise / saved, choice) for rise, saved, choice in rated if saved > 1e-9 * self.dense]
            _, (shares, sparse) = min(rated, key=lambda option: option[0])
            now = self.macs(shares, sparse)
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
            low, high = (middle, high) if self.macs(moved(middle), sparse) <= target else (low, middle)
        return moved(low if self.macs(moved(1.0), sparse) > target else 1.0)


def _lower_hull(points: Sequence[TokenPoint]) -> tuple[list[float], list[float]]:
    """The convex curve below the points, (shares, rises) from the fewest tokens on: steps along it get dearer."""
    hull: list[tuple[float, float]] = []
    for point in sorted((point.share, point.rise) for point in points):
        while len(hull) > 1 and _turns_up(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    return [share for share, _ in hull], [rise for _, rise in hull]


def _turns_up(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    """Whether b lies on or above the line from a to c."""
    return (b[1] - a[1]) * (c[0] - a[0]) >= (c[1] - a[1]) * (b[0] - a[0])


def _is_share(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
