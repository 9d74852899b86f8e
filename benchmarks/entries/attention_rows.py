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
    {"decoder": decoder, "rows": rows, "dtype": dtype}
    for dtype in ("float32", "bfloat16")
    for decoder in SHAPES
    for rows in (1, 40)
]


class RowsInputs(NamedTuple):
    q: Tensor  # (H, R, D), the last R tokens of one prompt, as attention has them
    k: Tensor  # (Hk, N, D), as a cache has them
    position: Tensor  # (R,)
    cu_seqlens: tuple[Tensor, Tensor]  # of the rows, of the keys


def rows_inputs(case, device, seed) -> RowsInputs:
    generator = torch.Generator().manual_seed(seed)
    heads, key_heads, head_dim, tokens = SHAPES[case["decoder"]]
    q = torch.randn(heads, case["rows"], head_dim, generator=generator)
    k = torch.randn(key_heads, tokens, head_dim, generator=generator)
    ends = (torch.tensor([0, n], dtype=torch.int32, device=device) for n in (case["rows"], tokens))
    position = torch.arange(tokens - case["rows"], tokens, dtype=torch.int32, device=device)
    dtype = getattr(torch, case["dtype"])
    return RowsInputs(q.to(device, dtype), k.to(device, dtype), position, tuple(ends))


def arguments(i: RowsInputs) -> tuple[Tensor, ...]:
    return i.q.transpose(0, 1), i.k.transpose(0, 1), *i.cu_seqlens, i.position


def ours(backend: str):
    def prepare(i: RowsInputs):
        if backend == "triton" and i.q.device.type == "cpu":
            raise Unavailable("on a CPU Triton is interpreted, which says nothing of its speed")
        require("attention_rows", *arguments(i), backend=backend)
        return lambda: mk.attention_rows(*arguments(i), backend=backend)

    return prepare


def in_torch(i: RowsInputs, dtype: torch.dtype):
    """Heads that share keys side by side in one product, in `dtype`, then the softmax in float32."""
    (heads, rows, head_dim), (key_heads, tokens, _) = i.q.shape, i.k.shape

    def run():
        q = i.q.reshape(key_heads, -1, head_dim)
        scores = (q.to(dtype) @ i.k.to(dtype).mT).float().view(heads, rows, tokens) * head_dim**-0.5
        hidden = torch.arange(tokens, device=q.device) > i.position[:, None]
        return scores.masked_fill(hidden, -torch.inf).softmax(-1).mean((0, 1))

    return run


def check(i: RowsInputs, result, provider: str) -> None:
    q, k, *others = arguments(i)
    want = mk.attention_rows(q.double(), k.double(), *others, backend="reference")
    tolerance = 1e-4 if i.q.dtype == torch.float32 else 5e-2
    assert (result - want).abs().max() <= tolerance * want.max(), f"wrong by {(result - want).abs().max():.1e}"


ENTRIES = (
    Entry(
        name="attention_rows",
        summary="what the last tokens of a prompt attend to, mean over heads and rows: FastV's importance",
        cases=CASES,
        gpu_cases=[case for case in CASES if case["dtype"] == "bfloat16"],
        inputs=rows_inputs,
        providers={
            "torch": lambda i: in_torch(i, i.q.dtype),
            "torch in float32": lambda i: in_torch(i, torch.float32),
            "madtp reference": ours("reference"),
            "madtp cpu": ours("cpu"),
            "madtp triton": ours("triton"),
        },
        baseline="torch",
        gate=check,
        bytes=lambda case, i: i.q.nbytes + i.k.nbytes + 4 * i.k.shape[1],
        flops=lambda case, i: 2 * i.q.numel() * i.k.shape[1],
    ),
)
