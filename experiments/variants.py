# SPDX-License-Identifier: Apache-2.0
"""What is compared, each at the counted MACs that are asked for."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from madtp import CompressionConfig, compress, patch
from madtp.budgets.allocate import choose
from madtp.budgets.plan import Plan
from madtp.budgets.records import Sensitivities
from madtp.budgets.sensitivity import Calibration, find_sensitivities
from madtp.compression import Result
from madtp.tasks.batches import sample_batches

from .tasks import Prepared, Preset

REDUCTIONS = (0.3, 0.5, 0.6, 0.7, 0.8)
COMPARED_AT = 0.7  # where the other variants run
ADMM, FITTED = (("hwp_score", "admm"),), (("hwp_reconstruction_steps", 80),)
REWEIGHTED = (
    ("hwp_score", "magnitude"),
    ("hwp_schedule", "gradual"),
    ("hwp_masking", "reweighted"),
    ("hwp_decay", 1e-2),
)
WIDTH = (("width_reduction", 0.75),)  # the most that goes from a block
WIDTH_REDUCTIONS = (0.3, 0.5, COMPARED_AT)
NO_TEACHER = {"kd_weight": 0.0, "vision_weight": 0.0, "text_weight": 0.0}


@dataclass(frozen=True)
class Variant:
    """allocation: of `madtp.allocate`. changes: of the config. staged: tokens first, then weights. reductions: of
    counted MACs. steps: of the training; None: those of the preset. beside: the variant that is run again for every
    row, so that the two differ in `changes` alone: another machine trains a little differently."""

    title: str
    allocation: str = "joint"
    changes: tuple[tuple[str, object], ...] = ()
    staged: bool = False
    reductions: tuple[float, ...] = (COMPARED_AT,)
    steps: int | None = None
    beside: str | None = None


VARIANTS = {
    "joint": Variant("MADTP++ (joint allocation)", reductions=REDUCTIONS),
    "uniform": Variant("uniform allocation", "uniform"),
    "tokens": Variant("tokens only", "tokens"),
    "weights": Variant("weights only", "weights"),
    "staged": Variant("tokens, then weights", staged=True),
    "random": Variant("random tokens", changes=(("selection", "random"),)),
    "static": Variant("static top-k by CLS attention", changes=(("selection", "static"),)),
    "no_kd": Variant("no distillation", changes=tuple(NO_TEACHER.items())),
    "no_mag": Variant("no MAG", changes=(("selection", "unguided"), ("align_weight", 0.0))),
    # How 2:4 weights recover: by training, and without.
    "admm": Variant("2:4 by ADMM, trained", changes=ADMM),
    "s_ste": Variant("soft masks (S-STE)", changes=(("hwp_masking", "s_ste"),)),
    "reweighted": Variant("reweighted penalty, then masks", changes=REWEIGHTED),
    "one_shot": Variant("without training", steps=0),
    "one_shot_fitted": Variant("without training, blocks fitted", changes=FITTED, steps=0),
    "one_shot_admm": Variant("without training, ADMM", changes=ADMM, steps=0),
    "one_shot_admm_fitted": Variant("without training, ADMM, blocks fitted", changes=(*ADMM, *FITTED), steps=0),
    "width": Variant("width only", "width", WIDTH, reductions=WIDTH_REDUCTIONS),
    "width_weights": Variant("width, then 2:4", "width_weights", WIDTH, reductions=WIDTH_REDUCTIONS),
    "three_axes": Variant("MADTP++ and width (joint allocation)", "joint", WIDTH, reductions=WIDTH_REDUCTIONS),
    "int8": Variant("int8 weights", changes=(("weight_dtype", "int8"),), reductions=(0.5, 0.7), beside="joint"),
}


class Budgets:
    """Plans of one dense model, from one measurement of its sensitivities, and one more where its width may go too."""

    def __init__(self, prepared: Prepared, preset: Preset, config: CompressionConfig):
        self.prepared, self.preset, self.config = prepared, preset, config
        self.measured: dict[float | None, Sensitivities] = {}  # by width_reduction

    @property
    def sensitivities(self) -> Sensitivities:
        return self.sensitivities_at(None)

    def sensitivities_at(self, width_reduction: Any) -> Sensitivities:
        if width_reduction not in self.measured:
            config, prepared = replace(self.config, width_reduction=width_reduction), self.prepared
            model = copy.deepcopy(prepared.model)
            patch(model, config)
            samples, device = self.preset.allocation_samples, next(model.parameters()).device
            batches = sample_batches(prepared.task, prepared.calibration, samples, device)
            self.measured[width_reduction] = find_sensitivities(Calibration(model, prepared.task, batches, config))
        return self.measured[width_reduction]

    def plan(self, config: CompressionConfig, variant: Variant) -> Plan:
        """Raises ValueError where the allocation cannot reach the budget."""
        return choose(self.sensitivities_at(dict(variant.changes).get("width_reduction")), config, variant.allocation)

    def tokens_of(self, plan: Plan) -> Plan:
        """The tokens of a plan, without its weights."""
        profile = self.sensitivities.profile
        left = sum(plan.tokens.get(name, 1.0) * account.dense_macs for name, account in profile.branches.items())
        return replace(plan, sparse_modules=(), macs_reduction=1 - left / profile.total.dense_macs)


def run(
    variant: Variant,
    prepared: Prepared,
    preset: Preset,
    config: CompressionConfig,
    budgets: Budgets,
    output: Path,
) -> Result:
    """Compresses the dense model of `prepared`.

    Raises:
        ValueError: the budget cannot be reached this way.
    """
    plan = budgets.plan(config, variant)
    config = replace(config, **dict(variant.changes))
    steps = preset.steps if variant.steps is None else variant.steps
    if not variant.staged:
        return _compress(prepared, prepared.model, plan, preset, config, steps, output)
    half = preset.steps // 2
    first = _compress(prepared, prepared.model, budgets.tokens_of(plan), preset, config, half, output / "tokens")
    return _compress(prepared, first.model.madtp_handle.remove(), plan, preset, config, preset.steps - half, output)


def _compress(
    prepared: Prepared,
    model: nn.Module,
    plan: Plan,
    preset: Preset,
    config: CompressionConfig,
    steps: int,
    output: Path,
) -> Result:
    return compress(
        model,
        prepared.task,
        prepared.train,
        None,
        config,
        output_dir=output,
        calibration_data=prepared.calibration,
        plan=plan,
        teacher=prepared.model,
        training={
            "max_steps": steps,
            "per_device_train_batch_size": preset.batch_size,
            "learning_rate": preset.learning_rate,
            "logging_steps": 10,
            "save_strategy": "no",
            "disable_tqdm": True,
        },
    )
