"""A benchmark whose cases differ in one number, as a picture: time and memory against it."""

from __future__ import annotations

from pathlib import Path


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
