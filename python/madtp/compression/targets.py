# SPDX-License-Identifier: Apache-2.0
"""What a compression run is to come to: MACs by branch, Linears that go N:M; refused where the model cannot do it."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import set_seed

from madtp.budgets.allocate import allocate
from madtp.budgets.plan import Plan
from madtp.budgets.prunable import linear_of, prunable_linears
from madtp.config import CompressionConfig
from madtp.dtp.selection_rules import METHOD
from madtp.handles import handle_of
from madtp.hwp import Pattern
from madtp.models.registry import family_of
from madtp.models.vlm import unsupported_reason
from madtp.patching.handle import patch
from madtp.profiling.macs import Profile, counted_macs, profile_batches
from madtp.tasks.batches import require_samples, sample_batches
from madtp.tasks.task import Task
from madtp.training.controller import TemperatureController, branch_targets, settle
from madtp.width import Narrowed, prune_width

WIDTH_SAMPLES = 256  # of the calibration data, by which heads and channels that go are chosen
PROBE_SAMPLES = 64  # of the calibration data, on which MACs are observed while training
FEASIBLE_MARGIN = 1.15  # over the MACs asked for, which the highest temperature may need before training


@dataclass(frozen=True)
class Targets:
    """What a run is to do. MACs are per sample, of the calibration data."""

    macs_reduction: float  # of the dense MACs
    latency_reduction: float | None  # of the dense model's time, where that is what is asked for
    chosen: list[str]  # Linears that go N:M
    quantized: list[str]  # Linears that are rounded, whether they go N:M or not
    weight_dtype: Literal["int8", "fp8"] | None  # to what
    dense: dict[str, str]  # Linears that can do neither, and why
    branch_macs: dict[str, float]  # counted, of the branches that prune
    before: Profile  # with all tokens, the chosen Linears counted as N:M; dense: before heads and channels went
    probe: list[dict[str, Tensor]]  # the samples MACs are observed on
    widths: dict[str, Narrowed]  # what was removed of heads and channels

    @property
    def counted_macs(self) -> dict[str, float]:
        """By branch, as they are to be in the end."""
        return {b: self.branch_macs.get(b, account.counted_macs) for b, account in self.before.branches.items()}


def predict_targets(
    model: nn.Module,
    task: Task,
    calibration_data: Dataset,
    config: CompressionConfig,
    *,
    plan: Plan | None = None,
) -> Targets:
    """What `compress` would aim at with these arguments; nothing is trained, and the model stays as it is.

    With a latency_reduction and no plan, one is chosen for it.

    Raises:
        as `compress`.
    """
    check_kind(model, config, plan)
    set_seed(config.seed)
    student = copy.deepcopy(model)
    patch(student, config)
    if plan is None and config.latency_reduction is not None:
        plan = latency_plan(model, task, calibration_data, config)
    return choose_targets(student, task, calibration_data, config, plan, next(model.parameters()).device)


def latency_plan(
    model: nn.Module,
    task: Task,
    data: Dataset,
    config: CompressionConfig,
    path: Path | None = None,
    resume: bool = False,
) -> Plan:
    """The plan for a latency target, which a second measurement would make another: the one at `path` goes on."""
    if resume and path is not None and path.exists():
        return Plan.load(path)
    plan = allocate(model, task, data, config)
    if path is not None:
        plan.save(path)
    return plan


def choose_targets(
    student: nn.Module,
    task: Task,
    calibration_data: Dataset,
    config: CompressionConfig,
    plan: Plan | None,
    device: torch.device,
) -> Targets:
    """The targets of a plan, or without one those of the config; `student` is the patched model, which loses the heads
    and channels that are to go."""
    require_samples(calibration_data=calibration_data)
    handle, params = handle_of(student), sum(p.numel() for p in student.parameters())
    probe = sample_batches(task, calibration_data, PROBE_SAMPLES, device)
    pruning = list(handle.temperatures)
    handle.set_temperature(dict.fromkeys(pruning, 0.0))
    asked = _widths(student, config, plan)
    whole = profile_batches(student, probe, branches=handle.spending) if asked else None
    narrowed = (
        prune_width(student, asked, sample_batches(task, calibration_data, WIDTH_SAMPLES, device)) if asked else {}
    )
    linears = prunable_linears(student, config)
    latency_reduction: float | None = None
    if plan is None:
        assert config.macs_reduction is not None  # a config without one asks for time, and comes with a plan
        chosen, reduction = linears.selected, config.macs_reduction
        _require_params_reduction(student, chosen, config, params)
    else:
        plan.require_fit(pruning, linears.selected)
        chosen = list(plan.sparse_modules)
        reduction, latency_reduction = plan.macs_reduction, plan.latency_reduction
    quantized, weight_dtype = [] if config.weight_dtype is None else linears.selected, config.weight_dtype
    if plan is not None and plan.weight_dtypes is not None:
        weight_dtype = plan.weight_dtype
        quantized = [name for name in linears.selected if name in plan.weight_dtypes]
    planned = chosen if Pattern.parse(config.pattern).sparse24 else []
    before = profile_batches(student, probe, planned_sparse=planned, branches=handle.spending)
    before = before if whole is None else _with_dense(before, whole)
    if plan is None and not pruning:
        _require_reached(before, reduction)
        macs = {}
    elif plan is None:
        macs = branch_targets(before, reduction, pruning)
    else:
        macs = {b: share * before.branches[b].counted_macs for b, share in plan.tokens.items() if share < 1}
    if macs:
        _require_feasible(student, probe, planned, before.total.dense_macs, reduction, macs, config)
    rounding = quantized, weight_dtype
    return Targets(reduction, latency_reduction, chosen, *rounding, linears.dense, macs, before, probe, narrowed)


def _widths(student: nn.Module, config: CompressionConfig, plan: Plan | None) -> Mapping[str, int] | float:
    """What of the heads and channels stays, of `prune_width`; {} for all."""
    if plan is not None:
        return plan.widths
    return 1 - config.width_reduction if config.width_reduction else {}


def _with_dense(profile: Profile, whole: Profile) -> Profile:
    """The profile, whose dense MACs are those of the model before anything was removed."""
    branches = {b: replace(account, dense_macs=whole.branches[b].dense_macs) for b, account in profile.branches.items()}
    return replace(profile, total=replace(profile.total, dense_macs=whole.total.dense_macs), branches=branches)


@contextmanager
def settled(student: nn.Module, targets: Targets, config: CompressionConfig) -> Iterator[None]:
    """A context in which the temperatures are those at which the probe costs about what it is to cost."""
    handle, before = handle_of(student), handle_of(student).temperatures
    planned = set(targets.chosen) if Pattern.parse(config.pattern).sparse24 else set()
    bounds = config.temperature_min, config.temperature_max
    controller = TemperatureController(
        targets.branch_macs, temperature=config.temperature, gain=config.controller_gain, bounds=bounds
    )

    def observe() -> dict[str, float]:
        with handle.inference():
            macs = counted_macs(student, targets.probe, planned_sparse=planned)
        return {branch: macs[branch] for branch in targets.branch_macs}

    handle.set_temperature(controller.temperatures)
    try:
        settle(controller, observe, handle.set_temperature)
        yield
    finally:
        handle.set_temperature(before)


def check_kind(model: nn.Module, config: CompressionConfig, plan: Plan | None) -> None:
    """Raises ValueError for what a decoder that reads images has not, since its seams are given and nobody plans them,
    and for what it alone has."""
    if family_of(model) is not None or unsupported_reason(model) is not None:
        if config.lora_rank is not None:
            raise ValueError(f"lora_rank must be None for a {type(model).__name__}, it is of decoders that read images")
        return

    def require(name: str, fits: bool, rule: str, given: object) -> None:
        if not fits:
            raise ValueError(f"{name} must be {rule} for a decoder that reads images, got {given!r}")

    kind = None if plan is None else "a plan"
    require("plan", plan is None, "None (keep of the config says what goes, madtp.seam_pareto compares it)", kind)
    require("latency_reduction", config.latency_reduction is None, "None", config.latency_reduction)
    require("width_reduction", config.width_reduction is None, "None", config.width_reduction)
    require("selection", config.selection == METHOD, f"{METHOD!r} (a rule is of keep)", config.selection)
    require("hwp_score", config.hwp_score != "token_weighted", "another", config.hwp_score)


def _require_reached(before: Profile, reduction: float) -> None:
    """Refuses a target that amounts and patterns, which nothing moves, do not come down to."""
    left = before.total.counted_macs / before.total.dense_macs
    if left > 1 - reduction:
        raise ValueError(
            f"macs_reduction must be at most {1 - left:.3f}, which the amounts of keep and the pattern come to; a "
            f"temperature at a seam would be steered to it, got {reduction}"
        )


def _require_params_reduction(model: nn.Module, selected: list[str], config: CompressionConfig, params: int) -> None:
    """params: of the model before heads and channels were removed."""
    if config.params_reduction is None:
        return
    n, m = Pattern.parse(config.pattern)
    weights = sum(linear_of(model, name).weight.numel() for name in selected)
    removed = params - sum(p.numel() for p in model.parameters())
    reachable = (removed + weights * (1 - n / m)) / params
    if config.params_reduction > reachable:
        raise ValueError(
            f"params_reduction must be at most {reachable:.3f}, the share {config.pattern} zeroes in the "
            f"{len(selected)} modules it may prune, got {config.params_reduction}"
        )


def _require_feasible(
    student: nn.Module,
    probe: list[dict[str, Tensor]],
    planned: list[str],
    dense_macs: float,
    reduction: float,
    branches: Iterable[str],
    config: CompressionConfig,
) -> None:
    """Refuses a target far from what the highest temperature reaches: training moves this bound, but not by much."""
    handle_of(student).set_temperature(dict.fromkeys(branches, config.temperature_max))
    least = sum(counted_macs(student, probe, planned_sparse=planned).values()) / dense_macs
    handle_of(student).set_temperature(dict.fromkeys(branches, 0.0))
    if least > FEASIBLE_MARGIN * (1 - reduction):
        raise ValueError(
            f"macs_reduction must be at most about {1 - least:.2f}, which temperature_max {config.temperature_max:g} "
            f"reaches on this model, got {reduction}"
        )
