# SPDX-License-Identifier: Apache-2.0
"""docs/experiments.md with its plot, and the tables of the README, from the results: `python -m experiments.table`."""

from __future__ import annotations

import statistics
from collections import defaultdict
from pathlib import Path

from madtp.files import atomic_write

from . import seam_tables
from .results import FOLDER, read
from .run import BATCH
from .tasks import EXPERIMENTS
from .variants import COMPARED_AT, REDUCTIONS, VARIANTS

ROOT = Path(__file__).parents[1]
README, DOCUMENT = ROOT / "README.md", ROOT / "docs" / "experiments.md"
MARKS = "<!-- experiments -->", "<!-- /experiments -->"
MAX_POINTS_LOST = {0.5: 1.0, 0.7: 3.0}  # reduction -> points below the dense model, at most
MAX_POINTS_LOST_BY_INT8 = 0.3  # below the same with float32 weights
SAME = 0.1  # points of the metric that make no difference
METRICS = {"accuracy": "accuracy", "recall@1": "recall@1", "bleu4": "BLEU-4"}


def mean(rows: list[dict], value) -> str:
    """Of the seeds, and from the least to the most where there are several."""
    values = [value(row) for row in rows]
    text = f"{statistics.mean(values):.2f}"
    return text if len(values) == 1 else f"{text} ({min(values):.2f} to {max(values):.2f})"


def points(result: dict):
    """row -> the main metric, in percent."""
    return lambda row: 100 * row["metrics"][result["metric"]]


def lost(result: dict, dense: dict):
    """row -> points of the main metric below the dense model"""
    metric = points(result)
    return lambda row: metric(dense) - metric(row)


def lost_by_int8(result: dict):
    """row -> points of the main metric below the one beside it"""
    metric = points(result)
    return lambda row: metric(row["beside"]) - metric(row)


def share_of_dense(row: dict, gmacs: str) -> float:
    return row[gmacs] / row.get("whole_gmacs", row["dense_gmacs"])


def saved(row: dict) -> float:
    """Counted MACs saved on the test set, in percent of the dense ones."""
    return 100 * (1 - share_of_dense(row, "counted_gmacs"))


def grouped(result: dict) -> dict[tuple[str, float], list[dict]]:
    """(variant, reduction) -> its rows, one for each seed, none where the budget cannot be reached."""
    found = defaultdict(list)
    for row in result["rows"]:
        rows = found[row["variant"], row["reduction"]]
        if "unreachable" not in row:
            rows.append(row)
    return found


def cell(result: dict, variant: str, reduction: float) -> str:
    """The metric, "not reached", or nothing where nobody tried."""
    rows = grouped(result)
    if (variant, reduction) not in rows:
        return ""
    return mean(rows[variant, reduction], points(result)) if rows[variant, reduction] else "not reached"


def table(head: list[str], lines: list[list[str]]) -> str:
    rows = [head, ["---", *["---:"] * (len(head) - 1)], *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def budgets(results: list[dict]) -> str:
    """A row for each task: dense, then the method at every budget."""
    lines = []
    for result in results:
        cells = [cell(result, "joint", reduction) for reduction in REDUCTIONS]
        title = EXPERIMENTS[result["task"]].title
        lines.append([f"{title}: {METRICS[result['metric']]}, %", cell(result, "dense", 0.0), *cells])
    return table(["", "dense", *(f"-{100 * r:.0f} %" for r in REDUCTIONS)], lines)


def comparison(results: list[dict]) -> str:
    """A row for each variant that was tried at one budget, a column for each task. Those put beside another one have a
    table of their own."""
    lines = []
    for name, variant in VARIANTS.items():
        if variant.beside is not None:
            continue
        cells = [cell(result, name, COMPARED_AT) for result in results]
        if any(cells):
            lines.append([variant.title, *cells])
    heads = [f"{result['task']}, {METRICS[result['metric']]}" for result in results]
    return table([f"-{100 * COMPARED_AT:.0f} % counted MACs", *heads], lines)


def int8(results: list[dict]) -> str:
    """A row for each pair of models, the weights of one in float32 and of the other in int8."""
    lines = []
    for result in results:
        metric, less = points(result), lost_by_int8(result)
        rows = [row for (name, _), of in grouped(result).items() if name == "int8" for row in of]
        for row in sorted(rows, key=lambda row: (row["reduction"], row["seed"])):
            other = row["beside"]
            lines.append(
                [
                    f"{result['task']}, -{100 * row['reduction']:.0f} %, seed {row['seed']}",
                    f"{metric(other):.2f}",
                    f"{metric(row):.2f}",
                    f"{less(row):.2f} ± {100 * row['difference_error']:.2f}",
                    *(f"{each['weight_bytes']:,}" for each in (other, row)),
                    f"{100 * (row['weight_bytes'] / other['weight_bytes'] - 1):.0f} %",
                    *(f"{each['counted_gbops']:.4g}" for each in (other, row)),
                ]
            )
    heads = ["", "float32, %", "int8, %", "points lost", "weight bytes, float32", "int8", "change"]
    return table([*heads, "10^9 bit operations, float32", "int8"], lines)


def details(result: dict) -> str:
    """Every row of a task."""
    lines = []
    for row in result["rows"]:
        name = VARIANTS[row["variant"]].title if row["variant"] in VARIANTS else row["variant"]
        start = [name, "" if not row["reduction"] else f"-{100 * row['reduction']:.0f} %", str(row["seed"])]
        if "unreachable" in row:
            lines.append([*start, "not reached", "", "", "", ""])
            continue
        metrics = ", ".join(f"{metric} {value:.4f}" for metric, value in row["metrics"].items())
        others = "; ".join(f"{what}: {metric[result['metric']]:.4f}" for what, metric in row.get("others", {}).items())
        macs = f"{row['counted_gmacs']:.4g} ± {row['counted_gmacs_error']:.1g} (-{saved(row):.1f} %)"
        minutes = f"{row['minutes']:.1f}" if "minutes" in row else ""  # none where the process was stopped for a while
        lines.append([*start, metrics, others, macs, f"{row['nonzero_params']:,}", minutes])
    heads = ["", "asked", "seed", "test", "elsewhere", "counted GMACs on the test set", "non-zero parameters", "min"]
    return table(heads, lines)


def published(results: list[dict]) -> str:
    """The rule of the released code on the same models."""
    lines = []
    for result in results:
        for row in result["rows"]:
            other = row.get("batch_max")
            if other is None:
                continue
            less = 100 * (1 - other["instance_gmacs"] / other["counted_gmacs"])
            metric = result["metric"]
            lines.append(
                [
                    f"{result['task']}, -{100 * row['reduction']:.0f} %, seed {row['seed']}",
                    f"{100 * row['metrics'][metric]:.2f}",
                    f"{other['instance_gmacs']:.4g}",
                    f"{100 * other['metrics'][metric]:.2f}",
                    f"{other['counted_gmacs']:.4g}",
                    f"{less:.1f} %",
                ]
            )
    heads = ["", "each its own, %", "GMACs", f"batch maximum of {BATCH}, %", "GMACs", "saved by each its own"]
    return table(heads, lines)


def targets(results: list[dict]) -> str:
    """What was aimed at, and what came. The worst seed and the worst row decide."""
    lines = []
    for result in results:
        rows, metric = grouped(result), points(result)
        (dense,) = rows["dense", 0.0]
        for reduction, most in MAX_POINTS_LOST.items():
            ours = rows.get(("joint", reduction), [])
            if ours:
                what = f"points lost at -{100 * reduction:.0f} %, at most {most:g}"
                holds = metric(dense) - min(map(metric, ours)) <= most
                lines.append([result["task"], what, mean(ours, lost(result, dense)), _holds(holds)])
        ours = rows.get(("joint", COMPARED_AT), [])
        others = [("tokens", COMPARED_AT), ("weights", COMPARED_AT)]
        if ours and any(name in rows for name in others):
            reached = [metric(row) for name in others for row in rows.get(name, [])]
            best = f"{max(reached):.2f}" if reached else "neither reaches it"
            better = not reached or statistics.mean(map(metric, ours)) > max(reached)
            what = f"at -{100 * COMPARED_AT:.0f} % better than tokens or weights only"
            lines.append([result["task"], what, f"{mean(ours, metric)} against {best}", _holds(better)])
        for reduction in VARIANTS["int8"].reductions:
            ours = rows.get(("int8", reduction), [])
            if ours:
                less = lost_by_int8(result)
                at = f"at -{100 * reduction:.0f} %, at most {MAX_POINTS_LOST_BY_INT8:g}"
                what = f"points more lost with int8 weights than with float32 ones {at}"
                holds = max(map(less, ours)) <= MAX_POINTS_LOST_BY_INT8
                errors = ", ".join(f"{100 * row['difference_error']:.2f}" for row in ours)
                found = f"{mean(ours, less)}, standard error of each {errors}"
                lines.append([result["task"], what, found, _holds(holds)])
        every = [row for (_, reduction), of in rows.items() for row in of if reduction]
        if every:
            what = "counted MACs on the test set, percent off the target, at most 1"
            off = [100 * abs(share_of_dense(row, "counted_gmacs") / (1 - row["reduction"]) - 1) for row in every]
            error = statistics.median(
                100 * share_of_dense(row, "counted_gmacs_error") / (1 - row["reduction"]) for row in every
            )
            found = f"median {statistics.median(off):.2f}, most {max(off):.2f}, standard error {error:.2f}"
            lines.append([result["task"], what, found, _holds(max(off) <= 1)])
        less = at_equal_accuracy(result)
        if less:
            what = f"percent fewer MACs than the batch maximum at an accuracy at most {SAME:g} points lower, at least 5"
            lines.append([result["task"], what, f"{min(less):.1f} to {max(less):.1f}", _holds(min(less) >= 5)])
    return table(["", "aim", "measured", ""], lines)


def at_equal_accuracy(result: dict) -> list[float]:
    """For every model under the published rule: how much less the cheapest model of the method costs, in percent, of
    those that are as good within `SAME` points. Models under the published rule that none equals are left out."""
    rows, metric = [row for row in result["rows"] if "batch_max" in row], points(result)
    found = []
    for other in (row["batch_max"] for row in rows):
        as_good = [row for row in rows if metric(row) >= metric(other) - SAME]
        if as_good:
            cheapest = min(row["batch_max"]["instance_gmacs"] for row in as_good)
            found.append(100 * (1 - cheapest / other["counted_gmacs"]))
    return found


def _holds(true: bool) -> str:
    return "holds" if true else "does not hold"


def plot(results: list[dict], path: Path) -> None:
    """Metric against counted GMACs, a panel for each task."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        1, len(results), figsize=(4 * len(results), 3.6), layout="constrained", squeeze=False
    )
    for axes, result in zip(panels[0], results, strict=True):
        metric, left = points(result), lambda row: 100 - saved(row)
        rows = grouped(result)
        front = sorted((row for (name, _), of in rows.items() if name in ("joint", "dense") for row in of), key=left)
        axes.plot([left(row) for row in front], [metric(row) for row in front], "o-", label="MADTP++", color="black")
        for color, (name, variant) in enumerate(VARIANTS.items()):
            others = rows.get((name, COMPARED_AT), [])
            if name != "joint" and variant.beside is None and others:
                axes.scatter(
                    [left(row) for row in others],
                    [metric(row) for row in others],
                    label=variant.title,
                    s=18,
                    color=f"C{color}",
                )
        axes.set_title(EXPERIMENTS[result["task"]].title, fontsize=9)
        axes.set_xlabel("counted MACs, % of dense")
        axes.set_ylabel(f"{METRICS[result['metric']]}, %")
    panels[0][0].legend(fontsize=6)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def document(results: list[dict], preset: str, picture: str) -> str:
    text = [
        f"# Accuracy against compute, preset {preset}\n",
        "Made by `python -m experiments.table` from the files in `experiments/results/`; a task's rows are made by "
        "`python -m experiments.run TASK`.\n"
        "Each compression starts from the same dense model; it plans its budgets, trains, and calibrates its "
        "temperatures on samples that are not of the test (where concepts are split, of some that are in neither "
        "part); all figures are of the saved model on the test set.\n"
        "Where there are several seeds, the mean, and least to most.\n"
        "Behind ± is the standard error: samples keep different numbers of tokens, so the mean cost of a test set "
        "misses its target by chance too.\n"
        "[What was tried](experiments-notes.md).\n",
        f"![Metric against counted MACs]({picture})\n",
        "## Budgets\n",
        budgets(results),
        "## Compared at one budget\n",
        comparison(results),
        "## int8 weights\n",
        "The same training twice on one machine, from one dense model, with one plan and one seed: all weights in "
        "float32, those of the chosen Linears 2:4; and with all Linears that could go 2:4 in int8, which compute so in "
        "the last fifth of the training too.\n"
        "These pairs are of another machine than the rows above, and their float32 models differ from those by what "
        "that does to a training.\n"
        "Behind ± is the standard error of the difference, from the answers of both models to the same samples.\n"
        "Weight bytes are of all parameters, those that stay in float32 included; bit operations count a multiply-add "
        "by the bits of both its operands, 8 x 8 or 32 x 32.\n",
        int8(results),
        "## What was aimed at\n",
        targets(results),
        "## Each sample its own number of tokens, or the batch's maximum\n",
        "The same model at the same temperatures under both rules: the published one keeps more tokens, and with them "
        "some accuracy. What it costs at equal accuracy is above.\n",
        published(results),
    ]
    for result in results:
        settings = ", ".join(f"{name} {value}" for name, value in result["settings"].items() if value is not None)
        text += [f"## {EXPERIMENTS[result['task']].title}\n", f"{result['machine']}; {settings}.\n", details(result)]
    return "\n".join(text)


def whole(results: list[dict], preset: str, picture: str, seams: list[dict]) -> str:
    """The document, with the part of decoders behind the tasks."""
    return "\n".join(filter(None, (document(results, preset, picture), seam_tables.section(seams))))


def section(results: list[dict]) -> str:
    """What the README shows."""
    return f"\n{budgets(results)}\n"


def load(preset: str, folder: Path = FOLDER) -> list[dict]:
    paths = [folder / preset / f"{task}.json" for task in EXPERIMENTS]
    return [read(path) for path in paths if path.exists()]


def replaced(text: str, section: str) -> str:
    """`text` with what is between `MARKS` replaced."""
    before, _, rest = text.partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    return f"{before}{MARKS[0]}\n{section}{MARKS[1]}{after}"


def main() -> None:
    results = load("cpu")
    picture = DOCUMENT.with_name("experiments-cpu.png")
    plot(results, picture)
    atomic_write(DOCUMENT, whole(results, "cpu", picture.name, seam_tables.load()))
    atomic_write(README, replaced(README.read_text(encoding="utf-8"), section(results)))


if __name__ == "__main__":
    main()
