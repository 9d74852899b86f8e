# SPDX-License-Identifier: Apache-2.0
"""python -m benchmarks.suite_plots SUITE.json --out FOLDER: rooflines, and a heat map of the speed-ups of all rows."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from benchmarks.result_files import ResultError, read

OURS = "madtp"


def dtype_of(case: dict) -> str:
    """Cases of whole models have none, and compute in float32."""
    return case.get("dtype", "float32")


def points(result: dict, threads: int | None) -> dict[str, list[tuple[float, float, str]]]:
    """Entry and provider of ours -> FLOPs per byte, FLOPs per second, dtype, of each row that counts FLOPs."""
    found: dict[str, list[tuple[float, float, str]]] = {}
    for entry in result["entries"]:
        for block in entry["blocks"]:
            for row in block["rows"]:
                ours = block["threads"] == threads and row["provider"].startswith(OURS)
                if ours and row.get("gflop_per_second", 0) > 0 and row.get("gb_per_second", 0) > 0:
                    intensity = row["gflop_per_second"] / row["gb_per_second"]
                    point = intensity, row["gflop_per_second"] * 1e9, dtype_of(block["case"])
                    found.setdefault(f"{entry['entry']}: {row['provider']}", []).append(point)
    return found


def roofs(ceiling: dict) -> dict[str, tuple[float, float]]:
    """Dtype -> FLOPs per byte above which the product is the roof, and its height; below it is the copy."""
    moved = ceiling["bytes_per_second"]
    return {dtype: (rate / moved, rate) for dtype, rate in ceiling["flops_per_second"].items()}


def table(result: dict, threads: int | None) -> tuple[list[str], list[str], list[list[float]]]:
    """Providers, cases, and the speed-ups; NaN where a provider has none."""
    cells: dict[str, dict[str, float]] = {}
    for entry in result["entries"]:
        for block in entry["blocks"]:
            if block["threads"] == threads:
                case = f"{entry['entry']}: " + ", ".join(map(str, block["case"].values()))
                cells[case] = {row["provider"]: row["speedup"]["median"] for row in block["rows"] if "speedup" in row}
    providers = list(dict.fromkeys(name for row in cells.values() for name in row if name.startswith(OURS)))
    return providers, list(cells), [[row.get(name, math.nan) for name in providers] for row in cells.values()]


def thread_counts(result: dict) -> list[int | None]:
    return list(dict.fromkeys(block["threads"] for entry in result["entries"] for block in entry["blocks"]))


def not_drawn(result: dict) -> str | None:
    """What the result of a suite would have to be to be drawn, or None."""
    if not thread_counts(result):
        return "must have blocks to draw, got a suite of none"
    if "/" in result["suite"]:
        return f"must be of a suite whose name can be that of a file, got {result['suite']!r}"
    for threads in thread_counts(result):
        if not table(result, threads)[0]:
            return f"must have speed-ups of {OURS} to draw, got none at {threads} threads"
        if (ceiling := result["ceilings"].get(str(threads))) is None:
            return f"must have the ceilings of its rows, got none at {threads} threads"
        if not all(
            0 < rate < math.inf for rate in (ceiling["bytes_per_second"], *ceiling["flops_per_second"].values())
        ):
            return f"must have ceilings above 0, got another at {threads} threads"
    return None


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def draw_roofline(result: dict, threads: int | None, path: Path) -> None:
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
    found = points(result, threads)
    for name, listed in found.items():
        axes.loglog([x for x, *_ in listed], [y / 1e9 for _, y, _ in listed], "o", label=name, alpha=0.8)
    intensities = [x for listed in found.values() for x, *_ in listed] or [1.0]
    ceiling = result["ceilings"][str(threads)]
    for dtype, (knee, rate) in roofs(ceiling).items():
        low, high = min([knee, *intensities]) / 2, max([knee, *intensities]) * 2
        axes.loglog([low, knee, high], [low * rate / knee / 1e9, rate / 1e9, rate / 1e9], label=f"ceiling, {dtype}")
    axes.set_xlabel("FLOPs of the dense work per byte that must move")
    axes.set_ylabel("GFLOPs per second")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    axes.set_title(f"{result['suite']}" + ("" if threads is None else f", {threads} threads"))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def draw_heat_map(result: dict, threads: int | None, path: Path) -> None:
    from matplotlib.colors import LogNorm

    pyplot = _pyplot()
    across, down, speedups = table(result, threads)
    size = 6 + 1.1 * len(across), 1.8 + 0.35 * len(down)
    figure, axes = pyplot.subplots(figsize=size, layout="constrained")
    axes.imshow(speedups, norm=LogNorm(0.25, 4), cmap="RdBu", aspect="auto")
    for y, row in enumerate(speedups):
        for x, speedup in enumerate(row):
            if not math.isnan(speedup):
                axes.text(x, y, f"{speedup:.2f}", ha="center", va="center", fontsize=8)
    axes.set_xticks(range(len(across)), across, rotation=30, ha="right", fontsize=8)
    axes.set_yticks(range(len(down)), down, fontsize=7)
    axes.set_title(f"speed-up over the baseline of each entry, {result['suite']}")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.suite_plots", description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path, metavar="SUITE.json")
    parser.add_argument("--out", type=Path, required=True, help="a folder for the pictures")
    options = parser.parse_args(arguments)
    try:
        result = read(options.result)
    except (ResultError, OSError) as error:
        parser.error(str(error))
    if "suite" not in result:
        parser.error(f"{options.result} must be of a suite, which has ceilings, got one of the entry {result['entry']}")
    if (why := not_drawn(result)) is not None:
        parser.error(f"{options.result} {why}")
    options.out.mkdir(parents=True, exist_ok=True)
    for threads in thread_counts(result):
        name = result["suite"] + ("" if threads is None else f"-{threads}-threads")
        draw_roofline(result, threads, options.out / f"{name}-roofline.png")
        draw_heat_map(result, threads, options.out / f"{name}-speedups.png")


if __name__ == "__main__":
    main()
