"""Random 2:4 weights for the kernel tests."""

import torch

from madtp_kernels.ops.sparse24 import sparse24_pack
from madtp_kernels.reference.sparse24 import sparse24_compress


class Weight:
    """What `sparse24_linear` asks of a weight."""

    def __init__(self, dense: torch.Tensor):
        self.values, self.indices = sparse24_compress(dense)
        self.shape, self.dtype, self.device = tuple(dense.shape), dense.dtype, dense.device
        self._layouts: dict[str, torch.Tensor] = {}

    def layout(self, backend: str) -> torch.Tensor:
        if backend not in self._layouts:
            self._layouts[backend] = sparse24_pack(self.values, self.indices)
        return self._layouts[backend]

    def to(self, dtype: torch.dtype) -> "Weight":
        other = Weight(torch.zeros(self.shape, dtype=dtype))
        other.values, other.indices = self.values.to(dtype), self.indices
        return other


def dense24(features: int, channels: int, seed: int = 0) -> torch.Tensor:
    """(N, C) float32 with 0, 1 or 2 non-zeros in every group of 4."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(features, channels, generator=generator)
    groups = weight.view(features, -1, 4)
    order = torch.rand(groups.shape, generator=generator).argsort(-1)
    groups[order >= 2] = 0
    return weight * (torch.rand(weight.shape, generator=generator) > 0.1)
