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
early = [name for name in sys.argv[1:] if name in sys.modules]
from torch.utils.flop_counter import flop_registry
print(json.dumps([early, sorted(str(op) for op in flop_registry if str(op).startswith("madtp"))]))
"""


def test_what_takes_long_to_import_comes_when_it_is_used():
    done = subprocess.run([sys.executable, "-c", PROGRAM, *LATER], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    early, counted = json.loads(done.stdout)
    assert not early
    assert counted == ["madtp.sparse24_linear", "madtp.varlen_attention"]


def test_the_library_is_of_the_same_version():
    assert pytest.importorskip("madtp_kernels._C").build_info()["version"] == madtp_kernels.__version__
