# SPDX-License-Identifier: Apache-2.0
"""Linear layers from x to y in its dtype: ours in int8 and 2:4, and the dense ones that a CPU has without us."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import madtp_kernels as mk
from benchmarks.entry import Entry, Thunk, require
from benchmarks.peers import dynamic_int8, onednn, torchao
from madtp_kernels import QuantizedWeight, Sparse24Weight

LAYERS = (  # (in_features, out_features): qkv, proj, fc1 and fc2 of ViT-B; fc1 and fc2 of ViT-L
    (768, 2304),
    (768, 768),
    (768, 3072),
    (3072, 768),
    (1024, 4096),
    (4096, 1024),
)
TOKENS = (1, 8, 32, 197, 577, 2308)
CASES = [
    {"tokens": tokens, "in_features": in_features, "out_features": out_features, "dtype": dtype}
    for tokens in TOKENS
    for dtype in ("float32", "bfloat16")
    for in_features, out_features in LAYERS
]
ERROR = {"float32": 1e-5, "bfloat16": 1e-2, "int8": 3e-2}  # relative, of all outputs together, by what multiplies


@dataclass(frozen=True)
class LinearInputs:
    x: Tensor  # (T, C)
    dense: Tensor  # (N, C) float32, 2:4, so that all providers have the same to compute
    bias: Tensor  # (N,) float32

    @functools.cached_property
    def exact(self) -> Tensor:  # (T, N) float64
        return F.linear(self.x.double(), self.dense.double(), self.bias.double())


def linear_inputs(case, device, seed) -> LinearInputs:
    generator = torch.Generator().manual_seed(seed)
    in_features, out_features = case["in_features"], case["out_features"]
    dense = torch.randn(out_features, in_features, generator=generator) * in_features**-0.5
    dense = (dense * mk.nm_mask(dense, 2, 4)).to(device)
    bias = torch.randn(out_features, generator=generator).to(device)
    x = torch.randn(case["tokens"], in_features, generator=generator).to(device, getattr(torch, case["dtype"]))
    return LinearInputs(x, dense, bias)


def in_dtype(product: Callable[[Tensor], Tensor], x: Tensor, dtype: torch.dtype) -> Thunk:
    """A product of one dtype on x of another, as autocast has it: weights are cast ahead of time."""
    if x.dtype is dtype:
        return lambda: product(x)
    return lambda: product(x.to(dtype)).to(x.dtype)


def torch_linear(dtype: torch.dtype):
    def prepare(i: LinearInputs) -> Thunk:
        weight, bias = i.dense.to(dtype), i.bias.to(dtype)
        return in_dtype(lambda x: F.linear(x, weight, bias), i.x, dtype)

    return prepare


def packed_linear(dtype: torch.dtype):
    return lambda i: in_dtype(onednn.linear(i.dense.to(dtype), i.bias.to(dtype)), i.x, dtype)


def int_mm(i: LinearInputs) -> Thunk:
    return in_dtype(dynamic_int8.linear(i.dense, i.bias), i.x, torch.float32)


def torchao_linear(i: LinearInputs) -> Thunk:
    layer = nn.Linear(*i.dense.t().shape, device="meta")
    layer.weight, layer.bias = (nn.Parameter(t.to(i.x.dtype), requires_grad=False) for t in (i.dense, i.bias))
    layer = torchao.quantize_linears(nn.Sequential(layer))
    return lambda: layer(i.x)


def ours(op: str, pack: Callable[[Tensor], Sparse24Weight | QuantizedWeight]):
    def prepare(i: LinearInputs) -> Thunk:
        weight, bias = pack(i.dense.to(i.x.dtype)), i.bias.to(i.x.dtype)
        require(op, i.x, weight, bias, backend="cpu")
        run = getattr(mk, op)
        weight.layout("cpu")
        return lambda: run(i.x, weight, bias, backend="cpu")

    return prepare


def check(i: LinearInputs, result: Tensor, provider: str) -> None:
    assert result.dtype is i.x.dtype and result.shape == i.exact.shape, f"{result.dtype} {tuple(result.shape)}"
    dtype = str(i.x.dtype).removeprefix("torch.")
    tolerance = max(ERROR[dtype], *(error for name, error in ERROR.items() if name in provider), 0)
    error = ((result.double() - i.exact).norm() / i.exact.norm()).item()
    assert error <= tolerance, f"relative error {error:.1e}"


def least_bytes(case, i: LinearInputs) -> int:
    """x and y once, and the smallest weight among the providers': half of the values in int8, and two bits for each."""
    return (i.x.numel() + i.x.shape[0] * i.dense.shape[0]) * i.x.element_size() + i.dense.numel() * 5 // 8


ENTRIES = (
    Entry(
        name="quantized_linear",
        summary="linear layers of ViT-B and ViT-L, from x to y in this dtype; geometric means over six shapes, with "
        "the least and the largest of them",
        cases=CASES,
        inputs=linear_inputs,
        providers={
            "torch float32": torch_linear(torch.float32),
            "torch bfloat16": torch_linear(torch.bfloat16),
            "oneDNN float32, packed": packed_linear(torch.float32),
            "oneDNN bfloat16, packed": packed_linear(torch.bfloat16),
            "torch._int_mm, dynamic int8": int_mm,
            "torchao, dynamic int8": torchao_linear,
            "madtp cpu 2:4": ours("sparse24_linear", mk.sparse24_compress),
            "madtp cpu int8": ours("quantized_linear", lambda dense: mk.quantize(dense, "int8")),
            "madtp cpu 2:4 int8": ours("quantized_linear", lambda dense: mk.quantize(dense, "int8_24")),
        },
        baseline="torch float32",
        gate=check,
        bytes=least_bytes,
        flops=lambda case, i: 2 * i.x.shape[0] * i.dense.numel(),
        means=("in_features", "out_features"),
        seconds=0.6,
        packages=("torchao",),
        memory=False,
    ),
)
