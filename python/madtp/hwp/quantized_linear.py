# SPDX-License-Identifier: Apache-2.0
"""A packed layer with an int8 or fp8 weight, dense or 2:4."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from madtp.hwp.packed_linear import PackedLinear
from madtp_kernels import QuantizedWeight, quantized_linear
from madtp_kernels.reference.quantized import FP8

PARTS = ("weight", "weight_indices", "weight_scale")  # of the weight, by name


class QuantizedLinear(PackedLinear):
    """A Linear with an int8 or fp8 weight, and what follows it: residual + scale * activation(x W^T + bias).

    Buffers are `weight`, int8 or float8_e4m3fn (N, C) or, where it is 2:4 as well, (N, C/2); `weight_indices`, uint8
    (N, C/8), which is None where it is not; and `weight_scale`, float32 (N,): the parts of a `QuantizedWeight`. N is
    out_features, C in_features. x is rounded as the weight is, row by row in the op. Gradients pass through to x
    (straight-through), residual, bias and scale; the weight has none.

    What casts the model casts bias and scale; the parts of the weight keep their dtypes.

    Args:
        weight: (N, C).
        bias: (N,), or None.
        activation: of `quantized_linear`.
        scale: (N,), or None: LayerScale.
        dense_dtype: of the weight that this one was, and that `unpack` makes of it; follows what casts the model.
    """

    _op_name = "quantized_linear"
    _op = staticmethod(quantized_linear)

    weight_indices: Tensor | None
    weight_scale: Tensor
    _weight: QuantizedWeight

    def __init__(
        self,
        weight: QuantizedWeight,
        bias: nn.Parameter | None = None,
        activation: str | None = None,
        scale: nn.Parameter | None = None,
        dense_dtype: torch.dtype = torch.float32,
    ):
        super().__init__(bias, activation, scale)
        self.register_buffer("weight", weight.values)
        self.register_buffer("weight_indices", weight.indices)
        self.register_buffer("weight_scale", weight.scale)
        self.scheme, self.dense_dtype = weight.scheme, dense_dtype
        self.keeps_scale = False  # whether the plain Linear had its `weight_scale`, which `unpack` gives back
        self._weight = weight

    @property
    def quantized_weight(self) -> QuantizedWeight:
        weight, buffers = self._weight, self._buffers
        if (
            weight.values is not buffers["weight"]
            or weight.scale is not buffers["weight_scale"]
            or weight.indices is not buffers["weight_indices"]
        ):  # moved
            weight = self._weight = QuantizedWeight(self.weight, self.weight_scale, self.weight_indices)
        return weight

    packed_weight = quantized_weight

    def check_weight(self, prefix: str = "") -> None:
        self.quantized_weight.check_values(f"{prefix}weight")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        """What casts, moves or empties the tensors of a module. The parts of the weight are not cast, which a kernel
        reads in their own dtypes."""
        weight, scale = self.weight, self.weight_scale
        dtype = fn(scale.new_empty(0, dtype=self.dense_dtype)).dtype
        super()._apply(fn, recurse)
        self.dense_dtype = dtype
        if self.weight_scale.dtype != scale.dtype:
            self.weight_scale = scale.to(self.weight_scale.device)
        if self.weight.dtype != weight.dtype:  # fp8 counts as floating point
            self.weight = weight.to(self.weight.device)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """fp8 as bytes: torch cannot read it from a plain pickle."""
        state, weight = dict(vars(self)), self.weight
        if weight.dtype == FP8.dtype:
            state["_buffers"] = {**self._buffers, "weight": weight.view(torch.uint8)}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.weight.dtype == torch.uint8:
            self.weight = self.weight.view(FP8.dtype)

    def _check_state(self, state_dict: dict[str, Any], prefix: str) -> None:
        _check_parts({name: state_dict.get(prefix + name) for name in PARTS}, self.quantized_weight, prefix)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scheme={self.scheme}"


def _check_parts(parts: dict[str, Any], weight: QuantizedWeight, prefix: str) -> None:
    """Raises ValueError for parts that are of no weight of the kind; of those that are there, and of this shape.

    torch looks at shapes alone and casts: it would round the weight of a plain Linear to integers, mostly zeros.
    """
    dtypes = weight.dtype, torch.uint8, torch.float32
    for name, dtype in zip(PARTS, dtypes, strict=True):
        part = parts[name]
        if isinstance(part, Tensor) and part.dtype != dtype:
            rule, got = (str(t).removeprefix("torch.") for t in (dtype, part.dtype))
            raise ValueError(f"{prefix}{name} must be {rule} for a layer of {weight.scheme}, got {got}")
    values, scale = parts["weight"], parts["weight_scale"]
    indices = None if weight.indices is None else parts["weight_indices"]
    pairs = ((values, weight.values), (scale, weight.scale), (indices, weight.indices))
    if all(getattr(part, "shape", None) == getattr(ours, "shape", None) for part, ours in pairs):
        if not any(part.is_meta for part, _ in pairs if part is not None):
            QuantizedWeight(values, scale, indices).check_values(f"{prefix}weight")
