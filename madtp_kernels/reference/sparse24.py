# SPDX-License-Identifier: Apache-2.0
"""Linear layers with a 2:4 weight, in plain PyTorch: at most 2 non-zeros in every aligned group of 4 columns.

The canonical form keeps two values of every group and their columns inside it: `values` (N, C/2), and `indices` uint8
(N, C/8), where byte b of a row holds group 2b in its low nibble and group 2b + 1 in the high one. A nibble is
i0 | i1 << 2 with i0 < i1; a group with fewer non-zeros keeps zeros. `madtp_kernels.Sparse24Weight` holds the two.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

_QUICK = 1.702  # CLIP's approximation of GELU


def sparse24_to_dense(values: Tensor, indices: Tensor) -> Tensor:
    """values (N, C/2), indices (N, C/8) -> weight (N, C)."""
    nibbles = torch.stack([indices & 15, indices >> 4], dim=-1).flatten(1)  # (N, C/4)
    columns = torch.stack([nibbles & 3, nibbles >> 2], dim=-1).long()  # (N, C/4, 2)
    groups = values.new_zeros(*nibbles.shape, 4)
    return groups.scatter(-1, columns, values.unflatten(1, (-1, 2))).flatten(1)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(_QUICK * x),
    "relu": F.relu,
}


def _quick_gelu_backward(grad: Tensor, x: Tensor) -> Tensor:
    gate = torch.sigmoid(_QUICK * x)
    return grad * gate * (1 + _QUICK * x * (1 - gate))


_BACKWARDS: dict[str, Callable[..., Tensor]] = {
    "none": lambda grad, x: grad,
    "gelu": torch.ops.aten.gelu_backward,
    "gelu_tanh": lambda grad, x: torch.ops.aten.gelu_backward(grad, x, approximate="tanh"),
    "quick_gelu": _quick_gelu_backward,
    "relu": lambda grad, x: grad * (x > 0),
}


def valid_rows(x: Tensor, num_rows: Tensor | None) -> Tensor:
    """(T, 1) bool: the first num_rows rows."""
    rows = torch.arange(x.shape[0], device=x.device)[:, None]
    return rows < (x.shape[0] if num_rows is None else num_rows)


def sparse24_linear(
    x: Tensor,  # (T, C)
    values: Tensor,  # (N, C/2)
    indices: Tensor,  # (N, C/8)
    layout: Tensor | None,  # for other backends
    bias: Tensor | None,  # (N,)
    activation: str,
    residual: Tensor | None,  # (T, N)
    scale: Tensor | None,  # (N,)
    num_rows: Tensor | None,  # one int32
) -> Tensor:  # (T, N)
    """residual + scale * activation(x W^T + bias), zeros from row `num_rows` on."""
    wide = torch.promote_types(x.dtype, torch.float32)
    dense = sparse24_to_dense(values, indices).to(wide)
    out = ACTIVATIONS[activation](F.linear(x.to(wide), dense, None if bias is None else bias.to(wide)))
    if scale is not None:
        out = out * scale.to(wide)
    if residual is not None:
        out = residual.to(wide) + out
    return torch.where(valid_rows(x, num_rows), out.to(x.dtype), 0)


def sparse24_linear_backward(
    grad: Tensor,  # (T, N)
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    layout: Tensor | None,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    scale: Tensor | None,
    num_rows: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of `sparse24_linear` to x, bias, residual and scale, exactly; empty for what is None."""
    wide = torch.promote_types(x.dtype, torch.float32)
    valid, dense, before = valid_rows(x, num_rows), sparse24_to_dense(values, indices).to(wide), None
    if needs_product(activation, scale):
        # Rows past num_rows may hold anything, and take no part.
        before = F.linear(torch.where(valid, x, 0).to(wide), dense, None if bias is None else bias.to(wide))  # (T, N)
    grad = torch.where(valid, grad, 0)
    grad_before, grad_bias, grad_residual, grad_scale = epilogue_backward(
        grad, before, bias, activation, residual, scale
    )
    return (grad_before @ dense).to(x.dtype), grad_bias, grad_residual, grad_scale


def needs_product(activation: str, scale: Tensor | None) -> bool:
    """Whether the gradients depend on what the epilogue was given."""
    return activation != "none" or scale is not None


def epilogue_backward(
    grad: Tensor,  # (T, N), zeros where there is no row
    before: Tensor | None,  # (T, N) float32 or wider: x W^T + bias, where `needs_product`
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients to `before`, in float32 or wider, and to bias, residual and scale; empty for what is None."""
    wide = torch.promote_types(grad.dtype, torch.float32)
    grad_out = grad.to(wide)
    grad_scale = grad.new_empty(0)
    if scale is not None:
        assert before is not None  # `needs_product`
        grad_scale = (grad_out * ACTIVATIONS[activation](before)).sum(0).to(scale.dtype)
        grad_out = grad_out * scale.to(wide)
    grad_before = _BACKWARDS[activation](grad_out, before)
    grad_bias = grad.new_empty(0) if bias is None else grad_before.sum(0).to(bias.dtype)
    return grad_before, grad_bias, grad.new_empty(0) if residual is None else grad, grad_scale
