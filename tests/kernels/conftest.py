# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the kernel tests."""

import math

import pytest
import torch

GUARD = 64  # elements on either side of an output, which keep its alignment


@pytest.fixture
def guarded_outputs(monkeypatch):
    """torch.empty hands out poison between guards: what is not written shows, and so does a write past the end."""
    torch.manual_seed(0)
    empty, guards = torch.empty, []

    def poisoned(*shape, dtype=torch.float32, device=None, **rest):
        shape = torch.Size(shape[0] if shape and not isinstance(shape[0], int) else shape)
        if device is None or torch.device(device).type == "meta" or rest:
            return empty(shape, dtype=dtype, device=device, **rest)
        buffer = empty(shape.numel() + 2 * GUARD, dtype=dtype, device=device)
        buffer.view(torch.uint8).fill_(0x7F)
        if dtype.is_floating_point:
            buffer.fill_(math.nan)
        guards.append(
            (buffer.view(torch.uint8), buffer.view(torch.uint8).clone(), shape.numel() * buffer.element_size())
        )
        return buffer[GUARD : GUARD + shape.numel()].view(shape)

    monkeypatch.setattr(torch, "empty", poisoned)
    yield
    for now, before, size in guards:
        edge = (now.numel() - size) // 2
        assert torch.equal(now[:edge], before[:edge]) and torch.equal(now[edge + size :], before[edge + size :])
