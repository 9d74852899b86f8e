"""Budgets before pruning: which Linears go N:M, and how many of its tokens each branch may spend.

Source: docs/method.md, cooperative optimisation, step 3.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np
from torch import nn
from torch.utils.data import Dataset

from madtp.budgets.cost_model import CostModel
from madtp.budgets.latency import measure_times
from madtp.budgets.plan import Plan
from madtp.budgets.sensitivity import Calibration, Sensitivities, measure_sensitivities
from madtp.choices import ALLOCATIONS, REDUCTIONS
from madtp.config import CompressionConfig
from madtp.measure.timing import TIMING_BATCH
from madtp.patching.handle import patch
from madtp.tasks.batches import pairs
from madtp.tasks.task import Task

CALIBRATION_SAMPLES = 64


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
    macs = ledger = CostModel(sensitivities)
    goal, target = "flops_reduction", (1 - (config.flops_reduction or 0)) * macs.full
    if config.latency_reduction is not None:
        times = sensitivities.times
        if times is None:
            raise ValueError("sensitivities must hold times with a latency_reduction, got None")
        ledger = CostModel(sensitivities, times)
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
