# SPDX-License-Identifier: Apache-2.0
"""What the CUDA kernels compile to: the committed report, and, where nvcc is, the kernels of today against it."""

import json
import re
import subprocess

import pytest

from benchmarks import aot_cuda

COMMITTED = json.loads(aot_cuda.RESULT.read_text())
LINEAR = sorted(
    path.relative_to(aot_cuda.SOURCES).as_posix() for path in aot_cuda.SOURCES.glob("sparse24/linear_sm*.cu")
)


def is_clean(kernels):
    return all(kernel["spilled_bytes"] == 0 and kernel["registers"] <= 255 for kernel in kernels.values())


def test_the_report_has_no_spills_and_the_instructions_it_is_about():
    targets = COMMITTED["targets"]
    assert set(targets) == {f"sm_{target}" for target in aot_cuda.TARGETS}
    for target in targets.values():
        assert len(target["kernels"]) > 50 and is_clean(target["kernels"])
    assert targets["sm_80"]["instructions"]["sparse24/linear_sm80.cu"]["HMMA.SP"] > 0
    assert targets["sm_90a"]["instructions"]["sparse24/linear_sm90.cu"]["HGMMA.SP"] > 0


def test_the_report_names_every_kernel_there_is():
    reported = {re.match(r"\w+", name)[0] for name in COMMITTED["targets"]["sm_80"]["kernels"]}
    sources = [path.read_text() for path in aot_cuda.SOURCES.rglob("*.cu")]
    written = {
        name
        for text in sources
        for name in re.findall(r"__global__ void[^;{]*?\b(\w+_kernel)\(", text, flags=re.DOTALL)
    }
    assert written and reported == written


@pytest.mark.slow
def test_the_linear_kernels_of_today_are_those_of_the_report(tmp_path):
    if aot_cuda.tool("nvcc") is None or aot_cuda.tool("cuobjdump") is None:
        pytest.skip("no nvcc or cuobjdump on PATH")
    build = ["cmake", "-S", str(aot_cuda.ROOT), "-B", str(tmp_path), "-DMADTP_CUDA=ON"]
    subprocess.run(build, check=True, capture_output=True)
    found = aot_cuda.report(tmp_path, [aot_cuda.SOURCES / name for name in LINEAR])
    for target, report in found["targets"].items():
        assert is_clean(report["kernels"])
        names = {name for name in COMMITTED["targets"][target]["kernels"] if name.startswith("sparse24_linear")}
        assert set(report["kernels"]) == names
        for name in LINEAR:  # how many is the compiler's choice
            for instruction, count in COMMITTED["targets"][target]["instructions"][name].items():
                assert (report["instructions"][name][instruction] > 0) == (count > 0)
