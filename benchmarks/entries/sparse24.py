# SPDX-License-Identifier: Apache-2.0
"""2:4 linear layers with their epilogue: ours, the dense product with its epilogue in torch, and NVIDIA's libraries."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import madtp_kernels as mk
from benchmarks.entry import Entry, Unavailable, require
from madtp_kernels import Sparse24Weight, sparse24_compress
from madtp_kernels.dense import onednn
from madtp_kernels.sparse24 import backend_cusparselt as cusparselt


class LinearInputs(NamedTuple):
    x: Tensor  # (T, C)
    dense: Tensor  # (N, C)
    weight: Sparse24Weight
    bias: Tensor  # (N,)
    activation: str | None
    residual: Tensor | None  # (T, N)


LAYERS = (  # of a ViT-B block
    {"in_features": 768, "out_features": 3072, "epilogue": "gelu"},
    {"in_features": 3072, "out_features": 768, "epilogue": "residual"},
    {"in_features": 768, "out_features": 2304, "epilogue": "bias"},
    {"in_features": 768, "out_features": 768, "epilogue": "bias"},
)
TOKENS = (1, 4, 12, 16, 32, 64, 197, 577, 2308)
CASES = [{"tokens": tokens, **layer, "dtype": "float32"} for layer in LAYERS for tokens in TOKENS]
CASES += [{"tokens": tokens, **layer, "dtype": "bfloat16"} for layer in LAYERS for tokens in (1, 16, 197, 577, 2308)]
GPU_CASES = [  # what the Sparse Tensor Cores take
    {"tokens": tokens, **layer, "dtype": "bfloat16"} for layer in LAYERS for tokens in (64, 197, 577, 2308, 4616, 18464)
]
SWEEP = [
    {"tokens": tokens, "in_features": in_features, "out_features": out_features, "epilogue": "bias", "dtype": "float32"}
    for out_features, in_features in (*itertools.product((192, 768, 3072), repeat=2), (4096, 1024))
    for tokens in (1, 4, 16, 64, 197, 577, 1154, 4616)
]
GPU_SWEEP = [
    {
        "tokens": tokens,
        "in_features": in_features,
        "out_features": out_features,
        "epilogue": "bias",
        "dtype": "bfloat16",
    }
    for out_features, in_features in ((768, 768), (3072, 768), (768, 3072), (4096, 1024))
    for tokens in (16, 64, 577, 4616)
]


def linear_inputs(case, device, seed) -> LinearInputs:
    generator = torch.Generator().manual_seed(seed)
    tokens, in_features, out_features = case["tokens"], case["in_features"], case["out_features"]
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    dense = draw(out_features, in_features) * in_features**-0.5
    dense = dense * mk.nm_mask(dense, 2, 4)
    epilogue = case["epilogue"]
    tensors = draw(tokens, in_features), dense, draw(out_features), draw(tokens, out_features)
    x, dense, bias, residual = (tensor.to(device, getattr(torch, case["dtype"])) for tensor in tensors)
    return LinearInputs(
        x,
        dense,
        sparse24_compress(dense),
        bias,
        "gelu" if epilogue == "gelu" else None,
        residual if epilogue == "residual" else None,
    )


def torch_linear(i: LinearInputs):
    def run():
        y = F.linear(i.x, i.dense, i.bias)
        if i.activation is not None:
            y = F.gelu(y)
        return y if i.residual is None else i.residual + y

    return run


def onednn_packed(i: LinearInputs):
    """The fastest dense product of many a CPU, with what it fuses; the weight is packed before the clock starts."""
    options = {"activation": i.activation, "residual": i.residual, "backend": "onednn"}
    require("dense_linear", i.x, i.dense, i.bias, **options)
    packed = onednn.pack(i.dense)
    return lambda: onednn.linear(i.x, packed, i.bias, i.activation or "none", i.residual, None)


def cublaslt_fused(i: LinearInputs):
    """The dense product with what cuBLASLt can fuse: the bias, tanh GELU or a residual, which is then beta C."""
    if i.x.device.type != "cuda":
        raise Unavailable("cuBLASLt needs a CUDA device")
    dense_t = i.dense.t()
    if i.activation == "gelu":  # which is the tanh form in cuBLASLt
        if i.x.dtype == torch.float32:
            raise Unavailable("cuBLASLt fuses the tanh form of GELU, which float32 tells from GELU")
        return lambda: torch._addmm_activation(i.bias, i.x, dense_t, use_gelu=True)
    if i.residual is None:
        return lambda: torch.addmm(i.bias, i.x, dense_t)
    shifted = i.residual + i.bias  # a residual takes the place of the bias: ahead of time, in favour of this peer
    return lambda: torch.addmm(shifted, i.x, dense_t)


def cusparselt_tuned(i: LinearInputs):
    """The library's fastest algorithm for this problem, by its own search."""
    options = {"activation": i.activation, "residual": i.residual, "backend": "cusparselt"}
    require("sparse24_linear", i.x, i.weight, i.bias, **options)
    layout = i.weight.layout("cusparselt")
    algorithm = cusparselt.search(i.x, layout, i.bias)
    weight = i.weight.values, i.weight.indices, layout
    epilogue = i.bias, i.activation or "none", i.residual, None, None
    return lambda: cusparselt.sparse24_linear(i.x, *weight, *epilogue, algorithm)


def ours(backend: str):
    def prepare(i: LinearInputs):
        options = {"activation": i.activation, "residual": i.residual, "backend": backend}
        require("sparse24_linear", i.x, i.weight, i.bias, **options)
        weight = Sparse24Weight(i.weight.values, i.weight.indices)  # packs its own, which no other provider warms

        def run():
            return mk.sparse24_linear(i.x, weight, i.bias, **options)

        run()  # packs the weight, and lets auto choose, before the clock starts
        return run

    return prepare


def check(i: LinearInputs, result: Tensor, provider: str) -> None:
    y = F.linear(i.x.double(), i.dense.double(), i.bias.double())
    y = y if i.activation is None else F.gelu(y)
    y = y if i.residual is None else i.residual.double() + y
    tolerance = 1e-4 if i.x.dtype == torch.float32 else 5e-2
    torch.testing.assert_close(result.double(), y, rtol=tolerance, atol=tolerance)


def least_bytes(case, i: LinearInputs) -> int:
    """x and the output once, the kept weights and their columns once."""
    rows = [i.x.nbytes, i.x.shape[0] * i.dense.shape[0] * i.x.element_size(), i.bias.nbytes]
    rows += [] if i.residual is None else [i.residual.nbytes]
    return sum(rows) + i.weight.values.nbytes + i.weight.indices.nbytes


def flops(case, i: LinearInputs) -> int:
    """Of the dense product, so that rates compare."""
    return 2 * i.x.shape[0] * i.dense.numel()


ENTRIES = (
    Entry(
        name="sparse24_linear",
        summary="a linear layer with a 2:4 weight and its epilogue; the rate counts the FLOPs of the dense product",
        cases=CASES,
        gpu_cases=GPU_CASES,
        inputs=linear_inputs,
        providers={
            "torch dense": torch_linear,
            "oneDNN dense, packed": onednn_packed,
            "cuBLASLt dense, fused": cublaslt_fused,
            "cuSPARSELt, tuned": cusparselt_tuned,
            "madtp auto": ours("auto"),
            "madtp cpu": ours("cpu"),
            "madtp cuda": ours("cuda"),
            "madtp reference": ours("reference"),
        },
        baseline="torch dense",
        gate=check,
        bytes=least_bytes,
        flops=flops,
    ),
    Entry(
        name="sparse24_sweep",
        summary="linear layers with a 2:4 weight and a bias on the backend that auto chooses, over rows and sizes",
        cases=SWEEP,
        gpu_cases=GPU_SWEEP,
        inputs=linear_inputs,
        providers={
            "torch dense": torch_linear,
            "oneDNN dense, packed": onednn_packed,
            "madtp auto": ours("auto"),
            "madtp cpu": ours("cpu"),
        },
        baseline="torch dense",
        gate=check,
        bytes=least_bytes,
        flops=flops,
        grid="madtp auto",
    ),
)
