# SPDX-License-Identifier: Apache-2.0
"""What a benchmark is: inputs, providers that do the same work, a gate that checks they do, and what the work costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

import madtp_kernels as mk

Case = Mapping[str, Any]  # shape and knobs of one row of the table, JSON-serialisable
Thunk = Callable[[], Any]

GIVE_UP = 5  # times `Entry.seconds`


class Unavailable(Exception):
    """A provider that cannot run here; the message says why and goes into the results."""


@dataclass(frozen=True)
class Entry:
    """One benchmark.

    Args:
        name: of the results file.
        summary: what is compared, for the table.
        cases: the rows.
        inputs: (case, device, seed) -> the inputs of one call. Several sets are drawn, so that no cache answers.
        providers: name -> (inputs) -> a function without arguments that does the work and returns its result; raises
            `Unavailable` where it cannot. Ours are named after their backend, "madtp cpu".
        baseline: the provider ratios are against: what a user would otherwise run.
        gate: (inputs, result of a provider, its name); raises AssertionError when the result is wrong.
        bytes: (case, inputs) -> bytes that must be read and written at least.
        flops: (case, inputs) -> floating-point operations, 0 where none matter.
        against: the key of the cases to plot time and memory against, if they differ in one number.
        grid: the provider whose speed-up is shown as a heat map, the first key of the cases across and the others down.
        parts: show also what share of its time each provider spends on which kind of operation.
        means: keys of the cases over which the document shows geometric means, instead of a table for each case.
        sets: how many inputs are drawn of a case.
        rounds: how many turns each provider takes.
        seconds: that a provider may take for its turns in a case, but for the first 3 of them. One whose checked call
            takes longer has no turns, and that call is its row; one that takes `GIVE_UP` times as long is not called in
            the cases that come after, so cases with more work come last.
        packages: that providers may need beside ours, whose versions go into the results.
        memory: measure what a call holds, which is seen of torch alone.
        gpu_cases: the rows on a GPU where other ones matter there; none where no provider runs on one.
    """

    name: str
    summary: str
    cases: Sequence[Case]
    inputs: Callable[[Case, torch.device, int], Any]
    providers: Mapping[str, Callable[[Any], Thunk]]
    baseline: str
    gate: Callable[[Any, Any, str], None]
    bytes: Callable[[Case, Any], int]
    flops: Callable[[Case, Any], int] = lambda case, inputs: 0
    against: str | None = None
    grid: str | None = None
    parts: bool = False
    means: Sequence[str] = ()
    sets: int = 3
    rounds: int = 15
    seconds: float = math.inf
    packages: Sequence[str] = ()
    memory: bool = True
    gpu_cases: Sequence[Case] | None = None

    def cases_on(self, device: torch.device) -> Sequence[Case]:
        return self.cases if device.type == "cpu" or self.gpu_cases is None else self.gpu_cases

    def __post_init__(self):
        if self.baseline not in self.providers:
            raise ValueError(f"baseline must be one of {list(self.providers)}, got {self.baseline!r}")


def require(op: str, *args, **kwargs) -> None:
    """Raises `Unavailable` where the backend asked for cannot run this call of an op of ours."""
    try:
        choice = mk.explain(op, *args, **kwargs)
    except RuntimeError as error:
        raise Unavailable(str(error)) from None
    if choice.backend == "triton" and args[0].device.type == "cpu" and args[0].dtype == torch.bfloat16:
        raise Unavailable("triton's interpreter computes bfloat16 wrongly")


def runnable(
    entry: Entry, inputs: Any, given_up: Mapping[str, str] = MappingProxyType({})
) -> Iterator[tuple[str, Thunk | Exception]]:
    """Each provider's name with its function, with the reason why it has none here, or with what went wrong.

    given_up: name of a provider -> why it is not asked.
    """
    for name, prepare in entry.providers.items():
        try:
            yield name, Unavailable(given_up[name]) if name in given_up else prepare(inputs)
        except Exception as error:  # of a library, whose other versions may do other things
            yield name, error
