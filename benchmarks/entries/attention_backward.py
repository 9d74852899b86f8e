# SPDX-License-Identifier: Apache-2.0
"""The backward of attention: gradients of queries, keys and values, with those of the statistics where it says so."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import madtp_kernels as mk
from benchmarks.entries import attention
from benchmarks.entries.attention import SHAPE, AttentionInputs, attention_inputs
from benchmarks.entry import Entry, require

CASES = [{"batch": 4, "tokens": tokens, **SHAPE, "dtype": "float32"} for tokens in (577, 197, 65)]

GPU_CASES = [
    {"batch": batch, "tokens": tokens, **SHAPE, "dtype": "bfloat16"}
    for batch, tokens in ((8, 577), (8, 197), (2, 2308))
]


class BackwardInputs(NamedTuple):
    forward: AttentionInputs
    grads: tuple[Tensor, Tensor, Tensor]  # of out (T, H, D), of the two statistics (T,)


def backward_inputs(case, device, seed) -> BackwardInputs:
    i = attention_inputs(case, device, seed)
    generator = torch.Generator().manual_seed(seed)
    grad_out = torch.randn(i.q.shape, generator=generator).to(i.q)
    statistics = (torch.randn(i.q.shape[0], generator=generator).to(device) for _ in range(2))
    return BackwardInputs(i, (grad_out, *statistics))


def _padded(i: AttentionInputs, grad: Tensor) -> Tensor:
    grad = grad.unflatten(0, i.real.shape)
    return grad.transpose(1, 2) if grad.ndim == 4 else grad


def _differentiate(results, inputs, grads):
    return lambda: torch.autograd.grad(results, inputs, grads[: len(results)], retain_graph=True)


def ours(backend: str, return_stats: bool):
    def prepare(i: BackwardInputs):
        qkv = [x.detach().requires_grad_() for x in (i.forward.q, i.forward.k, i.forward.v)]
        options = {"max_seqlen_q": i.forward.real.shape[1], "return_stats": return_stats, "backend": backend}
        require("varlen_attention", *qkv, i.forward.cu_seqlens, **options)
        result = mk.varlen_attention(*qkv, i.forward.cu_seqlens, **options)
        return _differentiate((result[0], *result[1]) if return_stats else (result,), qkv, i.grads)

    return prepare


def sdpa(i: BackwardInputs):
    qkv = [x.detach().requires_grad_() for x in i.forward.padded]
    grads = [_padded(i.forward, i.grads[0])]
    return _differentiate((F.scaled_dot_product_attention(*qkv),), qkv, grads)


def eager(i: BackwardInputs):
    qkv = [x.detach().requires_grad_() for x in i.forward.padded]
    grads = [_padded(i.forward, grad) for grad in i.grads]
    return _differentiate(attention.eager_statistics(i.forward, *qkv), qkv, grads)


def check(i: BackwardInputs, result, provider: str) -> None:
    qkv = [x.double().requires_grad_() for x in (i.forward.q, i.forward.k, i.forward.v)]
    out, stats = mk.varlen_attention(
        *qkv, i.forward.cu_seqlens, max_seqlen_q=i.forward.real.shape[1], return_stats=True, backend="reference"
    )
    results = (out, *stats) if "statistics" in provider else (out,)
    grads = [grad.double() for grad in i.grads[: len(results)]]
    for got, want in zip(result, torch.autograd.grad(results, qkv, grads), strict=True):
        got = got if got.shape == want.shape else attention.rows(i.forward, got)
        # Where two heads tie to rounding, the gradient of their maximum may go to either.
        error = (got.double() - want).abs().flatten()[::7].quantile(0.999) / want.abs().max()
        tolerance = 1e-5 if got.dtype == torch.float32 else 1e-2
        assert error < tolerance, f"the gradients are not the reference's: off by {error:.1e} of the largest"


ENTRIES = (
    Entry(
        name="attention_backward",
        summary="the backward of attention, through the statistics too where it says so",
        cases=CASES,
        gpu_cases=GPU_CASES,
        inputs=backward_inputs,
        providers={
            "torch SDPA": sdpa,
            "torch eager with statistics": eager,
            "madtp cpu": ours("cpu", return_stats=False),
            "madtp cpu with statistics": ours("cpu", return_stats=True),
            "madtp triton": ours("triton", return_stats=False),
            "madtp triton with statistics": ours("triton", return_stats=True),
        },
        baseline="torch SDPA",
        gate=check,
        bytes=lambda case, i: 8 * i.forward.q.nbytes,
        flops=lambda case, i: 5 * attention.flops(case, i.forward) // 2,
    ),
)
