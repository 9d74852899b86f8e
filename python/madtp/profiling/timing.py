# SPDX-License-Identifier: Apache-2.0
"""Times, compared: medians of rounds in which what is compared takes turns, so that all meet the same machine."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from operator import attrgetter
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from madtp.handles import handle_of
from madtp.inference import evaluating, leading_size

if TYPE_CHECKING:
    from madtp.patching.handle import Handle

ROUNDS = 15
TIMING_BATCH = 32  # samples
Name = TypeVar("Name", bound=Hashable)
Result = TypeVar("Result")
LayerSeconds = defaultdict[tuple[str, int], float]  # by branch and layer


def now(device: torch.device) -> float:
    """Seconds on a clock, read when the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Of one call, until the device is done with it."""
    start = now(device)
    run()
    return now(device) - start


def take_turns(runs: Mapping[Name, Callable[[], Result]], rounds: int) -> dict[Name, list[Result]]:
    """What each call returns in every round, by name: they take turns, and a first round does not count."""
    found: dict[Name, list[Result]] = {name: [] for name in runs}
    for round_number in range(rounds + 1):
        for name, run in runs.items():
            result = run()
            if round_number:
                found[name].append(result)
    return found


def medians(
    runs: Mapping[Name, Callable[[], object]], device: torch.device, *, rounds: int = ROUNDS
) -> dict[Name, float]:
    """Seconds of each call, by name: medians of the rounds of `take_turns`."""
    timed = {name: lambda run=run: seconds(run, device) for name, run in runs.items()}
    return {name: statistics.median(values) for name, values in take_turns(timed, rounds).items()}


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


def time_per_layer(
    dense: nn.Module, patched: nn.Module, batch: Mapping[str, Tensor], *, rounds: int = ROUNDS
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Milliseconds per sample of every block of the towers that prune, by branch: of a plain and of a patched model.

    Medians of the rounds of `take_turns`. On a GPU the clock waits for every block, so that their sum is more than the
    forward takes without.
    """
    device, handle = next(iter(batch.values())).device, handle_of(patched)

    def lap(model: nn.Module) -> LayerSeconds:
        spent: LayerSeconds = defaultdict(float)
        with _timed_blocks(model, handle, device, spent):
            model(**batch)
        return spent

    runs = {"dense": lambda: lap(dense), "patched": lambda: lap(patched)}
    with evaluating(dense), evaluating(patched):
        laps = take_turns(runs, rounds)
    return _layer_medians(laps["dense"], leading_size(batch)), _layer_medians(laps["patched"], leading_size(batch))


def _layer_medians(laps: Sequence[LayerSeconds], samples: int) -> dict[str, list[float]]:
    """Milliseconds per sample by branch, of the seconds of each round."""
    found: dict[str, list[float]] = {}
    for branch, layer in sorted(laps[0]):
        value = statistics.median(spent[branch, layer] for spent in laps)
        found.setdefault(branch, []).append(1e3 * value / samples)
    return found


@contextmanager
def _timed_blocks(model: nn.Module, handle: Handle, device: torch.device, spent: LayerSeconds) -> Iterator[None]:
    """A context in which the blocks of a model add their seconds to `spent`; the handle knows where they are."""
    hooks, started = [], {}
    for branch in handle.pruning:
        blocks = attrgetter(handle.tower(branch).madtp_spec.encoder.blocks)
        for number, block in enumerate(blocks(model.get_submodule(handle.family.path(branch)))):

            def start(*_, key=(branch, number)):
                started[key] = now(device)

            def stop(*_, key=(branch, number)):
                spent[key] += now(device) - started[key]

            hooks += [block.register_forward_pre_hook(start), block.register_forward_hook(stop)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
