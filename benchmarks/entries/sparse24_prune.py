# SPDX-License-Identifier: Apache-2.0
"""From a dense weight to its 2:4 form, and from there to the layout of the kernels, beside a copy of the weight."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.sparse import to_sparse_semi_structured

import madtp_kernels as mk
from benchmarks.entry import Entry, Unavailable, require
from madtp_kernels import Sparse24Weight
from madtp_kernels.dispatch import extension_unsupported_reason
from madtp_kernels.native import sparse24 as native
from madtp_kernels.sparse24.weight import pack_positions


class PruneInputs(NamedTuple):
    weight: Tensor  # (N, C)
    score: Tensor | None  # (N, C)
    copy: Tensor  # (N, C), to write to


CASES = [
    {"rows": 4096, "columns": 4096, "score": score, "dtype": dtype}
    for dtype in ("float32", "bfloat16")
    for score in ("magnitude", "given")
]
LAYERS = [  # of a ViT-B
    {"rows": 3072, "columns": 768, "dtype": "float32"},
    {"rows": 768, "columns": 3072, "dtype": "float32"},
]


def prune_inputs(case, device, seed) -> PruneInputs:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randn(case["rows"], case["columns"], generator=generator)  # noqa: E731
    weight = draw().to(device, getattr(torch, case["dtype"]))
    score = draw().abs().to(device) if case["score"] == "given" else None
    return PruneInputs(weight, score, torch.empty_like(weight))


def ours(backend: str):
    def prepare(i: PruneInputs):
        require("sparse24_prune", i.weight, score=i.score, backend=backend)
        return lambda: mk.sparse24_prune(i.weight, score=i.score, backend=backend)

    return prepare


def torch_sort(i: PruneInputs):
    """As one would write it: sort every group, take the two that lead."""

    def run():
        groups = (i.weight.abs() if i.score is None else i.score).unflatten(1, (-1, 4))
        order = groups.sort(dim=-1, descending=True, stable=True).indices[..., :2]
        kept = torch.zeros(groups.shape, dtype=torch.bool, device=i.weight.device).scatter(-1, order, True).flatten(1)
        return Sparse24Weight(i.weight[kept].view(kept.shape[0], -1), pack_positions(kept))

    return run


def torch_semi_structured(i: PruneInputs):
    """torch's own 2:4 tensor, of the weight once it is masked."""
    mask = mk.nm_mask(i.weight, 2, 4, score=i.score)

    def run():
        return to_sparse_semi_structured(i.weight * mask)

    try:
        run()
    except (RuntimeError, NotImplementedError) as error:
        raise Unavailable(str(error).splitlines()[0]) from None
    return run


def copy_of_weight(i: PruneInputs):
    """The ceiling: one read and one write of the weight."""
    return lambda: i.copy.copy_(i.weight)


def check_pruned(i: PruneInputs, result, provider: str) -> None:
    """Bit by bit."""
    if provider == "copy of the weight":
        return
    expected = mk.sparse24_prune(i.weight, score=i.score, backend="reference")
    if provider == "torch semi-structured":
        assert torch.equal(result.to_dense(), expected.to_dense())
        return
    assert torch.equal(result.values, expected.values) and torch.equal(result.indices, expected.indices)


def pruned_bytes(case, i: PruneInputs) -> int:
    """The weight and its score once, the kept values and their columns once."""
    return i.weight.nbytes + (0 if i.score is None else i.score.nbytes) + i.weight.nbytes // 2 + i.weight.numel() // 8


class PackInputs(NamedTuple):
    weight: Tensor  # (N, C)
    sparse: Sparse24Weight
    copy: Tensor  # (N, C), to write to


def pack_inputs(case, device, seed) -> PackInputs:
    weight = torch.randn(case["rows"], case["columns"], generator=torch.Generator().manual_seed(seed))
    weight = weight.to(device, getattr(torch, case["dtype"]))
    sparse = mk.sparse24_prune(weight)
    return PackInputs(weight, sparse, torch.empty_like(weight))


def our_layout(i: PackInputs):
    if i.weight.device.type != "cpu" or extension_unsupported_reason() is not None:
        raise Unavailable(extension_unsupported_reason() or "the layout is that of the CPU kernels")
    return lambda: native.sparse24_pack(i.sparse.values, i.sparse.indices)


def dense_layout(i: PackInputs):
    """What torch's dense product needs of the same weight."""
    return i.sparse.to_dense


def check_layout(i: PackInputs, result, provider: str) -> None:
    if provider == "copy of the weight":
        return
    if provider == "madtp dense":
        assert torch.equal(result, i.weight * mk.nm_mask(i.weight, 2, 4))
        return
    x = torch.randn(8, i.weight.shape[1], generator=torch.Generator().manual_seed(0)).to(i.weight.dtype)
    y = native.sparse24_linear(x, i.sparse.values, i.sparse.indices, result, None, "none", None, None, None)
    exact = F.linear(x.double(), i.sparse.to_dense().double())
    tolerance = 1e-4 if i.weight.dtype == torch.float32 else 5e-2
    torch.testing.assert_close(y.double(), exact, rtol=tolerance, atol=tolerance)


def packed_bytes(case, i: PackInputs) -> int:
    layout = native.sparse24_layout_bytes(*i.weight.shape, i.weight.dtype, i.weight.device)
    return i.sparse.nbytes + layout


ENTRIES = (
    Entry(
        name="sparse24_prune",
        summary="a dense weight to its 2:4 form; a copy of the weight is the ceiling",
        cases=CASES,
        inputs=prune_inputs,
        providers={
            "torch sort": torch_sort,
            "torch semi-structured": torch_semi_structured,
            "madtp reference": ours("reference"),
            "madtp cpu": ours("cpu"),
            "madtp cuda": ours("cuda"),
            "copy of the weight": copy_of_weight,
        },
        baseline="madtp reference",
        gate=check_pruned,
        bytes=pruned_bytes,
    ),
    Entry(
        name="sparse24_pack",
        summary="the 2:4 form to the layout of the CPU kernels, once per process, beside a copy of the dense weight",
        cases=LAYERS,
        gpu_cases=(),  # the layout is that of the CPU kernels
        inputs=pack_inputs,
        providers={"copy of the weight": copy_of_weight, "madtp cpu": our_layout, "madtp dense": dense_layout},
        baseline="copy of the weight",
        gate=check_layout,
        bytes=packed_bytes,
    ),
)
