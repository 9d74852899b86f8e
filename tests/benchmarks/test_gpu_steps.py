# SPDX-License-Identifier: Apache-2.0
"""The steps of the first run on a GPU, on a CPU that stands in for one: what they write, and that they end."""

import contextlib
import json
import subprocess

import pytest
import torch

from benchmarks import gpu_report, gpu_steps
from benchmarks.entries import attention as attention_entry
from madtp_kernels import dispatch, tune
from madtp_kernels.native import sparse24 as native
from madtp_kernels.native.sparse24 import Sparse24Config
from madtp_kernels.sparse24 import backend_dense as dense

pack = native.sparse24_pack
SMALL, LARGE = Sparse24Config(80, 64, 64), Sparse24Config(90, 256, 128)
PAIR = Sparse24Config(90, 64, 128, cluster=2)


def lines_of(out, name="times.jsonl"):
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


@pytest.fixture
def wrong():
    """Configurations whose results are wrong."""
    return set()


@pytest.fixture(autouse=True)
def stand_in(monkeypatch, wrong):
    """The CPU for a GPU: ours is the dense product, a clock says 1 to 1000 us and runs what it times once."""

    def linear(x, values, indices, layout, *rest):
        epilogue, config = rest[:5], rest[5]
        y = dense.sparse24_linear(x, values, indices, None, *epilogue)
        return y.roll(1, 0) if config in wrong else y

    def clock(device):
        ticks = iter(range(1, 1000))
        return lambda function: (function(), float(next(ticks)))[1]

    monkeypatch.setattr(gpu_steps, "DEVICE", "cpu")
    monkeypatch.setattr(native, "sparse24_linear_cuda", lambda *a: linear(*a, *([None] if len(a) == 9 else [])))
    monkeypatch.setattr(native, "sparse24_linear_configs", lambda *arguments: [LARGE, SMALL, PAIR])
    monkeypatch.setattr(native, "sparse24_pack", lambda values, indices: None)
    monkeypatch.setattr(tune, "cuda_clock", clock)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


def test_kinds_of_configurations_are_listed(tmp_path):
    assert gpu_steps.main(["listing", "--out", str(tmp_path)]) == 0
    kinds = json.loads((tmp_path / "configurations.json").read_text())
    assert kinds == [[90, 256, 128, 1], [80, 64, 64, 1], [90, 64, 128, 2]]


def test_a_configuration_is_run_on_every_shape(monkeypatch, tmp_path, wrong, capsys):
    monkeypatch.setattr(gpu_steps, "SHAPES", ((1, 8, 16), (9, 24, 32)))
    command = ["configuration", "90", "64", "128", "2", "--out", str(tmp_path)]
    assert gpu_steps.main(command) == 0
    found = lines_of(tmp_path, "results.jsonl")
    assert [line["config"] for line in found] == [list(PAIR)] * 4 and all(line["right"] for line in found)
    assert max(line["error"] for line in found) < 0.01
    wrong.add(PAIR)
    capsys.readouterr()
    assert gpu_steps.main(command) == 1
    text = capsys.readouterr().out
    assert "in 9 rows from 0 to 8 and 24 columns from 0 to 23" in text and "  at (0, 0) " in text
    assert len(text.splitlines()) < 30


def test_layers_are_timed_and_wrong_results_are_not(monkeypatch, tmp_path, wrong):
    case = {"tokens": 8, "in_features": 32, "out_features": 16, "epilogue": "residual", "dtype": "bfloat16"}
    monkeypatch.setattr(gpu_steps, "linear_cases", lambda: [case])
    (tmp_path / "linear").mkdir()
    wrong.add(LARGE)
    assert gpu_steps.main(["linear", "--out", str(tmp_path / "linear")]) == 1
    found = lines_of(tmp_path / "linear")
    ours = {json.dumps(line["config"]): line for line in found if line["provider"] == "madtp cuda"}
    assert set(ours) == {"null", *(json.dumps(list(config)) for config in (LARGE, SMALL, PAIR))}
    assert ours[json.dumps(list(LARGE))]["wrong"] and "us" not in ours[json.dumps(list(LARGE))]
    assert ours["null"]["least_us"] < ours["null"]["us"] < ours["null"]["most_us"]
    peers = {line["provider"]: line for line in found if line["provider"] != "madtp cuda"}
    assert (
        peers["torch dense"]["us"] == 4
        and peers["cuBLASLt dense, fused"]["unavailable"] == "cuBLASLt needs a CUDA device"
    )
    assert "| 8 | 32 | 16 | residual | 4.0 |" in gpu_report.page(tmp_path)


def test_the_layers_are_those_of_two_models():
    cases = list(gpu_steps.linear_cases())
    assert len(cases) == 2 * 4 * 4 and {case["dtype"] for case in cases} == {"bfloat16"}
    assert {(case["in_features"], case["out_features"]) for case in cases} >= {(768, 3072), (1024, 1024)}


def test_peers_that_are_not_there_say_so(monkeypatch, tmp_path):
    case = {"tokens": 8, "in_features": 32, "out_features": 32, "epilogue": "gelu", "dtype": "bfloat16"}
    monkeypatch.setattr(gpu_steps, "linear_cases", lambda: [case])
    assert gpu_steps.main(["cusparselt", "--out", str(tmp_path)]) == 0
    found = {line["provider"]: line for line in lines_of(tmp_path)}
    assert "the tensors are on cpu" in found["cuSPARSELt"]["unavailable"]
    assert found["torch semi-structured"]["failed"]


@pytest.mark.skipif(dispatch.extension_unsupported_reason() is not None, reason="no C++ extension")
def test_attention_is_timed_forward_and_backward(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_steps, "ATTENTION", ((1, 5, 2),))
    (tmp_path / "attention").mkdir()
    assert gpu_steps.main(["attention", "--out", str(tmp_path / "attention")]) == 1  # Triton is not there
    found = {(line["direction"], line["provider"]): line for line in lines_of(tmp_path / "attention")}
    assert len(found) == 4 + 3
    assert found["forward", "torch SDPA"]["us"] > 0 and found["backward", "torch SDPA"]["us"] > 0
    assert found["forward", "torch FlexAttention"]["unavailable"] == "FlexAttention is compared on GPUs"
    assert "triton" in found["backward", "madtp triton with statistics"]["unavailable"]
    assert "| forward | 1 | 5 | 2 |" in gpu_report.page(tmp_path)


def test_what_a_library_raises_is_a_line():
    def fail():
        raise RuntimeError("no such thing\nat all")

    clock = tune.cuda_clock(None)
    assert gpu_steps.timed(clock, fail) == {"failed": "RuntimeError: no such thing"}

    def gate(result):
        assert result == 2, "not two"

    assert gpu_steps.timed(clock, lambda: lambda: 1, gate)["wrong"].startswith("AssertionError: not two")
    assert gpu_steps.timed(clock, lambda: lambda: 2, gate)["us"] > 0


@pytest.mark.slow
def test_a_tower_is_timed_in_a_graph_and_without(monkeypatch, tmp_path):
    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            pass

        synchronize = record

        def elapsed_time(self, end):
            return 10.0

    class Graph:
        """Its replay writes what is there already: the result is not zeroed."""

        def replay(self):
            pass

    def zero(tensor):
        return tensor if tensor.shape == (8, sizes["hidden_size"]) else set_to_zero(tensor)

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_hidden_layers": 3}
    monkeypatch.setattr(gpu_steps, "TOWER", {**sizes, "image_size": 32, "patch_size": 8})
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", contextlib.nullcontext)
    set_to_zero = torch.Tensor.zero_
    monkeypatch.setattr(torch.Tensor, "zero_", zero)
    monkeypatch.setattr(native, "sparse24_pack", pack)
    (tmp_path / "tower").mkdir()
    assert gpu_steps.main(["tower", "--out", str(tmp_path / "tower")]) == 0
    found = lines_of(tmp_path / "tower")
    names = ["Hugging Face SDPA", "madtp dense", "madtp 2:4", "madtp tokens", "madtp tokens and 2:4"]
    assert [(line["provider"], line["graph"]) for line in found] == [(n, g) for n in names for g in (False, True)]
    assert found[-1]["tokens"][-1] <= 17 and found[-1]["ms"] == 1.0
    assert "| madtp tokens | yes |" in gpu_report.page(tmp_path)


def test_a_build_leaves_what_it_made_when_a_target_fails(monkeypatch, tmp_path):
    """Commands that are made up: one target of three fails."""
    commands = []

    def run(command, check=False):
        commands.append(command)
        if "--build" in command:
            for folder in ("", "csrc/tests/gpu/bounded"):
                (tmp_path / "build" / "cmake" / folder).mkdir(parents=True, exist_ok=True)
                (tmp_path / "build" / "cmake" / folder / "_C.made-up.so").write_text(folder)
        return subprocess.CompletedProcess(command, 1)

    for name in ("release", "bounded"):
        (tmp_path / "build" / name / "madtp_kernels").mkdir(parents=True)
    (tmp_path / "machine.json").write_text('{"capability": [9, 0]}')
    monkeypatch.setattr(gpu_steps.subprocess, "run", run)
    places = ["--out", str(tmp_path), "--build", str(tmp_path / "build"), "--machine", str(tmp_path / "machine.json")]
    assert gpu_steps.main(["build", *places]) == 1
    assert "-DMADTP_CUDA_ARCHS=90a" in commands[0] and "_C_bounded" in commands[1]
    made = {name: tmp_path / "build" / name / "madtp_kernels" / "_C.made-up.so" for name in ("release", "bounded")}
    assert made["release"].read_text() == "" and made["bounded"].read_text() == "csrc/tests/gpu/bounded"


def test_the_attention_that_is_named_is_there():
    names = set(attention_entry.ENTRIES[0].providers)
    assert {"torch SDPA", "torch FlexAttention", "madtp triton", "madtp triton with statistics"} <= names
