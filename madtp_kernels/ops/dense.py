# SPDX-License-Identifier: Apache-2.0
"""Linear layers with a dense weight, on the fastest dense product of this CPU.

No op of torch.library: what has a gradient, or is seen by a compiler or a mode, is torch's own product.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from madtp_kernels import dispatch
from madtp_kernels.checks import check_device, check_tensor, check_types, require
from madtp_kernels.dense import onednn, torch_product
from madtp_kernels.dense import tuning_cpu as tuning
from madtp_kernels.dense.packed import can_keep, drop, packed
from madtp_kernels.ops.epilogue import check_epilogue, check_epilogue_types, in_any_shape
from madtp_kernels.ops.unseen import is_plain, state_of_process
from madtp_kernels.reference import dense as reference
from madtp_kernels.reference.sparse24 import ACTIVATIONS

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_ACTIVATIONS = (None, *ACTIVATIONS)
_ORDER = ("dense", "reference")
_LONG_WAY = ""  # in `_choices`: of calls that all checks have to see

_choices: dict[tuple[object, ...], str] = {}  # what calls of one class run on


@dispatch.public
def dense_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """A linear layer with its epilogue: y = residual + scale * activation(x W^T + bias).

    Args:
        x: (T, C) float32, bfloat16, float16 or float64; any row stride. Or (..., C), as for a Linear.
        weight: (N, C) dtype of x.
        bias: (N,) float32 or the dtype of x.
        activation: gelu, gelu_tanh, quick_gelu (x sigmoid(1.702 x)), relu, or None.
        residual: (T, N) dtype of x; any row stride. Or (..., N).
        scale: (N,) float32 or the dtype of x.
        backend: auto, reference, dense (torch's product) or onednn: the library that torch brings for CPUs, with the
            weight packed at its first use, which is as much memory again. It runs float32 and bfloat16, and nothing
            that has a gradient or that a compiler or a mode of torch sees. On a CPU auto measures at the first use of a
            shape which of the two is faster (`dense.tuning_cpu`), and takes onednn where that gains a tenth; small
            products are dense.

    Returns:
        (T, N) dtype of x, or (..., N); accumulated in float32 at least. On dense in bfloat16 and float16 the product is
        rounded before the epilogue, on onednn where the epilogue is more than an activation or a residual. The last
        bits of a row may follow the number of rows.
        Differentiable in all tensors, on reference and dense.

    Raises:
        ValueError: an argument breaks a rule. RuntimeError: the backend cannot run here.
    """
    if backend in (None, "auto"):
        runs = unseen_backend(x, weight, bias, activation, residual, scale)
        if runs == "onednn":
            return onednn.linear(x, packed(weight), bias, activation or "none", residual, scale)
        if runs == "dense":
            return torch_product.linear(x, weight, bias, activation or "none", residual, scale)
    check_types(x=x, weight=weight)
    check_epilogue_types(bias, activation, residual, scale, None)
    check_tensor("weight", weight, 2, FLOATS)
    asked = dispatch.as_argument(backend)
    if x.ndim != 2:

        def run_rows(x: Tensor, residual: Tensor | None) -> Tensor:
            return dense_linear(x, weight, bias, activation=activation, residual=residual, scale=scale, backend=asked)

        return in_any_shape(run_rows, x, weight.shape, residual, None)
    check_tensor("x", x, 2, (weight.dtype,))
    out_features, in_features = weight.shape
    require(x.shape[1] == in_features, "x", f"of {in_features} channels like weight", x)
    check_epilogue(x, out_features, bias, activation or "none", residual, scale, None)
    check_device(x.device, weight=weight, bias=bias, residual=residual, scale=scale)
    name = _backend(asked, x.dtype, x.device)
    run = {"reference": reference.dense_linear, "dense": torch_product.linear, "onednn": _on_onednn}[name]
    return run(x, weight, bias, activation or "none", residual, scale)


def onednn_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, residual: Tensor | None
) -> Tensor | None:
    """`dense_linear` of auto where it runs on onednn; None where it does not, or where an argument breaks a rule."""
    if unseen_backend(x, weight, bias, activation, residual, None) != "onednn":
        return None
    return onednn.linear(x, packed(weight), bias, activation or "none", residual, None)


def is_small(x: Tensor, out_features: int) -> bool:
    """Whether a call has half of the MACs, or less, of any that auto may run on onednn: what takes least to ask."""
    return 2 * x.numel() * out_features < tuning.MIN_MACS  # the rows of its class are less than twice its own


def unseen_backend(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    scale: Tensor | None,
) -> str | None:
    """dense or onednn, for a call of auto on rows of a CPU that only its caller sees; None for any other.

    It runs at every call. Calls of one key may differ in what their tensors hold, in strides and, within a class of
    `tuning_cpu`, in rows.
    """
    state = state_of_process()
    if state is None or activation not in _ACTIVATIONS or not is_plain(weight, False):
        return None
    grad = torch.is_grad_enabled()
    if grad and weight.requires_grad:
        drop(weight)
        return None
    if not is_plain(x, grad) or torch.is_autocast_enabled("cpu"):
        return None
    shape, weight_shape, dtype = x.shape, weight.shape, x.dtype
    if len(shape) != 2 or len(weight_shape) != 2 or weight.dtype is not dtype:
        return None
    (rows, channels), (out_features, in_features) = shape, weight_shape
    if channels != in_features:
        return None
    bias_dtype = scale_dtype = None
    if bias is not None:
        if not is_plain(bias, grad) or bias.shape != (out_features,):
            return None
        bias_dtype = bias.dtype
    if scale is not None:
        if not is_plain(scale, grad) or scale.shape != (out_features,):
            return None
        scale_dtype = scale.dtype
    if residual is not None:
        if not is_plain(residual, grad) or residual.shape != (rows, out_features) or residual.dtype is not dtype:
            return None
    key = (
        out_features,
        in_features,
        dtype,
        (rows * rows).bit_length(),  # two and two of these are a class of `tuning_cpu`
        bias_dtype,
        activation,
        residual is None,
        scale_dtype,
        state,
    )
    runs = _choices.get(key)
    if runs is None:
        runs = _choices[key] = _choose(x, weight, bias, activation, residual, scale)
    if runs == "onednn" and not (x.layout is torch.strided and can_keep(weight) and rows):
        return "dense"
    return runs or None


def _choose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    scale: Tensor | None,
) -> str:
    either = (x.dtype, torch.float32)
    fits = all(vector is None or vector.dtype in either for vector in (bias, scale))
    if not fits or x.dtype not in onednn.DTYPES or not dispatch.is_auto(None):
        return _LONG_WAY
    if not (x.shape[1] and weight.shape[0]):
        return "dense"
    return tuning.fastest(tuning.dense_call(x, weight, activation, residual, scale))


def _backend(backend: str, dtype: torch.dtype, device: torch.device) -> str:
    return dispatch.backend_name("dense_linear", backend, dtype, device)


# As torch.compiler.assume_constant_result does, which imports torch._dynamo: as much again as torch itself.
_backend._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _on_onednn(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, residual: Tensor | None, scale: Tensor | None
) -> Tensor:
    if (why := _seen_reason(x, weight, bias, residual, scale)) is not None:
        raise RuntimeError(f"dense_linear cannot run on backend 'onednn': {why}; auto would run 'dense'")
    if not (x.numel() and weight.numel()):
        return torch_product.linear(x, weight, bias, activation, residual, scale)
    kept = packed(weight) if can_keep(weight) else onednn.pack(weight)
    return onednn.linear(x, kept, bias, activation, residual, scale)


def _seen_reason(x: Tensor, *others: Tensor | None) -> str | None:
    """Why a call must be one of torch's own ops, or None."""
    if state_of_process() is None:
        return "a compiler, a transform or a mode of torch may see the call"
    tensors = [tensor for tensor in (x, *others) if tensor is not None]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return "it has no gradient, and one is recorded"
    if not all(is_plain(tensor, False) and tensor.layout is torch.strided for tensor in tensors):
        return "a tensor is of a class or a layout of its own"
    return None


def _limits(backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> str | None:
    return onednn.unsupported_reason(dtype) if backend == "onednn" else None


def _tuned(
    choice: dispatch.Choice,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    **__: object,
) -> dispatch.Choice:
    """For `explain`: the choice with what was measured of the call."""
    if choice.backend != "dense" or x.device.type != "cpu" or onednn.unsupported_reason(x.dtype) is not None:
        return choice
    why = _seen_reason(x, weight, bias, residual, scale)
    if why is None and torch.is_autocast_enabled("cpu"):
        why = "autocast is on"
    if why is None and not can_keep(weight):
        why = "what is packed of this weight could not be kept: it is no contiguous tensor that counts its writes"
    if why is not None:
        return replace(choice, rejected={**choice.rejected, "onednn": why})
    rows = x if x.ndim == 2 else x.flatten(0, -2) if x.ndim else x
    case = tuning.dense_call(rows, weight, activation, residual, scale)
    if not tuning.is_worth_asking(case):
        why = f"it gains less than it costs to ask below {tuning.MIN_MACS} MACs ({case})"
        return replace(choice, rejected={**choice.rejected, "onednn": why})
    return tuning.measurements.add_timings(choice, case, tuning.backends(case))


dispatch.register(
    "dense_linear",
    reference=reference.dense_linear,
    dense=torch_product.linear,
    onednn=_on_onednn,
    limits=_limits,
    tuned=_tuned,
    auto_order={"cpu": _ORDER, "cuda": _ORDER},
)
