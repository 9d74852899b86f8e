# SPDX-License-Identifier: Apache-2.0
"""madtp compress."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from madtp.cli.options import (
    Config,
    Correct,
    Data,
    DenseModel,
    Fit,
    Images,
    Latency,
    Limit,
    Macs,
    Masking,
    Params,
    Resume,
    Smoothing,
    Task,
    Test,
    Weights,
    Width,
    quiet_transformers,
    says_how_to_go_on,
    settings,
    stderr,
    typed_command,
    with_recovery,
)

if TYPE_CHECKING:
    from rich.table import Table

    from madtp.compression import Targets


def compress(
    model: DenseModel,
    task: Task,
    data: Data,
    out: Annotated[Path, typer.Option(help="Where the report and the model go.")],
    macs: Macs = None,
    latency: Latency = None,
    params: Params = None,
    width: Width = None,
    weights: Weights = None,
    smoothing: Smoothing = None,
    correct: Correct = None,
    fit: Fit = None,
    masking: Masking = None,
    plan: Annotated[Path | None, typer.Option(help="What `madtp allocate` wrote; its target counts.")] = None,
    config: Config = None,
    steps: Annotated[int | None, typer.Option(help="Of the training; 0: one shot, no training.", min=0)] = None,
    test: Test = None,
    images: Images = None,
    limit: Limit = None,
    resume: Resume = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show the targets; nothing is trained.")] = False,
) -> None:
    """Prune the tokens and weights of a dense model in one training, and compare the two.

    Example: madtp compress runs/dense --task captioning --data emoji --macs 0.5 --out runs/half
    """
    quiet_transformers()
    from rich.console import Console

    from madtp.budgets.plan import Plan
    from madtp.compression import compress, predict_targets
    from madtp.files import require_writable
    from madtp.progress import Progress
    from madtp.reporting import report
    from madtp.tasks.registry import load

    asked, training = settings(
        config, macs=macs, latency=latency, params=params, width=width, weights=weights, smoothing=smoothing
    )
    asked = with_recovery(asked, correct=correct, fit=fit, masking=masking)
    if steps is not None:
        training["max_steps"] = steps
    chosen = None if plan is None else Plan.load(plan)
    if not dry_run:
        require_writable("out", out)
    progress, console = Progress(stderr()), Console()
    with progress.status("reading the data"):
        loaded = load(task, model, data, test=test, images=images, limit=limit)
    if dry_run:
        console.print(targets_table(predict_targets(loaded.model, loaded.task, loaded.calibration, asked, plan=chosen)))
        return
    command = typed_command()
    with says_how_to_go_on(out, command):
        result = compress(
            loaded.model,
            loaded.task,
            loaded.train,
            loaded.test,
            asked,
            output_dir=out,
            calibration_data=loaded.calibration,
            plan=chosen,
            training=training,
            resume=resume,
            progress=progress,
        )
    report.write(result.report, out, command=command)
    console.print(report.table(result.report))
    console.print(f"report.html, report.md, report.json and the model are in {out}", highlight=False)


def targets_table(targets: Targets) -> Table:
    """GMACs by branch, dense and as they are to be."""
    from madtp.reporting.tables import number_table

    branches = targets.before.branches
    macs = [(name, branches[name].dense_macs, goal) for name, goal in targets.counted_macs.items()]
    macs.append(("total", targets.before.total.dense_macs, sum(targets.counted_macs.values())))
    rows = [
        (name, f"{dense / 1e9:.4g}", f"{goal / 1e9:.4g}", f"{100 * goal / dense:.1f} %")
        for name, dense, goal in macs
        if dense
    ]
    caption = f"{len(targets.chosen)} Linears go N:M, {len(targets.dense)} stay dense"
    if targets.widths:
        caption += f"; heads or channels go from {len(targets.widths)} places"
    if targets.quantized:
        caption += f"; {len(targets.quantized)} go {targets.weight_dtype}"
    if targets.latency_reduction is not None:
        caption += f"; planned for {100 * targets.latency_reduction:.1f} % less time"
    columns = ("", "GMACs a sample, dense", "target", "")
    return number_table(columns, [rows], title="nothing was trained", caption=caption)
