# SPDX-License-Identifier: Apache-2.0
"""What the examples are made of."""

from typing import NamedTuple

import torch
from ragged_cases import cu_seqlens_of
from sparse24_cases import dense24
from torch import Tensor

import madtp_kernels as mk


class Sizes(NamedTuple):
    """Of a direct call. Any of them may be zero but heads and head_dim."""

    lengths: tuple[int, ...] = (5, 7)
    heads: int = 2
    head_dim: int = 16
    channels: int = 8
    features: tuple[int, int] = (16, 32)  # out, in

    @property
    def rows(self) -> int:
        return sum(self.lengths)

    @property
    def cu_seqlens(self) -> Tensor:
        return cu_seqlens_of(self.lengths)

    @property
    def summary_index(self) -> Tensor:
        return torch.zeros(len(self.lengths), dtype=torch.int32)


# --- arguments of direct calls

OF_A_SELECTION = frozenset({"keep", "source", "cu_seqlens_out"})  # each follows from one of the others


def selection(sizes: Sizes) -> dict[str, Tensor]:
    scores = torch.rand(sizes.rows), 9 * torch.rand(sizes.rows, 3)
    return mk.select_tokens(*scores, sizes.cu_seqlens, 5.0, backend="reference")._asdict()


def weight24(sizes: Sizes) -> mk.Sparse24Weight:
    return mk.sparse24_compress(dense24(*sizes.features) if sizes.features[0] else torch.zeros(sizes.features))


# --- tensors in float64, to differentiate

ROWS = 12
CU_SEQLENS = cu_seqlens_of([5, 7])
_fixed = torch.Generator().manual_seed(0)
LOGITS = torch.randn(ROWS, 3, generator=_fixed, dtype=torch.float64)
STATS = mk.AttentionStats(*torch.randn(2, ROWS, generator=_fixed, dtype=torch.float64).abs())
SELECTION = mk.score_and_select(STATS, LOGITS, CU_SEQLENS, 5.0)[1]


def random64(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)
