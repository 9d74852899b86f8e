# SPDX-License-Identifier: Apache-2.0
"""Calls of linear layers with packed weights that only their caller sees: no gradient, compiler, mode or profiler does.

torch.library and the full checks cost more than a small layer does. Both run at the first call of a class; another call
of that class needs no more than is looked at here, and goes straight to the backend.
"""

from __future__ import annotations

import torch
from torch import Tensor

from madtp_kernels.ops.unseen import is_plain, is_profiled, state_of_process
from madtp_kernels.quantized.weight import QuantizedWeight
from madtp_kernels.reference.sparse24 import ACTIVATIONS
from madtp_kernels.sparse24.weight import Sparse24Weight

_WEIGHTS = (Sparse24Weight, QuantizedWeight)
_BACKENDS = (None, "auto", "cpu", "dense", "onednn")
_ACTIVATIONS = (None, *ACTIVATIONS)


def fast_path_key(
    x: Tensor,
    weight: Sparse24Weight | QuantizedWeight,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    scale: Tensor | None,
    backend: str | None,
) -> tuple[object, ...] | None:
    """What calls share that pass the same checks and run on the same backend; None where the call is seen by others.

    It is a key of the weight's own `fast_paths`. Calls of one key may differ in what their tensors hold, in strides
    and, within a class of `tuning_cpu`, in rows.
    """
    state = state_of_process()
    if (
        state is None
        or is_profiled()
        or type(weight) not in _WEIGHTS
        or backend not in _BACKENDS
        or activation not in _ACTIVATIONS
    ):
        return None
    grad, values = torch.is_grad_enabled(), weight.values
    if not is_plain(x, grad) or (grad and values.requires_grad):
        return None
    shape, (out_features, columns) = x.shape, values.shape
    if len(shape) != 2:
        return None
    rows, channels = shape
    bias_dtype = scale_dtype = residual_dtype = None
    if bias is not None:
        if not is_plain(bias, grad) or bias.shape != (out_features,):
            return None
        bias_dtype = bias.dtype
    if scale is not None:
        if not is_plain(scale, grad) or scale.shape != (out_features,):
            return None
        scale_dtype = scale.dtype
    if residual is not None:
        if not is_plain(residual, grad) or residual.shape != (rows, out_features):
            return None
        residual_dtype = residual.dtype
    return (
        out_features,  # which a write through `.data` can change, as it can the dtype
        columns,
        values.dtype,
        channels,
        (rows * rows).bit_length(),  # two and two of these are a class of `tuning_cpu`
        x.dtype,
        bias_dtype,
        activation,
        residual_dtype,
        scale_dtype,
        backend,
        state,
    )
