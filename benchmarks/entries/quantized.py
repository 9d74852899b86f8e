# SPDX-License-Identifier: Apache-2.0
"""Linear layers from x to y in its dtype: ours in int8 and 2:4, and the dense ones that a CPU has without us."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import madtp_kernels as mk
from benchmarks.entry import Entry, Thunk, Unavailable, require
from benchmarks.peers import dynamic_int8, torchao
from madtp_kernels import QuantizedWeight, Sparse24Weight
from madtp_kernels.dense import onednn

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


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer that all cases of its shape share, with what providers make of it ahead of time."""

    dense: Tensor  # (N, C) float32, 2:4, so that all providers have the same to compute
    bias: Tensor  # (N,) float32
    prepared: dict[tuple, Any] = field(default_factory=dict)

    def prepare(self, make: Callable[..., Any], dtype: torch.dtype, *arguments: Any) -> Any:
        """make(weight, bias, *arguments) in this dtype, once for each."""
        key = make, dtype, *arguments
        if key not in self.prepared:
            self.prepared[key] = make(self.dense.to(dtype), self.bias.to(dtype), *arguments)
        return self.prepared[key]


@functools.cache
def _layer(in_features: int, out_features: int, device: torch.device, seed: int) -> Layer:
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(out_features, in_features, generator=generator) * in_features**-0.5
    bias = torch.randn(out_features, generator=generator)
    return Layer((dense * mk.nm_mask(dense, 2, 4)).to(device), bias.to(device))


@dataclass(frozen=True)
class LinearInputs:
    x: Tensor  # (T, C)
    layer: Layer

    @functools.cached_property
    def exact(self) -> Tensor:  # (T, N) float64
        return F.linear(self.x.double(), self.layer.dense.double(), self.layer.bias.double())


def linear_inputs(case, device, seed) -> LinearInputs:
    layer = _layer(case["in_features"], case["out_features"], device, seed)
    x = torch.randn(case["tokens"], case["in_features"], generator=torch.Generator().manual_seed(1000 + seed))
    return LinearInputs(x.to(device, getattr(torch, case["dtype"])), layer)


def in_dtype(product: Callable[[Tensor], Tensor], x: Tensor, dtype: torch.dtype) -> Thunk:
    """A product of one dtype on x of another, as autocast has it: weights are cast ahead of time."""
    if x.dtype is dtype:
        return lambda: product(x)
    return lambda: product(x.to(dtype)).to(x.dtype)


def dense(make: Callable[[Tensor, Tensor], Callable[[Tensor], Tensor]], dtype: torch.dtype | None):
    """make: (weight, bias) -> a function of x, all of this dtype; None: that of x."""

    def prepare(i: LinearInputs) -> Thunk:
        if i.x.device.type != "cpu":
            raise Unavailable("a peer on CPUs")
        product_dtype = i.x.dtype if dtype is None else dtype
        return in_dtype(i.layer.prepare(make, product_dtype), i.x, product_dtype)

    return prepare


def torch_linear(weight: Tensor, bias: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: F.linear(x, weight, bias)


def onednn_linear(weight: Tensor, bias: Tensor) -> Callable[[Tensor], Tensor]:
    if reason := onednn.unsupported_reason(weight.dtype):
        raise Unavailable(reason)
    packed = onednn.pack(weight)
    return lambda x: onednn.linear(x, packed, bias, "none", None, None)


def torchao_linear(weight: Tensor, bias: Tensor) -> Callable[[Tensor], Tensor]:
    layer = nn.Linear(*weight.t().shape, device="meta")
    layer.weight, layer.bias = (nn.Parameter(tensor, requires_grad=False) for tensor in (weight, bias))
    return torchao.quantize_linears(nn.Sequential(layer))


def pack(weight: Tensor, bias: Tensor, scheme: str) -> tuple[Sparse24Weight | QuantizedWeight, Tensor]:
    return mk.sparse24_compress(weight) if scheme == "sparse24" else mk.quantize(weight, scheme), bias


def ours(op: str, scheme: str):
    def prepare(i: LinearInputs) -> Thunk:
        weight, bias = i.layer.prepare(pack, i.x.dtype, scheme)
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
    return (i.x.numel() + i.x.shape[0] * i.layer.dense.shape[0]) * i.x.element_size() + i.layer.dense.numel() * 5 // 8


ENTRIES = (
    Entry(
        name="quantized_linear",
        summary="linear layers of ViT-B and ViT-L, from x to y in this dtype; geometric means over six shapes, with "
        "the least and the largest of them",
        cases=CASES,
        gpu_cases=(),  # int8 runs on CPUs
        inputs=linear_inputs,
        providers={
            "torch float32": dense(torch_linear, torch.float32),
            "torch bfloat16": dense(torch_linear, torch.bfloat16),
            "oneDNN float32, packed": dense(onednn_linear, torch.float32),
            "oneDNN bfloat16, packed": dense(onednn_linear, torch.bfloat16),
            "torch._int_mm, dynamic int8": dense(dynamic_int8.linear, torch.float32),
            "torchao, dynamic int8": dense(torchao_linear, None),
            "madtp cpu 2:4": ours("sparse24_linear", "sparse24"),
            "madtp cpu int8": ours("quantized_linear", "int8"),
            "madtp cpu 2:4 int8": ours("quantized_linear", "int8_24"),
        },
        baseline="torch float32",
        gate=check,
        bytes=least_bytes,
        flops=lambda case, i: 2 * i.x.shape[0] * i.layer.dense.numel(),
        means=("in_features", "out_features"),
        seconds=0.5,
        packages=("torchao",),
        memory=False,
    ),
)
