# SPDX-License-Identifier: Apache-2.0
"""Calls ops and patched models from several threads for minutes: memory stays flat and results keep their bits.

python tests/soak.py --minutes 30, or make soak MINUTES=30. Linux: it reads /proc.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import madtp_kernels as mk

MAX_GROWTH = 1.0  # MiB a minute after the warm-up: noise of the allocator is below, a small tensor lost per round above
WARM_UP = 0.3  # of the time: until then caches fill, and the allocator finds its size
Work = Callable[[], tuple[Tensor, ...]]


def of_ops() -> dict[str, Work]:
    """A call of every kind of op, with gradients where there are any; weights are made and packed in each."""
    lengths = torch.tensor([0, 37, 37, 120, 121], dtype=torch.int32)
    q, x = torch.randn(121, 4, 32), torch.randn(121, 96)
    k, v = torch.randn(2, 121, 2, 32)
    logits, dense, norm = torch.randn(121, 7), torch.randn(64, 96), torch.ones(96)
    rows = torch.tensor([0, 1, 1, 3, 4], dtype=torch.int32)

    def attention() -> tuple[Tensor, ...]:
        inputs = [t.clone().requires_grad_() for t in (q, k, v)]
        options = {"max_seqlen_q": 83, "causal": True, "window_size": (20, -1), "softcap": 8.0}
        out, stats = mk.varlen_attention(*inputs, lengths, **options, return_stats=True)
        grads = torch.autograd.grad(out.square().sum() + stats.received_attention.sum(), inputs)
        return out.detach(), *(s.detach() for s in stats), *grads

    def chosen_rows() -> tuple[Tensor, ...]:
        return (mk.attention_rows(q[:4], k, rows, lengths),)

    def step() -> tuple[Tensor, ...]:
        stats = mk.varlen_attention(q, k, v, lengths, max_seqlen_q=83, return_stats=True)[1]
        tokens = x.clone().requires_grad_()
        pruned = mk.prune_tokens(tokens, stats, logits, lengths, temperature=2.0, norm=(norm, norm, 1e-5))
        scaled = mk.prune_tokens(x, stats, logits, lengths, temperature=2.0, norm=(norm, 1e-6)).normed
        return pruned.x.detach(), scaled, *torch.autograd.grad(pruned.normed.square().sum(), [tokens])

    def linear() -> tuple[Tensor, ...]:
        sparse = mk.sparse24_prune(dense)
        whole, half = mk.quantize(dense, "int8"), mk.quantize(sparse)
        return (
            mk.sparse24_linear(x, sparse, activation="gelu", backend="cpu"),
            mk.quantized_linear(x, whole, activation="gelu", backend="cpu"),
            mk.quantized_linear(x, half, backend="cpu"),
        )

    def files() -> tuple[Tensor, ...]:
        with tempfile.TemporaryDirectory() as folder:
            mk.save_sparse24(f"{folder}/w.safetensors", {"layer": mk.sparse24_prune(dense)})
            return (mk.load_sparse24(f"{folder}/w.safetensors")["layer"].to_dense(),)

    return {work.__name__: work for work in (attention, chosen_rows, step, linear, files)}


def of_models() -> dict[str, Work]:
    """Forwards of patched models that prune."""
    sys.path.insert(0, str(Path(__file__).parent / "madtp"))
    from families import CASES, outputs, patched

    def forward(family: str) -> Work:
        model, inputs = patched(family), CASES[family].inputs()
        return lambda: tuple(outputs(family, model, inputs).values())

    return {family: forward(family) for family in ("CLIPModel", "BertForSequenceClassification")}


def same_bits(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    return len(found) == len(expected) and all(map(torch.equal, found, expected))


def resident() -> float:
    """MiB that the process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def growth(samples: list[tuple[float, float]]) -> float:
    """MiB a minute, from (seconds, MiB): the median of the last third after the warm-up less that of the first."""
    end = samples[-1][0]
    steady = [sample for sample in samples if sample[0] >= WARM_UP * end]
    third = max(len(steady) // 3, 1)
    (early, low), (late, high) = (
        [statistics.median(column) for column in zip(*part, strict=True)] for part in (steady[:third], steady[-third:])
    )
    return 60 * (high - low) / (late - early) if late > early else 0.0


def soak(works: dict[str, Work], seconds: float, threads: int) -> tuple[dict[str, int], list[tuple[float, float]]]:
    """Runs the works in random order in each thread -> how often each ran, and (seconds, MiB) as time went by.

    Raises AssertionError for a result of other bits than the first of its work, and what a work raises.
    """
    expected = {name: work() for name, work in works.items()}
    counts, errors, stop = dict.fromkeys(works, 0), [], threading.Event()
    lock = threading.Lock()

    def loop(seed: int) -> None:
        order = random.Random(seed)
        try:
            while not stop.is_set():
                name = order.choice(list(works))
                if not same_bits(works[name](), expected[name]):
                    raise AssertionError(f"{name} has other bits than at first, after {sum(counts.values())} calls")
                with lock:
                    counts[name] += 1
        except BaseException as error:
            errors.append(error)
            stop.set()

    workers = [threading.Thread(target=loop, args=(seed,)) for seed in range(threads)]
    begin, samples = time.monotonic(), []
    for worker in workers:
        worker.start()
    while (now := time.monotonic() - begin) < seconds and not stop.wait(min(1.0, seconds / 20)):
        samples.append((now, resident()))
    stop.set()
    for worker in workers:
        worker.join()
    if errors:
        raise errors[0]
    return counts, [*samples, (time.monotonic() - begin, resident())]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--threads", type=int, default=4)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    counts, samples = soak(of_ops() | of_models(), 60 * options.minutes, options.threads)
    grew = growth(samples)
    print(f"{sum(counts.values())} calls in {options.threads} threads, all of the bits of the first: {counts}")
    print(f"{samples[0][1]:.1f} MiB at first, {samples[-1][1]:.1f} at the end")
    print(f"{grew:+.3f} MiB a minute after the warm-up, at most {MAX_GROWTH} allowed")
    return int(grew > MAX_GROWTH)


if __name__ == "__main__":
    raise SystemExit(main())
