# SPDX-License-Identifier: Apache-2.0
"""What an installed wheel must do, without the source tree: python try_wheel.py. It prints what it saw."""

import json
from pathlib import Path

import torch

import madtp
import madtp_kernels as mk
from madtp.tasks.vqa import load_dense
from madtp_kernels import _C


def openmp_runtimes() -> list[str]:
    """The files of OpenMP runtimes in this process; Linux tells them."""
    maps = Path("/proc/self/maps")
    paths = {line.split()[-1] for line in maps.read_text().splitlines()} if maps.exists() else set()
    return sorted(path for path in paths if any(name in path for name in ("libgomp", "libomp", "libiomp")))


def macs_of_a_patched_model() -> tuple[float, float]:
    """Multiply-adds of the small BLIP that ships with the package: dense, and with half of its tokens."""
    model, tokenizer = load_dense()
    batch = {"pixel_values": torch.rand(1, 3, 64, 64), **tokenizer("what color is the shape?", return_tensors="pt")}
    batch["labels"] = tokenizer("red", return_tensors="pt").input_ids
    madtp.patch(model, madtp.CompressionConfig(alignment_dim=128), keep_rate=0.5, calibration=[batch])
    macs = madtp.profile(model, batch).total
    return macs.dense_macs, macs.counted_macs


torch.manual_seed(0)
dense, counted = macs_of_a_patched_model()
q, k, v = torch.randn(3, 120, 4, 64)
cu_seqlens = torch.tensor([0, 40, 120], dtype=torch.int32)
outputs = [
    mk.varlen_attention(q, k, v, cu_seqlens, max_seqlen_q=80, backend=backend)[0] for backend in ("cpu", "reference")
]
torch.testing.assert_close(*outputs)
flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
found = {
    "package": str(Path(mk.__file__).parent),
    "version": mk.__version__,
    "isa": _C.cpu.isa(),
    "isas": list(_C.cpu.available_isas()),
    "cpu_has": [name for name in ("avx2", "avx512f", "asimddp") if name in flags],
    "cuda": _C.build_info()["cuda"],
    "openmp": openmp_runtimes(),
    "dense_macs": dense,
    "counted_macs": counted,
}
assert found["isa"] == found["isas"][-1], found
assert counted < dense, found
assert len(found["openmp"]) <= 1, found
print(json.dumps(found, indent=2))
