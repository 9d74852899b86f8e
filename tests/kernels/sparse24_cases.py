# SPDX-License-Identifier: Apache-2.0
"""Random 2:4 weights for the kernel tests."""

import torch


def dense24(out_features: int, in_features: int, seed: int = 0) -> torch.Tensor:
    """(N, C) float32 with 0, 1 or 2 non-zeros in every group of 4."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator)
    groups = weight.view(out_features, -1, 4)
    order = torch.rand(groups.shape, generator=generator).argsort(-1)
    groups[order >= 2] = 0
    return weight * (torch.rand(weight.shape, generator=generator) > 0.1)
