# SPDX-License-Identifier: Apache-2.0
"""The first run on a GPU, rehearsed with made-up steps: whatever one of them does, the rest is reported."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu_first, gpu_report, gpu_steps
from benchmarks.gpu_first import Group, Step

ROOT = Path(__file__).parents[2]
GPU = {"gpu": "Made-Up H900", "capability": [9, 0], "multiprocessors": 7, "torch": "9.9", "commit": "abc"}
LAYER = {"tokens": 577, "in_features": 768, "out_features": 3072, "epilogue": "gelu", "dtype": "bfloat16"}
CALL = {"direction": "forward", "batch": 8, "tokens": 577, "heads": 12, "head_dim": 64, "dtype": "bfloat16"}


def python(text):
    return "{python}", "-S", "-c", text


def shell(text):
    return "sh", "-c", text


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run with a machine that it knows, and no build."""
    (tmp_path / "out" / "machine").mkdir(parents=True)
    (tmp_path / "out" / "machine" / "machine.json").write_text(json.dumps(GPU))
    monkeypatch.setattr(gpu_first, "GRACE", 0.3)
    return gpu_first.Run(tmp_path / "out", tmp_path / "build")


def is_alive(pid):
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


def write_measured(out):
    """What steps of a real run leave, of which one was ended in the middle of a line."""
    linear = [
        LAYER | {"provider": "torch dense", "us": 30.0},
        LAYER | {"provider": "cuBLASLt dense, fused", "us": 20.0},
        LAYER | {"provider": "madtp cuda", "config": None, "us": 12.5},
        LAYER | {"provider": "madtp cuda", "config": [90, 128, 128, 1, 2], "us": 10.0},
        LAYER | {"provider": "madtp cuda", "config": [90, 64, 128, 1, 2], "us": 16.0},
        LAYER | {"provider": "madtp cuda", "config": [80, 64, 128, 1, 1], "wrong": True},
    ]
    text = "".join(json.dumps(line) + "\n" for line in linear) + '{"tokens": 57'
    files = {
        "linear/times.jsonl": text,
        "attention/times.jsonl": "".join(
            json.dumps(CALL | line) + "\n"
            for line in (
                {"provider": "torch SDPA", "us": 40.0},
                {"provider": "madtp triton with statistics", "us": 60.0},
                {"provider": "torch FlexAttention", "unavailable": "no compiler"},
            )
        ),
        "tower/times.jsonl": "".join(
            json.dumps(line) + "\n"
            for line in (
                {"provider": "Hugging Face SDPA", "graph": True, "tokens": None, "ms": 8.0},
                {"provider": "madtp tokens", "graph": True, "tokens": [577, 300, 101], "ms": 4.0},
                {"provider": "madtp 2:4", "failed": "a replay differs"},
            )
        ),
        "configuration-sm90-128x128-c2/results.jsonl": "".join(
            json.dumps({"rows": 65, "in_features": 144, "out_features": 136, "error": error, "right": error < 0.02})
            + "\n"
            for error in (0.001, 0.5)
        ),
    }
    for name, contents in files.items():
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text(contents)


def test_whatever_a_step_does_the_rest_still_reports(run, capsys):
    partial = "import time; f = open(r'{out}/times.jsonl', 'w'); f.write('1\\n'); f.flush(); time.sleep(60)"
    steps = [
        Step("fine", python("print('all well')"), 10, "Is it well?"),
        Step("red", python("print('E   AssertionError: 3 is not 4'); raise SystemExit(3)"), 10, "Is 3 4?"),
        Step("crash", python("import os; os.kill(os.getpid(), 11)"), 10, "Does it crash?"),
        Step("hang", shell("sleep 60 & echo $! > {out}/child; trap '' INT; sleep 60"), 0.3, "Does it hang?"),
        Step("partial", python(partial), 0.8, "What is kept?"),
        Step("absent", ("no-such-program",), 10, "Is it there?"),
        Step("not here", shell("echo no device; exit 77"), 10, "Does it apply?"),
        Step("lacks a tool", shell("true"), 10, "Is the tool there?", ("gpu", "tool:no-such-tool")),
        Step("lacks a module", shell("true"), 10, "Is it installed?", ("module:no_such_module",)),
        Step("lacks the build", shell("true"), 10, "Was it built?", ("extension",)),
        Group("empty", lambda out: [], 10, 2, "Were any found?"),
        Group("no part of it", lambda out: pytest.fail("asked"), 10, 2, "Was it built?", ("extension",)),
        Step("last", shell("echo $PYTHONPATH"), 10, "Does it still run?"),
    ]
    begun = time.monotonic()
    run.all(steps)
    assert time.monotonic() - begun < 20
    summary = json.loads((run.out / "summary.json").read_text())["steps"]
    assert list(summary) == [step.name for step in steps]
    assert {name: result["status"] for name, result in summary.items()} == {
        **{"fine": "passed", "red": "failed", "crash": "crashed", "hang": "timed out", "partial": "timed out"},
        **{"absent": "failed", "not here": "skipped", "lacks a tool": "skipped", "lacks a module": "skipped"},
        **{"lacks the build": "skipped", "empty": "skipped", "no part of it": "skipped", "last": "passed"},
    }
    reasons = {name: result.get("reason", "") for name, result in summary.items()}
    assert reasons["crash"] == "ended by SIGSEGV" and reasons["not here"] == "no device"
    assert reasons["lacks a tool"] == "no no-such-tool on PATH"
    assert reasons["lacks a module"] == "no_such_module is not installed"
    assert reasons["lacks the build"] == "the step build has made no extension (release)"
    assert reasons["no part of it"] == "the step build has made no extension (bounded)"
    assert "no-such-program" in reasons["absent"] and reasons["red"] == "exit code 3"
    assert not is_alive(int((run.out / "hang" / "child").read_text()))
    assert (run.out / "partial" / "times.jsonl").read_text() == "1\n"
    assert str(ROOT) in (run.out / "last" / "log.txt").read_text()
    assert re.search(r"^hang +timed out +\d+\.\d s  it ran past 0\.3 s$", capsys.readouterr().out, re.MULTILINE)

    text = gpu_report.page(run.out)
    assert "| fine | Is it well? | passed |" in text
    assert "* red, failed: exit code 3; `E   AssertionError: 3 is not 4`" in text
    assert "* crash, crashed: ended by SIGSEGV" in text and "* hang, timed out" in text
    assert "* lacks a module: no_such_module is not installed." in text


def test_steps_of_a_group_run_side_by_side_under_one_limit(run):
    def steps(out):
        return [Step(f"part {i}", shell("true" if i < 4 else "sleep 60"), 50, "?") for i in range(6)]

    begun = time.monotonic()
    run.all([Group("parts", steps, 2.0, 4, "?")])
    assert time.monotonic() - begun < 12
    statuses = [run.results[f"part {i}"]["status"] for i in range(6)]
    assert statuses == ["passed"] * 4 + ["timed out"] * 2


def test_the_time_of_a_run_ends(run, monkeypatch):
    monkeypatch.setattr(gpu_first, "DEADLINE", 0.0)
    run.all([Step("late", shell("true"), 10, "?")])
    assert run.results["late"]["reason"] == "the time of the run was over"


def test_without_a_gpu_every_step_says_why(run):
    (run.out / "machine" / "machine.json").write_text(json.dumps({"no_gpu": "the driver is too old"}))
    run.all([step for step in gpu_first.STEPS if step.name != "machine"])
    assert {result["status"] for result in run.results.values()} == {"skipped"}
    assert {result["reason"] for result in run.results.values()} == {"the driver is too old"}
    assert list(run.results) == [step.name for step in gpu_first.STEPS][1:]
    assert "No GPU: the driver is too old." in gpu_report.page(run.out)
    with pytest.raises(SystemExit, match="nothing was measured on a GPU in .*: the driver is too old"):
        gpu_report.copy_measured(run.out, run.out)


def test_the_table_of_steps(tmp_path):
    assert gpu_first.limits(gpu_first.STEPS) <= gpu_first.DEADLINE == 580
    listing = tmp_path / "listing"
    listing.mkdir()
    (listing / "configurations.json").write_text("[[90, 256, 128, 2], [80, 64, 64, 1]]")
    steps = [step for step in gpu_first.STEPS if isinstance(step, Step)]
    for group in (step for step in gpu_first.STEPS if isinstance(step, Group)):
        steps += group.steps(tmp_path)
    names = [step.name for step in steps]
    assert len(set(names)) == len(names) and "configuration-sm90-256x128-c2" in names
    for step in steps:
        [part.format(python="", out="", all="", build="") for part in step.command]
        for need in step.needs:
            gpu_first.missing(need, tmp_path, tmp_path, step.tree)
        assert step.tree in gpu_first.TREES and step.answers.endswith("?")
        files = [part for part in step.command if part.endswith(".py")]
        assert all(Path(file).is_file() for file in files)
    source = (ROOT / "csrc" / "tests" / "gpu" / "instructions_test.cpp").read_text()
    assert list(gpu_first.INSTRUCTIONS) == re.findall(r"^TEST\((\w+)\)", source, re.MULTILINE)
    with pytest.raises(ValueError, match="needs must be gpu, instructions, .*, got 'luck'"):
        gpu_first.missing("luck", tmp_path, tmp_path, "release")


def test_a_part_of_the_steps_and_an_unknown_one(capsys):
    assert [step.name for step in gpu_first.chosen(["linear", "tests"])] == ["machine", "tests", "linear"]
    assert gpu_first.chosen([]) == list(gpu_first.STEPS)
    with pytest.raises(SystemExit):
        gpu_first.main(["out", "--steps", "linear,luck"])
    assert "--steps must be of machine, build, " in capsys.readouterr().err


def test_the_command_leaves_the_source_tree_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_first, "BUILD", tmp_path / "build")
    steps = (Step("fine", shell("ls madtp_kernels/ops"), 10, "?"), Step("red", shell("false"), 10, "?"))
    monkeypatch.setattr(gpu_first, "STEPS", steps)
    monkeypatch.setattr(gpu_first, "chosen", lambda names: list(steps))
    assert gpu_first.main([str(tmp_path / "out")]) == 1
    assert "sparse24.py" in (tmp_path / "out" / "fine" / "log.txt").read_text()
    assert not list((tmp_path / "build").rglob("_C*.so"))
    assert "python -m benchmarks.gpu_report" in capsys.readouterr().out


def test_an_interrupt_lets_a_step_end_by_itself(run):
    program = (
        "import signal, sys, time; signal.signal(2, lambda *a: (open(r'{out}/report', 'w').write('kept'), sys.exit()))"
    )
    run.all([Step("step", python(program + "; time.sleep(60)"), 1.0, "?")])
    assert run.results["step"]["status"] == "timed out"
    assert (run.out / "step" / "report").read_text() == "kept"


def test_the_page_has_times_ratios_and_predictions(run, tmp_path):
    write_measured(run.out)
    run.all([Step("fine", shell("true"), 10, "?")])
    run.results["configuration-sm90-128x128-c2"] = {"answers": "?", "limit": 1, "status": "failed", "rc": 1}
    gpu_first.write_json(run.out / "summary.json", {"seconds": 1, "steps": run.results})
    predicted = tmp_path / "predicted"
    predicted.mkdir()
    layer = {"rows": 577, "in_features": 768, "out_features": 3072, "dense": 12.5}
    rows = [layer | {"weights": "cold", "sparse": 10.0}, layer | {"weights": "warm", "sparse": 1.0}]
    (predicted / "predictions_sm90.json").write_text(json.dumps(rows))
    text = gpu_report.page(run.out, predicted)
    assert text.startswith(
        "# First run on Made-Up H900\n\nMade-Up H900, compute capability 9.0, 7 multiprocessors, torch 9.9"
    )
    layer = "| 577 | 768 | 3072 | gelu | 30.0 | 20.0 |  |  | 12.5 | 10.0 | 90 128 128 1 2 | 1.60x | 2.00x |"
    assert layer in text
    assert "| 577 | 768 | 3072 | gelu | 10.0 | 12.5 | 1.25 | 1.25x | 1.60x |" in text
    assert "| forward | 8 | 577 | 12 | 40.0 (1.00) | 60.0 (1.50) | no compiler |" in text
    assert "| madtp tokens | yes | 4.000 | 101 | 2.00x |" in text and "| failed | a replay differs |" in text
    assert "| configuration-sm90-128x128-c2 | 2 | 1 | 5.0e-01 | 65 x 144 x 136 |" in text
    assert "No layer was both predicted and measured." in gpu_report.page(run.out, tmp_path / "none")


def test_measurements_are_copied_and_logs_are_not(run, tmp_path, capsys):
    write_measured(run.out)
    run.all([Step("fine", shell("echo it"), 10, "?")])
    gpu_report.main([str(run.out), "--copy-to", str(tmp_path / "results")])
    copied = tmp_path / "results" / "made-up-h900" / "gpu-first"
    names = {str(path.relative_to(copied)) for path in copied.rglob("*") if path.is_file()}
    assert {"summary.json", "machine/machine.json", "linear/times.jsonl"} <= names
    assert not any(name.endswith(".txt") for name in names)
    assert (run.out / "report.md").read_text() in capsys.readouterr().out
    with pytest.raises(SystemExit):
        gpu_report.main([str(tmp_path / "nowhere")])


def test_tests_are_counted_by_junit_or_by_the_log_of_a_run_that_was_ended(tmp_path):
    assert gpu_report.tests_of(tmp_path) is None
    (tmp_path / "log.txt").write_text(
        "a.py::test_a PASSED [ 1%]\na.py::test_b[x y] FAILED\na.py::c SKIPPED (no)\na.py::d "
    )
    assert gpu_report.tests_of(tmp_path) == {"passed": 1, "failed": 1, "skipped": 1}
    (tmp_path / "junit.xml").write_text(
        '<testsuites><testsuite tests="9" failures="2" errors="1" skipped="3"/></testsuites>'
    )
    assert gpu_report.tests_of(tmp_path) == {"passed": 3, "failed": 3, "skipped": 3}


def test_the_machine_says_what_it_lacks(tmp_path):
    gpu_steps.main(["machine", "--out", str(tmp_path)])
    facts = json.loads((tmp_path / "machine.json").read_text())
    assert facts["torch"] and facts["python"] and ("no_gpu" in facts) != ("gpu" in facts)


def test_what_is_built_follows_the_gpu():
    assert [gpu_steps.archs(capability) for capability in ([9, 0], [8, 9], [10, 0])] == ["90a", "89", "100"]


def test_only_the_standard_library_is_imported():
    """The runner outlives a torch that cannot be imported."""
    program = (
        "import sys, benchmarks.gpu_first, benchmarks.gpu_report, benchmarks.gpu_steps; print('torch' in sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert found.stdout == "False\n", found.stderr


def test_waits_are_bounded_in_tests_alone():
    """Where the definition is missing, the preprocessor leaves the loop as it was."""
    files = [ROOT / "CMakeLists.txt", ROOT / "setup.py"]
    files += [path for folder in ("cmake", "csrc") for path in (ROOT / folder).rglob("*") if path.is_file()]
    found = {str(path.relative_to(ROOT)) for path in files if "MADTP_BOUNDED_WAIT" in path.read_text()}
    assert found == {"csrc/cuda/ptx_sm90.cuh", "csrc/tests/gpu/CMakeLists.txt"}
