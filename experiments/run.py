# SPDX-License-Identifier: Apache-2.0
"""Measures one task: its dense model, compressions of it to several budgets, and what they are compared with.

    python -m experiments.run vqa
    python -m experiments.run retrieval --preset gpu --seeds 0 1 2
    python -m experiments.run llava --help    # decoders that read images, seam by seam: experiments/seams.py

Every row is written to experiments/results/PRESET/TASK.json as soon as it is there; the same command goes on after what
is in the file. A dense model that is not shipped is trained first, and kept in --work.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import nn
from transformers.utils import logging

from madtp import CompressionConfig
from madtp.compression import versions
from madtp.data.errors import DataError
from madtp.profiling.figures import measure
from madtp.profiling.macs import counted_macs
from madtp.tasks.batches import sample_batches
from madtp.tasks.small_vlms import SMALL_VLMS

from . import seams
from .paired import difference_error
from .results import FOLDER, Results
from .tasks import EXPERIMENTS, Prepared, Preset
from .variants import VARIANTS, Budgets, run

BATCH = 32  # of the published rule, which goes by the batch
PUBLISHED_SAMPLES = 512


def main() -> None:
    if sys.argv[1:2] and sys.argv[1] in SMALL_VLMS:
        return seams.main()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=EXPERIMENTS)
    parser.add_argument("--preset", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--reductions", type=float, nargs="+", help="of counted MACs, for variants that run at several")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/experiments"), help="dense models and what is in progress"
    )
    parser.add_argument("--results", type=Path, default=FOLDER)
    options = parser.parse_args()
    logging.set_verbosity_error()
    experiment = EXPERIMENTS[options.task]
    preset, work = experiment.presets[options.preset], options.work / options.preset
    prepared = experiment.prepare(preset, work / options.task)
    head = {"task": options.task, "metric": prepared.task.metric, "preset": options.preset, "settings": asdict(preset)}
    head["machine"] = _machine(options.preset)
    results = Results(options.results / options.preset / f"{options.task}.json", head)
    if options.preset == "gpu":
        prepared.model.to("cuda")
    if results.find("dense", 0.0, 0) is None:
        began = time.perf_counter()
        row = {"variant": "dense", "reduction": 0.0, "seed": 0} | figures(prepared, prepared.model)
        results.add(row | {"minutes": _minutes(began)})
        _say(results)
    budgets = None
    for variant, reduction, seed in rows(options.variants, options.reductions, options.seeds):
        if results.find(variant, reduction, seed) is not None:
            continue
        config = experiment.config(preset, prepared.model, macs_reduction=reduction, seed=seed)
        budgets = budgets or Budgets(prepared, preset, replace(config, seed=0))
        output = work / f"{options.task}-{variant}-{100 * reduction:.0f}-{seed}"
        row = run_variant(prepared, preset, variant, config, budgets, output)
        if row.get("plan") and row["plan"]["widths"]:  # whose own dense MACs are those of what is left
            row["whole_gmacs"] = results.find("dense", 0.0, 0)["dense_gmacs"]
        results.add(row)
        _say(results)


def rows(variants, reductions, seeds) -> list[tuple[str, float, int]]:
    """Every variant at its own budgets; at `reductions`, where these are given and it has several."""
    budgets = {variant: VARIANTS[variant].reductions for variant in variants}
    return [
        (variant, reduction, seed)
        for seed in seeds
        for variant in variants
        for reduction in (reductions if reductions and len(budgets[variant]) > 1 else budgets[variant])
    ]


def run_variant(
    prepared: Prepared, preset: Preset, variant: str, config: CompressionConfig, budgets: Budgets, output: Path
) -> dict:
    """A row; that of `joint` also has its model under the published rule, and that of a variant which is put beside
    another all of that one, and the standard error of their difference."""
    key = {"variant": variant, "reduction": config.macs_reduction, "seed": config.seed}
    beside = VARIANTS[variant].beside

    def measured(name: str) -> tuple[nn.Module, dict]:
        began = time.perf_counter()
        result = run(VARIANTS[name], prepared, preset, config, budgets, output / name)
        plan = result.report["plan"]
        row = figures(prepared, result.model, result.path) | {"plan": plan["allocation"]}
        row |= {"temperatures": plan["temperatures"], "calibration_miss": plan["calibration_miss"]}
        row |= {"loss": [entry["loss"] for entry in result.report["training"]], "minutes": _minutes(began)}
        return result.model, row

    try:
        model, row = measured(variant)
    except ValueError as error:
        if "macs_reduction must be" not in str(error):
            raise
        return key | {"unreachable": str(error)}
    if variant == "joint":
        row |= {"batch_max": published(prepared, model)}
    if beside is not None:
        other, row["beside"] = measured(beside)
        row["difference_error"] = difference_error(prepared.task, (other, model), prepared.test)
    shutil.rmtree(output)
    return key | row | {"versions": versions()}


def figures(prepared: Prepared, model: nn.Module, path: Path | None = None) -> dict:
    others = {name: prepared.task.evaluate(model, data) for name, data in prepared.others.items()}
    return measure(model, prepared.task, prepared.test, path=path) | {"others": others}


def published(prepared: Prepared, model: nn.Module) -> dict:
    """The same model at the same temperatures in batches of `BATCH`, with the rule that keeps the batch's maximum."""
    batches = [
        {name: value[start : start + BATCH] for name, value in batch.items()}
        for batch in sample_batches(prepared.task, prepared.test, PUBLISHED_SAMPLES, next(model.parameters()).device)
        for start in range(0, len(next(iter(batch.values()))), BATCH)
    ]
    found = {"instance_gmacs": sum(counted_macs(model, batches).values()) / 1e9}
    for branch in model.madtp_handle.pruning.values():
        branch.selection = "batch_max"
    found["counted_gmacs"] = sum(counted_macs(model, batches).values()) / 1e9
    return found | {"batch_size": BATCH, "metrics": prepared.task.evaluate(model, prepared.test, batch_size=BATCH)}


def _machine(preset: str) -> str:
    if preset == "gpu":
        return torch.cuda.get_device_name()
    return f"CPU, {platform.machine()}"


def _minutes(began: float) -> float:
    return round((time.perf_counter() - began) / 60, 2)


def _say(results: Results) -> None:
    row = results.rows[-1]
    name = f"{row['variant']} -{100 * row['reduction']:.0f} % seed {row['seed']}"
    if "unreachable" in row:
        print(f"{name}: {row['unreachable']}", flush=True)
        return
    metrics = ", ".join(f"{metric} {value:.4f}" for metric, value in row["metrics"].items())
    cost = f"{row['counted_gmacs']:.4g} of {row.get('whole_gmacs', row['dense_gmacs']):.4g} GMACs"
    print(f"{name}: {metrics}, {cost}, {row['minutes']} min", flush=True)


if __name__ == "__main__":
    try:
        main()
    except (DataError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")
