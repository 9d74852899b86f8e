"""Attention that also returns the importance statistics of every token, beside attention that returns none."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import madtp_kernels as mk
from benchmarks.registry import Entry, require


class AttentionInputs(NamedTuple):
    q: Tensor  # (T, H, D), as one third of a packed projection (T, 3, H, D)
    k: Tensor
    v: Tensor
    cu_seqlens: Tensor  # (B + 1,)
    batch: int
    tokens: int  # of each sequence


CASES = [
    {"batch": batch, "tokens": tokens, "heads": 12, "head_dim": 64, "dtype": dtype}
    for batch, tokens, dtype in (
        (4, 577, "float32"),
        (4, 197, "float32"),
        (4, 65, "float32"),
        (4, 257, "float32"),
        (4, 1025, "float32"),
        (1, 577, "float32"),
        (4, 577, "bfloat16"),
    )
]


def attention_inputs(case, device, seed) -> AttentionInputs:
    generator = torch.Generator().manual_seed(seed)
    batch, tokens = case["batch"], case["tokens"]
    packed = torch.randn(batch * tokens, 3, case["heads"], case["head_dim"], generator=generator)
    packed = packed.to(device, getattr(torch, case["dtype"]))
    cu_seqlens = torch.arange(0, batch * tokens + 1, tokens, dtype=torch.int32, device=device)
    return AttentionInputs(*packed.unbind(1), cu_seqlens, batch, tokens)


def _padded(i: AttentionInputs):
    """q, k, v as (B, H, N, D) views."""
    return (x.unflatten(0, (i.batch, i.tokens)).transpose(1, 2) for x in (i.q, i.k, i.v))


def ours(backend: str, return_stats: bool):
    def prepare(i: AttentionInputs):
        arguments = (i.q, i.k, i.v, i.cu_seqlens)
        options = {"max_seqlen_q": i.tokens, "return_stats": return_stats, "backend": backend}
        require("varlen_attention", *arguments, **options)

        def run():
            result = mk.varlen_attention(*arguments, **options)
            return (result[0], *result[1]) if return_stats else (result,)

        return run

    return prepare


def sdpa(i: AttentionInputs):
    q, k, v = _padded(i)
    return lambda: (F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1),)


def eager(i: AttentionInputs):
    """The three results in plain torch, all maps in memory, as the published code has it."""
    q, k, v = _padded(i)

    def run():
        probabilities = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, -1)  # (B, H, N, N)
        out = probabilities @ v
        norms = out.norm(dim=-1)  # (B, H, N)
        summary = (probabilities[:, :, 0] * norms / norms.sum(1, keepdim=True)).sum(1)
        received = probabilities.amax(1)[:, 1:].sum(1)
        return out.transpose(1, 2).flatten(0, 1), summary.flatten(), received.flatten()

    return run


def check(i: AttentionInputs, result, provider: str) -> None:
    wide = (x.double() for x in (i.q, i.k, i.v))
    out, stats = mk.varlen_attention(*wide, i.cu_seqlens, max_seqlen_q=i.tokens, return_stats=True, backend="reference")
    tolerance = 1e-4 if i.q.dtype == torch.float32 else 5e-2
    for got, want in zip(result, (out, *stats), strict=False):
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


def least_bytes(case, i: AttentionInputs) -> int:
    return 4 * i.q.nbytes + 2 * 4 * i.q.shape[0]


def flops(case, i: AttentionInputs) -> int:
    return 4 * i.batch * i.tokens**2 * i.q.shape[1] * i.q.shape[2]


ENTRIES = (
    Entry(
        name="attention",
        summary="attention of packed sequences, with the importance statistics of every token where it says so",
        cases=CASES,
        inputs=attention_inputs,
        providers={
            "torch SDPA": sdpa,
            "torch eager with statistics": eager,
            "madtp cpu": ours("cpu", return_stats=False),
            "madtp cpu with statistics": ours("cpu", return_stats=True),
        },
        baseline="torch SDPA",
        gate=check,
        bytes=least_bytes,
        flops=flops,
    ),
)
