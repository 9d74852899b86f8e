# SPDX-License-Identifier: Apache-2.0
"""What follows a product in its kernel, and the shapes it takes: the rules that every op of a linear layer shares."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from madtp_kernels.checks import check_optional_types, check_rows, check_tensor, require
from madtp_kernels.reference import sparse24 as reference

ACTIVATIONS = tuple(reference.ACTIVATIONS)
_NAMES = f"one of {', '.join(ACTIVATIONS)}"


def check_epilogue_types(bias: object, activation: object, residual: object, scale: object, num_rows: object) -> None:
    """The types of what a public function is given."""
    check_optional_types(bias=bias, residual=residual, scale=scale)
    require(num_rows is None or isinstance(num_rows, Tensor), "num_rows", "a tensor of one int32", num_rows)
    require(activation is None or isinstance(activation, str), "activation", f"{_NAMES} or None", activation)


def check_epilogue(
    x: Tensor,  # (T, C)
    out_features: int,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    scale: Tensor | None,
    num_rows: Tensor | None,
) -> None:
    """The metadata, but for devices."""
    either = tuple(dict.fromkeys((x.dtype, torch.float32)))
    for name, vector in (("bias", bias), ("scale", scale)):
        if vector is not None:
            check_tensor(name, vector, 1, either)
            check_rows(name, vector, out_features, "weight")
    if residual is not None:
        check_tensor("residual", residual, 2, (x.dtype,))
        expected = (x.shape[0], out_features)
        if tuple(residual.shape) != expected:
            require(False, "residual", f"of shape {expected}, (T, N)", residual)
    if num_rows is not None:
        ok = num_rows.numel() == 1 and num_rows.dtype == torch.int32 and num_rows.layout is torch.strided
        require(ok, "num_rows", "a tensor of one int32", num_rows)
    require(activation in ACTIVATIONS, "activation", _NAMES, activation)


def in_any_shape(
    run: Callable[[Tensor, Tensor | None], Tensor],  # x (T, C), residual (T, N) or None -> (T, N)
    x: Tensor,
    shape: torch.Size,
    residual: Tensor | None,
    num_rows: Tensor | None,
) -> Tensor:
    """run, of x (..., C) and residual (..., N) -> (..., N), as torch's linear layers take them; shape: (N, C)."""
    out_features, in_features = shape
    rule = f"of shape (..., {in_features}) like weight"
    require(x.ndim > 0 and x.shape[-1] == in_features, "x", rule, x)
    require(num_rows is None, "num_rows", "None unless x is (T, C)", num_rows)
    out_shape = (*x.shape[:-1], out_features)
    if residual is not None:
        if tuple(residual.shape) != out_shape:
            require(False, "residual", f"of shape {out_shape}, (..., N)", residual)
        residual = residual.reshape(-1, out_features) if out_features else residual.new_empty(x.shape[:-1].numel(), 0)
    rows = x.reshape(-1, in_features) if in_features else x.new_empty(x.shape[:-1].numel(), 0)
    return run(rows, residual).reshape(out_shape)
