# SPDX-License-Identifier: Apache-2.0
"""What a few chosen queries attend to: the importance of image tokens to text, and no attention output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from madtp_kernels import checks, dispatch
from madtp_kernels.checks import check_device, check_rows, check_tensor, require
from madtp_kernels.flops import flop_formula
from madtp_kernels.native import attention_rows as native
from madtp_kernels.ops.autograd import register_autograd, register_second_order
from madtp_kernels.reference import attention_rows as reference

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dispatch.public
def attention_rows(
    q_rows: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    row_position: Tensor | None = None,
    *,
    softmax_scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """How much chosen queries attend to each key of their sequence, as FastV (arXiv 2403.06764) ranks image tokens.

    Args:
        q_rows: (R, H, D) float32, bfloat16 or float16, the chosen queries, sequence by sequence.
        k: (T, Hk, D), dtype of q_rows, all keys; H is a multiple of Hk, and head h reads key head h // (H / Hk). Any
            row and head stride will do for both, and nothing is repeated in memory.
        cu_seqlens_q: (B+1,) int32, where the rows of a sequence end; a sequence may have none.
        cu_seqlens_k: (B+1,) int32, where its keys end.
        row_position: (R,) int32, the place of a row among the keys of its sequence: it sees the keys up to that place.
            A row at -1 sees none and counts for nothing. None: every row sees all keys.
        softmax_scale: 1 / sqrt(D) by default; at 0 all keys that a row sees weigh the same.
        backend: auto, reference, cpu or triton.

    Returns:
        (T,) float32: the mean over the H heads and over the rows i of the sequence that see a key of
        softmax_j(softmax_scale q_i k_j), where the softmax is over the keys that row i sees, and 0 for the others. It
        adds up to 1 over a sequence; zeros where no row sees a key. Differentiable in q_rows and k.

    Raises:
        ValueError: an argument breaks a rule. RuntimeError: the backend cannot run here.
    """
    checks.check_types(q_rows=q_rows, k=k, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    checks.check_optional_types(row_position=row_position)
    if softmax_scale is None:
        softmax_scale = q_rows.shape[-1] ** -0.5 if q_rows.ndim and q_rows.shape[-1] else 1.0
    else:
        checks.check_number("softmax_scale", softmax_scale)
    attention: Tensor = torch.ops.madtp.attention_rows(
        q_rows, k, cu_seqlens_q, cu_seqlens_k, row_position, float(softmax_scale), dispatch.as_argument(backend)
    )
    return attention


_ARGUMENTS = (
    "Tensor q_rows, Tensor k, Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? row_position, float softmax_scale, "
    "str backend"
)
torch.library.define("madtp::attention_rows", f"({_ARGUMENTS}) -> Tensor")
torch.library.define("madtp::attention_rows_backward", f"(Tensor grad, {_ARGUMENTS}) -> (Tensor, Tensor)")


dispatch.register(
    "attention_rows",
    reference=reference.attention_rows,
    cpu=native.attention_rows,
    triton=dispatch.triton_launcher("attention_rows.forward", "attention_rows"),
)
dispatch.register("attention_rows_backward", reference=reference.attention_rows_backward)


def _check(
    q_rows: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    row_position: Tensor | None,
    softmax_scale: float,
) -> None:
    """All that can be told without reading a tensor."""
    check_tensor("q_rows", q_rows, 3, FLOATS)
    require(q_rows.shape[1] > 0 and q_rows.shape[2] > 0, "q_rows", "(R, H, D) of at least one head and channel", q_rows)
    check_tensor("k", k, 3, (q_rows.dtype,))
    if k.shape[2] != q_rows.shape[2] or k.shape[1] == 0 or q_rows.shape[1] % k.shape[1]:
        heads, head_dim = q_rows.shape[1:]
        require(False, "k", f"of heads of {head_dim} like q_rows, and of a number of them that divides {heads}", k)
    for side, x, cu_seqlens in (("q", q_rows, cu_seqlens_q), ("k", k, cu_seqlens_k)):
        checks.check_row_count("q_rows" if side == "q" else "k", x.shape[0])
        checks.check_cu_seqlens(f"cu_seqlens_{side}", cu_seqlens)
    check_rows("cu_seqlens_k", cu_seqlens_k, cu_seqlens_q.shape[0], "cu_seqlens_q")
    if row_position is not None:
        check_tensor("row_position", row_position, 1, (torch.int32,))
        check_rows("row_position", row_position, q_rows.shape[0], "q_rows")
    checks.check_finite("softmax_scale", softmax_scale)
    check_device(q_rows.device, k=k, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, row_position=row_position)


def _check_values(q_rows: Tensor, k: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> None:
    checks.check_cu_seqlens_values("cu_seqlens_q", cu_seqlens_q, q_rows.shape[0])
    checks.check_cu_seqlens_values("cu_seqlens_k", cu_seqlens_k, k.shape[0])


@torch.library.impl("madtp::attention_rows", "CompositeExplicitAutograd")
def _attention_rows(q_rows: Tensor, k: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *others: Any) -> Tensor:
    row_position, softmax_scale, backend = others
    _check(q_rows, k, cu_seqlens_q, cu_seqlens_k, row_position, softmax_scale)
    _check_values(q_rows, k, cu_seqlens_q, cu_seqlens_k)
    run: Callable[..., Tensor] = dispatch.implementation(
        "attention_rows", backend, q_rows.dtype, q_rows.device, tuple(q_rows.shape)
    )
    return run(q_rows, k, cu_seqlens_q, cu_seqlens_k, row_position, softmax_scale)


@torch.library.impl("madtp::attention_rows_backward", "CompositeExplicitAutograd")
def _attention_rows_backward(
    grad: Tensor, q_rows: Tensor, k: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *others: Any
) -> tuple[Tensor, ...]:
    row_position, softmax_scale, backend = others
    _check(q_rows, k, cu_seqlens_q, cu_seqlens_k, row_position, softmax_scale)
    _check_gradient(grad, k)
    _check_values(q_rows, k, cu_seqlens_q, cu_seqlens_k)
    run: Callable[..., tuple[Tensor, ...]] = dispatch.implementation(
        "attention_rows_backward", backend, q_rows.dtype, q_rows.device, tuple(q_rows.shape)
    )
    return run(grad, q_rows, k, cu_seqlens_q, cu_seqlens_k, row_position, softmax_scale)


def _check_gradient(grad: Tensor, k: Tensor) -> None:
    check_tensor("grad", grad, 1, (torch.promote_types(k.dtype, torch.float32),))
    check_rows("grad", grad, k.shape[0], "k")
    check_device(k.device, grad=grad)


@torch.library.register_fake("madtp::attention_rows")
def _(q_rows: Tensor, k: Tensor, *others: Any) -> Tensor:
    _check(q_rows, k, *others[:-1])
    return k.new_empty(k.shape[0], dtype=torch.promote_types(k.dtype, torch.float32))


@torch.library.register_fake("madtp::attention_rows_backward")
def _(grad: Tensor, q_rows: Tensor, k: Tensor, *others: Any) -> tuple[Tensor, ...]:
    _check(q_rows, k, *others[:-1])
    _check_gradient(grad, k)
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q_rows, k))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.softmax_scale, _ = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grads = torch.ops.madtp.attention_rows_backward(grad, *ctx.saved_tensors, ctx.softmax_scale, "reference")
    return *grads, *(None,) * 5


register_autograd("madtp::attention_rows", _backward, _setup_context)
register_second_order("madtp::attention_rows_backward", reference.attention_rows_backward, (0, 1, 2))


@flop_formula(torch.ops.madtp.attention_rows)
def _flops(
    q_rows: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *_: object,
    out_val: object = None,
    **__: object,
) -> int:
    """One matrix product of the rows and keys of each sequence, 2 FLOP per multiply-add."""
    pairs = (cu_seqlens_q.diff().long() * cu_seqlens_k.diff()).sum()
    return 2 * int(pairs) * q_rows.shape[1] * q_rows.shape[2]
