# SPDX-License-Identifier: Apache-2.0
"""What the CUDA kernels compile to: the committed reports, and, where nvcc is, the kernels of today against them."""

import json
import re
import shutil
import subprocess

import pytest

from benchmarks import aot_cuda

SOURCES = sorted(aot_cuda.SOURCES.rglob("*.cu"))
LINEAR = [path for path in SOURCES if path.match("linear_sm*.cu")]


def committed(target):
    """Source -> report, of the sources with kernels."""
    paths = {source: aot_cuda.path_of(source, target) for source in SOURCES}
    return {source: json.loads(path.read_text()) for source, path in paths.items() if path.exists()}


def is_clean(kernels):
    return all(kernel["spilled_bytes"] == 0 and kernel["registers"] <= 255 for kernel in kernels.values())


def kernels_of(source):
    """The names of the kernels that a file defines, with those of what it includes."""
    text = source.read_text()
    included = re.findall(r'#include "(\S+\.cuh)"', text)
    text += "".join((aot_cuda.ROOT / "csrc" / path).read_text() for path in included)
    return set(re.findall(r"__global__ void[^;{]*?\b(\w+_kernel)\(", text, flags=re.DOTALL))


def test_the_reports_are_of_every_target_and_source():
    expected = {
        aot_cuda.path_of(source, target) for source in SOURCES if kernels_of(source) for target in aot_cuda.TARGETS
    }
    assert {"80", "90a"} <= set(aot_cuda.TARGETS)
    assert set(aot_cuda.RESULTS.rglob("*.json")) == expected | {aot_cuda.PREDICTIONS}


@pytest.mark.parametrize("target", aot_cuda.TARGETS)
def test_a_report_has_no_spills_and_names_every_kernel_there_is(target):
    reports = committed(target)
    for source, report in reports.items():
        assert is_clean(report["kernels"])
        assert {re.match(r"\w+", name)[0] for name in report["kernels"]} == kernels_of(source)
    assert sum(len(report["kernels"]) for report in reports.values()) > 50


@pytest.mark.parametrize("source", LINEAR, ids=lambda path: path.stem)
def test_a_linear_kernel_has_the_instructions_it_is_about(source):
    number = re.search(r"sm(\d+)", source.stem)[1]
    target = next(target for target in aot_cuda.TARGETS if target.rstrip("af") == number)
    instructions = committed(target)[source]["instructions"]
    assert instructions and min(instructions.values()) > 0
    expected = {
        ("sparse24", "80"): {"HMMA.SP"},
        ("sparse24", "90"): {"HGMMA.SP"},
        ("quantized", "80"): {"IMMA.SP"},
        ("quantized", "90"): {"QGMMA.SP" if "e4m3" in source.stem else "IGMMA.SP"},
    }
    assert expected.get((source.parent.name, number), set(instructions)) <= set(instructions)


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_the_predictions_are_those_of_the_model():
    assert json.loads(aot_cuda.PREDICTIONS.read_text()) == aot_cuda.predictions()


@pytest.mark.slow
@pytest.mark.parametrize("target", aot_cuda.TARGETS)
@pytest.mark.parametrize("source", LINEAR, ids=lambda path: path.stem)
def test_a_linear_kernel_of_today_is_that_of_its_report(source, target, tmp_path):
    if aot_cuda.tool("nvcc") is None or aot_cuda.tool("cuobjdump") is None:
        pytest.skip("no nvcc or cuobjdump on PATH")
    build = ["cmake", "-S", str(aot_cuda.ROOT), "-B", str(tmp_path), "-DMADTP_CUDA=ON"]
    subprocess.run(build, check=True, capture_output=True)
    found, known = aot_cuda.report(source, target, tmp_path), committed(target)[source]
    assert is_clean(found["kernels"])
    assert found["kernels"].keys() == known["kernels"].keys()
    assert found["instructions"].keys() == known["instructions"].keys()  # how many is the compiler's choice
