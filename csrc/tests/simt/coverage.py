# SPDX-License-Identifier: Apache-2.0
"""Which lines of csrc/cuda the simulated tests ran, from the build folder of `make coverage-cuda`.

    python csrc/tests/simt/coverage.py build/coverage

Prints covered and total lines of every file and the lines that never ran; exit code 1 where there are any.
"""

import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
SOURCES = ROOT / "csrc" / "cuda"
LAUNCHES = SOURCES / "triton"  # of kernels that this machine does not run


def runs(build: Path) -> dict[Path, dict[int, int]]:
    """File -> line -> how often it ran, over all objects and instantiations."""
    result: dict[Path, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    for data in sorted(build.rglob("madtp_simt.dir/**/*.gcda")):
        command = ["gcov", "--json-format", "--stdout", str(data.resolve())]
        report = json.loads(subprocess.run(command, cwd=data.parent, capture_output=True, check=True, text=True).stdout)
        for file in report["files"]:
            path = (Path(report["current_working_directory"]) / file["file"]).resolve()
            if path.is_relative_to(SOURCES) and not path.is_relative_to(LAUNCHES):
                for line in file["lines"]:
                    result[path][line["line_number"]] += line["count"]
    return result


def main() -> int:
    files = runs(Path(sys.argv[1]))
    if not files:
        print(f"{sys.argv[1]} must hold a build of the simulated tests that has run")
        return 2
    missed, total = 0, 0
    for path, lines in sorted(files.items()):
        never = [number for number, count in sorted(lines.items()) if count == 0]
        print(f"{path.relative_to(ROOT)}: {len(lines) - len(never)} of {len(lines)} lines")
        source = path.read_text().splitlines()
        for number in never:
            print(f"  {number}: {source[number - 1].strip()}")
        missed, total = missed + len(never), total + len(lines)
    print(f"{total - missed} of {total} lines ran ({100 * (total - missed) / total:.1f} %)")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
