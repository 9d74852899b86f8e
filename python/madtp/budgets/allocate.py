# SPDX-License-Identifier: Apache-2.0
"""Budgets before pruning: which Linears go N:M, and how many of its tokens each branch may spend.

Source: docs/method.md, cooperative optimisation, step 3.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import nn
from torch.utils.data import Dataset

from madtp.budgets.cost_model import Choice, CostModel
from madtp.budgets.latency import time_parts
from madtp.budgets.plan import Plan
from madtp.budgets.prunable import prunable_linears
from madtp.budgets.records import Sensitivities
from madtp.budgets.sensitivity import Calibration, find_first_layers, find_sensitivities
from madtp.budgets.smoothing import smooth_model
from madtp.budgets.strategies import STRATEGIES
from madtp.choices import ALLOCATIONS, REDUCTIONS
from madtp.config import CompressionConfig
from madtp.hwp import select_rounded
from madtp.models.registry import family_of
from madtp.models.vlm import unsupported_reason
from madtp.patching.handle import patch
from madtp.profiling.timing import TIMING_BATCH
from madtp.tasks.batches import require_samples, sample_batches
from madtp.tasks.task import Task

CALIBRATION_SAMPLES = 64
WIDTH_ALLOCATIONS = ("width", "width_weights")  # which need a width_reduction
MAX_ROUNDING_ERROR = 0.1  # of the outputs of a Linear, by which rounding may change them; one above keeps its dtype
Progress = Callable[[Sequence[str]], Iterable[str]]


def allocate(
    model: nn.Module,
    task: Task,
    calibration_data: Dataset,
    config: CompressionConfig,
    *,
    allocation: str = "joint",
    progress: Progress = iter,
) -> Plan:
    """Chooses the budgets of a dense model for the targets of a config; nothing is trained, the model stays as it is.

    Every Linear and every branch is pruned by itself on `CALIBRATION_SAMPLES` samples of the data; what costs the
    answers least per MAC saved goes first; with a latency_reduction, per millisecond saved on the model's device
    (`madtp.budgets.latency`). With a weight_dtype the plan names the Linears that go there: all that may go N:M, but
    for those whose outputs it changes by more than `MAX_ROUNDING_ERROR`.

    Args:
        allocation: "joint", tokens and weights as they come, and with a width_reduction heads and channels; "tokens",
            "weights" or "width", only those; "width_weights", heads and channels first, then weights; "uniform", all
            Linears that can, widths as far as they may go, and one share for all branches.
        progress: wraps the list of what is pruned, for a bar.

    Returns:
        the plan, with what the other allocations would do at the same budget.

    Raises:
        ValueError: the targets cannot be reached; the message says what can. The data are empty.
    """
    if allocation not in ALLOCATIONS:
        raise ValueError(f"allocation must be one of {', '.join(ALLOCATIONS)}, got {allocation!r}")
    calibration, sensitivities = _look_into(model, task, calibration_data, config, progress)
    plan = _plan(calibration, sensitivities, config, allocation)
    return replace(plan, compared=_compared(calibration, sensitivities, config, plan))


def pareto(
    model: nn.Module,
    task: Task,
    calibration_data: Dataset,
    config: CompressionConfig,
    *,
    reductions: Sequence[float] = REDUCTIONS,
    progress: Progress = iter,
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
    if config.latency_reduction is None:
        configs = [replace(config, macs_reduction=reduction) for reduction in sorted(set(reductions))]
    else:
        configs = [replace(config, latency_reduction=reduction) for reduction in sorted(set(reductions))]
    calibration, sensitivities = _look_into(model, task, calibration_data, config, progress)
    plans: list[Plan] = []
    refusal = ValueError("reductions must be numbers in (0, 1), got none")
    for target in configs:
        try:
            plan = _plan(calibration, sensitivities, target)
        except ValueError as error:
            refusal = error
            continue
        plans.append(replace(plan, compared=_compared(calibration, sensitivities, target, plan)))
    if not plans:
        raise refusal
    return plans


def _look_into(
    model: nn.Module, task: Task, calibration_data: Dataset, config: CompressionConfig, progress: Progress
) -> tuple[Calibration, Sensitivities]:
    """A patched copy of the model on calibration data, and what each of its parts does to its answers."""
    if family_of(model) is None and unsupported_reason(model) is None:
        raise ValueError(
            f"model must have towers that prune, whose budgets a plan is of, got a {type(model).__name__}: "
            "madtp.seam_pareto compares its seams"
        )
    require_samples(calibration_data=calibration_data)
    device, patched = next(model.parameters()).device, copy.deepcopy(model)
    patch(patched, config)
    batches = sample_batches(task, calibration_data, CALIBRATION_SAMPLES, device)
    if config.hwp_smoothing is not None:
        smooth_model(patched, prunable_linears(patched, config).selected, batches, config.hwp_smoothing)
    calibration = Calibration(patched, task, batches, config)
    sensitivities = find_sensitivities(calibration, progress=progress)
    if config.latency_reduction is not None:
        batch = sample_batches(task, calibration_data, TIMING_BATCH, device)[0]
        rounded = _quantized(sensitivities, config)
        times = time_parts(model, patched, sensitivities, batch, rounded, config.weight_dtype or "int8")
        sensitivities = replace(sensitivities, times=times)
    return calibration, sensitivities


def _plan(
    calibration: Calibration, sensitivities: Sensitivities, config: CompressionConfig, allocation: str = "joint"
) -> Plan:
    """What `choose` gives, with the first layers that prune where the config does not say them and allocation is no
    rule."""
    plan = choose(sensitivities, config, allocation)
    if config.first_layer is not None or allocation == "uniform":
        return plan
    return replace(plan, first_layers=find_first_layers(calibration, plan.tokens))


def _compared(
    calibration: Calibration, sensitivities: Sensitivities, config: CompressionConfig, chosen: Plan
) -> dict[str, float]:
    """Allocation -> what it does at the budget of a config; those that cannot reach it are left out. One of them is
    the chosen plan."""
    compared = {}
    for allocation in ALLOCATIONS:
        try:
            known = allocation == chosen.allocation
            plan = chosen if known else _plan(calibration, sensitivities, config, allocation)
        except ValueError:
            continue
        compared[allocation] = measured_distill_loss(calibration, sensitivities, plan)
    return compared


def choose(sensitivities: Sensitivities, config: CompressionConfig, allocation: str = "joint") -> Plan:
    """The plan of an allocation (see `allocate`) for the targets of a config.

    Raises:
        ValueError: a target cannot be reached.
    """
    strategy, goal = STRATEGIES[allocation], _Goal.of(config, sensitivities)
    if allocation in WIDTH_ALLOCATIONS and not goal.costs.widths:
        raise ValueError(
            f"width_reduction must be above 0, on a model with heads or channels to remove, for allocation "
            f"{allocation!r}, got {config.width_reduction}"
        )
    required = _required_linears(sensitivities, config.params_reduction, allocation)
    _require_feasible(goal, config, allocation)
    choice = strategy.spend(goal.costs, goal.target, required)
    predicted = {
        "params_reduction": _params_saved(goal.costs, choice) / sensitivities.profile.total.params,
        "distill_loss": goal.costs.loss(choice),
    }
    if config.latency_reduction is not None:
        predicted |= {"dense_ms": goal.dense, "ms": goal.costs.cost(choice)}
    macs = CostModel(sensitivities)
    macs_reduction = 1 - macs.cost(choice) / macs.full
    ordered = tuple(name for name in sensitivities.weights if name in set(choice.sparse))
    widths = {name: choice.widths[name] for name in sensitivities.widths if name in choice.widths}
    plan = Plan(macs_reduction, choice.shares, ordered, allocation, config.latency_reduction, predicted, widths=widths)
    if config.weight_dtype is None:
        return plan
    dtypes: dict[str, str] = {name: config.weight_dtype for name in _quantized(sensitivities, config)}
    return replace(plan, weight_dtypes=dtypes, rounding_errors=_rounding_errors(sensitivities))


def _params_saved(costs: CostModel, choice: Choice) -> float:
    """Parameters that are removed or go to zero."""
    removed = sum(costs.widths[name].params * (costs.widths[name].full - left) for name, left in choice.widths.items())
    return removed + sum(costs.weights[name].zeroed * costs.left_of(name, choice) for name in choice.sparse)


def _quantized(sensitivities: Sensitivities, config: CompressionConfig) -> list[str]:
    """Linears that are rounded: where that was looked at, and changes the outputs little enough."""
    if config.weight_dtype is None:
        return []
    return select_rounded(_rounding_errors(sensitivities), max_error=MAX_ROUNDING_ERROR)


def _rounding_errors(sensitivities: Sensitivities) -> dict[str, float]:
    errors = {name: unit.rounding_error for name, unit in sensitivities.weights.items()}
    known = {name: error for name, error in errors.items() if error is not None}
    if errors and not known:
        raise ValueError("sensitivities must hold rounding errors with a weight_dtype, got none")
    return known


@dataclass(frozen=True)
class _Goal:
    """What a config asks for, and in what it is paid."""

    name: str  # of the field of the config
    reduction: float  # its value: of `dense`
    costs: CostModel  # MACs, or milliseconds
    dense: float  # what the dense model costs

    @classmethod
    def of(cls, config: CompressionConfig, sensitivities: Sensitivities) -> _Goal:
        if config.latency_reduction is None:
            costs = CostModel(sensitivities)
            return cls("macs_reduction", config.macs_reduction or 0.0, costs, costs.full)
        times = sensitivities.times
        if times is None:
            raise ValueError("sensitivities must hold times with a latency_reduction, got None")
        return cls("latency_reduction", config.latency_reduction, CostModel(sensitivities, times), times.dense)

    @property
    def target(self) -> float:
        return (1 - self.reduction) * self.dense


def _require_feasible(goal: _Goal, config: CompressionConfig, allocation: str) -> None:
    """Raises ValueError where all that the allocation may prune does not come down to the target."""
    least = goal.costs.cost(STRATEGIES[allocation].bounds(goal.costs))
    if least <= goal.target:
        return
    if least >= goal.dense:
        raise ValueError(
            f"{goal.name} must be None: no plan of allocation {allocation!r} is faster than the dense model on this "
            f"device ({least:.4g} and {goal.dense:.4g} ms a sample), got {goal.reduction}"
        )
    where = "on this model" if goal.name == "macs_reduction" else "with this model on this device"
    raise ValueError(
        f"{goal.name} must be at most about {1 - least / goal.dense:.3f}, which allocation {allocation!r} "
        f"with temperature_max {config.temperature_max:g} reaches {where}, got {goal.reduction}"
    )


def _required_linears(sensitivities: Sensitivities, params_reduction: float | None, allocation: str) -> list[str]:
    """Linears that go N:M whatever the budget is; raises ValueError where their zeros are not enough."""
    units, total = sensitivities.weights, sensitivities.profile.total.params
    strategy, reduction = STRATEGIES[allocation], params_reduction or 0.0
    reachable = sum(unit.zeroed for unit in units.values()) / total if strategy.prunes_weights else 0.0
    if reduction > reachable:
        raise ValueError(
            f"params_reduction must be at most {reachable:.3f}, which allocation {allocation!r} reaches in "
            f"{len(units)} modules, got {reduction}"
        )
    return strategy.required(units, reduction * total)


def measured_distill_loss(calibration: Calibration, sensitivities: Sensitivities, plan: Plan) -> float:
    """The distillation loss of the calibration data with the whole plan carried out, before any training."""
    temperatures = {}
    for branch, share in plan.tokens.items():
        points = sensitivities.tokens[branch]  # shares fall, temperatures rise
        logs = [np.log(max(point.temperature, calibration.config.temperature_min)) for point in points]
        log = np.interp(share, [point.share for point in reversed(points)], logs[::-1])
        temperatures[branch] = float(np.exp(log)) if share < 1 else 0.0
    first = calibration.handle.first_layers | plan.first_layers
    for branch, layer in plan.first_layers.items():  # the points are of the first layers that the config says
        temperature = calibration.temperature_for(branch, plan.tokens[branch], layer)
        temperatures[branch] = temperatures[branch] if temperature is None else temperature
    with calibration.narrowed(plan.widths), calibration.masked(plan.sparse_modules):
        with calibration.at(temperatures, first):
            return calibration.distill_loss()
