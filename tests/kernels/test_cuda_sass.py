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
# source: the target, and what its products are there
SOURCES_OF = {
    "sparse24/linear_sm90.cu": ("90a", "HGMMA"),
    "quantized/linear_sm90.cu": ("90a", "IGMMA"),
    "quantized/linear_sm90_e4m3.cu": ("90a", "QGMMA"),
    "sparse24/linear_sm80.cu": ("80", "HMMA"),
    "quantized/linear_sm80.cu": ("80", "IMMA"),
}
FORBIDDEN = re.compile(r"^(MEMBAR|CCTL|BRX|BRXU|CALL|LDL|STL)\b")
EPILOGUES = {"90a": ("STG", "STSM"), "80": ("STG", "LDS")}  # what stands in the loops that write rows
VALUES_OF_A_STORE = {"90a": 8, "80": 4}
# Instructions a value, GELU with residual, bias and scale: of 16-bit operands, of quantised ones, of those in tiles of
# two halves, where tokens come 16 at a time.
LONGEST_EPILOGUE = {"90a": (25, 31, 39), "80": (31, 35, 35)}


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


@pytest.fixture(scope="module", params=SOURCES_OF)
def kernels(request):
    """The target, what products are there, and by name the instructions of each kernel."""
    target, product = SOURCES_OF[request.param]
    _, sass = compiled(SOURCES / request.param, target, headers())
    found = {}
    for part in sass.split("Function : ")[1:]:
        name = part.split("\n", 1)[0].strip()
        found[name] = [Instruction(*pair) for pair in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+([^;]+);", part)]
    if product == "IMMA":  # e4m3 has no product on sm_80
        found = {name: code for name, code in found.items() if "E4M3" not in name}
    assert found
    return target, product, found


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
    target, product, found = kernels
    for name, code in found.items():
        bodies = innermost(code, product)
        assert bodies, f"{name} has no loop of products"
        for body in bodies:
            products = [i for i, instruction in enumerate(body) if instruction.text.startswith(product)]
            between = body[products[0] : products[-1] + 1]
            wrong = [instruction.text for instruction in between if FORBIDDEN.match(instruction.text)]
            assert not wrong, f"{name}: {wrong}"


def skipped(name, target):
    """How many instructions of an epilogue's loop a turn of it skips: sums of the other parts of a tile."""
    if target == "80":
        return 0
    tokens, halves = tile_of(name)
    part = 16 if is_quantized(name) and halves == 2 else 32  # tokens
    return part // 2 * (tokens // part * halves - 1)


def tile_of(name):
    """Tokens and halves of a tile of sm_90."""
    tokens, halves = re.search(r"TileILi(\d+)E.*?Lb[01]ELi\dELi(\d)EE", name).groups()
    return int(tokens), int(halves)


def is_quantized(name):
    """Whether a kernel, of mangled name, multiplies int8 (a) or E4M3."""
    return re.search(r"EEELi\dEa|E4M3|EEEa", name) is not None


def test_epilogues_are_short(kernels):
    target, _, found = kernels
    for name, code in found.items():
        # What stands behind the end of a kernel and jumps back into an epilogue is no loop.
        bodies = [body for body in innermost(code, *EPILOGUES[target]) if not any(i.text == "EXIT" for i in body)]
        assert len(bodies) >= 5, f"{name} has {len(bodies)} loops that write rows, and 5 activations"
        for body in bodies:
            values = VALUES_OF_A_STORE[target] * sum(instruction.text.startswith("STG") for instruction in body)
            executed = len(body) - skipped(name, target)
            kind = 0 if not is_quantized(name) else 2 if target == "90a" and tile_of(name)[1] == 2 else 1
            assert executed / values <= LONGEST_EPILOGUE[target][kind], f"{name}: {executed} for {values} values"


def test_nothing_lies_in_local_memory(kernels):
    *_, found = kernels
    for name, code in found.items():
        wrong = [instruction.text for instruction in code if re.match(r"(LDL|STL)\b", instruction.text)]
        assert not wrong, f"{name}: {wrong[:4]}"


def test_a_producer_has_the_registers_it_keeps(kernels):
    target, _, found = kernels
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
