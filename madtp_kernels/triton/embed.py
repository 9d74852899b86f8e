# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels as C++ sources, for programs without Python: compiled ahead of time, without a GPU.

    python cmake/embed_triton.py --out FOLDER [--archs 80 90] [--head-sizes 64 128] [--fatbinary PATH] [--no-code]

Writes a source per family to FOLDER, a table of its kernels that `csrc/cuda/triton` launches by, and beside it the
images that it holds. What a launcher specialises on in Python is an argument here, where that keeps the number of
kernels small: heads that share a key head, alignment tokens, strides, masks. Names, constants and warps are of the
same functions as in Python. CMake calls it with `cmake/embed_triton.py`, which needs no torch.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from madtp_kernels.triton.attention import forward, statistics
from madtp_kernels.triton.attention.tiles import dims
from madtp_kernels.triton.attention_rows import forward as rows
from madtp_kernels.triton.common import OPTIONS
from madtp_kernels.triton.tokens import layout, scores

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}  # what triton calls them
NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
ARCHS = (80, 90)
HEAD_SIZES = (64,)  # of ViT, BERT, BLIP and CLIP
ALIGNED = 8  # elements: strides of q, k and v are multiples of it
# Registers, where ptxas on sm_80 takes fewer by itself and spills, which Python's more special kernels do not.
ROOMY = {"maxnreg": 168}
NARROW = 16  # alignment tokens of the smallest block of logits


class Argument(NamedTuple):
    type: str  # as triton calls it; {dtype} is that of the data
    divisible: int = 1


_DATA, _FLOATS, _NUMBERS, _BYTES = Argument("*{dtype}", 16), *(Argument(f"*{t}") for t in ("fp32", "i32", "u8"))
_NUMBER, _STRIDE = Argument("i32"), Argument("i32", ALIGNED)
ARGUMENTS = (  # of all kernels, by name
    dict.fromkeys(("p_q", "p_k", "p_v", "p_out"), _DATA)
    | {"p_logits": Argument("*{dtype}"), "scale": Argument("fp32")}
    | dict.fromkeys(
        ("p_lse", "p_norms", "p_partial", "p_from_summary", "p_highest", "p_weight", "p_attention"), _FLOATS
    )
    | dict.fromkeys(("p_summary_attention", "p_received_attention", "p_guidance", "p_importance"), _FLOATS)
    | dict.fromkeys(("p_copies", "p_threshold", "p_pruned_importance", "p_merge_weight"), _FLOATS)
    | dict.fromkeys(("p_cu_seqlens", "p_cu_seqlens_q", "p_cu_seqlens_k", "p_cu_seqlens_out"), _NUMBERS)
    | dict.fromkeys(("p_summary_index", "p_row_position", "p_count", "p_source"), _NUMBERS)
    | dict.fromkeys(("p_keep", "p_protected"), _BYTES)
    | dict.fromkeys(("q_row", "q_head", "k_row", "k_head", "v_row", "v_head"), _STRIDE)
    | dict.fromkeys(("left", "right", "Tq", "Tk", "T", "R", "H", "Hk", "B"), _NUMBER)
    | dict.fromkeys(("max_seqlen", "max_seqlen_q", "max_seqlen_k", "GROUP", "K", "STRIDE", "PARTS"), _NUMBER)
    | {"D": _STRIDE}
)
MASKS = {
    "plain": {"left": None, "right": None},
    "masked": {},
}  # the bounds of a window are arguments, or there are none


class Variant(NamedTuple):
    """A kernel with what is fixed when it is compiled."""

    family: str
    name: str  # that the library finds it by
    kernel: JITFunction
    dtype: str
    constants: dict[str, Any]  # by the name of the parameter; all others are arguments
    options: dict[str, Any]

    @property
    def arguments(self) -> dict[str, Argument]:
        """Those of a launch, in order."""
        names = [name for name in self.kernel.arg_names if name not in self.constants]
        return {name: ARGUMENTS[name]._replace(type=ARGUMENTS[name].type.format(dtype=self.dtype)) for name in names}


def _variant(family: str, parts: Iterable[object], kernel: JITFunction, dtype: str, **given: Any) -> Variant:
    """`given` are constants and options, as a launcher mixes them."""
    constants = {name: value for name, value in given.items() if name in kernel.arg_names}
    options = {name: value for name, value in (OPTIONS | given).items() if name not in constants}
    return Variant(family, "/".join(map(str, (kernel.__name__, *parts))), kernel, dtype, constants, options)


def attention_variants(head_sizes: Iterable[int]) -> Iterator[Variant]:
    """The forward, and with it the statistics; without soft cap and ALiBi."""
    of, finished = "attention", set()
    for head_dim in head_sizes:
        for dtype, short in DTYPES.items():
            for mask, fixed in MASKS.items():
                which, given = (
                    (NAMES[short], head_dim, mask),
                    {**dims(head_dim), "bias": None, "CAUSAL": False, **fixed},
                )
                blocks = forward._blocks(head_dim, dtype) | (ROOMY if short == "fp32" and mask == "masked" else {})
                yield _variant(of, which, forward.attention_kernel, short, **given, **blocks)
                blocks = statistics._blocks(head_dim, dtype, biased=False)
                yield _variant(of, which, statistics.head_maximum_kernel, short, **given, **blocks)
                none, block = {"p_out": None, "p_norms": None}, {"BLOCK": statistics.KEYS}
                yield _variant(of, which, statistics.from_summary_kernel, short, **given, **none, **block, num_warps=8)
                last = (blocks["BLOCK_M"], mask)
                if last not in finished:
                    finished.add(last)
                    given = {"BLOCK_M": blocks["BLOCK_M"], **block, "CAUSAL": False, **fixed}
                    yield _variant(of, last, statistics.finish_kernel, short, **given)


def attention_rows_variants() -> Iterator[Variant]:
    """Of any head dimension, as it is read in blocks."""
    for dtype, short in DTYPES.items():
        given = rows._options(rows.MIN_DOT * 16, 1, dtype) | {"BLOCK_M": rows.MIN_DOT}
        given = {name: value for name, value in given.items() if name not in ("GROUP", "D")}
        for kernel in (rows.row_softmax_kernel, rows.attention_rows_kernel):
            yield _variant("attention_rows", (NAMES[short],), kernel, short, **given)


def token_variants() -> Iterator[Variant]:
    """Importance and selection by one program for a sequence or several, and the layout."""
    of = "tokens"
    for dtype, short in DTYPES.items():
        size = torch.finfo(dtype).bits // 8
        for block_k in (NARROW, scores.WIDEST):
            blocks = scores.tile(block_k, size, scores.WIDEST)
            given, which = {"BLOCK": scores.BLOCK, **blocks, "num_warps": 8}, (NAMES[short], block_k)
            yield _variant(of, which, scores.importance_kernel, short, **given)
            yield _variant(of, which, scores.select_kernel, short, **given, **(ROOMY if short == "fp32" else {}))
        for block_k in (scores.WIDEST * 2, scores.WIDEST_GUIDANCE):
            blocks = scores.tile(block_k, size, scores.WIDEST_GUIDANCE)
            yield _variant(of, (NAMES[short], block_k), scores.guidance_kernel, short, **blocks, num_warps=8)
        blocks = scores.tile(scores.WIDEST, size, scores.WIDEST)
        which = (NAMES[short], scores.WIDEST)
        yield _variant(of, which, scores.threshold_kernel, short, BLOCK=scores.BLOCK, **blocks, num_warps=8)
    yield _variant(of, (), scores.keep_kernel, "fp32", BLOCK=scores.BLOCK, num_warps=8)
    yield _variant(of, (), layout.layout_kernel, "fp32", BLOCK=layout.BLOCK_ROWS)


def variants(head_sizes: Iterable[int] = HEAD_SIZES) -> list[Variant]:
    return [*attention_variants(head_sizes), *attention_rows_variants(), *token_variants()]


# --- compiling


class Compiled(NamedTuple):
    cubin: bytes
    shared: int  # bytes
    scratch: int  # pointers that triton adds behind the arguments, null here
    registers: int
    spilled: int  # bytes


def source_of(variant: Variant) -> ASTSource:
    signature, constants, attributes = {}, {}, {}
    for position, name in enumerate(variant.kernel.arg_names):
        if name in variant.constants:
            signature[name], constants[(position,)] = "constexpr", variant.constants[name]
            continue
        argument = variant.arguments[name]
        signature[name] = argument.type
        if argument.divisible > 1:
            attributes[(position,)] = [["tt.divisibility", argument.divisible]]
    return ASTSource(variant.kernel, signature, constants, attributes)


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory of the one kernel in `cubin`."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        output = subprocess.run(
            [tool, "--dump-resource-usage", path], check=True, capture_output=True, text=True
        ).stdout
    usage = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", output)}
    # These kernels have no arrays and call nothing, so their stack is what was spilled.
    return usage["REG"], usage["STACK"] + usage["LOCAL"]


def compiled(variant: Variant, arch: int) -> Compiled:
    """Without line numbers, which would be two thirds of it."""
    knobs.compilation.disable_line_info = True
    kernel = triton.compile(source_of(variant), target=GPUTarget("cuda", arch, 32), options=variant.options)
    if kernel.metadata.global_scratch_size or kernel.metadata.profile_scratch_size:
        raise ValueError(f"{variant.name}: asks for scratch memory, which the library does not give")
    entry = kernel.asm["ptx"].split(".entry", 1)[1]
    parameters = entry[: entry.index(")")].count(".param")
    cubin = kernel.asm["cubin"]
    return Compiled(cubin, kernel.metadata.shared, parameters - len(variant.arguments), *resources(cubin))


def _compiled(job: tuple[str, int, list[int]]) -> Compiled:
    """In a process of its own: kernels do not go from one to another, their names do."""
    name, arch, head_sizes = job
    return compiled(next(variant for variant in variants(head_sizes) if variant.name == name), arch)


def _compressed(cubin: bytes, arch: int, fatbinary: Path | None) -> bytes:
    """What the driver loads: compressed by nvcc's fatbinary, or without it the cubin as it is."""
    if fatbinary is None:
        return cubin
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "kernel.cubin").write_bytes(cubin)
        image = f"--image3=kind=elf,sm={arch},file={folder / 'kernel.cubin'}"
        command = [str(fatbinary), "--64", f"--create={folder / 'kernel.fatbin'}", image, "--compress-all"]
        subprocess.run(command, check=True)
        return (folder / "kernel.fatbin").read_bytes()


# --- the sources

_CODES = {"fp32": "f", "i32": "i"}  # of an argument, in the table; pointers are p


def _row(variant: Variant, arch: int, code: Compiled, offset: int, size: int) -> str:
    signature = "".join(_CODES.get(a.type, "p") for a in variant.arguments.values()) + "p" * code.scratch
    numbers = {k: int(v) for k, v in variant.constants.items() if v is not None and k not in ("CAUSAL", "bias")}
    constants = ", ".join(f'{{"{name}", {value}}}' for name, value in numbers.items())
    threads = 32 * variant.options["num_warps"]
    digest = hashlib.sha256(code.cubin).hexdigest() if code.cubin else "not compiled"
    return (
        f'    {{"{variant.name}", "{variant.kernel.__name__}", {arch}, "{signature}", {threads}, {code.shared}, '
        f"{{{constants}}}, {offset}, {size}}},  // sha256 of the cubin: {digest}\n"
    )


def write_family(folder: Path, family: str, built: list[tuple[Variant, int, Compiled, bytes]]) -> int:
    """FOLDER/FAMILY.cpp and FAMILY.bin. -> bytes of images"""
    images, table = b"", ""
    for variant, arch, code, image in built:
        images += bytes(-len(images) % 64)
        table += _row(variant, arch, code, len(images), len(image))
        images += image
    symbol, blob = f"madtp_triton_{family}", folder / f"{family}.bin"
    blob.write_bytes(images)
    start = "nullptr"
    text = "// SPDX-License-Identifier: Apache-2.0\n// Made by cmake/embed_triton.py.\n"
    text += '#include "cuda/triton/kernels.h"\n\n'
    if images:
        start = symbol
        text += f'asm(".section .rodata\\n.balign 64\\n.hidden {symbol}\\n.global {symbol}\\n{symbol}:\\n"\n'
        text += f'    ".incbin \\"{blob}\\"\\n.previous\\n");\n'
        text += f'extern "C" __attribute__((visibility("hidden"))) const unsigned char {symbol}[];\n\n'
    text += f"namespace madtp::cuda::triton {{\nnamespace {{\n\nconstexpr Kernel kKernels[] = {{\n{table}}};\n\n}}\n\n"
    text += f"const Family {family}_kernels{{kKernels, sizeof kKernels / sizeof *kKernels, {start}}};\n\n}}\n"
    (folder / f"{family}.cpp").write_text(text)
    return len(images)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the folder to write to")
    parser.add_argument("--archs", type=int, nargs="+", choices=ARCHS, default=list(ARCHS))
    parser.add_argument("--head-sizes", type=int, nargs="+", default=list(HEAD_SIZES), help="multiples of 8 up to 256")
    parser.add_argument("--fatbinary", type=Path, help="nvcc's tool, which compresses")
    parser.add_argument("--no-code", action="store_true", help="tables alone, for tests of launches")
    parser.add_argument("--werror", action="store_true", help="exit code 1 if a kernel spills registers")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that compile")
    options = parser.parse_args(argv)
    if any(size % 8 or not 8 <= size <= 256 for size in options.head_sizes):
        parser.error(f"--head-sizes must be multiples of 8 from 8 to 256, got {options.head_sizes}")
    sizes = sorted(set(options.head_sizes))
    todo = [(variant, arch) for variant in variants(sizes) for arch in sorted(set(options.archs))]
    if options.no_code:
        codes = [Compiled(b"", 0, 2, 0, 0)] * len(todo)
    else:
        with multiprocessing.get_context("fork").Pool(options.jobs) as pool:
            codes = pool.map(_compiled, [(variant.name, arch, sizes) for variant, arch in todo], chunksize=1)
    spilling = sorted({v.name for (v, _), code in zip(todo, codes, strict=True) if code.spilled})
    if spilling:
        print(f"registers spill to local memory in {', '.join(spilling)}", file=sys.stderr)
        if options.werror:
            return 1

    options.out.mkdir(parents=True, exist_ok=True)
    for family in ("attention", "attention_rows", "tokens"):
        built = []
        for (variant, arch), code in zip(todo, codes, strict=True):
            if variant.family == family:
                built.append((variant, arch, code, _compressed(code.cubin, arch, options.fatbinary)))
        size, plain = write_family(options.out, family, built), sum(len(code.cubin) for _, _, code, _ in built)
        print(f"{family}: {len(built)} kernels, {size / 1e6:.2f} MB embedded, of {plain / 1e6:.2f} MB of cubins")
    return 0
