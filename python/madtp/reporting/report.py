# SPDX-License-Identifier: Apache-2.0
"""A report of `madtp.compress` for people: one table of dense against compressed, for the terminal and in Markdown."""

from __future__ import annotations

import json
from pathlib import Path

from rich.table import Table

from madtp.files import atomic_write
from madtp.reporting.page import page
from madtp.reporting.rows import COLUMNS, layer_times, percent, rows
from madtp.reporting.tables import markdown_table, number_table


def table(report: dict) -> Table:
    """The table for a rich console."""
    return number_table(COLUMNS, rows(report))


def markdown(report: dict, *, command: str, picture: str | None = None) -> str:
    """The table and what it takes to get it again.

    Args:
        command: that made the report.
        picture: path of the picture of the kept tokens, relative to the text.
    """
    compared = markdown_table(COLUMNS, [row for section in rows(report) for row in section])
    text = ["# Dense against compressed", compared]
    text.append(
        "GMACs and tokens are per sample. Dense GMACs: all tokens, all weights. Counted: tokens as kept, 2:4 linears "
        "at half. Executed: half only where a sparse kernel ran. GBOPs: 10^9 bit operations, counted MACs times the "
        "bits of both operands. Bytes of weights: as the model holds them in memory. Tokens are those after each "
        "layer, merged ones included."
    )
    text.append("## Time of each layer\n\n" + markdown_table(("ms per sample", *COLUMNS[1:]), layer_times(report)))
    if picture:
        text.append(f"![Tokens kept at each depth]({picture})")
    text.append(_how(report, command))
    return "\n\n".join(text) + "\n"


def write(report: dict, directory: str | Path, *, command: str, picture: str | None = None) -> None:
    """Writes report.json, report.md and report.html, the last with the picture in it."""
    directory = Path(directory)
    drawn = page(report, command=command, picture=None if picture is None else directory / picture)
    atomic_write(directory / "report.json", json.dumps(report, indent=2) + "\n")
    atomic_write(directory / "report.md", markdown(report, command=command, picture=picture))
    atomic_write(directory / "report.html", drawn)


def _how(report: dict, command: str) -> str:
    """A list of what was asked for and what was done."""
    plan, config = report["plan"], report["config"]
    asked = f"{percent(plan['macs_reduction'])} fewer counted GMACs"
    if plan["latency_reduction"] is not None:
        asked = f"{percent(plan['latency_reduction'])} less time per sample, planned as {asked}"
    rounded = plan["quantized_modules"]
    weights = f"- weights: {config['weight_dtype']} in {len(rounded)} linears\n" if rounded else ""
    temperatures = ", ".join(f"{branch} {tau:.3g}" for branch, tau in plan["temperatures"].items())
    versions = ", ".join(f"{package} {version}" for package, version in report["versions"].items())
    return (
        f"- command: `{command}`\n- seed: {config['seed']}\n"
        f"- asked for: {asked}\n"
        f"- pattern: {config['pattern']} in {len(plan['sparse_modules'])} linears, "
        f"which keeps {percent(plan['magnitude_kept'])} of their magnitude\n"
        f"{weights}- temperatures: {temperatures}\n- versions: {versions}"
    )
