# SPDX-License-Identifier: Apache-2.0
"""python -m benchmarks.gpu_first OUT: what a few minutes on a GPU can answer, the most informative first.

Every step is a process group of its own with a limit of its own, and leaves a folder in OUT: what it printed, what it
measured, and a result. A step that hangs, crashes or fails costs itself alone, and one whose needs are missing is
skipped with the reason. `python -m benchmarks.gpu_report OUT` makes a page of it, of a part of it too.

Nothing is downloaded or installed, and the source tree stays as it is: the extension is built into build/gpu-first,
once as it is released and once with waits that end in a trap. Only the standard library is needed here.
"""

from __future__ import annotations

import argparse
import glob
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "gpu-first"
SUMMARY = "summary.json"
TREES = ("release", "bounded")  # of the package, each with its extension
SKIPPED = 77  # the exit code of a test that cannot run here
GRACE = 3.0  # seconds between an interrupt, after which pytest still writes its report, and the end
DEADLINE = 580.0  # seconds; all limits together


@dataclass(frozen=True)
class Step:
    """One question, asked in a process group of its own.

    Args:
        name: of its folder.
        command: {python}, {out} (its folder), {all} (that of the run) and {build} are filled in.
        limit: seconds.
        answers: the question.
        needs: "gpu", "module:NAME", "tool:NAME", "extension" of the tree; without one of them it is skipped.
        tree: which extension it runs with.
    """

    name: str
    command: tuple[str, ...]
    limit: float
    answers: str
    needs: tuple[str, ...] = ()
    tree: str = "release"


@dataclass(frozen=True)
class Group:
    """Steps that run side by side, so many at a time.

    Args:
        name: by which they are asked for, all of them.
        steps: (the folder of the run) -> the steps, which may follow from what those before have found.
        limit: seconds, for all of them.
        workers: at a time.
        answers: the question.
        needs: as of a step; without one of them the whole group is skipped.
    """

    name: str
    steps: Callable[[Path], Sequence[Step]]
    limit: float
    workers: int
    answers: str
    needs: tuple[str, ...] = ()


# --- what is asked

TORCH = ("gpu", "module:torch")
OURS = (*TORCH, "extension")
TRITON = (*TORCH, "module:triton")
PYTEST = (*TORCH, "module:pytest")


def _ours(*arguments: str) -> tuple[str, ...]:
    return "{python}", "-m", "benchmarks.gpu_steps", *arguments, "--out", "{out}"


def _configurations(out: Path) -> list[Step]:
    """A step for each kind of configuration that `listing` has found: a trap ends the context of one process only."""
    kinds = read_json(out / "listing" / "configurations.json") or []
    return [
        Step(
            f"configuration-sm{architecture}-{tokens}x{features}-c{cluster}",
            _ours("configuration", *map(str, (architecture, tokens, features, cluster))),
            limit=25,
            answers="Are its results right, on every shape and epilogue?",
            needs=OURS,
            tree="bounded",
        )
        for architecture, tokens, features, cluster in kinds
    ]


# tests of gpu_instructions_test
INSTRUCTIONS = ("ldmatrix", "ldmatrix_trans", "stmatrix_trans", "cp_async", "mma_sp", "wgmma_sp", "tma_boxes")


def _instructions(out: Path) -> list[Step]:
    return [
        Step(
            f"instruction-{name}",
            ("{build}/cmake/csrc/tests/gpu/gpu_instructions_test", name),
            limit=20,
            answers="Does it do what the simulated machine says it does?",
        )
        for name in INSTRUCTIONS
    ]


TESTS = (  # file, needs, tree
    ("kernels/test_sparse24_gpu.py", (*PYTEST, "extension"), "bounded"),
    ("kernels/test_triton_attention_gpu.py", (*PYTEST, "module:triton"), "release"),
    ("kernels/test_gpu.py", (*PYTEST, "module:triton", "extension"), "bounded"),
    ("kernels/test_triton.py", (*PYTEST, "module:triton"), "release"),
    ("kernels/test_triton_attention.py", (*PYTEST, "module:triton"), "release"),
    ("kernels/test_triton_attention_rows.py", (*PYTEST, "module:triton"), "release"),
    ("kernels/test_sparse24_cusparselt.py", PYTEST, "release"),
    ("kernels/test_sparse24_formats.py", PYTEST, "release"),
    ("kernels/test_tuning_cuda.py", (*PYTEST, "extension"), "release"),
    ("madtp/test_capacity.py", (*PYTEST, "module:transformers", "module:triton"), "release"),
)


def _tests(out: Path) -> list[Step]:
    options = "-v -m gpu --tb=short --maxfail=20 -p no:cacheprovider -o faulthandler_timeout=60".split()
    return [
        Step(
            Path(file).stem,
            ("{python}", "-m", "pytest", str(ROOT / "tests" / file), *options, "--junitxml", "{out}/junit.xml"),
            limit=85,
            answers="Do its tests marked gpu pass?",
            needs=needs,
            tree=tree,
        )
        for file, needs, tree in TESTS
    ]


STEPS: tuple[Step | Group, ...] = (
    Step("machine", _ours("machine"), 25, "What machine is this, and what does it have?"),
    Step(
        "build",
        _ours("build", "--build", "{build}", "--machine", "{all}/machine/machine.json"),
        limit=120,
        answers="Does the library build for this GPU?",
        needs=("gpu", "tool:nvcc", "tool:cmake", "module:pybind11"),
    ),
    Group(
        "instructions",
        _instructions,
        limit=20,
        workers=4,
        answers="Does every instruction do what the simulated machine says it does?",
        needs=("gpu", "instructions"),
    ),
    Step("listing", _ours("listing"), 15, "Which configurations does the GPU run?", OURS),
    Group("configurations", _configurations, 60, 4, "Is every configuration right, by itself?", OURS),
    Group("tests", _tests, 85, 5, "Do the tests that need a GPU pass?", PYTEST),
    Step("linear", _ours("linear"), 75, "How fast is every configuration, beside dense?", OURS),
    Step("cusparselt", _ours("cusparselt"), 25, "How fast is cuSPARSELt on the same layers?", TORCH),
    Step("attention", _ours("attention"), 65, "How fast is attention with statistics, beside SDPA?", TRITON),
    Step(
        "tower",
        _ours("tower"),
        limit=45,
        answers="Does a vision tower run in one CUDA graph, and how fast?",
        needs=(*TRITON, "module:transformers"),
    ),
    Step(
        "counters",
        (
            *("ncu", "--set", "full", "--clock-control", "none", "-f", "-o", "{out}/kernels"),
            *("--kernel-name", "regex:sparse24_linear|head_maximum", "--launch-count", "4"),
            *_ours("kernels"),
        ),
        limit=40,
        answers="What binds the two kernels that matter most, by hardware counters?",
        needs=(*OURS, "module:triton", "tool:ncu"),
    ),
)


def limits(steps: Iterable[Step | Group]) -> float:
    return sum(step.limit for step in steps)


# --- what is there


def read_json(path: Path):
    """What a file holds, None where there is none or only a part of one."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def write_json(path: Path, contents: object) -> None:
    """All of it or nothing."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(contents, indent=1) + "\n")
    os.replace(partial, path)


def search_path() -> str:
    """PATH with the tools beside this interpreter, and those of CUDA where they often are."""
    folders = [sysconfig.get_path("scripts"), os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    folders += sorted(glob.glob("/opt/nvidia/nsight-compute/*"), reverse=True)
    return os.pathsep.join(folder for folder in folders if folder)


def missing(need: str, out: Path, build: Path, tree: str) -> str | None:
    """Why a step that needs this cannot run, or None."""
    kind, _, name = need.partition(":")
    if kind == "gpu":
        facts = read_json(out / "machine" / "machine.json")
        if facts is None:
            return "the step machine has not said which GPU there is"
        return facts.get("no_gpu")
    if kind == "module":
        return None if importlib.util.find_spec(name) is not None else f"{name} is not installed"
    if kind == "tool":
        return None if shutil.which(name, path=search_path()) is not None else f"no {name} on PATH"
    if kind == "extension":
        found = any((build / tree / "madtp_kernels").glob("_C*.so"))
        return None if found else f"the step build has made no extension ({tree})"
    if kind == "instructions":
        found = (build / "cmake" / "csrc" / "tests" / "gpu" / "gpu_instructions_test").exists()
        return None if found else "the step build has made no gpu_instructions_test"
    raise ValueError(f"needs must be gpu, instructions, extension, module:NAME or tool:NAME, got {need!r}")


def copy_packages(build: Path) -> None:
    """The Python files of the package, once for each extension."""
    for tree in TREES:
        to = build / tree / "madtp_kernels"
        extensions = shutil.ignore_patterns("_C*.so", "__pycache__", "include", "lib")
        shutil.copytree(ROOT / "madtp_kernels", to, ignore=extensions, dirs_exist_ok=True)


# --- how it is asked


def stop(process: subprocess.Popen, interrupt: bool) -> None:
    """Ends the process and every child it left; a moment after an interrupt, if it is to end by itself."""
    try:
        if interrupt:
            os.killpg(process.pid, signal.SIGINT)
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                pass
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):  # nobody is left
        pass
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:  # in the driver, which does not let go
        pass


class Run:
    """The steps of one run, in a folder. `results`: by name, in the order in which they began."""

    def __init__(self, out: Path, build: Path = BUILD):
        self.out, self.build = out, build
        self.results: dict[str, dict] = {}
        self.begun = time.monotonic()
        self._lock = threading.Lock()

    def all(self, steps: Iterable[Step | Group]) -> None:
        for step in steps:
            left = DEADLINE - (time.monotonic() - self.begun)
            if isinstance(step, Step):
                self.one(step, left)
            elif (why := self._missing(step.needs, "bounded")) is not None:
                self._add(step, {"status": "skipped", "reason": why})
            else:
                self._group(step, min(step.limit, left))

    def _group(self, group: Group, limit: float) -> None:
        steps = group.steps(self.out)
        if not steps:
            self._add(group, {"status": "skipped", "reason": "the steps before have found none"})
        end = time.monotonic() + limit
        with ThreadPoolExecutor(group.workers) as pool:
            for running in [pool.submit(lambda s=step: self.one(s, end - time.monotonic())) for step in steps]:
                running.result()

    def one(self, step: Step, left: float) -> None:
        """Runs a step, for at most so many seconds."""
        folder = self.out / step.name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        if (why := self._missing(step.needs, step.tree)) is not None:
            self._add(step, {"status": "skipped", "reason": why})
        elif left <= 0:
            self._add(step, {"status": "skipped", "reason": "the time of the run was over"})
        else:
            self._add(step, self._run(step, folder, min(step.limit, left)))

    def _run(self, step: Step, folder: Path, limit: float) -> dict:
        places = {"python": sys.executable, "out": folder, "all": self.out, "build": self.build}
        command = [part.format(**places) for part in step.command]
        tree = self.build / step.tree
        packages = [tree, ROOT, ROOT / "python", os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {
            "PATH": search_path(),
            "PYTHONPATH": os.pathsep.join(str(path) for path in packages if str(path)),
            "PYTHONUNBUFFERED": "1",
            "HF_HUB_OFFLINE": "1",
        }
        begun, timed_out = time.monotonic(), False
        with (folder / "log.txt").open("wb") as log:
            try:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    cwd=tree if tree.is_dir() else ROOT,  # of which `python -m` takes its packages first
                    env=environment,
                    start_new_session=True,
                )
            except OSError as error:
                return {"status": "failed", "reason": str(error), "seconds": 0.0}
            try:
                process.wait(limit)
            except subprocess.TimeoutExpired:
                timed_out = True
            finally:
                stop(process, interrupt=timed_out)
        rc = process.returncode
        result: dict = {"rc": rc, "seconds": round(time.monotonic() - begun, 2)}
        if timed_out:
            return {"status": "timed out", "reason": f"it ran past {limit:.3g} s"} | result
        if rc < 0:
            return {"status": "crashed", "reason": f"ended by {signal.Signals(-rc).name}"} | result
        if rc == SKIPPED:
            return {"status": "skipped", "reason": last_line(folder / "log.txt")} | result
        return ({"status": "passed"} if rc == 0 else {"status": "failed", "reason": f"exit code {rc}"}) | result

    def _missing(self, needs: Iterable[str], tree: str) -> str | None:
        return next((why for need in needs if (why := missing(need, self.out, self.build, tree)) is not None), None)

    def _add(self, step: Step | Group, result: dict) -> None:
        with self._lock:
            self.results[step.name] = {"answers": step.answers, "limit": step.limit} | result
            write_json(
                self.out / SUMMARY,
                {"seconds": round(time.monotonic() - self.begun, 1), "steps": self.results},
            )
        reason = f"  {result['reason']}" if "reason" in result else ""
        print(f"{step.name:<40} {result['status']:<9} {result.get('seconds', 0):6.1f} s{reason}", flush=True)


def last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")


def chosen(names: Sequence[str], steps: Sequence[Step | Group] = STEPS) -> list[Step | Group]:
    """The steps of these names, and `machine`, which the others ask; all without names."""
    return [step for step in steps if not names or step.name in names or step.name == "machine"]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_first", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of the results")
    parser.add_argument("--steps", default="", help=f"only these, of {','.join(step.name for step in STEPS)}")
    options = parser.parse_args(arguments)
    names = [name for name in options.steps.replace(",", " ").split() if name]
    if unknown := sorted(set(names) - {step.name for step in STEPS}):
        parser.error(f"--steps must be of {', '.join(step.name for step in STEPS)}, got {', '.join(unknown)}")
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    copy_packages(BUILD)
    run = Run(out)
    run.all(chosen(names))
    red = [name for name, result in run.results.items() if result["status"] not in ("passed", "skipped")]
    print(f"{time.monotonic() - run.begun:.0f} s; python -m benchmarks.gpu_report {options.out} makes a page of it")
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main())
