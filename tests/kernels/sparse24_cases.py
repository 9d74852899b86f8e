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


def epilogue(
    rows: int, out_features: int, dtype: torch.dtype = torch.float32, affine: torch.dtype | None = None, seed: int = 1
) -> dict[str, torch.Tensor]:
    """bias, residual and scale by name; affine: the dtype of bias and scale, else as the residual's."""
    generator = torch.Generator().manual_seed(seed)
    bias, scale = torch.randn(2, out_features, generator=generator).to(affine or dtype)
    residual = torch.randn(rows, out_features, generator=generator).to(dtype)
    return {"bias": bias, "residual": residual, "scale": scale}
