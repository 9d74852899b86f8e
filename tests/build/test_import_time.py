# SPDX-License-Identifier: Apache-2.0
"""What importing madtp_kernels brings along, and what it leaves for later."""

import json
import subprocess
import sys

import pytest

import madtp_kernels

LATER = ("torch._dynamo", "torch.utils.flop_counter", "triton", "transformers", "matplotlib")
PROGRAM = """
import json, sys
import madtp_kernels
from madtp_kernels import flops
early = [name for name in sys.argv[1:] if name in sys.modules]
decorated = sorted(str(op) for op, formula in flops._waiting)
from torch.utils.flop_counter import flop_registry
print(json.dumps([early, decorated, sorted(str(op) for op in flop_registry if str(op).startswith("madtp"))]))
"""


def test_what_takes_long_to_import_comes_when_it_is_used():
    done = subprocess.run([sys.executable, "-c", PROGRAM, *LATER], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    early, decorated, counted = json.loads(done.stdout)
    assert not early
    assert {"madtp.sparse24_linear", "madtp.varlen_attention"} <= set(decorated)
    assert counted == decorated


def test_the_library_is_of_the_same_version():
    assert pytest.importorskip("madtp_kernels._C").build_info()["version"] == madtp_kernels.__version__


def test_a_library_of_another_version_is_not_used(monkeypatch):
    pytest.importorskip("madtp_kernels._C")
    from madtp_kernels import dispatch

    monkeypatch.setattr(dispatch, "__version__", "0.0.1")
    module, why = dispatch._load_extension.__wrapped__()  # what it remembers of the process stays
    assert module is None and f"is of version {madtp_kernels.__version__}, not 0.0.1; rebuild it" in why
