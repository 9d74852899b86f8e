# SPDX-License-Identifier: Apache-2.0
"""python -m benchmarks.gpu_report DIR: a page of what benchmarks.gpu_first has left in a folder, of a part of it too.

The page is DIR/report.md. With `--copy-to benchmarks/results` what was measured is copied there, to the folder of that
GPU. Only the standard library is needed.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks.gpu_first import ROOT, SUMMARY, read_json

PREDICTIONS = ROOT / "benchmarks" / "results" / "aot" / "cuda"
SHOWN = 3  # lines of a reason
MEASURED = ("*.json", "*.jsonl")
_REASON = re.compile(r"^E  |\bError\b|\w+Error:|^FAILED|expected|wrong|on the GPU|CUDA error|error:|Fatal")
_LAYER = ("tokens", "in_features", "out_features", "epilogue")
DENSE = ("torch dense", "cuBLASLt dense, fused")
_CALL = ("direction", "batch", "tokens", "heads")


def lines_of(path: Path) -> list[dict]:
    """The JSON lines of a file; one that was cut off is left out."""
    found = []
    for line in path.read_text().split("\n") if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def reason_of(folder: Path, result: Mapping) -> str:
    """Why a step is red: what its runner saw, and the first lines of its log that say something of an error."""
    log = folder / "log.txt"
    said = log.read_text(errors="replace").split("\n") if log.exists() else []
    said = [line.strip() for line in said if line.strip()]
    telling = [line for line in said if _REASON.search(line)][:SHOWN] or said[-SHOWN:]
    return "; ".join([result.get("reason", ""), *(f"`{line[:200].replace('|', '/')}`" for line in telling)])


def tests_of(folder: Path) -> dict[str, int] | None:
    """How many tests of a junit file passed, failed and were skipped; of the log, where pytest was ended."""
    try:
        suites = ElementTree.parse(folder / "junit.xml").getroot().iter("testsuite")
        counts = {"passed": 0, "failed": 0, "skipped": 0}
        for suite in suites:
            numbers = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
            counts["failed"] += numbers["failures"] + numbers["errors"]
            counts["skipped"] += numbers["skipped"]
            counts["passed"] += numbers["tests"] - numbers["failures"] - numbers["errors"] - numbers["skipped"]
        return counts
    except (OSError, ElementTree.ParseError):
        log = folder / "log.txt"
        said = log.read_text(errors="replace") if log.exists() else ""
        outcomes = re.findall(r"^\S+::.* (PASSED|FAILED|ERROR|SKIPPED)\b", said, re.MULTILINE)
        if not outcomes:
            return None
        failed = sum(outcome in ("FAILED", "ERROR") for outcome in outcomes)
        return {"passed": outcomes.count("PASSED"), "failed": failed, "skipped": outcomes.count("SKIPPED")}


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(str(cell) for cell in row)} |" for row in rows)]) + "\n"


def machine_part(facts: Mapping) -> str:
    if "no_gpu" in facts:
        return f"No GPU: {facts['no_gpu']}.\n"
    if "gpu" not in facts:
        return "Nothing is known of the machine.\n"
    capability = ".".join(map(str, facts["capability"]))
    parts = [f"{facts['gpu']}, compute capability {capability}, {facts['multiprocessors']} multiprocessors"]
    parts += [
        f"{name} {facts[name]}" for name in ("torch", "cuda", "triton", "transformers", "python") if facts.get(name)
    ]
    return ", ".join(parts) + f"; commit {facts.get('commit')}.\n"


def steps_part(folder: Path, steps: Mapping[str, dict]) -> Iterator[str]:
    yield "## Steps\n"
    rows = []
    for name, result in steps.items():
        tests = tests_of(folder / name)
        counted = "" if tests is None else ", ".join(f"{n} {what}" for what, n in tests.items())
        rows.append((name, result["answers"], result["status"], f"{result.get('seconds', 0):.1f}", counted))
    yield table(("step", "question", "answer", "seconds", "tests"), rows)
    red = {name: result for name, result in steps.items() if result["status"] not in ("passed", "skipped")}
    if red:
        yield "## What failed\n"
        yield "\n".join(f"* {name}, {r['status']}: {reason_of(folder / name, r)}" for name, r in red.items()) + "\n"
    skipped = {name: result for name, result in steps.items() if result["status"] == "skipped"}
    if skipped:
        yield "## What was skipped\n"
        yield "\n".join(f"* {name}: {result.get('reason', '')}." for name, result in skipped.items()) + "\n"


def configurations_part(folder: Path, steps: Mapping[str, dict]) -> Iterator[str]:
    rows = []
    for name in steps:
        found = lines_of(folder / name / "results.jsonl") if name.startswith("configuration-") else []
        if found:
            wrong = [line for line in found if not line["right"]]
            first = (
                "" if not wrong else " x ".join(str(wrong[0][key]) for key in ("rows", "in_features", "out_features"))
            )
            largest = max((line["error"] for line in found), key=lambda error: (math.isnan(error), error))
            rows.append((name, len(found), len(wrong), f"{largest:.1e}", first))
    if rows:
        yield "## Configurations\n"
        yield table(("configuration", "results", "wrong", "largest error", "first wrong (rows x in x out)"), rows)


def layers(folder: Path) -> dict[tuple, dict[str, dict]]:
    """Of each layer, by what ran it: ours as the model chose, and the fastest of all configurations."""
    found: dict[tuple, dict[str, dict]] = defaultdict(dict)
    for line in lines_of(folder / "linear" / "times.jsonl") + lines_of(folder / "cusparselt" / "times.jsonl"):
        if "us" not in line:
            continue
        layer, name = found[tuple(line[key] for key in _LAYER)], line["provider"]
        if name != "madtp cuda":
            layer[name] = line
        elif line["config"] is None:
            layer["chosen"] = line
        elif "fastest" not in layer or line["us"] < layer["fastest"]["us"]:
            layer["fastest"] = line
    return found


def of(times: Mapping[str, dict], name: str) -> float:
    return times[name]["us"] if name in times else math.nan


def dense_us(times: Mapping[str, dict]) -> float:
    """Of the faster of the dense products."""
    return min((of(times, name) for name in DENSE if name in times), default=math.nan)


def number(value: float, text: str) -> str:
    return "" if math.isnan(value) else text.format(value)


def layers_part(found: Mapping[tuple, Mapping[str, dict]]) -> Iterator[str]:
    if not found:
        return
    yield "## 2:4 linear layers, bfloat16, microseconds\n"
    yield (
        "*dense* is torch with its epilogue, *fused* cuBLASLt with what it fuses. *chosen* is what the model of the "
        "device chooses, *fastest* the best of all configurations, as `Sparse24Config` has it.\n"
    )
    peers = (*DENSE, "cuSPARSELt", "torch semi-structured")
    rows = []
    for layer, times in found.items():
        ratios = [number(dense_us(times) / of(times, name), "{:.2f}x") for name in ("chosen", "fastest")]
        config = " ".join(map(str, times["fastest"]["config"])) if "fastest" in times else ""
        cells = [number(of(times, name), "{:.1f}") for name in (*peers, "chosen", "fastest")]
        rows.append((*layer, *cells, config, *ratios))
    heads = ("rows", "in", "out", "epilogue", "dense", "fused", "cuSPARSELt", "semi-structured", "chosen", "fastest")
    yield table((*heads, "configuration", "chosen over dense", "fastest over dense"), rows)


def predictions(folder: Path = PREDICTIONS) -> dict[tuple, dict]:
    """The committed predictions by rows and features: microseconds with weights that no cache holds, as here."""
    rows = [row for path in sorted(folder.glob("predictions_*.json")) for row in read_json(path) or ()]
    cold = (row for row in rows if row["weights"] == "cold" and row.get("bits", 16) == 16)
    return {(row["rows"], row["in_features"], row["out_features"]): row for row in cold}


def predictions_part(found: Mapping[tuple, Mapping[str, dict]], predicted: Mapping[tuple, dict]) -> Iterator[str]:
    """What was expected beside what was measured: microseconds of ours, and how many times as fast as dense."""
    rows = []
    for layer, times in found.items():
        if layer[:3] not in predicted:
            continue
        expected, got = predicted[layer[:3]], of(times, "chosen")
        us, ratio = expected["sparse"], expected["dense"] / expected["sparse"]
        rows.append(
            (
                *layer,
                *(number(us, "{:.1f}"), number(got, "{:.1f}"), number(got / us, "{:.2f}")),
                *(number(ratio, "{:.2f}x"), number(dense_us(times) / got, "{:.2f}x")),
            )
        )
    yield "## Prediction and measurement\n"
    if not rows:
        yield "No layer was both predicted and measured.\n"
        return
    heads = ("rows", "in", "out", "epilogue", "predicted us", "measured us", "measured / predicted")
    yield table((*heads, "predicted over dense", "measured over dense"), rows)


def attention_part(folder: Path) -> Iterator[str]:
    calls: dict[tuple, dict[str, dict]] = defaultdict(dict)
    for line in lines_of(folder / "attention" / "times.jsonl"):
        calls[tuple(line[key] for key in _CALL)][line["provider"]] = line
    if not calls:
        return
    yield "## Attention, bfloat16, microseconds\n"
    names = list(dict.fromkeys(name for times in calls.values() for name in times))
    rows = []
    for call, times in calls.items():
        base = times.get("torch SDPA", {}).get("us", math.nan)
        cells = []
        for name in names:
            line = times.get(name, {})
            us = line.get("us", math.nan)
            text = next((line[key] for key in ("wrong", "failed", "unavailable") if key in line), "")
            text = text[:60].replace("|", "/")
            cells.append(text if math.isnan(us) else f"{us:.1f}" + number(us / base, " ({:.2f})"))
        rows.append((*call, *cells))
    yield "In brackets the time as a multiple of SDPA's.\n"
    yield table((*_CALL, *names), rows)


def tower_part(folder: Path) -> Iterator[str]:
    found = lines_of(folder / "tower" / "times.jsonl")
    if not found:
        return
    yield "## CLIP ViT-L at 336 pixels, 8 images, bfloat16, milliseconds\n"
    graphs = {line["provider"]: line["ms"] for line in found if line.get("graph")}
    base = graphs.get("Hugging Face SDPA", math.nan)
    rows = []
    for line in found:
        if "failed" in line:
            rows.append((line["provider"], "", "failed", line["failed"].replace("|", "/"), ""))
        else:
            tokens = line.get("tokens")
            ratio = number(base / line["ms"], "{:.2f}x") if line["graph"] else ""
            graph = "yes" if line["graph"] else "no"
            rows.append(
                (line["provider"], graph, f"{line['ms']:.3f}", "" if tokens is None else f"{tokens[-1]:.0f}", ratio)
            )
    yield table(("model", "graph", "ms", "tokens left", "over Hugging Face in a graph"), rows)


def page(folder: Path, predicted: Path = PREDICTIONS) -> str:
    summary = read_json(folder / SUMMARY) or {"steps": {}}
    facts, steps = read_json(folder / "machine" / "machine.json") or {}, summary["steps"]
    found = layers(folder)
    parts = [f"# First run on {facts.get('gpu', 'a machine without a GPU')}\n", machine_part(facts)]
    parts.append(f"{summary.get('seconds', 0):.0f} seconds, made by `make gpu-first`.\n")
    parts += steps_part(folder, steps)
    parts += configurations_part(folder, steps)
    parts += layers_part(found)
    if found:
        parts += predictions_part(found, predictions(predicted))
    parts += attention_part(folder)
    parts += tower_part(folder)
    return "\n".join(parts)


def copy_measured(folder: Path, results: Path) -> Path:
    """Copies what was measured, without logs, to results/<GPU>/gpu-first/, in place of an older run."""
    facts = read_json(folder / "machine" / "machine.json") or {}
    if "gpu" not in facts:
        raise SystemExit(f"nothing was measured on a GPU in {folder}: {facts.get('no_gpu', 'it has no machine.json')}")
    name = "".join(c if c.isalnum() else "-" for c in facts["gpu"].lower())
    to = results / name / "gpu-first"
    shutil.rmtree(to, ignore_errors=True)
    for pattern in MEASURED:
        for path in sorted(folder.rglob(pattern)):
            copy = to / path.relative_to(folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
    return to


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_report", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="DIR", help="that benchmarks.gpu_first wrote to")
    parser.add_argument("--copy-to", type=Path, metavar="RESULTS", help="also copies the measurements to RESULTS/<GPU>")
    options = parser.parse_args(arguments)
    if not options.folder.is_dir():
        parser.error(f"DIR must be a folder that benchmarks.gpu_first wrote to, got {options.folder}")
    text = page(options.folder)
    (options.folder / "report.md").write_text(text)
    print(text)
    if options.copy_to is not None:
        print(f"copied to {copy_measured(options.folder, options.copy_to)}")


if __name__ == "__main__":
    main()
