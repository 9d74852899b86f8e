# SPDX-License-Identifier: Apache-2.0
"""The machine code of the 2:4 products on CUDA: what must not stand in their loops, and how long an epilogue is."""

import re
from pathlib import Path

import pytest

from benchmarks.aot_cuda import ROOT, SOURCES, compiled, tool

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(tool("nvcc") is None or tool("cuobjdump") is None, reason="needs nvcc and cuobjdump"),
]
TARGETS = {"90a": "HGMMA", "80": "HMMA"}
FORBIDDEN = re.compile(r"^(MEMBAR|CCTL|BRX|BRXU|CALL|LDL|STL)\b")
EPILOGUES = {"90a": ("STG", "STSM"), "80": ("STG", "LDS")}  # what stands in the loops that write rows
VALUES_OF_A_STORE = {"90a": 8, "80": 4}
LONGEST_EPILOGUE = {"90a": 25, "80": 31}  # instructions a value, GELU with residual, bias and scale


class Instruction:
    def __init__(self, address: str, text: str):
        self.address, self.text = int(address, 16), re.sub(r"^@!?U?P\w+ ", "", text.strip())

    def target(self) -> int | None:
        found = re.match(r"BRA\b.*?(0x[0-9a-f]+)", self.text)
        return int(found[1], 16) if found else None


def headers() -> Path:
    """What CMake makes of version.h.in, and of the architectures of the build."""
    found = next((path.parents[2] for path in ROOT.glob("build/*/include/madtp/version.h")), None)
    if found is None or not (found / "private").is_dir():
        pytest.skip("needs a build folder, for the headers that CMake makes")
    return found


@pytest.fixture(scope="module", params=TARGETS)
def kernels(request):
    """The target, and by name the instructions of each kernel."""
    target = request.param
    _, sass = compiled(SOURCES / "sparse24" / f"linear_sm{target.rstrip('a')}.cu", target, headers())
    found = {}
    for part in sass.split("Function : ")[1:]:
        name = part.split("\n", 1)[0].strip()
        found[name] = [Instruction(*pair) for pair in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+([^;]+);", part)]
    assert found
    return target, found


def loops(code):
    """Every loop, as its instructions: from where a branch goes back to, to that branch."""
    index = {instruction.address: i for i, instruction in enumerate(code)}
    for last, instruction in enumerate(code):
        first = index.get(instruction.target())
        if first is not None and first < last:
            yield code[first : last + 1]


def innermost(code, *needed):
    """The shortest loops that have all of these instructions and no other such loop inside."""
    found = [body for body in loops(code) if all(any(i.text.startswith(n) for i in body) for n in needed)]
    spans = [(body[0].address, body[-1].address) for body in found]
    return [
        body
        for body, (first, last) in zip(found, spans, strict=True)
        if not any((a, b) != (first, last) and first <= a and b <= last for a, b in spans)
    ]


def test_nothing_stalls_the_products(kernels):
    target, found = kernels
    for name, code in found.items():
        bodies = innermost(code, TARGETS[target])
        assert bodies, f"{name} has no loop of products"
        for body in bodies:
            products = [i for i, instruction in enumerate(body) if instruction.text.startswith(TARGETS[target])]
            between = body[products[0] : products[-1] + 1]
            wrong = [instruction.text for instruction in between if FORBIDDEN.match(instruction.text)]
            assert not wrong, f"{name}: {wrong}"


def skipped(name, target):
    """How many instructions of an epilogue's loop a turn of it skips: sums of the other parts of a tile."""
    if target == "80":
        return 0
    tokens, _consumers, halves = re.search(r"TileILi(\d+)E.*?Lb[01]ELi(\d)ELi(\d)EE", name).groups()
    return 16 * (int(tokens) // 32 * int(halves) - 1)


def test_epilogues_are_short(kernels):
    target, found = kernels
    for name, code in found.items():
        bodies = innermost(code, *EPILOGUES[target])
        assert len(bodies) >= 5, f"{name} has {len(bodies)} loops that write rows, and 5 activations"
        for body in bodies:
            values = VALUES_OF_A_STORE[target] * sum(instruction.text.startswith("STG") for instruction in body)
            executed = len(body) - skipped(name, target)
            assert executed / values <= LONGEST_EPILOGUE[target], f"{name}: {executed} for {values} values"


def test_nothing_lies_in_local_memory(kernels):
    _, found = kernels
    for name, code in found.items():
        wrong = [instruction.text for instruction in code if re.match(r"(LDL|STL)\b", instruction.text)]
        assert not wrong, f"{name}: {wrong[:4]}"


def test_a_producer_has_the_registers_it_keeps(kernels):
    target, found = kernels
    if target == "80":
        pytest.skip("warps of sm_80 have no roles")
    for name, code in found.items():
        text = [instruction.text for instruction in code]
        first = next((i for i, one in enumerate(text) if one.startswith("USETMAXREG.DEALLOC")), None)
        if first is None:  # two warpgroups have enough for all
            assert re.search(r"Lb0ELi1ELi1EE", name), name
            continue
        kept = int(text[first].split()[-1], 16)
        code_of_it = text[first : text.index("EXIT", first)]
        highest = max(int(number) for one in code_of_it for number in re.findall(r"\bR(\d+)\b", one))
        assert highest < kept, f"{name}: R{highest}, and {kept} registers"
