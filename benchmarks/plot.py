# SPDX-License-Identifier: Apache-2.0
"""Benchmarks as pictures: time and memory against the one number cases differ in, or a heat map of the speed-up."""

from __future__ import annotations

import math
from pathlib import Path


def grid(result: dict, threads: int | None) -> tuple[list[int], list[str], list[list[float]]]:
    """result: of an entry with `grid`. Values of the first key, names of the others that vary, and the speed-ups."""
    cases = [block["case"] for block in result["blocks"]]
    first, *others = cases[0]
    others = [key for key in others if any(case[key] != cases[0][key] for case in cases)]
    cells: dict[str, dict[int, float]] = {}
    for block in result["blocks"]:
        if block["threads"] == threads:
            speedups = {row["provider"]: row["speedup"]["median"] for row in block["rows"] if "speedup" in row}
            name = ", ".join(f"{key} {block['case'][key]}" for key in others)
            cells.setdefault(name, {})[block["case"][first]] = speedups.get(result["grid"], math.nan)
    across = sorted({size for row in cells.values() for size in row})
    return across, list(cells), [[row.get(size, math.nan) for size in across] for row in cells.values()]


def heat_map(result: dict, path: Path) -> None:
    """result: of an entry with `grid`. One map per thread count; white is the speed of the baseline."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import colors, pyplot

    threads = list(dict.fromkeys(block["threads"] for block in result["blocks"]))
    figure, maps = pyplot.subplots(
        1, len(threads), figsize=(2 + 6 * len(threads), 5), layout="constrained", squeeze=False
    )
    for axes, count in zip(maps[0], threads, strict=True):
        across, down, speedups = grid(result, count)
        axes.imshow(speedups, norm=colors.LogNorm(0.25, 4), cmap="RdBu", aspect="auto")
        for y, row in enumerate(speedups):
            for x, speedup in enumerate(row):
                axes.text(x, y, f"{speedup:.2f}", ha="center", va="center", fontsize=8)
        axes.set_xticks(range(len(across)), across)
        axes.set_yticks(range(len(down)), down if axes is maps[0][0] else [""] * len(down), fontsize=8)
        axes.set_xlabel(next(iter(result["blocks"][0]["case"])))
        axes.set_title("" if count is None else f"{count} threads")
    figure.suptitle(f"speed-up of {result['grid']} over {result['baseline']}")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def plot(result: dict, path: Path) -> None:
    """result: of an entry with `against`. Draws its first thread count, times in units of the baseline's first."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    blocks = [block for block in result["blocks"] if block["threads"] == result["blocks"][0]["threads"]]
    names = [row["provider"] for row in blocks[0]["rows"] if "seconds" in row]
    sizes = [block["case"][result["against"]] for block in blocks]

    def values(name: str, value) -> list[float]:
        return [value(row) for block in blocks for row in block["rows"] if row["provider"] == name]

    unit = values(result["baseline"], lambda row: row["seconds"]["median"])[0]
    figure, (time, memory) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name in names:
        time.loglog(sizes, values(name, lambda row: row["seconds"]["median"] / unit), marker="o", label=name)
        memory.loglog(sizes, values(name, lambda row: row["peak_bytes"] / 2**20), marker="o", label=name)
    time.set_ylabel(f"time, {result['baseline']} at {sizes[0]} {result['against']} = 1")
    memory.set_ylabel("memory of a call, MiB")
    for axes in (time, memory):
        axes.set_xlabel(result["against"])
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    time.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
