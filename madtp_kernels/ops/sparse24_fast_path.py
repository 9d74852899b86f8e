"""Calls of `sparse24_linear` that only their caller sees: no gradient, compiler, mode, transform or profiler.

torch.library and the full checks cost more than a small layer does. Both run at the first call of a kind; another call
of that kind needs no more than is looked at here, and goes straight to the backend.
"""

from __future__ import annotations

import os

import torch
from torch import _C as _c
from torch import Tensor
from torch.nn import Parameter

from madtp_kernels.reference.sparse24 import ACTIVATIONS
from madtp_kernels.sparse24.weight import Sparse24Weight

_TYPES = (Tensor, Parameter)
_BACKENDS = (None, "auto", "cpu", "dense")
_ACTIVATIONS = (None, *ACTIVATIONS)
_variables = os.environ._data  # os.environ itself takes 0.7 us to say that a variable is not set
_BACKEND, _TUNE, _CACHE = map(os.environ.encodekey, ("MADTP_BACKEND", "MADTP_TUNE", "MADTP_CACHE"))


def kind_of(
    x: Tensor,
    weight: Sparse24Weight,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    scale: Tensor | None,
    backend: str | None,
) -> tuple | None:
    """What calls share that pass the same checks and run on the same backend; None where the call is seen by others.

    Calls of one kind may differ in what their tensors hold, in strides and, within a class of `tuning`, in rows.
    """
    if (
        torch.compiler.is_compiling()
        or _c._len_torch_dispatch_stack()
        or _c._len_torch_function_stack()
        or _c._functorch.peek_interpreter_stack() is not None
        or _c._autograd._profiler_enabled()
        or _c._get_tracing_state() is not None
        or type(weight) is not Sparse24Weight
        or backend not in _BACKENDS
        or activation not in _ACTIVATIONS
    ):
        return None
    grad, values = torch.is_grad_enabled(), weight.values
    if not _plain(x, grad) or (grad and values.requires_grad):
        return None
    shape, (features, half) = x.shape, values.shape
    if len(shape) != 2 or shape[1] != 2 * half:
        return None
    rows, bias_dtype, scale_dtype, residual_dtype = shape[0], None, None, None
    if bias is not None:
        if not _plain(bias, grad) or bias.shape != (features,):
            return None
        bias_dtype = bias.dtype
    if scale is not None:
        if not _plain(scale, grad) or scale.shape != (features,):
            return None
        scale_dtype = scale.dtype
    if residual is not None:
        if not _plain(residual, grad) or residual.shape != (rows, features):
            return None
        residual_dtype = residual.dtype
    return (
        (rows * rows).bit_length(),  # two and two of these are a class of `tuning`
        x.dtype,
        bias_dtype,
        activation,
        residual_dtype,
        scale_dtype,
        backend,
        torch.get_num_threads(),
        _variables.get(_BACKEND),
        _variables.get(_TUNE),
        _variables.get(_CACHE),
    )


def _plain(tensor: Tensor, grad: bool) -> bool:
    return type(tensor) in _TYPES and tensor.is_cpu and not (grad and tensor.requires_grad) and not tensor.is_neg()
