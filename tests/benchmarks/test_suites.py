# SPDX-License-Identifier: Apache-2.0
"""Suites, their ceilings and files, the comparison of two runs, and the pictures."""

import json
import math
from pathlib import Path

import pytest
import torch
from test_run import ENTRY

from benchmarks import compare, result_files, run, schema, suite_plots
from benchmarks.ceilings import ceilings, of_ceiling
from benchmarks.registry import entries
from benchmarks.suites import SUITES, Suite

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
LIMITS = {"flops_per_second": {"float32": 1e9}, "bytes_per_second": 1e9}


def row(provider, speedup, spread=0.1, turns=9):
    """Seconds and speed-up of a row whose baseline takes a second."""
    low, high = speedup * (1 - spread), speedup * (1 + spread)
    return {
        "provider": provider,
        "turns": turns,
        "seconds": {"median": 1 / speedup, "p20": 1 / high, "p80": 1 / low},
        "speedup": {"median": speedup, "p20": low, "p80": high},
        "gb_per_second": speedup,
        "gflop_per_second": 8 * speedup,
    }


def result(*rows, device="one", threads=1):
    return {
        "entry": "double",
        "summary": "twice the input",
        "baseline": "torch",
        "machine": {"device": device, "cpu_isa": "avx2", "torch": "2"},
        "blocks": [{"case": {"size": 64}, "threads": threads, "rows": [row("torch", 1.0), *rows]}],
    }


def suite_of(entry):
    return {
        "version": 1,
        "suite": "vlm",
        "machine": entry["machine"],
        "ceilings": {str(entry["blocks"][0]["threads"]): LIMITS},
        "entries": [entry],
    }


@pytest.mark.parametrize("name", SUITES)
def test_cases_of_a_suite_are_those_that_its_entries_take(name):
    known = entries()
    for entry, cases in SUITES[name].cases.items():
        keys = [set(case) for case in known[entry].cases]
        assert all(set(case) in keys for case in cases), f"{entry} takes other keys"
        assert len({json.dumps(case) for case in cases}) == len(cases)
    assert {case["dtype"] for case in run.suite_cases(name, torch.device("cuda"))["sparse24_linear"]} == {"bfloat16"}


def test_ceilings_are_rates_of_the_fastest_turn():
    found = ceilings(CPU, ["float32", "bfloat16"], size=32, copy=1 << 16)
    assert set(found["flops_per_second"]) == {"float32", "bfloat16"}
    assert found["bytes_per_second"] > 0 and found["flops_per_second"]["float32"] > 0


def test_a_row_is_held_against_what_binds_it():
    assert of_ceiling({"seconds": {}, "gb_per_second": 0.5, "gflop_per_second": 0.25}, LIMITS, "float32") == 0.5
    assert of_ceiling({"seconds": {}, "gb_per_second": 0.1, "gflop_per_second": 0.25}, LIMITS, "float32") == 0.25
    assert of_ceiling({"seconds": {}, "gb_per_second": 0.1}, LIMITS, "float32") == 0.1
    assert of_ceiling({"seconds": {}, "gb_per_second": 0.1}, LIMITS, "bfloat16") is None
    assert of_ceiling({"unavailable": "no"}, LIMITS, "float32") is None


@pytest.fixture
def small_suite(monkeypatch):
    """The suite vlm as one entry that is quick."""
    monkeypatch.setattr(run, "entries", lambda: {"double": ENTRY})
    monkeypatch.setattr(run, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(run, "ceilings", lambda device, dtypes: dict(LIMITS))
    monkeypatch.setitem(SUITES, "vlm", Suite("small", {"double": [{"size": 32}, {"size": 64}]}))


def test_a_suite_goes_to_one_file_with_ceilings(small_suite, tmp_path, capsys):
    path = tmp_path / "out.json"
    with pytest.raises(SystemExit, match="double: wrong: not the double"):
        run.main(["--suite", "vlm", "--json", str(path), "--threads", "1,2", "--rounds", "3"])
    found = result_files.read(path)
    assert found["suite"] == "vlm" and found["ceilings"] == {"1": LIMITS, "2": LIMITS}
    (entry,) = result_files.entries_of(found)
    assert [(block["case"], block["threads"]) for block in entry["blocks"]] == [
        ({"size": size}, threads) for threads in (1, 2) for size in (32, 64)
    ]
    rows = {row["provider"]: row for row in entry["blocks"][0]["rows"]}
    assert rows["other"]["of_ceiling"] > 0 and "of_ceiling" not in rows["wrong"]
    assert not list(tmp_path.glob("*/")) and "of ceiling" in capsys.readouterr().out
    assert compare.main([str(path), str(path)]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "vlm"], "--suite and --json must come together"),
        (["--json", "out.json"], "--suite and --json must come together"),
        (["--suite", "vit", "--json", "out.json"], "invalid choice: 'vit'"),
        (["double", "--suite", "vit-b-384", "--json", "out.json"], "ENTRY must be one of attention"),
    ],
)
def test_bad_arguments_of_suites(small_suite, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        run.main(arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (row("madtp", 2.0), row("madtp", 2.1), "same"),  # within the spread
        (row("madtp", 2.0), row("madtp", 1.7), "same"),
        (row("madtp", 2.0), row("madtp", 1.5), "slower"),
        (row("madtp", 2.0), row("madtp", 3.0), "faster"),
        (row("madtp", 2.0, spread=0.0), row("madtp", 1.97, spread=0.0), "same"),  # less than what counts
        (row("madtp", 2.0, spread=0.0), row("madtp", 1.9, spread=0.0), "slower"),
        (row("madtp", 2.0, turns=0), row("madtp", 1.0), "one call"),
        (row("madtp", 2.0), {"provider": "madtp", "wrong": "by 3"}, "wrong"),
        (row("madtp", 2.0), row("madtp", 1.0, turns=1), "one call"),
        (row("madtp", 2.0), {"provider": "madtp", "unavailable": "no"}, "gone"),
        ({"provider": "madtp", "unavailable": "no"}, row("madtp", 2.0), "new"),
        ({"provider": "madtp", "unavailable": "no"}, {"provider": "madtp", "wrong": "by 3"}, "wrong"),
        ({"provider": "madtp", "wrong": "by 2"}, {"provider": "madtp", "wrong": "by 3"}, "wrong"),
    ],
)
def test_what_is_called_slower(before, after, expected):
    changes = {change.row[3]: change for change in compare.compare(result(before), result(after))}
    assert changes["torch"].verdict == "same" and changes["madtp"].verdict == expected


def test_the_ratio_is_time_over_time():
    (_, change) = compare.compare(result(row("madtp", 2.0, spread=0.0)), result(row("madtp", 1.0, spread=0.0)))
    assert change.ratio == (2.0, 2.0, 2.0)
    (_, change) = compare.compare(result(row("madtp", 2.0)), result(row("madtp", 1.0)), by="seconds")
    assert change.ratio[0] == pytest.approx(2 * 0.9 / 1.1) and change.ratio[2] == pytest.approx(2 * 1.1 / 0.9)


def test_what_peers_changed_by_is_noise():
    before = result(row("peer", 1.0, spread=0.0), row("madtp", 2.0, spread=0.0))
    after = result(row("peer", 1.25, spread=0.0), row("madtp", 1.7, spread=0.0))
    assert compare.noise(before, after, "speedup") == pytest.approx(0.25)
    assert compare.noise(before, before, "speedup") == 0 == compare.noise(result(), result(), "speedup")
    assert [change.verdict for change in compare.compare(before, after)] == ["same", "same", "same"]
    slower = result(row("peer", 1.25, spread=0.0), row("madtp", 1.5, spread=0.0))
    assert [change.verdict for change in compare.compare(before, slower)] == ["same", "same", "slower"]
    times = result(row("torch", 0.5, spread=0.0))  # a baseline that took twice as long is noise of times
    assert compare.noise(result(), times, "seconds") == pytest.approx(1.0)


def written(tmp_path, name, *rows, **about):
    path = tmp_path / f"{name}.json"
    result_files.write(suite_of(result(*rows, **about)), path)
    return str(path)


def test_only_ours_decide_the_exit_code(tmp_path, capsys):
    before = written(tmp_path, "before", row("madtp", 2.0), row("peer", 2.0))
    after = written(tmp_path, "after", row("madtp", 2.0), row("peer", 1.0))
    assert compare.main([before, after]) == 0
    assert "same       2.00 (1.64-2.44)" not in capsys.readouterr().out
    assert compare.main([before, after, "--all"]) == 0
    assert "same       2.00 (1.64-2.44)  double: size 64, 1 threads: peer" in capsys.readouterr().out
    assert compare.main([before, written(tmp_path, "slow", row("madtp", 1.0), row("peer", 2.0))]) == 1
    shown = capsys.readouterr().out
    assert "slower     2.00 (1.64-2.44)  double: size 64, 1 threads: madtp" in shown
    assert "1 slower, 0 faster, 2 same, 0 one call, 0 wrong, 0 gone, 0 new; time over time, by speedup" in shown
    gone = written(tmp_path, "gone", {"provider": "madtp", "unavailable": "not built"}, row("peer", 2.0))
    assert compare.main([before, gone]) == 1


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_times_are_positive_numbers_in_order(tmp_path, value):
    for part in ("p20", "median", "p80"):
        bad = row("madtp", 2.0)
        bad["speedup"][part] = value
        with pytest.raises(result_files.ResultError, match="must hold speedup above 0 with p20 <= median <= p80"):
            written(tmp_path, "bad", bad)
    assert not (tmp_path / "bad.json").exists()


def test_runs_of_other_machines_are_compared_on_request_alone(tmp_path, capsys):
    before, after = written(tmp_path, "a", row("madtp", 2.0)), written(tmp_path, "b", row("madtp", 2.0), device="two")
    with pytest.raises(SystemExit) as stopped:
        compare.main([before, after])
    assert stopped.value.code == 2 and "both runs must be of one machine, device differ" in capsys.readouterr().err
    assert compare.main([before, after, "--other-machine"]) == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "must be JSON"),
        ("[]", "must hold results of benchmarks"),
        ('{"version": 2, "suite": "vlm"}', "must be of a version up to 1, got 2"),
        ('{"suite": "vlm"}', "the file must have version, machine, ceilings, entries"),
    ],
)
def test_what_is_no_result_is_refused(tmp_path, capsys, text, message):
    path = tmp_path / "odd.json"
    path.write_text(text)
    with pytest.raises(result_files.ResultError, match=message):
        result_files.read(path)
    with pytest.raises(SystemExit) as stopped:
        compare.main([str(path), str(path)])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_a_result_that_breaks_the_schema_is_not_written(tmp_path):
    broken = result(row("madtp", 2.0))
    broken["blocks"][0]["rows"][1]["seconds"]["p20"] = "soon"
    with pytest.raises(
        result_files.ResultError, match=r"blocks\[0\].rows\[1\].seconds.p20 must be of type number, got str"
    ):
        result_files.write(broken, tmp_path / "out.json")
    assert not list(tmp_path.iterdir())


def test_every_committed_result_fits_the_schema():
    found = [path for path in (ROOT / "benchmarks" / "results" / "cpu").glob("*.json")]
    assert len(found) > 10
    for path in found:
        result_files.read(path)


def _keywords(part):
    if isinstance(part, list):
        return set().union(*map(_keywords, part))
    if not isinstance(part, dict):
        return set()
    named = {"properties", "$defs"}  # whose keys are names
    below = [value for key, value in part.items() if key not in named]
    below += [value for key in named & set(part) for value in part[key].values()]
    return set(part) | set().union(set(), *map(_keywords, below))


def test_the_schema_uses_what_the_checker_knows():
    assert _keywords(result_files.SCHEMA) <= schema.KEYWORDS


@pytest.mark.parametrize(
    ("value", "rules", "expected"),
    [
        (1, {"type": "integer"}, None),
        (True, {"type": "integer"}, "it must be of type integer, got bool"),
        (1.5, {"type": ["integer", "null"]}, "it must be of type ['integer', 'null'], got float"),
        (2, {"const": 1}, "it must be 1, got 2"),
        ({"a": 1}, {"properties": {"a": {"type": "string"}}}, "it.a must be of type string, got int"),
        ({"b": 1}, {"properties": {}, "additionalProperties": False}, "it must have no b"),
        ({"b": 1}, {"additionalProperties": {"type": "string"}}, "it.b must be of type string, got int"),
        ([1, "x"], {"items": {"type": "integer"}}, "it[1] must be of type integer, got str"),
        (1, {"anyOf": [{"type": "string"}, {"type": "integer"}]}, None),
        (1, {"anyOf": [{"type": "string"}, {"const": 2}]}, "it must be of type string, got int or it must be 2, got 1"),
    ],
)
def test_what_breaks_a_schema_is_said(value, rules, expected):
    assert schema.problem(value, rules, {}, "it") == expected


def test_pictures_of_a_suite(tmp_path):
    path = written(tmp_path, "suite", row("madtp cpu", 2.0), row("peer", 3.0))
    found = result_files.read(Path(path))
    assert suite_plots.points(found, 1) == {"double: madtp cpu": [(8.0, 16e9, "float32")]}
    assert suite_plots.roofs(LIMITS) == {"float32": (1.0, 1e9)}
    assert suite_plots.table(found, 1) == (["madtp cpu"], ["double: 64"], [[2.0]])
    suite_plots.main([path, "--out", str(tmp_path / "pictures")])
    names = sorted(picture.name for picture in (tmp_path / "pictures").iterdir())
    assert names == ["vlm-1-threads-roofline.png", "vlm-1-threads-speedups.png"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: found.update(entries=[]), "must have blocks to draw, got a suite of none"),
        (lambda found: found.update(suite="a/b"), "must be of a suite whose name can be that of a file, got 'a/b'"),
        (lambda found: found.update(ceilings={}), "must have the ceilings of its rows, got none at 1 threads"),
        (lambda found: found["ceilings"]["1"].update(bytes_per_second=0), "must have ceilings above 0"),
        (lambda found: found["entries"][0]["blocks"][0].update(rows=[]), "must have speed-ups of madtp to draw"),
        (lambda found: found.clear(), "must hold results of benchmarks: the file must have"),
    ],
)
def test_what_cannot_be_drawn_is_a_line(tmp_path, capsys, change, message):
    path = Path(written(tmp_path, "suite", row("madtp cpu", 2.0)))
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))
    with pytest.raises(SystemExit):
        suite_plots.main([str(path), "--out", str(tmp_path / "pictures")])
    assert message in capsys.readouterr().err and not (tmp_path / "pictures").exists()


@pytest.mark.parametrize("text", ["", "[" * 100_000, "[]", "3"])
def test_other_json_is_a_line(tmp_path, capsys, text):
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(SystemExit):
        suite_plots.main([str(tmp_path / "other.json"), "--out", str(tmp_path / "pictures")])
    assert "other.json must " in capsys.readouterr().err.splitlines()[-1]


def test_rows_without_bytes_are_left_out(tmp_path):
    path = Path(written(tmp_path, "suite", row("madtp cpu", 2.0) | {"gb_per_second": 0.0}))
    assert suite_plots.points(result_files.read(path), 1) == {}
    suite_plots.main([str(path), "--out", str(tmp_path / "pictures")])


def test_pictures_are_of_suites(tmp_path, capsys):
    result_files.write(result(row("madtp", 2.0)), tmp_path / "entry.json")
    with pytest.raises(SystemExit):
        suite_plots.main([str(tmp_path / "entry.json"), "--out", str(tmp_path)])
    assert "must be of a suite, which has ceilings, got one of the entry double" in capsys.readouterr().err
