# SPDX-License-Identifier: Apache-2.0
"""Compiles every Triton kernel as it ships, without a GPU, and reports registers, shared memory and spills.

    python -m madtp_kernels.triton.aot [--all] [--out PATH]

Each launcher runs on meta tensors, by the `LAUNCHES` of its package; what it would launch (types, alignment, block
sizes, warps) is compiled instead, for sm_80 and sm_90. Exit code 1 if a kernel spills registers.
"""

import argparse
import importlib
import itertools
import json
import os
import pkgutil
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, mangle_type

import madtp_kernels.triton
from madtp_kernels.triton.embed import resources
from madtp_kernels.triton.meta_arguments import Sizes

TARGETS = (80, 90)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ALIGNMENT = 16  # what triton specialises pointers and sizes on
WIDTHS = {  # columns of the report
    "op": 48,
    "kernel": 30,
    "target": 8,
    "dtype": 10,
    "channels": 10,
    "alignment_tokens": 18,
    "head_dim": 10,
    "warps": 7,
    "registers": 11,
    "spilled_bytes": 15,
    "shared_bytes": 12,
}


def launches() -> dict[str, Callable]:
    """The `LAUNCHES` of every package of kernels: name -> function of (dtype, sizes) that calls a launcher."""
    found: dict[str, Callable] = {}
    for package in pkgutil.iter_modules(madtp_kernels.triton.__path__, "madtp_kernels.triton."):
        if package.ispkg:
            found |= importlib.import_module(f"{package.name}.launches").LAUNCHES
    return found


SHIPPED = [Sizes(768, 100, 64, False)]  # BLIP and ViT-B with the default configuration
OTHERS = [
    Sizes(1024, 100, 128, True),
    Sizes(1408, 256, 32, True),
    Sizes(5120, 7, 80, True),
    Sizes(17, 1, 16, False),
    Sizes(768, 100, 96, False),
    Sizes(768, 100, 64, True),
    Sizes(1152, 100, 72, False),
    Sizes(2048, 7, 256, True),
]


# --- what a launch compiles to


def recorded(launch: Callable, *args) -> list[tuple[JITFunction, dict, dict]]:
    """(kernel, arguments by name, options) of everything `launch(*args)` would run."""
    runs = []

    def run(kernel, *values, grid, warmup, **named):
        arguments = dict(zip(kernel.arg_names, values, strict=False))
        options = {name: value for name, value in named.items() if name not in kernel.arg_names}
        arguments |= {name: value for name, value in named.items() if name in kernel.arg_names}
        runs.append((kernel, arguments, options))

    with mock.patch.object(JITFunction, "run", run):
        launch(*args)
    return runs


def source_of(kernel: JITFunction, arguments: dict) -> ASTSource:
    """The kernel specialised on these arguments as triton's launcher would."""
    signature, constants, attributes = {}, {}, {}

    def specialise(value, path: tuple[int, ...], parameter):
        """The type of the value at `path`: a parameter's position, then positions inside the tuples it is made of."""
        if isinstance(value, tuple):
            types = [specialise(item, (*path, i), parameter) for i, item in enumerate(value)]
            return type(value)(*types) if hasattr(value, "_fields") else tuple(types)
        specialised = not parameter.do_not_specialize
        is_one = isinstance(value, int) and value == 1 and specialised
        if parameter.is_constexpr or value is None or is_one:
            constants[path] = value
            return "constexpr"
        # A meta tensor stands for one that torch allocated, which is aligned.
        if isinstance(value, Tensor) or (isinstance(value, int) and value % ALIGNMENT == 0 and specialised):
            attributes[path] = [["tt.divisibility", ALIGNMENT]]
        return mangle_type(value)

    for position, parameter in enumerate(kernel.params):
        signature[parameter.name] = specialise(arguments[parameter.name], (position,), parameter)
    return ASTSource(kernel, signature, constants, attributes)


def reports(all_sizes: list[Sizes], targets=TARGETS) -> Iterator[dict]:
    """One row per kernel, dtype, sizes and target; kernels that no longer differ are compiled once."""
    seen = set()
    for arch, (op, launch), sizes, dtype in itertools.product(targets, launches().items(), all_sizes, DTYPES):
        for kernel, arguments, options in recorded(launch, dtype, sizes):
            source = source_of(kernel, arguments)
            key = (arch, kernel.__name__, source.hash(), tuple(sorted(options.items())))
            if key in seen:
                continue
            seen.add(key)
            compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
            values = (
                op,
                kernel.__name__,
                f"sm_{arch}",
                str(dtype).removeprefix("torch."),
                *sizes[:3],
                options["num_warps"],
                *resources(compiled.asm["cubin"]),
                compiled.metadata.shared,
            )
            yield dict(zip(WIDTHS, values, strict=True))


def line(cells: Iterable) -> str:
    return "".join(f"{cell!s:{width}}" for cell, width in zip(cells, WIDTHS.values(), strict=True)).rstrip()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m madtp_kernels.triton.aot", description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="other widths and optional arguments too")
    parser.add_argument("--out", type=Path, help="also write the table here, as JSON")
    options = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 leaves nothing to compile, unset it")

    rows = []
    print(line(WIDTHS))
    for row in reports(SHIPPED + OTHERS if options.all else SHIPPED):
        rows.append(row)
        print(line(row.values()), flush=True)
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1) + "\n")
    spilling = sorted({row["kernel"] for row in rows if row["spilled_bytes"]})
    if spilling:
        print(f"registers spill to local memory in {', '.join(spilling)}", file=sys.stderr)
    return int(bool(spilling))


if __name__ == "__main__":
    sys.exit(main())
