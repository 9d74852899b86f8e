# SPDX-License-Identifier: Apache-2.0
"""python -m benchmarks.run [ENTRY ...]: every provider of every entry in one run; results to benchmarks/results/.

A provider whose result is wrong is not timed and makes the exit code 1: no speed without correctness.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from pathlib import Path

import torch

from benchmarks.entry import Case, Entry, Unavailable, runnable
from benchmarks.measure import Spread, keep_freed_memory, peak_bytes, take_turns
from benchmarks.parts import shares
from benchmarks.registry import entries
from benchmarks.report import print_table, write_document
from madtp_kernels.env import environment

RESULTS = Path(__file__).parent / "results"
SETS = 3  # of inputs


def run_case(entry: Entry, case: Case, device: torch.device, rounds: int) -> list[dict]:
    """One row per provider: medians and percentiles in seconds, `speedup` over the baseline (median of the pairs)."""
    inputs = [entry.inputs(case, device, seed) for seed in range(SETS)]
    functions, rows = {}, []
    for name, function in runnable(entry, inputs[0]):
        if isinstance(function, Unavailable):
            rows.append({"provider": name, "unavailable": str(function)})
            continue
        try:
            entry.gate(inputs[0], function(), name)
        except AssertionError as error:
            rows.append({"provider": name, "wrong": str(error).strip().splitlines()[0]})
            continue
        functions[name] = [function, *(entry.providers[name](each) for each in inputs[1:])]
    seconds = take_turns(functions, device, rounds)
    moved, flops = entry.bytes(case, inputs[0]), entry.flops(case, inputs[0])
    baseline = seconds.get(entry.baseline)
    for name, values in seconds.items():
        spread = Spread.of(values)
        row = {"provider": name, "seconds": spread._asdict(), "gb_per_second": moved / spread.median / 1e9}
        if flops:
            row["gflop_per_second"] = flops / spread.median / 1e9
        if baseline:
            ratios = [theirs / own for theirs, own in zip(baseline, values, strict=True)]
            row["speedup"] = Spread.of(ratios)._asdict()
        row["peak_bytes"] = peak_bytes(functions[name][0], device)
        if entry.parts:
            row["parts"] = shares(functions[name][0], device)
        rows.append(row)
    order = list(entry.providers)
    return sorted(rows, key=lambda row: order.index(row["provider"]))


def machine(device: torch.device) -> dict:
    found = environment()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "device": name,
        "cpu_isa": found["cpu_isa"],
        "python": found["python"],
        **{package: found[package] for package in ("madtp_kernels", "torch", "triton")},
    }


def results_dir(device: torch.device) -> Path:
    if device.type == "cpu":
        return RESULTS / "cpu"
    return RESULTS / "".join(c if c.isalnum() else "-" for c in torch.cuda.get_device_name(device).lower())


def main(arguments: list[str] | None = None) -> None:
    known = entries()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.splitlines()[0])
    parser.add_argument("entries", nargs="*", metavar="ENTRY", help=f"of {', '.join(known)}; all by default")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", default="1,2", help="thread counts to run with on a CPU (default 1,2)")
    parser.add_argument("--rounds", type=int, default=15, help="turns each provider takes (default 15)")
    parser.add_argument("--cases", type=int, help="only the first so many cases of each entry")
    parser.add_argument("--out", type=Path, help="results folder; benchmarks/results/DEVICE by default")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.entries) - set(known))
    if unknown:
        parser.error(f"ENTRY must be one of {', '.join(known)}, got {', '.join(unknown)}")
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds}")
    if options.device not in ("cpu", "cuda"):
        parser.error(f"--device must be cpu or cuda, got {options.device!r}")
    device = torch.device(options.device)
    counts = options.threads.split(",")
    if not all(count.isdecimal() and int(count) > 0 for count in counts):
        parser.error(f"--threads must be positive numbers like 1,2, got {options.threads!r}")
    output = options.out or results_dir(device)
    output.mkdir(parents=True, exist_ok=True)
    keep_freed_memory()

    threads = [int(count) for count in counts] if device.type == "cpu" else [None]
    wrong = []
    for name in options.entries or known:
        entry, blocks = known[name], []
        for count in threads:
            if count is not None:
                torch.set_num_threads(count)
            for case in entry.cases[: options.cases]:
                rows = run_case(entry, case, device, options.rounds)
                blocks.append({"case": dict(case), "threads": count, "rows": rows})
                print_table(entry, blocks[-1])
                wrong += [f"{name}: {row['provider']}: {row['wrong']}" for row in rows if "wrong" in row]
        result = {
            "entry": name,
            "summary": entry.summary,
            "baseline": entry.baseline,
            "against": entry.against,
            "grid": entry.grid,
            "machine": machine(device),
            "rounds": options.rounds,
            "blocks": blocks,
        }
        (output / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    if options.out is None and not options.cases:
        write_document(RESULTS)
    if wrong:
        sys.exit("wrong results, not timed:\n" + "\n".join(wrong))


if __name__ == "__main__":
    main()
