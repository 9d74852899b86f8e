# SPDX-License-Identifier: Apache-2.0
"""Linears that are not packed: run as `dense_linear` where nobody sees their call, and what that is."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from madtp.hooks import is_watched
from madtp.hwp.folding import ACTIVATIONS
from madtp_kernels import explain
from madtp_kernels.dispatch import Choice, is_auto
from madtp_kernels.ops.dense import is_small, onednn_linear


def run_on_onednn(
    module: nn.Module, x: Tensor, activation: str | None = None, residual: Tensor | None = None
) -> Tensor | None:
    """activation(module(x)) + residual, where oneDNN is the fastest and nobody else sees the call; None elsewhere."""
    if torch.compiler.is_compiling() or type(module) is not nn.Linear or is_small(x, module.out_features):
        return None
    parameters = module._parameters  # as attributes they take 2 us each
    weight = parameters.get("weight")
    if weight is None or "bias" not in parameters or is_watched(module):
        return None
    return onednn_linear(x, weight, parameters["bias"], activation, residual)


def kernel_of(activation: nn.Module) -> str | None:
    """What kernels call an activation that only its caller sees; None where they have none for it."""
    name = ACTIVATIONS.get(type(activation))
    return None if name is None or is_watched(activation) else name


def dense_choice(module: nn.Linear, rows: int, activation: str | None, with_residual: bool) -> Choice | None:
    """What an inference runs a Linear on, and why; None where it is called as a module."""
    called = type(module) is not nn.Linear or is_watched(module)
    if called or not module.weight.is_cpu or not is_auto(None):
        return None
    x = module.weight.new_empty(1).expand(rows, module.in_features)
    residual = module.weight.new_empty(1).expand(rows, module.out_features) if with_residual else None
    with torch.no_grad():
        return explain("dense_linear", x, module.weight, module.bias, activation=activation, residual=residual)
