"""Times, compared: medians of rounds in which what is compared takes turns, so that all meet the same machine."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping
from contextlib import ExitStack
from typing import TypeVar

import torch
from torch import Tensor, nn

from madtp.accounting import evaluating, leading_size

ROUNDS = 15
Name = TypeVar("Name", bound=Hashable)


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Of one call, until the device is done with it."""
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def medians(
    runs: Mapping[Name, Callable[[], object]], device: torch.device, *, rounds: int = ROUNDS
) -> dict[Name, float]:
    """Seconds of each call, by name: medians of rounds in which they take turns, after one that does not count."""
    taken = defaultdict(list)
    for round_number in range(rounds + 1):
        for name, run in runs.items():
            spent = seconds(run, device)
            if round_number:
                taken[name].append(spent)
    return {name: statistics.median(values) for name, values in taken.items()}


def time_per_sample(
    models: Mapping[str, nn.Module], batch: Mapping[str, Tensor], *, rounds: int = ROUNDS
) -> dict[str, float]:
    """Milliseconds per sample of a forward pass in eval mode, by name; all models are where the batch is."""
    device = next(iter(batch.values())).device
    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(evaluating(model))
        runs = {name: lambda model=model: model(**batch) for name, model in models.items()}
        found = medians(runs, device, rounds=rounds)
    return {name: 1e3 * value / leading_size(batch) for name, value in found.items()}
