# SPDX-License-Identifier: Apache-2.0
"""The same entries for pytest-benchmark: python -m pytest benchmarks [-k ENTRY] [--benchmark-autosave]."""

import pytest
import torch

from benchmarks.entry import Unavailable
from benchmarks.registry import entries

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RUNS = [
    pytest.param(
        entry, case, provider, id="-".join([name, *(f"{v}" for v in case.values()), provider.replace(" ", "_")])
    )
    for name, entry in entries().items()
    for case in entry.cases_on(DEVICE)
    for provider in entry.providers
]


@pytest.mark.parametrize(("entry", "case", "provider"), RUNS)
def test_entry(benchmark, entry, case, provider):
    inputs = entry.inputs(case, DEVICE, 0)
    try:
        function = entry.providers[provider](inputs)
    except Unavailable as reason:
        pytest.skip(str(reason))
    entry.gate(inputs, function(), provider)

    def finished():
        function()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{entry.name} {dict(case)}"
    benchmark(finished)
