# SPDX-License-Identifier: Apache-2.0
"""madtp demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from madtp.choices import DEMO_PICTURE, DEMO_REDUCTION, DEMO_STEPS
from madtp.cli.options import Limit, Resume, quiet_transformers, says_how_to_go_on, stderr, typed_command


def demo(
    macs: Annotated[float, typer.Option(help="Share of the counted MACs to save.")] = DEMO_REDUCTION,
    seed: Annotated[int, typer.Option(help="Of the alignment tokens and the order of the data.")] = 0,
    out: Annotated[Path, typer.Option(help="Where the report, the picture and the model go.")] = Path("runs/demo"),
    resume: Resume = False,
    steps: Annotated[int, typer.Option(help="Of the training.", min=1)] = DEMO_STEPS,
    limit: Limit = None,
) -> None:
    """Compress the small BLIP of this package on easy-vqa and compare it with its dense self.

    Example: madtp demo --macs 0.5 --out runs/half
    """
    quiet_transformers()
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
