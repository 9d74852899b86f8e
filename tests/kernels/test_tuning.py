# SPDX-License-Identifier: Apache-2.0
"""What auto takes for a 2:4 linear layer: from made-up measurements, kept on disk. Nothing here is timed."""

import contextlib
import errno
import json
import os
import pwd
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from sparse24_cases import dense24
from torch.utils.flop_counter import FlopCounterMode

import madtp_kernels as mk
from madtp_kernels import dispatch, sparse24_compress, table_file
from madtp_kernels import measured as kept
from madtp_kernels.dense import onednn
from madtp_kernels.measured import Timing
from madtp_kernels.native import sparse24 as native
from madtp_kernels.sparse24 import backend_dense as dense
from madtp_kernels.sparse24 import tuning_cpu as tuning
from madtp_kernels.sparse24.tuning_cpu import LinearCall

pytestmark = pytest.mark.skipif(dispatch.extension_unsupported_reason() is not None, reason="no C++ extension")
DAY = "2026-01-02"
DENSE_WINS, OURS_WINS = Timing({"cpu": 20.0, "dense": 10.0}, DAY), Timing({"cpu": 10.0, "dense": 20.0}, DAY)


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Tuning on, in an empty cache, without oneDNN, and the cases it measures: dense wins from 16 rows on."""
    cases = []

    def time_backends(case, backends):
        assert backends == ("cpu", "dense")
        cases.append(case)
        return DENSE_WINS if case.rows >= 16 else OURS_WINS

    monkeypatch.setenv("MADTP_TUNE", "on")
    monkeypatch.setenv("MADTP_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "time_backends", time_backends)
    monkeypatch.setattr(onednn, "unsupported_reason", lambda dtype: "it is out of these tests")
    monkeypatch.setattr(kept, "SHIPPED", tmp_path / "shipped")
    forget()
    yield cases
    forget()


def forget():
    """As a new process."""
    tuning.measurements.forget()


def case_of(rows=16, **changes):
    weight = sparse24_compress(dense24(24, 32))
    return tuning.linear_call(torch.zeros(rows, 32), weight, None, None, None)._replace(**changes)


@pytest.mark.parametrize(
    ("rows", "group"), [(0, 1), (1, 1), (3, 4), (12, 16), (22, 16), (23, 32), (197, 256), (577, 512), (9000, 1024)]
)
def test_rows_go_to_the_nearest_power_of_two(rows, group):
    assert case_of(rows).rows == group


def test_auto_runs_what_was_faster(measured, monkeypatch):
    weight, ran = sparse24_compress(dense24(24, 32)), []
    for name, module in (("cpu", native), ("dense", dense)):
        run = module.sparse24_linear
        spy = lambda *args, name=name, run=run: ran.append(name) or run(*args)  # noqa: E731
        monkeypatch.setitem(dispatch.record("sparse24_linear").implementations, name, spy)
    for rows in (2, 16, 17, 16, 2):
        mk.sparse24_linear(torch.randn(rows, 32), weight)
    assert ran == ["cpu", "dense", "dense", "dense", "cpu"]
    assert [case.rows for case in measured] == [2, 16]
    mk.sparse24_linear(torch.randn(16, 32), weight, backend="cpu")
    monkeypatch.setenv("MADTP_BACKEND", "cpu")
    mk.sparse24_linear(torch.randn(16, 32), weight)
    assert ran[5:] == ["cpu", "cpu"] and len(measured) == 2


def test_the_dense_weight_is_kept_only_where_it_wins(measured):
    weight = sparse24_compress(dense24(24, 32))
    mk.sparse24_linear(torch.randn(2, 32), weight)
    assert set(weight._packed) == {"cpu"}
    mk.sparse24_linear(torch.randn(16, 32), weight)
    assert set(weight._packed) == {"cpu", "dense"}


def test_every_class_is_measured_apart(measured):
    weight, x = sparse24_compress(dense24(24, 32)), torch.randn(4, 32)
    residual, scale = torch.zeros(4, 24), torch.ones(24)
    calls = [{}, {"activation": "gelu"}, {"residual": residual}, {"scale": scale, "activation": "gelu"}]
    for call in calls * 2:
        mk.sparse24_linear(x, weight, **call)
    mk.sparse24_linear(x.bfloat16(), weight)
    assert len(measured) == len(set(measured)) == 5
    assert str(measured[3]).startswith("4 rows, 32 to 24, float32, weight float32, gelu+scale, ")


def test_a_tie_is_ours():
    fastest = lambda cpu, dense: Timing({"cpu": cpu, "dense": dense}, DAY).fastest(("cpu", "dense"), tuning.MARGIN)  # noqa: E731
    assert fastest(10.0, 9.9) == "cpu" and fastest(10.0, 9.0) == "dense"


def test_of_three_the_fastest_runs(measured, monkeypatch):
    times = {1: (10.0, 20.0, 9.0), 16: (10.0, 8.0, 9.0), 64: (10.0, 20.0, 9.9)}
    monkeypatch.setattr(onednn, "unsupported_reason", lambda dtype: None)
    monkeypatch.setattr(
        tuning, "time_backends", lambda case, backends: Timing(dict(zip(backends, times[case.rows], strict=True)), DAY)
    )
    assert [tuning.fastest(case_of(rows)) for rows in times] == ["onednn", "dense", "cpu"]


def test_a_backend_that_came_later_is_measured_too(measured, monkeypatch):
    assert tuning.fastest(case_of(16)) == "dense"
    monkeypatch.setattr(onednn, "unsupported_reason", lambda dtype: None)
    with_onednn = Timing(DENSE_WINS.times | {"onednn": 5.0}, DAY)
    monkeypatch.setattr(tuning, "time_backends", lambda case, backends: with_onednn)
    weight, x = sparse24_compress(dense24(24, 32)), torch.randn(16, 32)
    assert "the first call does" in mk.explain("sparse24_linear", x, weight).reason
    assert tuning.fastest(case_of(16)) == "onednn" and tuning.measurements.known(case_of(16)) == with_onednn
    choice = mk.explain("sparse24_linear", x, weight)
    assert choice.backend == "onednn" and "cpu 20.0 us, dense 10.0 us, onednn 5.0 us" in choice.reason
    monkeypatch.setattr(onednn, "unsupported_reason", lambda dtype: "off again")
    assert tuning.fastest(case_of(16)) == "dense" and len(measured) == 1


def test_what_was_measured_outlives_the_process(measured, tmp_path):
    assert tuning.fastest(case_of(16)) == "dense"
    forget()
    assert tuning.fastest(case_of(16)) == "dense" and len(measured) == 1
    (file,) = (tmp_path / "tuning").iterdir()
    assert '"torch"' in file.read_text()
    other = file.read_text().replace("[16,", "[2048,")  # another process adds to the file
    file.write_text(other)
    tuning.fastest(case_of(4))
    forget()
    assert {case.rows for case in tuning.measurements._table(str(tmp_path))} == {4, 2048}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"timings": [[1, 2]]}',
        '{"timings": [[[1], [1, 2, 3]]]}',
        '{"version": 2, "timings": [[[1], 2, 3]]}',
        "\udcff",
    ],
)
def test_a_broken_cache_is_measured_again(measured, tmp_path, text):
    file = kept.cache_folder(str(tmp_path)) / tuning.measurements.file_name()
    file.parent.mkdir()
    file.write_bytes(text.encode(errors="surrogateescape"))
    assert tuning.fastest(case_of(16)) == "dense" and len(measured) == 1
    forget()
    assert tuning.measurements.known(case_of(16)) == DENSE_WINS


FROM_0_1 = Timing({"cpu": 100.0, "dense": 200.0}, "2026-11-01")


def test_a_cache_of_0_1_still_holds(measured, tmp_path, monkeypatch):
    fixture = Path(__file__).parents[1] / "fixtures" / "v0.1" / "tuning_cpu.json"
    found = json.loads(fixture.read_text())
    written_by = {name: found[name] for name in ("cpu", "isa", "torch", "madtp_kernels")}
    monkeypatch.setattr(kept, "machine", lambda: written_by | {"madtp_kernels": mk.__version__})
    old = tmp_path / "tuning" / tuning.measurements.file_name(found["madtp_kernels"])
    monkeypatch.setattr(kept, "machine", lambda: written_by)
    assert tuning.measurements.file_name() == old.name  # as 0.1 called it
    monkeypatch.setattr(kept, "machine", lambda: written_by | {"madtp_kernels": mk.__version__})
    old.parent.mkdir()
    shutil.copy(fixture, old)
    case = LinearCall(1024, 768, 768, "float32", "float32", "gelu", 2)
    assert tuning.fastest(case) == "cpu" and tuning.measurements.known(case) == FROM_0_1 and not measured
    tuning.fastest(case_of(16))
    assert old.read_text() == fixture.read_text()  # what is measured now goes to a file of this version
    (new,) = set(old.parent.iterdir()) - {old}
    assert json.loads(new.read_text())["version"] == table_file.VERSION == 2 and len(tuning.measurements.read(new)) == 1
    forget()
    assert {case, case_of(16)} <= set(tuning.measurements._table(str(tmp_path)))


def test_a_cache_of_a_newer_version_is_named_and_left_alone(measured, tmp_path):
    file = tmp_path / "tuning" / tuning.measurements.file_name()
    file.parent.mkdir()
    file.write_text('{"version": 3, "timings": "of another kind"}')
    with pytest.warns(UserWarning, match=f"{file} is a tuning table of version 3, and .* up to 2; it is ignored"):
        assert tuning.fastest(case_of(16)) == "dense"
    assert tuning.fastest(case_of(16)) == "dense" and len(measured) == 1
    assert file.read_text() == '{"version": 3, "timings": "of another kind"}'


def test_an_unwritable_cache_stays_in_the_process(measured, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MADTP_CACHE", str(tmp_path / "file"))
    assert tuning.fastest(case_of(16)) == tuning.fastest(case_of(16)) == "dense" and len(measured) == 1


def test_off_measures_nothing_and_reads_what_is_shipped(measured, tmp_path, monkeypatch):
    tuning.fastest(case_of(16))
    monkeypatch.setenv("MADTP_TUNE", "off")
    assert tuning.fastest(case_of(16)) == tuning.fastest(case_of(64)) == "cpu"
    assert len(measured) == 1
    (tmp_path / "tuning").rename(tmp_path / "shipped")
    forget()
    assert tuning.fastest(case_of(16)) == "dense" and tuning.fastest(case_of(64)) == "cpu"
    monkeypatch.setenv("MADTP_TUNE", "maybe")
    with pytest.raises(ValueError, match="MADTP_TUNE must be on or off, got 'maybe'"):
        tuning.fastest(case_of(16))


def test_nothing_is_measured_under_a_dispatch_mode_or_a_compiler(measured):
    weight, x = sparse24_compress(dense24(24, 32)), torch.randn(16, 32)
    with FlopCounterMode(display=False) as counter:
        mk.sparse24_linear(x, weight)
    assert counter.get_total_flops() == 16 * 24 * 32
    compiled = torch.compile(lambda x: mk.sparse24_linear(x, weight), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), mk.sparse24_linear(x, weight, backend="cpu"))
    assert not measured
    mk.sparse24_linear(x, weight)
    with FlopCounterMode(display=False) as counter:
        mk.sparse24_linear(x, weight)
    assert counter.get_total_flops() == 2 * 16 * 24 * 32  # of dense


def test_explain_shows_the_numbers(measured, monkeypatch):
    weight, x = sparse24_compress(dense24(24, 32)), torch.randn(16, 32)
    assert "nothing was measured (16 rows, 32 to 24, float32" in str(mk.explain("sparse24_linear", x, weight))
    assert "the first call does" in str(mk.explain("sparse24_linear", x, weight)) and not measured
    mk.sparse24_linear(x, weight)
    choice = mk.explain("sparse24_linear", x, weight)
    assert choice.backend == "dense" and "cpu 20.0 us, dense 10.0 us" in choice.reason
    assert "2026-01-02" in choice.reason and choice.rejected["cpu"].startswith("dense is faster")
    mk.sparse24_linear(x[:2], weight)
    choice = mk.explain("sparse24_linear", x[:2], weight, None)
    assert choice.backend == "cpu" and choice.rejected["dense"].startswith("cpu is faster")
    assert "asked for by backend=" in mk.explain("sparse24_linear", x, weight, backend="cpu").reason
    assert mk.explain("sparse24_linear", x.double(), weight).backend == "reference"
    monkeypatch.setenv("MADTP_TUNE", "off")
    assert "MADTP_TUNE is off" in str(mk.explain("sparse24_linear", x, weight))


def test_a_measurement_runs_every_class_of_calls(monkeypatch):
    # The clock is a counter: only that both run is of interest.
    ticks = iter(range(10**6))
    monkeypatch.setattr(kept.time, "perf_counter", lambda: next(ticks))
    state = torch.get_rng_state()
    for dtype, weight_dtype, epilogue in (
        ("float32", "float32", "gelu+residual"),
        ("bfloat16", "float32", "none+scale+residual"),
        ("float16", "float16", "relu"),
    ):
        case = LinearCall(4, 24, 32, dtype, weight_dtype, epilogue, 1)
        backends = tuning._backends(case)
        assert tuning.time_backends(case, backends).times == dict.fromkeys(backends, 1e6)
    assert torch.equal(torch.get_rng_state(), state)


# --- no cache


def no_home(monkeypatch, tmp_path):
    def unknown(user):
        raise KeyError(f"getpwuid(): uid not found: {user}")

    monkeypatch.delenv("HOME")
    monkeypatch.delenv("MADTP_CACHE")
    monkeypatch.setattr(pwd, "getpwuid", unknown)


def nobody(monkeypatch, tmp_path):
    monkeypatch.setenv("MADTP_CACHE", "~no-such-user/cache")


def a_file(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MADTP_CACHE", str(tmp_path / "file"))


def a_pipe(monkeypatch, tmp_path):
    (tmp_path / "tuning").mkdir()
    os.mkfifo(tmp_path / "tuning" / tuning.measurements.file_name())


def too_deep(monkeypatch, tmp_path):
    (tmp_path / "tuning").mkdir()
    (tmp_path / "tuning" / tuning.measurements.file_name()).write_text("[" * 100_000)


def too_large(monkeypatch, tmp_path):
    (tmp_path / "tuning").mkdir()
    row = f'[[16, 24, 32, 1, 1, 1, 1], {{"cpu": {"9" * 400}}}, "a day"]'
    (tmp_path / "tuning" / tuning.measurements.file_name()).write_text(f'{{"version": 2, "timings": [{row}]}}')


def full(monkeypatch, tmp_path):
    @contextlib.contextmanager
    def no_space(path):
        raise OSError(errno.ENOSPC, "No space left on device")
        yield path

    monkeypatch.setattr(kept, "atomic_file", no_space)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("stop", [no_home, nobody, a_file, a_pipe, too_deep, too_large, full])
def test_without_a_cache_a_measurement_stays_in_the_process(measured, monkeypatch, tmp_path, stop):
    stop(monkeypatch, tmp_path)
    weight, x = sparse24_compress(dense24(24, 32)), torch.randn(16, 32)
    for _ in range(2):
        mk.sparse24_linear(x, weight)
    assert mk.explain("sparse24_linear", x, weight).backend == "dense"
    assert measured == [case_of(16)]


def test_threads_measure_once_and_agree(measured, monkeypatch):
    read = tuning.measurements.read

    def slow_read(path):
        time.sleep(0.005)  # so that all are in it together
        return read(path)

    monkeypatch.setattr(tuning.measurements, "read", slow_read)
    weight, x = sparse24_compress(dense24(24, 32)), torch.randn(16, 32)
    start = threading.Barrier(8)

    def run(_):
        start.wait()
        return [mk.sparse24_linear(x, weight, activation=activation) for activation in (None, "gelu", "relu") * 2]

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(run, range(8)))
    assert len(measured) == 3
    for result in results:
        for got, expected in zip(result, results[0], strict=True):
            assert torch.equal(got, expected)
