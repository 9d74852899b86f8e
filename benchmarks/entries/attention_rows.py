# SPDX-License-Identifier: Apache-2.0
"""What a few rows of text attend to among the tokens of a prompt, in the shapes of decoders that read images."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import madtp_kernels as mk
from benchmarks.entry import Entry, Unavailable, require

SHAPES = {  # heads, key_heads, head_dim, tokens of a prompt with an image
    "SmolVLM2-256M": (9, 3, 64, 931),
    "Qwen2-VL-2B": (12, 2, 128, 1059),
    "LLaVA-1.5-7B": (32, 32, 128, 636),
    "PaliGemma-3B": (8, 1, 256, 296),
}
CASES = [
    {"decoder": decoder, "batch": 2, "rows": rows, "dtype": dtype}
    for dtype in ("float32", "bfloat16")
    for decoder in SHAPES
    for rows in (1, 40)
]


class RowsInputs(NamedTuple):
    q: Tensor  # (B, R, H, D), the last R tokens
    k: Tensor  # (B, N, Hk, D)
    position: Tensor  # (R,)
    cu_seqlens: tuple[Tensor, Tensor]  # of the rows, of the keys


def rows_inputs(case, device, seed) -> RowsInputs:
    generator = torch.Generator().manual_seed(seed)
    heads, key_heads, head_dim, tokens = SHAPES[case["decoder"]]
    batch, rows = case["batch"], case["rows"]
    q = torch.randn(batch, rows, heads, head_dim, generator=generator)
    k = torch.randn(batch, tokens, key_heads, head_dim, generator=generator)
    ends = torch.arange(batch + 1, dtype=torch.int32, device=device)
    position = torch.arange(tokens - rows, tokens, dtype=torch.int32, device=device)
    dtype = getattr(torch, case["dtype"])
    return RowsInputs(q.to(device, dtype), k.to(device, dtype), position, (ends * rows, ends * tokens))


def ours(backend: str):
    def prepare(i: RowsInputs):
        arguments = i.q.flatten(0, 1), i.k.flatten(0, 1), *i.cu_seqlens, i.position.repeat(i.q.shape[0])
        if backend == "triton" and i.q.device.type == "cpu":
            raise Unavailable("on a CPU Triton is interpreted, which says nothing of its speed")
        require("attention_rows", *arguments, backend=backend)
        return lambda: mk.attention_rows(*arguments, backend=backend)

    return prepare


def in_torch(i: RowsInputs, dtype: torch.dtype | None):
    """Heads that share keys side by side in one product, then the softmax in float32; the product in `dtype`."""
    batch, rows, heads, head_dim = i.q.shape
    key_heads, tokens = i.k.shape[2], i.k.shape[1]

    def run():
        q = i.q.view(batch, rows, key_heads, -1, head_dim).permute(0, 2, 3, 1, 4).flatten(2, 3)
        q, k = (x if dtype is None else x.to(dtype) for x in (q, i.k.permute(0, 2, 3, 1)))
        scores = ((q @ k).float() * head_dim**-0.5).view(batch, heads, rows, tokens)
        hidden = torch.arange(tokens, device=q.device) > i.position[:, None]
        return scores.masked_fill(hidden, -torch.inf).softmax(-1).mean((1, 2)).flatten()

    return run


def check(i: RowsInputs, result, provider: str) -> None:
    q, k = (x.flatten(0, 1).double() for x in (i.q, i.k))
    want = mk.attention_rows(q, k, *i.cu_seqlens, i.position.repeat(i.q.shape[0]), backend="reference")
    tolerance = 1e-4 if i.q.dtype == torch.float32 else 5e-2
    assert (result - want).abs().max() <= tolerance * want.max(), f"wrong by {(result - want).abs().max():.1e}"


ENTRIES = (
    Entry(
        name="attention_rows",
        summary="what the last tokens of a prompt attend to, mean over heads and rows: FastV's importance",
        cases=CASES,
        inputs=rows_inputs,
        providers={
            "torch": lambda i: in_torch(i, None),
            "torch in float32": lambda i: in_torch(i, torch.float32),
            "madtp reference": ours("reference"),
            "madtp cpu": ours("cpu"),
            "madtp triton": ours("triton"),
        },
        baseline="torch",
        gate=check,
        bytes=lambda case, i: i.q.nbytes + i.k.nbytes + 4 * i.k.shape[0] * i.k.shape[1],
        flops=lambda case, i: 2 * i.q.numel() * i.k.shape[1],
    ),
)
