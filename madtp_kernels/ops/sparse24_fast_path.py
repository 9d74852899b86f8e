# SPDX-License-Identifier: Apache-2.0
"""Calls of `sparse24_linear` that only their caller sees: no gradient of any mode, compiler, transform or profiler.

torch.library and the full checks cost more than a small layer does. Both run at the first call of a class; another call
of that class needs no more than is looked at here, and goes straight to the backend.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from madtp_kernels.reference.sparse24 import ACTIVATIONS
from madtp_kernels.sparse24.weight import Sparse24Weight

_TYPES = (Tensor, Parameter)
_BACKENDS = (None, "auto", "cpu", "dense")
_ACTIVATIONS = (None, *ACTIVATIONS)


def _probe_of_process() -> Callable[[], tuple[object, ...] | None]:
    """A function that says what of the process a call depends on; it returns None where others would see the call.

    All of torch and os that is private here, since what is public does not answer or takes longer than a small layer:
    torch has no public question for the modes and transforms that are on, and `os.environ` takes 0.7 us to say that a
    variable is not set.
    """
    from torch import _C as c
    from torch.autograd import forward_ad

    is_compiling, threads = torch.compiler.is_compiling, torch.get_num_threads
    dispatch_modes, function_modes = c._len_torch_dispatch_stack, c._len_torch_function_stack
    transform, tracing = c._functorch.peek_interpreter_stack, c._get_tracing_state
    profiles = c._autograd._profiler_enabled
    environment: Any = os.environ
    variable = environment._data.get
    backend, tune, cache = map(environment.encodekey, ("MADTP_BACKEND", "MADTP_TUNE", "MADTP_CACHE"))

    def state() -> tuple[object, ...] | None:
        if (
            is_compiling()
            or dispatch_modes()
            or function_modes()
            or transform() is not None
            or profiles()
            or tracing() is not None
            or forward_ad._current_level >= 0
        ):
            return None
        return threads(), variable(backend), variable(tune), variable(cache)

    return state


_state_of_process = _probe_of_process()


def fast_path_key(
    x: Tensor,
    weight: Sparse24Weight,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    scale: Tensor | None,
    backend: str | None,
) -> tuple[object, ...] | None:
    """What calls share that pass the same checks and run on the same backend; None where the call is seen by others.

    Calls of one key may differ in what their tensors hold, in strides and, within a class of `tuning_cpu`, in rows.
    """
    state = _state_of_process()
    if (
        state is None
        or type(weight) is not Sparse24Weight
        or backend not in _BACKENDS
        or activation not in _ACTIVATIONS
    ):
        return None
    grad, values = torch.is_grad_enabled(), weight.values
    if not _plain(x, grad) or (grad and values.requires_grad):
        return None
    shape, (out_features, half) = x.shape, values.shape
    if len(shape) != 2 or shape[1] != 2 * half:
        return None
    rows, bias_dtype, scale_dtype, residual_dtype = shape[0], None, None, None
    if bias is not None:
        if not _plain(bias, grad) or bias.shape != (out_features,):
            return None
        bias_dtype = bias.dtype
    if scale is not None:
        if not _plain(scale, grad) or scale.shape != (out_features,):
            return None
        scale_dtype = scale.dtype
    if residual is not None:
        if not _plain(residual, grad) or residual.shape != (rows, out_features):
            return None
        residual_dtype = residual.dtype
    return (
        out_features,  # which a write through `.data` can change, as it can the dtype
        half,
        values.dtype,
        (rows * rows).bit_length(),  # two and two of these are a class of `tuning_cpu`
        x.dtype,
        bias_dtype,
        activation,
        residual_dtype,
        scale_dtype,
        backend,
        state,
    )


def _plain(tensor: Tensor, grad: bool) -> bool:
    return type(tensor) in _TYPES and tensor.is_cpu and not (grad and tensor.requires_grad) and not tensor.is_neg()
