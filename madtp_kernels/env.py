# SPDX-License-Identifier: Apache-2.0
"""What this installation has and, for what it lacks, why: python -m madtp_kernels.env [--json] [--cmake-dir].

A diagnosis must work on a broken machine: each probe is guarded, and what fails is part of the answer.
"""

import argparse
import ctypes
import functools
import importlib
import importlib.metadata
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from madtp_kernels.dispatch import Extension

PACKAGES = ("torch", "triton", "transformers")


def environment() -> dict[str, object]:
    """Everything that `python -m madtp_kernels.env --json` prints, JSON-serialisable. Never raises.

    A value of the form {"missing": reason} stands for what is not there.
    """
    return {
        "madtp_kernels": _guarded(_version),
        "python": f"{platform.python_version()} ({platform.system()} {platform.machine()})",
        **{name: _guarded(functools.partial(importlib.metadata.version, name)) for name in PACKAGES},
        "extension": _guarded(_extension),
        "cuda_build": _guarded(_cuda_build),
        "nvcc": shutil.which("nvcc") or _missing("no nvcc on PATH (needed only to build the CUDA kernels)"),
        "cpu_isa": _guarded(_cpu_isa),
        "cpu_isas_available": _guarded(lambda: list(_native().cpu.available_isas())),
        "threads": _guarded(lambda: importlib.import_module("torch").get_num_threads()),
        "gpus": _guarded(_gpus),
        "patterns": _guarded(_patterns),
        "cmake_dir": _guarded(_cmake_dir),
        "variables": {name: value for name, value in sorted(os.environ.items()) if name.startswith("MADTP_")},
    }


class Missing(Exception):
    """Carries the reason why something is not there."""


def _missing(reason: object) -> dict[str, str]:
    return {"missing": str(reason)}


def _guarded(probe: Callable[[], object]) -> object:
    try:
        return probe()
    except Missing as reason:
        return _missing(reason)
    except importlib.metadata.PackageNotFoundError as error:
        return _missing(f"{error.name} is not installed: pip install {error.name}")
    except Exception as error:
        return _missing(f"{type(error).__name__}: {error}")


def _version() -> str:
    return str(importlib.import_module("madtp_kernels").__version__)


def _native() -> "Extension":
    importlib.import_module("torch")  # first, so that one OpenMP runtime serves both
    try:
        return cast("Extension", importlib.import_module("madtp_kernels._C"))
    except ImportError as error:
        raise Missing(f"madtp_kernels._C cannot be loaded ({error}); build it: pip install -e .") from None


def _extension() -> str:
    info = _native().build_info()
    openmp = "OpenMP" if info["openmp"] else "no OpenMP: single-threaded"
    return f"{info['version']}, {info['compiler']}, {', '.join(info['cpu_isas'])}, {openmp}"


def _cuda_build() -> dict[str, object]:
    info = _native().build_info()
    if info["cuda"] is None:
        raise Missing(info["cuda_missing"])
    return {"version": info["cuda"], "archs": list(info["cuda_archs"])}


def _cpu_isa() -> str:
    try:
        return _native().cpu.isa()
    except ValueError as error:
        raise Missing(error) from None


def _gpus() -> list[str]:
    torch = importlib.import_module("torch")
    if torch.cuda.is_available():
        return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    if torch.version.cuda is None and torch.version.hip is None:
        raise Missing(f"torch {torch.__version__} is a CPU build" + ("" if _has_driver() else ", and no NVIDIA driver"))
    raise Missing("torch sees no device (CUDA_VISIBLE_DEVICES?)" if _has_driver() else "no NVIDIA driver")


def _patterns() -> dict[str, list[str]]:
    patterns = importlib.import_module("madtp_kernels.nm_patterns")
    dense = [str(pattern) for pattern in patterns.COMMON if not patterns.explain_pattern(pattern).runs]
    runs = {
        f"run as {unit.runs} ({unit.name}, {unit.dtypes})": [str(p) for p in patterns.COMMON if p.runs_as(unit.runs)]
        for unit in patterns.UNITS
    }
    return runs | {"run dense": dense}


def _has_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def _cmake_dir() -> str:
    directory = Path(__file__).resolve().parent / "lib" / "cmake" / "Madtp"
    if not (directory / "MadtpConfig.cmake").is_file():
        raise Missing(f"the C++ package is not installed in {directory}; build it: pip install -e .")
    return str(directory)


def _lines(value: object) -> list[str]:
    """One, but for a table of lists: one for each of its rows."""
    if isinstance(value, dict) and value and all(isinstance(item, list) for item in value.values()):
        return [f"{key}: {_text(item)}" for key, item in value.items()]
    return [_text(value)]


def _text(value: object) -> str:
    if isinstance(value, dict) and "missing" in value:
        return f"none: {value['missing']}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items()) or "none set"
    if isinstance(value, list):
        return ", ".join(str(item) for item in value)
    return str(value)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m madtp_kernels.env", description="What this installation has and, for what it lacks, why."
    )
    parser.add_argument("--json", action="store_true", help="the same as one JSON object")
    parser.add_argument(
        "--cmake-dir", action="store_true", help="only the directory for cmake -DMadtp_DIR=..., for C++ projects"
    )
    options = parser.parse_args(arguments)
    if options.cmake_dir:
        try:
            print(_cmake_dir())
        except Missing as reason:
            print(reason, file=sys.stderr)
        return
    found = environment()
    if options.json:
        print(json.dumps(found, indent=2))
        return
    for name, value in found.items():
        heading = name.replace("_", " ")
        for line in _lines(value):
            print(f"{heading:<20} {line}")
            heading = ""


if __name__ == "__main__":
    main()
