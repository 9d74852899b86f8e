# SPDX-License-Identifier: Apache-2.0
"""Runs madtp_kernels.triton.embed where a library is built: with triton, without torch.

The files of the kernels import torch for their launchers, which do not run here. A stand-in has what those files name
when they are imported, and the package is not imported as a whole.
"""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

sys.dont_write_bytecode = True
FLOAT32 = SimpleNamespace(bits=32, tiny=2.0**-126, max=(2 - 2.0**-23) * 2.0**127, min=-(2 - 2.0**-23) * 2.0**127)


def stand_in() -> ModuleType:
    torch = ModuleType("torch")
    for name in ("Tensor", "device", "dtype"):
        setattr(torch, name, type(name, (), {}))
    for name in ("float32", "bfloat16", "float16", "int32", "uint8", "bool"):
        setattr(torch, name, name)
    torch.finfo = lambda dtype: FLOAT32 if dtype == "float32" else SimpleNamespace(bits=16)
    torch.iinfo = lambda dtype: SimpleNamespace(min=-(2**31), max=2**31 - 1)
    return torch


if __name__ == "__main__":
    package = ModuleType("madtp_kernels")
    package.__path__ = [str(Path(__file__).resolve().parent.parent / "madtp_kernels")]
    sys.modules |= {"torch": stand_in(), "madtp_kernels": package}
    from madtp_kernels.triton import embed

    sys.exit(embed.main())
