# SPDX-License-Identifier: Apache-2.0
"""Attention that also returns the importance statistics of every token, beside attention that returns none."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import madtp_kernels as mk
from benchmarks.entry import Entry, Unavailable, require

SHAPE = {"heads": 12, "head_dim": 64}
CASES = [
    {"batch": batch, "tokens": tokens, **SHAPE, "dtype": dtype}
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
GPU_CASES = [
    {"batch": batch, "tokens": tokens, **SHAPE, "dtype": dtype}
    for batch, tokens, dtype in ((8, 577, "bfloat16"), (8, 197, "bfloat16"), (2, 2308, "bfloat16"), (8, 577, "float16"))
]
RAGGED = [{"batch": 8, "tokens": "37 to 577", **SHAPE, "dtype": "float32"}]
LENGTHS = [{"batch": 1, "tokens": n, **SHAPE, "dtype": "float32"} for n in (65, 129, 257, 577, 1025, 2049, 4096)]
CROSS = [{"batch": 32, "queries": 20, "tokens": 577, **SHAPE, "dtype": "float32"}]


def in_bfloat16(cases):
    """The same cases for a GPU, whose matrix units take 16-bit types."""
    return [{**case, "dtype": "bfloat16"} for case in cases]


class AttentionInputs(NamedTuple):
    q: Tensor  # (T, H, D), as one third of a fused projection (T, 3, H, D)
    k: Tensor
    v: Tensor
    lengths: Tensor  # (B,)
    cu_seqlens: Tensor  # (B + 1,)
    padded: tuple[Tensor, ...]  # q, k, v as (B, H, N, D), for those who cannot do without
    real: Tensor  # (B, N) bool


def attention_inputs(case, device, seed) -> AttentionInputs:
    generator = torch.Generator().manual_seed(seed)
    if isinstance(case["tokens"], str):
        shortest, longest = (int(part) for part in case["tokens"].split(" to "))
        lengths = torch.randint(shortest, longest + 1, (case["batch"],), generator=generator)
        lengths[0] = longest
    else:
        lengths = torch.full((case["batch"],), case["tokens"])
    shape = (int(lengths.sum()), 3, case["heads"], case["head_dim"])
    qkv = torch.randn(shape, generator=generator).to(device, getattr(torch, case["dtype"]))
    lengths = lengths.to(device)
    cu_seqlens = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    real = torch.arange(int(lengths.max()), device=device) < lengths[:, None]
    if real.all():
        padded = qkv.unflatten(0, real.shape)
    else:
        padded = qkv.new_zeros(*real.shape, *shape[1:])
        padded[real] = qkv
    return AttentionInputs(
        *qkv.unbind(1), lengths, cu_seqlens, tuple(x.transpose(1, 2) for x in padded.unbind(2)), real
    )


def rows(i: AttentionInputs, x: Tensor) -> Tensor:
    """The real rows of a padded result: (B, H, N, D) -> (T, H, D), (B, N) -> (T,)."""
    return (x.transpose(1, 2) if x.ndim == 4 else x)[i.real]


def ours(backend: str, return_stats: bool):
    def prepare(i: AttentionInputs):
        arguments = (i.q, i.k, i.v, i.cu_seqlens)
        options = {"max_seqlen_q": i.real.shape[1], "return_stats": return_stats, "backend": backend}
        require("varlen_attention", *arguments, **options)

        def run():
            result = mk.varlen_attention(*arguments, **options)
            return (result[0], *result[1]) if return_stats else (result,)

        return run

    return prepare


def _mask(i: AttentionInputs) -> Tensor | None:  # (B, 1, 1, N)
    return None if i.real.all() else i.real[:, None, None]


def sdpa(i: AttentionInputs):
    mask = _mask(i)
    return lambda: (F.scaled_dot_product_attention(*i.padded, attn_mask=mask),)


def flex_attention(i: AttentionInputs):
    """torch's compiled attention, which takes masks as functions; it returns no statistics either."""
    if i.q.device.type != "cuda":
        raise Unavailable("FlexAttention is compared on GPUs")
    from torch.nn.attention.flex_attention import create_block_mask
    from torch.nn.attention.flex_attention import flex_attention as flex

    mask = None
    if not i.real.all():
        batch, length = i.real.shape
        is_real = lambda b, h, q, k: i.real[b, k]  # noqa: E731
        mask = create_block_mask(is_real, batch, None, length, length, device=i.q.device)
    compiled = torch.compile(flex, dynamic=False)
    run = lambda: (compiled(*i.padded, block_mask=mask),)  # noqa: E731
    run()  # compiles
    return run


def eager_statistics(i: AttentionInputs, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three results in plain torch, all maps in memory, as the published code has it; padded."""
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5  # (B, H, N, N)
    if (mask := _mask(i)) is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    probabilities = torch.softmax(scores, -1)
    out = probabilities @ v
    norms = out.norm(dim=-1)  # (B, H, N)
    summary_attention = (probabilities[:, :, 0] * norms / norms.sum(1, keepdim=True)).sum(1)
    observed = probabilities.amax(1)[:, 1:]
    if mask is not None:
        observed = observed * i.real[:, 1:, None]
    return out, summary_attention, observed.sum(1)


def eager(i: AttentionInputs):
    return lambda: eager_statistics(i, *i.padded)


def check(i: AttentionInputs, result, provider: str) -> None:
    wide = (x.double() for x in (i.q, i.k, i.v))
    longest = i.real.shape[1]
    out, stats = mk.varlen_attention(*wide, i.cu_seqlens, max_seqlen_q=longest, return_stats=True, backend="reference")
    tolerance = 1e-4 if i.q.dtype == torch.float32 else 5e-2
    for got, want in zip(result, (out, *stats), strict=False):
        got = got if got.shape == want.shape else rows(i, got)
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


def least_bytes(case, i: AttentionInputs) -> int:
    return 4 * i.q.nbytes + 2 * 4 * i.q.shape[0]


def flops(case, i: AttentionInputs) -> int:
    return 4 * int(i.lengths.square().sum()) * i.q.shape[1] * i.q.shape[2]


# --- cross-attention


class CrossInputs(NamedTuple):
    q: Tensor  # (B, N, H, D)
    k: Tensor  # (B, M, H, D)
    v: Tensor
    cu_seqlens: tuple[Tensor, Tensor]  # of the queries, of the keys


def cross_inputs(case, device, seed) -> CrossInputs:
    generator = torch.Generator().manual_seed(seed)
    heads = (case["heads"], case["head_dim"])
    sizes = (case["queries"], case["tokens"], case["tokens"])
    tensors = [torch.randn(case["batch"], size, *heads, generator=generator) for size in sizes]
    tensors = [x.to(device, getattr(torch, case["dtype"])) for x in tensors]
    batch = torch.arange(case["batch"] + 1, dtype=torch.int32, device=device)
    return CrossInputs(*tensors, (batch * case["queries"], batch * case["tokens"]))


def cross_ours(backend: str):
    def prepare(i: CrossInputs):
        arguments = (*(x.flatten(0, 1) for x in i[:3]), *i.cu_seqlens)
        options = {"max_seqlen_q": i.q.shape[1], "max_seqlen_k": i.k.shape[1], "backend": backend}
        require("varlen_attention", *arguments, **options)
        return lambda: mk.varlen_attention(*arguments, **options).view(i.q.shape)

    return prepare


def cross_sdpa(i: CrossInputs):
    q, k, v = (x.transpose(1, 2) for x in i[:3])
    return lambda: F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def cross_eager(i: CrossInputs):
    q, k, v = (x.transpose(1, 2) for x in i[:3])
    return lambda: (torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, -1) @ v).transpose(1, 2)


def check_cross(i: CrossInputs, result, provider: str) -> None:
    q, k, v = (x.double().transpose(1, 2) for x in i[:3])
    want = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    tolerance = 1e-4 if i.q.dtype == torch.float32 else 5e-2
    torch.testing.assert_close(result.double(), want, rtol=tolerance, atol=tolerance)


def self_attention(name: str, summary: str, cases, **options) -> Entry:
    return Entry(
        name=name,
        summary=summary,
        cases=cases,
        inputs=attention_inputs,
        providers={
            "torch SDPA": sdpa,
            "torch FlexAttention": flex_attention,
            "torch eager with statistics": eager,
            "madtp cpu": ours("cpu", return_stats=False),
            "madtp cpu with statistics": ours("cpu", return_stats=True),
            "madtp triton": ours("triton", return_stats=False),
            "madtp triton with statistics": ours("triton", return_stats=True),
        },
        baseline="torch SDPA",
        gate=check,
        bytes=least_bytes,
        flops=flops,
        **options,
    )


ENTRIES = (
    self_attention(
        "attention",
        "attention of ragged sequences, with the importance statistics of every token where it says so",
        CASES,
        gpu_cases=GPU_CASES,
    ),
    self_attention(
        "attention_ragged",
        "the same on sequences of different lengths; torch's are padded",
        RAGGED,
        gpu_cases=in_bfloat16(RAGGED),
    ),
    self_attention(
        "attention_length",
        "the same against the number of tokens",
        LENGTHS,
        against="tokens",
        gpu_cases=in_bfloat16(LENGTHS),
    ),
    Entry(
        name="attention_cross",
        summary="a few queries of text on the tokens of an image",
        cases=CROSS,
        gpu_cases=in_bfloat16(CROSS),
        inputs=cross_inputs,
        providers={
            "torch SDPA": cross_sdpa,
            "torch eager": cross_eager,
            "madtp cpu": cross_ours("cpu"),
            "madtp triton": cross_ours("triton"),
        },
        baseline="torch SDPA",
        gate=check_cross,
        bytes=lambda case, i: 2 * i.q.nbytes + 2 * i.k.nbytes,
        flops=lambda case, i: 4 * i.q.numel() * i.k.shape[1],
    ),
)
