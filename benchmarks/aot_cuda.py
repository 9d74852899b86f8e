# SPDX-License-Identifier: Apache-2.0
"""Compiles the CUDA kernels for every architecture of the build, without a GPU, and reports what they take.

    python -m benchmarks.aot_cuda [--build build/make]

Prints what the model of docs/gpu-model.md predicts of the layers of ViT-B and ViT-L, and writes it to
benchmarks/results/aot/cuda/predictions_sm90.json; `--predictions` stops there, and needs only a C++ compiler.

Writes a file for each target and source to benchmarks/results/aot/cuda: of every kernel the registers, spilled bytes
and static shared memory by ptxas, and how many sparse matrix instructions the machine code has. Needs nvcc, and a build
folder of this project with CUDA for the headers that CMake makes.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "csrc" / "cuda"
RESULTS = ROOT / "benchmarks" / "results" / "aot" / "cuda"
TARGETS = tuple(re.search(r'set\(madtp_all_archs "(.*)"\)', (ROOT / "CMakeLists.txt").read_text())[1].split(";"))

MODEL = ROOT / "benchmarks" / "gpu_model.cpp"
PREDICTIONS = RESULTS / "predictions_sm90.json"

_SPARSE = re.compile(r"\b(\w*MMA(?:\.\w+)*?\.SP)\b")  # HMMA.SP is mma.sp, HGMMA.SP is wgmma.sp

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


def compiled(source: Path, target: str, build: Path) -> tuple[str, str]:
    """What ptxas says of one file, and its machine code."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "out.cubin"
        command = ["nvcc", "-std=c++17", "-O3", "-DNDEBUG", "-cubin", "-Xptxas=-v", "-o", str(cubin), str(source)]
        command += [f"-gencode=arch=compute_{target},code=sm_{target}", f"-I{ROOT / 'csrc'}"]
        command += [f"-I{ROOT / 'csrc' / 'include'}", f"-I{build / 'include'}", f"-I{build / 'private'}"]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        if done.returncode != 0:  # a build folder without CUDA, say
            raise SystemExit(f"{source.relative_to(ROOT)} does not compile for sm_{target}:\n{done.stderr}")
        sass = subprocess.run(
            [tool("cuobjdump"), "-sass", str(cubin)], check=True, capture_output=True, text=True
        ).stdout
    return done.stderr, sass


def report(source: Path, target: str, build: Path) -> dict:
    """Of one file: its kernels, by demangled name; how often each sparse instruction stands in its machine code."""
    log, sass = compiled(source, target, build)
    kernels = {}
    for match in _KERNEL.finditer(log):
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        kernels[_demangled(match["name"])] = {
            "registers": int(match["registers"]),
            "spilled_bytes": int(match["stores"]) + int(match["loads"]),
            "static_shared_bytes": int(shared[1]) if shared else 0,
        }
    version = subprocess.run(["nvcc", "--version"], check=True, capture_output=True, text=True).stdout
    return {
        "nvcc": re.search(r"release ([\d.]+)", version)[1],
        "kernels": dict(sorted(kernels.items())),
        "instructions": dict(sorted(Counter(_SPARSE.findall(sass)).items())),
    }


def path_of(source: Path, target: str) -> Path:
    """Where the report of a file lies."""
    return RESULTS / f"sm_{target}" / source.relative_to(SOURCES).with_suffix(".json")


def predictions() -> list[dict]:
    """What csrc/cuda/sparse24/model_sm90.h expects, a dict for each layer, in microseconds."""
    with tempfile.TemporaryDirectory() as folder:
        program, header = Path(folder) / "gpu_model", Path(folder) / "madtp" / "version.h"
        header.parent.mkdir()
        header.write_text("#define MADTP_HAS_CUDA 1\n")  # of what CMake writes there, all that is needed
        includes = [f"-I{path}" for path in (folder, ROOT / "csrc", ROOT / "csrc" / "include")]
        subprocess.run(["c++", "-std=c++17", *includes, "-o", str(program), str(MODEL)], check=True)
        return json.loads(subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout)


def write_predictions() -> None:
    found = predictions()
    PREDICTIONS.parent.mkdir(parents=True, exist_ok=True)
    PREDICTIONS.write_text("[\n" + ",\n".join(f" {json.dumps(row)}" for row in found) + "\n]\n")
    print("predicted microseconds, and the time of dense alone, and with a kernel for its epilogue, as a ratio to it")
    for row in found:
        layer = f"{row['rows']:5} rows, {row['in_features']:4} -> {row['out_features']:4}"
        layer = f"{row['weights']} weights of {row['bits']:2} bits, {layer}"
        ratios = "  ".join(f"{row[name] / row['sparse']:.2f}" for name in ("dense", "dense_separate"))
        print(f"{layer}: {row['sparse']:6.1f}  {ratios}")


def _demangled(name: str) -> str:
    text = subprocess.run(["c++filt", name], check=True, capture_output=True, text=True).stdout.strip()
    text = re.sub(r"\(anonymous namespace\)::|madtp::cuda::|\(int\)|\(bool\)", "", text)
    return re.sub(r"^void |\(.*\)$", "", text)  # no result, no parameters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "make")
    parser.add_argument("--predictions", action="store_true", help="only those of the model")
    arguments = parser.parse_args()
    if arguments.predictions:
        write_predictions()
        return
    build = arguments.build.resolve()
    for needed in ("nvcc", "cuobjdump"):
        if tool(needed) is None:
            parser.error(f"{needed} was not found on PATH")
    if not (build / "include" / "madtp" / "version.h").is_file():
        parser.error(f"--build must be a build folder of this project, got {build}")
    found = {
        path_of(source, target): report(source, target, build) for source in SOURCES.rglob("*.cu") for target in TARGETS
    }
    for path in RESULTS.rglob("*.json"):  # those of sources that are gone too
        path.unlink()
    for path, contents in found.items():
        if contents["kernels"]:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(contents, indent=1) + "\n")
    write_predictions()


if __name__ == "__main__":
    main()
