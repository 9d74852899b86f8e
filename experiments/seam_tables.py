# SPDX-License-Identifier: Apache-2.0
"""What docs/experiments.md says of decoders that read images, from the results of `experiments.seams`."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

from madtp.reporting.tables import markdown_table
from madtp.tasks.small_vlms import SMALL_VLMS

from .paired import jackknife
from .results import FOLDER, read
from .seams import EQUAL_TIME_AT, PREFILL_LAYER, RULES, TRAINED, TRAINED_AT

WIDE = 1.96  # standard errors on either side of a difference: nineteen of twenty intervals hold the true one
ORDER = (1 / 2, 1 / 4, 1 / 9)
NAMES = {1 / 2: "1/2", 1 / 4: "1/4", 1 / 9: "1/9"}
SEAMS = {"vision": "tower", "projector": "projector", "prefill": f"decoder, layer {PREFILL_LAYER}"}
GUIDED = (  # seam, a rule that knows the question, one that does not
    ("projector", "text", "uniform"),
    ("projector", "cdpruner", "divprune"),
    ("prefill", "fastv", "uniform"),
    ("prefill", "fastv", "received"),
)
Pair = tuple[float, float]  # a difference in points, and half of its interval


def load(folder: Path = FOLDER) -> list[dict]:
    paths = [folder / "cpu" / f"seams-{name}.json" for name in SMALL_VLMS]
    return [read(path) for path in paths if path.exists()]


def find(result: dict, kind: str, seam: str, rule: str, share: float) -> list[dict]:
    """The rows of all seeds."""
    key = f"{kind} {seam} {rule}", round(share, 4)
    return [row for row in result["rows"] if (row["variant"], row["share"]) == key]


def dense_of(result: dict) -> dict:
    return next(row for row in result["rows"] if row["variant"] == "dense")


def difference(first: dict, second: dict) -> Pair:
    """Of two rows on the same samples: points of accuracy by which the first is better."""
    right = [[int(digit) for digit in row["right"]] for row in (first, second)]
    return 100 * (fmean(right[0]) - fmean(right[1])), 100 * WIDE * jackknife(fmean, *right)


def verdict(pair: Pair) -> str:
    middle, half = pair
    if middle - half > 0:
        return "holds"
    return "does not hold, it is the other way" if middle + half < 0 else "not decided"


def every_rule(result: dict) -> str:
    """A row for each seam and rule, a column for each share."""
    lines = []
    for seam, title in SEAMS.items():
        for rule in RULES[seam]:
            rows = [find(result, "training_free", seam, rule, share) for share in ORDER]
            if any(rows):
                lines.append([f"{title}: {rule}", *(_accuracy(of) for of in rows), *(_time(of) for of in rows)])
    heads = [f"{NAMES[share]} kept" for share in ORDER] + [f"time, {NAMES[share]}" for share in ORDER]
    return markdown_table(["accuracy, %", *heads], lines)


def by_kind(result: dict, share: float = 1 / 4) -> str:
    """A column for each kind of question, at one share; dense first."""
    dense = dense_of(result)
    kinds = list(dense["kinds"])
    lines = [["dense", *(f"{100 * dense['kinds'][kind]:.1f}" for kind in kinds)]]
    for seam, title in SEAMS.items():
        for rule in RULES[seam]:
            rows = find(result, "training_free", seam, rule, share)
            if rows:
                values = [fmean(row["kinds"][kind] for row in rows) for kind in kinds]
                lines.append([f"{title}: {rule}", *(f"{100 * value:.1f}" for value in values)])
    return markdown_table([f"accuracy, %, {NAMES[share]} kept", *kinds], lines)


def claims(result: dict) -> str:
    """What is claimed, what was measured, and whether it holds."""
    lines = []
    for seam, rule in TRAINED.items():
        free = find(result, "training_free", seam, rule, TRAINED_AT)
        trained = find(result, "trained", seam, rule, TRAINED_AT)
        what = f"trained beats training-free: {SEAMS[seam]}, {rule}, {NAMES[TRAINED_AT]}"
        lines += _compared(what, trained, free)
    for seam, guided, blind in GUIDED:
        for share in ORDER:
            what = f"text-guided beats blind: {SEAMS[seam]}, {guided} and {blind}, {NAMES[share]}"
            pair = (find(result, "training_free", seam, rule, share) for rule in (guided, blind))
            lines += _compared(what, *pair)
    tower = find(result, "training_free", "vision", TRAINED["vision"], EQUAL_TIME_AT)
    for rule in ("fastv", "received"):
        other = find(result, "equal_time", "prefill", rule, EQUAL_TIME_AT)
        counts = f", {other[0]['count']} tokens left" if other else ""
        if other and not other[0]["reached"]:
            counts += ", which is slower still"
        what = f"the tower's seam ({TRAINED['vision']}, {NAMES[EQUAL_TIME_AT]}) beats the decoder's ({rule}{counts}) "
        lines += _compared(f"{what}at equal time to the first token", tower, other)
    return markdown_table(["claim", "points, 95 % interval", ""], lines)


def section(results: list[dict]) -> str:
    """The part of the document; empty where nothing was measured."""
    text = []
    for result in results:
        dense = dense_of(result)
        cost = dense["cost"]
        share = 100 * cost["tower"] / cost["first_token"]
        text += [
            f"## Decoders that read images: {result['model']}\n",
            f"Image tokens pruned in a small {result['model']} ({result['parameters'] / 1e6:.1f} M parameters, 64 "
            f"tokens an image, {share:.0f} % of the multiply-adds to the first token in the tower), "
            f"{result['records']:,} questions about mosaics (`madtp.data.mosaics`), greedy answers; "
            f"{result['machine']}; rows by `python -m experiments.run {result['model']}`.\n"
            f"Dense: {100 * dense['accuracy']:.1f} %. Nothing is trained but where that is said.\n"
            "Time is that to the first token, of a prompt in a forward of 16, as a share of that of the dense model, "
            "which took turns with it; models this small spend much of it outside of products.\n",
            every_rule(result) + "\n",
            "By kind of question, as tokens go; `read` and `character` are of drawn characters:\n",
            by_kind(result) + "\n",
            "What is claimed of pruning, and whether it holds here; differences are of the same questions, their "
            "intervals 1.96 standard errors of a delete-a-group jackknife on either side:\n",
            claims(result) + "\n",
        ]
    return "\n".join(text)


def _accuracy(rows: list[dict]) -> str:
    return "not measured" if not rows else f"{100 * fmean(row['accuracy'] for row in rows):.1f}"


def _time(rows: list[dict]) -> str:
    return f"{fmean(row['times']['pruned'] / row['times']['dense'] for row in rows):.2f}" if rows else ""


def _compared(what: str, first: list[dict], second: list[dict]) -> list[list[str]]:
    """A line for each seed of the first; one that says so where one of the two was not measured."""
    if not first or not second:
        return [[what, "", "not measured"]]
    lines = []
    for row in first:
        pair = difference(row, second[0])
        seed = f", seed {row['seed']}" if len(first) > 1 else ""
        lines.append([what + seed, f"{pair[0]:+.1f} ± {pair[1]:.1f}", verdict(pair)])
    return lines
