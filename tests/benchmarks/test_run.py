# SPDX-License-Identifier: Apache-2.0
"""The benchmark runner: turns, gate, results, document."""

import dataclasses
import json

import pytest
import torch

from benchmarks import registry, run
from benchmarks.entry import Entry, Unavailable
from benchmarks.measure import Spread, peak_bytes, take_turns
from benchmarks.report import write_document

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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["triple"], "ENTRY must be one of double, got triple"),
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--threads", "0"], "--threads must be positive numbers like 1,2, got '0'"),
        (["--threads", "two"], "--threads must be positive numbers like 1,2, got 'two'"),
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


SLOW = {"attention_backward", "attention_length", "attention_ragged", "models"}  # take most of a minute


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in registry.entries()]
)
def test_every_entry_is_right_on_a_small_case(name):
    entry = registry.entries()[name]
    small = {"batch": 3, "tokens": 40, "channels": 24, "alignment_tokens": 9, "heads": 2, "head_dim": 32}
    small |= {"rows": 48, "columns": 64, "pixels": 128, "patch": 8, "width": 128, "layers": 4}
    for dtype in ("float32", "bfloat16"):
        case = {name: small.get(name, value) for name, value in entry.cases[0].items()} | {"dtype": dtype}
        rows = run.run_case(entry, case, CPU, rounds=1)
        assert not [row for row in rows if "wrong" in row]
        assert len([row for row in rows if "seconds" in row]) >= 3
