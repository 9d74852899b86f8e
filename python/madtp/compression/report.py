# SPDX-License-Identifier: Apache-2.0
"""The report of a run as plain values; `madtp.reporting` makes it readable."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers

import madtp_kernels
from madtp.budgets.plan import Plan
from madtp.compression.reconstruction import Reconstruction
from madtp.compression.targets import Targets
from madtp.hwp import Permutation, Smoothing
from madtp.hwp.packing import schemes_of
from madtp.training.trainer import MadtpTrainer


def report_data(
    trainer: MadtpTrainer,
    targets: Targets,
    plan: Plan | None,
    figures: Mapping[str, dict],
    *,
    calibration_miss: float,
    packed: list[str],
    magnitude_kept: float,
    permutations: Mapping[str, Permutation],
    smoothings: Mapping[str, Smoothing],
    reconstructions: Mapping[str, Reconstruction],
) -> dict[str, Any]:
    """What `compress` returns as its report.

    Args:
        figures: of `madtp.profiling.figures.compare`; {} where nothing was evaluated.
        calibration_miss: share by which the calibrated model misses its target.
        packed: names of the Linears that became packed layers.
        magnitude_kept: share of the sparse Linears' |W| that their masks keep.
        permutations: by MLP, of its hidden channels.
        smoothings: by norm, of what its readers meet.
        reconstructions: by part of a block, of its outputs.
    """
    schemes = schemes_of(trainer.model)
    came_to = {
        "allocation": None if plan is None else plan.to_dict(),
        "macs_reduction": targets.macs_reduction,
        "latency_reduction": targets.latency_reduction,
        "targets_gmacs": {branch: macs / 1e9 for branch, macs in targets.branch_macs.items()},
        "temperatures": trainer.handle.temperatures,
        "calibration_miss": calibration_miss,
        "sparse_modules": targets.chosen,
        "packed_modules": sorted(packed),
        "quantized_modules": {name: schemes[name] for name in sorted(packed) if schemes[name] != "sparse24"},
        "dense_modules": targets.dense,
        "magnitude_kept": magnitude_kept,
        "widths": {
            name: {"kind": w.kind, "before": w.before, "after": w.after, "error": w.error}
            for name, w in targets.widths.items()
        },
        "permutations": {name: {"before": p.before, "after": p.after} for name, p in permutations.items()},
        "smoothings": {
            name: {"before": s.outliers_before, "after": s.outliers_after}
            for name, s in smoothings.items()
            if s.divisor is not None
        },
        "reconstructions": {name: {"before": r.before, "after": r.after} for name, r in reconstructions.items()},
    }
    return {
        "metric": trainer.task.metric,
        **figures,
        "plan": came_to,
        "training": [entry for entry in trainer.state.log_history if "loss" in entry],
        "config": trainer.config.to_dict(),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Of the packages that decide what comes out."""
    return {
        "madtp_kernels": madtp_kernels.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
