# SPDX-License-Identifier: Apache-2.0
"""Imports and builds ask no network for anything."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GUARD = """
import sys

def refuse(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "socket.bind"):
        raise SystemExit(f"{event} of {arguments[1:]}")

sys.addaudithook(refuse)
"""
OPS = """
import torch
import madtp
import madtp_kernels as mk

q = torch.randn(9, 2, 16)
cu_seqlens = torch.tensor([0, 4, 9], dtype=torch.int32)
out, stats = mk.varlen_attention(q, q, q, cu_seqlens, max_seqlen_q=5, return_stats=True)
mk.prune_tokens(torch.randn(9, 8), stats, torch.randn(9, 3), cu_seqlens, temperature=5.0)
mk.sparse24_linear(torch.randn(3, 32), mk.sparse24_prune(torch.randn(16, 32)))
"""
EVERYTHING = """
import importlib, pkgutil
import madtp, madtp_kernels

for package in (madtp, madtp_kernels):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not module.name.endswith(("__main__", "_C")) and ".triton" not in module.name:
            importlib.import_module(module.name)
assert madtp.patch and madtp.compress
"""


def run(program):
    paths = [str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", GUARD + program + "\nprint('ran')"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


def test_the_guard_sees_a_connection():
    done = run("import socket\nsocket.create_connection(('localhost', 9))")
    assert done.returncode and "socket.getaddrinfo of" in done.stderr


@pytest.mark.parametrize(
    "program", [OPS, pytest.param(EVERYTHING, marks=pytest.mark.slow)], ids=["ops", "every module"]
)
def test_imports_and_ops_open_no_connection(program):
    done = run(program)
    assert done.returncode == 0 and done.stdout == "ran\n", done.stderr


def test_the_build_fetches_nothing():
    sources = [ROOT / "setup.py", *(ROOT / "cmake").iterdir()]
    sources += [path for path in ROOT.glob("csrc/**/CMakeLists.txt")] + [ROOT / "CMakeLists.txt"]
    fetches = re.compile(
        r"FetchContent|ExternalProject|\bDOWNLOAD\b|https?://|urllib|urlopen|\bcurl\b|\bwget\b|\bgit clone\b"
    )
    assert len(sources) > 6
    for path in sources:
        assert not fetches.search(path.read_text(encoding="utf-8")), path
