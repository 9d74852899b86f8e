# SPDX-License-Identifier: Apache-2.0
"""The prune step: statistics of attention -> importance, threshold, selection -> gather and merge (-> LayerNorm)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import madtp_kernels as mk
from benchmarks.entry import Entry, Unavailable, require

EPS = 1e-5


class PruneInputs(NamedTuple):
    x: Tensor  # (B * (N + 1), C), a summary token first in each sequence
    stats: mk.AttentionStats  # (B * (N + 1),) each
    mag_logits: Tensor  # (B * (N + 1), K)
    cu_seqlens: Tensor  # (B + 1,)
    temperature: float
    weight: Tensor  # (C,) of the LayerNorm
    bias: Tensor
    batch: int


CASES = [
    {"batch": batch, "tokens": tokens, "channels": channels, "alignment_tokens": 100, "keep": keep, "dtype": dtype}
    for batch, tokens, channels, keep, dtype in (
        (32, 576, 768, 0.5, "float32"),
        (32, 576, 768, 0.7, "float32"),
        (32, 576, 768, 0.3, "float32"),
        (8, 576, 768, 0.5, "float32"),
        (1, 576, 768, 0.5, "float32"),
        (32, 196, 768, 0.5, "float32"),
        (8, 576, 1024, 0.5, "float32"),
        (32, 576, 768, 0.5, "bfloat16"),
    )
]
GPU_CASES = [
    {"batch": batch, "tokens": tokens, "channels": channels, "alignment_tokens": 100, "keep": 0.5, "dtype": "bfloat16"}
    for batch, tokens, channels in ((32, 576, 768), (8, 576, 768), (8, 576, 1024), (32, 196, 768))
]


def prune_inputs(case, device, seed) -> PruneInputs:
    """Statistics that put about `keep` of the tokens above the threshold.

    With standard normal logits and a large temperature every threshold is close to the mean importance.
    `summary_attention` rules it, the other two parts being shares of many tokens: a power of a uniform draw with the
    wanted share above its mean.
    """
    generator = torch.Generator().manual_seed(seed)
    batch, length, keep = case["batch"], case["tokens"] + 1, case["keep"]
    rows = batch * length
    # u^p has mean 1 / (p + 1); P(u^p > mean) = 1 - (p + 1)^(-1/p) = keep.
    low, high = 0.02, 50.0
    for _ in range(60):
        power = (low * high) ** 0.5
        low, high = (power, high) if 1 - (power + 1) ** (-1 / power) > keep else (low, power)
    dtype = getattr(torch, case["dtype"])
    return PruneInputs(
        torch.randn(rows, case["channels"], generator=generator).to(device, dtype),
        mk.AttentionStats(*(torch.rand(rows, generator=generator).pow(p).to(device) for p in (power, 1))),
        torch.randn(rows, case["alignment_tokens"], generator=generator).to(device),
        torch.arange(0, rows + 1, length, dtype=torch.int32, device=device),
        1000.0,
        torch.randn(case["channels"], generator=generator).to(device, dtype),
        torch.randn(case["channels"], generator=generator).to(device, dtype),
        batch,
    )


def ours(backend: str, layernorm: bool):
    def prepare(i: PruneInputs):
        def run():
            pruned = mk.prune_tokens(
                i.x, i.stats, i.mag_logits, i.cu_seqlens, i.temperature, norm=norm, backend=step_backend
            )
            return pruned[:2] if layernorm else pruned.x

        norm = (i.weight, i.bias, EPS) if layernorm else None
        step_backend = "auto" if backend == "cuda" else backend  # CUDA C++ has the gathers only, auto takes them
        if backend == "triton" and i.x.device.type == "cpu":
            raise Unavailable("on a CPU Triton is interpreted, which says nothing of its speed")
        require("gather_merge", i.x, None, backend=backend)
        return run

    return prepare


def torch_importance(stats: mk.AttentionStats, mag_logits: Tensor) -> Tensor:
    """(B, N) of padded (B, N) statistics and (B, N, K) logits, as the peers compute it."""
    guidance = mag_logits.amax(-1).relu()
    shares = (part / part.sum(1, keepdim=True) for part in (stats.received_attention, guidance))
    return (stats.summary_attention + sum(shares)) / 3


def published(layernorm: bool):
    """The sequence of operations of the released MADTP code, in torch: the batch keeps as many tokens as its maximum.

    Threshold from softmaxed logits, one host read; top-k, gather of the kept; a full sort and a gather of the rest; bmm
    to merge them; cat. Padded tensors, as all samples have one length.
    """

    def prepare(i: PruneInputs):
        x, logits = (t.unflatten(0, (i.batch, -1)) for t in (i.x, i.mag_logits))
        stats = mk.AttentionStats(*(t.unflatten(0, (i.batch, -1))[:, 1:] for t in i.stats))

        def run():
            summary, tokens = x[:, :1], x[:, 1:]
            scores, channels = torch_importance(stats, logits[:, 1:]), tokens.shape[-1]
            threshold = ((logits[:, 1:] / i.temperature).softmax(1) * scores[..., None]).sum(1).amin(-1, keepdim=True)
            count = int((scores > threshold).sum(1).max())
            best = scores.topk(count, dim=1, sorted=False).indices
            kept = tokens.gather(1, best[..., None].expand(-1, -1, channels))
            rest = scores.sort(dim=1, descending=True).indices[:, count:]
            pruned = tokens.gather(1, rest[..., None].expand(-1, -1, channels))
            weights = scores.gather(1, rest)
            weights = (weights / weights.sum(1, keepdim=True)).to(x.dtype)
            merged = torch.bmm(weights[:, None], pruned)
            out = torch.cat([summary, kept, merged], dim=1)
            return (out, F.layer_norm(out, (channels,), i.weight, i.bias, EPS)) if layernorm else out

        return run

    return prepare


def masked(layernorm: bool):
    """A ragged version as one would write it in torch today: boolean indexing, index_add for the merged rows."""

    def prepare(i: PruneInputs):
        batch, device = i.batch, i.x.device
        length = i.x.shape[0] // batch
        sequence = torch.arange(i.x.shape[0], device=device) // length
        is_summary = torch.arange(i.x.shape[0], device=device) % length == 0
        stats = mk.AttentionStats(*(t.unflatten(0, (batch, length))[:, 1:] for t in i.stats))

        def run():
            logits = i.mag_logits.unflatten(0, (batch, length))[:, 1:]
            scores = torch_importance(stats, logits)
            threshold = ((logits / i.temperature).softmax(1) * scores[..., None]).sum(1).amin(-1)
            importance = F.pad(scores, (1, 0)).flatten()
            keep = (importance > threshold[sequence]) | is_summary
            weights = importance.masked_fill(keep, 0)
            weights = weights / weights.new_zeros(batch).index_add(0, sequence, weights)[sequence]
            merged = i.x.new_zeros(batch, i.x.shape[1], dtype=torch.float32)
            merged = merged.index_add(0, sequence[~keep], i.x[~keep] * weights[~keep][:, None])
            ends = keep.unflatten(0, (batch, length)).sum(1).cumsum(0) + torch.arange(batch, device=device)
            out = i.x.new_empty(int(keep.sum()) + batch, i.x.shape[1])
            is_merged = torch.zeros(out.shape[0], dtype=torch.bool, device=device).index_fill(0, ends, True)
            out[~is_merged] = i.x[keep]
            out[ends] = merged.to(out.dtype)
            return (out, F.layer_norm(out, (i.x.shape[1],), i.weight, i.bias, EPS)) if layernorm else out

        return run

    return prepare


def copy_of_x(i: PruneInputs):
    """The ceiling: one read and one write of all of x."""
    out = torch.empty_like(i.x)
    return lambda: out.copy_(i.x)


def check(i: PruneInputs, result, provider: str) -> None:
    """Ragged providers against the float64 reference; the published rule keeps another number of tokens."""
    if provider == "copy of x":
        return
    x, weight, bias, logits, *stats = (t.double() for t in (i.x, i.weight, i.bias, i.mag_logits, *i.stats))
    exact = mk.prune_tokens(
        x, mk.AttentionStats(*stats), logits, i.cu_seqlens, i.temperature, norm=(weight, bias, EPS), backend="reference"
    )
    selection, expected = exact.selection, exact[:2]
    results = result if isinstance(result, tuple) else (result,)
    tolerance = 1e-4 if i.x.dtype == torch.float32 else 6e-2
    if provider.startswith("published"):
        counts = selection.cu_seqlens_out.diff()
        assert results[0].shape[1] == counts.max(), f"{results[0].shape[1]} tokens, expected {counts.max()}"
        longest = int(counts.argmax())  # this sample keeps what the ragged rule keeps, in another order
        span = slice(*selection.cu_seqlens_out[longest : longest + 2].tolist())
        # Kept rows are exact copies, so the gathered rows tell the order of both outputs.
        orders = [rows.double().sum(dim=1).argsort() for rows in (results[0][longest], expected[0][span])]
        for got, want in zip(results, expected, strict=False):
            sides = got[longest].double()[orders[0]], want[span][orders[1]]
            torch.testing.assert_close(*sides, rtol=tolerance, atol=tolerance)
        return
    for got, want in zip(results, expected, strict=False):
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


def least_bytes(layernorm: bool):
    def count(case, i: PruneInputs) -> int:
        _, selection = mk.score_and_select(i.stats, i.mag_logits, i.cu_seqlens, i.temperature)
        outputs = (2 if layernorm else 1) * selection.source.numel() * i.x.shape[1] * i.x.element_size()
        return i.x.nbytes + outputs + i.mag_logits.nbytes + sum(part.nbytes for part in i.stats)

    return count


def _entry(name: str, summary: str, layernorm: bool) -> Entry:
    return Entry(
        name=name,
        summary=summary,
        cases=CASES,
        gpu_cases=GPU_CASES,
        inputs=prune_inputs,
        providers={
            "published sequence": published(layernorm),
            "masked torch": masked(layernorm),
            "madtp reference": ours("reference", layernorm),
            "madtp cpu": ours("cpu", layernorm),
            "madtp triton": ours("triton", layernorm),
            "madtp cuda": ours("cuda", layernorm),
            "copy of x": copy_of_x,
        },
        baseline="published sequence",
        gate=check,
        bytes=least_bytes(layernorm),
    )


ENTRIES = (
    _entry("prune_step", "statistics given: importance, threshold, selection, gather and merge", layernorm=False),
    _entry("prune_step_layernorm", "the same and the LayerNorm that follows", layernorm=True),
)
