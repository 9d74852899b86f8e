# SPDX-License-Identifier: Apache-2.0
"""Compiles the CUDA kernels for sm_80 and sm_90a, without a GPU, and reports what they take.

    python -m benchmarks.aot_cuda [--build build/make]

Writes benchmarks/results/aot/cuda.json: per target and kernel the registers, spilled bytes and static shared memory by
ptxas, and per file how many sparse matrix instructions its machine code has. Needs nvcc, and a build folder of this
project for the headers that CMake makes.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "csrc" / "cuda"
RESULT = ROOT / "benchmarks" / "results" / "aot" / "cuda.json"
TARGETS = ("80", "90a")
INSTRUCTIONS = {"HMMA.SP": r"\bHMMA\.SP\b", "HGMMA.SP": r"\bHGMMA\.SP\b"}

_KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for.*?\n"
    r"(?:.*?Function properties.*?\n)?\s*\d+ bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads\n.*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)"
)


def tool(name: str) -> str | None:
    """nvcc's own binary tools, or those in the wheel of triton."""
    if (found := shutil.which(name)) is not None:
        return found
    try:
        import triton
    except ImportError:
        return None
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return str(path) if path.is_file() else None


def compile_file(source: Path, target: str, build: Path) -> tuple[dict[str, dict[str, int]], dict[str, int]]:
    """-> kernels of one file, by demangled name; how often each sparse instruction stands in its machine code."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "out.cubin"
        command = ["nvcc", "-std=c++17", "-O3", "-DNDEBUG", "-cubin", "-Xptxas=-v", "-o", str(cubin), str(source)]
        command += [f"-gencode=arch=compute_{target},code=sm_{target}", f"-I{ROOT / 'csrc'}"]
        command += [f"-I{ROOT / 'csrc' / 'include'}", f"-I{build / 'include'}", f"-I{build / 'private'}"]
        log = subprocess.run(command, check=True, capture_output=True, text=True).stderr
        sass = subprocess.run(
            [tool("cuobjdump"), "-sass", str(cubin)], check=True, capture_output=True, text=True
        ).stdout
    kernels = {}
    for match in _KERNEL.finditer(log):
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        kernels[_demangled(match["name"])] = {
            "registers": int(match["registers"]),
            "spilled_bytes": int(match["stores"]) + int(match["loads"]),
            "static_shared_bytes": int(shared[1]) if shared else 0,
        }
    return kernels, {name: len(re.findall(pattern, sass)) for name, pattern in INSTRUCTIONS.items()}


def _demangled(name: str) -> str:
    text = subprocess.run(["c++filt", name], check=True, capture_output=True, text=True).stdout.strip()
    text = re.sub(r"\(anonymous namespace\)::|madtp::cuda::|\(int\)|\(bool\)", "", text)
    return re.sub(r"^void |\(.*\)$", "", text)  # no result, no parameters


def report(build: Path, sources: list[Path] | None = None) -> dict:
    sources = sorted(SOURCES.rglob("*.cu")) if sources is None else sources
    version = subprocess.run(["nvcc", "--version"], check=True, capture_output=True, text=True).stdout
    result = {"nvcc": re.search(r"release ([\d.]+)", version)[1], "targets": {}}
    for target in TARGETS:
        kernels, instructions = {}, {}
        for source in sources:
            found, counts = compile_file(source, target, build)
            kernels |= found
            instructions[str(source.relative_to(SOURCES))] = counts
        result["targets"][f"sm_{target}"] = {"kernels": dict(sorted(kernels.items())), "instructions": instructions}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "make")
    build = parser.parse_args().build.resolve()
    for needed in ("nvcc", "cuobjdump"):
        if tool(needed) is None:
            parser.error(f"{needed} was not found on PATH")
    if not (build / "include" / "madtp" / "version.h").is_file():
        parser.error(f"--build must be a build folder of this project, got {build}")
    RESULT.write_text(json.dumps(report(build), indent=1) + "\n")


if __name__ == "__main__":
    main()
