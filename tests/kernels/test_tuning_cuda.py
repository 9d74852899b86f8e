# SPDX-License-Identifier: Apache-2.0
"""Tables of what is fastest on a GPU, and the command that measures them: a made-up GPU, extension and clock."""

import functools
import json
import re
from pathlib import Path

import pytest
import torch
from sparse24_cases import dense24

import madtp_kernels as mk
from madtp_kernels import dispatch, measured, sparse24_compress, tune
from madtp_kernels.native import sparse24 as native
from madtp_kernels.native.sparse24 import Sparse24Config
from madtp_kernels.sparse24 import backend_cusparselt as cusparselt
from madtp_kernels.sparse24 import backend_dense as dense
from madtp_kernels.sparse24 import tuning_cuda
from madtp_kernels.sparse24.backend_cusparselt import Algorithm
from madtp_kernels.sparse24.tuning_cuda import LinearCall, Timing

GPU = torch.device("cuda", 0)
SMALL, LARGE, CLUSTER = Sparse24Config(80, 64, 64), Sparse24Config(90, 256, 128), Sparse24Config(90, 64, 128, 2)
CASE = LinearCall(16, 24, 32, "bfloat16", "gelu")
OURS = Timing(LARGE, 10.0, 20.0, None, None, "2026-01-02")


@pytest.fixture(autouse=True)
def shipped(monkeypatch, tmp_path):
    """An empty folder of tables, and nothing remembered."""
    monkeypatch.setattr(measured, "SHIPPED", tmp_path)
    monkeypatch.setattr(tuning_cuda, "_name", lambda device: "Made-Up GPU 80GB")
    monkeypatch.setattr(torch.backends.cusparselt, "version", lambda: 702)
    monkeypatch.setattr(tuning_cuda, "_checked", {})
    tuning_cuda.table.cache_clear()
    yield tmp_path / "made-up-gpu-80gb.json"
    tuning_cuda.table.cache_clear()


@pytest.fixture
def ran(monkeypatch):
    """A CPU for a GPU: ours is the dense product there, as is cuSPARSELt. -> what ran, with which configuration."""
    calls = []

    def run(name, *arguments):
        x, values, indices, layout, *epilogue = arguments[:9]
        calls.append((name, *arguments[9:]))
        return dense.sparse24_linear(x, values, indices, None, *epilogue)

    for name in ("cuda", "cusparselt"):
        monkeypatch.setitem(dispatch._BACKEND_UNSUPPORTED_REASONS, name, lambda device: None)
        monkeypatch.setitem(mk.sparse24.weight._layouts, name, lambda weight: None)
    monkeypatch.setitem(dispatch.AUTO_ORDER, "cpu", ("cuda", "reference"))
    monkeypatch.setattr(native, "sparse24_linear_cuda", functools.partial(run, "cuda"))
    monkeypatch.setattr(native, "sparse24_linear_configs", lambda *arguments: [LARGE, SMALL, CLUSTER])
    monkeypatch.setattr(native, "sparse24_layout_bytes", lambda *arguments: 0)
    monkeypatch.setattr(native, "sparse24_pack", lambda values, indices: torch.empty(0, dtype=torch.uint8))
    monkeypatch.setattr(cusparselt, "sparse24_linear", functools.partial(run, "cusparselt"))
    monkeypatch.setattr(cusparselt, "search", lambda *arguments: Algorithm(7, 2, 1))
    run_dense = dispatch.record("sparse24_linear").implementations["dense"]
    spy = lambda *arguments: calls.append(("dense",)) or run_dense(*arguments)  # noqa: E731
    monkeypatch.setitem(dispatch.record("sparse24_linear").implementations, "dense", spy)
    return calls


def call(rows=16, **options):
    weight = sparse24_compress(dense24(24, 32).bfloat16())
    x = torch.randn(rows, 32, generator=torch.Generator().manual_seed(rows)).bfloat16()
    return (x, weight), {"activation": "gelu", **options}


@pytest.mark.parametrize(
    ("rows", "group"), [(0, 16), (1, 16), (23, 32), (577, 512), (577 * 8, 4096), (577 * 32, 16384), (10**6, 32768)]
)
def test_rows_go_to_the_nearest_power_of_two(rows, group):
    values = torch.empty(24, 16, dtype=torch.bfloat16)
    x = torch.empty(1, 32, dtype=torch.bfloat16).expand(rows, 32)
    assert tuning_cuda.linear_call(x, values, "gelu", None, None) == CASE._replace(rows=group)
    residual = tuning_cuda.linear_call(x, values, "none", x, x[:1])
    assert residual.epilogue == tuning_cuda.linear_call(x, values, None, x, x[:1]).epilogue == "none+scale+residual"


def test_a_tie_is_ours_and_what_does_not_run_does_not_win():
    peer = {"algorithm": Algorithm(), "measured": ""}
    assert Timing(LARGE, 10.0, 9.9, cusparselt=None, **peer).backend(False) == "cuda"
    assert Timing(LARGE, 10.0, 9.0, cusparselt=None, **peer).backend(True) == "dense"
    assert Timing(LARGE, 10.0, 9.0, cusparselt=8.0, **peer).backend(True) == "cusparselt"
    assert Timing(LARGE, 10.0, 9.0, cusparselt=8.0, **peer).backend(False) == "dense"
    assert Timing(LARGE, 10.0, 20.0, cusparselt=8.0, **peer).backend(False) == "cuda"


def test_a_file_is_read_as_it_was_written(shipped, monkeypatch):
    timings = {
        CASE: OURS,
        CASE._replace(rows=512): Timing(CLUSTER, 5.0, 6.0, Algorithm(3, 2, 1), 4.5, "2026-01-03"),
    }
    tuning_cuda.write(shipped, "Made-Up GPU 80GB", timings)
    assert tuning_cuda.path_of("Made-Up GPU 80GB") == shipped
    assert tuning_cuda.read(shipped, "") == timings
    found = json.loads(shipped.read_text())
    assert found["gpu"] == "Made-Up GPU 80GB" and found["torch"] == torch.__version__ and len(found["timings"]) == 2
    assert len(shipped.read_text().splitlines()) == 4
    monkeypatch.setattr(torch.backends.cusparselt, "version", lambda: 800)  # its algorithms mean something else
    other = tuning_cuda.read(shipped, "")[CASE._replace(rows=512)]
    assert other.algorithm is other.cusparselt is None and other.config == CLUSTER


@pytest.mark.parametrize("text", ["", "{", "[]", '{"timings": []}', '{"cusparselt": 702, "timings": [{"rows": 1}]}'])
def test_a_broken_table_is_none(shipped, text):
    assert tuning_cuda.read(shipped, "") == {}
    shipped.write_text(text)
    assert tuning_cuda.read(shipped, "") == {} and tuning_cuda.fastest(CASE, GPU) == "cuda"


def test_a_table_of_0_1_is_read(monkeypatch):
    monkeypatch.setattr(torch.backends.cusparselt, "version", lambda: None)
    path = Path(__file__).parents[1] / "fixtures" / "v0.1" / "tuning_cuda.json"
    expected = Timing(Sparse24Config(90, 128, 128, 2), 10.0, 20.0, Algorithm(0, 1, 2), 15.0, "2026-11-01")
    assert tuning_cuda.read(path, "Some GPU") == {LinearCall(1024, 768, 768, "bfloat16", "gelu"): expected}


def test_a_table_of_a_newer_version_is_named_and_not_written_over(shipped, monkeypatch, capsys):
    text = '{"version": 3, "timings": {}}'
    shipped.write_text(text)
    with pytest.warns(UserWarning, match=f"{shipped} is a tuning table of version 3, and .* up to 2; it is ignored"):
        assert tuning_cuda.fastest(CASE, GPU) == "cuda"
    monkeypatch.setattr(tune, "unsupported_reason", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Made-Up GPU 80GB")
    monkeypatch.setattr(tune, "cuda_clock", lambda device: pytest.fail("measured"))
    for arguments in ([], ["--out", str(shipped)]):
        assert tune.main(arguments) == 2
        said = capsys.readouterr().err
        assert (
            said.startswith(f"madtp_kernels.tune: {shipped} is a tuning table of version 3") and said.count("\n") == 1
        )
        assert said.endswith("so it is not written over; --out names another\n")
    assert shipped.read_text() == text


def test_the_old_name_of_out_is_refused_in_one_line(capsys):
    assert tune.main(["--output", "table.json"]) == 2
    assert capsys.readouterr().err == "madtp_kernels.tune: --output is now called --out\n"


def test_auto_runs_what_the_table_says(shipped, ran, monkeypatch):
    timings = {
        CASE: OURS,
        CASE._replace(rows=64): OURS._replace(dense=5.0),
        CASE._replace(rows=256): Timing(SMALL, 10.0, 20.0, Algorithm(3, 2, 1), 5.0, ""),
    }
    tuning_cuda.write(shipped, "", timings)
    for rows in (16, 64, 256, 1024):
        arguments, options = call(rows)
        got = mk.sparse24_linear(*arguments, **options)
        expected = mk.sparse24_linear(*arguments, **options, backend="reference")
        torch.testing.assert_close(got, expected, rtol=0.02, atol=0.02)
    assert ran == [("cuda", LARGE), ("dense",), ("cusparselt", Algorithm(3, 2, 1)), ("cuda", None)]
    ran.clear()
    arguments, options = call(256)
    for backend in ("cuda", "cusparselt", "dense"):  # a backend asked for is tuned too
        mk.sparse24_linear(*arguments, **options, backend=backend)
    mk.sparse24_linear(*arguments, activation="relu", backend="cusparselt")
    compiled = torch.compile(lambda x: mk.sparse24_linear(x, arguments[1], activation="gelu"), backend="aot_eager")
    compiled(arguments[0])
    expected = [("cuda", SMALL), ("cusparselt", Algorithm(3, 2, 1)), ("dense",), ("cusparselt", cusparselt.DEFAULT)]
    assert ran == [*expected, ("cuda", SMALL)]


def test_a_configuration_that_is_gone_is_not_asked_for(shipped, ran, monkeypatch):
    tuning_cuda.write(shipped, "", {CASE: OURS._replace(config=Sparse24Config(90, 512, 512))})
    arguments, options = call()
    mk.sparse24_linear(*arguments, **options)
    assert ran == [("cuda", None)]


def test_explain_shows_the_numbers(shipped, ran):
    arguments, options = call()
    choice = mk.explain("sparse24_linear", *arguments, **options)
    assert choice.backend == "cuda"
    assert "nothing was measured on Made-Up GPU 80GB (16 rows, 32 to 24, bfloat16, gelu): python -m" in choice.reason
    tuning_cuda.write(shipped, "", {CASE: Timing(CLUSTER, 10.0, 20.0, Algorithm(3, 2, 1), 5.0, "2026-01-02")})
    tuning_cuda.table.cache_clear()
    choice = mk.explain("sparse24_linear", *arguments, **options)
    assert choice.backend == "cusparselt" and "cusparselt" not in choice.rejected
    text = "sm_90, 64 tokens by 128 features, clusters of 2), dense 20.0 us, cusparselt 5.0 us"
    assert choice.reason.startswith("measured 2026-01-02 (16 rows") and text in choice.reason
    assert choice.rejected["cuda"] == choice.rejected["dense"] == "cusparselt is faster here, or as fast in less memory"
    assert mk.explain("sparse24_linear", *arguments, **options, backend="cuda").reason == "asked for by backend="


def clock_of(times, ran):
    """Runs a function, and says what `times` has for what ran."""

    def clock(function):
        ran.clear()
        function()
        return times[ran[-1] if ran else "dense"]

    return clock


def test_a_measurement_finds_the_fastest(ran):
    for epilogue in ("none", "quick_gelu", "none+residual", "gelu+scale+residual"):
        times = {("cuda", LARGE): 3.0, ("cuda", SMALL): 2.0, ("cuda", CLUSTER): 4.0, "dense": 2.5}
        times["cusparselt", Algorithm(7, 2, 1)] = 1.5
        timing = tune.time_backends(
            CASE._replace(epilogue=epilogue), torch.device("cpu"), clock_of(times, ran), rounds=3
        )
        assert timing[:5] == (SMALL, 2.0, 2.5, Algorithm(7, 2, 1), 1.5)


def test_a_measurement_without_cusparselt(ran, monkeypatch):
    monkeypatch.setitem(dispatch._BACKEND_UNSUPPORTED_REASONS, "cusparselt", lambda device: "not here")
    times = {("cuda", LARGE): 3.0, ("cuda", SMALL): 4.0, ("cuda", CLUSTER): 5.0, "dense": 2.5}
    timing = tune.time_backends(CASE._replace(rows=8192), torch.device("cpu"), clock_of(times, ran), rounds=2)
    assert timing[:5] == (LARGE, 3.0, 2.5, None, None)


def test_a_wrong_result_is_not_timed(ran, monkeypatch):
    right = native.sparse24_linear_cuda
    monkeypatch.setattr(native, "sparse24_linear_cuda", lambda *a: right(*a) * (1.1 if a[-1] == CLUSTER else 1))
    with pytest.raises(RuntimeError, match="cluster=2.* is wrong by .* of .* \\(16 rows, 32 to 24"):
        tune.time_backends(CASE, torch.device("cpu"), lambda function: pytest.fail("timed"))


def test_every_candidate_takes_its_turn_in_every_round():
    times = {"a": iter([1.0, 9.0, 2.0]), "b": iter([3.0, 3.0, 3.0])}
    order = []
    clock = lambda function: order.append(function) or next(times[function])  # noqa: E731
    assert tune.take_turns({"a": "a", "b": "b"}, clock, 3) == {"a": 2.0, "b": 3.0}
    assert [sorted(order[i : i + 2]) for i in (0, 2, 4)] == [["a", "b"]] * 3


def test_the_classes_are_those_that_calls_look_up():
    found = list(tune.linear_calls((768,), ("float16",), (512,)))
    sizes = [(2304, 768)] + [(768, 768)] * 3 + [(3072, 768)] * 3 + [(768, 3072)] * 2
    assert [case[1:3] for case in found] == sizes
    x = torch.empty(577, 768, dtype=torch.float16)
    values = torch.empty(3072, 384, dtype=torch.float16)
    assert tuning_cuda.linear_call(x, values, "quick_gelu", None, None) in found
    assert tuning_cuda.linear_call(x, values[:768], None, x, None) in found
    assert len(set(tune.linear_calls())) == 2 * 2 * 12 * 9


def test_the_command_writes_the_table_as_it_goes(shipped, monkeypatch, capsys):
    monkeypatch.setattr(tune, "unsupported_reason", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Made-Up GPU 80GB")
    monkeypatch.setattr(tune, "cuda_clock", lambda device: "clock")

    def time_backends(case, device, clock, rounds):
        assert (device, clock, rounds) == (GPU, "clock", 5)
        if case.epilogue == "none+scale+residual":
            raise KeyboardInterrupt
        return OURS

    monkeypatch.setattr(tune, "time_backends", time_backends)
    tuning_cuda.write(shipped, "", {CASE: OURS})
    with pytest.raises(KeyboardInterrupt):
        tune.main(["--widths", "64", "--rows", "16,32", "--dtypes", "float16", "--rounds", "5"])
    kept = tuning_cuda.read(shipped, "")
    assert [case[:4] for case in kept] == [
        (16, 24, 32, "bfloat16"), (16, 64, 64, "float16"), (16, 64, 64, "float16"), (16, 192, 64, "float16")
    ]  # fmt: skip
    assert "16 rows, 64 to 192, float16, none: cuda 10.0 us (sm_90, 256 tokens" in capsys.readouterr().out


def test_the_gpu_sleeps_until_a_call_is_queued(monkeypatch):
    order = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            order.append("record")

        def synchronize(self):
            order.append("synchronize")

        def elapsed_time(self, end):
            return 0.25 if isinstance(end, Event) and end is not self else 0.0  # milliseconds

    class Flush:
        def zero_(self):
            order.append("flush")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda clocks: order.append(clocks))
    monkeypatch.setattr(torch, "empty", lambda *sizes, dtype, device: Flush())
    assert tune.cuda_clock(GPU)(lambda: order.append("call")) == 250.0
    assert order == ["flush", tune.AHEAD_CLOCKS, "record", "call", "record", "synchronize"]


def test_a_table_that_cannot_be_written_is_told_before_anything_is_measured(shipped, monkeypatch, capsys):
    monkeypatch.setattr(tune, "unsupported_reason", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Made-Up GPU 80GB")
    monkeypatch.setattr(tune, "cuda_clock", lambda device: pytest.fail("measured"))
    shipped.touch()
    path = shipped / "table.json"  # in a file
    assert tune.main(["--out", str(path)]) == 2
    assert re.fullmatch(
        f"madtp_kernels.tune: {path} cannot be written: .*; --out names another\n", capsys.readouterr().err
    )


def test_the_command_without_a_gpu_and_with_bad_options(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main([]) == 2
    assert capsys.readouterr().err == "madtp_kernels.tune: nothing can be measured here: torch sees no CUDA device\n"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(
        dispatch._BACKEND_UNSUPPORTED_REASONS, "cuda", lambda device: "madtp_kernels._C was built without CUDA"
    )
    assert tune.main([]) == 2 and "built without CUDA" in capsys.readouterr().err
    for arguments, message in (
        (["--dtypes", "float32"], "--dtypes must be of bfloat16, float16, got 'float32'"),
        (["--widths", "100"], "--widths must be multiples of 16, got 100"),
        (["--widths", "x"], "invalid sizes value: 'x'"),
        (["--rows", "3"], "--rows must be of 16, 32, .*, got 3"),
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
    ):
        with pytest.raises(SystemExit, match="2"):
            tune.main(arguments)
        assert re.search(message, capsys.readouterr().err)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(tmp_path):
    if (why := tune.unsupported_reason()) is not None:
        pytest.skip(why)
    path = tmp_path / "table.json"
    assert tune.main(["--out", str(path), "--widths", "64", "--rows", "16", "--rounds", "3"]) == 0
    timings = tuning_cuda.read(path, torch.cuda.get_device_name())
    assert len(timings) == 18 and all(0 < timing.cuda < 1e4 and 0 < timing.dense < 1e4 for timing in timings.values())
