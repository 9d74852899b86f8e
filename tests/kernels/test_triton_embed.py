# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels as sources of the C++ library: made without torch and without a GPU."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]
FAMILIES = ("attention", "attention_rows", "tokens")
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
COMPILED = """
import hashlib, sys
from madtp_kernels.triton import embed
variants = {variant.name: variant for variant in embed.variants()}
for name in sys.argv[1:]:
    print(hashlib.sha256(embed.compiled(variants[name], 90).cubin).hexdigest())
"""


def embed(*options: object, **variables: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "cmake/embed_triton.py"), *map(str, options)]
    return subprocess.run(command, env={**ENVIRONMENT, **variables}, capture_output=True, text=True)


@pytest.fixture
def without_torch(tmp_path) -> Path:
    """A folder that makes every import of the real torch an error."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise RuntimeError('torch was imported')")
    return tmp_path


def test_tables_are_made_without_torch(without_torch, tmp_path):
    done = embed("--out", tmp_path / "made", "--no-code", "--head-sizes", 72, 128, PYTHONPATH=str(without_torch))
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "made/attention.cpp").read_text()
    assert '"attention_kernel/bfloat16/72/plain", "attention_kernel", 80, "ppppppppiiiiiifiiiiiiipp", 256' in text
    names = re.findall(r'\{"([^"]+)", "\w+", (\d+), ', text)
    assert len(set(names)) == len(names) == 2 * (2 * 3 * 2 * 3 + 4)  # sm, sizes, dtypes, masks, kernels; and the finish
    assert {path.name for path in (tmp_path / "made").iterdir()} == {
        f"{f}.{e}" for f in FAMILIES for e in ("cpp", "bin")
    }


def test_refuses_head_sizes_that_no_kernel_has(tmp_path):
    done = embed("--out", tmp_path / "made", "--no-code", "--head-sizes", 60)
    assert done.returncode == 2 and "multiples of 8 from 8 to 256, got [60]" in done.stderr
    assert not (tmp_path / "made").exists()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("fatbinary") is None, reason="fatbinary of nvcc is needed")
def test_embedded_code_is_what_the_kernels_compile_to(without_torch, tmp_path):
    done = embed(
        *("--out", tmp_path / "made", "--head-sizes", 64, "--werror", "--fatbinary", shutil.which("fatbinary")),
        PYTHONPATH=str(without_torch),
        TRITON_CACHE_DIR=str(tmp_path / "cache"),
    )
    assert done.returncode == 0, done.stderr  # with --werror: none spills
    digests = {}
    for family in FAMILIES:
        text, images = ((tmp_path / f"made/{family}.{end}").read_bytes() for end in ("cpp", "bin"))
        for name, arch, offset, size, digest in re.findall(
            rb'\{"([^"]+)", "\w+", (\d+), .*, (\d+), (\d+)\},  // sha256 of the cubin: (\w{64})\n', text
        ):
            assert images[int(offset) : int(offset) + 4] == b"\x50\xed\x55\xba"  # of a fat binary
            assert int(offset) % 64 == 0 and int(offset) + int(size) <= len(images)
            digests[name.decode(), int(arch)] = digest.decode()
    assert len(digests) == 102
    some = ["attention_kernel/bfloat16/64/plain", "row_softmax_kernel/float32", "keep_kernel"]
    again = subprocess.run(
        [sys.executable, "-c", COMPILED, *some],
        env={**ENVIRONMENT, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path / "other")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert again.stdout.split() == [digests[name, 90] for name in some]
    assert hashlib.sha256(b"").hexdigest() not in digests.values()
