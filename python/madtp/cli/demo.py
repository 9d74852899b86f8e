# SPDX-License-Identifier: Apache-2.0
"""madtp demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from madtp.choices import DEMO_PICTURE, DEMO_REDUCTION, DEMO_SHARE, DEMO_STEPS
from madtp.cli.options import Limit, Resume, quiet_transformers, says_how_to_go_on, stderr, typed_command


def demo(
    macs: Annotated[float, typer.Option(help="Share of the counted MACs to save.")] = DEMO_REDUCTION,
    seed: Annotated[int, typer.Option(help="Of the alignment tokens and the order of the data.")] = 0,
    out: Annotated[Path, typer.Option(help="Where the report, the picture and the model go.")] = Path("runs/demo"),
    resume: Resume = False,
    steps: Annotated[int, typer.Option(help="Of the training.", min=1)] = DEMO_STEPS,
    limit: Limit = None,
    vlm: Annotated[
        bool, typer.Option("--vlm", help="The small LLaVA of this package instead, its image tokens pruned untrained.")
    ] = False,
    keep: Annotated[float, typer.Option(help="With --vlm: the share of the image tokens a seam leaves.")] = DEMO_SHARE,
) -> None:
    """Compress the small BLIP of this package on easy-vqa and compare it with its dense self.

    Example: madtp demo --macs 0.5 --out runs/half
    """
    quiet_transformers()
    given = {"macs": (macs, DEMO_REDUCTION), "seed": (seed, 0), "steps": (steps, DEMO_STEPS), "resume": (resume, False)}
    changed = [name for name, (value, default) in given.items() if value != default]
    if vlm and changed:
        raise ValueError(f"{changed[0]} must be left out with --vlm, which trains nothing, got {given[changed[0]][0]}")
    if not vlm and keep != DEMO_SHARE:
        raise ValueError(f"keep must come with --vlm, got {keep} without")
    if vlm:
        _vlm(out, keep, limit)
        return
    from rich.console import Console

    from madtp.demo import run
    from madtp.reporting import report

    command = typed_command()
    with says_how_to_go_on(out, command):
        result = run(
            out, macs=macs, seed=seed, steps=steps, limit=limit, resume=resume, command=command, console=stderr()
        )
    console = Console()
    console.print(report.table(result.report))
    console.print(f"report.html, report.md, report.json, {DEMO_PICTURE} and the model are in {out}", highlight=False)


def _vlm(out: Path, share: float, limit: int | None) -> None:
    from rich.console import Console

    from madtp import vlm_demo
    from madtp.reporting.tables import number_table

    report = vlm_demo.run(out, share=share, limit=limit, command=typed_command(), console=stderr())
    console = Console()
    console.print(number_table(vlm_demo.ANSWERS, [vlm_demo.answer_rows(report)]))
    console.print(number_table(vlm_demo.COLUMNS, [vlm_demo.table_rows(report)]))
    console.print(f"report.md, report.json and {DEMO_PICTURE} are in {out}", highlight=False)
