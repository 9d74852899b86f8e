# SPDX-License-Identifier: Apache-2.0
"""madtp allocate and madtp pareto: budgets before training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from madtp.choices import ALLOCATIONS, REDUCTIONS
from madtp.cli.options import (
    Config,
    Data,
    DenseModel,
    Images,
    Latency,
    Limit,
    Macs,
    Params,
    Smoothing,
    Task,
    Test,
    Weights,
    Width,
    quiet_transformers,
    settings,
    stderr,
)


def allocate(
    model: DenseModel,
    task: Task,
    data: Data,
    out: Annotated[Path, typer.Option(help="The YAML to write.")] = Path("plan.yaml"),
    macs: Macs = None,
    latency: Latency = None,
    params: Params = None,
    width: Width = None,
    weights: Weights = None,
    smoothing: Smoothing = None,
    allocation: Annotated[str, typer.Option(help=f"One of {', '.join(ALLOCATIONS)}.")] = ALLOCATIONS[0],
    config: Config = None,
    test: Test = None,
    images: Images = None,
    limit: Limit = None,
) -> None:
    """Choose what each branch and each Linear may spend, least sensitive first; nothing is trained.

    Example: madtp allocate runs/dense --task captioning --data emoji --macs 0.6 --out plan.yaml
    """
    quiet_transformers()
    from madtp.budgets.allocate import allocate
    from madtp.files import require_writable_file
    from madtp.progress import Progress
    from madtp.tasks.registry import load

    asked, _ = settings(
        config, macs=macs, latency=latency, params=params, width=width, weights=weights, smoothing=smoothing
    )
    require_writable_file("out", out)
    progress = Progress(stderr())
    with progress.status("reading the data"):
        loaded = load(task, model, data, test=test, images=images, limit=limit)
    plan = allocate(
        loaded.model,
        loaded.task,
        loaded.calibration,
        asked,
        allocation=allocation,
        progress=lambda units: progress(units, "measuring sensitivities"),
    )
    plan.save(out)
    for branch, share in plan.tokens.items():
        print(f"{branch}: {100 * share:.1f} % of its MACs for tokens")
    print(f"{len(plan.sparse_modules)} Linears go {asked.pattern}")
    if plan.widths:
        print(f"heads or channels go from {len(plan.widths)} places")
    if plan.weight_dtypes is not None:
        print(f"{len(plan.weight_dtypes)} Linears go {asked.weight_dtype}")
        for name, error in plan.rounding_errors.items():
            if name not in plan.weight_dtypes:
                print(f"{name} does not: its outputs would change by {100 * error:.1f} %")
    if plan.latency_reduction is not None:
        print(f"predicted: {plan.predicted['ms']:.3g} ms a sample, dense {plan.predicted['dense_ms']:.3g} ms")
    for name, loss in sorted(plan.compared.items(), key=lambda item: item[1]):
        print(f"distillation loss before training, {name}: {loss:.4g}")
    print(out)


def pareto(
    model: DenseModel,
    task: Task,
    data: Data,
    out: Annotated[Path, typer.Option(help="The folder that gets a plan for each reduction.")],
    reductions: Annotated[
        list[str] | None,
        typer.Option(
            help=f"A share of the MACs to save, an option for each; by default {', '.join(map(str, REDUCTIONS))}."
        ),
    ] = None,
    config: Config = None,
    test: Test = None,
    images: Images = None,
    limit: Limit = None,
) -> None:
    """Choose budgets for many reductions from one measurement: what each would cost the answers, before training.

    Example: madtp pareto runs/dense --task captioning --data emoji --out runs/plans
    """
    quiet_transformers()
    from rich.console import Console

    from madtp.budgets.allocate import pareto
    from madtp.files import require_writable
    from madtp.progress import Progress
    from madtp.reporting.tables import number_table
    from madtp.tasks.registry import load

    asked, _ = settings(config)
    shares = REDUCTIONS if reductions is None else [_share(text) for text in reductions]
    require_writable("out", out)
    progress = Progress(stderr())
    with progress.status("reading the data"):
        loaded = load(task, model, data, test=test, images=images, limit=limit)
    plans = pareto(
        loaded.model,
        loaded.task,
        loaded.calibration,
        asked,
        reductions=shares,
        progress=lambda units: progress(units, "measuring sensitivities"),
    )
    rows, compared = [], [name for name in ALLOCATIONS if any(name in plan.compared for plan in plans)]
    percents = [f"{100 * plan.macs_reduction:.0f}" for plan in plans]
    if len(set(percents)) < len(plans):  # or one would be written over the other
        percents = [f"{100 * plan.macs_reduction:.2f}" for plan in plans]
    for plan, percent in zip(plans, percents, strict=True):
        path = out / f"{percent}.yaml"
        plan.save(path)
        losses = (f"{plan.compared[name]:.4g}" if name in plan.compared else "" for name in compared)
        rows.append((f"{100 * plan.macs_reduction:.1f} %", *losses, path.name))
    columns = ("MACs saved", *compared, "plan")
    Console().print(number_table(columns, [rows], title="distillation loss before training"))


def _share(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"reductions must be numbers, got {text!r}") from None
