# SPDX-License-Identifier: Apache-2.0
"""Where the time of a call goes: its operations, by kind."""

from __future__ import annotations

from collections import Counter

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.entry import Thunk

KINDS = {  # of the names of operations, the first that fits
    "linear layers": ("addmm", "::mm", "sparse24_linear", "::linear", "convolution"),
    "attention": ("varlen_attention", "scaled_dot_product", "bmm", "softmax"),
    "pruning": ("score_and_select", "select_tokens", "token_importance", "gather_merge"),
    "LayerNorm": ("layer_norm",),
    "activation": ("gelu", "sigmoid"),
}
OTHER = "other"


def kind_of(name: str) -> str:
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), OTHER)


def shares(function: Thunk, device: torch.device) -> dict[str, float]:
    """Kind of operation -> its share of the time that the operations of a call take. Python is not in it."""
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=activities[: 1 if device.type == "cpu" else 2]) as profiler:
        function()
    times: Counter[str] = Counter()
    for event in profiler.key_averages():
        own = event.self_cpu_time_total if device.type == "cpu" else event.self_device_time_total
        times[kind_of(event.key)] += own
    total = max(sum(times.values()), 1e-9)
    return {kind: times[kind] / total for kind in (*KINDS, OTHER)}
