# SPDX-License-Identifier: Apache-2.0
"""Whether only its caller sees a call: no gradient of any mode, compiler, transform or dispatch mode does.

All of torch and os that is private here, since what is public does not answer or takes longer than a small layer: torch
has no public question for the modes and transforms that are on, and `os.environ` takes 0.7 us to say that a variable is
not set.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

_TYPES = (Tensor, Parameter)
_VARIABLES = ("MADTP_BACKEND", "MADTP_TUNE", "MADTP_CACHE", "MADTP_ONEDNN")


def _probe_of_process() -> Callable[[], tuple[object, ...] | None]:
    from torch import _C as c
    from torch.autograd import forward_ad

    is_compiling, threads = torch.compiler.is_compiling, torch.get_num_threads
    dispatch_modes, function_modes = c._len_torch_dispatch_stack, c._len_torch_function_stack
    transform, tracing = c._functorch.peek_interpreter_stack, c._get_tracing_state
    onednn = c._get_mkldnn_enabled
    environment: Any = os.environ
    variable = environment._data.get
    backend, tune, cache, switch = map(environment.encodekey, _VARIABLES)

    def state() -> tuple[object, ...] | None:
        if (
            is_compiling()
            or dispatch_modes()
            or function_modes()
            or transform() is not None
            or tracing() is not None
            or forward_ad._current_level >= 0
        ):
            return None
        return threads(), onednn(), variable(backend), variable(tune), variable(cache), variable(switch)

    return state


def _probes() -> tuple[Callable[[], tuple[object, ...] | None], Callable[[], bool]]:
    try:
        return _probe_of_process(), torch._C._autograd._profiler_enabled
    except (AttributeError, ImportError):  # of another torch: then every call goes where all can see it
        return lambda: None, lambda: True


# What of the process a call depends on, None where others would see the call; and whether it is profiled, in tables
# that would miss an op of ours.
state_of_process, is_profiled = _probes()


def is_plain(tensor: Tensor, grad: bool) -> bool:
    """Whether a tensor is on a CPU, of no class of its own, and without a gradient; grad: whether any are recorded."""
    return type(tensor) in _TYPES and tensor.is_cpu and not (grad and tensor.requires_grad) and not tensor.is_neg()
