# SPDX-License-Identifier: Apache-2.0
"""A packed layer with a 2:4 weight of floating point."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from madtp.hwp.packed_linear import PackedLinear
from madtp.migration import PACKED_NAMES
from madtp_kernels import Sparse24Weight, sparse24_linear


class Sparse24Linear(PackedLinear):
    """A Linear with a 2:4 weight, and what follows it, in one kernel: residual + scale * activation(x W^T + bias).

    `weight` (N, C/2), the kept values, and `indices` (N, C/8) are buffers, in the canonical form of `Sparse24Weight`;
    N is out_features, C in_features. The values have the name of a Linear's weight, so that whoever takes a file for
    one of plain Linears stops at their shape. Gradients pass through to x, residual, bias and scale; the weight has
    none.

    Args:
        weight: (N, C).
        bias: (N,), or None.
        activation: of `sparse24_linear`.
        scale: (N,), or None: LayerScale.
    """

    _op_name = "sparse24_linear"
    _op = staticmethod(sparse24_linear)
    scheme = "sparse24"

    indices: Tensor
    _weight: Sparse24Weight

    def __init__(
        self,
        weight: Sparse24Weight,
        bias: nn.Parameter | None = None,
        activation: str | None = None,
        scale: nn.Parameter | None = None,
    ):
        super().__init__(bias, activation, scale)
        self.register_buffer("weight", weight.values)
        self.register_buffer("indices", weight.indices)
        self._weight = weight

    @property
    def sparse_weight(self) -> Sparse24Weight:
        weight, buffers = self._weight, self._buffers
        if weight.values is not buffers["weight"] or weight.indices is not buffers["indices"]:  # moved, or cast
            weight = self._weight = Sparse24Weight(self.weight, self.indices)
        return weight

    packed_weight = sparse_weight

    @property
    def dense_dtype(self) -> torch.dtype:  # type: ignore[override]  # as its values are
        return self.weight.dtype

    def check_weight(self, prefix: str = "") -> None:
        self.sparse_weight.check_indices(f"{prefix}indices")

    def _check_state(self, state_dict: dict[str, Any], prefix: str) -> None:
        for old, new in PACKED_NAMES.items():
            if prefix + old in state_dict and prefix + new not in state_dict:
                state_dict[prefix + new] = state_dict.pop(prefix + old)
        values: Any = state_dict.get(prefix + "weight")
        indices = state_dict.get(prefix + "indices")
        if isinstance(indices, Tensor) and not indices.is_meta and getattr(values, "shape", None) == self.weight.shape:
            Sparse24Weight(values, indices).check_indices(f"{prefix}indices")
