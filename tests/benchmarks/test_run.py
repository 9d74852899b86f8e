# SPDX-License-Identifier: Apache-2.0
"""The benchmark runner: turns, gate, results, document."""

import dataclasses
import json
import time

import pytest
import torch

from benchmarks import measure, registry, run
from benchmarks.entry import Entry, Unavailable
from benchmarks.measure import MIN_TURNS, Spread, peak_bytes, ratios, take_turns
from benchmarks.peers.exports import exported
from benchmarks.peers.packages import package
from benchmarks.report import mean_tables, write_document

CPU = torch.device("cpu")


def missing(inputs):
    raise Unavailable("needs a GPU")


def equal_to_double(inputs, result, provider):
    assert torch.equal(result, inputs * 2), "not the double"


ENTRY = Entry(
    name="double",
    summary="twice the input",
    cases=[{"size": 64}, {"size": 128}],
    inputs=lambda case, device, seed: torch.full((case["size"],), float(seed), device=device),
    providers={
        "torch": lambda x: lambda: x * 2,
        "wrong": lambda x: lambda: x * 3 + 1,
        "other": lambda x: lambda: x + x,
        "absent": missing,
    },
    baseline="torch",
    gate=equal_to_double,
    bytes=lambda case, x: 2 * x.nbytes,
    flops=lambda case, x: x.numel(),
)


@pytest.fixture
def double(monkeypatch):
    monkeypatch.setattr(run, "entries", lambda: {"double": ENTRY})
    monkeypatch.setattr(run, "keep_freed_memory", lambda: None)


def test_functions_take_turns_on_their_own_sets():
    calls = []
    functions = {name: [lambda name=name, i=i: calls.append((name, i)) for i in range(2)] for name in ("a", "b")}
    seconds = take_turns(functions, CPU, rounds=8, warmup=0)
    rounds = [calls[i : i + 2] for i in range(0, 16, 2)]
    assert [sorted(each) for each in rounds] == [[("a", i % 2), ("b", i % 2)] for i in range(8)]
    assert len({each[0][0] for each in rounds}) == 2, "the order changes"
    assert {name: len(values) for name, values in seconds.items()} == {"a": 8, "b": 8}


def test_a_function_leaves_the_turns_after_its_time():
    functions = {"quick": [lambda: None], "slow": [lambda: time.sleep(0.002)]}
    seconds = take_turns(functions, CPU, rounds=8, limit=0.004, warm=["slow"])
    assert len(seconds["quick"]) == 8 and len(seconds["slow"]) == MIN_TURNS


def test_ratios_are_of_turns_and_a_single_call_is_held_against_the_median():
    assert ratios([2.0, 4.0, 6.0], [1.0, 1.0]) == [2, 4]
    assert ratios([2.0, 4.0, 6.0], [8.0]) == [0.5]
    assert ratios([8.0], [2.0, 4.0]) == [4, 2]


def test_spread_has_median_and_percentiles():
    assert Spread.of([1, 2, 3, 4, 5, 6]) == (3.5, 2, 5)
    assert Spread.of([2]) == (2, 2, 2)


def test_peak_memory_counts_temporaries_and_the_result():
    x = torch.zeros(1 << 18)
    assert 2 << 20 <= peak_bytes(lambda: (x + 1) * 2, CPU) < 3 << 20
    assert peak_bytes(lambda: x.add_(1), CPU) < 1 << 16


def test_a_wrong_result_is_not_timed_and_fails_the_run(double, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        run.main(["double", "--rounds", "3", "--threads", "1", "--out", str(tmp_path)])
    assert "double: wrong: not the double" in str(stopped.value)
    result = json.loads((tmp_path / "double.json").read_text())
    assert result["baseline"] == "torch" and result["machine"]["torch"] == torch.__version__
    assert [block["case"]["size"] for block in result["blocks"]] == [64, 128]
    rows = {row["provider"]: row for row in result["blocks"][0]["rows"]}
    assert list(rows) == ["torch", "wrong", "other", "absent"]
    assert rows["absent"] == {"provider": "absent", "unavailable": "needs a GPU"}
    assert set(rows["wrong"]) == {"provider", "wrong"}
    assert rows["torch"]["speedup"] == {"median": 1.0, "p20": 1.0, "p80": 1.0}
    assert rows["other"]["seconds"]["p20"] <= rows["other"]["seconds"]["median"] <= rows["other"]["seconds"]["p80"]
    assert rows["other"]["peak_bytes"] >= 256 and rows["other"]["gb_per_second"] > 0
    assert "double: size 64, 1 threads" in capsys.readouterr().out


def test_the_document_shows_ratios_and_no_absolute_times_of_a_cpu(double, tmp_path):
    with pytest.raises(SystemExit):
        run.main(["--rounds", "3", "--threads", "1", "--out", str(tmp_path / "cpu")])
    write_document(tmp_path, tmp_path / "benchmarks.md")
    text = (tmp_path / "benchmarks.md").read_text()
    assert "## double (CPU, " in text and "| torch (baseline) | 1.00x | 1.00-1.00 |" in text
    assert "| wrong | wrong | not the double |" in text
    assert "absent" not in text and " us |" not in text and "![" not in text


def test_cases_that_differ_in_one_number_are_plotted(double, monkeypatch, tmp_path):
    entry = dataclasses.replace(ENTRY, against="size", providers={"torch": ENTRY.providers["torch"], "absent": missing})
    monkeypatch.setattr(run, "entries", lambda: {"double": entry})
    run.main(["--rounds", "3", "--threads", "1,2", "--out", str(tmp_path / "cpu")])
    write_document(tmp_path, tmp_path / "benchmarks.md")
    assert "![time and memory against size](benchmark-cpu-double.png)" in (tmp_path / "benchmarks.md").read_text()
    assert (tmp_path / "benchmark-cpu-double.png").stat().st_size > 10_000


def test_a_long_call_is_the_only_one_and_a_very_long_one_the_last():
    calls = []

    def sleeper(name, seconds):
        return lambda x: lambda: calls.append(name) or time.sleep(seconds) or x * 2

    providers = {"torch": lambda x: lambda: x * 2, "long": sleeper("long", 0.15), "longest": sleeper("longest", 0.55)}
    entry = dataclasses.replace(ENTRY, providers=providers, seconds=0.1, sets=1, memory=False)
    given_up = {}
    for size, expected in ((64, ["long", "longest"]), (128, ["long"])):
        calls.clear()
        rows = {row["provider"]: row for row in run.run_case(entry, {"size": size}, CPU, 3, given_up)}
        assert calls == expected
        assert rows["torch"]["turns"] == 3 and rows["long"]["turns"] == 0 and "peak_bytes" not in rows["torch"]
        assert rows["long"]["speedup"]["p20"] == rows["long"]["speedup"]["p80"] < 0.5
    assert "a call took 1 seconds in a case with less work" in rows["longest"]["unavailable"]


@pytest.mark.parametrize("when", ["prepared", "called"])
def test_a_provider_that_raises_is_wrong_and_the_others_are_timed(when):
    def fail(x):
        raise RuntimeError("no such operator\nat line 3")

    failing = fail if when == "prepared" else lambda x: lambda: fail(x)
    entry = dataclasses.replace(ENTRY, providers={"torch": ENTRY.providers["torch"], "other": failing})
    rows = run.run_case(entry, {"size": 64}, CPU, 1)
    assert rows[0]["turns"] == 1 and rows[1] == {"provider": "other", "wrong": "RuntimeError: no such operator"}


def test_geometric_means_stand_for_the_cases_that_differ_in_one_key():
    def block(tokens, size, ours, slow=None):
        rows = [{"provider": "torch", "speedup": {"median": 1.0}}, {"provider": "ours", "speedup": {"median": ours}}]
        rows.append({"provider": "slow"} | ({"speedup": {"median": slow}} if slow else {"unavailable": "too slow"}))
        rows.append({"provider": "absent", "unavailable": "no"})
        return {"case": {"tokens": tokens, "size": size, "dtype": "float32"}, "threads": 2, "rows": rows}

    blocks = [block(1, 64, 2.0, slow=0.5), block(1, 128, 8.0), block(8, 64, 3.0), block(8, 128, 3.0)]
    assert mean_tables({"blocks": blocks, "means": ["size"], "baseline": "torch"}).splitlines() == [
        "**dtype float32, 2 threads**",
        "",
        "| tokens | 1 | 8 |",
        "|---|---|---|",
        "| torch (baseline) | 1.00x (1.00-1.00) | 1.00x (1.00-1.00) |",
        "| ours | 4.00x (2.00-8.00) | 3.00x (3.00-3.00) |",
        "| slow | 0.50x (0.50-0.50) in 1 of 2 | not called |",
    ]


def test_the_document_shows_means_versions_and_reasons(double, monkeypatch, tmp_path):
    providers = {"torch": ENTRY.providers["torch"], "absent": missing}
    entry = dataclasses.replace(ENTRY, providers=providers, means=["size"], packages=["numpy", "no-such-package"])
    entry = dataclasses.replace(entry, cases=[{"rows": 1, "size": 64}, {"rows": 1, "size": 128}])
    monkeypatch.setattr(run, "entries", lambda: {"double": entry})
    run.main(["--rounds", "1", "--threads", "1", "--set", "size=32", "--out", str(tmp_path / "cpu")])
    result = json.loads((tmp_path / "cpu" / "double.json").read_text())
    assert [block["case"] for block in result["blocks"]] == [{"rows": 1, "size": 32}]
    assert "numpy" in result["machine"] and "no-such-package" not in result["machine"]
    write_document(tmp_path, tmp_path / "benchmarks.md")
    text = (tmp_path / "benchmarks.md").read_text()
    assert "| torch (baseline) | 1.00x (1.00-1.00) |" in text and "* absent: needs a GPU.\n" in text
    assert f"numpy {result['machine']['numpy']}." in text


def test_an_export_is_written_once_for_each_model_and_version(monkeypatch, tmp_path):
    monkeypatch.setenv("MADTP_CACHE", str(tmp_path))
    written = []

    def write(folder):
        written.append(folder)
        (folder / "model").write_text("it")

    folders = [exported("kind", {"layers": layers}, ["torch"], write) for layers in (2, 2, 3)]
    assert folders[0] == folders[1] != folders[2] and len(written) == 2
    assert (folders[0] / "model").read_text() == "it" and folders[0].parent == tmp_path / "peers"

    def fail(folder):
        raise ValueError("disk")

    with pytest.raises(ValueError, match="disk"):
        exported("kind", {"layers": 4}, ["torch"], fail)
    assert sorted(tmp_path.glob("peers/*")) == sorted(set(folders)), "nothing half-made stays"


def test_a_peer_that_is_not_installed_is_unavailable(tmp_path):
    with pytest.raises(Unavailable, match=r"no_such_package is not installed: pip install -e .\[peers\]"):
        package("no_such_package.part")
    with pytest.raises(Unavailable, match="no-such-package is not installed"):
        exported("kind", {}, ["no-such-package"], lambda folder: None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["triple"], "ENTRY must be one of double, got triple"),
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--seconds", "0"], "--seconds must be positive, got 0.0"),
        (["--threads", "0"], "--threads must be positive numbers like 1,2, got '0'"),
        (["--threads", "two"], "--threads must be positive numbers like 1,2, got 'two'"),
        (["--set", "size"], "--set must be KEY=VALUE with a key of the cases, got 'size'"),
        (["--set", "weight=3"], "--set must be KEY=VALUE with a key of the cases, got 'weight=3'"),
        (["--device", "abacus"], "--device must be cpu or cuda, got 'abacus'"),
    ],
)
def test_bad_arguments(double, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        run.main(arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_a_baseline_must_be_a_provider():
    with pytest.raises(ValueError, match="baseline must be one of .*, got 'numpy'"):
        dataclasses.replace(ENTRY, baseline="numpy")


SLOW = {
    "attention",
    "attention_backward",
    "attention_length",
    "attention_ragged",
    "decoders_answer",
    "decoders_first_token",
    "models",
    "towers",
}  # take most of a minute


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in registry.entries()]
)
def test_every_entry_is_right_on_a_small_case(name):
    entry = registry.entries()[name]
    small = {"batch": 3, "tokens": 40, "channels": 24, "alignment_tokens": 9, "heads": 2, "head_dim": 32}
    small |= {"rows": 48, "columns": 64, "pixels": 128, "patch": 8, "width": 128, "layers": 4}
    small |= {"in_features": 128, "out_features": 96, "tiles": 0, "words": 5, "tower_layers": 3, "decoder_layers": 4}
    for dtype in ("float32", "bfloat16"):
        case = {name: small.get(name, value) for name, value in entry.cases[0].items()} | {"dtype": dtype}
        rows = run.run_case(entry, case, CPU, rounds=1)
        assert not [row for row in rows if "wrong" in row]
        assert len([row for row in rows if "seconds" in row]) >= 3


def test_towers_of_ours_are_what_hugging_face_computes():
    entry = registry.entries()["towers"]
    quick = {name: run for name, run in entry.providers.items() if name.startswith(("Hugging", "madtp"))}
    quick = {name: run for name, run in quick.items() if "MACs" not in name}
    case = {**entry.cases[-1], "pixels": 28, "width": 32, "mlp": 48, "heads": 2, "layers": 2}
    rows = run.run_case(dataclasses.replace(entry, providers=quick), case, CPU, rounds=1)
    assert [row["provider"] for row in rows if "seconds" in row] == list(quick)


class Gpu:
    """What the timer calls of torch.cuda, written down. A call is queued in `queued` seconds."""

    def __init__(self, monkeypatch):
        self.order, self.now, gpu = [], 0.0, self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                gpu.order.append("record")

            def synchronize(self):
                gpu.order.append("synchronize")

            def elapsed_time(self, end):
                return 0.25 if end is not self else 0.0  # milliseconds

        class Flush:
            def zero_(self):
                gpu.order.append("flush")

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda clocks: self.order.append(clocks))
        monkeypatch.setattr(torch, "empty", lambda *sizes, dtype, device: Flush())
        monkeypatch.setattr(measure.time, "perf_counter", lambda: self.now)

    def takes(self, seconds):
        def call():
            self.order.append("call")
            self.now += seconds

        return call


def test_a_gpu_sleeps_until_the_whole_call_is_queued(monkeypatch):
    gpu = Gpu(monkeypatch)
    timer, quick, slow, waiting = measure._cuda_timer(), gpu.takes(1e-5), gpu.takes(5e-3), gpu.takes(30.0)
    assert timer(quick) == 0.25e-3
    assert gpu.order == ["flush", measure.MIN_CLOCKS_AHEAD, "record", "call", "record", "synchronize"]
    for function in (quick, slow, slow, waiting, waiting):
        timer(function)
    sleeps = [entry for entry in gpu.order if isinstance(entry, int)]
    longest = int(measure.MAX_SECONDS_AHEAD * measure.CLOCKS_PER_SECOND)
    least = measure.MIN_CLOCKS_AHEAD
    assert sleeps == [least, least, least, int(1e-2 * measure.CLOCKS_PER_SECOND), least, longest]


def test_a_gpu_has_cases_of_its_own(double, monkeypatch, tmp_path, capsys):
    gpu = torch.device("cuda")
    assert ENTRY.cases_on(gpu) == ENTRY.cases == ENTRY.cases_on(CPU)
    entry = dataclasses.replace(ENTRY, gpu_cases=[{"size": 8}])
    assert entry.cases_on(gpu) == [{"size": 8}] and entry.cases_on(CPU) == ENTRY.cases
    none = dataclasses.replace(ENTRY, cases=())
    monkeypatch.setattr(run, "entries", lambda: {"double": none})
    run.main(["--out", str(tmp_path)])
    assert capsys.readouterr().out == "double: nothing of it runs on cpu\n" and not list(tmp_path.iterdir())


def test_what_the_cuda_kernel_refuses_is_not_measured_on_a_gpu():
    entries, gpu = registry.entries(), torch.device("cuda")
    for name in ("sparse24_linear", "sparse24_sweep", "attention_backward", "prune_step"):
        assert {case["dtype"] for case in entries[name].cases_on(gpu)} == {"bfloat16"}
    assert {case["dtype"] for case in entries["attention"].cases_on(gpu)} == {"bfloat16", "float16"}
    assert {577, 197, 2308} <= {case["tokens"] for case in entries["attention_backward"].cases_on(gpu)}
    assert "madtp triton with statistics" in entries["attention_backward"].providers
    for name in ("sparse24_pack", "quantized_linear"):
        assert not entries[name].cases_on(gpu)
