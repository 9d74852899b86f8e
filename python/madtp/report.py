"""A report of `madtp.compress` for people: one table of dense against compressed, for the terminal and in Markdown."""

from __future__ import annotations

import json
from pathlib import Path

from rich.table import Table

from madtp.files import write_whole

COLUMNS = ("", "dense", "compressed", "change")


def rows(report: dict) -> list[list[tuple[str, str, str, str]]]:
    """The table as sections of rows (what, dense, compressed, change)."""
    dense, compressed = report["dense"], report["compressed"]

    def row(name: str, key: str, text) -> tuple[str, str, str, str]:
        before, after = dense[key], compressed[key]
        return name, text(before), text(after), _change(before, after)

    sections = [
        [
            (
                f"{name}, {compressed['samples']:,} samples",
                _percent(before),
                _percent(compressed["metrics"][name]),
                f"{100 * (compressed['metrics'][name] - before):+.2f} points",
            )
            for name, before in dense["metrics"].items()
        ],
        [row(f"GMACs, {kind}", f"{kind}_gmacs", "{:.4g}".format) for kind in ("dense", "counted", "executed")],
        [
            row("parameters", "params", "{:,}".format),
            row("non-zero parameters", "nonzero_params", "{:,}".format),
            row("bytes on disk", "bytes", "{:,}".format),
            row("ms per sample", "ms_per_sample", "{:.3g}".format),
        ],
    ]
    for branch, layers in compressed["tokens_per_layer"].items():
        pairs = zip(dense["tokens_per_layer"][branch], layers, strict=True)
        sections.append(
            [
                (f"tokens, {branch} layer {number}", f"{before:.1f}", f"{after:.1f}", _change(before, after))
                for number, (before, after) in enumerate(pairs, 1)
            ]
        )
    return sections


def layer_times(report: dict) -> list[tuple[str, str, str, str]]:
    """Rows of the time of every block, as those of `rows`."""
    dense, compressed = report["dense"]["ms_per_layer"], report["compressed"]["ms_per_layer"]
    return [
        (f"{branch} layer {number}", f"{before:.3g}", f"{after:.3g}", _change(before, after))
        for branch, layers in compressed.items()
        for number, (before, after) in enumerate(zip(dense[branch], layers, strict=True), 1)
    ]


def table(report: dict) -> Table:
    """The table for a rich console."""
    result = Table(*COLUMNS)
    for column in result.columns[1:]:
        column.justify = "right"
    for section in rows(report):
        for row in section:
            result.add_row(*row)
        result.add_section()
    return result


def markdown(report: dict, *, command: str, picture: str | None = None) -> str:
    """The table and what it takes to get it again.

    Args:
        command: that made the report.
        picture: path of the picture of the kept tokens, relative to the text.
    """
    plan, config = report["plan"], report["config"]
    asked = f"{_percent(plan['flops_reduction'])} fewer counted GMACs"
    if plan["latency_reduction"] is not None:
        asked = f"{_percent(plan['latency_reduction'])} less time per sample, planned as {asked}"
    lines = [_line(COLUMNS), "|---|---:|---:|---:|"]
    lines += [_line(row) for section in rows(report) for row in section]
    temperatures = ", ".join(f"{branch} {tau:.3g}" for branch, tau in plan["temperatures"].items())
    versions = ", ".join(f"{package} {version}" for package, version in report["versions"].items())
    text = ["# Dense against compressed", "\n".join(lines)]
    text.append(
        "GMACs and tokens are per sample. Dense GMACs: all tokens, all weights. Counted: tokens as kept, 2:4 linears "
        "at half. Executed: half only where a sparse kernel ran. Tokens are those after each layer, merged ones "
        "included."
    )
    times = [_line(("ms per sample", *COLUMNS[1:])), "|---|---:|---:|---:|", *map(_line, layer_times(report))]
    text.append("## Time of each layer\n\n" + "\n".join(times))
    if picture:
        text.append(f"![Tokens kept at each depth]({picture})")
    text.append(
        f"- command: `{command}`\n- seed: {config['seed']}\n"
        f"- asked for: {asked}\n"
        f"- pattern: {config['pattern']} in {len(plan['sparse_modules'])} linears, "
        f"which keeps {_percent(plan['magnitude_kept'])} of their magnitude\n"
        f"- temperatures: {temperatures}\n- versions: {versions}"
    )
    return "\n\n".join(text) + "\n"


def write(report: dict, directory: str | Path, *, command: str, picture: str | None = None) -> None:
    """Writes report.json, report.md and report.html, the last with the picture in it."""
    from madtp.report_page import page  # which needs this module

    directory = Path(directory)
    drawn = page(report, command=command, picture=None if picture is None else directory / picture)
    write_whole(directory / "report.json", json.dumps(report, indent=2) + "\n")
    write_whole(directory / "report.md", markdown(report, command=command, picture=picture))
    write_whole(directory / "report.html", drawn)


def _line(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _change(before: float, after: float) -> str:
    return f"{100 * (after / before - 1):+.1f} %"
