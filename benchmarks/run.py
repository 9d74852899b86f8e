# SPDX-License-Identifier: Apache-2.0
"""python -m benchmarks.run [ENTRY ...]: every provider of every entry in one run; results to benchmarks/results/.

With --suite NAME --json FILE the cases of a suite, held against the ceilings of this machine, to one file.

A provider whose result is wrong is not timed and makes the exit code 1: no speed without correctness.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.metadata
import math
import os
import platform
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from benchmarks import result_files as files
from benchmarks.ceilings import ceilings, of_ceiling
from benchmarks.entry import GIVE_UP, Case, Entry, Unavailable, runnable
from benchmarks.measure import Spread, keep_freed_memory, peak_bytes, ratios, take_turns
from benchmarks.parts import shares
from benchmarks.registry import entries
from benchmarks.report import print_table, print_unavailable, write_document
from benchmarks.suite_plots import dtype_of
from benchmarks.suites import SUITES
from madtp_kernels.env import environment

RESULTS = Path(__file__).parent / "results"
LONG_CALL = 0.2  # seconds; needs no warm-up but the call that was checked


def run_case(
    entry: Entry, case: Case, device: torch.device, rounds: int, given_up: dict[str, str] | None = None
) -> list[dict]:
    """One row per provider: medians and percentiles in seconds, `speedup` over the baseline (median of the pairs).

    given_up: name of a provider -> why it is not called any more; what is too slow in this case is added.
    """
    given_up = {} if given_up is None else given_up
    inputs = [entry.inputs(case, device, seed) for seed in range(entry.sets)]
    functions, rows, first, single = {}, [], {}, {}
    for name, function in runnable(entry, inputs[0], dict(given_up)):
        if isinstance(function, Unavailable):
            rows.append({"provider": name, "unavailable": str(function)})
            continue
        try:
            if isinstance(function, Exception):
                raise function
            start = time.perf_counter()
            result = function()
            first[name] = time.perf_counter() - start
            entry.gate(inputs[0], result, name)
        except Exception as error:
            first_line = (str(error).strip().splitlines() or [""])[0]
            kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
            rows.append({"provider": name, "wrong": f"{kind}{first_line}"})
            continue
        if first[name] > entry.seconds:
            single[name] = [first[name]]
            if first[name] > GIVE_UP * entry.seconds:
                given_up[name] = f"a call took {first[name]:.0f} seconds in a case with less work"
        else:
            functions[name] = [function, *(entry.providers[name](each) for each in inputs[1:])]
    warm = [name for name in functions if first[name] > LONG_CALL]
    seconds = take_turns(functions, device, rounds, limit=entry.seconds, warm=warm) | single
    moved, flops = entry.bytes(case, inputs[0]), entry.flops(case, inputs[0])
    baseline = seconds.get(entry.baseline)
    for name, values in seconds.items():
        spread = Spread.of(values)
        row = {"provider": name, "seconds": spread._asdict(), "turns": len(values) if name in functions else 0}
        row["gb_per_second"] = moved / spread.median / 1e9
        if flops:
            row["gflop_per_second"] = flops / spread.median / 1e9
        if baseline:
            row["speedup"] = Spread.of(ratios(baseline, values))._asdict()
        if entry.memory and name in functions:
            row["peak_bytes"] = peak_bytes(functions[name][0], device)
        if entry.parts and name in functions:
            row["parts"] = shares(functions[name][0], device)
        rows.append(row)
    order = list(entry.providers)
    return sorted(rows, key=lambda row: order.index(row["provider"]))


def cpu_name() -> str:
    """Vendor's name of the CPU, with the numbers of its family and model where Linux knows them."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    found = dict(re.findall(r"^(model name|cpu family|model)\t*: (.+)$", text.partition("\n\n")[0], re.MULTILINE))
    if len(found) < 3:
        return platform.processor() or platform.machine()
    return f"{found['model name']}, family {found['cpu family']}, model {found['model']}"


def has_bfloat16() -> bool | None:
    """Whether the CPU has instructions for bfloat16 that oneDNN in torch uses; None where torch does not say."""
    try:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    except (AttributeError, RuntimeError):
        return None


def machine(device: torch.device) -> dict:
    found = environment()
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "cores": os.cpu_count(),
        "cpu_isa": found["cpu_isa"],
        "cpu_bfloat16": has_bfloat16(),
        "python": found["python"],
        **{package: found[package] for package in ("madtp_kernels", "torch", "triton")},
    }


def peer_versions(entry: Entry) -> dict[str, str]:
    """Of the packages that the providers of an entry may need, those that are installed."""
    versions = {}
    for package in entry.packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def with_values(cases: Sequence[Case], values: Mapping[str, int | str]) -> list[Case]:
    """The cases with these values for the keys they have, each once."""
    changed = [{key: values.get(key, value) for key, value in case.items()} for case in cases]
    return [case for i, case in enumerate(changed) if case not in changed[:i]]


def results_dir(device: torch.device) -> Path:
    if device.type == "cpu":
        return RESULTS / "cpu"
    return RESULTS / "".join(c if c.isalnum() else "-" for c in torch.cuda.get_device_name(device).lower())


def run_entry(
    entry: Entry,
    cases: Sequence[Case],
    device: torch.device,
    threads: Sequence[int | None],
    rounds: int,
    limits: Mapping[str, dict] | None = None,
) -> tuple[dict, list[str]]:
    """The result of an entry on these cases, and what was wrong.

    limits: the ceilings by number of threads, that rows are held against.
    """
    blocks, reasons, wrong = [], {}, []
    for count in threads:
        if count is not None:
            torch.set_num_threads(count)
        given_up: dict[str, str] = {}
        for case in cases:
            rows = run_case(entry, case, device, rounds, given_up)
            for row in rows if limits is not None else ():
                if (share := of_ceiling(row, limits[str(count)], dtype_of(case))) is not None:
                    row["of_ceiling"] = share
            blocks.append({"case": dict(case), "threads": count, "rows": rows})
            print_table(entry, blocks[-1])
            reasons |= {row["provider"]: row["unavailable"] for row in rows if "unavailable" in row}
            wrong += [f"{entry.name}: {row['provider']}: {row['wrong']}" for row in rows if "wrong" in row]
    print_unavailable(entry.name, reasons)
    result = {
        "version": files.VERSION,
        "entry": entry.name,
        "summary": entry.summary,
        "baseline": entry.baseline,
        "against": entry.against,
        "grid": entry.grid,
        "means": list(entry.means),
        "packages": list(entry.packages),
        "machine": machine(device) | peer_versions(entry),
        "rounds": rounds,
        "seconds": entry.seconds if math.isfinite(entry.seconds) else None,
        "blocks": blocks,
    }
    return result, wrong


def suite_cases(name: str, device: torch.device) -> dict[str, list[Case]]:
    """Entry -> its cases in a suite; on a GPU in bfloat16, which its matrix units take."""
    changed = {} if device.type == "cpu" else {"dtype": "bfloat16"}
    return {entry: with_values(cases, changed) for entry, cases in SUITES[name].cases.items()}


def measured_ceilings(
    cases: Mapping[str, Sequence[Case]], device: torch.device, threads: Sequence[int | None]
) -> dict[str, dict]:
    """By number of threads, for the dtypes of the cases."""
    dtypes = list(dict.fromkeys(dtype_of(case) for listed in cases.values() for case in listed))
    found = {}
    for count in threads:
        if count is not None:
            torch.set_num_threads(count)
        found[str(count)] = ceilings(device, dtypes)
    return found


def main(arguments: list[str] | None = None) -> None:
    known = entries()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.splitlines()[0])
    parser.add_argument("entries", nargs="*", metavar="ENTRY", help=f"of {', '.join(known)}; all by default")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", default="1,2", help="thread counts to run with on a CPU (default 1,2)")
    parser.add_argument("--rounds", type=int, help="turns each provider takes (default 15, of towers 5)")
    parser.add_argument("--seconds", type=float, help="limit of these turns together, for entries that have one")
    parser.add_argument("--cases", type=int, help="only the first so many cases of each entry")
    parser.add_argument(
        *("--set", "-s"),
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a value of every case that has the key, such as batch=4",
    )
    parser.add_argument("--out", type=Path, help="results folder; benchmarks/results/DEVICE by default")
    parser.add_argument("--suite", choices=sorted(SUITES), help="the cases of one kind of model; with --json")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the results of a suite go")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.entries) - set(known))
    if unknown:
        parser.error(f"ENTRY must be one of {', '.join(known)}, got {', '.join(unknown)}")
    if options.rounds is not None and options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds}")
    if options.seconds is not None and not options.seconds > 0:
        parser.error(f"--seconds must be positive, got {options.seconds}")
    if options.device not in ("cpu", "cuda"):
        parser.error(f"--device must be cpu or cuda, got {options.device!r}")
    device = torch.device(options.device)
    counts = options.threads.split(",")
    if not all(count.isdecimal() and int(count) > 0 for count in counts):
        parser.error(f"--threads must be positive numbers like 1,2, got {options.threads!r}")
    values = {}
    for text in options.set:
        key, equals, value = text.partition("=")
        if not equals or not any(
            key in case for name in options.entries or known for case in known[name].cases_on(device)
        ):
            parser.error(f"--set must be KEY=VALUE with a key of the cases, got {text!r}")
        values[key] = int(value) if value.isdecimal() else value
    if (options.suite is None) != (options.json is None):
        parser.error("--suite and --json must come together")
    if options.json is not None and (not options.json.parent.is_dir() or options.json.is_dir()):
        parser.error(f"--json must be a file in a folder that is there, got {options.json}")
    if options.cases is not None and options.cases < 1:
        parser.error(f"--cases must be at least 1, got {options.cases}")
    if options.suite is None:
        chosen = {name: known[name].cases_on(device) for name in options.entries or known}
    else:
        chosen = suite_cases(options.suite, device)
        if absent := sorted(set(options.entries) - set(chosen)):
            parser.error(f"ENTRY must be one of {', '.join(chosen)} in {options.suite}, got {', '.join(absent)}")
        chosen = {name: cases for name, cases in chosen.items() if not options.entries or name in options.entries}
    chosen = {name: with_values(cases[: options.cases], values) for name, cases in chosen.items()}
    threads = [int(count) for count in counts] if device.type == "cpu" else [None]
    output = options.out or results_dir(device)
    if options.suite is None:
        output.mkdir(parents=True, exist_ok=True)
    keep_freed_memory()

    limits = None if options.suite is None else measured_ceilings(chosen, device, threads)
    wrong, found = [], []
    for name, cases in chosen.items():
        entry = known[name]
        if options.seconds is not None and math.isfinite(entry.seconds):
            entry = dataclasses.replace(entry, seconds=options.seconds)
        if not cases:
            print(f"{name}: nothing of it runs on {device.type}")
            continue
        result, problems = run_entry(entry, cases, device, threads, options.rounds or entry.rounds, limits)
        wrong += problems
        found.append(result)
        if options.suite is None:
            files.write(result, output / f"{name}.json")
    if options.suite is not None:
        about = {"version": files.VERSION, "suite": options.suite, "machine": machine(device), "ceilings": limits}
        files.write(about | {"entries": found}, options.json)
    elif options.out is None and not options.cases:
        write_document(RESULTS)
    if wrong:
        sys.exit("wrong results, not timed:\n" + "\n".join(wrong))


if __name__ == "__main__":
    main()
