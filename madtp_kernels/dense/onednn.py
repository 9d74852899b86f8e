# SPDX-License-Identifier: Apache-2.0
"""oneDNN's dense product, with the weight packed once and as much of the epilogue as it fuses.

torch calls it by ops that are private and meant for its compiler. So they are tried on a small case at their first use,
and one that is not there, or is wrong, is the reason for not using them.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from madtp_kernels.dense import torch_product
from madtp_kernels.measured import is_on
from madtp_kernels.reference.sparse24 import ACTIVATIONS

DTYPES = (torch.float32, torch.bfloat16)
VARIABLE = "MADTP_ONEDNN"
_FUSED: dict[str, tuple[str, list[float], str]] = {  # activation -> what the op calls it, its numbers and its variant
    "none": ("none", [], ""),  # and no relu, which would make a NaN 0
    "gelu": ("gelu", [], "none"),
    "gelu_tanh": ("gelu", [], "tanh"),
}


def unsupported_reason(dtype: torch.dtype) -> str | None:
    """Why a product in this dtype cannot run on oneDNN here, or None when it can."""
    if not is_on(VARIABLE):
        return f"{VARIABLE} is off"
    if dtype not in DTYPES:
        return f"oneDNN runs float32 and bfloat16 here, and this is {dtype}"
    if not torch.backends.mkldnn.enabled:
        return "torch.backends.mkldnn is off"
    return _failure(dtype)


def pack(weight: Tensor) -> Tensor:
    """weight (N, C) float32 or bfloat16 -> (N, C) in the order of oneDNN's kernels; not to be written to a file."""
    with torch.inference_mode(False), torch.no_grad():
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())
        return packed


def linear(
    x: Tensor,  # (T, C)
    packed: Tensor,  # (N, C), from pack
    bias: Tensor | None,  # (N,)
    activation: str,
    residual: Tensor | None,  # (T, N)
    scale: Tensor | None,  # (N,)
) -> Tensor:  # (T, N) dtype of x
    """As the reference; what is not fused is rounded as in `torch_product`. It has no gradient."""
    (run, run_with_residual), dtype = _products(), packed.dtype
    if scale is None and x.dtype is dtype and (bias is None or bias.dtype is dtype):
        if residual is None and activation in _FUSED:
            fused: Tensor = run(x, packed, bias, *_FUSED[activation])
            return fused
        if activation == "none":
            added: Tensor = run_with_residual(x, residual, packed, bias, "add")
            return added
    rows = torch_product.cast(x, dtype)

    def product(bias: Tensor | None) -> Tensor:
        out: Tensor = run(rows, packed, bias, *_FUSED["none"])
        return out

    return torch_product.with_epilogue(product, x, dtype, bias, activation, residual, scale)


@functools.cache
def _products() -> tuple[Any, Any]:
    """Without and with a residual. An overload takes half of the time of the op that looks for it."""
    op = torch.ops.mkldnn._linear_pointwise
    return op.default, op.binary


@functools.cache
def _failure(dtype: torch.dtype) -> str | None:
    """What is wrong with a small product that has every epilogue in turn, or None."""
    try:
        # Seen by no mode that is on, such as one of tensors without values.
        with torch._C._DisableTorchDispatch(), torch.inference_mode(False), torch.no_grad():
            return _wrong_epilogue(dtype)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError) as error:
        first = str(error).partition("\n")[0]
        return f"torch {torch.__version__} cannot pack a weight for oneDNN in {dtype} here ({first})"


def _wrong_epilogue(dtype: torch.dtype) -> str | None:
    """The rule is that of our own kernels, at most twice the error of torch: so few products have one order."""
    x, weight, bias, residual = (_numbers(*shape).to(dtype) for shape in ((5, 40), (24, 40), (24,), (5, 24)))
    packed = pack(weight)
    for activation in _FUSED:
        for added in (None, residual):
            arguments = bias, activation, added, None
            exact = ACTIVATIONS[activation](x.double() @ weight.double().t() + bias.double())
            exact = exact if added is None else exact + added.double()
            allowed = 2 * (torch_product.linear(x, weight, *arguments) - exact).abs().max()
            allowed += torch.finfo(dtype).eps * exact.abs().max()
            error = (linear(x, packed, *arguments) - exact).abs().max()
            if not error <= allowed:
                return f"oneDNN of torch {torch.__version__} is wrong by {error:.3g} with {activation} here"
    return None


def _numbers(*shape: int) -> Tensor:
    """Between -1 and 1, the same each time: a generator would be the user's."""
    count = torch.Size(shape).numel()
    return (torch.arange(count, device="cpu") * 37 % 101).view(shape) / 50 - 1
