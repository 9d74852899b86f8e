# SPDX-License-Identifier: Apache-2.0
"""What every source file says of itself."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SUFFIXES = {".py", ".pyi", ".h", ".c", ".cpp", ".cu", ".cuh", ".cmake"}


def test_every_source_names_its_licence():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("the sources are not in a git checkout")
    sources = [ROOT / name for name in listed.stdout.splitlines() if Path(name).suffix in SUFFIXES]
    assert len(sources) > 300
    without = [
        str(path)
        for path in sources
        if path.exists() and path.stat().st_size and "SPDX-License-Identifier: Apache-2.0" not in path.read_text()[:200]
    ]
    assert not without
