# SPDX-License-Identifier: Apache-2.0
"""madtp_kernels.env answers on a broken machine too."""

import json
import os
import subprocess
import sys

import pytest

from madtp_kernels import env

PROBES = ["extension", "cuda_build", "cpu_isa", "cpu_isas_available"]


def run(*arguments, **variables):
    return subprocess.run(
        [sys.executable, "-m", "madtp_kernels.env", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **variables},
    )


def test_json_is_what_environment_returns():
    done = run("--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.keys() == env.environment().keys()
    assert found["torch"] == env.environment()["torch"]


def test_text_has_a_line_for_each_entry_and_for_each_row_of_a_table():
    lines, found = run().stdout.splitlines(), env.environment()
    named = [line[:20].strip() for line in lines]
    assert [name for name in named if name] == [name.replace("_", " ") for name in found]
    rows = [line[21:] for line in lines[named.index("patterns") :][: len(found["patterns"])]]
    assert rows == [f"{how}: {', '.join(patterns)}" for how, patterns in found["patterns"].items()]
    assert max(map(len, rows)) <= 140


def test_without_the_extension_every_entry_says_how_to_build_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "madtp_kernels._C", None)  # import raises ImportError
    found = env.environment()
    for probe in PROBES:
        assert "madtp_kernels._C cannot be loaded" in found[probe]["missing"]
        assert "pip install -e ." in found[probe]["missing"]
    json.dumps(found)


def test_a_probe_that_breaks_is_reported(monkeypatch):
    def broken():
        raise OSError("unreadable")

    for name in ("_extension", "_cuda_build", "_cpu_isa", "_gpus", "_version", "_cmake_dir"):
        monkeypatch.setattr(env, name, broken)
    assert env.environment()["gpus"] == {"missing": "OSError: unreadable"}
    env.main([])


def test_an_unknown_instruction_set_lists_the_valid_ones():
    pytest.importorskip("madtp_kernels._C")
    found = json.loads(run("--json", MADTP_CPU_ISA="sse9").stdout)
    assert found["cpu_isa"]["missing"].startswith("MADTP_CPU_ISA must be one of baseline")
    assert "sse9" in found["cpu_isa"]["missing"]


def test_each_available_instruction_set_can_be_chosen():
    native = pytest.importorskip("madtp_kernels._C")
    assert set(native.cpu.available_isas()) <= set(native.build_info()["cpu_isas"])
    for isa in native.cpu.available_isas():
        assert json.loads(run("--json", MADTP_CPU_ISA=isa).stdout)["cpu_isa"] == isa


def test_cmake_dir_prints_nothing_but_the_directory(monkeypatch, capsys):
    monkeypatch.setattr(env, "__file__", "/nowhere/env.py")
    env.main(["--cmake-dir"])
    printed = capsys.readouterr()
    assert printed.out == "" and "pip install -e ." in printed.err
