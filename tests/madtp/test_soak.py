# SPDX-License-Identifier: Apache-2.0
"""What `make soak` calls a leak, and what it does when a bit changes."""

import importlib.util
import itertools
from pathlib import Path

import pytest
import torch

spec = importlib.util.spec_from_file_location("soak", Path(__file__).parents[1] / "soak.py")
soak = importlib.util.module_from_spec(spec)
spec.loader.exec_module(soak)


def test_growth_is_that_after_the_warm_up():
    flat = [(float(t), 500.0 if t < 100 else 600.0 + t % 3) for t in range(600)]
    assert abs(soak.growth(flat)) < soak.MAX_GROWTH
    leaking = [(float(t), 500 + t / 30) for t in range(600)]
    assert 1.9 < soak.growth(leaking) < 2.1 and soak.MAX_GROWTH < 1.9


def test_a_call_of_everything_keeps_its_bits():
    counts, samples = soak.soak(soak.of_ops(), 0.3, threads=2)
    assert sum(counts.values()) > 0 and samples[-1][1] > 0


def test_another_bit_and_an_error_end_it():
    calls = itertools.count()
    with pytest.raises(AssertionError, match="changing has other bits than at first"):
        soak.soak({"changing": lambda: (torch.tensor(next(calls)),)}, 30, threads=2)
    with pytest.raises(ZeroDivisionError):
        soak.soak({"failing": lambda: (torch.tensor(1 // (next(calls) < 5)),)}, 30, threads=1)
