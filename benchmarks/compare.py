# SPDX-License-Identifier: Apache-2.0
"""python -m benchmarks.compare BEFORE.json AFTER.json: which rows got slower beyond their spread, and which faster.

A row is slower when the whole spread of the second run, 20th to 80th percentile, lies on the slow side of that of the
first, and the medians differ by more than --least and by more than the noise: what nine in ten rows of the peers
changed by, whose code is the same in both runs. What is within that is the same. The exit code is 1 where a provider of
ours got slower, its result is wrong by now or its times are gone, 2 where the files cannot be compared.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks.result_files import ResultError, entries_of, read

LEAST = 0.03
NOISE_SHARE = 0.9  # of the peers' rows, that change by no more than the noise
OURS = "madtp"  # how the names of our providers begin
SLOWER, FASTER, SAME, ONE_CALL, WRONG, GONE, NEW = "slower", "faster", "same", "one call", "wrong", "gone", "new"
BAD = (SLOWER, WRONG, GONE)


class Change(NamedTuple):
    """A row of two runs. ratio: the time of the second over that of the first, least, median and most."""

    row: tuple[str, str, int | None, str]  # entry, case, threads, provider
    verdict: str
    ratio: tuple[float, float, float] | None

    @property
    def is_ours(self) -> bool:
        return self.row[3].startswith(OURS)


def rows_of(result: dict) -> dict[tuple, dict]:
    """(entry, case, threads, provider) -> its row."""
    found = {}
    for entry in entries_of(result):
        for block in entry["blocks"]:
            case = ", ".join(f"{key} {value}" for key, value in block["case"].items())
            for row in block["rows"]:
                found[entry["entry"], case, block["threads"], row["provider"]] = row
    return found


def spread(row: dict, by: str) -> tuple[float, float, float] | None:
    """Least, median and most of the cost of a row: its time, or its time over that of the baseline; None without."""
    if by == "seconds":
        found = row.get("seconds")
        return None if found is None else (found["p20"], found["median"], found["p80"])
    found = row.get("speedup")
    return None if found is None else (1 / found["p80"], 1 / found["median"], 1 / found["p20"])


def ratios(before: dict, after: dict, by: str) -> dict[tuple, tuple[float, float, float] | None]:
    """Row -> least, median and most of its time over that before; None for one that only one of the runs has."""
    first, second = rows_of(before), rows_of(after)
    found = {}
    for key in dict.fromkeys([*first, *second]):
        old, new = spread(first.get(key, {}), by), spread(second.get(key, {}), by)
        if old is not None and new is not None:
            found[key] = new[0] / old[2], new[1] / old[1], new[2] / old[0]
        elif old is not None or new is not None:
            found[key] = None
    return found


def noise(before: dict, after: dict, by: str) -> float:
    """By what share peers changed, whose code did not; a baseline is no peer where all are held against it."""
    baselines = {entry["entry"]: entry["baseline"] for entry in (*entries_of(before), *entries_of(after))}
    changes = sorted(
        abs(math.log(ratio[1]))
        for (entry, _, _, provider), ratio in ratios(before, after, by).items()
        if ratio is not None and not provider.startswith(OURS) and (by == "seconds" or provider != baselines[entry])
    )
    return math.expm1(changes[min(int(NOISE_SHARE * len(changes)), len(changes) - 1)]) if changes else 0.0


def compare(before: dict, after: dict, by: str = "speedup", least: float = LEAST) -> Iterator[Change]:
    """Every row that either run has times of, or a wrong result by now, in the order of the first.

    least: a change of the median that counts, as a share of the time.
    """
    first, second = rows_of(before), rows_of(after)
    least = max(least, noise(before, after, by))
    timed = ratios(before, after, by)
    for key in dict.fromkeys([*first, *second]):
        one, two = first.get(key, {}), second.get(key, {})
        if (ratio := timed.get(key)) is not None:
            turns = min(row.get("turns", 0) for row in (one, two))
            yield Change(key, verdict(ratio, least, alone=turns < 2), ratio)
        elif "wrong" in two:
            yield Change(key, WRONG, None)
        elif key in timed:
            yield Change(key, NEW if spread(one, by) is None else GONE, None)


def verdict(ratio: tuple[float, float, float], least: float, alone: bool = False) -> str:
    """alone: one of the two is a single turn, which has no spread."""
    low, median, high = ratio
    if alone:
        return ONE_CALL
    if low > 1 and median > 1 + least:
        return SLOWER
    if high < 1 and median < 1 / (1 + least):
        return FASTER
    return SAME


def differing_machines(before: dict, after: dict) -> list[str]:
    """What of the machines differs that times depend on."""
    first, second = before["machine"], after["machine"]
    return [name for name in ("device", "cores", "cpu_isa") if first.get(name) != second.get(name)]


def line(change: Change) -> str:
    entry, case, threads, provider = change.row
    where = f"{entry}: {case}" + ("" if threads is None else f", {threads} threads")
    if change.ratio is None:
        return f"{change.verdict:9} {where}: {provider}"
    low, median, high = change.ratio
    return f"{change.verdict:9} {median:5.2f} ({low:.2f}-{high:.2f})  {where}: {provider}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument(
        "--by",
        choices=("speedup", "seconds"),
        default="speedup",
        help="what is compared: the time over that of the baseline in the same run (default), or the time itself",
    )
    parser.add_argument("--least", type=float, default=LEAST, help="a change of a median that counts (default 0.03)")
    parser.add_argument("--all", action="store_true", help="show rows that are the same too")
    parser.add_argument("--other-machine", action="store_true", help="compare runs of different machines")
    options = parser.parse_args(arguments)
    if not options.least >= 0:
        parser.error(f"--least must be at least 0, got {options.least}")
    try:
        before, after = read(options.before), read(options.after)
    except (ResultError, OSError) as error:
        parser.error(str(error))
    differing = differing_machines(before, after)
    if differing and not options.other_machine:
        parser.error(f"both runs must be of one machine, {', '.join(differing)} differ: see --other-machine")
    changes = list(compare(before, after, options.by, options.least))
    if not any(change.ratio is not None for change in changes):
        parser.error("the two files must have rows in common, got none")
    for change in changes:
        if options.all or change.verdict != SAME:
            print(line(change))
    verdicts = (SLOWER, FASTER, SAME, ONE_CALL, WRONG, GONE, NEW)
    counts = {name: sum(change.verdict == name for change in changes) for name in verdicts}
    print(", ".join(f"{count} {name}" for name, count in counts.items()) + f"; time over time, by {options.by}")
    print(f"noise: nine in ten rows of peers changed by at most {noise(before, after, options.by):.0%}")
    return int(any(change.is_ours and change.verdict in BAD for change in changes))


if __name__ == "__main__":
    sys.exit(main())
