# SPDX-License-Identifier: Apache-2.0
"""Results as tables: on the terminal while they come, and as docs/benchmarks.md from the committed files.

Times of a CPU are shown as ratios only: its absolute times say more of the machine than of the code.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.plot import grid, heat_map, plot

DOCUMENT = Path(__file__).parents[1] / "docs" / "benchmarks.md"
HEADER = """# Benchmarks

Made by `make bench` and `make bench-peers` from the files in `benchmarks/results/`; slower rows included. In each table
all providers did the same work with the same threads, in turns in one process, on data that no cache holds, after a
check of their results. *Speed-up* is over the baseline: the median of the ratios of neighbouring runs, and their 20th
and 80th percentile. *Memory* is the most a call held at once, its result included. Freed memory stays with the process,
as with a server's allocator. *One call* is all that a provider had which takes long; one that takes very long is not
called in cases with more work.

`make bench-peers` runs `quantized_linear` and `towers`. Their peers come with `pip install -e .[peers]`; without them
their rows are missing. Exported models are kept in `MADTP_CACHE`, so that a second run does not export again.
`LAYERS=4` takes that many blocks of each tower, and `python -m benchmarks.run towers --set batch=4` other batches.

Suites, ceilings, and how to compare two runs: [measure and compare](measuring.md).
"""
NO_BFLOAT16 = "This CPU has no bfloat16 instructions: what is called bfloat16 emulates them, or runs in float32.\n"


def title(block: dict) -> str:
    case = ", ".join(f"{name} {value}" for name, value in block["case"].items())
    return case if block["threads"] is None else f"{case}, {block['threads']} threads"


def columns(row: dict, baseline: str, device_is_cpu: bool) -> tuple[str, ...] | None:
    """provider, speed-up, spread, memory (and time on a GPU); None for a provider that could not run here."""
    if "unavailable" in row:
        return None
    if "wrong" in row:
        return row["provider"], "wrong", row["wrong"], ""
    speedup, name = row.get("speedup"), row["provider"] + (" (baseline)" if row["provider"] == baseline else "")
    ratio, spread = (
        ("", "") if speedup is None else (f"{speedup['median']:.2f}x", f"{speedup['p20']:.2f}-{speedup['p80']:.2f}")
    )
    if row.get("turns") == 0:
        spread = "one call"
    cells = (name, ratio, spread, f"{row['peak_bytes'] / 2**20:.1f} MiB" if "peak_bytes" in row else "")
    return cells if device_is_cpu else (*cells, f"{row['seconds']['median'] * 1e6:.1f} us")


def headings(device_is_cpu: bool) -> tuple[str, ...]:
    return ("provider", "speed-up", "20-80 %", "memory") + (() if device_is_cpu else ("median",))


def print_table(entry, block: dict) -> None:
    on_cpu = block["threads"] is not None
    held = any("of_ceiling" in row for row in block["rows"])
    heads = headings(on_cpu) + (("of ceiling",) if held else ())
    table = Table(*heads, title=f"{entry.name}: {title(block)}", title_justify="left")
    for row in block["rows"]:
        if (cells := columns(row, entry.baseline, on_cpu)) is not None:
            table.add_row(*cells, *([f"{row['of_ceiling']:.0%}"] if "of_ceiling" in row else []))
    Console().print(table)


def print_unavailable(entry: str, reasons: Mapping[str, str]) -> None:
    for provider, reason in reasons.items():
        print(f"{entry}: {provider} did not run: {reason}")


def mean_tables(result: dict) -> str:
    """Geometric means over the cases that agree but for `means`, with the least and the largest speed-up among them.

    A table for each thread count and for each value of the keys that are left, the first of them across.
    """
    first, *rest = (key for key in result["blocks"][0]["case"] if key not in result["means"])
    tables: dict[str, dict[str, dict]] = {}  # title -> provider -> column -> speed-ups
    for block in result["blocks"]:
        case = block["case"]
        named = title({"case": {key: case[key] for key in rest}, "threads": block["threads"]})
        table = tables.setdefault(named, {})
        for row in block["rows"]:
            cell = table.setdefault(row["provider"], {}).setdefault(case[first], [])
            cell.append(row["speedup"]["median"] if "speedup" in row else None)
    parts = []
    for name, table in tables.items():
        across = list(next(iter(table.values())))
        lines = [f"| {first} | {' | '.join(map(str, across))} |", "|---" * (1 + len(across)) + "|"]
        for provider, cells in table.items():
            if any(speedup for cell in cells.values() for speedup in cell):
                label = provider + (" (baseline)" if provider == result["baseline"] else "")
                lines.append(f"| {label} | {' | '.join(_mean(cells.get(column, [])) for column in across)} |")
        parts.append(f"**{name}**\n\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


def _mean(cell: list[float | None]) -> str:
    speedups = [speedup for speedup in cell if speedup is not None]
    if not speedups:
        return "not called"
    mean = math.exp(sum(map(math.log, speedups)) / len(speedups))
    part = "" if len(speedups) == len(cell) else f" in {len(speedups)} of {len(cell)}"
    return f"{mean:.2f}x ({min(speedups):.2f}-{max(speedups):.2f}){part}"


def reasons(result: dict) -> str:
    """Which providers did not run in some or all of the cases, and why."""
    found: dict[str, str] = {}
    for block in result["blocks"]:
        found |= {row["provider"]: row["unavailable"] for row in block["rows"] if "unavailable" in row}
    return "".join(f"* {provider}: {reason}.\n" for provider, reason in found.items())


def machine_name(about: dict, on_cpu: bool) -> str:
    if not on_cpu:
        return about["device"]
    if "cores" not in about:
        return f"CPU, {about['cpu_isa']}"
    return f"CPU, {about['cpu_isa']}: {about['device']}, {about['cores']} cores"


def grid_table(result: dict, threads: int | None) -> str:
    """The speed-ups of an entry with `grid`, a row for each of its other keys' values."""
    across, down, speedups = grid(result, threads)
    title = next(iter(result["blocks"][0]["case"])) + ("" if threads is None else f", {threads} threads")
    lines = [f"| {title} | {' | '.join(map(str, across))} |", "|---" * (1 + len(across)) + "|"]
    lines += [f"| {name} | {' | '.join(f'{v:.2f}x' for v in row)} |" for name, row in zip(down, speedups, strict=True)]
    return "\n".join(lines) + "\n"


def parts_table(block: dict) -> str:
    """Where each provider's time goes."""
    rows = [row for row in block["rows"] if "parts" in row]
    kinds = list(rows[0]["parts"])
    lines = [f"| share of the operations' time | {' | '.join(kinds)} |", "|---" * (1 + len(kinds)) + "|"]
    for row in rows:
        cells = (f"{row['parts'][kind]:.0%}" for kind in kinds)
        lines.append(f"| {row['provider']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def write_document(results: Path, document: Path = DOCUMENT) -> None:
    """docs/benchmarks.md from every results file."""
    parts = [HEADER]
    for path in sorted(results.glob("*/*.json")):
        result = json.loads(path.read_text())
        if "blocks" not in result:
            continue
        about = result["machine"]
        on_cpu = result["blocks"][0]["threads"] is not None
        parts.append(f"## {result['entry']} ({machine_name(about, on_cpu)})\n")
        parts.append(f"{result['summary'][:1].upper()}{result['summary'][1:]}; torch {about['torch']}.\n")
        if len(peers := [f"{name} {about[name]}" for name in result.get("packages", ()) if name in about]):
            parts.append(f"Beside it: {', '.join(peers)}.\n")
        if about.get("cpu_bfloat16") is False:
            parts.append(NO_BFLOAT16)
        if result.get("packages") and (missing := reasons(result)):
            parts.append(f"Not called, everywhere or in cases with more work:\n\n{missing}")
        if result.get("means"):
            parts.append(mean_tables(result))
            continue
        picture = document.with_name(f"benchmark-{path.parent.name}-{result['entry']}.png")
        if result.get("grid") is not None:
            heat_map(result, picture)
            parts.append(f"![speed-up of {result['grid']} over {result['baseline']}]({picture.name})\n")
            parts += [grid_table(result, count) for count in dict.fromkeys(b["threads"] for b in result["blocks"])]
            continue
        if result.get("against") is not None:
            plot(result, picture)
            parts.append(f"![time and memory against {result['against']}]({picture.name})\n")
        for block in result["blocks"]:
            heads = headings(on_cpu)
            lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
            rows = (columns(row, result["baseline"], on_cpu) for row in block["rows"])
            lines += [f"| {' | '.join(cells)} |" for cells in rows if cells is not None]
            parts.append(f"**{title(block)}**\n\n" + "\n".join(lines) + "\n")
            if "parts" in block["rows"][0]:
                parts.append(parts_table(block))
    document.write_text("\n".join(parts))
